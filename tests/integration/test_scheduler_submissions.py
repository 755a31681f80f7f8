"""Submissions of several callers in one call: each is answered as if it had come alone."""

import asyncio
from typing import Any

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.domain.ids import TeamId
from dantegpu.kit.actor import SERVICE, Actor, set_current_actor
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from dantegpu.services.gateway.submissions import SHARED_JOBS_MAX, Submissions
from dantegpu.services.scheduler.service.submissions import submit_scope
from tests.fixtures.actors import a_member
from tests.fixtures.scheduler import World, a_spec


def submission(actor: Actor, *specs: jobs_pb2.JobSpec, key: str = "") -> jobs_pb2.Submission:
    request = jobs_pb2.SubmitJobsRequest(specs=specs or [a_spec()], idempotency_key=key)
    return jobs_pb2.Submission(actor=actor.to_proto(), request=request)


async def submit_many(world: World, *submissions: jobs_pb2.Submission) -> list[jobs_pb2.SubmissionResult]:
    request = jobs_pb2.SubmitManyRequest(submissions=submissions)
    return list((await call(world.jobs.SubmitMany, request, actor=SERVICE)).results)


def ids_of(result: jobs_pb2.SubmissionResult) -> list[str]:
    assert not result.HasField("error"), result.error
    return [job.id for job in result.response.jobs]


async def test_submissions_of_many_callers_are_each_answered_with_their_own_jobs(world: World) -> None:
    stranger = a_member(TeamId.new())
    mine, theirs, more = await submit_many(
        world,
        submission(world.me, a_spec(argv=["a"]), a_spec(argv=["b"])),
        submission(stranger, a_spec(argv=["c"])),
        submission(world.me, a_spec(argv=["d"])),
    )
    assert [list(job.spec.argv) for job in mine.response.jobs] == [["a"], ["b"]]
    assert [list((await world.get(job_id)).spec.argv) for job_id in ids_of(more)] == [["d"]]
    job = await world.get(ids_of(theirs)[0], actor=stranger)
    assert (job.team_id, list(job.spec.argv)) == (str(stranger.team_id), ["c"])
    assert (await world.events(ids_of(mine)[0]))[0] == "submitted"


async def test_a_refused_submission_refuses_no_other(world: World) -> None:
    viewer = Actor(world.me.kind, world.me.user_id, world.me.team_id, "viewer")
    good, empty, forbidden = await submit_many(
        world, submission(world.me), submission(world.me, a_spec(argv=[])), submission(viewer)
    )
    assert len(ids_of(good)) == 1
    assert (empty.error.type, empty.error_status) == ("invalid-job", "invalid")
    assert (forbidden.error.type, forbidden.error_status) == ("forbidden", "forbidden")
    assert await world.sql("SELECT count(*) FROM jobs") == [(1,)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"priority": 101}, "job 3: priority 101"),
        ({"argv": ["echo", "a\x00b"]}, "job 3: a command or variable holds a NUL"),
        ({"env": {"NAME": "\x00"}}, "job 3: a command or variable holds a NUL"),
        ({"commands": ["echo"]}, "job 3: give either a command or `commands`"),
        ({"name": "n" * 101}, "job 3: name: at most"),
    ],
    ids=["priority", "command", "env", "commands", "name"],
)
async def test_one_wrong_job_among_many_alike_is_named(world: World, wrong: dict[str, Any], says: str) -> None:
    small = jobs_pb2.ResourceRequest(cpu_milli=100)
    alike = [jobs_pb2.JobSpec(argv=["echo", str(each)], name=str(each), resources=small) for each in range(4)]
    fields: dict[str, Any] = {"argv": ["true"], "resources": small} | wrong
    alike[2] = jobs_pb2.JobSpec(**fields)
    with pytest.raises(RemoteError, match=says):
        await world.submit(*alike)
    assert await world.sql("SELECT count(*) FROM jobs") == [(0,)]


async def test_a_priority_above_the_operators_limit_is_refused_with_the_limit(quiet_world: World) -> None:
    world = quiet_world
    trusted = a_member(TeamId.new())
    await world.start(priority_max=50, team_priorities_max={str(trusted.team_id): 80})
    await world.submit(a_spec(priority=50))
    await world.submit(a_spec(priority=80), actor=trusted)
    for actor, most in ((world.me, 50), (trusted, 80)):
        with pytest.raises(RemoteError, match=f"job 2: priority {most + 1}: .* up to {most};"):
            await world.submit(a_spec(), a_spec(priority=most + 1), actor=actor)
    operator = Actor(world.me.kind, world.me.user_id, world.me.team_id, world.me.role, operator=True)
    await world.submit(a_spec(priority=100), actor=operator)


async def test_a_key_is_done_once_also_within_one_call_and_across_both_calls(world: World) -> None:
    first, same, other, unlike = await submit_many(
        world,
        submission(world.me, key="k"),
        submission(world.me, key="k"),
        submission(a_member(TeamId.new()), key="k"),
        submission(world.me, a_spec(argv=["false"]), key="k"),
    )
    assert ids_of(first) == ids_of(same) == await world.submit(idempotency_key="k")
    assert ids_of(other) != ids_of(first)
    assert unlike.error.type == "idempotency-key-reused"
    [again] = await submit_many(world, submission(world.me, key="k"))
    assert ids_of(again) == ids_of(first)
    assert list(again.response.jobs[0].spec.argv) == list(a_spec().argv)
    [long] = await submit_many(world, submission(world.me, key="k" * 256))
    assert long.error.type == "invalid-argument"
    assert await world.sql("SELECT count(*) FROM jobs") == [(2,)]


async def test_a_remembered_answer_holds_no_environment(world: World) -> None:
    await submit_many(world, submission(world.me, a_spec(env={"TOKEN": "open-sesame"}), key="k"))
    [(response,)] = await world.sql("SELECT response FROM idempotency")
    assert b"open-sesame" not in response
    assert submit_scope(world.me) == f"{world.team}:SubmitJobs"


async def test_the_gateway_sends_what_arrives_meanwhile_in_one_call(world: World) -> None:
    calls: list[int] = []

    class Counted:
        SubmitJobs = world.jobs.SubmitJobs

        @staticmethod
        def SubmitMany(request: jobs_pb2.SubmitManyRequest, **options: object) -> object:  # noqa: N802 - as gRPC does
            calls.append(len(request.submissions))
            return world.jobs.SubmitMany(request, **options)  # type: ignore[arg-type]

    submissions = Submissions(Counted())  # type: ignore[arg-type]
    await submissions.start()
    set_current_actor(world.me)
    one = jobs_pb2.SubmitJobsRequest(specs=[a_spec()])
    answers = await asyncio.gather(*(submissions.submit(one) for _ in range(20)))
    assert len({job.id for answer in answers for job in answer.jobs}) == 20
    assert sum(calls) == 20
    assert len(calls) <= 2
    with pytest.raises(RemoteError, match="command"):
        await submissions.submit(jobs_pb2.SubmitJobsRequest(specs=[a_spec(argv=[])]))
    many = jobs_pb2.SubmitJobsRequest(specs=[a_spec()] * (SHARED_JOBS_MAX + 1))
    assert len((await submissions.submit(many)).jobs) == SHARED_JOBS_MAX + 1
    assert sum(calls) == 21
    await submissions.stop()
