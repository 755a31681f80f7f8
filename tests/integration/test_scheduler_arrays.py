"""Arrays in the scheduler: one row until their turn comes, exactly once each, one end, one receipt, one stop."""

import asyncio
from typing import Any

import pytest

from dantegpu.contracts.gen.dante.v1 import billing_pb2, common_pb2, jobs_pb2, machine_pb2
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from dantegpu.services.scheduler.service import arrays
from tests.fixtures.actors import a_member
from tests.fixtures.scheduler import ENDED, Machine, World, a_spec, until


def an_array(size: int = 3, *, max_parallel: int = 0, **fields: Any) -> jobs_pb2.JobSpec:
    return a_spec(array=jobs_pb2.ArraySpec(size=size, max_parallel=max_parallel), **fields)


async def tasks_of(world: World, array_id: str, **fields: Any) -> list[jobs_pb2.Job]:
    request = jobs_pb2.ListJobsRequest(array_id=array_id, **fields)  # type: ignore[arg-type]
    return list((await call(world.jobs.ListJobs, request, actor=world.me)).jobs)


async def runs_all(machine: Machine, count: int, *failing: int) -> list[machine_pb2.DesiredAttempt]:
    """Run what the machine is given, one after the other, until `count` tasks have ended; those of `failing` fail."""
    done: dict[str, machine_pb2.DesiredAttempt] = {}
    while len(done) < count:
        desired = await machine.told(lambda attempts: any(a.attempt_id not in done for a in attempts))
        for attempt in desired:
            if attempt.attempt_id not in done:
                done[attempt.attempt_id] = attempt
                index = int(attempt.spec.env["DANTE_ARRAY_INDEX"])
                await machine.ends(attempt, jobs_pb2.FAILED if index in failing else jobs_pb2.SUCCEEDED)
    return list(done.values())


async def test_an_array_is_accepted_as_one_row_and_each_task_runs_once_with_its_own_environment(world: World) -> None:
    axes = [jobs_pb2.ArrayAxis(name="lr", values=["0.1", "0.01"]), jobs_pb2.ArrayAxis(name="seed", first=4, count=2)]
    spec = a_spec(env={"A": "b"}, name="sweep", array=jobs_pb2.ArraySpec(axes=axes))
    array_id = await world.submit_one(spec)
    machine = await world.machine(4)
    attempts = await runs_all(machine, 4)
    assert sorted((a.spec.env["DANTE_ARRAY_INDEX"], a.spec.env["lr"], a.spec.env["seed"]) for a in attempts) == [
        ("0", "0.1", "4"), ("1", "0.1", "5"), ("2", "0.01", "4"), ("3", "0.01", "5"),
    ]  # fmt: skip
    assert {(a.spec.name, a.spec.env["A"], a.spec.HasField("array")) for a in attempts} == {("sweep", "b", False)}
    job = await world.settled(array_id)
    assert (job.state, job.outcome, job.message) == (
        jobs_pb2.SUCCEEDED, jobs_pb2.OUTCOME_SUCCEEDED, "4 of 4 tasks succeeded",
    )  # fmt: skip
    assert (job.array.size, job.array.created, job.array.succeeded) == (4, 4, 4)
    assert await world.events(array_id) == ["submitted", "running", "ended", "settled"]
    await world.check_sound()


async def test_an_array_with_a_failed_task_fails_with_counts_and_costs_what_its_tasks_cost(world: World) -> None:
    array_id = await world.submit_one(an_array(3))
    machine = await world.machine(3)
    await runs_all(machine, 3, 1)
    job = await world.settled(array_id)
    assert (job.state, job.message) == (jobs_pb2.FAILED, "2 of 3 tasks succeeded, 1 failed")
    assert [task.state for task in await tasks_of(world, array_id)] == [
        jobs_pb2.SUCCEEDED, jobs_pb2.FAILED, jobs_pb2.SUCCEEDED,
    ]  # fmt: skip
    assert job.cost_udgpu == 3 * 1000
    request = billing_pb2.GetReceiptRequest(job_id=array_id)
    receipt = (await call(world.billing.GetReceipt, request, actor=world.me)).receipt
    assert (receipt.total_udgpu, len(receipt.lines)) == (3 * 1000, 3)
    request.attempt_ids.append(receipt.lines[0].attempt_id)
    one = (await call(world.billing.GetReceipt, request, actor=world.me)).receipt
    assert (one.total_udgpu, len(one.lines)) == (1000, 1)


