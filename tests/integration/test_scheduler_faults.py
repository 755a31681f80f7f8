"""The scheduler while the servers below it fail: nothing accepted is lost, nothing runs twice (failure-model)."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence

import pytest

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import wrap
from dantegpu.contracts.gen.dante.v1 import events_pb2, jobs_pb2, machine_pb2
from dantegpu.domain.ids import EventId, TeamId
from dantegpu.kit.db import Database
from dantegpu.kit.errors import ErrorStatus, ServiceError, Unavailable, status_of
from dantegpu.kit.rpc import call
from dantegpu.services.scheduler.service.fleet import READ_AGAIN_SECONDS
from tests.fixtures.actors import a_member
from tests.fixtures.scheduler import Machine, World, a_spec, until
from tests.fixtures.servers import NatsForTests, PostgresForTests


async def finish(machine: Machine, done: set[str]) -> None:
    """Run whatever the machine is given, for ever."""
    while True:
        attempts = await machine.told(lambda desired: any(a.attempt_id not in done for a in desired))
        for attempt in attempts:
            if attempt.attempt_id not in done:
                done.add(attempt.attempt_id)
                statuses = [
                    machine.status(attempt, jobs_pb2.STARTING),
                    machine.status(attempt, jobs_pb2.RUNNING),
                    machine.status(
                        attempt, jobs_pb2.SUCCEEDED, outcome=jobs_pb2.OUTCOME_SUCCEEDED, exit_code=0, ran_ms=1000
                    ),
                ]
                try:
                    await machine.report(*statuses)
                except Unavailable:
                    await until(lambda statuses=statuses: _tell_by_sync(machine, statuses))


async def _tell_by_sync(machine: Machine, statuses: Sequence[machine_pb2.AttemptStatus]) -> bool:
    try:
        return not (await machine.sync(*statuses)).error
    except Unavailable:
        return False


async def counts(world: World) -> dict[str, int]:
    return dict(await world.sql("SELECT state, count(*)::int FROM jobs GROUP BY state"))


async def all_succeeded(world: World, number: int) -> bool:
    return await counts(world) == {"SUCCEEDED": number}


async def restart_empty(nats: NatsForTests) -> None:
    """kill -9's little brother: the server stops and every byte of its streams is gone."""
    await nats.server.stop()
    shutil.rmtree(nats.server.store_path)
    await nats.server.start()


async def test_a_queue_of_600_jobs_drains(world: World) -> None:
    machines = [await world.machine(8) for _ in range(5)]
    ids = await world.submit(*(a_spec() for _ in range(600)))
    assert len(set(ids)) == 600
    done: set[str] = set()
    workers = [asyncio.create_task(finish(machine, done)) for machine in machines]
    await until(lambda: all_succeeded(world, 600), timeout_seconds=120)
    for worker in workers:
        worker.cancel()
    assert len(done) == 600
    await until(lambda: all_settled(world))
    assert await world.sql("SELECT sum(cost_udgpu)::int FROM jobs") == [(600 * 1000,)]
    await world.check_sound()


async def all_settled(world: World) -> bool:
    return await world.sql("SELECT count(*)::int FROM jobs WHERE NOT settled") == [(0,)]


async def test_losing_all_of_nats_while_jobs_wait_and_run_loses_no_job(world: World, nats_server: NatsForTests) -> None:
    machine = await world.machine(2)
    first, attempt = await world.running(machine)
    second = await machine.given(await world.submit_one())
    waiting = await world.submit(*(a_spec() for _ in range(10)))
    await nats_server.server.stop()
    offline = await world.submit(*(a_spec() for _ in range(5)))  # accepted without NATS: the outbox keeps them
    await restart_empty(nats_server)
    done = {attempt.attempt_id, second.attempt_id}
    # What was told while NATS was away is told again by the sync.
    ends = [
        machine.status(a, jobs_pb2.SUCCEEDED, outcome=jobs_pb2.OUTCOME_SUCCEEDED, exit_code=0, ran_ms=1000)
        for a in (attempt, second)
    ]
    await until(lambda: _tell_by_sync(machine, ends))
    worker = asyncio.create_task(finish(machine, done))
    await until(lambda: all_succeeded(world, 17))
    worker.cancel()
    assert {first, *waiting, *offline} <= set(await job_ids(world))
    assert (await world.settled(first)).epoch == 1
    await world.check_sound()


async def job_ids(world: World) -> list[str]:
    return [job.id for job in (await call(world.jobs.ListJobs, jobs_pb2.ListJobsRequest(), actor=world.me)).jobs]


async def test_jobs_accepted_while_nats_is_down_start_when_it_is_back(world: World, nats_server: NatsForTests) -> None:
    machine = await world.machine()
    await nats_server.server.stop()
    job_id = await world.submit_one()
    assert await world.sql("SELECT count(*)::int FROM outbox WHERE subject = 'dante.queue.submitted'") == [(1,)]
    await nats_server.server.start()
    await machine.given(job_id)

    async def empty() -> bool:
        return await world.sql("SELECT count(*)::int FROM outbox") == [(0,)]

    await until(empty)


async def test_a_job_whose_message_was_lost_is_found_when_nats_is_back(world: World, nats_server: NatsForTests) -> None:
    machine = await world.machine()
    await nats_server.server.stop()
    job_id = await world.submit_one()
    await world.sql("DELETE FROM outbox")
    await nats_server.server.start()
    await machine.given(job_id)


