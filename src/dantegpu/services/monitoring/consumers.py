"""NATS edge of the monitoring service: log chunks by request and reply, stored in batches."""

import asyncio
from collections.abc import Mapping
from uuid import UUID

import structlog
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import events_pb2, machine_pb2
from dantegpu.domain.ids import AttemptId, InvalidId, JobId, MachineId
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Tasks
from dantegpu.services.monitoring.service import Chunk, LogService, Stored

log = structlog.get_logger(__name__)

QUEUE_GROUP = "monitoring"
BATCH_MESSAGES = 256
ARCHIVE_INTERVAL_SECONDS = 15.0

type _Request = tuple[Msg, MachineId, machine_pb2.LogAppend]


class LogConsumers:
    """Component. The first message goes at once; what arrives while it is stored is the next batch."""

    def __init__(self, bus: Bus, service: LogService) -> None:
        self._bus = bus
        self._service = service
        self._queue: asyncio.Queue[_Request] = asyncio.Queue(maxsize=10 * BATCH_MESSAGES)
        self._tasks = Tasks("logs")

    async def start(self) -> None:
        await self._bus.subscribe(subjects.ALL_LOGS, self._receive, queue=QUEUE_GROUP)
        self._tasks.loop(self._store_batch, "store")
        self._tasks.loop(self._archive, "archive")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _receive(self, message: Msg) -> None:
        request = machine_pb2.LogAppend.FromString(message.data)
        await self._queue.put((message, subjects.machine_of(message.subject), request))

    async def _store_batch(self) -> None:
        batch = [await self._queue.get()]
        while len(batch) < BATCH_MESSAGES and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        chunks = [
            (machine_id, parsed)
            for _, machine_id, request in batch
            for chunk in request.chunks
            if (parsed := _parse(chunk)) is not None
        ]
        try:
            appended = await self._service.append(chunks)
        except ServiceError as error:
            log.warning("logs_not_stored", messages=len(batch), error=error.message)
            for message, _, _ in batch:
                await self._bus.respond(message, machine_pb2.LogAppended(error="unavailable"))
            return
        for message, machine_id, request in batch:
            await self._bus.respond(message, _acknowledge(request, appended.stored, machine_id))
        for job_id in appended.jobs:
            event = events_pb2.LogAppendedEvent(job_id=str(JobId(job_id)))
            await self._bus.publish(subjects.logs_appended(JobId(job_id)), event)

    async def _archive(self) -> None:
        await asyncio.sleep(ARCHIVE_INTERVAL_SECONDS)
        await self._service.end_abandoned()
        await self._service.archive_ended()


def _parse(chunk: machine_pb2.LogChunk) -> Chunk | None:
    try:
        return Chunk(AttemptId.parse(chunk.attempt_id).uuid, chunk.offset, chunk.data, chunk.last)
    except InvalidId:
        return None


def _acknowledge(
    request: machine_pb2.LogAppend, stored: Mapping[UUID, Stored], machine_id: MachineId
) -> machine_pb2.LogAppended:
    reply = machine_pb2.LogAppended()
    for chunk in request.chunks:
        parsed = _parse(chunk)
        state = stored.get(parsed.attempt_id) if parsed else None
        if state is None:
            log.warning("log_chunk_refused", machine_id=str(machine_id), attempt_id=chunk.attempt_id[:60])
            state = Stored(0, refused=True)
        reply.acks.add(attempt_id=chunk.attempt_id, offset=state.size_bytes, refused=state.refused)
    return reply
