"""NATS edge of the registry: heartbeats, folded in batches, and the sweep for those that stay away."""

import asyncio
from collections import deque

import structlog
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import MachineId
from dantegpu.kit.bus import Bus
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.services.registry.errors import InvalidInventory
from dantegpu.services.registry.service import RegistryService, checked_inventory
from dantegpu.services.registry.settings import RegistrySettings

log = structlog.get_logger(__name__)

QUEUE_GROUP = "registry"
PENDING_MAX = 100_000
BATCH = 1000


class Heartbeats:
    """Component. Nobody is marked silent before one full timer after our own start: they could not reach us before."""

    def __init__(self, bus: Bus, service: RegistryService, settings: RegistrySettings) -> None:
        self._bus = bus
        self._service = service
        self._settings = settings
        self._pending: deque[tuple[MachineId, machine_pb2.Heartbeat]] = deque(maxlen=PENDING_MAX)
        self._arrived = Wakeup()
        self._tasks = Tasks("heartbeats")

    async def start(self) -> None:
        await self._bus.subscribe(subjects.ALL_HEARTBEATS, self._receive, queue=QUEUE_GROUP)
        self._tasks.loop(self._fold, "fold")
        self._tasks.spawn(self._sweeps(), "sweep")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _receive(self, message: Msg) -> None:
        machine_id = subjects.machine_of(message.subject)
        beat = machine_pb2.Heartbeat.FromString(message.data)
        if beat.machine_id not in ("", str(machine_id)):
            log.warning("heartbeat_refused", machine_id=str(machine_id), claimed=beat.machine_id[:60])
            return
        if beat.HasField("inventory"):
            try:
                checked_inventory(machine_id, beat.inventory)
            except InvalidInventory as error:
                log.warning("inventory_refused", machine_id=str(machine_id), error=error.message)
                beat.ClearField("inventory")
        self._pending.append((machine_id, beat))
        self._arrived.notify()

    async def _fold(self) -> None:
        await self._arrived.wait()
        while self._pending:
            batch = [self._pending.popleft() for _ in range(min(BATCH, len(self._pending)))]
            await self._service.heartbeats(batch)

    async def _sweeps(self) -> None:
        await asyncio.sleep(self._settings.unknown_after_seconds)
        self._tasks.loop(self._sweep, "sweep")

    async def _sweep(self) -> None:
        await self._service.sweep()
        await asyncio.sleep(self._settings.sweep_interval_seconds)