async def test_submissions_that_come_twice_by_the_queue_place_a_job_once(world: World) -> None:
    machine = await world.machine(3)
    job_id, attempt = await world.running(machine)
    again = wrap(events_pb2.JobsSubmitted(job_ids=[job_id]), event_id=EventId.new(), occurred_at=world.clock.now())
    for payload in (b"rubbish", *[again.SerializeToString()] * 3):
        await world.bus.publish_stream(subjects.JOB_SUBMITTED, payload, str(EventId.new()))
    other = await machine.given(await world.submit_one())
    assert {a.attempt_id for a in machine.desired} == {attempt.attempt_id, other.attempt_id}
    await until(lambda: world.has_emptied(subjects.JOBS))
    assert (await world.get(job_id)).epoch == 1
    await world.check_sound()


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def postgres(postgres_server: PostgresForTests) -> AsyncIterator[PostgresForTests]:
    """The server of this test process; runs again afterwards whatever the test did."""
    yield postgres_server
    await postgres_server.server.start()


async def test_while_postgresql_is_down_nothing_is_accepted_and_everything_goes_on_afterwards(
    world: World, postgres: PostgresForTests
) -> None:
    machine = await world.machine(2)
    job_id, attempt = await world.running(machine)
    await postgres.server.stop()
    for refused in (world.submit(idempotency_key="down"), world.get(job_id), world.stop_job(job_id)):
        with pytest.raises(ServiceError) as caught:
            await refused
        assert status_of(caught.value) is ErrorStatus.UNAVAILABLE
    assert (await machine.renews(attempt)).error == "unavailable"
    await machine.ends(attempt)
    await postgres.server.start()

    async def accepted() -> list[str] | None:
        try:
            return await world.submit(idempotency_key="down")
        except ServiceError as error:
            if status_of(error) is not ErrorStatus.UNAVAILABLE:
                raise
            return None

    again = await until(accepted)
    await machine.given(again[0])
    assert (await world.settled(job_id)).state == jobs_pb2.SUCCEEDED
    assert await counts(world) == {"SUCCEEDED": 1, "PLACED": 1}
    await world.check_sound()


# --- replicas ---------------------------------------------------------------------------------------------------------


async def test_another_replica_takes_over_when_the_leader_stops(world: World) -> None:
    machine = await world.machine(2)
    _, attempt = await world.running(machine)
    await world.start_scheduler()
    assert await world.sql("SELECT epoch::int FROM leader") == [(1,)]
    await world.stop_leading(world.schedulers[0])
    await until(lambda: _led_by(world, 2))
    job_id = await world.submit_one()
    other = await machine.given(job_id)
    await machine.runs(other)
    await machine.ends(other)
    assert (await world.settled(job_id)).state == jobs_pb2.SUCCEEDED
    assert [a.attempt_id for a in (await machine.renews(attempt)).desired] == [attempt.attempt_id]


async def test_a_new_leader_knows_which_team_used_much_lately(world: World) -> None:
    them = a_member(TeamId.new())
    await world.credit(team=them.team_id)
    machine = await world.machine()
    _, attempt = await world.running(machine)
    world.clock.advance(20)
    ours, theirs = await world.submit_one(), await world.submit_one(actor=them)
    await world.stop_leading(world.schedulers[0])
    await world.start_scheduler()
    await machine.ends(attempt, ran_ms=20_000)
    # Whichever replica heard of the end: the leader looks again every few seconds.
    world.clock.advance(READ_AGAIN_SECONDS)
    await machine.given(theirs)
    assert (await world.get(ours)).state == jobs_pb2.QUEUED


async def test_a_job_that_placement_cannot_read_keeps_no_other_from_being_placed(world: World) -> None:
    machine = await world.machine()
    await world.stop_leading(world.schedulers[0])
    bad = await world.submit_one()
    spec = a_spec("a gpu of another version").SerializeToString()
    await world.sql("UPDATE jobs SET spec = %(spec)s", spec=spec)
    await world.start_scheduler()
    await machine.given(await world.submit_one())
    assert (await world.get(bad)).state == jobs_pb2.QUEUED


async def _led_by(world: World, epoch: int) -> bool:
    return await world.sql("SELECT epoch::int FROM leader") == [(epoch,)]


async def test_a_leader_that_was_overtaken_commits_no_plan(world: World) -> None:
    machine = await world.machine()
    # Somebody else is leader now; this one has not noticed yet.
    await world.sql("UPDATE leader SET holder = gen_random_uuid(), epoch = 7, expires_at = now() + interval '3s'")
    job_id = await world.submit_one()

    async def tried() -> bool:
        found = await world.sql("SELECT count(*)::int FROM billing.holds WHERE state = 'voided'")
        return found[0][0] >= 1

    await until(tried)
    assert await world.sql("SELECT count(*)::int FROM attempts") == [(0,)]
    assert (await world.get(job_id)).state == jobs_pb2.QUEUED
    # The lease of that other one runs out, and this one leads again.
    attempt = await machine.given(job_id)
    assert attempt.epoch == 1
    assert await world.sql("SELECT epoch::int FROM leader") == [(8,)]
    await world.check_sound()


async def test_a_leader_that_hangs_in_mid_transaction_keeps_nobody_out_for_long(world: World) -> None:
    machine = await world.machine()
    other = Database(world.dsn, "scheduler")
    await other.start()

    async def hang() -> None:
        # A leader that was stopped by SIGSTOP holds the row like this; PostgreSQL ends its session after a while.
        async with other.transaction() as tx:
            await tx.value("SELECT 1 FROM leader FOR UPDATE")
            job_id = await world.submit_one()
            await machine.given(job_id)

    with pytest.raises(Unavailable):
        await hang()
    await other.stop()
