"""Attempts: what machines may say, leases, stops, durations, retries (failure-model I2, I3, I6, I7)."""

import asyncio
from typing import Any

import psycopg
import pytest

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2, registry_pb2
from dantegpu.domain.ids import AttemptId, EventId, JobId, MachineId
from tests.fixtures.scheduler import ENDED, Machine, World, a_spec, attempt_uuid, until

LEASE_SECONDS = 30
GRACE_SECONDS = 10


async def told_something_new(world: World) -> None:
    """Reports are folded in order: once the end of another attempt has arrived, all before it were looked at."""
    large = await world.machine(8)
    job_id, marker = await world.running(large, a_spec("8"))
    await large.ends(marker)
    await world.reached(job_id, *ENDED)


@pytest.mark.parametrize(
    "lie",
    [
        {"epoch": 2},
        {"epoch": 0},
        {"seq": 2},
        {"seq": 0},
        {"attempt_id": str(AttemptId.new())},
        {"job_id": str(JobId.new())},
        {"attempt_id": "att_nonsense"},
    ],
    ids=["a later epoch", "an earlier epoch", "a known seq", "no seq", "another attempt", "another job", "no attempt"],
)
async def test_a_report_with_a_stale_epoch_seq_or_id_changes_nothing(world: World, lie: dict[str, Any]) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    before = await world.get(job_id)
    end: dict[str, Any] = {"outcome": jobs_pb2.OUTCOME_FAILED, "exit_code": 9, "seq": 3} | lie
    await machine.report(machine.status(attempt, jobs_pb2.FAILED, **end))
    await told_something_new(world)
    assert await world.get(job_id) == before
    reply = await machine.sync(machine.status(attempt, jobs_pb2.FAILED, **end))
    assert [desired.attempt_id for desired in reply.desired] == [attempt.attempt_id]
    assert await world.get(job_id) == before


async def test_an_attempt_without_a_log_is_known_as_silent_once_it_has_ended(world: World) -> None:
    machine = await world.machine(2)
    silent: list[bool] = []
    for log_bytes in (0, 5):
        job_id, attempt = await world.running(machine, a_spec())
        assert not (await world.get(job_id)).attempts[0].silent
        await machine.ends(attempt, log_bytes=log_bytes)
        silent.append((await world.reached(job_id, *ENDED)).attempts[0].silent)
    assert silent == [True, False]


async def test_a_job_shows_where_its_ports_are_reached_unless_its_machine_says_nonsense(world: World) -> None:
    machine = await world.machine(2)
    shown: list[list[tuple[int, str, int]]] = []
    for address, port in (("203.0.113.5", 30_001), ("gpu.example", 70_000), ("http://evil/?", 30_001)):
        job_id = await world.submit_one(a_spec())
        attempt = await machine.given(job_id)
        ports = [jobs_pb2.PublishedPort(number=8080, address=address, machine_port=port)]
        await machine.report(machine.status(attempt, jobs_pb2.RUNNING, ports=ports))
        await world.reached(job_id, jobs_pb2.RUNNING)
        await machine.ends(attempt)
        job = await world.reached(job_id, *ENDED)
        shown.append([(it.number, it.address, it.machine_port) for it in job.attempts[0].ports])
        running = await world.sql(
            "SELECT message FROM job_events WHERE job_id = %(id)s AND type = 'running'", id=JobId.parse(job_id).uuid
        )
        assert (f"; port 8080 is {address}:{port}" in running[0][0]) == bool(shown[-1])
    assert shown == [[(8080, "203.0.113.5", 30_001)], [], []]


