from datetime import UTC, datetime, timedelta

import pytest

from dantegpu.domain.pricing import (
    WINDOW_SECONDS,
    WindowUse,
    billable_seconds,
    charge_udgpu,
    hold_ceiling_udgpu,
    rate_udgpu_per_hour,
    window_ends_at,
    window_of,
    windows_used,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def rate(gpu_milli: int = 0, cpu_milli: int = 0) -> int:
    return rate_udgpu_per_hour(
        gpu_milli=gpu_milli, cpu_milli=cpu_milli, price_udgpu_per_gpu_hour=2_000_001, price_udgpu_per_cpu_hour=50_000
    )


def test_a_gpu_job_pays_for_its_gpus_alone_and_a_cpu_job_for_its_cores():
    assert rate(gpu_milli=2000, cpu_milli=8000) == 4_000_002
    assert rate(cpu_milli=1500) == 75_000


def test_half_a_gpu_costs_half_rounded_up():
    assert rate(gpu_milli=500) == 1_000_001


def test_a_charge_is_rounded_up_to_the_next_micro():
    assert charge_udgpu(3600, 1) == 1
    assert charge_udgpu(3601, 1) == 2
    assert charge_udgpu(0, 100) == 0


def test_a_hold_covers_its_whole_window():
    assert hold_ceiling_udgpu(3_600_000) == charge_udgpu(3_600_000, WINDOW_SECONDS)


@pytest.mark.parametrize(("elapsed", "seconds"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.000001, 2), (59.5, 60), (-5.0, 1)])
def test_time_is_billed_in_whole_seconds_and_at_least_one(elapsed: float, seconds: int):
    assert billable_seconds(T0, T0 + timedelta(seconds=elapsed)) == seconds


def test_what_never_ran_is_not_billed():
    assert billable_seconds(None, T0) == 0
    assert billable_seconds(T0, None) == 0


def test_a_moment_on_the_border_belongs_to_the_next_window():
    assert window_of(T0, window_ends_at(T0, 0) - timedelta(microseconds=1)) == 0
    assert window_of(T0, window_ends_at(T0, 0)) == 1


def test_seconds_are_cut_into_windows_that_add_up():
    assert windows_used(0) == []
    assert windows_used(WINDOW_SECONDS) == [WindowUse(0, WINDOW_SECONDS)]
    assert windows_used(WINDOW_SECONDS + 1) == [WindowUse(0, WINDOW_SECONDS), WindowUse(1, 1)]
