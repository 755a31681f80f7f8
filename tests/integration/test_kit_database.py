"""kit's transactions, idempotency, outbox and leadership on a real PostgreSQL (and NATS)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from uuid import UUID

import psutil
import psycopg
import pytest
from nats.aio.msg import Msg

from dantegpu.apps.embedded.postgres import EmbeddedPostgres
from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import unwrap
from dantegpu.contracts.gen.dante.v1 import events_pb2, jobs_pb2
from dantegpu.domain.clock import SystemClock
from dantegpu.domain.ids import JobId
from dantegpu.kit.bus import Bus
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import InvalidArgument, Unavailable
from dantegpu.kit.idempotency import IdempotencyKeyReused, forget_old, once, recall
from dantegpu.kit.lease import Leadership, LostLeadership
from dantegpu.kit.migrate import migrate
from dantegpu.kit.outbox import RELAY_BATCH, Outbox
from tests.fixtures.scheduler import until
from tests.fixtures.servers import NatsForTests


@pytest.fixture
async def db(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[Database]:
    """A schema with kit's own tables."""
    await migrate(postgres_dsn, "kit", tmp_path)
    database = Database(postgres_dsn, "kit")
    await database.start()
    yield database
    await database.stop()


async def count(db: Database, table: str) -> int:
    async with db.transaction() as tx:
        return int(await tx.value(f"SELECT count(*) FROM {table}"))


