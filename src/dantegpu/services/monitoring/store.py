"""Logs in PostgreSQL. Named SQL: sql/queries.sql."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.monitoring")


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """Whose an attempt is."""

    attempt_id: UUID
    job_id: UUID
    team_id: UUID
    epoch: int
    node_rank: int


@dataclass(frozen=True, slots=True)
class HeadRow:
    """What is stored of an attempt's log. `tail_offset`: where the last chunk begins."""

    attempt_id: UUID
    job_id: UUID
    epoch: int
    size_bytes: int
    complete: bool
    truncated: bool
    archived: bool
    updated_at: datetime
    tail_offset: int
    team_id: UUID | None
    node_rank: int


@dataclass(frozen=True, slots=True)
class ChunkRow:
    start_offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to store at `offset`: as a new chunk, or at the end of the chunk that begins there."""

    attempt_id: UUID
    offset: int
    data: bytes


async def lock_heads(tx: Tx, attempts: Sequence[AttemptRow], now: datetime) -> dict[UUID, HeadRow]:
    """Heads of the attempts, made where missing, locked in id order."""
    attempt_ids = [attempt.attempt_id for attempt in attempts]
    await tx.run(
        QUERIES["make_heads"], attempt_ids=attempt_ids, job_ids=[attempt.job_id for attempt in attempts],
        team_ids=[attempt.team_id for attempt in attempts], epochs=[attempt.epoch for attempt in attempts],
        node_ranks=[attempt.node_rank for attempt in attempts], now=now,
    )  # fmt: skip
    rows = await tx.all(HeadRow, QUERIES["lock_heads"], attempt_ids=attempt_ids)
    return {row.attempt_id: row for row in rows}


async def append(
    tx: Tx, heads: Sequence[HeadRow], new: Sequence[Piece], lengthened: Sequence[Piece], now: datetime
) -> None:
    """Store new chunks, bytes at the end of known ones, and the heads as they are with them."""
    if lengthened:
        changed = await tx.run(QUERIES["lengthen_chunks"], **_columns(lengthened))
        assert changed == len(lengthened), "a head points to a last chunk that is not there"
    if new:
        await tx.run(QUERIES["insert_chunks"], **_columns(new))
    await tx.run(
        QUERIES["save_heads"], attempt_ids=[head.attempt_id for head in heads],
        sizes=[head.size_bytes for head in heads], tails=[head.tail_offset for head in heads],
        complete=[head.complete for head in heads], truncated=[head.truncated for head in heads], now=now,
    )  # fmt: skip


def _columns(pieces: Sequence[Piece]) -> dict[str, object]:
    return {
        "attempt_ids": [piece.attempt_id for piece in pieces],
        "offsets": [piece.offset for piece in pieces],
        "data": [piece.data for piece in pieces],
    }


async def head_of_job(tx: Tx, job_id: UUID, epoch: int, node_rank: int) -> HeadRow | None:
    """The node's head of that epoch; 0 = the latest one."""
    return await tx.one(HeadRow, QUERIES["head_of_job"], job_id=job_id, epoch=epoch, node_rank=node_rank)


async def chunks_between(tx: Tx, attempt_id: UUID, start: int, stop: int) -> list[ChunkRow]:
    """All chunks with bytes of [start, stop), in order; the first may begin earlier, the last end later."""
    return await tx.all(ChunkRow, QUERIES["chunks_between"], attempt_id=attempt_id, start=start, stop=stop)


async def heads_to_archive(tx: Tx, before: datetime, limit: int) -> list[HeadRow]:
    return await tx.all(HeadRow, QUERIES["heads_to_archive"], before=before, limit=limit)


async def silent_heads(tx: Tx, before: datetime, limit: int) -> list[HeadRow]:
    return await tx.all(HeadRow, QUERIES["silent_heads"], before=before, limit=limit)


async def complete_heads(tx: Tx, attempt_ids: Sequence[UUID], before: datetime) -> int:
    return await tx.run(QUERIES["complete_heads"], attempt_ids=list(attempt_ids), before=before)


async def touch_heads(tx: Tx, attempt_ids: Sequence[UUID], now: datetime) -> None:
    await tx.run(QUERIES["touch_heads"], attempt_ids=list(attempt_ids), now=now)


async def archived(tx: Tx, attempt_id: UUID) -> None:
    """The bytes are in storage: drop them here."""
    await tx.run(QUERIES["mark_archived"], attempt_id=attempt_id)
    await tx.run(QUERIES["delete_chunks"], attempt_id=attempt_id)


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """Whose an attempt's series is, and which of its points are kept: those with a number that `step` divides."""

    attempt_id: UUID
    job_id: UUID
    team_id: UUID
    epoch: int
    node_rank: int
    step: int
    points: int
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class PointRow:
    number: int
    point: bytes


async def lock_series(tx: Tx, attempts: Sequence[AttemptRow], now: datetime) -> dict[UUID, SeriesRow]:
    """Series of the attempts, made where missing, locked in id order."""
    attempt_ids = [attempt.attempt_id for attempt in attempts]
    await tx.run(
        QUERIES["make_metric_heads"], attempt_ids=attempt_ids, job_ids=[attempt.job_id for attempt in attempts],
        team_ids=[attempt.team_id for attempt in attempts], epochs=[attempt.epoch for attempt in attempts],
        ranks=[attempt.node_rank for attempt in attempts], now=now,
    )  # fmt: skip
    rows = await tx.all(SeriesRow, QUERIES["lock_metric_heads"], attempt_ids=attempt_ids)
    return {row.attempt_id: row for row in rows}


async def add_points(tx: Tx, points: Sequence[tuple[UUID, int, bytes]], points_max: int, now: datetime) -> None:
    """Points as (attempt, number, what it says), into locked series; those that grow too long are thinned out."""
    attempt_ids = [attempt_id for attempt_id, _, _ in points]
    await tx.run(
        QUERIES["add_metric_points"], attempt_ids=attempt_ids, numbers=[number for _, number, _ in points],
        points=[point for _, _, point in points], now=now,
    )  # fmt: skip
    while await tx.run(QUERIES["thin_metrics"], attempt_ids=attempt_ids, points_max=points_max):
        pass  # a batch may bring more than one halving takes away


async def series_of_job(tx: Tx, job_id: UUID, epoch: int, node_rank: int) -> SeriesRow | None:
    """The series of that epoch; 0 = the latest one."""
    return await tx.one(SeriesRow, QUERIES["metric_head_of_job"], job_id=job_id, epoch=epoch, node_rank=node_rank)


async def points_after(tx: Tx, attempt_id: UUID, after: int) -> list[PointRow]:
    return await tx.all(PointRow, QUERIES["metric_points_after"], attempt_id=attempt_id, after=after)


async def drop_old_series(tx: Tx, before: datetime, limit: int) -> int:
    return await tx.run(QUERIES["drop_old_metrics"], before=before, limit=limit)
