"""What time alone decides: leases that ran out, durations that are over. Runs on the leader."""

import asyncio
from collections.abc import Sequence
from datetime import datetime

import structlog

from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import Clock
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
                await self.look(may_lose=self._clock.monotonic() >= silent_until_seconds)
                if self._clock.monotonic() >= next_forget_seconds:
                    next_forget_seconds = self._clock.monotonic() + FORGET_SECONDS
                    async with self._db.transaction() as tx:
                        await forget_old(tx)
            except ServiceError as error:
                log.warning("timers_failed", error=error.message)

    async def look(self, *, may_lose: bool) -> None:
        """End what is lost (unless the silence may be our own) and stop what ran too long."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            due = await store.due_attempts(
                tx,
                now=now,
                lease_grace_seconds=self._settings.lease_grace_seconds,
                stop_grace_seconds=self._settings.stop_grace_seconds,
                limit=BATCH,
            )
            if due:
                await self._act(tx, due, now, may_lose=may_lose)

    async def _act(self, tx: store.Tx, due: Sequence[store.DueRow], now: datetime, *, may_lose: bool) -> None:
        batch = await JobBatch.lock(tx, [row.job_id for row in due], now)
        # Read again under locks: a renewal may have come in between, and none may come in now.
        current = await store.lock_attempts(tx, [row.attempt_id for row in due])
        lost = 0
        for row in due:
            if not batch.holds(row.job_id, row.attempt_id):
                continue
            if row.lost and may_lose and current[row.attempt_id].lease_renewed_at == row.lease_renewed_at:
                batch.apply_to(row.job_id, row.attempt_id, lifecycle.LeaseExpired(renewed_at=row.lease_renewed_at))
                lost += 1
            elif row.overdue:
                batch.apply(row.job_id, lifecycle.StopRequested(by="max_duration", why=StopReason.MAX_DURATION))
        await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        if lost:
            log.warning("attempts_lost", attempts=lost)
