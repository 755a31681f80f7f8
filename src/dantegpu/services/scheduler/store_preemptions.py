"""Spot work that gives way, claims on what it leaves, checkpoints. Named SQL: sql/preemptions.sql."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx
from dantegpu.services.scheduler.store import Record, json_rows

QUERIES = Queries.of("dantegpu.services.scheduler", "preemptions")


@dataclass(frozen=True, slots=True)
class SpotRow:
    """A live attempt that may be told to give way. `saved_at`: its last checkpoint, or when it began."""

    attempt_id: UUID
    job_id: UUID
    team_id: UUID
    epoch: int
    priority: int
    saves: bool
    saved_at: datetime
    began_at: datetime


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """What is kept for one node of a job."""

    job_id: UUID
    node_rank: int
    machine_id: UUID
    device_ids: list[UUID]


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """What `attempt_id` begins with; saved by the attempt of `epoch` and `node_rank`."""

    attempt_id: UUID
    job_id: UUID
    epoch: int
    node_rank: int
    sha256: str
    size_bytes: int
    slot: int


async def spot_attempts(tx: Tx, limit: int) -> list[SpotRow]:
    return await tx.all(SpotRow, QUERIES["spot_attempts"], limit=limit)


async def claims(tx: Tx) -> dict[UUID, list[ClaimRow]]:
    """Job -> its claim, by node rank; the oldest claim first."""
    found: dict[UUID, list[ClaimRow]] = {}
    for row in await tx.all(ClaimRow, QUERIES["claims"]):
        found.setdefault(row.job_id, []).append(row)
    return found


async def insert_claims(tx: Tx, rows: Sequence[ClaimRow], now: datetime) -> None:
    records: list[Record] = [
        {
            "job_id": row.job_id,
            "node_rank": row.node_rank,
            "machine_id": row.machine_id,
            "device_ids": [str(device_id) for device_id in row.device_ids],
        }
        for row in rows
    ]
    await tx.run(QUERIES["insert_claims"], rows=json_rows(records), now=now)


async def delete_claims(tx: Tx, job_ids: Iterable[UUID]) -> None:
    await tx.run(QUERIES["delete_claims"], job_ids=list(job_ids))


async def save_checkpoints(tx: Tx, rows: Sequence[Record], now: datetime) -> None:
    """Before the ends of attempts are written: an ended one changes no more."""
    await tx.run(QUERIES["save_checkpoints"], rows=json_rows(rows), now=now)


async def checkpoints_before(tx: Tx, ids: Sequence[UUID]) -> dict[UUID, CheckpointRow]:
    """Attempt -> the checkpoint that it begins with; those that begin anew are left out."""
    return {row.attempt_id: row for row in await tx.all(CheckpointRow, QUERIES["checkpoints_before"], ids=list(ids))}