async def test_another_machine_cannot_report_renew_or_end_an_attempt(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    thief = await world.machine()
    world.clock.advance(20)
    end = thief.status(attempt, jobs_pb2.SUCCEEDED, seq=9, outcome=jobs_pb2.OUTCOME_SUCCEEDED, exit_code=0)
    await thief.report(end)
    reply = await thief.sync(end)
    assert list(reply.desired) == []
    await thief.sync(thief.status(attempt, jobs_pb2.RUNNING, seq=9))
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING
    expires = "SELECT extract(epoch FROM lease_expires_at - lease_renewed_at)::int FROM attempts WHERE id = %(id)s"
    assert await world.sql(expires, id=attempt_uuid(attempt)) == [(LEASE_SECONDS,)]
    assert (await machine.renews(attempt)).desired[0].lease_ms == LEASE_SECONDS * 1000


async def test_a_machine_may_not_publish_under_another_machines_name(world: World) -> None:
    machine = await world.machine()
    thief = await world.machine()
    job_id, attempt = await world.running(machine)
    report = machine_pb2.Report(attempts=[machine.status(attempt, jobs_pb2.FAILED, outcome=jobs_pb2.OUTCOME_FAILED)])
    await thief.bus.publish(subjects.machine_report(machine.id), report)
    await thief.bus.flush()
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING


async def test_reports_that_come_twice_or_out_of_order_are_folded_once(world: World) -> None:
    machine = await world.machine()
    job_id = await world.submit_one()
    attempt = await machine.given(job_id)
    starting = machine.status(attempt, jobs_pb2.STARTING)
    running = machine.status(attempt, jobs_pb2.RUNNING)
    await machine.report(running)
    await machine.report(starting, running)
    await machine.sync(starting, running)
    await machine.ends(attempt)
    await machine.report(running)
    await machine.ends(attempt, jobs_pb2.FAILED)
    await world.settled(job_id)
    await told_something_new(world)
    job = await world.get(job_id)
    assert job.state == jobs_pb2.SUCCEEDED
    assert await world.events(job_id) == ["submitted", "placed", "running", "ended", "settled"]


async def test_an_end_that_overtakes_its_start_is_billed_by_the_time_that_it_ran(world: World) -> None:
    machine = await world.machine()
    job_id = await world.submit_one()
    attempt = await machine.given(job_id)
    starting, running = (machine.status(attempt, state) for state in (jobs_pb2.STARTING, jobs_pb2.RUNNING))
    world.clock.advance(20)
    await machine.ends(attempt, ran_ms=12_300)
    await machine.report(starting, running)
    job = await world.settled(job_id)
    assert (job.attempts[0].billed_seconds, job.cost_udgpu) == (13, 13_000)


async def test_a_machine_cannot_claim_more_than_the_servers_clock_saw(world: World) -> None:
    machine = await world.machine()
    job_id = await world.submit_one()
    attempt = await machine.given(job_id)
    machine.status(attempt, jobs_pb2.RUNNING)  # lost on its way
    world.clock.advance(5)
    await machine.ends(attempt, ran_ms=2**62)
    assert (await world.settled(job_id)).attempts[0].billed_seconds == 5


async def test_a_report_may_lower_the_bill(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(25)
    await machine.ends(attempt, ran_ms=2_001)
    assert (await world.settled(job_id)).cost_udgpu == 3_000


@pytest.mark.parametrize("rubbish", [b"\xff\xff", b"\x12\x02\x0a\xff", b""])
async def test_rubbish_from_one_machine_does_not_hold_up_the_reports_of_others(world: World, rubbish: bytes) -> None:
    hostile = await world.machine()
    victim = await world.machine()
    job_id = await world.submit_one(a_spec())
    machine = await until_given(job_id, hostile, victim)
    attempt = await machine.given(job_id)
    other = victim if machine is hostile else hostile
    await other.bus.publish_stream(subjects.machine_report(other.id), rubbish, str(EventId.new()))
    await machine.runs(attempt)
    await machine.ends(attempt, message="a\0b" * 3000, sandbox="\0" * 500)
    job = await world.settled(job_id)
    assert len(job.message) <= 2000
    assert "\0" not in job.message
    await until(lambda: world.has_emptied(subjects.REPORTS))


async def until_given(job_id: str, *machines: Machine) -> Machine:
    async def has_it() -> Machine | None:
        return next((m for m in machines if any(a.job_id == job_id for a in m.desired)), None)

    return await until(has_it)


@pytest.mark.parametrize("path", ["../../.ssh/authorized_keys", "/etc/passwd", "a/../b", "a\0b"])
async def test_results_whose_paths_could_escape_are_not_published(world: World, path: str) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    await machine.ends(attempt, results=[jobs_pb2.ResultFile(path="ok"), jobs_pb2.ResultFile(path=path)])
    job = await world.settled(job_id)
    assert (job.state, job.results_epoch, list(job.results)) == (jobs_pb2.SUCCEEDED, 0, [])


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_lease_is_renewed_by_each_sync_that_lists_the_attempt(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    for _ in range(5):
        world.clock.advance(20)
        assert [desired.lease_ms for desired in (await machine.renews(attempt)).desired] == [30_000]
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING
    await machine.sync()
    world.clock.advance(29)
    assert [desired.lease_ms for desired in (await machine.sync()).desired] == [1_000]


async def test_an_attempt_that_is_not_renewed_is_lost_retried_with_the_next_epoch_and_billed_to_its_last_renewal(
    world: World,
) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(20)
    await machine.renews(attempt)
    world.clock.advance(LEASE_SECONDS + GRACE_SECONDS - 1)
    other = await world.machine()
    marker, _ = await world.running(other)  # the timers have looked meanwhile
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING
    world.clock.advance(1)
    job = await world.when(job_id, lambda job: job.reason == "waiting_for_retry")
    assert (job.attempts[0].outcome, job.attempts[0].billed_seconds) == (jobs_pb2.OUTCOME_LOST, 20)
    await world.stop_job(marker)
    world.clock.advance(2)
    again = await machine.given(job_id, epoch=2)
    await machine.runs(again)
    await machine.ends(again, ran_ms=1)
    job = await world.settled(job_id)
    assert (job.state, job.epoch, job.cost_udgpu) == (jobs_pb2.SUCCEEDED, 2, 21_000)
    await world.check_sound()


async def test_a_lease_that_ran_out_is_never_renewed_and_the_machine_is_told_to_drop_the_attempt(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(LEASE_SECONDS)
    reply = await machine.renews(attempt)
    assert list(reply.desired) == []
    end = machine.status(attempt, jobs_pb2.SUCCEEDED, outcome=jobs_pb2.OUTCOME_SUCCEEDED, exit_code=0)
    await machine.report(end)
    reply = await machine.sync(end)
    assert [(ack.attempt_id, ack.seq) for ack in reply.acknowledged] == [(attempt.attempt_id, end.seq)]
    assert (await world.get(job_id)).state == jobs_pb2.RUNNING
    world.clock.advance(GRACE_SECONDS)
    job = await world.when(job_id, lambda job: job.state == jobs_pb2.QUEUED)
    assert job.attempts[0].outcome == jobs_pb2.OUTCOME_LOST


async def test_a_machine_that_comes_back_after_its_lease_has_nothing_to_do_and_its_results_stay_unpublished(
    world: World,
) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(LEASE_SECONDS + GRACE_SECONDS)
    await world.when(job_id, lambda job: job.state == jobs_pb2.QUEUED)
    await world.intend(machine, registry_pb2.INTENT_PAUSED)
    end = machine.status(
        attempt, jobs_pb2.SUCCEEDED, outcome=jobs_pb2.OUTCOME_SUCCEEDED, exit_code=0,
        results=[jobs_pb2.ResultFile(path="late")],
    )  # fmt: skip
    reply = await machine.sync(end)
    assert (reply.error, list(reply.desired), len(reply.acknowledged)) == ("", [], 1)
    assert (await machine.urls(attempt, results=[jobs_pb2.ResultFile(path="late")])).error == "stale"
    job = await world.get(job_id)
    assert (job.state, job.results_epoch) == (jobs_pb2.QUEUED, 0)


async def test_an_unknown_machine_and_one_that_left_are_told_so(world: World) -> None:
    stranger = await world.connect(MachineId.new())
    assert "unknown machine" in (await stranger.sync()).error
    machine = await world.machine()
    await world.intend(machine, registry_pb2.INTENT_LEFT)

    async def left() -> bool:
        reply = await machine.sync()
        return reply.left and bool(reply.error)

    assert await until(left)


async def test_a_machine_that_does_not_stop_when_told_loses_its_lease(quiet_world: World) -> None:
    world = quiet_world
    await world.start(stop_timeout_seconds=60)
    await world.credit()
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    await world.stop_job(job_id)
    world.clock.advance(20)
    await machine.renews(attempt)
    world.clock.advance(20)
    await machine.renews(attempt)
    world.clock.advance(20)
    reply = await machine.renews(attempt)
    assert reply.desired[0].stop
    assert reply.desired[0].lease_ms == 10_000
    world.clock.advance(10 + GRACE_SECONDS)
    job = await world.settled(job_id)
    assert (job.state, job.attempts[0].billed_seconds) == (jobs_pb2.CANCELLED, 40)
    await world.check_sound()


async def test_a_device_cannot_be_leased_twice_nor_a_job_have_two_live_attempts(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    job, device = JobId.parse(job_id).uuid, attempt.devices[0].device_id
    assert device
    with pytest.raises(psycopg.errors.UniqueViolation):
        await world.sql(
            "INSERT INTO attempts SELECT gen_random_uuid(), job_id, team_id, epoch + 1, machine_id, provider_team_id,"
            " simulated, sandbox, cpu_milli, memory_bytes, disk_bytes, rate_udgpu_per_hour, max_duration_seconds,"
            " state, NULL, NULL, NULL, '', created_at, NULL, NULL, lease_renewed_at, lease_expires_at"
            " FROM attempts WHERE job_id = %(job)s",
            job=job,
        )
    with pytest.raises(psycopg.errors.CheckViolation):
        await world.sql("UPDATE device_usage SET leased_milli = leased_milli + 1")


# --- stops ------------------------------------------------------------------------------------------------------------


async def test_a_placed_job_is_cancelled_before_it_ran_and_costs_nothing(world: World) -> None:
    machine = await world.machine()
    job_id = await world.submit_one()
    attempt = await machine.given(job_id)
    assert (await world.stop_job(job_id)).state == jobs_pb2.STOPPING
    desired = (await machine.told(lambda desired: desired[0].stop))[0]
    assert (desired.stop_reason, desired.stop_grace_ms) == ("user", 10_000)
    cancelled = machine.status(attempt, jobs_pb2.CANCELLED, outcome=jobs_pb2.OUTCOME_CANCELLED)
    await machine.report(cancelled)
    job = await world.settled(job_id)
    assert (job.state, job.cost_udgpu) == (jobs_pb2.CANCELLED, 0)
    await world.check_sound()


async def test_a_running_job_is_cancelled_and_billed_until_it_ended(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    world.clock.advance(7)
    await world.stop_job(job_id)
    await machine.told(lambda desired: desired[0].stop)
    world.clock.advance(2)
    await machine.ends(attempt, jobs_pb2.CANCELLED, ran_ms=9_000)
    job = await world.settled(job_id)
    assert (job.state, job.cost_udgpu) == (jobs_pb2.CANCELLED, 9_000)
    assert (await world.events(job_id))[-3:] == ["stop_requested", "ended", "settled"]


async def test_a_job_that_runs_too_long_is_stopped_by_the_server(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine, a_spec(max_duration_seconds=20))
    world.clock.advance(20)
    await machine.renews(attempt)
    world.clock.advance(10)  # the daemon's own timer and its grace had their chance
    desired = (await machine.told(lambda desired: desired[0].stop))[0]
    assert desired.stop_reason == "max_duration"
    await machine.ends(attempt, jobs_pb2.CANCELLED, ran_ms=30_000)
    job = await world.settled(job_id)
    assert (job.state, job.outcome) == (jobs_pb2.FAILED, jobs_pb2.OUTCOME_TIMED_OUT)


# --- retries ----------------------------------------------------------------------------------------------------------


async def test_a_job_that_fails_by_itself_is_not_retried_unless_asked(world: World) -> None:
    machine = await world.machine()
    job_id, attempt = await world.running(machine)
    await machine.ends(attempt, jobs_pb2.FAILED, exit_code=3)
    job = await world.settled(job_id)
    assert (job.state, job.exit_code, job.epoch) == (jobs_pb2.FAILED, 3, 1)


async def test_a_job_that_asks_for_it_is_retried_until_its_tries_are_used_up(world: World) -> None:
    machine = await world.machine()
    job_id = await world.submit_one(a_spec(retry=jobs_pb2.RetryPolicy(on_events=["error"])))
    for epoch in range(1, 6):
        attempt = await machine.given(job_id, epoch)
        await machine.runs(attempt)
        await machine.ends(attempt, jobs_pb2.FAILED)
        await world.when(job_id, lambda job: not any(a.state not in ENDED for a in job.attempts))
        world.clock.advance(300)
    job = await world.settled(job_id)
    assert (job.state, [a.epoch for a in job.attempts]) == (jobs_pb2.FAILED, [1, 2, 3, 4, 5])
    await world.check_sound()


async def test_a_machines_fault_is_free_and_retried_elsewhere(world: World) -> None:
    first = await world.machine()
    job_id, attempt = await world.running(first)
    second = await world.machine()
    world.clock.advance(20)
    await first.ends(attempt, jobs_pb2.FAILED, outcome=jobs_pb2.OUTCOME_PROVIDER_FAULT, message="disk full")
    await world.when(job_id, lambda job: job.reason == "waiting_for_retry")
    world.clock.advance(2)
    again = await second.given(job_id, epoch=2)
    await second.runs(again)
    await second.ends(again)
    job = await world.settled(job_id)
    assert (job.state, [a.cost_udgpu for a in job.attempts]) == (jobs_pb2.SUCCEEDED, [0, 1_000])


async def test_reports_of_many_machines_are_folded_together(world: World) -> None:
    machines = [await world.machine() for _ in range(5)]
    ids = await world.submit(*(a_spec() for _ in range(5)))

    async def work(machine: Machine) -> None:
        attempt = (await machine.told(bool))[0]
        await machine.runs(attempt)
        await machine.ends(attempt)

    await asyncio.gather(*map(work, machines))
    for job_id in ids:
        assert (await world.settled(job_id)).state == jobs_pb2.SUCCEEDED
    await world.check_sound()
