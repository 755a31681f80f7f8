"""When jobs begin and end: after other jobs, before a deadline, again and again. Time moves when a test says so."""

from datetime import timedelta
from typing import Any

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.domain.ids import JobId, ScheduleId, TeamId
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_member
from tests.fixtures.scheduler import ENDED, World, a_spec, until


async def test_a_job_begins_when_all_that_it_comes_after_have_succeeded(world: World) -> None:
    machine = await world.machine(2)
    first, second = await world.submit_one(), await world.submit_one()
    later = await world.submit_one(a_spec(after=[first, second]))
    array = await world.submit_one(a_spec(after=[first], array=jobs_pb2.ArraySpec(size=2)))
    for job_id in (later, array):
        job = await world.get(job_id)
        assert (job.state, job.reason) == (jobs_pb2.QUEUED, "waiting_for_jobs")
    assert first in (await world.get(later)).reason_text
    await machine.ends(await machine.given(first))
    await world.when(array, lambda job: job.array.created == 2)
    assert (await world.get(later)).reason == "waiting_for_jobs"
    await machine.ends(await machine.given(second))
    await world.when(later, lambda job: job.reason != "waiting_for_jobs")
    assert await world.sql("SELECT count(*) FROM jobs WHERE held") == [(0,)]


async def test_a_job_ends_when_one_that_it_comes_after_does_not_succeed_and_so_on_down_the_line(world: World) -> None:
    machine = await world.machine()
    first = await world.submit_one()
    second = await world.submit_one(a_spec(after=[first]))
    third = await world.submit_one(a_spec(after=[second], array=jobs_pb2.ArraySpec(size=3)))
    await machine.ends(await machine.given(first), jobs_pb2.FAILED)
    job = await world.settled(second)
    assert (job.state, job.message) == (jobs_pb2.CANCELLED, f"{first} ended FAILED")
    job = await world.settled(third)
    assert (job.state, job.array.created, job.array.cancelled) == (jobs_pb2.CANCELLED, 0, 3)
    assert f"dependency ({second})" in job.message
    assert len(await world.sql("SELECT id FROM attempts")) == 1


async def test_what_a_job_comes_after_must_be_the_teams_own_and_still_able_to_succeed(world: World) -> None:
    gone = await world.submit_one()
    await world.stop_job(gone)
    foreign = await world.submit_one(actor=a_member(TeamId.new()))
    for after, type_ in (
        ([gone], "invalid-job"), ([foreign], "job-not-found"), ([str(JobId.new())], "job-not-found"),
        (["job_x"], "invalid-job"), ([gone] * 101, "invalid-job"),
    ):  # fmt: skip
        with pytest.raises(RemoteError) as caught:
            await world.submit(a_spec(after=after))
        assert caught.value.remote_type == type_


async def test_a_job_never_begins_after_its_deadline_and_is_stopped_at_it(world: World) -> None:
    machine = await world.machine()
    running, attempt = await world.running(machine, a_spec(deadline_seconds=60))
    waiting = await world.submit_one(a_spec(deadline_seconds=60))
    array = await world.submit_one(a_spec(deadline_seconds=60, array=jobs_pb2.ArraySpec(size=3)))
    await world.when(array, lambda job: job.array.created == 3)
    for _ in range(3):
        world.clock.advance(20)
        await machine.renews(attempt)
    job = await world.reached(waiting, *ENDED)
    assert (job.state, job.outcome, job.message) == (
        jobs_pb2.FAILED, jobs_pb2.OUTCOME_TIMED_OUT, "its deadline passed before it could begin",
    )  # fmt: skip
    asked = await machine.told(lambda desired: bool(desired) and desired[0].stop)
    assert asked[0].stop_reason == "deadline"
    await machine.ends(attempt, jobs_pb2.CANCELLED)
    assert (await world.reached(running, *ENDED)).outcome == jobs_pb2.OUTCOME_TIMED_OUT
    job = await world.reached(array, *ENDED)
    assert (job.state, job.outcome, job.array.failed) == (jobs_pb2.FAILED, jobs_pb2.OUTCOME_TIMED_OUT, 3)
    assert "deadline" in job.message
    past = a_spec()
    past.deadline.FromDatetime(world.clock.now())
    with pytest.raises(RemoteError, match="passed already"):
        await world.submit(past)