async def test_tasks_are_created_as_their_turn_comes_and_never_more_than_may_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_TASKS", 2)
    monkeypatch.setattr(arrays, "MAX_WAITING_TASKS", 4)
    array_id = await world.submit_one(an_array(20))
    job = await world.when(array_id, lambda job: job.array.created == 4)
    assert (job.state, job.array.queued) == (jobs_pb2.QUEUED, 4)
    machine = await world.machine(2)
    await runs_all(machine, 20)
    job = await world.settled(array_id)
    assert (job.state, job.array.created, job.array.succeeded) == (jobs_pb2.SUCCEEDED, 20, 20)
    assert await world.sql("SELECT count(*), count(DISTINCT array_index) FROM jobs WHERE array_id IS NOT NULL") == [
        (20, 20)
    ]


async def test_max_parallel_bounds_what_runs_at_once(world: World) -> None:
    array_id = await world.submit_one(an_array(6, max_parallel=2))
    machine = await world.machine(4)
    seen: dict[str, machine_pb2.DesiredAttempt] = {}
    while len(seen) < 6:
        desired = await machine.told(lambda attempts: any(a.attempt_id not in seen for a in attempts))
        assert len(desired) <= 2
        fresh = next(a for a in desired if a.attempt_id not in seen)
        seen[fresh.attempt_id] = fresh
        await machine.ends(fresh)
    assert (await world.reached(array_id, *ENDED)).array.succeeded == 6


async def test_stopping_an_array_ends_what_waits_stops_what_runs_and_never_creates_the_rest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MAX_WAITING_TASKS", 5)
    machine = await world.machine(2)
    array_id = await world.submit_one(an_array(100))
    running = await machine.told(lambda attempts: len(attempts) == 2)
    await machine.runs(running[0])
    await world.when(array_id, lambda job: job.array.created == 7 and job.array.running == 1)
    stopped = await world.stop_job(array_id)
    assert (stopped.state, stopped.array.queued, stopped.array.stopping) == (jobs_pb2.STOPPING, 0, 2)
    asked = await machine.told(lambda attempts: len(attempts) == 2 and all(a.stop for a in attempts))
    assert {a.stop_reason for a in asked} == {"user"}
    for attempt in asked:
        await machine.ends(attempt, jobs_pb2.CANCELLED)
    job = await world.settled(array_id)
    assert (job.state, job.message) == (jobs_pb2.CANCELLED, "0 of 100 tasks succeeded, 100 were cancelled")
    assert (job.array.created, job.array.cancelled) == (7, 100)
    assert (await world.stop_job(array_id)).state == jobs_pb2.CANCELLED
    assert await world.events(array_id) == ["submitted", "running", "stop_requested", "ended", "settled"]
    await world.check_sound()


async def test_a_task_ended_with_its_array_looks_like_a_job_that_was_stopped_alone(world: World) -> None:
    alone = await world.submit_one()
    array_id = await world.submit_one(an_array(1))
    await world.when(array_id, lambda job: job.array.created == 1)
    await world.stop_job(alone)
    await world.stop_job(array_id)
    task = (await tasks_of(world, array_id))[0]
    await world.settled(alone)
    different = ("id", "spec", "array_id", "array_index", "message", "submitted_at", "event_seq")
    rows = await world.sql(
        "SELECT to_jsonb(jobs) - %(different)s::text[] FROM jobs WHERE id = ANY(%(ids)s)",
        ids=[JobId.parse(alone).uuid, JobId.parse(task.id).uuid], different=list(different),
    )  # fmt: skip
    assert rows[0] == rows[1]
    assert [event for event in await world.events(task.id) if event != "waiting"] == ["submitted", "ended"]


async def test_a_stop_while_tasks_are_being_created_leaves_none_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_TASKS", 7)
    for _ in range(5):
        array_id = await world.submit_one(an_array(2000))
        await world.when(array_id, lambda job: job.array.created > 0)
        await world.stop_job(array_id)
        job = await world.reached(array_id, *ENDED)
        assert (job.state, job.array.queued) == (jobs_pb2.CANCELLED, 0)
    open_tasks = "SELECT count(*) FROM jobs WHERE array_id IS NOT NULL AND ended_at IS NULL"
    assert await world.sql(open_tasks) == [(0,)]


async def test_two_leaders_and_a_crash_between_any_two_commits_create_each_task_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_TASKS", 10)
    array_id = await world.submit_one(an_array(300))
    await world.when(array_id, lambda job: job.array.created > 20)
    # As after kill -9: the passes end wherever they are, and another replica takes over.
    await world.stop_leading(world.schedulers[0])
    await world.start_scheduler()
    await world.when(array_id, lambda job: job.array.created == 300)
    tasks = "SELECT count(*), count(DISTINCT array_index), min(array_index), max(array_index) FROM jobs"
    assert await world.sql(f"{tasks} WHERE array_id IS NOT NULL") == [(300, 300, 0, 299)]


