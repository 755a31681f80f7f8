"""What is free: the inventory less what live attempts hold, kept up to date by what changes, not read for each round.

Attempts begin in this process alone (one leader plans), so a round adds what it has committed. They end in any replica:
this one's folds tell at once, the others' are found by reading everything again every few seconds. A stale view costs a
plan that the database refuses (or a wait of those seconds), never a device that is leased twice.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import DeviceId, MachineId, TeamId
from dantegpu.domain.resources import MachineInfo
from dantegpu.domain.scheduling import (
    MARGIN_SECONDS,
    Ends,
    Lease,
    Policy,
    Running,
    SchedulerState,
    Snapshot,
    average_shares,
)
from dantegpu.kit.db import Database, Tx
from dantegpu.services.scheduler import store
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.store import LiveLeaseRow

READ_AGAIN_SECONDS = 5.0
REMEMBERED_HALF_LIVES = 6
"""What ended longer ago than this counts less than 2 % of what it was."""
MAX_REMEMBERED_ATTEMPTS = 500_000
"""The most that a new leader adds up, the latest first."""
_READ_COST_FACTOR = 50
"""Reading everything takes at most one part in so many of the time, however much there is."""


async def live_leases(tx: Tx) -> dict[UUID, Lease]:
    """What each live attempt holds."""
    return {row.attempt_id: lease_of(row) for row in await store.live_leases(tx)}


def lease_of(row: LiveLeaseRow) -> Lease:
    return Lease(
        machine_id=MachineId(row.machine_id),
        team_id=TeamId(row.team_id),
        cpu_milli=row.cpu_milli,
        memory_bytes=row.memory_bytes,
        disk_bytes=row.disk_bytes,
        devices=tuple((DeviceId(device), milli) for device, milli in zip(row.device_ids, row.millis, strict=True)),
    )


def running_of(row: LiveLeaseRow, now: datetime) -> Running:
    """It holds that until its max_duration is over, counted from when it began to run: from now, if it has not yet."""
    seconds = row.max_duration_seconds + MARGIN_SECONDS
    return Running(lease_of(row), (row.running_at or now) + timedelta(seconds=seconds))


class Fleet:
    """The leader's view. `state` and `ends` belong to the snapshot that `look` returned last."""

    def __init__(self, db: Database, inventory: Inventory, clock: Clock) -> None:
        self._db = db
        self._inventory = inventory
        self._clock = clock
        self.state = SchedulerState()
        self._machines: tuple[MachineInfo, ...] = ()
        self.ends = Ends()
        self._live: dict[UUID, Running] = {}
        self._ended: set[UUID] = set()
        self._snapshot: Snapshot | None = None
        self._read_again_at = 0.0
        self._watching = False
        self._remembers = False

    def watch(self, watching: bool) -> None:
        """Only a leader needs to know; whoever becomes one reads everything first."""
        self._watching = watching
        self._remembers = False
        self.forget()
        self._ended.clear()

    def forget(self) -> None:
        """What is known may be wrong: read everything before the next plan."""
        self._snapshot = None
        self._read_again_at = 0.0

    def ended(self, attempts: Iterable[UUID]) -> None:
        """The transaction in which these ended has been committed."""
        if self._watching:
            self._ended.update(attempts)

    def began(self, attempts: Iterable[tuple[UUID, Running]]) -> None:
        """These attempts are committed; the state has counted them when they were planned."""
        for attempt_id, running in attempts:
            self._live[attempt_id] = running
            self.ends.begin(attempt_id, running)

    def came_to_nothing(self, leases: Iterable[Lease]) -> None:
        """Placements of the last plan that are not made."""
        self._give_back(list(leases))

    async def remember(self, policy: Policy, now: datetime) -> None:
        """Once per leader: what teams held before it led, so that a change of leader makes nobody's past better."""
        machines = self._inventory.machines()
        if self._remembers or not machines:
            return  # a share is one of the fleet; without one there is nothing to place on either
        shares: dict[TeamId, float] = {}
        if policy.fair_share and policy.half_life_seconds:
            since = now - timedelta(seconds=REMEMBERED_HALF_LIVES * policy.half_life_seconds)
            async with self._db.statement() as tx:
                rows = await store.past_use(
                    tx, now=now, since=since, half_life_seconds=policy.half_life_seconds, limit=MAX_REMEMBERED_ATTEMPTS
                )
            used = {TeamId(row.team_id): (row.gpu_milli, row.cpu_milli, row.memory_bytes) for row in rows}
            shares = average_shares(Snapshot.from_machines(machines), used)
        self.state.past.feed(shares, now)
        self._remembers = True

    async def look(self) -> Snapshot:
        """The snapshot for the next plan."""
        freed: list[Lease] = []
        if self._clock.monotonic() >= self._read_again_at:
            freed = await self._read()
        for attempt_id in self._ended:
            # One that began and ended between two rounds is here by now.
            running = self._live.pop(attempt_id, None)
            if running is not None:
                self.ends.end(attempt_id)
                freed.append(running.lease)
        self._ended.clear()
        self._give_back(freed)
        machines = self._inventory.machines()
        if machines is not self._machines:
            if machines != self._machines:
                self._snapshot = None
            self._machines = machines
        if self._snapshot is None:
            self._snapshot = Snapshot.from_machines(machines, [running.lease for running in self._live.values()])
        return self._snapshot

    async def _read(self) -> list[Lease]:
        """Read what is live. Returns what has ended; after a beginning that nobody told the snapshot is made anew."""
        started = self._clock.monotonic()
        # What ended before the read began is not in its answer; what ends from now on may be.
        told = set(self._ended)
        async with self._db.statement() as tx:
            rows = await store.live_leases(tx)
        now = self._clock.now()
        live = {row.attempt_id: running_of(row, now) for row in rows}
        self._ended -= told
        known, self._live = self._live, live
        self.ends = Ends(live)
        cost = self._clock.monotonic() - started
        self._read_again_at = started + max(READ_AGAIN_SECONDS, cost * _READ_COST_FACTOR)
        if live.keys() - known.keys():
            self._snapshot = None
        return [running.lease for attempt_id, running in known.items() if attempt_id not in live]

    def _give_back(self, leases: list[Lease]) -> None:
        snapshot = self._snapshot
        if snapshot is None or not leases:
            return
        if any(snapshot.is_overdrawn(lease.machine_id) for lease in leases):
            # More is held there than it has; what one gives back is not free yet.
            self._snapshot = None
        else:
            self.state.give_back(leases)
