"""What measured figures are worth, and what a device cannot be."""

import pytest

from dantegpu.domain.benchmark import cpu_score, gpu_score, implausible
from dantegpu.domain.gpus import KNOWN_GPUS

VRAM = KNOWN_GPUS["RTX 4090"].vram_bytes


def test_a_card_that_reaches_the_reference_has_100_and_what_was_not_measured_does_not_count():
    assert gpu_score(82.6, 165.2, 1008.0) == 100
    assert gpu_score(82.6, 0, 1008.0) == 100
    assert gpu_score(41.3, 82.6, 504.0) == 50
    assert gpu_score(0, 0, 0) == 0
    assert cpu_score(1000, 50) == 100


@pytest.mark.parametrize(
    ("vram_bytes", "capability", "tflops", "why"),
    [
        (VRAM, 89, 70.0, ""),
        (VRAM, 0, 0.0, ""),
        (VRAM, 75, 0.0, "has compute capability 7.5"),
        (VRAM // 3, 89, 0.0, "33% of its memory"),
        (VRAM, 89, 12.0, "computes at 15% of its speed"),
    ],
)
def test_a_device_that_cannot_be_what_it_says_is_found_out(vram_bytes: int, capability: int, tflops: float, why: str):
    said = implausible("NVIDIA GeForce RTX 4090", vram_bytes, capability, tflops)
    assert (why in said) if why else said == ""


def test_of_an_unknown_model_nothing_is_known():
    assert implausible("Voodoo 2", 1, 10, 0.001) == ""