async def test_tasks_are_listed_by_index_page_by_page_and_apart_from_jobs(world: World) -> None:
    alone = await world.submit_one()
    array_id = await world.submit_one(an_array(5))
    await world.when(array_id, lambda job: job.array.created == 5)
    listed = await call(world.jobs.ListJobs, jobs_pb2.ListJobsRequest(states=[jobs_pb2.QUEUED]), actor=world.me)
    assert [(job.id, job.array.size) for job in listed.jobs] == [(array_id, 5), (alone, 0)]
    request = jobs_pb2.ListJobsRequest(array_id=array_id, page=common_pb2.PageRequest(limit=3))
    first = await call(world.jobs.ListJobs, request, actor=world.me)
    request.page.cursor = first.next_cursor
    rest = await call(world.jobs.ListJobs, request, actor=world.me)
    assert [task.array_index for task in (*first.jobs, *rest.jobs)] == [0, 1, 2, 3, 4]
    assert {task.array_id for task in first.jobs} == {array_id}
    assert rest.next_cursor == ""
    assert await tasks_of(world, array_id, states=[jobs_pb2.RUNNING]) == []
    request.page.cursor = "job_x"
    with pytest.raises(RemoteError, match="cursor"):
        await call(world.jobs.ListJobs, request, actor=world.me)


async def test_a_task_is_found_by_its_arrays_id_and_its_index_and_by_nobody_elses(world: World) -> None:
    array_id = await world.submit_one(an_array(3))
    await world.when(array_id, lambda job: job.array.created == 3)
    task = await world.get(f"{array_id}:2")
    assert (task.array_id, task.array_index, task.spec.env["DANTE_ARRAY_INDEX"]) == (array_id, 2, "2")
    assert (await world.get(task.id)).id == task.id
    stranger = a_member(TeamId.new())
    answers: list[str] = []
    for ref, actor in ((f"{array_id}:2", stranger), (f"{array_id}:3", stranger), (f"{array_id}:3", world.me)):
        with pytest.raises(RemoteError) as caught:
            await world.get(ref, actor)
        assert caught.value.remote_type == "job-not-found"
        answers.append(caught.value.message.replace(":2", ":3"))
    assert len(set(answers)) == 1
    with pytest.raises(RemoteError, match="index"):
        await world.get(f"{array_id}:two")


async def test_a_waiting_array_says_why_as_its_tasks_do(world: World) -> None:
    await world.machine()
    array_id = await world.submit_one(a_spec("H100", array=jobs_pb2.ArraySpec(size=3)))
    job = await world.when(array_id, lambda job: job.reason == "no_matching_gpu")
    assert "No machine online has the requested GPUs" in job.reason_text
    why = await world.why(array_id)
    assert (why.job_id, why.reason, why.machines_total) == (array_id, "no_matching_gpu", 1)


async def test_an_array_that_cannot_be_run_is_refused(world: World) -> None:
    for spec in (
        jobs_pb2.ArraySpec(size=0),
        jobs_pb2.ArraySpec(size=10_000_000),
        jobs_pb2.ArraySpec(size=5, max_parallel=-1),
        jobs_pb2.ArraySpec(axes=[jobs_pb2.ArrayAxis(name="s", first=0, count=10_000_000)]),
        jobs_pb2.ArraySpec(axes=[jobs_pb2.ArrayAxis(name="s")]),
    ):
        with pytest.raises(RemoteError) as caught:
            await world.submit(a_spec(array=spec))
        assert caught.value.remote_type == "invalid-job"
    with pytest.raises(RemoteError, match="MAX_ARRAY_BYTES"):
        await world.submit(an_array(100_000, env={"A": "x" * 10_000}))
    assert await world.sql("SELECT count(*) FROM jobs") == [(0,)]


async def test_a_repeated_submission_of_an_array_is_one_array(world: World) -> None:
    both = await asyncio.gather(*(world.submit_one(an_array(4), idempotency_key="k") for _ in range(3)))
    assert len(set(both)) == 1
    await until(lambda: _created(world, both[0]))
    assert await world.sql("SELECT count(*) FROM jobs") == [(5,)]


async def _created(world: World, array_id: str) -> bool:
    return (await world.get(array_id)).array.created == 4
