"""Append to logs, read them, move the ended ones to storage."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

import structlog

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, jobs_pb2_grpc, storage_pb2, storage_pb2_grpc
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, JobId, MachineId
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.db import Database
from dantegpu.services.monitoring import store
from dantegpu.services.monitoring.errors import InvalidRange
from dantegpu.services.monitoring.settings import MonitoringSettings
from dantegpu.services.monitoring.store import HeadRow

log = structlog.get_logger(__name__)

PIECE_BYTES = 16 << 20
"""Archived logs lie in pieces of this size, `logs/<job>/<epoch>/<number>`: each fits one internal message."""
READ_BYTES_MAX = 1 << 20
READ_CHUNKS_MAX = 1000
ARCHIVE_CHUNKS_PAGE = 500
KNOWN_ATTEMPTS_MAX = 20_000
LOOP_BATCH = 100


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of an attempt's log as its machine sent them."""

    attempt_id: UUID
    offset: int
    data: bytes
    last: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """How far an attempt's log is stored; `refused`: send no more."""

    size_bytes: int
    refused: bool


@dataclass(frozen=True, slots=True)
class Read:
    epoch: int
    offset: int
    data: bytes
    size_bytes: int
    complete: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class Appended:
    """`stored` per attempt (None: it is not this machine's), and the jobs whose log grew."""

    stored: dict[UUID, Stored]
    jobs: set[UUID]