async def rolled_back(db: Database, work: Callable[[Tx], Awaitable[None]]) -> None:
    async def fail() -> None:
        async with db.transaction() as tx:
            await work(tx)
            await tx.value("SELECT 1 / 0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        await fail()


async def _append(tx: Tx, called: list[str]) -> None:
    tx.after_commit.append(lambda: called.append("rolled back"))


# --- transactions -----------------------------------------------------------------------------------------------------


async def test_what_is_to_be_woken_is_called_after_the_commit_and_not_after_a_rollback(db: Database) -> None:
    called: list[str] = []
    await rolled_back(db, lambda tx: _append(tx, called))
    async with db.transaction() as tx:
        tx.after_commit.append(lambda: called.append("committed"))
        assert called == []
    assert called == ["committed"]


async def test_a_connection_that_is_cut_means_unavailable_and_the_next_transaction_works(db: Database) -> None:
    with pytest.raises(Unavailable):
        async with db.transaction() as tx:
            await tx.value("SELECT pg_terminate_backend(pg_backend_pid())")
    async with db.transaction() as tx:
        assert await tx.value("SELECT 1") == 1


async def test_a_pooled_connection_that_was_cut_while_it_idled_is_not_handed_out(db: Database) -> None:
    async with db.transaction() as tx:
        pid = await tx.value("SELECT pg_backend_pid()")
    async with await psycopg.AsyncConnection.connect(db.dsn, autocommit=True) as other:
        await other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    async def works() -> bool:
        try:
            async with db.transaction() as tx:
                return bool(await tx.value("SELECT true"))
        except Unavailable:
            return False

    assert await until(works)


async def test_what_was_sent_and_failed_rolls_everything_back_and_the_connection_goes_on(
    postgres_dsn: str, db: Database
):
    one = Database(postgres_dsn, "kit", max_size=1)
    await one.start()
    called: list[str] = []

    async def twice() -> None:
        async with one.transaction() as tx:
            tx.after_commit.append(lambda: called.append("committed"))
            for _ in range(2):
                await tx.send("INSERT INTO leader VALUES ('a', gen_random_uuid(), 1, now())")

    with pytest.raises(psycopg.errors.UniqueViolation):
        await twice()
    assert called == []
    assert await count(one, "leader") == 0
    await one.stop()


@pytest.mark.parametrize(
    ("type_", "elements"),
    [
        ("uuid", [UUID(int=0), None, UUID(int=2**128 - 1)]),
        ("text", ["", "NULL", 'é "\\{,}\n', None]),
        ("bytea", [None, b"", b"\x00\xff{}"]),
        ("bigint", [-(2**63), 2**63 - 1, 0, None]),
        ("smallint", [-5, 32_767]),
        ("boolean", [True, None, False]),
        ("text", []),
        ("integer", [None]),
    ],
)
async def test_a_list_arrives_as_the_array_that_it_is(db: Database, type_: str, elements: list[object]):
    async with db.transaction() as tx:
        assert await tx.value(f"SELECT %(elements)s::{type_}[]", elements=elements) == elements
        assert await tx.value(f"SELECT cardinality(%(elements)s::{type_}[])", elements=elements) == len(elements)


async def test_a_statement_longer_than_the_sockets_buffer_arrives_whole(db: Database):
    data = bytes(8 << 20)
    statement = "INSERT INTO outbox (subject, message_id, payload) VALUES ('a', %(key)s, %(data)s)"
    async with asyncio.timeout(20), db.transaction() as tx:
        assert await tx.value("SELECT length(%(data)s::bytea)", data=data) == len(data)
        assert await tx.run(statement, key="1", data=data) == 1
        await tx.send(statement, key="2", data=data)
    async with db.transaction() as tx:
        assert await tx.value("SELECT sum(length(payload))::bigint FROM outbox") == 2 * len(data)


async def test_a_cancelled_transaction_is_rolled_back_and_its_connection_goes_on(postgres_dsn: str, db: Database):
    one = Database(postgres_dsn, "kit", max_size=1)
    await one.start()
    sent = asyncio.Event()

    async def work() -> None:
        async with one.transaction() as tx:
            await tx.send("INSERT INTO outbox (subject, message_id, payload) VALUES ('a', 'b', '')")
            sent.set()
            await tx.value("SELECT pg_sleep(60)")

    working = asyncio.create_task(work())
    await sent.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert await count(one, "outbox") == 0
    await one.stop()


async def test_only_a_transaction_that_need_not_be_durable_leaves_the_disk_to_the_next_commit(
    postgres_dsn: str, db: Database
):
    async with db.statement() as tx:
        name = await tx.value("SELECT current_database()")
    async with db.statement() as tx:
        await tx.run(f'ALTER DATABASE "{name}" SET synchronous_commit = on')  # the tests' server has it off
    fresh = Database(postgres_dsn, "kit", max_size=1)
    await fresh.start()
    async with fresh.transaction(durable=False) as tx:
        assert await tx.value("SHOW synchronous_commit") == "off"
    async with fresh.transaction() as tx:
        assert await tx.value("SHOW synchronous_commit") == "on"
    await fresh.stop()


async def test_a_crash_of_postgresql_undoes_only_what_no_durable_commit_came_after(short_dir: Path, tmp_path: Path):
    # It writes its log at durable commits and else after ten seconds, which this test does not take.
    server = EmbeddedPostgres(short_dir / "data", short_dir / "run", settings={"wal_writer_delay": "10s"})
    address = await server.start()
    await migrate(address.dsn(), "kit", tmp_path)

    async def tell(word: str, *, durable: bool) -> None:
        async with db.transaction(durable=durable) as tx:
            await tx.run("INSERT INTO told VALUES (%(word)s)", word=word)

    db = Database(address.dsn(), "kit")
    await db.start()
    async with db.transaction() as tx:
        await tx.run("CREATE TABLE told (word text)")
    await tell("the hold", durable=False)
    await tell("its attempt", durable=True)
    await tell("another hold", durable=False)
    assert server.pid is not None
    postmaster = psutil.Process(server.pid)
    crashed = [postmaster, *postmaster.children(recursive=True)]
    for process in crashed:
        process.kill()
    psutil.wait_procs(crashed, timeout=30)
    await db.stop()
    await server.start()
    fresh = Database(address.dsn(), "kit")
    await fresh.start()
    async with fresh.statement() as tx:
        assert await tx.value("SELECT array_agg(word ORDER BY ctid) FROM told") == [
            "the hold",
            "its attempt",
        ]
    await fresh.stop()
    await server.stop()


# --- idempotency ------------------------------------------------------------------------------------------------------


def a_request(name: str = "a") -> jobs_pb2.SubmitJobsRequest:
    return jobs_pb2.SubmitJobsRequest(specs=[jobs_pb2.JobSpec(name=name, labels={"x": "1", "y": "2"})])


async def ask(db: Database, key: str, request: jobs_pb2.SubmitJobsRequest, done: list[str]) -> jobs_pb2.GetJobsRequest:
    async def do() -> jobs_pb2.GetJobsRequest:
        done.append(key)
        return jobs_pb2.GetJobsRequest(job_ids=[str(len(done))])

    async with db.transaction() as tx:
        return await once(
            tx, scope="team:Submit", key=key, request=request, response_type=jobs_pb2.GetJobsRequest, do=do
        )


async def test_many_requests_with_one_key_at_the_same_time_are_done_once(db: Database) -> None:
    done: list[str] = []
    answers = await asyncio.gather(*(ask(db, "k", a_request(), done) for _ in range(8)))
    assert done == ["k"]
    assert {tuple(answer.job_ids) for answer in answers} == {("1",)}


async def test_a_key_with_another_body_is_refused_and_an_empty_key_is_always_new(db: Database) -> None:
    done: list[str] = []
    await ask(db, "k", a_request("a"), done)
    with pytest.raises(IdempotencyKeyReused):
        await ask(db, "k", a_request("b"), done)
    for _ in range(2):
        await ask(db, "", a_request(), done)
    assert done == ["k", "", ""]
    for key in ("x" * 256, "a\0b"):
        with pytest.raises(InvalidArgument):
            await ask(db, key, a_request(), done)


async def test_an_answer_is_remembered_only_when_its_work_is_committed(db: Database) -> None:
    done: list[str] = []

    async def fails(tx: Tx) -> None:
        async def do() -> jobs_pb2.GetJobsRequest:
            return jobs_pb2.GetJobsRequest(job_ids=["lost"])

        await once(tx, scope="team:Submit", key="k", request=a_request(), response_type=jobs_pb2.GetJobsRequest, do=do)
        await tx.value("SELECT 1 / 0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        async with db.transaction() as tx:
            await fails(tx)
    assert list((await ask(db, "k", a_request(), done)).job_ids) == ["1"]
    async with db.transaction() as tx:
        recalled = await recall(
            tx, scope="team:Submit", key="k", request=a_request(), response_type=jobs_pb2.GetJobsRequest
        )
    assert recalled is not None
    assert list(recalled.job_ids) == ["1"]


async def test_old_answers_are_forgotten_and_young_ones_kept(db: Database) -> None:
    done: list[str] = []
    await ask(db, "old", a_request(), done)
    await ask(db, "young", a_request(), done)
    async with db.transaction() as tx:
        await tx.run("UPDATE idempotency SET created_at = now() - interval '3 days' WHERE key = 'old'")
        assert await forget_old(tx) == 1
    assert await count(db, "idempotency") == 1


# --- outbox -----------------------------------------------------------------------------------------------------------


class Listener:
    """What arrives on the events' stream, by id of the envelope."""

    def __init__(self) -> None:
        self.jobs: list[str] = []

    async def __call__(self, message: Msg) -> None:
        self.jobs.append(unwrap(message.data, events_pb2.WalletChanged)[1].team_id)


def changed(job_id: JobId) -> tuple[str, events_pb2.WalletChanged]:
    return f"dante.jobs.{job_id}", events_pb2.WalletChanged(team_id=str(job_id))


@pytest.fixture
async def bus(nats_server: NatsForTests) -> AsyncIterator[Bus]:
    made = Bus(nats_server.url, nats_server.services_creds, name="test")
    await made.start()
    yield made
    await made.stop()


async def test_what_is_committed_is_published_and_what_is_rolled_back_is_not(db: Database, bus: Bus) -> None:
    heard = Listener()
    await bus.subscribe(subjects.ALL_JOB_EVENTS, heard)
    outbox = Outbox(db, bus, SystemClock())
    await outbox.start()
    lost, kept = JobId.new(), [JobId.new() for _ in range(RELAY_BATCH + 10)]
    await rolled_back(db, lambda tx: outbox.add(tx, [changed(lost)]))
    async with db.transaction() as tx:
        await outbox.add(tx, map(changed, kept))

    async def empty() -> bool:
        return await count(db, "outbox") == 0

    await until(empty)
    await outbox.stop()
    await bus.flush()
    assert sorted(heard.jobs) == sorted(map(str, kept))


async def test_rows_outlive_nats_and_go_out_once_it_is_back(db: Database, bus: Bus, nats_server: NatsForTests) -> None:
    outbox = Outbox(db, bus, SystemClock())
    await outbox.start()
    await nats_server.server.stop()
    job_id = JobId.new()
    async with db.transaction() as tx:
        await outbox.add(tx, [changed(job_id)])
    assert await count(db, "outbox") == 1
    await nats_server.server.start()

    async def empty() -> bool:
        return await count(db, "outbox") == 0

    await until(empty)
    await outbox.stop()


async def test_a_message_that_nats_refuses_holds_up_no_other(db: Database, bus: Bus) -> None:
    outbox = Outbox(db, bus, SystemClock())
    huge = events_pb2.WalletChanged(team_id="x" * (3 << 20))
    async with db.transaction() as tx:
        await outbox.add(tx, [("dante.jobs.huge", huge), changed(JobId.new())])
    await outbox.start()

    async def one_left() -> bool:
        return await count(db, "outbox") == 1

    await until(one_left)
    await outbox.stop()


async def test_two_relays_on_one_outbox_publish_each_message_once(db: Database, bus: Bus) -> None:
    heard = Listener()
    ids = [JobId.new() for _ in range(200)]
    relays = [Outbox(db, bus, SystemClock()) for _ in range(2)]
    async with db.transaction() as tx:
        await relays[0].add(tx, map(changed, ids))
    await asyncio.gather(*(relay.start() for relay in relays))

    async def empty() -> bool:
        return await count(db, "outbox") == 0

    await until(empty)
    await asyncio.gather(*(relay.stop() for relay in relays))

    async def collect(messages: Sequence[Msg]) -> None:
        for message in messages:
            await heard(message)

    consuming = await bus.consume(subjects.EVENTS, "test", collect)

    async def all_heard() -> bool:
        return len(heard.jobs) >= len(ids)

    await until(all_heard)
    await consuming.close()
    assert sorted(heard.jobs) == sorted(map(str, ids))


# --- leadership -------------------------------------------------------------------------------------------------------


class Leader:
    """A replica that notes when it leads."""

    def __init__(self, db: Database) -> None:
        self.leading = False
        self.epochs: list[int] = []
        self.leadership = Leadership(db, "test", self._lead)

    async def _lead(self, epoch: int) -> None:
        self.leading = True
        self.epochs.append(epoch)
        try:
            await asyncio.Event().wait()
        finally:
            self.leading = False

    async def leads(self) -> None:
        async def now() -> bool:
            return self.leading

        await until(now)


async def test_one_of_two_replicas_leads_and_the_other_takes_over_with_the_next_epoch(db: Database) -> None:
    first, second = Leader(db), Leader(db)
    await first.leadership.start()
    await first.leads()
    await second.leadership.start()
    async with db.transaction() as tx:
        await first.leadership.assert_held(tx)
        with pytest.raises(LostLeadership):
            await second.leadership.assert_held(tx)
    assert not second.leading
    await first.leadership.stop()
    assert not first.leading
    await second.leads()
    assert (first.epochs, second.epochs) == ([1], [2])
    await second.leadership.stop()


async def test_a_leader_that_was_overtaken_cannot_commit_and_stops_leading(db: Database) -> None:
    first, second = Leader(db), Leader(db)
    await first.leadership.start()
    await first.leads()
    async with db.transaction() as tx:
        await tx.run("UPDATE leader SET holder = gen_random_uuid(), epoch = 5, expires_at = now() + interval '1 hour'")
    with pytest.raises(LostLeadership):
        async with db.transaction() as tx:
            await first.leadership.assert_held(tx)

    async def stopped() -> bool:
        return not first.leading

    await until(stopped)
    await first.leadership.stop()
    async with db.transaction() as tx:
        await tx.run("UPDATE leader SET expires_at = now()")
    await second.leadership.start()
    await second.leads()
    assert second.epochs == [6]
    await second.leadership.stop()


async def test_nobody_takes_over_while_the_leaders_transaction_is_open(db: Database) -> None:
    first, second = Leader(db), Leader(db)
    await first.leadership.start()
    await first.leads()
    async with db.transaction() as tx:
        await first.leadership.assert_held(tx)
        async with db.transaction() as other:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                await other.run("SELECT 1 FROM leader FOR UPDATE NOWAIT")
    await second.leadership.stop()
    await first.leadership.stop()


async def test_a_leader_whose_work_crashes_leads_again(db: Database) -> None:
    crashes = 0
    led_again = asyncio.Event()

    async def lead(epoch: int) -> None:
        nonlocal crashes
        crashes += 1
        if crashes == 1:
            raise RuntimeError("a bug")
        led_again.set()
        await asyncio.Event().wait()

    leadership = Leadership(db, "test", lead)
    await leadership.start()
    async with asyncio.timeout(10):
        await led_again.wait()
    await leadership.stop()
