"""Schedules in PostgreSQL. Named SQL: sql/schedules.sql."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.scheduler", "schedules")


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """A job that is submitted again and again."""

    id: UUID
    team_id: UUID
    user_id: UUID | None
    spec: bytes
    cron: str
    timezone: str
    created_at: datetime
    next_at: datetime
    stopped_at: datetime | None
    runs: int
    last_job_id: UUID | None


async def insert_schedule(
    tx: Tx, schedule_id: UUID, *, team_id: UUID, user_id: UUID | None, spec: bytes, cron: str, timezone: str,
    next_at: datetime, now: datetime,
) -> ScheduleRow:  # fmt: skip
    row = await tx.one(
        ScheduleRow, QUERIES["insert_schedule"], id=schedule_id, team_id=team_id, user_id=user_id, spec=spec, cron=cron,
        timezone=timezone, next_at=next_at, now=now,
    )  # fmt: skip
    assert row is not None, "it was just inserted"
    return row


async def count_running(tx: Tx, team_id: UUID) -> int:
    return int(await tx.value(QUERIES["count_running"], team_id=team_id))


async def list_schedules(tx: Tx, team_id: UUID, *, before: UUID | None, limit: int) -> list[ScheduleRow]:
    return await tx.all(ScheduleRow, QUERIES["list_schedules"], team_id=team_id, before=before, limit=limit)


async def schedules_by_id(tx: Tx, ids: Sequence[UUID]) -> dict[UUID, ScheduleRow]:
    return {row.id: row for row in await tx.all(ScheduleRow, QUERIES["schedules_by_id"], ids=list(ids))}


async def stop_schedules(tx: Tx, ids: Sequence[UUID], now: datetime) -> None:
    await tx.run(QUERIES["stop_schedules"], ids=list(ids), now=now)


async def due_schedules(tx: Tx, now: datetime, limit: int) -> list[ScheduleRow]:
    """Locked until the transaction ends: a second leader waits, and then finds them not due any more."""
    return await tx.all(ScheduleRow, QUERIES["due_schedules"], now=now, limit=limit)


async def note_run(tx: Tx, schedule_id: UUID, *, due_at: datetime, next_at: datetime, job_id: UUID) -> None:
    await tx.run(QUERIES["note_run"], schedule_id=schedule_id, due_at=due_at, next_at=next_at, job_id=job_id)
