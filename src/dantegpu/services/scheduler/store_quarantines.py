"""Machines in quarantine, in PostgreSQL. Named SQL: sql/quarantines.sql."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.scheduler", "quarantines")


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """A machine that gets no new work until `until`; `times` in a row."""

    machine_id: UUID
    since: datetime
    until: datetime
    reason: str
    times: int
    released_by: str


@dataclass(frozen=True, slots=True)
class FaultyRow:
    """A machine that failed so many times in a row, for so many teams."""

    machine_id: UUID
    incidents: int
    teams: int


async def faulty_machines(tx: Tx, *, since: datetime, faults: int, limit: int) -> list[FaultyRow]:
    return await tx.all(FaultyRow, QUERIES["faulty_machines"], since=since, faults=faults, limit=limit)


async def quarantine(
    tx: Tx, machine_id: UUID, *, reason: str, now: datetime, seconds: float, max_seconds: float, forget_seconds: float
) -> QuarantineRow:
    row = await tx.one(
        QuarantineRow, QUERIES["quarantine"], machine_id=machine_id, reason=reason, now=now, seconds=seconds,
        max_seconds=max_seconds, forget_seconds=forget_seconds,
    )  # fmt: skip
    assert row is not None, "it was just written"
    return row


async def in_quarantine(tx: Tx, now: datetime, ids: Sequence[UUID] | None = None) -> list[QuarantineRow]:
    return await tx.all(QuarantineRow, QUERIES["in_quarantine"], now=now, ids=None if ids is None else list(ids))


async def release(tx: Tx, ids: Sequence[UUID], *, by: str, now: datetime) -> list[QuarantineRow]:
    return await tx.all(QuarantineRow, QUERIES["release"], ids=list(ids), by=by, now=now)
