"""Transactional outbox: a row and the message about it commit together; a relay publishes what is committed."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import Message

from dantegpu.contracts.envelope import wrap
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import EventId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.kit.telemetry import current_request_id, current_traceparent

RELAY_BATCH = 500
RELAY_PAUSE_SECONDS = 0.02
"""After a batch: what is added meanwhile is the next one. Who is in a hurry is woken in his own process."""
SWEEP_INTERVAL_SECONDS = 5.0
"""How long a message of another, killed replica can lie before this one's relay finds it."""


@dataclass(frozen=True, slots=True)
class _Row:
    id: int
    subject: str
    message_id: str
    payload: bytes


class Outbox:
    """Writes events in the caller's transaction and relays them to JetStream in id order, at least once."""

    def __init__(self, db: Database, bus: Bus, clock: Clock) -> None:
        self._db = db
        self._bus = bus
        self._clock = clock
        self._wakeup = Wakeup()
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
        await tx.send(
            "INSERT INTO outbox (subject, message_id, payload)"
            " SELECT * FROM unnest(%(subjects)s::text[], %(ids)s::text[], %(payloads)s::bytea[])",
            subjects=subjects, ids=ids, payloads=payloads,
        )  # fmt: skip
        tx.after_commit.append(self._wakeup.notify)

    async def start(self) -> None:
        self._bus.on_reconnect(self._wakeup.notify)
        self._tasks.loop(self._relay, "relay")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _relay(self) -> None:
        if not self._bus.connected or await self._relay_batch() < RELAY_BATCH:
            await asyncio.sleep(RELAY_PAUSE_SECONDS)
            await self._wakeup.wait(SWEEP_INTERVAL_SECONDS)

    async def _relay_batch(self) -> int:
        # No lock over the network: two replicas may publish the same row, and JetStream knows it by its Nats-Msg-Id.
        async with self._db.statement() as tx:
            rows = await tx.all(
                _Row, "SELECT id, subject, message_id, payload FROM outbox ORDER BY id LIMIT %(n)s", n=RELAY_BATCH
            )
        if not rows:
            return 0
        results = await asyncio.gather(
            *(self._bus.publish_stream(row.subject, row.payload, row.message_id) for row in rows),
            return_exceptions=True,
        )
        # A row stays until NATS has acknowledged it, so a crash repeats it; one that is refused holds up no other.
        sent = [row.id for row, result in zip(rows, results, strict=True) if result is None]
        if sent:
            async with self._db.statement() as tx:
                await tx.run("DELETE FROM outbox WHERE id = ANY(%(ids)s)", ids=sent)
        if failed := [result for result in results if result is not None]:
            raise failed[0]
        return len(rows)
