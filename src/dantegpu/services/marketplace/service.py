"""Use cases of the marketplace. Prices are micro-$dGPU per hour."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import common_pb2, events_pb2, machine_pb2, marketplace_pb2, registry_pb2
from dantegpu.contracts.gen.dante.v1.registry_pb2_grpc import RegistryServiceStub
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.domain.resources import GpuRequest, InvalidGpuSpec, parse_capability, parse_gpu_spec
from dantegpu.domain.units import InvalidQuantity, format_dgpu
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import InvalidArgument, RemoteError, Unauthenticated
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.paging import decode_cursor, encode_cursor, page_limit
from dantegpu.kit.rpc import Channels
from dantegpu.services.marketplace import store
from dantegpu.services.marketplace.errors import MachineNotFound, UnreadableGpuSpec

REGISTRY = "provider-registry-service"
MAX_MACHINES = 50_000
MACHINES_PER_CALL = 500
MAX_ASKS = 100_000
MAX_IDS_PER_CALL = 10_000

_TAKES_WORK = frozenset({registry_pb2.MACHINE_IDLE, registry_pb2.MACHINE_BUSY})
_NOT_THERE = frozenset({registry_pb2.MACHINE_LEFT, registry_pb2.MACHINE_OFFLINE})


@dataclass(frozen=True, slots=True)
class Offer:
    """A machine, as much of it as the actor may see, and what it costs. `rentable`: it takes new work now."""

    machine: registry_pb2.Machine
    prices: store.Prices
    ask: store.AskRow | None
    rentable: bool

    @property
    def sort_key(self) -> tuple[int, int, str]:
        """Machines with GPUs first, each kind by the price of what it rents out."""
        if self.machine.inventory.devices:
            return 0, self.prices.gpu_udgpu, self.machine.id
        return 1, self.prices.cpu_udgpu, self.machine.id


@dataclass(frozen=True, slots=True)
class OfferPage:
    """Some offers and the cursor of the next ones."""

    offers: list[Offer]
    next_cursor: str


class Marketplace:
    """Asks and offers. Methods with `tx` work in the caller's transaction; the others ask the registry."""

    def __init__(
        self, outbox: Outbox, clock: Clock, channels: Channels, *, default: store.Prices, max_price_udgpu_per_hour: int
    ) -> None:
        self._outbox = outbox
        self._clock = clock
        self._channels = channels
        self.default = default
        self._max_price_udgpu_per_hour = max_price_udgpu_per_hour

    # --- asks ---------------------------------------------------------------------------------------------------------

    async def own_machine_team(self, actor: Actor, machine_id: MachineId) -> TeamId:
        """The team of a machine whose price `actor` may set. Raises MachineNotFound, Forbidden, Unauthenticated."""
        if not (actor.operator or actor.is_service):
            actor.require_writer()
        request = registry_pb2.GetMachinesRequest(machine_ids=[str(machine_id)])
        try:
            answer = await rpc.call(self._registry().GetMachines, request, actor=SERVICE)
        except RemoteError as error:
            if error.remote_type != MachineNotFound.type:
                raise
            raise MachineNotFound(machine_id) from error
        team_id = TeamId.parse(answer.machines[0].team_id)
        if not (actor.operator or actor.is_service or actor.team_id == team_id):
            raise MachineNotFound(machine_id)
        return team_id

    async def set_ask(
        self, tx: Tx, machine_id: MachineId, team_id: TeamId, *, gpu_udgpu: int | None, cpu_udgpu: int | None
    ) -> store.AskRow:
        """Set one price or both of a machine that `own_machine_team` allowed. Raises InvalidArgument."""
        if gpu_udgpu is None and cpu_udgpu is None:
            raise InvalidArgument("a price is missing: say one per GPU-hour, one per core-hour, or both")
        for name, price in (("per GPU-hour", gpu_udgpu), ("per core-hour", cpu_udgpu)):
            if price is not None and not 0 <= price <= self._max_price_udgpu_per_hour:
                most = format_dgpu(self._max_price_udgpu_per_hour)
                raise InvalidArgument(f"price {name}: expected 0 to {most} $dGPU, got {format_dgpu(price)}")
        row = await store.set_ask(
            tx,
            machine_id,
            team_id,
            gpu_udgpu=gpu_udgpu,
            cpu_udgpu=cpu_udgpu,
            default=self.default,
            now=self._clock.now(),
        )
        await self._outbox.add(tx, [(subjects.ask_event(machine_id), events_pb2.AskChanged(ask=ask_to_proto(row)))])
        return row

    async def list_asks(
        self, tx: Tx, actor: Actor, machine_ids: Sequence[MachineId]
    ) -> tuple[list[store.AskRow], list[MachineId]]:
        """Own asks (of all machines when no ids are given), and those of `machine_ids` that have the default one."""
        _require_login(actor)
        if len(machine_ids) > MAX_IDS_PER_CALL:
            raise InvalidArgument(f"machine_ids: at most {MAX_IDS_PER_CALL} in one call, got {len(machine_ids)}")
        if not machine_ids:
            return await store.all_asks(tx, MAX_ASKS), []
        found = await store.find_asks(tx, set(machine_ids))
        return list(found.values()), [
            machine_id for machine_id in dict.fromkeys(machine_ids) if machine_id not in found
        ]

    # --- offers -------------------------------------------------------------------------------------------------------

    async def find_machines(self, actor: Actor, gpu: str) -> list[registry_pb2.Machine]:
        """Machines with the GPUs asked for (all when empty), with what `actor` may see of them.

        Raises UnreadableGpuSpec, Unavailable.
        """
        _require_login(actor)
        machines = [machine for machine in await self._all_machines() if _visible(machine, actor)]
        if gpu.strip():
            models = {device.model for machine in machines for device in machine.inventory.devices}
            try:
                request = parse_gpu_spec(gpu, also_known=sorted(models))
            except InvalidGpuSpec as error:
                raise UnreadableGpuSpec(error) from error
            machines = [machine for machine in machines if _has(machine, request)]
        return [machine if _is_own(machine, actor) else _public(machine) for machine in machines]

    async def offers(self, tx: Tx, machines: Iterable[registry_pb2.Machine], limit: int, cursor: str) -> OfferPage:
        """The machines with their prices, cheapest first."""
        size = page_limit(limit)
        after = tuple(decode_cursor(cursor, int, int, str)) if cursor else None
        by_id = {MachineId.parse(machine.id): machine for machine in machines}
        asks = await store.find_asks(tx, by_id)
        offers = sorted((self._offer(by_id[key], asks.get(key)) for key in by_id), key=lambda offer: offer.sort_key)
        rest = [offer for offer in offers if after is None or offer.sort_key > after]
        page = rest[:size]
        return OfferPage(page, encode_cursor(*page[-1].sort_key) if len(rest) > size else "")

    def _offer(self, machine: registry_pb2.Machine, ask: store.AskRow | None) -> Offer:
        prices = store.Prices(ask.price_udgpu_per_gpu_hour, ask.price_udgpu_per_cpu_hour) if ask else self.default
        return Offer(machine, prices, ask, machine.status in _TAKES_WORK and not machine.inventory.closed)

    async def _all_machines(self) -> list[registry_pb2.Machine]:
        machines: list[registry_pb2.Machine] = []
        page = common_pb2.PageRequest(limit=MACHINES_PER_CALL)
        while len(machines) < MAX_MACHINES:
            request = registry_pb2.ListMachinesRequest(page=page, all_teams=True)
            answer = await rpc.call(self._registry().ListMachines, request, actor=SERVICE)
            machines += answer.machines
            if not answer.next_cursor:
                break
            page.cursor = answer.next_cursor
        return machines[:MAX_MACHINES]

    def _registry(self) -> RegistryServiceStub:
        return RegistryServiceStub(self._channels.to(REGISTRY))


