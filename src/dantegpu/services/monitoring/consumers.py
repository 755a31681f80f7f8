"""NATS edge of the monitoring service: log chunks by request and reply, metrics, both stored in batches."""

import asyncio

import structlog
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import events_pb2, machine_pb2
from dantegpu.domain.ids import AttemptId, InvalidId, JobId, MachineId
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.services.monitoring.series import DROP_BATCH, SeriesService
from dantegpu.services.monitoring.service import LOOP_BATCH, Appended, Chunk, LogService, Stored

log = structlog.get_logger(__name__)

QUEUE_GROUP = "monitoring"
BATCH_MESSAGES_MAX = 256
BATCH_BYTES_MAX = 8 << 20
WAITING_BYTES_MAX = 16 << 20
"""Above it nothing is taken from the NATS client, whose own queue is bounded, too; what does not fit there is sent
again by the machine."""

POINTS_WAITING_MAX = 20_000
BATCH_POINTS_MAX = 2_000
DROP_INTERVAL_SECONDS = 600.0

type _Request = tuple[Msg, MachineId, machine_pb2.LogAppend]


class LogConsumers:
    """Component. The first message goes at once; what arrives while it is stored is the next batch."""

    def __init__(self, bus: Bus, service: LogService, archive_interval_seconds: float) -> None:
        self._bus = bus
        self._service = service
        self._archive_interval_seconds = archive_interval_seconds
        self._waiting: asyncio.Queue[_Request] = asyncio.Queue()
        self._waiting_bytes = 0
        self._room = Wakeup()
        self._archive_now = Wakeup()
        self._tasks = Tasks("logs")

    async def start(self) -> None:
        await self._bus.subscribe(subjects.ALL_LOGS, self._receive, queue=QUEUE_GROUP)
        self._tasks.loop(self._store_batch, "store")
        self._tasks.loop(self._archive, "archive")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _receive(self, message: Msg) -> None:
        request = machine_pb2.LogAppend.FromString(message.data)
        machine_id = subjects.machine_of(message.subject)
        while self._waiting_bytes >= WAITING_BYTES_MAX:
            await self._room.wait()
        self._waiting_bytes += len(message.data)
        self._waiting.put_nowait((message, machine_id, request))

    async def _next_batch(self) -> list[_Request]:
        batch = [await self._waiting.get()]
        batch_bytes = len(batch[0][0].data)
        while len(batch) < BATCH_MESSAGES_MAX and batch_bytes < BATCH_BYTES_MAX and not self._waiting.empty():
            batch.append(self._waiting.get_nowait())
            batch_bytes += len(batch[-1][0].data)
        self._waiting_bytes -= batch_bytes
        self._room.notify()
        return batch

    async def _store_batch(self) -> None:
        batch = await self._next_batch()
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
            await self._bus.respond(message, _acknowledge(request, appended, machine_id))
        if appended.jobs:
            event = events_pb2.LogsAppended(job_ids=[str(JobId(job_id)) for job_id in appended.jobs])
            await self._bus.publish(subjects.LOGS_APPENDED, event)

    async def _archive(self) -> None:
        await self._service.end_abandoned()
        if await self._service.archive_ended() < LOOP_BATCH:
            await self._archive_now.wait(self._archive_interval_seconds)


class MetricConsumers:
    """Component. Nobody waits for an answer: what does not fit, or comes while the database is away, is dropped."""

    def __init__(self, bus: Bus, series: SeriesService) -> None:
        self._bus = bus
        self._series = series
        self._waiting: asyncio.Queue[tuple[MachineId, machine_pb2.MetricsPoint]] = asyncio.Queue(POINTS_WAITING_MAX)
        self._drop_now = Wakeup()
        self._tasks = Tasks("metrics")

    async def start(self) -> None:
        await self._bus.subscribe(subjects.ALL_METRICS, self._receive, queue=QUEUE_GROUP)
        self._tasks.loop(self._store_batch, "store")
        self._tasks.loop(self._drop_old, "drop old")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _receive(self, message: Msg) -> None:
        machine_id = subjects.machine_of(message.subject)
        for point in machine_pb2.MetricsReport.FromString(message.data).points:
            if self._waiting.full():
                log.warning("metrics_dropped", machine_id=str(machine_id))
                return
            self._waiting.put_nowait((machine_id, point))

    async def _store_batch(self) -> None:
        batch = [await self._waiting.get()]
        while len(batch) < BATCH_POINTS_MAX and not self._waiting.empty():
            batch.append(self._waiting.get_nowait())
        try:
            await self._series.add(batch)
        except ServiceError as error:
            log.warning("metrics_not_stored", points=len(batch), error=error.message)

    async def _drop_old(self) -> None:
        if await self._series.drop_old() < DROP_BATCH:
            await self._drop_now.wait(DROP_INTERVAL_SECONDS)


def _parse(chunk: machine_pb2.LogChunk) -> Chunk | None:
    try:
        return Chunk(AttemptId.parse(chunk.attempt_id).uuid, chunk.offset, chunk.data, chunk.last)
    except InvalidId:
        return None


def _acknowledge(request: machine_pb2.LogAppend, appended: Appended, machine_id: MachineId) -> machine_pb2.LogAppended:
    reply = machine_pb2.LogAppended()
    for chunk in request.chunks:
        parsed = _parse(chunk)
        state = appended.stored[machine_id, parsed.attempt_id] if parsed else Stored(0, refused=True)
        if state.refused:
            log.info("log_chunk_refused", machine_id=str(machine_id), attempt_id=chunk.attempt_id[:60])
        reply.acks.add(attempt_id=chunk.attempt_id, offset=state.size_bytes, refused=state.refused)
    return reply
