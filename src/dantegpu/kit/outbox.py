"""Transactional outbox: a row and the message about it commit together; a relay publishes what is committed."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from dantegpu.contracts.envelope import wrap
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import EventId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.lifecycle import Pace, Tasks, Wakeup
from dantegpu.kit.telemetry import current_request_id, current_traceparent

RELAY_BATCH = 500
RELAY_PAUSE_SECONDS = 0.02
"""After a batch, at least: what is added meanwhile is the next one. Who is in a hurry is woken in his own process."""
MAX_FRESH = 20_000
"""Messages kept in memory until they are published; what is over is read from the table."""
SWEEP_INTERVAL_SECONDS = 5.0
"""How long a message of another, killed replica can lie before this one's relay finds it."""


@dataclass(frozen=True, slots=True)
class _Row:
    id: int
    subject: str
    message_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Id:
    id: int


class Outbox:
    """Writes events in the caller's transaction and relays them to JetStream, at least once.

    What this process has committed goes out from memory; the table says what is left after a crash or a failure.
    """

    def __init__(self, db: Database, bus: Bus, clock: Clock) -> None:
        self._db = db
        self._bus = bus
        self._clock = clock
        self._fresh: deque[_Row] = deque()
        """Committed here and not published yet, in the order of the commits."""
        self._sweep_at_seconds = 0.0
        self._wakeup = Wakeup()
        self._pace = Pace(RELAY_PAUSE_SECONDS)
        self._tasks = Tasks(f"outbox {db.schema}")

    async def add(self, tx: Tx, events: Iterable[tuple[str, Message]]) -> None:
        """Publish each (subject, event) once `tx` has committed."""
        subjects: list[str] = []
        ids: list[str] = []
        payloads: list[bytes] = []
        actor, traceparent, request_id = current_actor().to_proto(), current_traceparent(), current_request_id()
        for subject, event in events:
            envelope = wrap(
                event,
                event_id=EventId.new(),
                occurred_at=self._clock.now(),
                actor=actor,
                traceparent=traceparent,
                request_id=request_id,
            )
            subjects.append(subject)
            ids.append(envelope.id)
            payloads.append(envelope.SerializeToString())
        if not subjects:
            return
        written = await tx.ask(
            _Id,
            "INSERT INTO outbox (subject, message_id, payload)"
            " SELECT * FROM unnest(%(subjects)s::text[], %(ids)s::text[], %(payloads)s::bytea[]) RETURNING id",
            subjects=subjects, ids=ids, payloads=payloads,
        )  # fmt: skip
        tx.after_commit.append(
            lambda: self._committed(map(_Row, (row.id for row in written.known()), subjects, ids, payloads))
        )

    def _committed(self, rows: Iterable[_Row]) -> None:
        self._fresh.extend(rows)
        if len(self._fresh) > MAX_FRESH:
            self._fresh.clear()
            self._sweep_at_seconds = 0.0
        self._wakeup.notify()

    async def start(self) -> None:
        self._bus.on_reconnect(self._sweep_now)
        self._tasks.loop(self._relay, "relay")

    async def stop(self) -> None:
        await self._tasks.stop()

    def _sweep_now(self) -> None:
        self._sweep_at_seconds = 0.0
        self._wakeup.notify()

    async def _relay(self) -> None:
        if not self._bus.connected:
            self._fresh.clear()  # they are in the table
            await self._wakeup.wait(SWEEP_INTERVAL_SECONDS)
            return
        self._pace.begin()
        rows = [self._fresh.popleft() for _ in range(min(len(self._fresh), RELAY_BATCH))]
        await self._publish(rows)
        if time.monotonic() >= self._sweep_at_seconds:
            await self._publish(await self._left_over())
        elif len(rows) < RELAY_BATCH:
            await self._pace.rest()
            if not self._fresh:
                await self._wakeup.wait(max(0.0, self._sweep_at_seconds - time.monotonic()))

    async def _left_over(self) -> list[_Row]:
        # No lock over the network: two replicas may publish the same row, and JetStream knows it by its Nats-Msg-Id.
        async with self._db.statement() as tx:
            rows = await tx.all(
                _Row, "SELECT id, subject, message_id, payload FROM outbox ORDER BY id LIMIT %(n)s", n=RELAY_BATCH
            )
        if len(rows) < RELAY_BATCH:
            self._sweep_at_seconds = time.monotonic() + SWEEP_INTERVAL_SECONDS
        fresh = {row.id for row in self._fresh}
        return [row for row in rows if row.id not in fresh]

    async def _publish(self, rows: Sequence[_Row]) -> None:
        if not rows:
            return
        results = await asyncio.gather(
            *(self._bus.publish_stream(row.subject, row.payload, row.message_id) for row in rows),
            return_exceptions=True,
        )
        # A row stays until NATS has acknowledged it, so a crash repeats it; one that is refused holds up no other.
        sent = [row.id for row, result in zip(rows, results, strict=True) if result is None]
        if sent:
            # Should a crash bring them back, they are sent twice and known by their Nats-Msg-Id.
            async with self._db.transaction(durable=False) as tx:
                await tx.send("DELETE FROM outbox WHERE id = ANY(%(ids)s)", ids=sent)
        if failed := [result for result in results if result is not None]:
            self._sweep_at_seconds = 0.0
            raise failed[0]
