"""What an idle platform costs: resident memory and CPU of everything but PostgreSQL and NATS."""

import asyncio
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Idle:
    """`rss_mb` and `cpu_percent` (of one core, over `seconds`) count services and daemon."""

    seconds: float
    rss_mb: float
    services_rss_mb: float
    daemon_rss_mb: float
    cpu_percent: float
    daemon_cpu_percent: float


async def measure(services_pid: int, daemon_pid: int, seconds: float, settle_seconds: float = 15.0) -> Idle:
    """Watch the two processes for `seconds` after `settle_seconds`."""
    services, daemon = psutil.Process(services_pid), psutil.Process(daemon_pid)
    await asyncio.sleep(settle_seconds)
    before = [_cpu_seconds(process) for process in (services, daemon)]
    await asyncio.sleep(seconds)
    used = [_cpu_seconds(process) - spent for process, spent in zip((services, daemon), before, strict=True)]
    services_mb, daemon_mb = (process.memory_info().rss / (1 << 20) for process in (services, daemon))
    return Idle(
        seconds=seconds,
        rss_mb=round(services_mb + daemon_mb, 1),
        services_rss_mb=round(services_mb, 1),
        daemon_rss_mb=round(daemon_mb, 1),
        cpu_percent=round(100 * sum(used) / seconds, 2),
        daemon_cpu_percent=round(100 * used[1] / seconds, 2),
    )


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
