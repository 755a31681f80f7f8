"""agora-marketplace beside a real provider-registry-service, PostgreSQL and NATS, called through its gRPC door."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from pydantic import SecretStr

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import unwrap
from dantegpu.contracts.gen.dante.v1 import common_pb2, events_pb2, machine_pb2, registry_pb2
from dantegpu.contracts.gen.dante.v1 import marketplace_pb2 as pb
from dantegpu.contracts.gen.dante.v1.marketplace_pb2_grpc import MarketplaceServiceStub
from dantegpu.contracts.gen.dante.v1.registry_pb2_grpc import RegistryServiceStub
from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.domain.units import GIB
from dantegpu.kit.actor import ANONYMOUS, SERVICE, Actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import ErrorStatus, RemoteError, ServiceError, status_of
from dantegpu.kit.rpc import call
from dantegpu.services.marketplace import module as marketplace_module
from dantegpu.services.marketplace.settings import MarketplaceSettings
from dantegpu.services.registry import module as registry_module
from dantegpu.services.registry.settings import RegistrySettings
from tests.fixtures.actors import a_machine, a_member, an_operator
from tests.fixtures.running import running_service
from tests.fixtures.servers import NatsForTests

DEFAULT_GPU_PRICE = 400_000
DEFAULT_CPU_PRICE = 10_000


@dataclass(frozen=True, slots=True)
class Market:
    stub: MarketplaceServiceStub
    registry: RegistryServiceStub

    async def join(self, team: TeamId, *gpus: str, sandbox: str = "bubblewrap", simulated: bool = False) -> MachineId:
        """A machine with these GPU models (24 GB each) joins."""
        machine_id = MachineId.new()
        inventory = machine_pb2.Inventory(
            hostname="secret-host",
            kernel="6.1.0-private",
            cpu_milli=8000,
            memory_bytes=32 * GIB,
            sandbox=sandbox,
            limits_missing=["memory: not writable"],
            daemon_version="1.2.3",
            devices=[
                machine_pb2.Device(
                    index=index,
                    model=model,
                    uuid="" if simulated else f"GPU-{machine_id}-{index}",
                    pcie_bus_id="0000:01:00.0",
                    vram_bytes=24 * GIB,
                    compute_capability="8.9",
                    simulated=simulated,
                )
                for index, model in enumerate(gpus)
            ],
        )
        request = registry_pb2.RegisterMachineRequest(
            machine_id=str(machine_id), team_id=str(team), inventory=inventory
        )
        await call(self.registry.RegisterMachine, request, actor=SERVICE)
        return machine_id

    async def set_ask(
        self, machine: MachineId, actor: Actor, *, gpu: int | None = None, cpu: int | None = None
    ) -> pb.Ask:
        request = pb.SetAskRequest(machine_id=str(machine), price_udgpu_per_gpu_hour=gpu, price_udgpu_per_cpu_hour=cpu)
        return (await call(self.stub.SetAsk, request, actor=actor)).ask

    async def asks(self, *machines: MachineId, actor: Actor = SERVICE) -> pb.ListAsksResponse:
        return await call(self.stub.ListAsks, pb.ListAsksRequest(machine_ids=map(str, machines)), actor=actor)

    async def offers(self, actor: Actor, gpu: str = "", limit: int = 0, cursor: str = "") -> pb.ListOffersResponse:
        request = pb.ListOffersRequest(gpu=gpu, page=common_pb2.PageRequest(limit=limit, cursor=cursor))
        return await call(self.stub.ListOffers, request, actor=actor)

    async def offered(self, actor: Actor, gpu: str = "") -> list[str]:
        """Ids of the machines on offer."""
        return [offer.machine.id for offer in (await self.offers(actor, gpu)).offers]


@pytest.fixture
async def market(postgres_dsn: str, nats_server: NatsForTests, short_dir: Path) -> AsyncIterator[Market]:
    dsn = SecretStr(postgres_dsn)
    registry_socket = short_dir / "registry.sock"
    async with (
        running_service(
            lambda deps: registry_module.build(deps, RegistrySettings(database_url=dsn)),
            nats=nats_server,
            socket=registry_socket,
        ) as registry,
        running_service(
            lambda deps: marketplace_module.build(deps, MarketplaceSettings(database_url=dsn)),
            nats=nats_server,
            socket=short_dir / "market.sock",
            addresses={"provider-registry-service": f"unix:{registry_socket}"},
        ) as channel,
    ):
        yield Market(MarketplaceServiceStub(channel), RegistryServiceStub(registry))


# --- asks -------------------------------------------------------------------------------------------------------------


async def test_a_provider_sets_one_price_and_the_other_stays(market: Market):
    team = TeamId.new()
    machine = await market.join(team, "NVIDIA GeForce RTX 4090")
    owner = a_member(team)
    first = await market.set_ask(machine, owner, gpu=700_000)
    assert (first.price_udgpu_per_gpu_hour, first.price_udgpu_per_cpu_hour) == (700_000, DEFAULT_CPU_PRICE)
    second = await market.set_ask(machine, owner, cpu=0)
    assert (second.price_udgpu_per_gpu_hour, second.price_udgpu_per_cpu_hour) == (700_000, 0)
    assert second.team_id == str(team)
    assert list((await market.asks(machine)).asks) == [second]


async def test_a_machine_without_an_ask_has_the_default_one(market: Market):
    team = TeamId.new()
    priced, unpriced = await market.join(team, "H100"), await market.join(team, "H100")
    own = await market.set_ask(priced, a_member(team), gpu=2_000_000)
    answer = await market.asks(unpriced, priced, unpriced, actor=a_member(TeamId.new()))
    assert [(ask.machine_id, ask.price_udgpu_per_gpu_hour) for ask in answer.asks] == [
        (str(priced), 2_000_000),
        (str(unpriced), DEFAULT_GPU_PRICE),
    ]
    everything = await market.asks()
    assert list(everything.asks) == [own]
    default = everything.default_ask
    assert (default.price_udgpu_per_gpu_hour, default.price_udgpu_per_cpu_hour) == (
        DEFAULT_GPU_PRICE,
        DEFAULT_CPU_PRICE,
    )


async def test_only_the_machines_team_and_the_operator_set_its_price(market: Market):
    team = TeamId.new()
    machine = await market.join(team, "H100")
    absent = MachineId.new()
    stranger = a_member(TeamId.new(), "owner")
    refusals = [
        (machine, stranger, "machine-not-found"),
        (absent, stranger, "machine-not-found"),
        (absent, an_operator(), "machine-not-found"),
        (machine, a_member(team, "viewer"), "forbidden"),
        (machine, a_machine(team, machine), "forbidden"),
        (machine, ANONYMOUS, "unauthenticated"),
    ]
    for asked, actor, refusal in refusals:
        with pytest.raises(RemoteError) as refused:
            await market.set_ask(asked, actor, gpu=1)
        assert refused.value.remote_type == refusal
    assert (await market.set_ask(machine, an_operator(), gpu=1)).team_id == str(team)


@pytest.mark.parametrize(
    ("prices", "problem"),
    [
        ({}, "a price is missing"),
        ({"gpu": -1}, "price per GPU-hour"),
        ({"gpu": 1, "cpu": -1}, "price per core-hour"),
        ({"gpu": 10_000 * 1_000_000 + 1}, "expected 0 to 10000.00"),
        ({"cpu": 2**63 - 1}, "price per core-hour"),
    ],
)
async def test_a_price_out_of_bounds_changes_nothing(market: Market, prices: dict[str, int], problem: str):
    team = TeamId.new()
    machine = await market.join(team, "H100")
    with pytest.raises(RemoteError, match=problem) as refused:
        await market.set_ask(machine, a_member(team), **prices)
    assert refused.value.remote_type == "invalid-argument"
    assert not (await market.asks()).asks


async def test_a_new_price_is_told_to_everybody(market: Market, nats_server: NatsForTests):
    team = TeamId.new()
    machine = await market.join(team, "H100")
    told: asyncio.Queue[pb.Ask] = asyncio.Queue()
    bus = Bus(nats_server.url, nats_server.services_creds, name="listener")
    await bus.start()

    async def heard(message: Msg) -> None:
        told.put_nowait(unwrap(message.data, events_pb2.AskChanged)[1].ask)

    await bus.subscribe(subjects.ask_event(machine), heard)
    ask = await market.set_ask(machine, a_member(team), gpu=5)
    async with asyncio.timeout(10):
        assert await told.get() == ask
    await bus.stop()


async def test_nobody_sees_asks_without_a_login(market: Market):
    for asking in (market.asks(actor=ANONYMOUS), market.offers(ANONYMOUS)):
        with pytest.raises(RemoteError) as refused:
            await asking
        assert refused.value.remote_type == "unauthenticated"


# --- offers -----------------------------------------------------------------------------------------------------------


async def test_offers_come_cheapest_first_with_machines_without_gpus_last_in_pages(market: Market):
    team = TeamId.new()
    owner = a_member(team)
    prices = {await market.join(team, "H100"): price for price in (900_000, 300_000, 500_000)}
    for machine, price in prices.items():
        await market.set_ask(machine, owner, gpu=price)
    default = await market.join(team, "H100")
    cpu_only = await market.join(team)
    await market.set_ask(cpu_only, owner, cpu=1)
    found: list[tuple[str, int]] = []
    cursor = ""
    while True:
        page = await market.offers(a_member(TeamId.new()), limit=2, cursor=cursor)
        assert len(page.offers) <= 2
        found += [(offer.ask.machine_id, offer.ask.price_udgpu_per_gpu_hour) for offer in page.offers]
        cursor = page.next_cursor
        if not cursor:
            break
    by_price = sorted([*prices.items(), (default, DEFAULT_GPU_PRICE)], key=lambda item: item[1])
    assert found == [(str(machine), price) for machine, price in by_price] + [(str(cpu_only), DEFAULT_GPU_PRICE)]


async def test_a_gpu_spec_narrows_the_offers(market: Market):
    team, somebody = TeamId.new(), a_member(TeamId.new())
    one = await market.join(team, "NVIDIA GeForce RTX 4090")
    two = await market.join(team, "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090")
    mixed = await market.join(team, "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe")
    await market.join(team)
    assert set(await market.offered(somebody, "rtx4090")) == {str(one), str(two), str(mixed)}
    assert await market.offered(somebody, "RTX4090:2") == [str(two)]
    assert await market.offered(somebody, "H100") == [str(mixed)]
    assert await market.offered(somebody, "2") == [str(two)]  # two of one model
    assert await market.offered(somebody, "40GB") == []
    assert await market.offered(somebody, "cc9.0..") == []


async def test_an_unreadable_spec_says_where_and_names_the_nearest(market: Market):
    with pytest.raises(RemoteError) as refused:
        await market.offers(a_member(TeamId.new()), "RTX4091:2")
    assert refused.value.remote_type == "invalid-gpu-spec"
    assert refused.value.params["position"] == "0"
    assert refused.value.params["nearest"]


@pytest.mark.parametrize("cursor", ["nonsense", "WzFd", "é"])
async def test_a_forged_cursor_is_refused(market: Market, cursor: str):
    with pytest.raises(RemoteError, match="cursor") as refused:
        await market.offers(a_member(TeamId.new()), cursor=cursor)
    assert refused.value.remote_type == "invalid-argument"


async def test_strangers_see_only_what_they_can_rent(market: Market):
    team = TeamId.new()
    owner = a_member(team)
    real = await market.join(team, "H100")
    simulated = await market.join(team, "H100", simulated=True)
    unsandboxed = await market.join(team, "H100", sandbox="none")
    assert await market.offered(a_member(TeamId.new(), "owner")) == [str(real)]
    for actor in (owner, an_operator()):
        offers = {offer.machine.id: offer for offer in (await market.offers(actor)).offers}
        assert set(offers) == {str(real), str(simulated), str(unsandboxed)}
        assert offers[str(simulated)].machine.inventory.simulated
        assert all(device.simulated for device in offers[str(simulated)].machine.inventory.devices)


async def test_a_machine_is_rentable_while_it_lives_and_takes_work(market: Market, nats_server: NatsForTests):
    team = TeamId.new()
    owner, stranger = a_member(team), a_member(TeamId.new())
    machine = await market.join(team, "H100")
    assert [offer.rentable for offer in (await market.offers(stranger)).offers] == [False]  # no sign of life yet
    bus = Bus(nats_server.url, nats_server.services_creds, name="machine")
    await bus.start()
    await bus.publish(subjects.machine_heartbeat(machine), machine_pb2.Heartbeat(machine_id=str(machine)))
    await bus.stop()
    async with asyncio.timeout(10):
        while not (await market.offers(stranger)).offers[0].rentable:
            pass
    for intent, expected in ((registry_pb2.INTENT_PAUSED, [False]), (registry_pb2.INTENT_LEFT, [])):
        request = registry_pb2.SetMachineIntentRequest(machine_id=str(machine), intent=intent)
        await call(market.registry.SetMachineIntent, request, actor=owner)
        for actor in (stranger, owner):
            assert [offer.rentable for offer in (await market.offers(actor)).offers] == expected


async def test_strangers_learn_nothing_private_about_a_machine(market: Market):
    team = TeamId.new()
    await market.join(team, "RTX 4090")
    seen = (await market.offers(a_member(TeamId.new()))).offers[0].machine
    own = (await market.offers(a_member(team))).offers[0].machine
    assert {field.name for field, _ in seen.ListFields()} == {"id", "team_id", "inventory", "status", "joined_at"}
    inventory, device = seen.inventory, seen.inventory.devices[0]
    assert {field.name for field, _ in inventory.ListFields()} == {"cpu_milli", "memory_bytes", "sandbox", "devices"}
    assert {field.name for field, _ in device.ListFields()} == {"id", "model", "vram_bytes", "compute_capability"}
    assert (own.inventory.hostname, own.inventory.devices[0].pcie_bus_id) == ("secret-host", "0000:01:00.0")


async def test_without_the_registry_the_answer_is_to_try_again(
    postgres_dsn: str, nats_server: NatsForTests, short_dir: Path
):
    settings = MarketplaceSettings(database_url=SecretStr(postgres_dsn))
    async with running_service(
        lambda deps: marketplace_module.build(deps, settings),
        nats=nats_server,
        socket=short_dir / "market.sock",
        addresses={"provider-registry-service": f"unix:{short_dir / 'nobody.sock'}"},
    ) as channel:
        with pytest.raises(ServiceError, match="try again") as refused:
            await call(MarketplaceServiceStub(channel).ListOffers, pb.ListOffersRequest(), actor=a_member(TeamId.new()))
        assert status_of(refused.value) is ErrorStatus.UNAVAILABLE
