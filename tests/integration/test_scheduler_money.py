"""Holds and windows: nothing starts without a hold, each is closed once, nobody pays twice (failure-model I3 to I5)."""

import asyncio

import pytest

from dantegpu.contracts.gen.dante.v1 import billing_pb2, jobs_pb2
from dantegpu.domain.ids import AttemptId, JobId, TeamId
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_member
from tests.fixtures.scheduler import GPU_PRICE_UDGPU, WINDOW_UDGPU, World, a_spec, until

WINDOW_SECONDS = 300


@pytest.fixture
async def broke_world(quiet_world: World) -> World:
    """Leases long enough to let windows pass at a stroke; the team has no money."""
    await quiet_world.start(lease_seconds=2000)
    return quiet_world


async def test_a_job_without_funds_waits_with_that_reason_and_starts_when_money_comes_in(broke_world: World) -> None:
    world = broke_world
    machine = await world.machine()
    job_id = await world.submit_one()
    job = await world.when(job_id, lambda job: job.reason == "no_funds")
    assert "0.00 $dGPU are available, the first 5 minutes cost 0.30" in job.reason_text
    assert machine.desired == []
    await world.credit(WINDOW_UDGPU - 1)
    await world.when(job_id, lambda job: "0.299999 $dGPU are available" in job.reason_text or False)
    await world.credit(1)
    attempt = await machine.given(job_id)
    assert (await world.wallet()).available_udgpu == 0
    await machine.runs(attempt)
    await machine.ends(attempt)
    assert (await world.settled(job_id)).cost_udgpu == 1_000
    await world.check_sound()


async def test_a_team_without_money_does_not_keep_the_machine_from_one_that_has_some(broke_world: World) -> None:
    world = broke_world
    rich = a_member(TeamId.new())
    assert rich.team_id is not None
    await world.credit(team=rich.team_id)
    await world.submit(*(a_spec(priority=100) for _ in range(50)))
    job = (await world.submit(actor=rich))[0]
    machine = await world.machine()
    await machine.given(job)


async def test_money_that_comes_free_starts_the_next_job(broke_world: World) -> None:
    world = broke_world
    await world.credit(WINDOW_UDGPU + 1_000)
    machine = await world.machine(2)
    _, attempt = await world.running(machine)
    waiting = await world.submit_one()
    await world.when(waiting, lambda job: job.reason == "no_funds")
    await machine.ends(attempt)
    await machine.given(waiting)


async def test_windows_follow_one_another_and_each_is_billed_once(broke_world: World) -> None:
    world = broke_world
    await world.credit(10 * WINDOW_UDGPU)
    machine = await world.machine()
    job_id, attempt = await world.running(machine)

    async def held() -> int:
        return (await world.wallet()).held_udgpu // WINDOW_UDGPU

    assert await held() == 1
    for window in range(1, 4):
        world.clock.advance(WINDOW_SECONDS - 60)
        await until(lambda: _is(held, 2))  # the next one is opened ahead of its time
        world.clock.advance(60)
        await machine.renews(attempt)
        await world.when(job_id, lambda job, cost=window * WINDOW_UDGPU: job.cost_udgpu == cost)
    world.clock.advance(100)
    await machine.ends(attempt, ran_ms=10_000_000)
    job = await world.settled(job_id)
    assert (job.cost_udgpu, job.attempts[0].billed_seconds) == (1_000_000, 1_000)
    receipt = await call(world.billing.GetReceipt, billing_pb2.GetReceiptRequest(job_id=job_id), actor=SERVICE)
    assert [(line.window, line.used_seconds) for line in receipt.receipt.lines if line.charged_udgpu] == [
        (0, 300), (1, 300), (2, 300), (3, 100),
    ]  # fmt: skip
    assert await held() == 0
    await world.check_sound()


async def _is(value: object, expected: int) -> bool:
    return await value() == expected  # type: ignore[operator]


async def test_a_silent_machine_is_not_paid_for_a_window_that_it_did_not_acknowledge(broke_world: World) -> None:
    world = broke_world
    await world.credit(10 * WINDOW_UDGPU)
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(250)
    await machine.renews(attempt)
    world.clock.advance(100)  # the first window is over, the machine was last heard before its end
    await until(lambda: _is(lambda: _opened(world, job_id), 2))
    world.clock.advance(2000 + 10)
    job = await world.when(job_id, lambda job: job.state == jobs_pb2.QUEUED)
    assert job.attempts[0].billed_seconds == 250
    await world.when(job_id, lambda job: job.cost_udgpu == 250_000)
    await world.check_sound()


async def _opened(world: World, job_id: str) -> int:
    found = await world.sql("SELECT windows_opened FROM attempts WHERE job_id = %(id)s", id=JobId.parse(job_id).uuid)
    return int(found[0][0])


