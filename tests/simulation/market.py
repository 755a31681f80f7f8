"""Stand-ins for what is not under test: the registry of machines, the marketplace's prices, the object store."""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import wrap
from dantegpu.contracts.gen.dante.v1 import (
    events_pb2,
    machine_pb2,
    marketplace_pb2,
    registry_pb2,
    storage_pb2,
)
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import EventId, MachineId
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import NotFound, Unavailable
from tests.simulation.hardware import Hardware

UNKNOWN_AFTER_SECONDS = 6.5
LOOK_SECONDS = 2.0
DEFAULT_PRICE_UDGPU = 3_600_000


class Market:
    """Machines with their liveness by heartbeat, one ask each, and presigned URLs that are the keys themselves."""

    def __init__(self, bus: Bus, clock: Clock, objects: Mapping[str, bytes]) -> None:
        self._bus = bus
        self._objects = objects
        self._clock = clock
        self._revision = 0
        self.machines: dict[str, registry_pb2.Machine] = {}
        self.asks: dict[str, marketplace_pb2.Ask] = {}
        self._heard_at_seconds: dict[str, float] = {}

    async def start(self) -> None:
        await self._bus.subscribe(subjects.ALL_HEARTBEATS, self._heartbeat)

    async def run(self) -> None:
        """Until cancelled: who has fallen silent gets no new work."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = asyncio.get_running_loop().time()
            for machine_id, heard_at in self._heard_at_seconds.items():
                if now - heard_at > UNKNOWN_AFTER_SECONDS:
                    await self._set_status(machine_id, registry_pb2.MACHINE_UNKNOWN)

    def join(self, hardware: Hardware) -> None:
        self._revision += 1
        machine_id = str(hardware.id)
        self.machines[machine_id] = registry_pb2.Machine(
            id=machine_id, team_id=str(hardware.team_id), inventory=hardware.inventory(),
            status=registry_pb2.MACHINE_IDLE, revision=self._revision,
        )  # fmt: skip
        self._heard_at_seconds[machine_id] = 0.0

    async def set_price(self, machine_id: MachineId, price_udgpu_per_gpu_hour: int) -> None:
        ask = marketplace_pb2.Ask(
            machine_id=str(machine_id), team_id=self.machines[str(machine_id)].team_id,
            price_udgpu_per_gpu_hour=price_udgpu_per_gpu_hour, price_udgpu_per_cpu_hour=price_udgpu_per_gpu_hour // 10,
        )  # fmt: skip
        self.asks[str(machine_id)] = ask
        await self._tell(subjects.ask_event(machine_id), events_pb2.AskChanged(ask=ask))

    async def _heartbeat(self, message: Any) -> None:
        heartbeat = machine_pb2.Heartbeat.FromString(message.data)
        if heartbeat.machine_id in self.machines and not heartbeat.leaving:
            self._heard_at_seconds[heartbeat.machine_id] = asyncio.get_running_loop().time()
            await self._set_status(heartbeat.machine_id, registry_pb2.MACHINE_IDLE)

    async def _set_status(self, machine_id: str, status: "registry_pb2.MachineStatus.ValueType") -> None:
        machine = self.machines[machine_id]
        if machine.status == status:
            return
        self._revision += 1
        machine.status = status
        machine.revision = self._revision
        event = events_pb2.MachineChanged(machine=machine)
        await self._tell(subjects.machine_event(MachineId.parse(machine_id)), event)

    async def _tell(self, subject: str, event: Any) -> None:
        envelope = wrap(event, event_id=EventId.new(), occurred_at=self._now())
        try:
            await self._bus.publish_stream(subject, envelope.SerializeToString(), envelope.id)
        except Unavailable:
            return  # the full read tells it

    def _now(self) -> datetime:
        return self._clock.now()

    def __getattr__(self, name: str) -> Any:
        # The generated code registers every method; what nobody calls need not be there.
        if name[0].isupper():
            return None
        raise AttributeError(name)

    # --- gRPC ---------------------------------------------------------------------------------------------------------

    async def GetSnapshot(self, request: Any, context: Any) -> registry_pb2.GetSnapshotResponse:  # noqa: N802
        return registry_pb2.GetSnapshotResponse(machines=self.machines.values(), revision=self._revision)

    async def GetMachines(  # noqa: N802
        self, request: registry_pb2.GetMachinesRequest, context: Any
    ) -> registry_pb2.GetMachinesResponse:
        if unknown := [machine_id for machine_id in request.machine_ids if machine_id not in self.machines]:
            raise NotFound(f"no machine {unknown[0]}")
        return registry_pb2.GetMachinesResponse(machines=[self.machines[it] for it in request.machine_ids])

    async def ListAsks(self, request: Any, context: Any) -> marketplace_pb2.ListAsksResponse:  # noqa: N802
        default = marketplace_pb2.Ask(
            price_udgpu_per_gpu_hour=DEFAULT_PRICE_UDGPU, price_udgpu_per_cpu_hour=DEFAULT_PRICE_UDGPU // 10
        )
        return marketplace_pb2.ListAsksResponse(asks=self.asks.values(), default_ask=default)

    async def StatBlobs(  # noqa: N802
        self, request: storage_pb2.StatBlobsRequest, context: Any
    ) -> storage_pb2.StatBlobsResponse:
        return storage_pb2.StatBlobsResponse(sizes_bytes=[1] * len(request.sha256s))

    async def StatObjects(  # noqa: N802
        self, request: storage_pb2.StatObjectsRequest, context: Any
    ) -> storage_pb2.StatObjectsResponse:
        found = [self._objects.get(key) for key in request.keys]
        return storage_pb2.StatObjectsResponse(sizes_bytes=[-1 if data is None else len(data) for data in found])

    async def PresignUrls(  # noqa: N802
        self, request: storage_pb2.PresignRequest, context: Any
    ) -> storage_pb2.PresignResponse:
        return storage_pb2.PresignResponse(urls=[item.key for item in request.items])
