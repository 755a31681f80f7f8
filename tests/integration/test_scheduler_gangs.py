"""Gangs through the real scheduler: placed whole, held for whole, ended whole; large jobs that small ones wait for."""

import asyncio
from typing import Any

import psycopg
import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.domain.ids import AttemptId, JobId, TeamId
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.rpc import call
from tests.fixtures.scheduler import ENDED, WINDOW_UDGPU, Machine, World, a_spec, until

IN_A_SITE: dict[str, Any] = {"executors": ["process", "container"], "networks": ["image", "gang"], "site": "hall-1"}

type Nodes = list[tuple[Machine, machine_pb2.DesiredAttempt]]


async def placed(world: World, machines: list[Machine], job_id: str, epoch: int = 1) -> Nodes:
    """The nodes of a gang, by rank, once each machine was told of its own."""
    given = await asyncio.gather(*(machine.given(job_id, epoch) for machine in machines))
    return sorted(zip(machines, given, strict=True), key=lambda node: node[1].node_rank)


async def a_running_gang(world: World, nodes: int = 2, **fields: Any) -> tuple[str, Nodes]:
    machines = [await world.machine() for _ in range(nodes)]
    job_id = await world.submit_one(a_spec(nodes=nodes, **fields))
    found = await placed(world, machines, job_id)
    for machine, attempt in found:
        await machine.runs(attempt)
    await world.reached(job_id, jobs_pb2.RUNNING)
    return job_id, found


async def test_a_gang_is_one_epoch_on_all_its_machines_and_each_is_told_where_they_meet(world: World) -> None:
    job_id, nodes = await a_running_gang(world)
    attempts = [attempt for _, attempt in nodes]
    assert [(attempt.node_rank, attempt.epoch) for attempt in attempts] == [(0, 1), (1, 1)]
    assert [len(attempt.node_addresses) for attempt in attempts] == [2, 2]
    assert attempts[0].rendezvous_port == attempts[1].rendezvous_port >= 20_000
    job = await world.get(job_id)
    assert [(a.node_rank, a.epoch, a.state) for a in job.attempts] == [
        (0, 1, jobs_pb2.RUNNING),
        (1, 1, jobs_pb2.RUNNING),
    ]
    # It may wait for a moment until placement has heard of the last machine.
    events = [event for event in await world.events(job_id) if event != "waiting"]
    assert events == ["submitted", "placed", "starting", "running"]


async def test_a_gang_runs_when_its_last_node_runs_and_ends_when_its_last_node_ends(world: World) -> None:
    machines = [await world.machine(), await world.machine()]
    job_id = await world.submit_one(a_spec(nodes=2))
    (first, one), (second, two) = await placed(world, machines, job_id)
    await second.runs(two)
    await world.reached(job_id, jobs_pb2.STARTING)
    world.clock.advance(5)
    await first.runs(one)
    await world.reached(job_id, jobs_pb2.RUNNING)
    world.clock.advance(10)
    await second.ends(two, ran_ms=15_000)
    await world.when(job_id, lambda job: job.attempts[1].state == jobs_pb2.SUCCEEDED)
    # Its device is free for others while node 0 goes on.
    other = await world.submit_one(a_spec())
    await second.given(other)
    world.clock.advance(10)
    await first.ends(one, ran_ms=20_000)
    job = await world.settled(job_id)
    assert (job.state, job.outcome, job.exit_code) == (jobs_pb2.SUCCEEDED, jobs_pb2.OUTCOME_SUCCEEDED, 0)
    assert [attempt.billed_seconds for attempt in job.attempts] == [20, 15]
    assert job.cost_udgpu == 35_000
    await world.check_sound()


async def test_a_failed_node_stops_the_others_and_the_job_fails_with_its_exit_code(world: World) -> None:
    job_id, ((first, one), (second, two)) = await a_running_gang(world)
    await second.ends(two, jobs_pb2.FAILED, exit_code=3, message="exit code 3")
    desired = await first.told(lambda desired: any(attempt.stop for attempt in desired))
    assert desired[0].stop_reason == "node_failed"
    assert (await world.get(job_id)).state == jobs_pb2.STOPPING
    await first.ends(one, jobs_pb2.CANCELLED, exit_code=143)
    job = await world.settled(job_id)
    assert (job.state, job.exit_code, job.message) == (jobs_pb2.FAILED, 3, "node 1: exit code 3")
    await world.check_sound()


