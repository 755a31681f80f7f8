"""provider-registry-service over real PostgreSQL and NATS: machines, heartbeats, liveness."""

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.contracts.gen.dante.v1 import registry_pb2 as pb
from dantegpu.domain.clock import ManualClock
from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.kit.actor import Actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.db import Database
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.outbox import Outbox
from dantegpu.services.registry.service.liveness import Liveness, Watch
from dantegpu.services.registry.settings import RegistrySettings
from tests.fixtures.actors import a_machine, a_member, an_operator
from tests.fixtures.registry import RegistryClient, RegistryReplica, a_device, an_inventory, beat

SHORT = {"unknown_after_seconds": 0.4, "offline_after_seconds": 0.9, "sweep_interval_seconds": 0.05}


@asynccontextmanager
async def a_running_machine(
    registry: RegistryClient, team: TeamId, inventory: machine_pb2.Inventory | None = None
) -> AsyncGenerator[tuple[MachineId, Bus]]:
    """Registered, heard once."""
    machine = MachineId.new()
    await registry.register(machine, team, inventory or an_inventory(a_device()))
    async with registry.as_machine(machine) as bus:
        await beat(bus, machine)
        await registry.status_becomes(machine, pb.MACHINE_IDLE)
        yield machine, bus


async def refused(awaitable: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value


async def test_a_machine_is_unknown_until_its_first_heartbeat_and_then_takes_work(registry: RegistryClient):
    machine, team = MachineId.new(), TeamId.new()
    registered = await registry.register(machine, team, an_inventory(a_device()))
    assert (registered.status, registered.intent, registered.team_id) == (
        pb.MACHINE_UNKNOWN, pb.INTENT_ACTIVE, str(team),
    )  # fmt: skip
    async with registry.as_machine(machine) as bus:
        await beat(bus, machine, running_attempts=2, cpu_utilisation=0.5, memory_used_bytes=77)
        found = await registry.status_becomes(machine, pb.MACHINE_BUSY)
    assert (found.running_attempts, found.cpu_utilisation, found.memory_used_bytes) == (2, 0.5, 77)
    assert found.revision > registered.revision
    assert (await registry.event(lambda m: m.status == pb.MACHINE_BUSY)).id == str(machine)


async def test_the_same_registration_twice_changes_nothing(registry: RegistryClient):
    machine, team = MachineId.new(), TeamId.new()
    first = await registry.register(machine, team, an_inventory(a_device()))
    assert await registry.register(machine, team, an_inventory(a_device())) == first
    changed = await registry.register(machine, team, an_inventory(a_device(), a_device(1)))
    assert changed.revision > first.revision
    assert changed.joined_at == first.joined_at


async def test_a_device_keeps_its_id_by_the_drivers_uuid_or_by_its_index(registry: RegistryClient):
    machine, other, team = MachineId.new(), MachineId.new(), TeamId.new()
    before = (await registry.register(machine, team, an_inventory(a_device(0, "GPU-a"), a_device(1)))).inventory.devices
    after = (await registry.register(machine, team, an_inventory(a_device(1), a_device(5, "GPU-a")))).inventory.devices
    assert [before[0].id, before[1].id] == [after[1].id, after[0].id]
    elsewhere = (await registry.register(other, team, an_inventory(a_device(0, "GPU-a")))).inventory.devices
    assert elsewhere[0].id != before[0].id


async def test_a_machine_with_a_simulated_device_is_marked_as_simulated(registry: RegistryClient):
    inventory = an_inventory(a_device(simulated=True))
    assert (await registry.register(MachineId.new(), TeamId.new(), inventory)).inventory.simulated


@pytest.mark.parametrize(
    ("inventory", "field"),
    [
        (an_inventory(cpu_milli=-1), "cpu_milli"),
        (an_inventory(hostname="x" * 300), "hostname"),
        (an_inventory(hostname="a\x1b[2J"), "hostname"),
        (an_inventory(a_device(1), a_device(1)), "devices.index"),
        (an_inventory(a_device(1, "GPU-a"), a_device(2, "GPU-a")), "devices.uuid"),
        (an_inventory(a_device(-1)), "devices.index"),
        (an_inventory(machine_pb2.Device(index=0)), "devices.model"),
        (an_inventory(*(a_device(index) for index in range(65))), "devices"),
    ],
)
async def test_an_impossible_inventory_is_refused_by_field(
    registry: RegistryClient, inventory: machine_pb2.Inventory, field: str
):
    error = await refused(registry.register(MachineId.new(), TeamId.new(), inventory))
    assert (error.remote_type, error.params["field"]) == ("invalid-inventory", field)


@pytest.mark.parametrize("actor", [a_member(TeamId.new()), an_operator(), a_machine(TeamId.new())])
async def test_only_services_register_machines_and_read_the_snapshot(registry: RegistryClient, actor: Actor):
    error = await refused(registry.register(MachineId.new(), TeamId.new(), an_inventory(), actor=actor))
    assert error.remote_type == "forbidden"
    assert (await refused(registry.snapshot(actor))).remote_type == "forbidden"


async def test_another_teams_machine_is_answered_like_one_that_does_not_exist(registry: RegistryClient):
    machine, team = MachineId.new(), TeamId.new()
    await registry.register(machine, team, an_inventory())
    stranger = a_member(TeamId.new())
    hidden = await refused(registry.get(machine, stranger))
    absent = await refused(registry.get(MachineId.new(), stranger))
    acted = await refused(registry.intend(machine, pb.INTENT_LEFT, stranger))
    assert {hidden.remote_type, absent.remote_type, acted.remote_type} == {"machine-not-found"}
    assert await registry.page(stranger) == []
    assert (await registry.get(machine)).intent == pb.INTENT_ACTIVE
    assert (await registry.get(machine, a_member(team, "viewer"))).id == str(machine)
    assert (await registry.get(machine, a_machine(team, machine))).id == str(machine)
    assert (await refused(registry.get(machine, a_machine(team)))).remote_type == "machine-not-found"


async def test_lists_are_paged_and_only_operators_see_all_teams(registry: RegistryClient):
    team, machines = TeamId.new(), [MachineId.new() for _ in range(3)]
    for machine in machines:
        await registry.register(machine, team, an_inventory())
    foreign = MachineId.new()
    await registry.register(foreign, TeamId.new(), an_inventory())
    member = a_member(team)
    first, second, cursor = await registry.page(member, limit=2)
    assert [first, second, *await registry.page(member, limit=2, cursor=cursor)] == [str(m) for m in machines]
    assert str(foreign) in await registry.page(an_operator(), all_teams=True)
    assert (await refused(registry.page(member, all_teams=True))).remote_type == "forbidden"
    assert (await refused(registry.page(member, cursor="nonsense"))).remote_type == "invalid-argument"


async def test_pause_drain_and_resume_show_in_status_snapshot_and_events(registry: RegistryClient):
    team = TeamId.new()
    owner = a_member(team)
    async with a_running_machine(registry, team) as (machine, _):
        for intent, status in [
            (pb.INTENT_PAUSED, pb.MACHINE_PAUSED),
            (pb.INTENT_DRAINING, pb.MACHINE_DRAINING),
            (pb.INTENT_ACTIVE, pb.MACHINE_IDLE),
        ]:
            changed = await registry.intend(machine, intent, owner)
            assert changed.status == status
            assert await registry.intend(machine, intent, owner) == changed
            assert (await registry.event(lambda m, r=changed.revision: m.revision == r)).status == status
        snapshot = await registry.snapshot()
        assert [(m.id, m.status) for m in snapshot.machines] == [(str(machine), pb.MACHINE_IDLE)]
        assert snapshot.revision >= snapshot.machines[0].revision


async def test_a_viewer_looks_but_does_not_pause(registry: RegistryClient):
    machine, team = MachineId.new(), TeamId.new()
    await registry.register(machine, team, an_inventory())
    error = await refused(registry.intend(machine, pb.INTENT_PAUSED, a_member(team, "viewer")))
    assert error.remote_type == "forbidden"
    bad = await refused(registry.intend(machine, pb.MACHINE_INTENT_UNSPECIFIED, a_member(team)))
    assert bad.remote_type == "invalid-argument"


async def test_a_machine_that_left_comes_back_by_enrolling_again_only(registry: RegistryClient):
    team, new_team = TeamId.new(), TeamId.new()
    owner = a_member(team)
    async with a_running_machine(registry, team) as (machine, bus):
        taken = await refused(registry.register(machine, new_team, an_inventory()))
        assert taken.remote_type == "machine-of-another-team"
        await registry.intend(machine, pb.INTENT_LEFT, owner)
        assert await registry.page(owner) == []
        assert list((await registry.snapshot()).machines) == []
        assert (await refused(registry.intend(machine, pb.INTENT_ACTIVE, owner))).remote_type == "machine-left"
        back = await registry.register(machine, new_team, an_inventory())
        assert (back.team_id, back.intent, back.status) == (str(new_team), pb.INTENT_ACTIVE, pb.MACHINE_UNKNOWN)
        await beat(bus, machine)
        await registry.status_becomes(machine, pb.MACHINE_IDLE)


async def test_plain_heartbeats_change_utilisation_and_emit_nothing(registry: RegistryClient):
    async with a_running_machine(registry, TeamId.new()) as (machine, bus):
        before = await registry.get(machine)
        await registry.event(lambda m: m.status == pb.MACHINE_IDLE)
        events_before = len(registry.events)
        for number in range(1, 50):
            await beat(
                bus, machine, memory_used_bytes=number,
                devices=[machine_pb2.DeviceUtilisation(index=0, gpu_utilisation=0.9, vram_used_bytes=5)],
            )  # fmt: skip
        # Something that does emit, sent afterwards: when its event is here, those before it would be, too.
        await beat(bus, machine, memory_used_bytes=50, inventory=an_inventory(a_device(), a_device(1)))
        event = await registry.event(lambda m: len(m.inventory.devices) == 2)
        assert event.revision > before.revision
        assert len(registry.events) == events_before + 1
        assert (await registry.get(machine)).memory_used_bytes == 50
        await beat(bus, machine, running_attempts=1, inventory=an_inventory(a_device(), a_device(1)))
        same = await registry.status_becomes(machine, pb.MACHINE_BUSY)
        assert same.revision == event.revision


async def test_a_heartbeat_that_claims_another_machine_changes_neither(registry: RegistryClient):
    team = TeamId.new()
    async with a_running_machine(registry, team) as (honest, _), a_running_machine(registry, team) as (liar, bus):
        forged = machine_pb2.Heartbeat(
            machine_id=str(honest), running_attempts=9, inventory=an_inventory(hostname="forged")
        )
        await bus.publish(subjects.machine_heartbeat(liar), forged)
        await bus.publish(subjects.machine_heartbeat(liar), b"\xff\xff not protobuf")
        await beat(bus, liar, running_attempts=1)
        await registry.status_becomes(liar, pb.MACHINE_BUSY)
        assert (await registry.get(honest)).running_attempts == 0
        assert {(await registry.get(machine)).inventory.hostname for machine in (honest, liar)} == {"box"}


async def test_impossible_utilisation_and_a_bad_inventory_do_not_hide_that_the_machine_lives(registry: RegistryClient):
    async with a_running_machine(registry, TeamId.new()) as (machine, bus):
        await beat(
            bus, machine, running_attempts=3, cpu_utilisation=math.nan, memory_used_bytes=-5,
            devices=[machine_pb2.DeviceUtilisation(index=0, gpu_utilisation=math.inf, vram_used_bytes=-1)],
            inventory=an_inventory(a_device(1), a_device(1)),
        )  # fmt: skip
        found = await registry.status_becomes(machine, pb.MACHINE_BUSY)
        assert (found.cpu_utilisation, found.memory_used_bytes) == (0.0, 0)
        assert found.device_utilisation[0].gpu_utilisation == 0.0
        assert len(found.inventory.devices) == 1


async def test_an_unknown_machines_heartbeat_makes_no_machine(registry: RegistryClient):
    stranger = MachineId.new()
    async with registry.as_machine(stranger) as bus, a_running_machine(registry, TeamId.new()) as (known, known_bus):
        await beat(bus, stranger)
        await beat(known_bus, known, running_attempts=1)
        await registry.status_becomes(known, pb.MACHINE_BUSY)
        assert [machine.id for machine in (await registry.snapshot()).machines] == [str(known)]


async def test_silence_makes_a_machine_unknown_then_offline_and_a_heartbeat_brings_it_back(
    registry_replica: RegistryReplica,
):
    async with registry_replica(**SHORT) as registry, a_running_machine(registry, TeamId.new()) as (machine, bus):
        unknown = await registry.event(lambda m: m.status == pb.MACHINE_UNKNOWN and m.HasField("last_heartbeat_at"))
        offline = await registry.event(lambda m: m.status == pb.MACHINE_OFFLINE)
        assert offline.revision > unknown.revision
        await beat(bus, machine)
        back = await registry.event(lambda m: m.status == pb.MACHINE_IDLE and m.revision > offline.revision)
        assert back.last_heartbeat_at.ToDatetime() > offline.last_heartbeat_at.ToDatetime()


async def test_last_words_make_a_machine_offline_at_once(registry: RegistryClient):
    async with a_running_machine(registry, TeamId.new()) as (machine, bus):
        await beat(bus, machine, leaving=True)
        await registry.event(lambda m: m.status == pb.MACHINE_OFFLINE)
        assert (await registry.get(machine)).intent == pb.INTENT_ACTIVE


async def test_a_paused_machine_stays_paused_through_silence_and_new_enrolment(registry_replica: RegistryReplica):
    team = TeamId.new()
    async with registry_replica(**SHORT) as registry, a_running_machine(registry, team) as (machine, bus):
        await registry.intend(machine, pb.INTENT_PAUSED, a_member(team))
        await registry.status_becomes(machine, pb.MACHINE_OFFLINE)
        await registry.register(machine, team, an_inventory())
        await beat(bus, machine)
        assert (await registry.status_becomes(machine, pb.MACHINE_PAUSED)).intent == pb.INTENT_PAUSED


async def test_after_a_restart_nobody_is_marked_lost_before_one_full_timer(
    registry_replica: RegistryReplica, postgres_dsn: str
):
    async with registry_replica() as registry, a_running_machine(registry, TeamId.new()):
        pass
    ten_minutes_later = ManualClock(datetime.now(UTC) + timedelta(minutes=10))
    db = Database(postgres_dsn, "registry")
    await db.start()
    outbox = Outbox(db, Bus("nats://127.0.0.1:1", None, name="unused"), ten_minutes_later)
    liveness = Liveness(db, outbox, ten_minutes_later, RegistrySettings())
    marked: list[int] = []
    for _ in range(13):
        marked.append(await liveness.sweep())
        ten_minutes_later.advance(5)
    await db.stop()
    assert marked == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_a_pause_or_a_clock_that_was_set_restarts_the_watch():
    clock = ManualClock()
    watch = Watch(clock, longest_pause_seconds=7)
    began = clock.now()
    for _ in range(10):
        clock.advance(5)
        assert watch.look() == (began, False)
    clock.step(3600)
    assert watch.look() == (clock.now(), True)
    clock.advance(5)
    assert watch.look() == (clock.now() - timedelta(seconds=5), False)
    clock.advance(8)
    assert watch.look() == (clock.now(), False)


async def test_two_registries_share_the_heartbeats_and_agree(registry_replica: RegistryReplica):
    team = TeamId.new()
    async with (
        registry_replica("one") as one,
        registry_replica("two") as two,
        a_running_machine(one, team) as (machine, bus),
    ):
        for number in range(1, 21):
            await beat(bus, machine, memory_used_bytes=number, running_attempts=number)
        await two.status_becomes(machine, pb.MACHINE_BUSY)
        assert (await one.get(machine)).revision == (await two.get(machine)).revision


async def test_figures_get_a_score_and_a_device_that_cannot_be_what_it_says_is_taken_out(registry: RegistryClient):
    good, slow, fake = a_device(0, "GPU-a"), a_device(1, "GPU-b"), a_device(2, "GPU-c")
    good.benchmark.CopyFrom(machine_pb2.DeviceBenchmark(fp32_tflops=82.6, bf16_tflops=165.2, memory_gbps=1008, score=9))
    slow.benchmark.fp32_tflops = 8
    fake.compute_capability = "7.5"
    inventory = an_inventory(good, slow, fake)
    inventory.benchmark.CopyFrom(machine_pb2.Benchmark(cpu_gflops=500, memory_gbps=25))
    found = (await registry.register(MachineId.new(), TeamId.new(), inventory)).inventory
    assert (found.benchmark.score, found.devices[0].benchmark.score) == (50, 100)
    assert found.devices[0].problem == ""
    assert "computes at 10% of its speed" in found.devices[1].problem
    assert "has compute capability 7.5" in found.devices[2].problem
