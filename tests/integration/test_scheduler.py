"""scheduler-orchestrator-service as its users see it: submit, look, list, stop, why. Real PostgreSQL, NATS, billing."""

import asyncio
import hashlib

import httpx
import pytest

from dantegpu.contracts.gen.dante.v1 import common_pb2, jobs_pb2, registry_pb2, storage_pb2
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_machine, a_member, an_operator
from tests.fixtures.scheduler import World, a_spec, until


async def refused(world_call: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await world_call  # type: ignore[misc]
    return caught.value


async def test_a_job_is_placed_runs_succeeds_and_is_settled_once(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    assert attempt.lease_ms == 30_000
    assert [device.milli for device in attempt.devices] == [1000]
    world.clock.advance(10)
    await machine.ends(attempt, ran_ms=10_000, results=[jobs_pb2.ResultFile(path="out/m.bin", size_bytes=3)])
    job = await world.settled(job_id)
    assert (job.state, job.outcome, job.exit_code) == (jobs_pb2.SUCCEEDED, jobs_pb2.OUTCOME_SUCCEEDED, 0)
    assert job.cost_udgpu == 10_000
    assert (job.results_epoch, [result.path for result in job.results]) == (1, ["out/m.bin"])
    assert [(a.epoch, a.billed_seconds, a.cost_udgpu) for a in job.attempts] == [(1, 10, 10_000)]
    assert await world.events(job_id) == ["submitted", "placed", "starting", "running", "ended", "settled"]
    assert await machine.told(lambda desired: not desired) == []
    wallet = await world.wallet()
    assert (wallet.held_udgpu, wallet.balance_udgpu) == (0, 100_000_000 - 10_000)
    await world.check_sound()


async def test_the_same_key_and_body_twice_is_one_job(world: World) -> None:
    first = await world.submit(idempotency_key="once")
    assert await world.submit(idempotency_key="once") == first
    again = await asyncio.gather(*(world.submit(idempotency_key="many") for _ in range(5)))
    assert len({job_id for ids in again for job_id in ids}) == 1
    assert await world.sql("SELECT count(*) FROM jobs") == [(2,)]


async def test_the_same_key_with_another_body_is_a_conflict(world: World) -> None:
    await world.submit(idempotency_key="once")
    error = await refused(world.submit(a_spec(argv=["false"]), idempotency_key="once"))
    assert error.remote_type == "idempotency-key-reused"
    assert await world.sql("SELECT count(*) FROM jobs") == [(1,)]


async def test_keys_of_two_teams_are_apart(world: World) -> None:
    mine = await world.submit(idempotency_key="k")
    assert await world.submit(idempotency_key="k", actor=a_member(TeamId.new())) != mine


async def test_a_repeated_no_wait_submission_gets_its_answer_although_its_job_took_the_last_machine(
    world: World,
) -> None:
    machine = await world.machine()
    first = await until(lambda: accepted_now(world))
    await machine.given(first[0])
    assert await world.submit(idempotency_key="now", no_wait=True) == first
    error = await refused(world.submit(no_wait=True))
    assert error.remote_type == "no-offer-fits"
    assert error.params["reason"] == "no_capacity"


async def accepted_now(world: World) -> list[str] | None:
    """None while placement has not heard of the machine."""
    try:
        return await world.submit(idempotency_key="now", no_wait=True)
    except RemoteError as error:
        if error.remote_type != "no-offer-fits":
            raise
        return None


async def test_no_wait_refuses_what_no_machine_can_take(world: World) -> None:
    machine = await world.machine()
    await machine.given(await world.submit_one())
    error = await refused(world.submit(a_spec("H100:8"), no_wait=True))
    assert (error.remote_type, error.params["reason"]) == ("no-offer-fits", "no_matching_gpu")
    assert await world.sql("SELECT count(*) FROM jobs") == [(1,)]


async def test_another_teams_job_is_not_found_by_any_call(world: World) -> None:
    job_id = await world.submit_one()
    stranger = a_member(TeamId.new())
    events = jobs_pb2.ListJobEventsRequest(job_id=job_id)
    for attempt in (
        world.get(job_id, stranger),
        world.stop_job(job_id, stranger),
        world.why(job_id, stranger),
        call(world.jobs.ListJobEvents, events, actor=stranger),
    ):
        assert (await refused(attempt)).remote_type == "job-not-found"
    absent = await refused(world.get(str(JobId.new()), stranger))
    assert absent.remote_type == "job-not-found"
    assert (await world.get(job_id)).state == jobs_pb2.QUEUED


async def test_a_viewer_may_look_but_neither_submit_nor_stop(world: World) -> None:
    job_id = await world.submit_one()
    viewer = a_member(world.team, "viewer")
    assert (await world.get(job_id, viewer)).id == job_id
    assert (await refused(world.stop_job(job_id, viewer))).remote_type == "forbidden"
    assert (await refused(world.submit(actor=viewer))).remote_type == "forbidden"


async def test_a_machines_credential_sees_no_jobs_not_even_its_owners(world: World) -> None:
    job_id = await world.submit_one()
    machine = a_machine(world.team)
    assert (await refused(world.get(job_id, machine))).remote_type == "forbidden"
    assert (await refused(world.why(job_id, machine))).remote_type == "forbidden"
    assert (await refused(world.submit(actor=machine))).remote_type == "forbidden"


async def test_an_operator_stops_any_teams_job_and_it_shows(world: World) -> None:
    job_id = await world.submit_one()
    assert (await world.stop_job(job_id, an_operator())).state == jobs_pb2.CANCELLED
    assert await world.sql("SELECT stop_reason FROM jobs") == [("operator",)]


@pytest.mark.parametrize(
    ("spec", "type_"),
    [
        (jobs_pb2.JobSpec(), "invalid-job"),
        (a_spec(commands=["true"]), "invalid-job"),
        (a_spec("RTX9999"), "invalid-job"),
        (a_spec(priority=101), "invalid-job"),
        (a_spec(priority=-1), "invalid-job"),
        (a_spec(name="x" * 101), "invalid-job"),
        (a_spec(max_duration_seconds=-1), "invalid-job"),
        (a_spec(max_duration_seconds=2**40), "invalid-job"),
        (a_spec(argv=["a\0b"]), "invalid-job"),
        (a_spec(env={"A": "x" * (300 << 10)}), "invalid-job"),
        (a_spec(input_sha256="../../other"), "invalid-job"),
        (a_spec(retry=jobs_pb2.RetryPolicy(on_events=["always"])), "invalid-job"),
        (a_spec(resources=jobs_pb2.ResourceRequest(cpu_milli=-1)), "invalid-job"),
        (a_spec(input_sha256="ab" * 32), "input-not-uploaded"),
    ],
)
async def test_a_job_that_cannot_be_run_is_refused_and_none_of_its_list_is_kept(
    world: World, spec: jobs_pb2.JobSpec, type_: str
) -> None:
    assert (await refused(world.submit(a_spec(), spec))).remote_type == type_
    assert await world.sql("SELECT count(*) FROM jobs") == [(0,)]


async def test_a_machine_measures_its_network_by_one_small_object_of_its_own(world: World) -> None:
    machine = await world.machine()
    for content in (b"first", b"second"):
        file = jobs_pb2.ResultFile(path="x", size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        reply = await machine.measures(file)
        async with httpx.AsyncClient(verify=False) as client:
            (await client.put(reply.result_urls[0], content=content)).raise_for_status()
            assert (await client.get(reply.input_url)).content == content
    request = storage_pb2.StatObjectsRequest(keys=[f"benchmarks/{machine.id}/network"])
    assert list((await call(world.storage.StatObjects, request, actor=SERVICE)).sizes_bytes) == [6]
    assert (await machine.measures(jobs_pb2.ResultFile(size_bytes=1 << 30))).error.startswith("refused")


async def test_an_uploaded_input_is_handed_to_the_machine_that_holds_the_attempt_and_to_no_other(world: World) -> None:
    digest = await world.upload(b"tar of the working folder")
    machine = await world.machine()
    job_id = await world.submit_one(a_spec(input_sha256=digest))
    attempt = await machine.given(job_id)
    result = jobs_pb2.ResultFile(path="a/b.txt", size_bytes=2, sha256=hashlib.sha256(b"ok").hexdigest())
    reply = await machine.urls(attempt, input=True, results=[result])
    async with httpx.AsyncClient(verify=False) as client:
        assert (await client.get(reply.input_url)).content == b"tar of the working folder"
        (await client.put(reply.result_urls[0], content=b"ok")).raise_for_status()
    request = storage_pb2.StatObjectsRequest(keys=[f"results/{job_id}/1/a/b.txt"])
    assert list((await call(world.storage.StatObjects, request, actor=SERVICE)).sizes_bytes) == [2]
    other = await world.machine()
    assert (await other.urls(attempt, input=True)).error == "stale"
    assert (await machine.urls(attempt, input=True, epoch=2)).error == "stale"
    assert (await machine.urls(attempt, attempt_id="att_nonsense")).error.startswith("refused")
    for path in ("../x", "/etc/passwd", "a/../../b", "a//b", "a\nb", "", "x" * 2000):
        assert (await machine.urls(attempt, results=[jobs_pb2.ResultFile(path=path)])).error.startswith("refused")
    world.clock.advance(30)
    assert (await machine.urls(attempt, input=True)).error == "stale"


async def test_jobs_are_listed_newest_first_page_by_page(world: World) -> None:
    ids = [await world.submit_one() for _ in range(5)]
    await world.submit(actor=a_member(TeamId.new()))
    await world.stop_job(ids[2])

    async def pages(**fields: object) -> list[list[str]]:
        found: list[list[str]] = []
        cursor = ""
        while True:
            page = common_pb2.PageRequest(limit=2, cursor=cursor)
            request = jobs_pb2.ListJobsRequest(page=page, **fields)  # type: ignore[arg-type]
            answer = await call(world.jobs.ListJobs, request, actor=world.me)
            found.append([job.id for job in answer.jobs])
            cursor = answer.next_cursor
            if not cursor:
                return found

    assert await pages() == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
    assert await pages(states=[jobs_pb2.CANCELLED]) == [[ids[2]]]


@pytest.mark.parametrize(
    "request_",
    [
        jobs_pb2.ListJobsRequest(page=common_pb2.PageRequest(limit=-1)),
        jobs_pb2.ListJobsRequest(page=common_pb2.PageRequest(cursor="nonsense")),
        jobs_pb2.ListJobsRequest(states=[jobs_pb2.JOB_STATE_UNSPECIFIED]),
    ],
)
async def test_a_list_that_makes_no_sense_is_an_invalid_argument(
    world: World, request_: jobs_pb2.ListJobsRequest
) -> None:
    assert (await refused(call(world.jobs.ListJobs, request_, actor=world.me))).remote_type == "invalid-argument"


async def test_only_an_operator_lists_all_teams(world: World) -> None:
    await world.submit()
    request = jobs_pb2.ListJobsRequest(all_teams=True)
    assert (await refused(call(world.jobs.ListJobs, request, actor=world.me))).remote_type == "forbidden"
    assert len((await call(world.jobs.ListJobs, request, actor=an_operator())).jobs) == 1


async def test_a_waiting_job_says_why_and_what_would_open_a_machine(world: World) -> None:
    machine = await world.machine()
    job_id = await world.submit_one(a_spec("H100"))
    job = await world.when(job_id, lambda job: job.reason == "no_matching_gpu")
    assert "1 machine: 1 no such GPU model" in job.reason_text
    why = await world.why(job_id)
    assert (why.reason, why.machines_total, why.machines_fitting) == ("no_matching_gpu", 1, 0)
    assert [(it.constraint, it.machines_excluded) for it in why.constraints] == [("gpu_model", 1)]
    assert await world.events(job_id) == ["submitted", "waiting"]
    dear = await world.submit_one(a_spec(max_price_udgpu_per_gpu_hour=1))
    await world.when(dear, lambda job: job.reason == "price_above_max")
    relaxation = (await world.why(dear)).relaxations[0]
    assert (relaxation.field, relaxation.machines, relaxation.available_now) == ("max_price", 1, True)
    await machine.beats(leaving=True)
    await world.when(job_id, lambda job: job.reason == "no_provider_online")


async def test_a_job_that_no_longer_waits_has_no_reason(world: World) -> None:
    machine = await world.machine()
    job_id, _ = await world.running(machine)
    why = await world.why(job_id)
    assert why == jobs_pb2.Explanation(job_id=job_id)


async def test_a_job_waits_for_a_busy_machine_and_takes_it_when_it_comes_free(world: World) -> None:
    machine = await world.machine()
    _, attempt = await world.running(machine)
    waiting = await world.submit_one()
    await world.when(waiting, lambda job: job.reason == "no_capacity")
    await machine.ends(attempt)
    await machine.given(waiting)
    await world.check_sound()


async def test_a_job_for_two_gpus_skips_a_machine_with_one_free(world: World) -> None:
    await world.machine(1)
    large = await world.machine(2)
    attempt = await large.given(await world.submit_one(a_spec("2")))
    assert sorted(device.index for device in attempt.devices) == [0, 1]


async def test_a_machine_that_is_paused_gets_nothing_until_it_is_active_again(world: World) -> None:
    machine = await world.machine()
    await world.intend(machine, registry_pb2.INTENT_PAUSED)
    job_id = await world.submit_one()
    await world.when(job_id, lambda job: job.reason not in ("", "new"))
    await world.intend(machine, registry_pb2.INTENT_ACTIVE)
    await machine.given(job_id)


async def test_a_job_is_cancelled_while_it_waits_and_costs_nothing(world: World) -> None:
    job_id = await world.submit_one()
    job = await world.stop_job(job_id)
    assert (job.state, job.outcome) == (jobs_pb2.CANCELLED, jobs_pb2.OUTCOME_CANCELLED)
    assert (await world.settled(job_id)).cost_udgpu == 0
    assert (await world.stop_job(job_id)).state == jobs_pb2.CANCELLED
    machine = await world.machine()
    later = await world.submit_one()
    assert (await machine.given(later)).job_id == later
