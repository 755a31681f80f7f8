"""What time alone decides: leases that ran out, durations that are over. Runs on the leader."""

import asyncio
from collections.abc import Sequence

import structlog

from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId
from dantegpu.domain.job import StopReason
from dantegpu.kit.db import Database
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.idempotency import forget_old
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store
from dantegpu.services.scheduler.service.transitions import JobBatch, Wakeups
from dantegpu.services.scheduler.settings import SchedulerSettings

log = structlog.get_logger(__name__)

BATCH = 500
FORGET_SECONDS = 3600.0
"""How often remembered answers that nobody asks for any more are deleted."""


class Timers:
    """Ends attempts whose machine fell silent, stops those that ran too long."""

    def __init__(
        self, db: Database, outbox: Outbox, wakeups: Wakeups, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._db = db
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings

    async def run(self) -> None:
        """Until cancelled. After a start nobody is lost before he had one full lease to be heard in."""
        silent_until_seconds = self._clock.monotonic() + self._settings.lease_seconds
        next_forget_seconds = 0.0
        while True:
            await asyncio.sleep(self._settings.timer_seconds)
            try:
                if self._clock.monotonic() >= silent_until_seconds:
                    await self.expire_leases()
                await self.stop_overdue()
                if self._clock.monotonic() >= next_forget_seconds:
                    next_forget_seconds = self._clock.monotonic() + FORGET_SECONDS
                    async with self._db.transaction() as tx:
                        await forget_old(tx)
            except ServiceError as error:
                log.warning("timers_failed", error=error.message)

    async def expire_leases(self) -> int:
        """Attempts that were not renewed until lease + grace are lost; how many."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            expired = await store.expired_attempts(
                tx, now=now, grace_seconds=self._settings.lease_grace_seconds, limit=BATCH
            )
            if not expired:
                return 0
            batch = await JobBatch.lock(tx, [row.job_id for row in expired], now)
            # Read again under locks: a renewal may have come in between, and none may come in now.
            current = await store.lock_attempts(tx, [row.attempt_id for row in expired])
            lost = 0
            for row in expired:
                job, attempt = batch.get(row.job_id), current[row.attempt_id]
                if (
                    job is not None
                    and job.attempt_id == AttemptId(row.attempt_id)
                    and attempt.lease_renewed_at == row.lease_renewed_at
                ):
                    batch.apply(row.job_id, lifecycle.LeaseExpired(renewed_at=row.lease_renewed_at))
                    lost += 1
            await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        log.warning("attempts_lost", attempts=lost)
        return lost

    async def stop_overdue(self) -> int:
        """Ask for a stop of what ran longer than it may; how many."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            overdue = await store.overdue_attempts(
                tx, now=now, grace_seconds=self._settings.stop_grace_seconds, limit=BATCH
            )
            if not overdue:
                return 0
            await self._stop(tx, overdue)
        return len(overdue)

    async def _stop(self, tx: store.Tx, overdue: Sequence[store.OverdueRow]) -> None:
        batch = await JobBatch.lock(tx, [row.job_id for row in overdue], self._clock.now())
        for row in overdue:
            job = batch.get(row.job_id)
            if job is not None and job.attempt_id == AttemptId(row.attempt_id):
                batch.apply(row.job_id, lifecycle.StopRequested(by="max_duration", why=StopReason.MAX_DURATION))
        await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