def ask_to_proto(row: store.AskRow) -> marketplace_pb2.Ask:
    ask = marketplace_pb2.Ask(
        machine_id=str(MachineId(row.machine_id)),
        team_id=str(TeamId(row.team_id)),
        price_udgpu_per_gpu_hour=row.price_udgpu_per_gpu_hour,
        price_udgpu_per_cpu_hour=row.price_udgpu_per_cpu_hour,
    )
    ask.updated_at.FromDatetime(row.updated_at)
    return ask


def _require_login(actor: Actor) -> None:
    if actor.kind not in (common_pb2.Actor.USER, common_pb2.Actor.MACHINE, common_pb2.Actor.SERVICE):
        raise Unauthenticated("log in first: `dante login`, or send an API key")


def _is_own(machine: registry_pb2.Machine, actor: Actor) -> bool:
    return actor.operator or actor.is_service or (actor.team_id is not None and machine.team_id == str(actor.team_id))


def _visible(machine: registry_pb2.Machine, actor: Actor) -> bool:
    """Strangers see only what they could rent, now or soon: isolated, real and there."""
    if machine.status == registry_pb2.MACHINE_LEFT:
        return False
    if _is_own(machine, actor):
        return True
    inventory = machine.inventory
    simulated = inventory.simulated or any(device.simulated for device in inventory.devices)
    return not simulated and inventory.sandbox not in ("", "none") and machine.status not in _NOT_THERE


