"""The client, written once with async/await; `dantegpu.sdk._sync` is generated from it by scripts/unasync.py."""
