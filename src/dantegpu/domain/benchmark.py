"""What measured figures are worth, and whether a device can be what it says it is. Everybody can recompute both.

    score of a GPU = 100 x geometric mean of (FP32 / 82.6 TFLOPS, BF16 / 165.2 TFLOPS, memory / 1008 GB/s)
    score of a CPU = 100 x geometric mean of (FP32 / 1000 GFLOPS, memory / 50 GB/s)

so that an RTX 4090 that reaches its data sheet has 100. A figure that was not measured is left out of the mean.
"""

import math
from collections.abc import Mapping, Sequence

from dantegpu.domain.gpus import find_known_gpu

GPU_REFERENCE = (82.6, 165.2, 1008.0)
"""NVIDIA's data sheet of the RTX 4090: FP32 TFLOPS, dense BF16 TFLOPS, GB/s."""
CPU_REFERENCE = (1000.0, 50.0)
LEAST_VRAM_FRACTION = 0.6
"""Of the known model's memory: models are sold in variants with up to a third less."""
LEAST_SPEED_FRACTION = 0.3
"""Of the data sheet's FP32 rate: power limits, heat and old drivers cost much, but not more."""

# Data sheets, FP32 without tensor cores, in TFLOPS.
FP32_TFLOPS: Mapping[str, float] = {
    "B200": 75.0, "H200": 67.0, "H100": 67.0, "H100 NVL": 60.0, "GH200": 67.0, "A100": 19.5, "A100-40GB": 19.5,
    "A40": 37.4, "A30": 10.3, "A10": 31.2, "L40S": 91.6, "L40": 90.5, "L4": 30.3, "T4": 8.1, "V100": 15.7,
    "RTX 5090": 104.8, "RTX 4090": 82.6, "RTX 4080": 48.7, "RTX 4070": 29.2, "RTX 3090": 35.6, "RTX 3080": 29.8,
    "RTX 3070": 20.3, "RTX 3060": 12.7, "RTX 2080 Ti": 13.4, "MI300X": 163.4, "MI250X": 47.9, "MI210": 22.6,
}  # fmt: skip


def gpu_score(fp32_tflops: float, bf16_tflops: float, memory_gbps: float) -> float:
    """0 when nothing was measured."""
    return _score((fp32_tflops, bf16_tflops, memory_gbps), GPU_REFERENCE)


def cpu_score(gflops: float, memory_gbps: float) -> float:
    """0 when nothing was measured."""
    return _score((gflops, memory_gbps), CPU_REFERENCE)


def _score(figures: Sequence[float], reference: Sequence[float]) -> float:
    ratios = [figure / full for figure, full in zip(figures, reference, strict=True) if figure > 0]
    if not ratios:
        return 0.0
    return round(100 * math.exp(sum(map(math.log, ratios)) / len(ratios)), 2)


def implausible(model: str, vram_bytes: int, capability: int, fp32_tflops: float) -> str:
    """Why a whole device cannot be the model that it says it is; empty when it can, or the model is not known.

    `capability` is 89 for 8.9; it and `fp32_tflops` are 0 where they are not known.
    """
    known = find_known_gpu(model)
    if known is None:
        return ""
    if capability and known.compute_capability and capability != known.compute_capability:
        return f"says it is a {known.name}, but has compute capability {capability // 10}.{capability % 10}"
    if vram_bytes < known.vram_bytes * LEAST_VRAM_FRACTION:
        return f"says it is a {known.name}, but has only {vram_bytes / known.vram_bytes:.0%} of its memory"
    full = FP32_TFLOPS.get(known.name, 0.0)
    if full and 0 < fp32_tflops < full * LEAST_SPEED_FRACTION:
        return f"says it is a {known.name}, but computes at {fp32_tflops / full:.0%} of its speed"
    return ""