async def test_an_attempt_whose_team_runs_out_of_money_stops_when_its_window_is_over_and_waits_for_more(
    broke_world: World,
) -> None:
    world = broke_world
    await world.credit(WINDOW_UDGPU + 10)
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(WINDOW_SECONDS - 1)
    await machine.renews(attempt)
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING
    world.clock.advance(1)
    await machine.renews(attempt)
    desired = (await machine.told(lambda desired: desired[0].stop))[0]
    assert desired.stop_reason == "no_funds"
    await machine.ends(attempt, jobs_pb2.CANCELLED, ran_ms=WINDOW_SECONDS * 1000)
    job = await world.when(job_id, lambda job: job.reason == "no_funds")
    assert job.attempts[0].outcome == jobs_pb2.OUTCOME_PREEMPTED
    await world.credit()
    again = await machine.given(job_id, epoch=2)
    await machine.runs(again)
    await machine.ends(again)
    job = await world.settled(job_id)
    assert (job.state, job.cost_udgpu) == (jobs_pb2.SUCCEEDED, WINDOW_UDGPU + 1_000)
    await world.check_sound()


async def test_a_job_that_may_not_run_longer_than_a_window_needs_money_for_one_only(broke_world: World) -> None:
    world = broke_world
    await world.credit(3 * WINDOW_UDGPU)
    machine = await world.machine(2)
    short, _ = await world.running(machine, a_spec(max_duration_seconds=300))
    long, _ = await world.running(machine)
    world.clock.advance(295)
    await until(lambda: _is(lambda: _opened(world, long), 2))
    assert await _opened(world, short) == 1


# --- holds without an attempt -----------------------------------------------------------------------------------------

_CUT = (
    "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
)
_CUT_ONCE = "CREATE TRIGGER cut AFTER INSERT ON attempts FOR EACH STATEMENT EXECUTE FUNCTION cut()"


async def test_a_hold_whose_plan_was_cut_off_before_its_commit_is_voided_by_the_sweep(broke_world: World) -> None:
    world = broke_world
    await world.credit(WINDOW_UDGPU)
    await world.sql(_CUT)
    await world.sql(_CUT_ONCE)
    machine = await world.machine()
    job_id = await world.submit_one()
    # The money is tied up: the next round's hold is refused.
    await world.when(job_id, lambda job: job.reason == "no_funds")
    await world.sql("DROP TRIGGER cut ON attempts")
    assert (await world.wallet()).held_udgpu == WINDOW_UDGPU
    world.clock.advance(121)
    attempt = await machine.given(job_id)
    assert attempt.epoch == 1
    await machine.runs(attempt)
    await machine.ends(attempt)
    assert (await world.settled(job_id)).cost_udgpu == 1_000
    assert (await world.wallet()).held_udgpu == 0
    await world.check_sound()


async def test_the_sweep_leaves_the_holds_of_live_attempts_alone(broke_world: World) -> None:
    world = broke_world
    await world.credit(10 * WINDOW_UDGPU)
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    orphan = billing_pb2.HoldRequest(
        attempt_id=str(AttemptId.new()), job_id=str(JobId.new()), payer_team_id=str(world.team),
        provider_team_id=str(TeamId.new()), rate_udgpu_per_hour=GPU_PRICE_UDGPU, window_seconds=WINDOW_SECONDS,
    )  # fmt: skip
    await call(world.billing.OpenHolds, billing_pb2.OpenHoldsRequest(holds=[orphan]), actor=SERVICE)
    assert (await world.wallet()).held_udgpu == 2 * WINDOW_UDGPU
    world.clock.advance(121)
    await until(lambda: _is(lambda: _held(world), WINDOW_UDGPU))
    await machine.ends(attempt, ran_ms=121_000)
    assert (await world.settled(job_id)).cost_udgpu == 121_000


async def _held(world: World) -> int:
    return (await world.wallet()).held_udgpu


async def test_a_plan_that_the_schema_refuses_gives_its_holds_back_at_once(broke_world: World) -> None:
    world = broke_world
    await world.credit(WINDOW_UDGPU)
    machine = await world.machine()
    device = (await world.device_ids(machine))[0]
    # As if another leader had leased it a moment ago.
    await world.sql("INSERT INTO device_usage VALUES (%(id)s, 1000)", id=device.uuid)
    job_id = await world.submit_one()
    events = asyncio.create_task(until(lambda: _is(lambda: _void_entries(world), 1)))
    await events
    assert (await world.get(job_id)).state == jobs_pb2.QUEUED
    await until(lambda: _is(lambda: _held(world), 0))
    await world.sql("UPDATE device_usage SET leased_milli = 0")
    await machine.given(job_id)
    await world.check_sound()


async def _void_entries(world: World) -> int:
    found = await world.sql("SELECT count(*) FROM billing.holds WHERE charged_udgpu = 0")
    return min(found[0][0], 1)
