"""What is printed reads back; what people type never breaks a parser in an unlisted way."""

from contextlib import suppress
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from dantegpu.domain.ids import InvalidId, JobId
from dantegpu.domain.resources import GpuRequest, InvalidGpuSpec, parse_cpu_milli, parse_gpu_spec
from dantegpu.domain.units import (
    MAX_AMOUNT_UDGPU,
    MAX_DURATION_SECONDS,
    IntRange,
    InvalidQuantity,
    MemoryRange,
    MicroDgpu,
    format_dgpu,
    format_duration,
    parse_dgpu,
    parse_duration,
    parse_memory,
)

SPEC_PIECES = st.sampled_from(
    ["A100", "RTX 4090", "h100", "24GB", "40GB..80GB", "..", ":", ",", "2", "0.5", "cc8.0", " "]
)


@given(st.uuids(), st.uuids())
def test_every_id_reads_back_and_its_text_sorts_like_its_uuid(first: UUID, second: UUID):
    assert JobId.parse(str(JobId(first))) == JobId(first)
    assert (str(JobId(first)) < str(JobId(second))) == (first < second) == (JobId(first) < JobId(second))


@given(st.text(max_size=60) | st.text("job_0123456789abcdefghjkmnpqrstvwxyz", min_size=26, max_size=32))
def test_a_text_is_an_id_or_refused_and_has_one_spelling(text: str):
    with suppress(InvalidId):
        assert str(JobId.parse(text)) == text


@given(st.integers(0, MAX_AMOUNT_UDGPU))
def test_every_amount_reads_back(amount: int):
    assert parse_dgpu(format_dgpu(MicroDgpu(amount))) == amount


@given(st.integers(0, MAX_DURATION_SECONDS))
def test_every_duration_reads_back(seconds: int):
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text(max_size=30))
def test_parsers_of_quantities_raise_nothing_but_their_own_error(text: str):
    for parse in (parse_dgpu, parse_memory, parse_duration, parse_cpu_milli, IntRange.parse, MemoryRange.parse):
        with suppress(InvalidQuantity):
            parse(text)


@given(st.text(max_size=40) | st.lists(SPEC_PIECES, max_size=8).map("".join))
def test_a_gpu_spec_is_refused_by_name_or_reads_back_as_itself(text: str):
    with suppress(InvalidGpuSpec):
        request = parse_gpu_spec(text)
        assert parse_gpu_spec(str(request)) == request


@given(
    st.dictionaries(
        st.sampled_from(["name", "count", "memory", "compute_capability", "x"]),
        st.text(max_size=10) | st.integers() | st.floats() | st.none() | st.lists(st.text(max_size=5), max_size=3),
        max_size=4,
    )
)
def test_a_gpu_mapping_is_refused_by_name_or_understood(spec: dict[str, object]):
    with suppress(InvalidGpuSpec):
        assert isinstance(parse_gpu_spec(spec), GpuRequest)
