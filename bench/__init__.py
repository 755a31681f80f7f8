"""Benchmarks: `dante bench NAME [--json]`. Each prints one object with medians; see docs/performance.md."""
