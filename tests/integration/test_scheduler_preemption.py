"""Spot work gives way through the real scheduler: told, saved, requeued, billed; what it leaves is kept."""

import asyncio
import hashlib
from typing import Any

import httpx

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.kit.actor import Actor
from dantegpu.services.scheduler.service.fleet import READ_AGAIN_SECONDS
from tests.fixtures.actors import a_member
from tests.fixtures.scheduler import Machine, World, a_spec, until

PRICE_PERCENT = 70


def a_spot(gpu: str = "1", **fields: Any) -> jobs_pb2.JobSpec:
    return a_spec(gpu, spot_policy="spot", **fields)


def saves(*, signal: str = "", interval_seconds: int = 0) -> jobs_pb2.Checkpoint:
    return jobs_pb2.Checkpoint(path="ckpt", grace_seconds=45, signal=signal, interval_seconds=interval_seconds)


async def told_to_stop(machine: Machine, attempt: machine_pb2.DesiredAttempt) -> machine_pb2.DesiredAttempt:
    def stops(desired: list[machine_pb2.DesiredAttempt]) -> bool:
        return any(each.attempt_id == attempt.attempt_id and each.stop for each in desired)

    found = await machine.told(stops)
    return next(each for each in found if each.attempt_id == attempt.attempt_id)


async def messages(world: World, job_id: str) -> list[str]:
    rows = await world.sql(
        "SELECT message FROM job_events WHERE job_id = %(id)s AND type IN ('stop_requested', 'requeued') ORDER BY seq",
        id=JobId.parse(job_id).uuid,
    )
    return [message for (message,) in rows]


async def keep(
    machine: Machine, attempt: machine_pb2.DesiredAttempt, data: bytes, number: int = 1
) -> machine_pb2.Saved:
    """Upload a checkpoint as a daemon does."""
    saved = machine_pb2.Saved(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), number=number)
    reply = await machine.urls(attempt, checkpoint=saved)
    async with httpx.AsyncClient(verify=False) as client:
        (await client.put(reply.checkpoint_url, content=data)).raise_for_status()
    saved.slot = reply.checkpoint_slot
    return saved


