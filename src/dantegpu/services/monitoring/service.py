"""Append to logs, read them, move the ended ones to storage."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

import structlog
from prometheus_client import Counter

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, jobs_pb2_grpc, storage_pb2, storage_pb2_grpc
from dantegpu.contracts.objects import epoch_folder
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, JobId, MachineId, TeamId
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, Actor
from dantegpu.kit.db import Database
from dantegpu.services.monitoring import store
from dantegpu.services.monitoring.errors import InvalidRange, LogLost, LogNotFound
from dantegpu.services.monitoring.settings import MonitoringSettings
from dantegpu.services.monitoring.store import AttemptRow, HeadRow, Piece

log = structlog.get_logger(__name__)

PIECE_BYTES = 16 << 20
"""Archived logs lie in pieces of this size, `logs/<job>/<epoch>[-<node>]/<number>`: each fits one internal message."""
READ_BYTES_MAX = 1 << 20
CHUNK_BYTES_MAX = 256 << 10
TAIL_BYTES_MIN = 2 << 10
"""A last chunk below this is lengthened: a job that prints line by line makes no row per line."""
KNOWN_ATTEMPTS_MAX = 20_000
LOOP_BATCH = 100
STORAGE_TIMEOUT_SECONDS = 30.0

_BYTES = Counter("dante_logs_bytes_total", "Bytes of job logs", ["what"])
_REFUSED = Counter("dante_logs_refused_total", "Attempts' chunks refused", ["reason"])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of an attempt's log as its machine sent them."""

    attempt_id: UUID
    offset: int
    data: bytes
    last: bool

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Stored:
    """How far an attempt's log is stored; `refused`: send no more."""

    size_bytes: int
    refused: bool


@dataclass(frozen=True, slots=True)
class Read:
    """A piece of a log. `complete`: the log has ended and the piece reaches its end."""

    epoch: int
    offset: int
    data: bytes
    size_bytes: int
    complete: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class Appended:
    """How far each machine's attempts are stored, and the jobs whose log grew or ended."""

    stored: Mapping[tuple[MachineId, UUID], Stored]
    jobs: set[UUID]


