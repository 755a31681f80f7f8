"""What the simulation's tables in memory have in common with PostgreSQL: one suite, run on both.

It keeps the simulation honest: what a query does in memory is what its SQL does.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from psycopg.errors import CheckViolation, InFailedSqlTransaction

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import ManualClock
from dantegpu.domain.ids import AttemptId, DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.job import Outcome, StopReason
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.lease import Leadership, LostLeadership
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store, store_lifetimes, store_quarantines
from dantegpu.services.scheduler.errors import PlanConflict
from dantegpu.services.scheduler.service.transitions import JobBatch, Opening, Wakeups
from dantegpu.services.scheduler.store import AttemptRow, JobRow
from tests.fixtures.scheduler import until
from tests.fixtures.stores import Databases
from tests.simulation.memory.scheduler import scheduler_schema

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM = TeamId.new()
MACHINE = MachineId.new()
LEASE_SECONDS = 30.0
WINDOW_SECONDS = 300


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


@pytest.fixture
def db(databases: Databases) -> Database:
    return databases.scheduler


async def a_job(tx: Tx, *, at_seconds: float = 0.0, spec: jobs_pb2.JobSpec | None = None) -> JobRow:
    rows = await store.insert_jobs(
        tx, ids=[JobId.new().uuid], specs=[(spec or jobs_pb2.JobSpec(argv=["true"])).SerializeToString()],
        priorities=[0], team_id=TEAM.uuid, user_id=None, submitted_at=at(at_seconds), traceparent="",
    )  # fmt: skip
    return rows[0]


def an_attempt(job: JobRow, epoch: int = 1, machine: MachineId = MACHINE, **fields: Any) -> dict[str, Any]:
    return {
        "id": AttemptId.new().uuid, "job_id": job.id, "team_id": job.team_id, "epoch": epoch,
        "machine_id": machine.uuid, "provider_team_id": TEAM.uuid, "simulated": False, "sandbox": "", "cpu_milli": 100,
        "memory_bytes": 1, "disk_bytes": 0, "rate_udgpu_per_hour": 3600, "max_duration_seconds": 1000, "node_rank": 0,
        "nodes": 1,
    } | fields  # fmt: skip


async def open_attempts(tx: Tx, *rows: dict[str, Any], now: datetime = T0) -> None:
    await store.insert_attempts(tx, rows, now=now, lease_seconds=LEASE_SECONDS)


def a_change(attempt: UUID, **fields: Any) -> dict[str, Any]:
    names = (
        "id", "state", "stop_reason", "outcome", "exit_code", "message", "running_at", "ended_at", "results",
        "billed_seconds", "sandbox", "stop_requested_at",
    )  # fmt: skip
    return dict.fromkeys(names) | {"id": attempt} | fields


async def the_attempt(db: Database, attempt: UUID) -> AttemptRow:
    async with db.transaction() as tx:
        return (await store.attempts_by_id(tx, [attempt]))[attempt]


async def the_job(db: Database, job: UUID) -> JobRow:
    async with db.transaction() as tx:
        return (await store.jobs_by_id(tx, [job]))[job]


async def running(db: Database, **fields: Any) -> tuple[JobRow, UUID]:
    """A job with a live attempt that runs since T0."""
    async with db.transaction() as tx:
        job = await a_job(tx)
        attempt = an_attempt(job, **fields)
        await open_attempts(tx, attempt)
        await store.save_attempts(tx, [a_change(attempt["id"], state="RUNNING", running_at=T0)])
    return job, attempt["id"]


# --- transactions -----------------------------------------------------------------------------------------------------


async def test_what_is_rolled_back_has_never_been(db: Database):
    made: list[UUID] = []

    async def fail() -> None:
        async with db.transaction() as tx:
            made.append((await a_job(tx)).id)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    async with db.transaction() as tx:
        assert await store.jobs_by_id(tx, made) == {}


async def test_nothing_is_seen_before_it_is_committed(db: Database):
    async with db.transaction() as tx, db.transaction() as other:
        job = await a_job(tx)
        assert await store.jobs_by_id(other, [job.id]) == {}
        assert list(await store.jobs_by_id(tx, [job.id])) == [job.id]


async def test_a_locked_row_is_waited_for_and_then_seen_as_it_was_left(db: Database):
    async with db.transaction() as tx:
        job = await a_job(tx)
    order: list[str] = []

    async def second() -> None:
        async with db.transaction() as tx:
            rows = await store.lock_jobs(tx, [job.id])
            order.append(f"second sees {rows[job.id].cost_udgpu}")

    async with db.transaction() as tx:
        await store.lock_job_ids(tx, [job.id])
        await store.jobs_by_id(tx, [])
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.05)
        attempt = an_attempt(job)
        await open_attempts(tx, attempt)
        closed = {"id": attempt["id"], "closed_before": 0, "windows_closed": 1, "cost_udgpu": 7, "settled": False}
        await store.close_windows(tx, [closed])
        order.append("first ends")
    await waiting
    assert order == ["first ends", "second sees 7"]


async def test_after_an_error_a_transaction_does_nothing_more(db: Database):
    async with db.transaction() as tx:
        job = await a_job(tx)
    async with db.transaction() as tx:
        with pytest.raises(PlanConflict):
            await open_attempts(tx, an_attempt(job, epoch=0))
        with pytest.raises(InFailedSqlTransaction):
            await store.jobs_by_id(tx, [job.id])


# --- jobs -------------------------------------------------------------------------------------------------------------


async def test_a_new_job_waits_with_the_first_line_of_its_history(db: Database):
    async with db.transaction() as tx:
        job = await a_job(tx)
        events = await store.events_after(tx, job.id, 0, 10)
    assert (job.state, job.reason, job.epoch, job.avoided_machines, job.settled) == ("QUEUED", "new", 0, [], False)
    assert [(event.seq, event.type, event.occurred_at) for event in events] == [(1, "submitted", T0)]
    assert await the_job(db, job.id) == job


async def test_waiting_jobs_come_in_order_of_submission_page_by_page(db: Database):
    async with db.transaction() as tx:
        jobs = [await a_job(tx, at_seconds=seconds) for seconds in (3, 1, 2)]
        first = await store.queued_jobs(tx, after=None, limit=2)
        rest = await store.queued_jobs(tx, after=first[-1], limit=2)
        listed = await store.list_jobs(tx, team_id=TEAM.uuid, before=None, states=["QUEUED"], limit=2)
    assert [row.id for row in first + rest] == [jobs[1].id, jobs[2].id, jobs[0].id]
    assert [row.id for row in listed] == sorted((job.id for job in jobs), reverse=True)[:2]


@pytest.mark.parametrize("fields", [{"state": "RUNNING"}, {"reason": None}, {"ended_at": T0}, {"state": "NONSENSE"}])
async def test_a_job_in_an_impossible_state_is_refused(db: Database, fields: dict[str, Any]):
    async with db.transaction() as tx:
        job = await a_job(tx)
    row = {name: getattr(job, name) for name in JobRow.__slots__ if name not in ("spec", "settled")}
    with pytest.raises(CheckViolation):
        async with db.transaction() as tx:
            await store.save_jobs(tx, [{**row, "avoided_machines": list[UUID](), **fields}])


async def test_a_way_through_the_transition_table_is_written_back(db: Database):
    class Silent:
        connected = True

        def on_reconnect(self, callback: Any) -> None:
            return

    outbox = Outbox(db, cast(Any, Silent()), ManualClock())
    attempt, device = AttemptId.new(), DeviceId.new().uuid
    async with db.transaction() as tx:
        job = await a_job(tx)
    fields = an_attempt(job)
    device_row = {"device_id": device, "device_index": 0, "milli": 1000}
    opening = Opening((fields,), ((device_row,),), "")
    events: list[tuple[Any, Opening | None]] = [
        (lifecycle.Placed(attempt, MACHINE), opening),
        (lifecycle.StopRequested(by="somebody", why=StopReason.USER), None),
        (lifecycle.AttemptEnded(Outcome.CANCELLED, 143, "stopped"), None),
    ]
    for event, opened in events:
        async with db.transaction() as tx:
            batch = await JobBatch.lock(tx, [job.id], T0)
            batch.apply(job.id, event, opened)
            await batch.save(tx, outbox, Wakeups(), lease_seconds=LEASE_SECONDS)
    row = await the_job(db, job.id)
    assert (row.state, row.outcome, row.exit_code, row.epoch, row.attempt_id) == (
        "CANCELLED",
        "cancelled",
        143,
        1,
        None,
    )
    ended = await the_attempt(db, attempt.uuid)
    assert (ended.state, ended.stop_reason, ended.ended_at) == ("CANCELLED", "user", T0)
    async with db.transaction() as tx:
        history = [event.type for event in await store.events_after(tx, job.id, 0, 10)]
        revisions = await store.machine_revisions(tx, [MACHINE.uuid])
    assert history == ["submitted", "placed", "stop_requested", "ended"]
    assert revisions == {MACHINE.uuid: 3}


# --- attempts and devices ---------------------------------------------------------------------------------------------


async def test_a_job_has_at_most_one_live_attempt(db: Database):
    job, attempt = await running(db)
    with pytest.raises(PlanConflict):
        async with db.transaction() as tx:
            await open_attempts(tx, an_attempt(job, epoch=2))
    async with db.transaction() as tx:
        await store.save_attempts(tx, [a_change(attempt, state="FAILED", outcome="lost", ended_at=at(1))])
        await open_attempts(tx, an_attempt(job, epoch=2))


async def test_two_plans_for_one_job_at_the_same_time_are_one(db: Database):
    async with db.transaction() as tx:
        job = await a_job(tx)

    async def plan(epoch: int) -> bool:
        try:
            async with db.transaction() as tx:
                await open_attempts(tx, an_attempt(job, epoch=epoch))
                await asyncio.sleep(0.02)
        except PlanConflict:
            return False
        return True

    assert sorted(await asyncio.gather(plan(1), plan(2))) == [False, True]


async def test_a_gang_is_placed_whole_or_not_at_all(db: Database):
    machines = [MachineId.new(), MachineId.new()]
    async with db.transaction() as tx:
        job = await a_job(tx)

    def node(rank: int, epoch: int = 1, machine: MachineId | None = None) -> dict[str, Any]:
        return an_attempt(job, epoch, machine or machines[rank], node_rank=rank, nodes=2)

    async def refused(*rows: dict[str, Any]) -> bool:
        try:
            async with db.transaction() as tx:
                await open_attempts(tx, *rows)
        except PlanConflict:
            return True
        return False

    assert await refused(node(0))
    assert await refused(node(0), node(1, machine=machines[0]))
    whole = [node(0), node(1)]
    assert not await refused(*whole)
    assert await refused(node(0, epoch=2), node(1, epoch=2))
    async with db.transaction() as tx:
        desired = await store.desired_attempts(tx, [machine.uuid for machine in machines], at(1))
        of_job = await store.attempts_of_jobs(tx, [job.id])
    assert [row.node_machines for row in desired] == [[machine.uuid for machine in machines]] * 2
    assert [row.id for row in of_job] == [row["id"] for row in whole]


async def test_a_device_is_leased_up_to_its_whole_and_given_back_once(db: Database):
    device = DeviceId.new().uuid
    async with db.transaction() as tx:
        first, second = an_attempt(await a_job(tx)), an_attempt(await a_job(tx))
        await open_attempts(tx, first, second)

    def lease(attempt: dict[str, Any], milli: int) -> dict[str, Any]:
        return {"attempt_id": attempt["id"], "device_id": device, "device_index": 0, "milli": milli}

    async with db.transaction() as tx:
        await store.lease_devices(tx, [lease(first, 600)])
    with pytest.raises(PlanConflict):
        async with db.transaction() as tx:
            await store.lease_devices(tx, [lease(second, 500)])
    for _ in range(2):
        async with db.transaction() as tx:
            await store.release_devices(tx, [first["id"]])
    async with db.transaction() as tx:
        await store.lease_devices(tx, [lease(second, 1000)])
        held = await store.leases_of_attempts(tx, [second["id"]])
        live = {tuple(row.device_ids): row.millis for row in await store.live_leases(tx)}
    assert [(row.device_id, row.milli) for row in held[second["id"]]] == [(device, 1000)]
    assert live[(device,)] in ([600], [1000])


async def test_past_use_is_an_average_in_which_a_half_life_ago_counts_half(db: Database):
    other = TeamId.new().uuid
    async with db.transaction() as tx:
        ended, live = an_attempt(await a_job(tx)), an_attempt(await a_job(tx), team_id=other, memory_bytes=8)
        await open_attempts(tx, ended, live)
        devices = [
            {"attempt_id": ended["id"], "device_id": DeviceId.new().uuid, "device_index": index, "milli": milli}
            for index, milli in enumerate((1000, 600))
        ]
        await store.lease_devices(tx, devices)
        end = a_change(ended["id"], state="SUCCEEDED", outcome="succeeded", exit_code=0, ended_at=at(100))
        await store.save_attempts(tx, [end])
        await store.release_devices(tx, [ended["id"]])

    async def asked(since: float = 0, half_life: float = 100, limit: int = 10) -> dict[UUID, tuple[float, ...]]:
        async with db.transaction() as tx:
            rows = await store.past_use(tx, now=at(200), since=at(since), half_life_seconds=half_life, limit=limit)
        return {row.team_id: (row.gpu_milli, row.cpu_milli, row.memory_bytes) for row in rows}

    # From two half-lives ago until one ago; and from then until now.
    assert await asked() == {TEAM.uuid: (400.0, 25.0, 0.25), other: (0.0, 75.0, 6.0)}
    assert set(await asked(since=100)) == set(await asked(limit=1)) == {other}
    assert (await asked(half_life=0.05))[other] == (0.0, 100.0, 8.0)


async def test_an_attempt_that_has_ended_never_changes_again(db: Database):
    _, attempt = await running(db)
    end = a_change(attempt, state="SUCCEEDED", outcome="succeeded", exit_code=0, ended_at=at(5), billed_seconds=5)
    end["silent"] = True
    async with db.transaction() as tx:
        await store.save_attempts(tx, [a_change(attempt, state="STOPPING", stop_reason="user", running_at=at(9))])
        await store.save_attempts(tx, [end])
    before = await the_attempt(db, attempt)
    async with db.transaction() as tx:
        await store.save_attempts(tx, [end | {"state": "FAILED", "exit_code": 1, "billed_seconds": 99, "silent": None}])
    assert await the_attempt(db, attempt) == before
    assert (before.running_at, before.stop_reason, before.billed_seconds, before.silent) == (T0, "user", 5, True)


@pytest.mark.parametrize(
    ("now", "machine", "epoch", "stopped_at", "renewed"),
    [
        (29, MACHINE, 1, None, 1),
        (30, MACHINE, 1, None, 0),
        (29, MachineId.new(), 1, None, 0),
        (29, MACHINE, 2, None, 0),
        (29, MACHINE, 1, 10, 1),
        (29, MACHINE, 1, 9, 0),
    ],
    ids=["in time", "after its end", "another machine", "another epoch", "just stopped", "stopped long ago"],
)
async def test_a_lease_is_renewed_only_by_who_holds_it_and_in_time(
    db: Database, now: int, machine: MachineId, epoch: int, stopped_at: int | None, renewed: int
):
    _, attempt = await running(db)
    async with db.transaction() as tx:
        if stopped_at is not None:
            change = a_change(attempt, state="STOPPING", stop_requested_at=at(stopped_at), running_at=T0)
            await store.save_attempts(tx, [change])
        done = await store.renew_leases(
            tx, machine.uuid, [(attempt, epoch)], now=at(now), lease_seconds=LEASE_SECONDS, stop_timeout_seconds=20
        )
    row = await the_attempt(db, attempt)
    assert done == renewed
    assert row.lease_expires_at == (at(now + LEASE_SECONDS) if renewed else at(LEASE_SECONDS))


async def test_ports_are_kept_of_live_attempts_only(db: Database):
    async with db.transaction() as tx:
        jobs = [await a_job(tx) for _ in range(2)]
        live, ended = (an_attempt(job) for job in jobs)
        await open_attempts(tx, live, ended)
        await store.save_attempts(tx, [a_change(ended["id"], state="FAILED", ended_at=at(2))])
        await store.save_ports(tx, {live["id"]: b"\x01", ended["id"]: b"\x02"})
        found = await store.attempts_by_id(tx, [live["id"], ended["id"]])
        assert (found[live["id"]].ports, found[ended["id"]].ports) == (b"\x01", b"")


async def test_time_decides_which_attempts_are_lost_or_overdue(db: Database):
    _, attempt = await running(db, max_duration_seconds=20)

    async def due(seconds: float) -> list[tuple[bool, bool]]:
        async with db.transaction() as tx:
            rows = await store.due_attempts(tx, now=at(seconds), lease_grace_seconds=10, stop_grace_seconds=5, limit=10)
        return [(row.lost, row.overdue) for row in rows]

    assert [await due(seconds) for seconds in (24, 25, 40)] == [[], [(False, True)], [(True, True)]]
    async with db.transaction() as tx:
        assert await store.out_of_lease(tx, [attempt], at(29)) == set()
        assert await store.out_of_lease(tx, [attempt], at(30)) == {attempt}
        assert [row.id for row in await store.desired_attempts(tx, [MACHINE.uuid], at(29))] == [attempt]
        assert await store.desired_attempts(tx, [MACHINE.uuid], at(30)) == []
        assert [(row.id, row.live) for row in await store.resolve_attempts(tx, [attempt])] == [(attempt, True)]


# --- settlement -------------------------------------------------------------------------------------------------------


async def test_windows_are_opened_ahead_and_closed_once(db: Database):
    job, attempt = await running(db)

    async def needing(seconds: float) -> int:
        async with db.transaction() as tx:
            return len(await store.attempts_needing_window(tx, now=at(seconds), ahead_seconds=60, limit=10))

    assert [await needing(239), await needing(240)] == [0, 1]
    async with db.transaction() as tx:
        await store.open_windows(tx, {attempt: 2})
        await store.open_windows(tx, {attempt: 1})
        live = [(attempt, 1)]
        for seconds in range(20, WINDOW_SECONDS + 20, 20):
            await store.renew_leases(
                tx, MACHINE.uuid, live, now=at(seconds), lease_seconds=LEASE_SECONDS, stop_timeout_seconds=20
            )
        full = await store.attempts_with_full_windows(tx, limit=10)
    assert [(row.id, row.windows_opened) for row in full] == [(attempt, 2)]
    close = {"id": attempt, "closed_before": 0, "windows_closed": 1, "cost_udgpu": 300, "settled": False}
    for _ in range(2):
        async with db.transaction() as tx:
            await store.close_windows(tx, [close])
    assert (await the_attempt(db, attempt)).windows_closed == 1
    assert (await the_job(db, job.id)).cost_udgpu == 300
    assert await needing(400) == 0


async def test_an_ended_job_is_settled_when_all_its_attempts_are(db: Database):
    job, attempt = await running(db)
    ended = {name: getattr(job, name) for name in JobRow.__slots__ if name not in ("spec", "settled")}
    ended |= {"state": "FAILED", "reason": None, "ended_at": at(5), "outcome": "failed", "avoided_machines": []}
    async with db.transaction() as tx:
        await store.save_attempts(tx, [a_change(attempt, state="FAILED", outcome="failed", ended_at=at(5))])
        await store.save_jobs(tx, [ended])
        assert [row.id for row in await store.unsettled_attempts(tx, 10)] == [attempt]
        assert await store.attempts_to_settle(tx, [attempt, UUID(int=1)]) == {attempt}
        assert await store.jobs_to_mark_settled(tx, 10) == []
        settle = {"id": attempt, "closed_before": 0, "windows_closed": 1, "cost_udgpu": 5, "settled": True}
        await store.close_windows(tx, [settle])
    async with db.transaction() as tx:
        assert [row.id for row in await store.jobs_to_mark_settled(tx, 10)] == [job.id]
        await store.mark_jobs_settled(tx, [job.id])
    row = await the_job(db, job.id)
    assert (row.settled, row.cost_udgpu, row.event_seq) == (True, 5, 2)


async def test_held_jobs_and_deadlines_fall_due(db: Database):
    async with db.transaction() as tx:
        first, second = await a_job(tx), await a_job(tx)
        held = await store_lifetimes.hold_jobs(tx, second.id, [first.id], "after another")
        assert (held.held, held.reason) == (True, "waiting_for_jobs")
        assert await store_lifetimes.held_and_due(tx, 10) == []
        await store_lifetimes.set_deadlines(tx, {first.id: at(10)})
        names = {"now": at(9), "ending_reasons": ["user"], "limit": 10}
        assert await store_lifetimes.past_deadline(tx, **cast(Any, names)) == []
        due = await store_lifetimes.past_deadline(tx, **cast(Any, names | {"now": at(10)}))
        assert [row.id for row in due] == [first.id]
        gone = {name: getattr(first, name) for name in JobRow.__slots__ if name not in ("spec", "settled")}
        gone |= {"state": "CANCELLED", "reason": None, "ended_at": at(11), "avoided_machines": []}
        await store.save_jobs(tx, [gone])
        found = await store_lifetimes.held_and_due(tx, 10)
        assert [(row.id, row.ready, row.failed_id) for row in found] == [(second.id, False, first.id)]
        assert [row.held for row in await store_lifetimes.release_jobs(tx, [second.id])] == [False]


# --- kit --------------------------------------------------------------------------------------------------------------


async def test_one_leader_at_a_time_and_the_epoch_rises(db: Database):
    led: list[str] = []

    def candidate(name: str) -> Leadership:
        async def lead(epoch: int) -> None:
            led.append(f"{name} {epoch}")
            await asyncio.Event().wait()

        return Leadership(db, "placement", lead)

    first, second = candidate("first"), candidate("second")

    async def has_led(words: str) -> bool:
        return words in led

    await first.start()
    await until(lambda: has_led("first 1"))
    await second.start()
    async with db.transaction() as tx:
        await first.assert_held(tx)
        with pytest.raises(LostLeadership):
            await second.assert_held(tx)
    await first.stop()
    await until(lambda: has_led("second 2"))
    with pytest.raises(LostLeadership):
        async with db.transaction() as tx:
            await first.assert_held(tx)
    await second.stop()
    assert led == ["first 1", "second 2"]


def test_unknown_sql_is_refused_by_name():
    from tests.simulation.memory.engine import UnknownStatement

    with pytest.raises(UnknownStatement, match="no function in memory for: SELECT nothing"):
        scheduler_schema().handler("SELECT nothing")


# --- quarantines ------------------------------------------------------------------------------------------------------


async def ended_attempts(db: Database, *ends: tuple[float, str], team: TeamId = TEAM) -> None:
    """Attempts of jobs of their own on MACHINE, each ended at so many seconds with that outcome."""
    for seconds, outcome in ends:
        async with db.transaction() as tx:
            attempt = an_attempt(await a_job(tx)) | {"team_id": team.uuid}
            await open_attempts(tx, attempt)
            change = a_change(attempt["id"], state="FAILED", outcome=outcome, ended_at=at(seconds))
            await store.save_attempts(tx, [change])


async def faulty(db: Database, since_seconds: float = -1.0) -> list[tuple[int, int]]:
    async with db.transaction() as tx:
        rows = await store_quarantines.faulty_machines(tx, since=at(since_seconds), faults=2, limit=10)
    return [(row.incidents, row.teams) for row in rows]


async def test_faults_in_a_row_count_once_per_minute_lost_and_twice_as_many_of_one_team_are_needed(db: Database):
    await ended_attempts(db, (0, "provider_fault"), (61, "lost"), (62, "lost"))
    assert await faulty(db) == []
    await ended_attempts(db, (63, "provider_fault"), (130, "lost"))
    assert await faulty(db) == [(4, 1)]
    await ended_attempts(db, (200, "succeeded"))
    assert await faulty(db) == []
    await ended_attempts(db, (300, "provider_fault"))
    await ended_attempts(db, (301, "provider_fault"), team=TeamId.new())
    assert await faulty(db) == [(2, 2)]
    assert await faulty(db, since_seconds=300) == []


async def test_each_quarantine_in_a_row_lasts_twice_as_long_until_one_is_released(db: Database):
    async def shut(at_seconds: float) -> tuple[float, int]:
        async with db.transaction() as tx:
            row = await store_quarantines.quarantine(
                tx, MACHINE.uuid, reason="why", now=at(at_seconds), seconds=10, max_seconds=30, forget_seconds=1000
            )
        return (row.until - row.since).total_seconds(), row.times

    assert [await shut(seconds) for seconds in (0, 20, 50)] == [(10, 1), (20, 2), (30, 3)]
    async with db.transaction() as tx:
        assert [row.times for row in await store_quarantines.in_quarantine(tx, at(60))] == [3]
        assert await store_quarantines.in_quarantine(tx, at(60), [MachineId.new().uuid]) == []
        released = await store_quarantines.release(tx, [MACHINE.uuid], by="ann", now=at(70))
        assert [(row.until, row.released_by) for row in released] == [(at(70), "ann")]
        assert await store_quarantines.release(tx, [MACHINE.uuid], by="ann", now=at(71)) == []
    assert await faulty(db) == []
    assert await shut(100) == (10, 1)
