"""NATS edge of the registry: heartbeats, and the loops that fold them and look for silence."""

from dataclasses import replace

import structlog
from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import InvalidId, MachineId
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import Unavailable
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.services.registry.service.liveness import FOLD_BATCH, Liveness, beat_of, refuse_heartbeat
from dantegpu.services.registry.store import Beat

log = structlog.get_logger(__name__)

QUEUE_GROUP = "registry"
MAX_PENDING_MACHINES = 100_000
"""Machines with a heartbeat that is not folded yet. A machine has one entry, however many it sends."""


class HeartbeatConsumer:
    """Component: the first heartbeat is folded at once, what arrives meanwhile is the next batch."""

    def __init__(self, bus: Bus, liveness: Liveness, sweep_interval_seconds: float) -> None:
        self._bus = bus
        self._liveness = liveness
        self._sweep_interval_seconds = sweep_interval_seconds
        self._pending: dict[MachineId, Beat] = {}
        self._wakeup = Wakeup()
        self._sweep_now = Wakeup()
        self._tasks = Tasks("heartbeats")

    async def start(self) -> None:
        await self._bus.subscribe(subjects.ALL_HEARTBEATS, self._heartbeat, queue=QUEUE_GROUP)
        self._bus.on_reconnect(self._liveness.watch.reset)
        self._liveness.watch.reset()
        self._tasks.loop(self._fold, "fold")
        self._tasks.loop(self._sweep, "sweep")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _heartbeat(self, message: Msg) -> None:
        """NATS lets a machine publish under its own subjects only, so the subject says who it is."""
        try:
            machine_id = subjects.machine_of(message.subject)
            heartbeat = machine_pb2.Heartbeat.FromString(message.data)
        except (InvalidId, DecodeError):
            refuse_heartbeat("malformed")
            raise
        if heartbeat.machine_id not in ("", str(machine_id)):
            refuse_heartbeat("wrong_machine")
            log.warning("heartbeat_refused", machine_id=str(machine_id), claimed=heartbeat.machine_id[:64])
            return
        before = self._pending.get(machine_id)
        if before is None and len(self._pending) >= MAX_PENDING_MACHINES:
            refuse_heartbeat("dropped")
            return
        self._pending[machine_id] = beat_of(machine_id, heartbeat, before)
        self._wakeup.notify()

    async def _fold(self) -> None:
        if not self._pending:
            await self._wakeup.wait()
            return
        batch = [self._pending.pop(machine_id) for machine_id in list(self._pending)[:FOLD_BATCH]]
        try:
            await self._liveness.fold(batch)
        except Unavailable:
            for beat in batch:
                # Back into the queue, unless something newer arrived meanwhile; then only the inventory counts.
                newer = self._pending.get(beat.machine_id)
                self._pending[beat.machine_id] = _merged(beat, newer) if newer else beat
            raise

    async def _sweep(self) -> None:
        if self._bus.connected:
            while await self._liveness.sweep():
                pass
        else:
            self._liveness.watch.reset()
        await self._sweep_now.wait(self._sweep_interval_seconds)


def _merged(older: Beat, newer: Beat) -> Beat:
    return newer if newer.inventory is not None else replace(newer, inventory=older.inventory)
