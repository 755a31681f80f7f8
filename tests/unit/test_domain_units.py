from datetime import UTC, datetime, timedelta

import pytest

from dantegpu.domain.clock import ManualClock, SystemClock
from dantegpu.domain.units import (
    GIB,
    MIB,
    IntRange,
    InvalidQuantity,
    MemoryRange,
    MicroDgpu,
    format_bytes,
    format_dgpu,
    format_duration,
    parse_dgpu,
    parse_duration,
    parse_memory,
)


@pytest.mark.parametrize(
    ("text", "amount"), [("2.50", 2_500_000), ("0", 0), ("0.000001", 1), ("12", 12_000_000), (" 1.2 ", 1_200_000)]
)
def test_amounts_are_read_exactly(text: str, amount: int):
    assert parse_dgpu(text) == amount


@pytest.mark.parametrize("text", ["", "-1", "1.0000001", "1e3", "1,5", ".5", "1.", "nan", "9" * 13, "٣"])
def test_amounts_that_would_need_rounding_or_guessing_are_refused(text: str):
    with pytest.raises(InvalidQuantity):
        parse_dgpu(text)


def test_amounts_are_shown_with_at_least_two_decimals_and_none_too_few():
    assert [format_dgpu(MicroDgpu(amount)) for amount in (2_500_000, 1, 0, -1_230_000)] == [
        "2.50",
        "0.000001",
        "0.00",
        "-1.23",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * GIB), ("16 GiB", 16 * GIB), ("512mb", 512 * MIB), ("1.5GiB", 3 * GIB // 2), ("4096", 4096)],
)
def test_sizes_count_in_powers_of_two(text: str, size: int):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1.5", "-1GB", "16XB", "1..2GB", "99999TB"])
def test_what_is_not_a_size_is_refused(text: str):
    with pytest.raises(InvalidQuantity):
        parse_memory(text)


def test_sizes_are_shown_short():
    assert [format_bytes(size) for size in (0, 1023, 16 * GIB, 3 * GIB // 2, 24_564 * MIB)] == [
        "0B",
        "1023B",
        "16GB",
        "1.5GB",
        "24GB",
    ]


@pytest.mark.parametrize(
    ("value", "seconds"), [("8h", 28_800), ("90s", 90), ("1h30m", 5400), ("2d", 172_800), ("90", 90), (7, 7), ("0s", 0)]
)
def test_durations_are_read_to_whole_seconds(value: str | int, seconds: int):
    assert parse_duration(value) == seconds


@pytest.mark.parametrize("value", ["", "h", "1x", "-5s", -5, True, "1.5h", "30m1h", "9" * 41, "99999d"])
def test_what_is_not_a_duration_is_refused(value: str | int):
    with pytest.raises(InvalidQuantity):
        parse_duration(value)


def test_durations_are_shown_exactly():
    assert [format_duration(seconds) for seconds in (0, 90, 5400, 93_784)] == ["0s", "1m30s", "1h30m", "1d2h3m4s"]


def test_ranges_of_numbers_are_exact_without_dots_and_open_with_them():
    assert IntRange.parse("4") == IntRange(4, 4)
    assert IntRange.parse("16..") == IntRange(16, None)
    assert IntRange.parse("..8") == IntRange(0, 8)
    assert 3 in IntRange.parse("2..4")
    assert 5 not in IntRange.parse("2..4")


def test_a_bare_size_is_a_lower_bound_and_a_unit_may_be_said_once():
    assert MemoryRange.parse("24GB") == MemoryRange(24 * GIB, None)
    assert MemoryRange.parse("40..80GB") == MemoryRange(40 * GIB, 80 * GIB)
    assert 8 * GIB in MemoryRange.parse("..8GB")


@pytest.mark.parametrize("text", ["", "..", "4..2", "a", "1..2..3", "-1"])
def test_what_is_not_a_range_is_refused(text: str):
    with pytest.raises(InvalidQuantity):
        IntRange.parse(text)
    with pytest.raises(InvalidQuantity):
        MemoryRange.parse(text.replace("4..2", "4GB..2GB"))


def test_a_manual_clock_moves_only_when_told_and_steps_without_time_passing():
    start = datetime(2026, 1, 1, tzinfo=UTC)
    clock = ManualClock(start)
    clock.advance(2.5)
    clock.step(-60)
    assert clock.now() == start + timedelta(seconds=-57.5)
    assert clock.monotonic() == 2.5
    with pytest.raises(ValueError, match="step"):
        clock.advance(-1)


def test_the_system_clock_is_aware_utc():
    assert SystemClock().now().utcoffset() == timedelta(0)