def _has(machine: registry_pb2.Machine, request: GpuRequest) -> bool:
    """Whether the machine has as many devices of one model as the request needs; busy ones count."""
    fitting = Counter(
        device.model
        for device in machine.inventory.devices
        if request.accepts_model(device.model)
        and request.accepts_vram(device.vram_bytes)
        and request.accepts_capability(_capability(device))
    )
    return any(count >= request.count_min for count in fitting.values())


def _capability(device: machine_pb2.Device) -> int:
    try:
        return parse_capability(device.compute_capability)
    except InvalidQuantity:
        return 0  # a machine may say anything about itself; what cannot be read fits no request that asks for it


def _public(machine: registry_pb2.Machine) -> registry_pb2.Machine:
    """What strangers may know of a machine. A list of what is shown, so a new field stays private until added here."""
    seen = registry_pb2.Machine(
        id=machine.id,
        team_id=machine.team_id,
        status=machine.status,
        joined_at=machine.joined_at,
        inventory=machine_pb2.Inventory(
            cpu_milli=machine.inventory.cpu_milli,
            memory_bytes=machine.inventory.memory_bytes,
            disk_bytes=machine.inventory.disk_bytes,
            os=machine.inventory.os,
            driver_version=machine.inventory.driver_version,
            cuda_version=machine.inventory.cuda_version,
            executors=machine.inventory.executors,
            container_engine=machine.inventory.container_engine,
            allowed_images=machine.inventory.allowed_images,
            networks=machine.inventory.networks,
            sandbox=machine.inventory.sandbox,
            region=machine.inventory.region,
            closed=machine.inventory.closed,
            shares_devices=machine.inventory.shares_devices,
            benchmark=machine.inventory.benchmark if machine.inventory.HasField("benchmark") else None,
        ),
    )
    for device in machine.inventory.devices:
        seen.inventory.devices.add(
            id=device.id,
            index=device.index,
            model=device.model,
            vram_bytes=device.vram_bytes,
            compute_capability=device.compute_capability,
            vendor=device.vendor,
            mig_profile=device.mig_profile,
            pcie_generation=device.pcie_generation,
            pcie_width=device.pcie_width,
            power_limit_watts=device.power_limit_watts,
            ecc=device.ecc,
            benchmark=device.benchmark if device.HasField("benchmark") else None,
            # That it cannot be had now; the owner alone is told why.
            problem="unavailable" if device.problem else "",
        )
    return seen