class LogService:
    """Logs of attempts: fresh ones in PostgreSQL, old ones in storage, one way to read both."""

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
        owners = await self.resolve({chunk.attempt_id for _, chunk in chunks})
        stored: dict[tuple[MachineId, UUID], Stored] = {}
        own: list[tuple[MachineId, Chunk]] = []
        for machine_id, chunk in chunks:
            owner = owners.get(chunk.attempt_id)
            if owner is not None and owner.machine_id == str(machine_id):
                own.append((machine_id, chunk))
            else:
                _REFUSED.labels("not_its_attempt").inc()
                stored[machine_id, chunk.attempt_id] = Stored(0, refused=True)
        if not own:
            return Appended(stored, set())
        ids = sorted({chunk.attempt_id for _, chunk in own})
        heads, changed = await self._store(
            [_attempt_row(attempt_id, owners[attempt_id]) for attempt_id in ids], [chunk for _, chunk in own]
        )
        for machine_id, chunk in own:
            head = heads[chunk.attempt_id]
            refused = head.truncated or (head.complete and chunk.end > head.size_bytes)
            before = stored.get((machine_id, chunk.attempt_id))
            stored[machine_id, chunk.attempt_id] = Stored(
                head.size_bytes, refused=refused or (before is not None and before.refused)
            )
        return Appended(stored, {head.job_id for head in changed})

    async def _store(
        self, attempts: Sequence[AttemptRow], chunks: Sequence[Chunk]
    ) -> tuple[dict[UUID, HeadRow], list[HeadRow]]:
        now = self._clock.now()
        added: dict[UUID, bytearray] = {}
        async with self._db.transaction() as tx:
            before = await store.lock_heads(tx, attempts, now)
            heads = dict(before)
            for chunk in chunks:
                heads[chunk.attempt_id], data = self._extend(heads[chunk.attempt_id], chunk)
                if data:
                    added.setdefault(chunk.attempt_id, bytearray()).extend(data)
            new: list[Piece] = []
            lengthened: list[Piece] = []
            for attempt_id, data in added.items():
                tail_offset = _cut(before[attempt_id], bytes(data), new, lengthened)
                heads[attempt_id] = replace(heads[attempt_id], tail_offset=tail_offset)
            changed = [head for attempt_id, head in heads.items() if head != before[attempt_id]]
            if changed:
                await store.append(tx, changed, new, lengthened, now)
        _BYTES.labels("stored").inc(sum(map(len, added.values())))
        return heads, changed

    def _extend(self, head: HeadRow, chunk: Chunk) -> tuple[HeadRow, bytes]:
        """The head with the chunk, and the part of it that is new. A gap or what is known already adds nothing."""
        if head.complete or chunk.offset > head.size_bytes or chunk.offset < 0:
            return head, b""
        data = chunk.data[head.size_bytes - chunk.offset :]
        room = self._settings.log_limit_bytes - head.size_bytes
        # The daemon stops at the same limit, so a log that reaches it counts as cut.
        truncated = len(data) >= room
        data = data[:room]
        size_bytes = head.size_bytes + len(data)
        complete = truncated or (chunk.last and chunk.end == size_bytes)
        return replace(head, size_bytes=size_bytes, truncated=truncated, complete=complete), data

    async def resolve(self, attempt_ids: set[UUID]) -> dict[UUID, jobs_pb2.ResolvedAttempt]:
        """Whose the attempts are; asked of the scheduler once per attempt. Unknown ones are left out."""
        found = {attempt_id: self._known[attempt_id] for attempt_id in attempt_ids if attempt_id in self._known}
        for attempt_id in found:
            self._known.move_to_end(attempt_id)
        unknown = [str(AttemptId(attempt_id)) for attempt_id in attempt_ids - found.keys()]
        if unknown:
            request = jobs_pb2.ResolveAttemptsRequest(attempt_ids=unknown)
            answer = await rpc.call(self._jobs.ResolveAttempts, request, actor=SERVICE)
            for resolved in answer.attempts:
                attempt_id = AttemptId.parse(resolved.attempt_id).uuid
                self._known[attempt_id] = found[attempt_id] = resolved
            while len(self._known) > KNOWN_ATTEMPTS_MAX:
                self._known.popitem(last=False)
        return found

    # --- read ---------------------------------------------------------------------------------------------------------

    async def read(
        self, actor: Actor, job_id: JobId, epoch: int, offset: int, limit_bytes: int, node_rank: int = 0
    ) -> Read:
        """Bytes from `offset` on; an attempt without a log has an empty one. Raises Unauthenticated, InvalidRange,
        LogNotFound."""
        if not actor.is_service:
            actor.require_team()
        if offset < 0 or epoch < 0 or limit_bytes < 0:
            raise InvalidRange("epoch, offset and limit are not negative")
        limit = min(limit_bytes or READ_BYTES_MAX, READ_BYTES_MAX)
        async with self._db.transaction() as tx:
            head = await store.head_of_job(tx, job_id.uuid, epoch, node_rank)
            if head is not None and not _may_read(actor, head):
                raise LogNotFound(job_id)
            if head is None or offset >= head.size_bytes:
                return _read(head, epoch, offset, b"")
            chunks = [] if head.archived else await store.chunks_between(tx, head.attempt_id, offset, offset + limit)
        data = _join(chunks, offset, min(limit, head.size_bytes - offset))
        if not data:
            # Archived, perhaps between the two statements.
            data = await self._read_archive(head, offset, limit)
        return _read(head, epoch, offset, data)

    async def _read_archive(self, head: HeadRow, offset: int, limit: int) -> bytes:
        piece, within = divmod(offset, PIECE_BYTES)
        key = _piece_key(head, piece)
        request = storage_pb2.GetObjectRequest(key=key, offset=within, length=min(limit, PIECE_BYTES - within))
        answer = await rpc.call(
            self._storage.GetObject, request, actor=SERVICE, timeout_seconds=STORAGE_TIMEOUT_SECONDS
        )
        if not answer.data:
            raise LogLost(JobId(head.job_id), key)
        return answer.data

    # --- archive ------------------------------------------------------------------------------------------------------

    async def archive_ended(self) -> int:
        """Move logs that ended a while ago to storage; how many. Cut off anywhere, it is simply done again."""
        before = self._clock.now() - timedelta(seconds=self._settings.archive_after_seconds)
        async with self._db.transaction() as tx:
            heads = await store.heads_to_archive(tx, before, LOOP_BATCH)
        done = 0
        for head in heads:
            done += await self._archive(head)
        return done

    async def _archive(self, head: HeadRow) -> bool:
        """False when another replica did it meanwhile. Only whole pieces are put, so one that reads while the other
        deletes puts nothing."""
        for start in range(0, head.size_bytes, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, head.size_bytes)
            async with self._db.transaction() as tx:
                chunks = await store.chunks_between(tx, head.attempt_id, start, stop)
            data = await asyncio.to_thread(_join, chunks, start, stop - start)
            if len(data) != stop - start:
                await self._check_archived(head)
                return False
            request = storage_pb2.PutObjectRequest(key=_piece_key(head, start // PIECE_BYTES), data=data)
            await rpc.call(self._storage.PutObject, request, actor=SERVICE, timeout_seconds=STORAGE_TIMEOUT_SECONDS)
        async with self._db.transaction() as tx:
            await store.archived(tx, head.attempt_id)
        _BYTES.labels("archived").inc(head.size_bytes)
        return True

    async def _check_archived(self, head: HeadRow) -> None:
        async with self._db.transaction() as tx:
            now = await store.head_of_job(tx, head.job_id, head.epoch, head.node_rank)
        if now is None or not now.archived:
            log.error("log_has_a_hole", attempt_id=str(AttemptId(head.attempt_id)), size_bytes=head.size_bytes)

    async def end_abandoned(self) -> int:
        """A log whose machine is gone never says that it ended; how many were ended here."""
        now = self._clock.now()
        before = now - timedelta(seconds=self._settings.abandoned_after_seconds)
        async with self._db.transaction() as tx:
            silent = await store.silent_heads(tx, before, LOOP_BATCH)
        if not silent:
            return 0
        request = jobs_pb2.ResolveAttemptsRequest(attempt_ids=[str(AttemptId(head.attempt_id)) for head in silent])
        answer = await rpc.call(self._jobs.ResolveAttempts, request, actor=SERVICE)
        live = {AttemptId.parse(resolved.attempt_id).uuid for resolved in answer.attempts if resolved.live}
        over = [head.attempt_id for head in silent if head.attempt_id not in live]
        async with self._db.transaction() as tx:
            ended = await store.complete_heads(tx, sorted(over), before)
            await store.touch_heads(tx, sorted(live), now)
        return ended


def _attempt_row(attempt_id: UUID, owner: jobs_pb2.ResolvedAttempt) -> AttemptRow:
    return AttemptRow(
        attempt_id, JobId.parse(owner.job_id).uuid, TeamId.parse(owner.team_id).uuid, owner.epoch, owner.node_rank
    )


def _cut(head: HeadRow, data: bytes, new: list[Piece], lengthened: list[Piece]) -> int:
    """Lay new bytes into chunks: the last one is lengthened while it is short. Returns where the last one begins."""
    tail_offset, offset = head.tail_offset, head.size_bytes
    if 0 < offset - tail_offset < TAIL_BYTES_MIN:
        lengthened.append(Piece(head.attempt_id, tail_offset, data[:CHUNK_BYTES_MAX]))
        offset += len(data[:CHUNK_BYTES_MAX])
        data = data[CHUNK_BYTES_MAX:]
    while data:
        new.append(Piece(head.attempt_id, offset, data[:CHUNK_BYTES_MAX]))
        tail_offset = offset
        offset += len(data[:CHUNK_BYTES_MAX])
        data = data[CHUNK_BYTES_MAX:]
    return tail_offset


def _may_read(actor: Actor, head: HeadRow) -> bool:
    if actor.is_service or actor.operator:
        return True
    return actor.team_id is not None and actor.team_id.uuid == head.team_id


def _read(head: HeadRow | None, epoch: int, offset: int, data: bytes) -> Read:
    if head is None:
        return Read(epoch, offset, b"", 0, complete=False, truncated=False)
    complete = head.complete and offset + len(data) >= head.size_bytes
    return Read(head.epoch, offset, data, head.size_bytes, complete, head.truncated)


def _piece_key(head: HeadRow, piece: int) -> str:
    return f"logs/{JobId(head.job_id)}/{epoch_folder(head.epoch, head.node_rank)}/{piece}"


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
