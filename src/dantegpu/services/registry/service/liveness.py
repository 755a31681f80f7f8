"""Who is there: heartbeats folded in batches, and machines that were not heard for too long."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import structlog
from prometheus_client import Counter

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import MachineId
from dantegpu.kit.db import Database
from dantegpu.kit.errors import Unavailable
from dantegpu.kit.outbox import Outbox
from dantegpu.services.registry import store
from dantegpu.services.registry.errors import InvalidInventory
from dantegpu.services.registry.service import inventories
from dantegpu.services.registry.service.machines import emit
from dantegpu.services.registry.settings import RegistrySettings
from dantegpu.services.registry.store import Beat, MachineRow

log = structlog.get_logger(__name__)

FOLD_BATCH = 1000
SWEEP_BATCH = 1000
CLOCK_STEP_SECONDS = 1.0
"""Wall and monotonic clock apart by more than this between two sweeps: somebody set the wall clock."""

_HEARTBEATS = Counter("dante_registry_heartbeats_total", "Heartbeats of machines", ["result"])
_FLIPS = Counter("dante_registry_liveness_changes_total", "Machines whose liveness changed", ["liveness"])


class Watch:
    """Since when heartbeats would have been heard without a break.

    Nobody is marked lost before one full timer has passed since then: after a start, a lost connection or a pause of
    this process, silence says nothing about the machines.
    """

    def __init__(self, clock: Clock, longest_pause_seconds: float) -> None:
        self._clock = clock
        self._longest_pause_seconds = longest_pause_seconds
        self._since = self._last = clock.monotonic()
        self._last_wall = clock.now()

    def reset(self) -> None:
        """Heartbeats may have been missed up to this moment."""
        self._since = self._clock.monotonic()

    def look(self) -> tuple[datetime, bool]:
        """The moment since which nothing was missed, on the wall clock of now, and whether that clock was set."""
        now, wall = self._clock.monotonic(), self._clock.now()
        passed = now - self._last
        stepped = abs((wall - self._last_wall).total_seconds() - passed) > CLOCK_STEP_SECONDS
        if stepped or passed > self._longest_pause_seconds:
            log.warning("watch_restarted", clock_was_set=stepped, paused_seconds=round(passed, 1))
            self._since = now
        self._last, self._last_wall = now, wall
        return wall - timedelta(seconds=now - self._since), stepped


class Liveness:
    """Folds heartbeats and sweeps. Each call is a transaction of its own; doing one twice changes nothing."""

    def __init__(self, db: Database, outbox: Outbox, clock: Clock, settings: RegistrySettings) -> None:
        self._db = db
        self._outbox = outbox
        self._clock = clock
        self._settings = settings
        self.watch = Watch(clock, settings.sweep_interval_seconds + settings.unknown_after_seconds / 3)

    async def fold(self, beats: Sequence[Beat]) -> None:
        """Write what was heard, one beat per machine. Raises Unavailable; then nothing of it is lost to the caller."""
        try:
            async with self._db.transaction() as tx:
                rows = await store.fold(tx, beats, self._clock.now())
                await emit(self._outbox, tx, rows)
        except Unavailable:
            self.watch.reset()
            raise
        _HEARTBEATS.labels("folded").inc(len(beats))
        _note(rows)

    async def sweep(self) -> int:
        """Mark machines unknown or offline that were silent for too long; how many. Raises Unavailable."""
        now = self._clock.now()
        since, stepped = self.watch.look()
        try:
            async with self._db.transaction() as tx:
                if stepped:
                    await store.clamp_future(tx, now, now + timedelta(seconds=CLOCK_STEP_SECONDS))
                rows = await store.flip_liveness(
                    tx,
                    since,
                    now - timedelta(seconds=self._settings.unknown_after_seconds),
                    now - timedelta(seconds=self._settings.offline_after_seconds),
                    SWEEP_BATCH,
                )
                await emit(self._outbox, tx, rows)
        except Unavailable:
            self.watch.reset()
            raise
        _note(rows)
        return len(rows)


def beat_of(machine_id: MachineId, heartbeat: machine_pb2.Heartbeat, before: Beat | None) -> Beat:
    """What `heartbeat` says; an inventory that `before`, not folded yet, brought is kept."""
    inventory = before.inventory if before else None
    if heartbeat.HasField("inventory"):
        try:
            inventory = inventories.checked(machine_id, heartbeat.inventory)
        except InvalidInventory as error:
            # The machine is there all the same; what it had before stays.
            _HEARTBEATS.labels("invalid_inventory").inc()
            log.warning("inventory_refused", machine_id=str(machine_id), error=error.message)
    return Beat(
        machine_id=machine_id,
        running_attempts=inventories.clamped_count(heartbeat.running_attempts, inventories.MAX_RUNNING_ATTEMPTS),
        cpu_utilisation=inventories.clamped(heartbeat.cpu_utilisation, 1.0),
        memory_used_bytes=inventories.clamped_count(heartbeat.memory_used_bytes, inventories.MAX_BYTES),
        device_utilisation=inventories.utilisation(heartbeat.devices),
        leaving=heartbeat.leaving,
        inventory=inventory,
    )


def refuse_heartbeat(reason: str) -> None:
    _HEARTBEATS.labels(reason).inc()


def _note(rows: Sequence[MachineRow]) -> None:
    for row in rows:
        _FLIPS.labels(row.liveness).inc()
        log.info("machine_changed", machine_id=str(MachineId(row.id)), liveness=row.liveness, revision=row.revision)