class LogService:
    def __init__(
        self,
        db: Database,
        jobs: jobs_pb2_grpc.JobServiceStub,
        storage: storage_pb2_grpc.StorageServiceStub,
        clock: Clock,
        settings: MonitoringSettings,
    ) -> None:
        self._db = db
        self._jobs = jobs
        self._storage = storage
        self._clock = clock
        self._settings = settings
        self._known: OrderedDict[UUID, jobs_pb2.ResolvedAttempt] = OrderedDict()

    # --- append -------------------------------------------------------------------------------------------------------

    async def append(self, chunks: Sequence[tuple[MachineId, Chunk]]) -> Appended:
        """Store what is new of the chunks, all in one transaction. Raises Unavailable."""
        await self._resolve({chunk.attempt_id for _, chunk in chunks})
        own = [chunk for machine_id, chunk in chunks if self._is_of(machine_id, chunk.attempt_id)]
        refused = {chunk.attempt_id for _, chunk in chunks} - {chunk.attempt_id for chunk in own}
        stored = {attempt_id: Stored(0, refused=True) for attempt_id in refused}
        if not own:
            return Appended(stored, set())
        now = self._clock.now()
        ids = sorted({chunk.attempt_id for chunk in own})
        attempts = [(i, JobId.parse(self._known[i].job_id).uuid, self._known[i].epoch) for i in ids]
        async with self._db.transaction() as tx:
            before = await store.lock_heads(tx, attempts, now)
            heads = dict(before)
            new: list[tuple[UUID, int, bytes]] = []
            for chunk in own:
                heads[chunk.attempt_id], data = self._extend(heads[chunk.attempt_id], chunk)
                if data:
                    new.append((chunk.attempt_id, heads[chunk.attempt_id].size_bytes - len(data), data))
            changed = [head for attempt_id, head in heads.items() if head != before[attempt_id]]
            if changed:
                await store.append(tx, changed, new, now)
        stored |= {
            attempt_id: Stored(head.size_bytes, refused=head.truncated or head.archived)
            for attempt_id, head in heads.items()
        }
        return Appended(stored, {head.job_id for head in changed})

    def _extend(self, head: HeadRow, chunk: Chunk) -> tuple[HeadRow, bytes]:
        """The head with the chunk, and the part of it that is new. A gap or what is known already adds nothing."""
        if head.complete or chunk.offset > head.size_bytes or chunk.offset < 0:
            return head, b""
        data = chunk.data[head.size_bytes - chunk.offset :]
        room = self._settings.log_limit_bytes - head.size_bytes
        truncated = head.truncated or len(data) > room
        data = data[: max(room, 0)]
        size_bytes = head.size_bytes + len(data)
        ended = chunk.last and (truncated or chunk.offset + len(chunk.data) == size_bytes)
        return replace(head, size_bytes=size_bytes, truncated=truncated, complete=ended), data

    def _is_of(self, machine_id: MachineId, attempt_id: UUID) -> bool:
        resolved = self._known.get(attempt_id)
        return resolved is not None and resolved.machine_id == str(machine_id)

    async def _resolve(self, attempt_ids: set[UUID]) -> None:
        """Whose the attempts are; asked of the scheduler once per attempt."""
        unknown = [str(AttemptId(attempt_id)) for attempt_id in attempt_ids - self._known.keys()]
        if unknown:
            request = jobs_pb2.ResolveAttemptsRequest(attempt_ids=unknown)
            answer = await rpc.call(self._jobs.ResolveAttempts, request, actor=SERVICE)
            for resolved in answer.attempts:
                self._known[AttemptId.parse(resolved.attempt_id).uuid] = resolved
            while len(self._known) > KNOWN_ATTEMPTS_MAX:
                self._known.popitem(last=False)

    # --- read ---------------------------------------------------------------------------------------------------------

    async def read(self, job_id: JobId, epoch: int, offset: int, limit_bytes: int) -> Read:
        """Bytes from `offset` on. The caller has checked whose job it is. Raises InvalidRange."""
        if offset < 0 or epoch < 0:
            raise InvalidRange(f"offset {offset} of epoch {epoch}: neither may be negative")
        limit = min(limit_bytes or READ_BYTES_MAX, READ_BYTES_MAX)
        async with self._db.transaction() as tx:
            head = await store.head_of_job(tx, job_id.uuid, epoch)
            if head is None:
                return Read(epoch, offset, b"", 0, complete=False, truncated=False)
            chunks = [] if head.archived else await store.chunks_from(tx, head.attempt_id, offset, READ_CHUNKS_MAX)
        if head.archived and offset < head.size_bytes:
            data = await self._read_archive(head, offset, limit)
        else:
            data = _join(chunks, offset, limit)
        complete = head.complete and offset + len(data) >= head.size_bytes
        return Read(head.epoch, offset, data, head.size_bytes, complete, head.truncated)

    async def _read_archive(self, head: HeadRow, offset: int, limit: int) -> bytes:
        piece, within = divmod(offset, PIECE_BYTES)
        request = storage_pb2.GetObjectRequest(
            key=_piece_key(head, piece), offset=within, length=min(limit, PIECE_BYTES - within)
        )
        return (await rpc.call(self._storage.GetObject, request, actor=SERVICE, timeout_seconds=15)).data

    # --- archive ------------------------------------------------------------------------------------------------------

    async def archive_ended(self) -> int:
        """Move logs that ended a while ago to storage; how many. Cut off anywhere, it is simply done again."""
        before = self._clock.now() - timedelta(seconds=self._settings.archive_after_seconds)
        async with self._db.transaction() as tx:
            heads = await store.heads_to_archive(tx, before, LOOP_BATCH)
        for head in heads:
            await self._archive(head)
            async with self._db.transaction() as tx:
                await store.archived(tx, head.attempt_id)
        return len(heads)

    async def _archive(self, head: HeadRow) -> None:
        buffer = bytearray()
        piece, offset = 0, 0
        while offset < head.size_bytes:
            async with self._db.transaction() as tx:
                chunks = await store.chunks_from(tx, head.attempt_id, offset, ARCHIVE_CHUNKS_PAGE)
            data = _join(chunks, offset, head.size_bytes)
            if not data:
                raise RuntimeError(f"the log of {AttemptId(head.attempt_id)} has a hole at {offset}")
            offset += len(data)
            buffer += data
            while len(buffer) >= PIECE_BYTES or (offset >= head.size_bytes and buffer):
                await self._put(head, piece, bytes(buffer[:PIECE_BYTES]))
                del buffer[:PIECE_BYTES]
                piece += 1

    async def _put(self, head: HeadRow, piece: int, data: bytes) -> None:
        request = storage_pb2.PutObjectRequest(key=_piece_key(head, piece), data=data)
        await rpc.call(self._storage.PutObject, request, actor=SERVICE, timeout_seconds=30)

    async def end_abandoned(self) -> int:
        """A log whose machine is gone never says that it ended; how many were ended here."""
        now = self._clock.now()
        async with self._db.transaction() as tx:
            silent = await store.silent_heads(
                tx, now - timedelta(seconds=self._settings.abandoned_after_seconds), LOOP_BATCH
            )
        if not silent:
            return 0
        request = jobs_pb2.ResolveAttemptsRequest(attempt_ids=[str(AttemptId(head.attempt_id)) for head in silent])
        answer = await rpc.call(self._jobs.ResolveAttempts, request, actor=SERVICE)
        live = {AttemptId.parse(resolved.attempt_id).uuid for resolved in answer.attempts if resolved.live}
        over = [head.attempt_id for head in silent if head.attempt_id not in live]
        async with self._db.transaction() as tx:
            await store.complete_heads(tx, over)
            await store.touch_heads(tx, sorted(live), now)
        return len(over)


def _piece_key(head: HeadRow, piece: int) -> str:
    return f"logs/{JobId(head.job_id)}/{head.epoch}/{piece}"


def _join(chunks: Iterable[store.ChunkRow], offset: int, limit: int) -> bytes:
    """At most `limit` contiguous bytes from `offset`."""
    data = bytearray()
    position = offset
    for chunk in chunks:
        if chunk.start_offset > position or len(data) >= limit:
            break
        part = chunk.data[position - chunk.start_offset :]
        data += part
        position += len(part)
    return bytes(data[:limit])
