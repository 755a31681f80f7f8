"""kit's bus on a real nats-server: batches, redelivery, lost stores, and ends that end."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence

import pytest
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import events_pb2
from dantegpu.kit.bus import ACK_WAIT_SECONDS, Bus
from dantegpu.kit.errors import Unavailable
from tests.fixtures.scheduler import TIMEOUT_SECONDS, until
from tests.fixtures.servers import NatsForTests


@pytest.fixture
async def bus(nats_server: NatsForTests) -> AsyncIterator[Bus]:
    made = Bus(nats_server.url, nats_server.services_creds, name="test")
    await made.start()
    yield made
    await made.stop()


class Reader:
    """Takes batches; fails as often as it is told to first."""

    def __init__(self, failures: int = 0) -> None:
        self.batches: list[list[bytes]] = []
        self.failures = failures
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, messages: Sequence[Msg]) -> None:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise Unavailable("the database")
        self.batches.append([message.data for message in messages])

    @property
    def seen(self) -> set[bytes]:
        return {data for batch in self.batches for data in batch}

    async def has(self, *wanted: bytes, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        async def all_there() -> bool:
            return self.seen >= set(wanted)

        await until(all_there, timeout_seconds)


async def publish(bus: Bus, *names: bytes) -> None:
    await asyncio.gather(*(bus.publish_stream(subjects.JOB_SUBMITTED, name, name.decode()) for name in names))


async def test_what_arrives_while_a_batch_is_under_way_is_the_next_batch(bus: Bus) -> None:
    reader = Reader()
    await bus.consume(subjects.JOBS, "reader", reader)
    reader.gate.clear()
    await publish(bus, b"first")
    names = [f"{number}".encode() for number in range(50)]
    await publish(bus, *names)
    reader.gate.set()
    await reader.has(b"first", *names)
    assert len(reader.batches) <= 5


async def test_the_same_message_id_twice_arrives_once(bus: Bus) -> None:
    reader = Reader()
    await publish(bus, b"a")
    await publish(bus, b"a", b"b")
    await bus.consume(subjects.JOBS, "reader", reader)
    await reader.has(b"a", b"b")
    assert sum(len(batch) for batch in reader.batches) == 2


async def test_a_batch_whose_handler_failed_is_handed_out_again(bus: Bus) -> None:
    reader = Reader(failures=2)
    await bus.consume(subjects.JOBS, "reader", reader)
    await publish(bus, b"a")
    await reader.has(b"a")


async def test_a_message_is_not_lost_when_its_reader_ends_before_it_is_done(bus: Bus) -> None:
    stuck = Reader()
    stuck.gate.clear()
    consuming = await bus.consume(subjects.JOBS, "reader", stuck)
    await publish(bus, b"a")
    await consuming.close()
    reader = Reader()
    await bus.consume(subjects.JOBS, "reader", reader)
    # At the latest when JetStream takes it for lost: what gives it back sooner may be lost itself.
    await reader.has(b"a", timeout_seconds=2 * ACK_WAIT_SECONDS)
    assert stuck.batches == []


async def test_a_reader_that_ended_while_nats_was_away_takes_nothing_afterwards(
    bus: Bus, nats_server: NatsForTests
) -> None:
    dead = Reader()
    consuming = await bus.consume(subjects.JOBS, "reader", dead)
    await nats_server.server.stop()
    await consuming.close()
    await nats_server.server.start()
    await until_connected(bus)
    reader = Reader()
    await bus.consume(subjects.JOBS, "reader", reader)
    names = [f"{number}".encode() for number in range(20)]
    await publish(bus, *names)
    await reader.has(*names)
    assert dead.batches == []


async def until_connected(bus: Bus) -> None:
    async def connected() -> bool:
        return bus.connected

    await until(connected)


async def test_streams_and_consumers_are_made_again_after_their_store_was_deleted(
    bus: Bus, nats_server: NatsForTests
) -> None:
    reader = Reader()
    await bus.consume(subjects.JOBS, "reader", reader)
    await publish(bus, b"before")
    await reader.has(b"before")
    await nats_server.server.stop()
    shutil.rmtree(nats_server.server.store_path)
    await nats_server.server.start()

    async def published() -> bool:
        try:
            await publish(bus, b"after")
        except Unavailable:
            return False
        return True

    await until(published)
    await reader.has(b"after")


async def test_a_bus_stops_at_once_although_a_reader_is_busy_and_nats_is_gone(nats_server: NatsForTests) -> None:
    bus = Bus(nats_server.url, nats_server.services_creds, name="test")
    await bus.start()
    stuck = Reader()
    stuck.gate.clear()
    await bus.consume(subjects.JOBS, "reader", stuck)
    await publish(bus, b"a")
    await nats_server.server.stop()
    async with asyncio.timeout(10):
        await bus.stop()
    await nats_server.server.start()


async def test_a_message_that_its_handler_cannot_read_does_not_end_the_subscription(bus: Bus) -> None:
    heard: list[str] = []

    async def handle(message: Msg) -> None:
        heard.append(events_pb2.WalletChanged.FromString(message.data).team_id)

    await bus.subscribe("dante.billing.*", handle)
    await bus.publish("dante.billing.x", b"\xff\xff\xff")
    await bus.publish("dante.billing.x", events_pb2.WalletChanged(team_id="t"))

    async def arrived() -> bool:
        return heard == ["t"]

    await until(arrived)


async def test_a_request_that_nobody_answers_is_unavailable(bus: Bus) -> None:
    with pytest.raises(Unavailable):
        await bus.request("dante.nobody", events_pb2.WalletChanged(), events_pb2.WalletChanged, timeout_seconds=1)