async def test_a_lost_node_restarts_the_whole_gang_in_the_next_epoch(world: World) -> None:
    job_id, ((first, one), _) = await a_running_gang(world)
    spare = await world.machine()
    world.clock.advance(25)
    await first.renews(one)
    world.clock.advance(20)
    await first.renews(one)
    await first.told(lambda desired: any(attempt.stop for attempt in desired))
    await first.ends(one, jobs_pb2.CANCELLED, exit_code=143)
    await world.when(job_id, lambda job: job.state == jobs_pb2.QUEUED)
    world.clock.advance(5)
    nodes = await placed(world, [first, spare], job_id, epoch=2)
    for machine, attempt in nodes:
        await machine.runs(attempt)
    await world.reached(job_id, jobs_pb2.RUNNING)
    live = await world.sql("SELECT node_rank, epoch FROM attempts WHERE ended_at IS NULL ORDER BY 1")
    assert live == [(0, 2), (1, 2)]
    assert [attempt.outcome for attempt in (await world.get(job_id)).attempts][:2] == [
        jobs_pb2.OUTCOME_CANCELLED,
        jobs_pb2.OUTCOME_LOST,
    ]


async def test_a_stop_ends_all_nodes(world: World) -> None:
    job_id, nodes = await a_running_gang(world)
    await world.stop_job(job_id)
    for machine, attempt in nodes:
        await machine.told(lambda desired: any(each.stop for each in desired))
        await machine.ends(attempt, jobs_pb2.CANCELLED, exit_code=143)
    job = await world.settled(job_id)
    assert job.state == jobs_pb2.CANCELLED
    await world.check_sound()


async def test_all_holds_of_a_gang_are_opened_or_none(quiet_world: World) -> None:
    await quiet_world.start()
    machines = [await quiet_world.machine(), await quiet_world.machine()]
    await quiet_world.credit(WINDOW_UDGPU + 1)
    job_id = await quiet_world.submit_one(a_spec(nodes=2))
    await quiet_world.when(job_id, lambda job: job.reason == "no_funds")

    async def nothing_held() -> bool:
        return (await quiet_world.wallet()).held_udgpu == 0

    await until(nothing_held)
    assert await quiet_world.sql("SELECT count(*) FROM attempts") == [(0,)]
    await quiet_world.credit(WINDOW_UDGPU)
    await placed(quiet_world, machines, job_id)
    assert (await quiet_world.wallet()).held_udgpu == 2 * WINDOW_UDGPU


async def test_reports_of_one_node_do_not_count_for_another_and_repeat_without_effect(world: World) -> None:
    job_id, ((first, one), (second, two)) = await a_running_gang(world)
    lie = first.status(two, jobs_pb2.FAILED, seq=9, outcome=jobs_pb2.OUTCOME_FAILED, exit_code=1)
    await first.report(lie)
    await first.sync(lie, first.status(one, jobs_pb2.RUNNING, seq=2))
    await second.sync(second.status(two, jobs_pb2.RUNNING, seq=2))
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING
    assert await world.sql("SELECT report_seq FROM attempts ORDER BY node_rank") == [(2,), (2,)]
    # A sync alone can tell the end of a node, too.
    end = second.status(two, jobs_pb2.SUCCEEDED, outcome=jobs_pb2.OUTCOME_SUCCEEDED, exit_code=0, ran_ms=1000)
    await second.sync(end)
    await second.sync(end)
    assert [a.state for a in (await world.get(job_id)).attempts] == [jobs_pb2.RUNNING, jobs_pb2.SUCCEEDED]


INSERT = """
    INSERT INTO attempts (id, job_id, team_id, epoch, machine_id, provider_team_id, simulated, sandbox, cpu_milli,
        memory_bytes, disk_bytes, rate_udgpu_per_hour, max_duration_seconds, node_rank, nodes, state, created_at,
        lease_renewed_at, lease_expires_at)
    SELECT gen_random_uuid(), job_id, team_id, epoch + %(later)s, gen_random_uuid(), provider_team_id, simulated,
        sandbox, cpu_milli, memory_bytes, disk_bytes, rate_udgpu_per_hour, max_duration_seconds, %(rank)s, %(nodes)s,
        state, created_at, lease_renewed_at, lease_expires_at
    FROM attempts WHERE job_id = %(job)s AND node_rank = 0
"""


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ({"later": 0, "rank": 0, "nodes": 2}, psycopg.errors.UniqueViolation),
        ({"later": 1, "rank": 1, "nodes": 2}, psycopg.errors.UniqueViolation),
        ({"later": 0, "rank": 2, "nodes": 3}, psycopg.errors.CheckViolation),
        ({"later": 1, "rank": 2, "nodes": 3}, psycopg.errors.CheckViolation),
        ({"later": 0, "rank": 2, "nodes": 2}, psycopg.errors.CheckViolation),
    ],
    ids=["a node twice", "a node in two epochs", "a part of a gang", "a part in another epoch", "a rank too high"],
)
async def test_the_schema_refuses_a_gang_that_is_not_whole(
    world: World, what: dict[str, int], error: type[Exception]
) -> None:
    job_id, _ = await a_running_gang(world)
    with pytest.raises(error):
        await world.sql(INSERT, job=JobId.parse(job_id).uuid, **what)