def a_schedule(cron: str = "0 12 * * *", **fields: Any) -> jobs_pb2.CreateScheduleRequest:
    schedule = jobs_pb2.ScheduleSpec(cron=cron, timezone=fields.pop("timezone", ""))
    return jobs_pb2.CreateScheduleRequest(spec=a_spec(schedule=schedule, **fields))


async def runs_of(world: World, schedule: jobs_pb2.Schedule) -> list[tuple[Any, ...]]:
    schedule_id = ScheduleId.parse(schedule.id).uuid
    return await world.sql("SELECT due_at FROM jobs WHERE schedule_id = %(id)s ORDER BY due_at", id=schedule_id)


async def test_a_schedule_submits_a_job_at_each_due_time_once_also_with_two_leaders(world: World) -> None:
    made = (await call(world.jobs.CreateSchedule, a_schedule(), actor=world.me)).schedule
    due = made.next_at.ToDatetime(world.clock.now().tzinfo)
    assert (due.hour, due.minute) == (12, 0)
    await world.start_scheduler()
    for day in range(3):
        world.clock.advance((due + timedelta(days=day) - world.clock.now()).total_seconds())
        await until(lambda day=day: _has_runs(world, made, day + 1))
        await world.stop_leading(world.schedulers[day % 2])
        await world.start_scheduler()
    assert await runs_of(world, made) == [(due + timedelta(days=day),) for day in range(3)]
    listed = (await call(world.jobs.ListSchedules, jobs_pb2.ListSchedulesRequest(), actor=world.me)).schedules[0]
    assert (listed.runs, (await world.get(listed.last_job_id)).schedule_id) == (3, made.id)
    assert not (await world.get(listed.last_job_id)).spec.HasField("schedule")


async def _has_runs(world: World, schedule: jobs_pb2.Schedule, count: int) -> bool:
    return len(await runs_of(world, schedule)) >= count


async def test_times_that_were_missed_come_to_one_job_and_a_stopped_schedule_to_none(world: World) -> None:
    made = (await call(world.jobs.CreateSchedule, a_schedule("*/10 * * * *"), actor=world.me)).schedule
    other = (await call(world.jobs.CreateSchedule, a_schedule("*/10 * * * *"), actor=world.me)).schedule
    stop = jobs_pb2.StopSchedulesRequest(schedule_ids=[other.id])
    await call(world.jobs.StopSchedules, stop, actor=world.me)
    stopped = (await call(world.jobs.StopSchedules, stop, actor=world.me)).schedules[0]
    assert not stopped.HasField("next_at")
    world.clock.advance(24 * 3600)
    await until(lambda: _has_runs(world, made, 1))
    world.clock.advance(600)
    await until(lambda: _has_runs(world, made, 2))
    assert len(await runs_of(world, made)) == 2
    assert await runs_of(world, other) == []
    with pytest.raises(RemoteError) as caught:
        await call(world.jobs.StopSchedules, stop, actor=a_member(TeamId.new()))
    assert caught.value.remote_type == "schedule-not-found"


async def test_a_schedule_that_cannot_be_kept_is_refused(world: World) -> None:
    past = a_schedule()
    past.spec.deadline.FromDatetime(world.clock.now() + timedelta(days=1))
    for request in (
        a_schedule("often"), a_schedule("0 0 30 2 *"), a_schedule(timezone="Mars/Olympus"), a_schedule(argv=[]), past,
        jobs_pb2.CreateScheduleRequest(spec=a_spec()),
    ):  # fmt: skip
        with pytest.raises(RemoteError) as caught:
            await call(world.jobs.CreateSchedule, request, actor=world.me)
        assert caught.value.remote_type == "invalid-job"
    with pytest.raises(RemoteError, match="/v1/schedules"):
        await world.submit(a_schedule().spec)
