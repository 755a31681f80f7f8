"""Machines that fail: avoided by the job that they failed, shut out when they fail everybody, back after a while."""

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.domain.ids import TeamId
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_member, an_operator
from tests.fixtures.scheduler import Machine, World, a_spec, until
from tests.integration.test_scheduler_attempts import until_given

HALF_AN_HOUR = 1800.0


async def fails(world: World, machine: Machine, job_id: str, epoch: int = 1) -> None:
    """The machine's fault, and the end of the job, so that nothing else waits for a machine."""
    attempt = await machine.given(job_id, epoch)
    await machine.ends(attempt, jobs_pb2.FAILED, outcome=jobs_pb2.OUTCOME_PROVIDER_FAULT, message="the disk is full")
    await world.when(job_id, lambda job: job.epoch == epoch and job.state == jobs_pb2.QUEUED)
    await world.stop_job(job_id)


async def quarantined(world: World) -> list[jobs_pb2.Quarantine]:
    request = jobs_pb2.ListQuarantinesRequest()
    return list((await call(world.jobs.ListQuarantines, request, actor=an_operator())).quarantines)


async def test_a_job_does_not_go_back_to_the_machine_that_failed_it_while_there_is_another(world: World) -> None:
    one, other = await world.machine(), await world.machine()
    job_id = await world.submit_one()
    faulty = await until_given(job_id, one, other)
    attempt = await faulty.given(job_id)
    await faulty.ends(attempt, jobs_pb2.FAILED, outcome=jobs_pb2.OUTCOME_PROVIDER_FAULT, message="the disk is full")
    job = await world.when(job_id, lambda job: job.reason == "waiting_for_retry")
    assert "the disk is full" in job.reason_text
    world.clock.advance(2)
    second = other if faulty is one else one
    attempt = await second.given(job_id, epoch=2)
    await second.ends(attempt, jobs_pb2.FAILED, outcome=jobs_pb2.OUTCOME_PROVIDER_FAULT)
    await world.when(job_id, lambda job: job.reason == "waiting_for_retry")
    world.clock.advance(4)
    # Both have failed it now, and nothing else is there: better one of them than never.
    await until_given(job_id, one, other)


async def test_a_machine_that_fails_jobs_of_different_teams_in_a_row_gets_no_work_until_the_time_is_over(
    world: World,
) -> None:
    machine = await world.machine()
    stranger = a_member(TeamId.new())
    await world.credit(team=stranger.team_id)
    await fails(world, machine, await world.submit_one())
    await fails(world, machine, await world.submit_one())
    theirs = await world.submit_one(actor=stranger)
    attempt = await machine.given(theirs)
    await machine.ends(attempt, jobs_pb2.FAILED, outcome=jobs_pb2.OUTCOME_PROVIDER_FAULT)
    shut = await until(lambda: quarantined(world))
    assert [each.machine_id for each in shut] == [str(machine.id)]
    assert shut[0].reason.startswith("3 attempts of 2 teams were lost or failed by the machine's fault")
    await world.stop_job(theirs, stranger)
    waiting = await world.submit_one()
    await world.when(waiting, lambda job: job.reason == "no_provider_online")
    assert "in quarantine" in (await world.get(waiting)).reason_text
    world.clock.advance(HALF_AN_HOUR)
    await machine.given(waiting)
    # Again right afterwards: it lasts twice as long.
    await fails(world, machine, waiting)
    assert await quarantined(world) == []


async def test_a_success_in_between_or_one_team_alone_does_not_shut_a_machine_out_so_soon(world: World) -> None:
    machine = await world.machine()
    for _ in range(5):
        await fails(world, machine, await world.submit_one())
    good = await world.submit_one()
    await machine.ends(await machine.given(good))
    await world.settled(good)
    world.clock.advance(1)
    for _ in range(5):
        await fails(world, machine, await world.submit_one())
    assert await quarantined(world) == []
    await fails(world, machine, await world.submit_one())
    assert len(await until(lambda: quarantined(world))) == 1


async def test_the_operator_lets_a_machine_work_again_and_nobody_else_may(world: World) -> None:
    machine = await world.machine()
    for _ in range(6):
        await fails(world, machine, await world.submit_one())
    await until(lambda: quarantined(world))
    waiting = await world.submit_one()
    request = jobs_pb2.ReleaseMachinesRequest(machine_ids=[str(machine.id)])
    for nobody in (world.me, machine.owner):
        with pytest.raises(RemoteError) as caught:
            await call(world.jobs.ReleaseMachines, request, actor=nobody)
        assert caught.value.remote_type == "forbidden"
    released = (await call(world.jobs.ReleaseMachines, request, actor=an_operator())).released
    assert [each.machine_id for each in released] == [str(machine.id)]
    await machine.given(waiting)
    assert list((await call(world.jobs.ReleaseMachines, request, actor=an_operator())).released) == []


@pytest.mark.parametrize(
    ("on_events", "outcome", "again"),
    [
        (["error"], jobs_pb2.OUTCOME_FAILED, True),
        (["interruption"], jobs_pb2.OUTCOME_FAILED, False),
        ([], jobs_pb2.OUTCOME_PROVIDER_FAULT, True),
    ],
    ids=["an error when asked", "no error when not asked", "a machine's fault always"],
)
async def test_what_is_tried_again_depends_on_the_cause(
    world: World, on_events: list[str], outcome: "jobs_pb2.Outcome.ValueType", again: bool
) -> None:
    machine = await world.machine()
    job_id = await world.submit_one(a_spec(retry=jobs_pb2.RetryPolicy(on_events=on_events)))
    attempt = await machine.given(job_id)
    await machine.ends(attempt, jobs_pb2.FAILED, outcome=outcome)
    job = await world.when(job_id, lambda job: job.state in (jobs_pb2.QUEUED, jobs_pb2.FAILED) and job.epoch == 1)
    assert (job.state == jobs_pb2.QUEUED) == again
    if again:
        assert job.reason == "waiting_for_retry"
        world.clock.advance(2)
        await machine.given(job_id, epoch=2)
