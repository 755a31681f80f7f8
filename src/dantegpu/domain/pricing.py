"""Prices, rates and billable time. Everything is an integer; amounts round up, shares round down.

A rate is locked at placement. An attempt's running time is cut into windows of WINDOW_SECONDS; each window has its own
hold, so a wallet never has to cover more than a window ahead and a window is billed exactly once.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

from dantegpu.domain.units import MILLI_PER_UNIT, MicroDgpu

WINDOW_SECONDS = 300
SECONDS_PER_HOUR = 3600
DEFAULT_PLATFORM_FEE_BASIS_POINTS = 500
BASIS_POINTS = 10_000
FULL_PRICE_PERCENT = 100
_SECOND = timedelta(seconds=1)


class WindowUse(NamedTuple):
    """Seconds of one window that an attempt used."""

    window: int
    used_seconds: int


def rate_udgpu_per_hour(
    *,
    gpu_milli: int,
    cpu_milli: int,
    price_udgpu_per_gpu_hour: int,
    price_udgpu_per_cpu_hour: int,
    price_percent: int = FULL_PRICE_PERCENT,
) -> MicroDgpu:
    """What an hour of a placement costs, rounded up.

    A job with GPUs pays for its milli-GPUs alone; a job without pays for its milli-CPUs. Spot work pays only
    `price_percent` of the price.
    """
    if min(gpu_milli, cpu_milli, price_udgpu_per_gpu_hour, price_udgpu_per_cpu_hour, price_percent) < 0:
        raise ValueError("amounts and prices are not negative")
    milli, price = (gpu_milli, price_udgpu_per_gpu_hour) if gpu_milli else (cpu_milli, price_udgpu_per_cpu_hour)
    return MicroDgpu(ceil_div(milli * price * price_percent, MILLI_PER_UNIT * FULL_PRICE_PERCENT))


def charge_udgpu(rate_udgpu_per_hour: int, seconds: int) -> MicroDgpu:
    """The price of `seconds` at a rate: ceil(rate * seconds / 3600)."""
    if rate_udgpu_per_hour < 0 or seconds < 0:
        raise ValueError("rates and seconds are not negative")
    return MicroDgpu(ceil_div(rate_udgpu_per_hour * seconds, SECONDS_PER_HOUR))


def hold_ceiling_udgpu(rate_udgpu_per_hour: int, window_seconds: int = WINDOW_SECONDS) -> MicroDgpu:
    """What a hold sets aside: the charge for its whole window, so closing can never need more."""
    return charge_udgpu(rate_udgpu_per_hour, window_seconds)


def billable_seconds(running_at: datetime | None, until: datetime | None) -> int:
    """Whole seconds from `running_at` to `until`, rounded up, at least 1; 0 when the command never ran."""
    if running_at is None or until is None:
        return 0
    return max(1, -((running_at - until) // _SECOND))


def window_of(running_at: datetime, now: datetime) -> int:
    """The window that `now` falls in: 0 for the first WINDOW_SECONDS of running."""
    return max(0, (now - running_at) // _SECOND) // WINDOW_SECONDS


def window_ends_at(running_at: datetime, window: int) -> datetime:
    """When `window` is used up and the next one needs its hold."""
    return running_at + timedelta(seconds=(window + 1) * WINDOW_SECONDS)


def windows_used(total_seconds: int) -> list[WindowUse]:
    """Cut an attempt's billable seconds into windows, the last one partly used. They add up to `total_seconds`."""
    full, rest = divmod(total_seconds, WINDOW_SECONDS)
    uses = [WindowUse(window, WINDOW_SECONDS) for window in range(full)]
    if rest:
        uses.append(WindowUse(full, rest))
    return uses


def ceil_div(dividend: int, divisor: int) -> int:
    """Division that rounds up, exact for integers of any size."""
    return -(-dividend // divisor)