async def test_a_job_for_more_nodes_than_are_allowed_is_refused(world: World) -> None:
    with pytest.raises(ServiceError, match="nodes 65: expected 1 to 64"):
        await world.submit_one(a_spec(nodes=65))


async def test_each_node_has_results_of_its_own(world: World) -> None:
    job_id, nodes = await a_running_gang(world)
    for rank, (machine, attempt) in enumerate(nodes):
        result = jobs_pb2.ResultFile(path="out.txt", size_bytes=rank + 1, sha256="0" * 64)
        reply = await machine.urls(attempt, results=[result])
        assert f"results/{job_id}/{'1' if rank == 0 else '1-1'}/out.txt" in reply.result_urls[0]
        await machine.ends(attempt, results=[result])
    await world.reached(job_id, *ENDED)
    request = jobs_pb2.GetJobsRequest(job_ids=[job_id], node_rank=1)
    second = (await call(world.jobs.GetJobs, request, actor=world.me)).jobs[0]
    first = await world.get(job_id)
    assert (first.results_epoch, [f.size_bytes for f in first.results]) == (1, [1])
    assert [f.size_bytes for f in second.results] == [2]
    resolve = jobs_pb2.ResolveAttemptsRequest(attempt_ids=[attempt.attempt_id for _, attempt in nodes])
    found = (await call(world.jobs.ResolveAttempts, resolve, actor=SERVICE)).attempts
    assert {AttemptId.parse(it.attempt_id): it.node_rank for it in found} == {
        AttemptId.parse(attempt.attempt_id): rank for rank, (_, attempt) in enumerate(nodes)
    }


async def test_small_jobs_wait_for_a_large_one_unless_they_end_before_it_starts(world: World) -> None:
    machine = await world.machine(2)
    job_id, attempt = await world.running(machine, a_spec(max_duration_seconds=600))
    large = await world.submit_one(a_spec("2"))
    job = await world.when(large, lambda job: job.reason == "reserved")
    assert "at the latest" in job.reason_text
    world.clock.advance(1)
    slow = await world.submit_one(a_spec(max_duration_seconds=3600))
    job = await world.when(slow, lambda job: job.reason == "behind_reservation")
    assert "max_duration" in job.reason_text
    quick = await world.submit_one(a_spec(max_duration_seconds=300))
    filler = await machine.given(quick)
    await machine.runs(filler)
    await machine.ends(filler)
    await machine.ends(attempt)
    await world.reached(job_id, *ENDED)
    await machine.given(large)
    assert (await world.get(slow)).state == jobs_pb2.QUEUED


async def test_containers_of_a_gang_meet_in_a_network_of_their_own_within_one_site(world: World) -> None:
    owner = TeamId.new()
    machines = [await world.machine(team=owner, address=f"10.0.0.{n}", **IN_A_SITE) for n in (1, 2)]
    # Cheaper or not: another owner's site of the same name is another site.
    await world.machine(address="10.0.0.3", **IN_A_SITE)
    elsewhere: dict[str, Any] = IN_A_SITE | {"site": "hall-2"}
    await world.machine(team=owner, address="10.0.0.4", **elsewhere)
    job_id = await world.submit_one(a_spec(nodes=2, image="acme/train", network=True))
    attempts = [attempt for _, attempt in await placed(world, machines, job_id)]
    number = attempts[0].gang_number
    assert number == attempts[1].gang_number
    assert 0 < number < 1 << 24
    assert number % 64 == 0
    assert sorted(attempts[0].node_addresses) == ["10.0.0.1", "10.0.0.2"]
    alone = await world.submit_one(a_spec(nodes=3, image="acme/train", network=True))
    job = await world.when(alone, lambda job: job.reason == "too_few_machines")
    assert "2 fit in one site, 3 are needed at once." in job.reason_text
    why = await world.why(alone)
    assert ("nodes", "3") in {(change.field, getattr(change, "from")) for change in why.relaxations}
