"""What jobs wait for, and until when they may go on, in PostgreSQL. Named SQL: sql/lifetimes.sql."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx
from dantegpu.services.scheduler.store import JobRow

QUERIES = Queries.of("dantegpu.services.scheduler", "lifetimes")
NEVER = datetime(9999, 1, 1, tzinfo=UTC)
"""`not_before` of a job that waits for others: no round of placement takes it."""


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A held job that need not wait any longer: it may begin, or `failed_id` has not succeeded."""

    id: UUID
    is_array: bool
    ready: bool
    failed_id: UUID | None


async def hold_jobs(tx: Tx, job_id: UUID, after: Sequence[UUID], detail: str) -> JobRow:
    rows = await tx.all(
        JobRow, QUERIES["hold_jobs"], job_ids=[job_id] * len(after), after_ids=list(after), detail=detail, never=NEVER
    )
    return rows[0]


async def set_deadlines(tx: Tx, deadlines: Mapping[UUID, datetime]) -> list[JobRow]:
    return await tx.all(JobRow, QUERIES["set_deadlines"], job_ids=list(deadlines), deadlines=list(deadlines.values()))


async def held_and_due(tx: Tx, limit: int) -> list[HeldRow]:
    return await tx.all(HeldRow, QUERIES["held_and_due"], limit=limit)


async def release_jobs(tx: Tx, ids: Sequence[UUID]) -> list[JobRow]:
    return await tx.all(JobRow, QUERIES["release_jobs"], ids=list(ids))


async def past_deadline(tx: Tx, *, now: datetime, ending_reasons: list[str], limit: int) -> list[JobRow]:
    return await tx.all(JobRow, QUERIES["past_deadline"], now=now, ending_reasons=ending_reasons, limit=limit)
