"""What machines there are and what they cost: one full read, then changes as they happen, then a full read again."""

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import unwrap
from dantegpu.contracts.gen.dante.v1 import (
    events_pb2,
    marketplace_pb2,
    marketplace_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)
from dantegpu.domain.ids import DeviceId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo, parse_capability
from dantegpu.domain.units import InvalidQuantity
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.bus import Bus, unsubscribe
from dantegpu.kit.errors import Unavailable
from dantegpu.kit.lifecycle import Tasks, Wakeup

log = structlog.get_logger(__name__)

_SCHEDULABLE = frozenset({registry_pb2.MACHINE_IDLE, registry_pb2.MACHINE_BUSY})


class Inventory:
    """Component: machines and prices in memory, at most `refresh_seconds` behind even when every event is lost."""

    def __init__(
        self,
        registry: registry_pb2_grpc.RegistryServiceStub,
        marketplace: marketplace_pb2_grpc.MarketplaceServiceStub,
        bus: Bus,
        refresh_seconds: float,
    ) -> None:
        self._registry = registry
        self._marketplace = marketplace
        self._bus = bus
        self._refresh_seconds = refresh_seconds
        self._machines: dict[str, registry_pb2.Machine] = {}
        self._departed: dict[str, int] = {}
        self._asks: dict[str, marketplace_pb2.Ask] = {}
        self._default_ask = marketplace_pb2.Ask()
        self._infos: tuple[MachineInfo, ...] | None = None
        self._loaded = False
        self._quarantined: frozenset[str] = frozenset()
        self._refresh_now = Wakeup()
        self._tasks = Tasks("inventory")
        self._subscriptions: list[Subscription] = []
        self.on_change: list[Wakeup] = []

    async def start(self) -> None:
        self._subscriptions = [
            await self._bus.subscribe(subjects.ALL_MACHINE_EVENTS, self._machine_changed),
            await self._bus.subscribe(subjects.ALL_ASK_EVENTS, self._ask_changed),
        ]
        self._bus.on_reconnect(self._refresh_now.notify)
        self._tasks.loop(self._refresh, "refresh")

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await unsubscribe(subscription)
        self._subscriptions.clear()
        await self._tasks.stop()

    async def ready(self) -> None:
        """Raises Unavailable until the first full read."""
        if not self._loaded:
            raise Unavailable("the inventory of machines", "it is being read")

    @property
    def loaded(self) -> bool:
        return self._loaded

    def machines(self) -> tuple[MachineInfo, ...]:
        """Every machine that has not left, in no particular order."""
        if self._infos is None:
            self._infos = tuple(self._info(machine) for machine in self._machines.values())
        return self._infos

    def machine(self, machine_id: MachineId) -> registry_pb2.Machine | None:
        return self._machines.get(str(machine_id))

    def quarantine(self, machine_ids: frozenset[str]) -> None:
        """These machines get no new work until this is called without them."""
        if machine_ids != self._quarantined:
            self._quarantined = machine_ids
            self._changed(True)

    async def _refresh(self) -> None:
        snapshot = await rpc.call(self._registry.GetSnapshot, registry_pb2.GetSnapshotRequest(), actor=SERVICE)
        asks = await rpc.call(self._marketplace.ListAsks, marketplace_pb2.ListAsksRequest(), actor=SERVICE)
        machines = {machine.id: machine for machine in snapshot.machines}
        # Events may have overtaken the answer: what is newer than it stays.
        machines |= {key: known for key, known in self._machines.items() if known.revision > snapshot.revision}
        self._departed = {key: revision for key, revision in self._departed.items() if revision > snapshot.revision}
        for departed in self._departed:
            machines.pop(departed, None)
        changed = not self._loaded or {key: value.revision for key, value in machines.items()} != {
            key: value.revision for key, value in self._machines.items()
        }
        self._machines = machines
        self._asks = {ask.machine_id: ask for ask in asks.asks}
        self._default_ask = asks.default_ask
        self._loaded = True
        self._changed(changed)
        await self._refresh_now.wait(self._refresh_seconds)

    async def _machine_changed(self, message: Msg) -> None:
        _, event = unwrap(message.data, events_pb2.MachineChanged)
        known = self._machines.get(event.machine.id)
        if known is not None and known.revision > event.machine.revision:
            return
        if self._departed.get(event.machine.id, -1) > event.machine.revision:
            return
        if event.machine.status == registry_pb2.MACHINE_LEFT:
            self._machines.pop(event.machine.id, None)
            self._departed[event.machine.id] = event.machine.revision
        else:
            self._machines[event.machine.id] = event.machine
        self._changed(True)

    async def _ask_changed(self, message: Msg) -> None:
        _, event = unwrap(message.data, events_pb2.AskChanged)
        self._asks[event.ask.machine_id] = event.ask
        self._changed(True)

    def _changed(self, changed: bool) -> None:
        self._infos = None
        if changed:
            for wakeup in self.on_change:
                wakeup.notify()

    def _info(self, machine: registry_pb2.Machine) -> MachineInfo:
        ask = self._asks.get(machine.id, self._default_ask)
        inventory = machine.inventory
        return MachineInfo(
            id=MachineId.parse(machine.id),
            team_id=TeamId.parse(machine.team_id),
            cpu_milli=inventory.cpu_milli,
            memory_bytes=inventory.memory_bytes,
            disk_bytes=inventory.disk_bytes,
            devices=tuple(
                DeviceInfo(
                    id=DeviceId.parse(device.id),
                    index=device.index,
                    model=device.model,
                    vram_bytes=device.vram_bytes,
                    compute_capability=_capability(device.compute_capability),
                    simulated=device.simulated,
                    withheld=bool(device.problem),
                )
                for device in inventory.devices
            ),
            price_udgpu_per_gpu_hour=ask.price_udgpu_per_gpu_hour,
            price_udgpu_per_cpu_hour=ask.price_udgpu_per_cpu_hour,
            region=inventory.region,
            schedulable=machine.status in _SCHEDULABLE and machine.id not in self._quarantined and not inventory.closed,
            runs_images="container" in inventory.executors,
            allowed_images=tuple(inventory.allowed_images),
            networks=frozenset(inventory.networks),
            site=inventory.site,
            address=inventory.address,
            sandboxed=inventory.sandbox not in ("", "none"),
            allows_fractions=inventory.shares_devices or any(device.simulated for device in inventory.devices),
        )


def _capability(text: str) -> int:
    try:
        return parse_capability(text)
    except InvalidQuantity:
        # A machine may say anything about itself; what cannot be read fits no request that asks for it.
        log.warning("compute_capability_unreadable", value=text[:20])
        return 0
