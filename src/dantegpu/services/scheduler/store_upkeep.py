"""What nobody needs any more, in PostgreSQL. Named SQL: sql/upkeep.sql."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.scheduler", "upkeep")


@dataclass(frozen=True, slots=True)
class StaleRow:
    """An attempt whose checkpoints no attempt can begin with."""

    id: UUID
    job_id: UUID
    epoch: int
    node_rank: int


@dataclass(frozen=True, slots=True)
class SpecRow:
    """A job, and what it runs."""

    id: UUID
    spec: bytes


async def stale_checkpoints(tx: Tx, *, before: datetime, limit: int) -> list[StaleRow]:
    return await tx.all(StaleRow, QUERIES["stale_checkpoints"], before=before, limit=limit)


async def checkpoints_deleted(tx: Tx, ids: Sequence[UUID]) -> None:
    await tx.run(QUERIES["checkpoints_deleted"], ids=list(ids))


async def specs_with_auth(tx: Tx, *, after: UUID, limit: int) -> list[SpecRow]:
    """Specs of jobs that are over and may hold a registry's password, from behind `after`; locked."""
    return await tx.all(SpecRow, QUERIES["specs_with_auth"], after=after, limit=limit)


async def replace_specs(tx: Tx, specs: Mapping[UUID, bytes]) -> None:
    await tx.run(QUERIES["replace_specs"], ids=list(specs), specs=list(specs.values()))
