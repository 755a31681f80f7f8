"""Use cases of metrics: what attempts used, told by their machines, kept in a bounded series, read by their owners."""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import structlog
from prometheus_client import Counter

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, InvalidId, JobId, MachineId, TeamId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Database
from dantegpu.services.monitoring import store
from dantegpu.services.monitoring.errors import InvalidRange, LogNotFound
from dantegpu.services.monitoring.settings import MonitoringSettings
from dantegpu.services.monitoring.store import AttemptRow

log = structlog.get_logger(__name__)

INTERVAL_SECONDS = 5.0
"""What a daemon measures over (daemon/meter.py)."""
MAX_NUMBER = 1 << 30
MAX_DEVICES_PER_POINT = 64
MAX_TEXT_LENGTH = 255
DROP_BATCH = 1000

_POINTS = Counter("dante_metric_points_total", "Points of jobs' metrics", ["what"])

type Resolve = Callable[[set[UUID]], Awaitable[Mapping[UUID, jobs_pb2.ResolvedAttempt]]]


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one attempt, in order. `step`: only every step-th is kept."""

    epoch: int
    step: int
    points: Sequence[machine_pb2.MetricsPoint]


class SeriesService:
    """Metrics of attempts. `resolve` says whose an attempt is."""

    def __init__(self, db: Database, resolve: Resolve, clock: Clock, settings: MonitoringSettings) -> None:
        self._db = db
        self._resolve = resolve
        self._clock = clock
        self._settings = settings

    async def add(self, told: Sequence[tuple[MachineId, machine_pb2.MetricsPoint]]) -> None:
        """Keep what machines say of their own attempts. Raises Unavailable."""
        points = [(machine_id, attempt_id, point) for machine_id, point in told if (attempt_id := _usable(point))]
        owners = await self._resolve({attempt_id for _, attempt_id, _ in points})
        own = [
            (attempt_id, point)
            for machine_id, attempt_id, point in points
            if attempt_id in owners and owners[attempt_id].machine_id == str(machine_id)
        ]
        _POINTS.labels("refused").inc(len(told) - len(own))
        if not own:
            return
        attempts = [_attempt(attempt_id, owners[attempt_id]) for attempt_id in sorted({each for each, _ in own})]
        now = self._clock.now()
        async with self._db.transaction() as tx:
            series = await store.lock_series(tx, attempts, now)
            rows = [
                (attempt_id, point.number, _stored(point))
                for attempt_id, point in own
                if attempt_id in series and point.number % series[attempt_id].step == 0
            ]
            if rows:
                await store.add_points(tx, rows, self._settings.metrics_points_max, now)
        _POINTS.labels("stored").inc(len(rows))

    async def read(self, actor: Actor, job_id: JobId, epoch: int, after_number: int, node_rank: int) -> Series:
        """The points behind `after_number`; an attempt without any has none. Raises Unauthenticated, InvalidRange,
        LogNotFound."""
        if not actor.is_service:
            actor.require_team()
        if epoch < 0 or after_number < 0 or node_rank < 0:
            raise InvalidRange("epoch, number and rank are not negative")
        async with self._db.transaction() as tx:
            head = await store.series_of_job(tx, job_id.uuid, epoch, node_rank)
            if head is None:
                return Series(epoch, 1, ())
            if not (actor.is_service or actor.operator or (actor.team_id and actor.team_id.uuid == head.team_id)):
                raise LogNotFound(job_id)
            rows = await store.points_after(tx, head.attempt_id, after_number)
        return Series(head.epoch, head.step, [machine_pb2.MetricsPoint.FromString(row.point) for row in rows])

    async def drop_old(self) -> int:
        """Forget series of which nothing was heard for long; how many."""
        before = self._clock.now() - timedelta(days=self._settings.metrics_keep_days)
        async with self._db.transaction() as tx:
            return await store.drop_old_series(tx, before, DROP_BATCH)


def _attempt(attempt_id: UUID, owner: jobs_pb2.ResolvedAttempt) -> AttemptRow:
    job_id, team_id = JobId.parse(owner.job_id), TeamId.parse(owner.team_id)
    return AttemptRow(attempt_id, job_id.uuid, team_id.uuid, owner.epoch, owner.node_rank)


def _usable(point: machine_pb2.MetricsPoint) -> UUID | None:
    """The attempt that a point is of; None for one that cannot be: machines may say anything."""
    numbers = [point.cpu_cores, point.read_bytes_per_second, point.written_bytes_per_second]
    for device in point.devices:
        numbers += [device.gpu_utilisation, device.memory_utilisation, device.temperature_celsius, device.power_watts]
        if any(len(text) > MAX_TEXT_LENGTH for text in device.throttle_reasons) or len(device.throttle_reasons) > 8:
            return None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return None
    if not 0 < point.number <= MAX_NUMBER or len(point.devices) > MAX_DEVICES_PER_POINT or point.memory_bytes < 0:
        return None
    try:
        return AttemptId.parse(point.attempt_id).uuid
    except InvalidId:
        return None


def _stored(point: machine_pb2.MetricsPoint) -> bytes:
    kept = machine_pb2.MetricsPoint()
    kept.CopyFrom(point)
    kept.ClearField("attempt_id")  # the row says it
    return kept.SerializeToString()
