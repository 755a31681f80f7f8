"""Jobs that wait for other jobs, and deadlines. Level-triggered, on the leader: each pass looks at what is due."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

import structlog

from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import JobId
from dantegpu.domain.job import StopReason
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store, store_lifetimes
from dantegpu.services.scheduler.service.arrays import stop_array
from dantegpu.services.scheduler.service.transitions import JobBatch, Wakeups
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import JobRow
from dantegpu.services.scheduler.store_lifetimes import HeldRow

log = structlog.get_logger(__name__)

BATCH = 500
DEADLINE = "its deadline"


class Lifetimes:
    """Lets jobs begin whose predecessors have succeeded, and ends what may not begin or go on any more."""

    def __init__(
        self,
        db: Database,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
        queue: Callable[[Sequence[JobRow]], None],
    ) -> None:
        """`queue` takes released jobs into placement's queue."""
        self._db = db
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings
        self._queue = queue
        self.leadership: Leadership | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._settings.timer_seconds)
            try:
                await self.look()
            except ServiceError as error:
                log.warning("lifetimes_failed", error=error.message)

    async def look(self) -> None:
        """Do what is due now."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            late = await store_lifetimes.past_deadline(
                tx, now=now, ending_reasons=[reason.value for reason in lifecycle.ENDS_JOB], limit=BATCH
            )
            due = await store_lifetimes.held_and_due(tx, BATCH)
        if late:
            async with self._transaction() as tx:
                stops = {row.id: (DEADLINE, "its deadline passed before it could begin") for row in late}
                await self._stop(tx, late, stops, StopReason.DEADLINE, now)
        if due:
            async with self._transaction() as tx:
                released = await self._release(tx, [row for row in due if row.ready], now)
                await self._give_up(tx, [row for row in due if not row.ready], now)
            self._queue(released)

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[Tx]:
        """One that a leader who has lost the lease without knowing cannot commit."""
        assert self.leadership is not None, "passes run under a lease"
        async with self._db.transaction() as tx:
            await self.leadership.assert_held(tx)
            yield tx

    async def _release(self, tx: Tx, due: Sequence[HeldRow], now: datetime) -> list[JobRow]:
        if not due:
            return []
        jobs = [row.id for row in due if not row.is_array]
        batch = await JobBatch.lock(tx, jobs, now)
        for job_id in jobs:
            batch.apply(job_id, lifecycle.RetryDue())
        await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        rows = await store_lifetimes.release_jobs(tx, [row.id for row in due])
        tx.after_commit.append(self._wakeups.arrays)
        return [row for row in rows if row.array_size is None]

    async def _give_up(self, tx: Tx, due: Sequence[HeldRow], now: datetime) -> None:
        ids = [row.failed_id for row in due if row.failed_id]
        found = await store.jobs_by_id(tx, [*ids, *(row.id for row in due)]) if due else {}
        stops = {
            row.id: (str(JobId(row.failed_id)), f"{JobId(row.failed_id)} ended {found[row.failed_id].state}")
            for row in due
            if row.failed_id
        }
        await self._stop(tx, [found[job_id] for job_id in stops], stops, StopReason.DEPENDENCY, now)

    async def _stop(
        self, tx: Tx, rows: Sequence[JobRow], stops: Mapping[UUID, tuple[str, str]], why: StopReason, now: datetime
    ) -> None:
        batch = await JobBatch.lock(tx, [row.id for row in rows if row.array_size is None], now)
        for row in sorted(rows, key=lambda row: row.id):
            by, message = stops[row.id]
            if row.array_size is None:
                batch.apply(row.id, lifecycle.StopRequested(by=by, why=why, message=message))
            else:
                await stop_array(tx, row, why, by, now, self._outbox, self._wakeups)
        await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
