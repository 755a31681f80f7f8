import pytest

from dantegpu.domain.gpus import KNOWN_GPUS, find_known_gpu, matches_model, nearest_gpu_name
from dantegpu.domain.resources import (
    CapabilityRange,
    GpuRequest,
    InvalidGpuSpec,
    ResourceRequest,
    parse_cpu_milli,
    parse_gpu_spec,
)
from dantegpu.domain.units import GIB, InvalidQuantity, MemoryRange


@pytest.mark.parametrize(
    ("spec", "request_"),
    [
        ("H100:8", GpuRequest(("H100",), 8, 8)),
        ("24GB", GpuRequest(vram=MemoryRange(24 * GIB, None))),
        ("A100:40GB..80GB:2", GpuRequest(("A100",), 2, 2, vram=MemoryRange(40 * GIB, 80 * GIB))),
        ("0.5", GpuRequest(milli=500)),
        ("T4:0.25", GpuRequest(("T4",), milli=250)),
        ("RTX4090:2", GpuRequest(("RTX 4090",), 2, 2)),
        ("2", GpuRequest((), 2, 2)),
        (2, GpuRequest((), 2, 2)),
        ("1..2", GpuRequest((), 1, 2)),
        ("2..", GpuRequest((), 2, None)),
        ("A100, H100 : 1..2", GpuRequest(("A100", "H100"), 1, 2)),
        ("cc8.0..", GpuRequest(compute_capability=CapabilityRange(80, None))),
        (
            {"name": ["A100", "H100"], "count": "1..2", "memory": "24GB..", "compute_capability": "8.0.."},
            GpuRequest(("A100", "H100"), 1, 2, 1000, MemoryRange(24 * GIB, None), CapabilityRange(80, None)),
        ),
    ],
)
def test_gpu_specs_of_the_peers_are_understood(spec: str, request_: GpuRequest):
    assert parse_gpu_spec(spec) == request_


@pytest.mark.parametrize("spec", ["H100:8", "24GB", "A100:40GB..80GB:2", "0.5", "A100,H100:1..2", "cc8.0..8.9:2", "1"])
def test_the_canonical_text_reads_back_as_the_same_request(spec: str):
    request = parse_gpu_spec(spec)
    assert parse_gpu_spec(str(request)) == request


@pytest.mark.parametrize(
    ("spec", "position", "expected", "nearest"),
    [
        ("RTX4O90:2", 0, "known GPU name", "RTX 4090"),
        ("2:RTX4O90", 2, "known GPU name", "RTX 4090"),
        ("A100,H10", 5, "known GPU name", "H100"),
        ("4090", 0, "a count from 1 to 64", "RTX 4090"),
        ("A100:0", 5, "a count from 1", None),
        ("A100::2", 5, "between the colons", None),
        ("A100:2:3", 7, "only one count", None),
        ("24GB:2:48GB", 7, "only one memory size", None),
        ("A100:24XB", 5, "memory size or a count", None),
        ("80GB..40GB", 0, "memory size such as", None),
        ("8.5", 0, "memory size", None),
        ("", 0, "a spec such as", None),
        ("A" * 1000, 0, "a spec such as", None),
    ],
)
def test_a_wrong_spec_says_where_and_what_was_expected(spec: str, position: int, expected: str, nearest: str | None):
    with pytest.raises(InvalidGpuSpec) as caught:
        parse_gpu_spec(spec)
    assert (caught.value.position, caught.value.nearest) == (position, nearest)
    assert expected in str(caught.value)


def test_a_wrong_key_of_the_mapping_form_names_the_nearest_one():
    with pytest.raises(InvalidGpuSpec, match="did you mean 'memory'"):
        parse_gpu_spec({"memroy": "24GB"})


def test_a_model_of_the_fleet_may_be_asked_for_though_the_table_does_not_know_it():
    assert parse_gpu_spec("FutureCard 9", also_known=["NVIDIA FutureCard 9"]).names == ("FutureCard 9",)


@pytest.mark.parametrize(
    ("requested", "model"),
    [
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("A100", "NVIDIA A100-SXM4-80GB"),
        ("a100-80gb", "NVIDIA A100 80GB PCIe"),
        ("A100 SXM4", "NVIDIA A100-SXM4-40GB"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("T4", "Tesla T4"),
        ("A6000", "NVIDIA RTX A6000"),
        ("RTX6000Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_names_match_whatever_their_spelling(requested: str, model: str):
    assert matches_model(requested, model)


@pytest.mark.parametrize(
    ("requested", "model"),
    [
        ("A10", "NVIDIA A100-SXM4-80GB"),
        ("A10", "NVIDIA A10G"),
        ("L4", "NVIDIA L40S"),
        ("RTX 3090", "NVIDIA GeForce RTX 3090 Ti"),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("A40", "NVIDIA RTX A4000"),
    ],
)
def test_a_name_never_takes_a_different_model(requested: str, model: str):
    assert not matches_model(requested, model)


def test_every_known_gpu_is_found_by_its_name_and_by_its_drivers_name():
    for name, gpu in KNOWN_GPUS.items():
        assert find_known_gpu(name) == gpu
        assert matches_model(name, gpu.model)


def test_nothing_is_suggested_for_a_name_that_is_close_to_none():
    assert nearest_gpu_name("qqqqqqqq") is None


def test_a_card_counts_with_its_nominal_memory_though_ecc_keeps_a_part():
    request = parse_gpu_spec("24GB..")
    assert request.accepts_vram(KNOWN_GPUS["L4"].vram_bytes)
    assert request.accepts_vram(KNOWN_GPUS["RTX 4090"].vram_bytes)
    assert not request.accepts_vram(22 * GIB)


def test_upper_bounds_of_gpu_memory_hold():
    assert not parse_gpu_spec("..40GB").accepts_vram(KNOWN_GPUS["A100"].vram_bytes)
    assert parse_gpu_spec("40GB..80GB").accepts_vram(KNOWN_GPUS["A100"].vram_bytes)


def test_host_resources_take_the_lower_end_of_a_range():
    request = ResourceRequest.parse(gpu="A100", cpu="16..", memory="64GB..", disk="100GB")
    assert (request.cpu_milli, request.memory_bytes, request.disk_bytes) == (16_000, 64 * GIB, 100 * GIB)


def test_half_a_core_is_500_milli():
    assert [parse_cpu_milli(value) for value in (4, "0.5", "2..8", 0.25)] == [4000, 500, 2000, 250]


@pytest.mark.parametrize("value", ["", "0", "x", "-1", "4..x", True, 10**9])
def test_what_is_not_a_number_of_cores_is_refused(value: str | int):
    with pytest.raises(InvalidQuantity):
        parse_cpu_milli(value)
