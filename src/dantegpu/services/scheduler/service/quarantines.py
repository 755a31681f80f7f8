"""Quarantine: a machine that fails job after job, whoever's they are, gets no new work for a while.

Every replica reads who is in quarantine; the leader decides it, from how attempts ended.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import structlog
from prometheus_client import Counter

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import MachineId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.services.scheduler import store_quarantines
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store_quarantines import QuarantineRow

log = structlog.get_logger(__name__)

BATCH = 100
MAX_SECONDS = 24 * 3600.0
FORGET_SECONDS = 24 * 3600.0
"""A quarantine that begins later than so after the last one is a first one again."""

_BEGUN = Counter("dante_quarantines_total", "Machines that were put into quarantine")


class Quarantines:
    """Component: who is in quarantine. `lead` is the leader's part."""

    def __init__(self, db: Database, inventory: Inventory, clock: Clock, settings: SchedulerSettings) -> None:
        self._db = db
        self._inventory = inventory
        self._clock = clock
        self._settings = settings
        self._again = Wakeup()
        self._tasks = Tasks("quarantines")
        self.leadership: Leadership | None = None

    async def start(self) -> None:
        self._tasks.loop(self._read, "read")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _read(self) -> None:
        async with self._db.transaction() as tx:
            rows = await store_quarantines.in_quarantine(tx, self._clock.now())
        self._inventory.quarantine(frozenset(str(MachineId(row.machine_id)) for row in rows))
        await self._again.wait(self._settings.timer_seconds)

    async def lead(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._settings.timer_seconds)
            try:
                await self.look()
            except ServiceError as error:
                log.warning("quarantines_failed", error=error.message)

    async def look(self) -> None:
        """Put machines that failed too often in a row into quarantine."""
        assert self.leadership is not None, "passes run under a lease"
        now = self._clock.now()
        since = now - timedelta(seconds=self._settings.quarantine_window_seconds)
        async with self._db.transaction() as tx:
            found = await store_quarantines.faulty_machines(
                tx, since=since, faults=self._settings.quarantine_faults, limit=BATCH
            )
            if not found:
                return
            await self.leadership.assert_held(tx)
            for machine in found:
                teams = "1 team" if machine.teams == 1 else f"{machine.teams} teams"
                row = await store_quarantines.quarantine(
                    tx, machine.machine_id, now=now, seconds=self._settings.quarantine_seconds,
                    max_seconds=MAX_SECONDS, forget_seconds=FORGET_SECONDS,
                    reason=f"{machine.incidents} attempts of {teams} were lost or failed by the machine's fault, "
                    "and none succeeded in between",
                )  # fmt: skip
                _BEGUN.inc()
                log.warning(
                    "machine_in_quarantine", machine_id=str(MachineId(row.machine_id)), reason=row.reason,
                    until=row.until.isoformat(), times=row.times,
                )  # fmt: skip
        self._again.notify()

    async def list_quarantines(self, tx: Tx, actor: Actor, ids: Sequence[MachineId]) -> list[QuarantineRow]:
        """Those of the machines that are in quarantine; without ids all. Services and the operator."""
        actor.require_operator()
        wanted = [machine_id.uuid for machine_id in ids] or None
        return await store_quarantines.in_quarantine(tx, self._clock.now(), wanted)

    async def release(self, tx: Tx, actor: Actor, ids: Sequence[MachineId]) -> list[QuarantineRow]:
        """Let the machines work again; those that were in quarantine. Only the operator."""
        actor.require_operator()
        by = str(actor.user_id or "operator")
        rows = await store_quarantines.release(tx, [machine.uuid for machine in ids], by=by, now=self._clock.now())
        tx.after_commit.append(self._again.notify)
        return rows
