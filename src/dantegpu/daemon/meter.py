"""What attempts use, every few seconds: for their owners, and for the machine's own Prometheus.

A job that ends within one interval costs nothing here: nobody would look at a curve of one point.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.attempt import Attempt
from dantegpu.daemon.executors.base import Stats
from dantegpu.daemon.leases import boottime
from dantegpu.daemon.probe.devices import GpuSample
from dantegpu.domain.ids import AttemptId

METRICS_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Reading:
    """Counters of an attempt at one moment, on the boot clock."""

    at: float
    stats: Stats


class Meter:
    """Remembers each attempt's last counters, to tell how much was used in between."""

    def __init__(self, sample_gpus: Callable[[], Sequence[GpuSample]]) -> None:
        self._sample_gpus = sample_gpus
        self._before: dict[AttemptId, _Reading] = {}
        self._points: dict[AttemptId, tuple[str, machine_pb2.MetricsPoint]] = {}
        self._gpus: Sequence[GpuSample] = ()

    async def measure(self, attempts: Iterable[Attempt]) -> list[machine_pb2.MetricsPoint]:
        """A point for each attempt that has run for an interval, over what it used since the last call."""
        old = [a for a in attempts if a.running and a.ran_seconds >= METRICS_INTERVAL_SECONDS]
        if any(attempt.devices for attempt in old):
            self._gpus = await asyncio.to_thread(self._sample_gpus)
        samples = {sample.index: sample for sample in self._gpus}
        readings: dict[AttemptId, _Reading] = {}
        points: dict[AttemptId, tuple[str, machine_pb2.MetricsPoint]] = {}
        for attempt in old:
            stats = await attempt.stats()
            if stats is None:
                continue  # it has ended meanwhile
            attempt_id = attempt.row.attempt_id
            reading = readings[attempt_id] = _Reading(boottime(), stats)
            point = _point(attempt, self._before.get(attempt_id), reading)
            point.devices.extend(use_of(samples[index]) for index in attempt.devices if index in samples)
            points[attempt_id] = (str(attempt.row.job_id), point)
        self._before, self._points = readings, points
        return [point for _, point in points.values()]

    def gauges(self) -> Mapping[str, float]:
        """The last points, and the machine's GPUs, for Prometheus."""
        found: dict[str, float] = {}
        for job_id, point in self._points.values():
            labels = f'{{job_id="{job_id}",attempt_id="{point.attempt_id}"}}'
            found[f"dante_attempt_processes{labels}"] = point.processes
            for name in ("cpu_cores", "memory_bytes", "read_bytes_per_second", "written_bytes_per_second"):
                if point.HasField(name):  # pyright: ignore[reportArgumentType]
                    found[f"dante_attempt_{name}{labels}"] = getattr(point, name)
        for gpu in self._gpus:
            labels = f'{{gpu="{gpu.index}"}}'
            found[f"dante_gpu_utilisation{labels}"] = gpu.utilisation
            found[f"dante_gpu_vram_used_bytes{labels}"] = gpu.vram_used_bytes
            found[f"dante_gpu_temperature_celsius{labels}"] = gpu.temperature_celsius
            found[f"dante_gpu_power_watts{labels}"] = gpu.power_watts
            found[f"dante_gpu_healthy{labels}"] = float(not gpu.problem)
        return found

    def look(self, gpus: Sequence[GpuSample]) -> None:
        """The heartbeat's sample, which is taken whether or not an attempt runs."""
        self._gpus = gpus


def use_of(gpu: GpuSample) -> machine_pb2.DeviceUtilisation:
    """A sample as the platform is told it."""
    return machine_pb2.DeviceUtilisation(
        index=gpu.index,
        gpu_utilisation=gpu.utilisation,
        vram_used_bytes=gpu.vram_used_bytes,
        temperature_celsius=gpu.temperature_celsius,
        power_watts=gpu.power_watts,
        memory_utilisation=gpu.memory_utilisation,
        throttle_reasons=gpu.throttled,
        processes=len(gpu.pids),
    )


def _point(attempt: Attempt, before: _Reading | None, now: _Reading) -> machine_pb2.MetricsPoint:
    point = machine_pb2.MetricsPoint(
        attempt_id=str(attempt.row.attempt_id),
        number=int(attempt.ran_seconds // METRICS_INTERVAL_SECONDS),
        processes=now.stats.pids,
    )
    if now.stats.memory_bytes is not None:
        point.memory_bytes = now.stats.memory_bytes
    # The first point's rates count from the start of the attempt.
    since = before or _Reading(now.at - attempt.ran_seconds, Stats(0.0, None, None, 0, 0, 0))
    seconds = max(1e-3, now.at - since.at)
    rates = {
        "cpu_cores": (since.stats.cpu_seconds, now.stats.cpu_seconds),
        "read_bytes_per_second": (since.stats.read_bytes, now.stats.read_bytes),
        "written_bytes_per_second": (since.stats.written_bytes, now.stats.written_bytes),
    }
    for name, (first, last) in rates.items():
        if first is not None and last is not None:
            # A process that ended unseen takes its counters with it: no rate is below zero.
            setattr(point, name, max(0.0, (last - first) / seconds))
    return point