async def test_an_on_demand_job_takes_over_and_the_spot_job_goes_on_after_it_billed_for_both_parts(
    world: World,
) -> None:
    machine = await world.machine()
    spot, first = await world.running(machine, a_spot())
    world.clock.advance(10)
    urgent = await world.submit_one(a_spec())
    assert (await told_to_stop(machine, first)).stop_reason == "preempted"
    job = await world.when(urgent, lambda job: job.reason == "reserved")
    assert "A spot job makes room for it." in job.reason_text
    # While the spot job saves its work, nobody else may have what it will leave.
    late = await world.submit_one(a_spec(priority=100))
    world.clock.advance(5)
    await machine.ends(first, jobs_pb2.CANCELLED, ran_ms=15_000, message="stopped: preempted")
    taken = await machine.given(urgent)
    await machine.runs(taken)
    waiting = await world.when(spot, lambda job: job.state == jobs_pb2.QUEUED)
    assert (waiting.reason, waiting.attempts[0].outcome) == ("preempted", jobs_pb2.OUTCOME_PREEMPTED)
    assert "Preempted for an on-demand job." in waiting.reason_text
    assert await messages(world, spot) == ["preempted for an on-demand job", "Preempted for an on-demand job."]
    assert (await world.why(spot)).reason == "preempted"
    await machine.ends(taken, ran_ms=1000)
    other = await machine.given(late)
    await machine.ends(other, ran_ms=1000)
    again = await machine.given(spot, epoch=2)
    await machine.runs(again)
    await world.reached(spot, jobs_pb2.RUNNING)
    world.clock.advance(20)
    await machine.ends(again, ran_ms=20_000)
    done = await world.settled(spot)
    assert done.state == jobs_pb2.SUCCEEDED
    assert [(a.spot, a.billed_seconds, a.cost_udgpu) for a in done.attempts] == [
        (True, 15, 15 * 1000 * PRICE_PERCENT // 100),
        (True, 20, 20 * 1000 * PRICE_PERCENT // 100),
    ]
    used = await world.sql("SELECT attempts_used FROM jobs WHERE id = %(id)s", id=JobId.parse(spot).uuid)
    assert used == [(1,)]
    assert (await world.settled(urgent)).cost_udgpu == 1000
    assert await world.sql("SELECT * FROM claims") == []
    await world.check_sound()


async def test_a_job_has_the_time_that_it_asked_for_and_its_next_attempt_begins_with_what_it_saved(
    world: World,
) -> None:
    machine = await world.machine()
    spot, first = await world.running(machine, a_spot(checkpoint=saves(signal="SIGUSR1")))
    assert not first.HasField("resume")
    urgent = await world.submit_one(a_spec())
    stopped = await told_to_stop(machine, first)
    assert (stopped.stop_grace_ms, stopped.spec.checkpoint.signal) == (45_000, "SIGUSR1")
    saved = await keep(machine, first, b"step 7")
    await machine.ends(first, jobs_pb2.CANCELLED, checkpoint=saved)
    taken = await machine.given(urgent)
    await machine.ends(taken)
    again = await machine.given(spot, epoch=2)
    assert (again.resume.epoch, again.resume.sha256, again.resume.size_bytes) == (1, saved.sha256, 6)
    reply = await machine.urls(again, resume=True)
    async with httpx.AsyncClient(verify=False) as client:
        assert (await client.get(reply.resume_url)).content == b"step 7"
    await machine.ends(again)
    job = await world.settled(spot)
    assert [attempt.resumed_epoch for attempt in job.attempts] == [0, 1]
    assert job.attempts[0].HasField("checkpointed_at")


async def test_a_checkpoint_that_was_kept_while_the_job_ran_serves_after_its_machine_was_lost(world: World) -> None:
    machine, other = await world.machine(), await world.machine()
    job_id = await world.submit_one(a_spec(checkpoint=saves(interval_seconds=60)))
    holder, attempt = await given_to([machine, other], job_id)
    await holder.runs(attempt)
    await world.reached(job_id, jobs_pb2.RUNNING)
    one = await keep(holder, attempt, b"one")
    await holder.report(holder.status(attempt, jobs_pb2.RUNNING, checkpoint=one))
    await until(lambda: _is_saved(world, one.sha256))
    two = await keep(holder, attempt, b"two", number=2)
    assert two.slot != one.slot
    world.clock.advance(3600)
    await world.reached(job_id, jobs_pb2.QUEUED)
    world.clock.advance(5)
    elsewhere = other if holder is machine else machine
    again = await elsewhere.given(job_id, epoch=2)
    # The second one was uploaded, but never told: the first one counts, and is there untouched.
    assert again.resume.sha256 == one.sha256
    reply = await elsewhere.urls(again, resume=True)
    async with httpx.AsyncClient(verify=False) as client:
        assert (await client.get(reply.resume_url)).content == b"one"


async def given_to(machines: list[Machine], job_id: str) -> tuple[Machine, machine_pb2.DesiredAttempt]:
    """Which of the machines shall run the job."""
    tasks = {asyncio.create_task(each.given(job_id)): each for each in machines}
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    first = next(iter(done))
    return tasks[first], first.result()


async def _is_saved(world: World, sha256: str) -> bool:
    return await world.sql("SELECT checkpoint_sha256 FROM attempts") == [(sha256,)]


async def test_a_machine_that_only_says_that_it_saved_makes_the_next_attempt_begin_anew(world: World) -> None:
    machine = await world.machine()
    spot, first = await world.running(machine, a_spot(checkpoint=saves()))
    urgent = await world.submit_one(a_spec())
    await told_to_stop(machine, first)
    lie = machine_pb2.Saved(sha256="0" * 64, size_bytes=5, number=1)
    await machine.ends(first, jobs_pb2.CANCELLED, checkpoint=lie)
    await machine.ends(await machine.given(urgent))
    again = await machine.given(spot, epoch=2)
    reply = await machine.urls(again, resume=True)
    assert (reply.error, reply.resume_url) == ("", "")


async def test_nobody_gives_way_to_spot_work_to_a_lower_priority_or_to_what_would_not_fit(world: World) -> None:
    machine = await world.machine()
    _, attempt = await world.running(machine, a_spot(priority=60))
    for spec in (a_spot(priority=100), a_spec(priority=59), a_spec("2", priority=100)):
        await world.when(await world.submit_one(spec), lambda job: job.reason in ("no_capacity", "no_matching_gpu"))
    await machine.renews(attempt)
    assert not any(each.stop for each in machine.desired)
    assert await world.sql("SELECT * FROM claims") == []


async def test_nobody_gives_way_to_a_team_that_could_not_pay(world: World) -> None:
    machine = await world.machine()
    _, attempt = await world.running(machine, a_spot())
    poor = a_member(TeamId.new())
    # The round that tells the second one comes after the look for room for the first one.
    for _ in range(2):
        job_id = await world.submit_one(a_spec(), actor=poor)
        await until(lambda job_id=job_id: waits_for_room(world, job_id, poor))
    assert await world.sql("SELECT * FROM claims") == []
    await machine.renews(attempt)
    assert not machine.desired[0].stop


async def waits_for_room(world: World, job_id: str, actor: Actor) -> bool:
    return (await world.get(job_id, actor=actor)).reason == "no_capacity"


async def test_all_nodes_of_a_spot_gang_give_way_and_it_starts_again_as_a_whole(world: World) -> None:
    machines = [await world.machine(), await world.machine()]
    gang = await world.submit_one(a_spot(nodes=2))
    nodes = [(machine, await machine.given(gang)) for machine in machines]
    for machine, attempt in nodes:
        await machine.runs(attempt)
    await world.reached(gang, jobs_pb2.RUNNING)
    urgent = await world.submit_one(a_spec())
    for machine, attempt in nodes:
        await told_to_stop(machine, attempt)
        await machine.ends(attempt, jobs_pb2.CANCELLED)
    machine, taken = await given_to(machines, urgent)
    waiting = await world.when(gang, lambda job: job.state == jobs_pb2.QUEUED)
    assert {attempt.outcome for attempt in waiting.attempts} == {jobs_pb2.OUTCOME_PREEMPTED}
    await machine.ends(taken)
    for each in machines:
        await each.given(gang, epoch=2)


async def test_a_new_leader_keeps_what_is_kept_for_a_job(world: World) -> None:
    machine = await world.machine()
    _, first = await world.running(machine, a_spot())
    urgent = await world.submit_one(a_spec())
    await told_to_stop(machine, first)
    before = world.schedulers[0]
    await world.start_scheduler()
    await world.stop_leading(before)
    other = await world.submit_one(a_spec(priority=100))
    await machine.ends(first, jobs_pb2.CANCELLED)
    taken = await machine.given(urgent)
    await machine.ends(taken)
    await world.settled(urgent)
    # Whichever replica heard of the ends: the leader looks again every few seconds.
    world.clock.advance(READ_AGAIN_SECONDS)
    await machine.given(other)


async def test_what_is_kept_for_a_job_is_free_again_when_the_job_is_stopped(world: World) -> None:
    machine = await world.machine()
    spot, first = await world.running(machine, a_spot())
    urgent = await world.submit_one(a_spec())
    await told_to_stop(machine, first)
    await world.stop_job(urgent)
    await machine.ends(first, jobs_pb2.CANCELLED)
    await machine.given(spot, epoch=2)
    assert await world.sql("SELECT * FROM claims") == []


async def test_a_user_who_stops_a_job_that_gives_way_has_stopped_it_for_good(world: World) -> None:
    machine = await world.machine()
    spot, first = await world.running(machine, a_spot())
    await world.submit_one(a_spec())
    await told_to_stop(machine, first)
    await world.stop_job(spot)
    await machine.ends(first, jobs_pb2.CANCELLED)
    assert (await world.settled(spot)).state == jobs_pb2.CANCELLED


async def test_a_team_takes_back_what_it_lent(quiet_world: World) -> None:
    world = quiet_world
    await world.start(gpu_quotas={str(world.team): 1})
    lender, borrower = world.me, a_member(TeamId.new())
    await world.credit()
    await world.credit(team=borrower.team_id)
    machine = await world.machine()
    borrowed = await world.submit_one(a_spot(priority=100), actor=borrower)
    attempt = await machine.given(borrowed)
    await machine.runs(attempt)
    mine = await world.submit_one(a_spec(priority=1), actor=lender)
    await told_to_stop(machine, attempt)
    await machine.ends(attempt, jobs_pb2.CANCELLED)
    await machine.given(mine)
    text = (await world.sql("SELECT message FROM job_events WHERE type = 'stop_requested'"))[0][0]
    assert text == "preempted for a team that takes back what it lent of its quota"
