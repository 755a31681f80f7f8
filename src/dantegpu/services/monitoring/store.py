"""Logs in PostgreSQL. Named SQL: sql/queries.sql."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.monitoring")


@dataclass(frozen=True, slots=True)
class HeadRow:
    attempt_id: UUID
    job_id: UUID
    epoch: int
    size_bytes: int
    complete: bool
    truncated: bool
    archived: bool
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class ChunkRow:
    start_offset: int
    data: bytes


async def lock_heads(tx: Tx, attempts: Sequence[tuple[UUID, UUID, int]], now: datetime) -> dict[UUID, HeadRow]:
    """Heads of (attempt, job, epoch), made where missing, locked in id order."""
    attempt_ids = [attempt for attempt, _, _ in attempts]
    await tx.run(
        QUERIES["make_heads"], attempt_ids=attempt_ids, job_ids=[job for _, job, _ in attempts],
        epochs=[epoch for _, _, epoch in attempts], now=now,
    )  # fmt: skip
    rows = await tx.all(HeadRow, QUERIES["lock_heads"], attempt_ids=attempt_ids)
    return {row.attempt_id: row for row in rows}


async def append(tx: Tx, heads: Sequence[HeadRow], chunks: Sequence[tuple[UUID, int, bytes]], now: datetime) -> None:
    """Store new chunks (attempt, offset, bytes) and the heads as they are with them."""
    if chunks:
        await tx.run(
            QUERIES["insert_chunks"], attempt_ids=[attempt for attempt, _, _ in chunks],
            offsets=[offset for _, offset, _ in chunks], data=[data for _, _, data in chunks],
        )  # fmt: skip
    await tx.run(
        QUERIES["save_heads"], attempt_ids=[head.attempt_id for head in heads],
        sizes=[head.size_bytes for head in heads], complete=[head.complete for head in heads],
        truncated=[head.truncated for head in heads], now=now,
    )  # fmt: skip


async def head_of_job(tx: Tx, job_id: UUID, epoch: int) -> HeadRow | None:
    """The head of that epoch; 0 = the latest one."""
    return await tx.one(HeadRow, QUERIES["head_of_job"], job_id=job_id, epoch=epoch)


async def chunks_from(tx: Tx, attempt_id: UUID, after: int, limit: int) -> list[ChunkRow]:
    return await tx.all(ChunkRow, QUERIES["chunks_from"], attempt_id=attempt_id, after=after, limit=limit)


async def heads_to_archive(tx: Tx, before: datetime, limit: int) -> list[HeadRow]:
    return await tx.all(HeadRow, QUERIES["heads_to_archive"], before=before, limit=limit)


async def silent_heads(tx: Tx, before: datetime, limit: int) -> list[HeadRow]:
    return await tx.all(HeadRow, QUERIES["silent_heads"], before=before, limit=limit)


async def complete_heads(tx: Tx, attempt_ids: Sequence[UUID]) -> None:
    await tx.run(QUERIES["complete_heads"], attempt_ids=list(attempt_ids))


async def touch_heads(tx: Tx, attempt_ids: Sequence[UUID], now: datetime) -> None:
    await tx.run(QUERIES["touch_heads"], attempt_ids=list(attempt_ids), now=now)


async def archived(tx: Tx, attempt_id: UUID) -> None:
    """The bytes are in storage: drop them here."""
    await tx.run(QUERIES["mark_archived"], attempt_id=attempt_id)
    await tx.run(QUERIES["delete_chunks"], attempt_id=attempt_id)
