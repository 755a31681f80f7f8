"""Asks in PostgreSQL. Named SQL: sql/queries.sql."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.marketplace")


@dataclass(frozen=True, slots=True)
class AskRow:
    machine_id: UUID
    team_id: UUID
    price_udgpu_per_gpu_hour: int
    price_udgpu_per_cpu_hour: int
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Prices:
    """Micro-$dGPU per GPU-hour, and per core-hour for jobs without a GPU."""

    gpu_udgpu: int
    cpu_udgpu: int


async def set_ask(
    tx: Tx,
    machine_id: MachineId,
    team_id: TeamId,
    *,
    gpu_udgpu: int | None,
    cpu_udgpu: int | None,
    default: Prices,
    now: datetime,
) -> AskRow:
    """Set the prices given; None leaves that one as it is."""
    row = await tx.one(
        AskRow,
        QUERIES["set_ask"],
        machine_id=machine_id.uuid,
        team_id=team_id.uuid,
        gpu=gpu_udgpu,
        cpu=cpu_udgpu,
        default_gpu=default.gpu_udgpu,
        default_cpu=default.cpu_udgpu,
        now=now,
    )
    assert row is not None, "an upsert returns its row"
    return row


async def find_asks(tx: Tx, machine_ids: Collection[MachineId]) -> dict[MachineId, AskRow]:
    """Own asks of these machines; a machine without one is missing."""
    rows = await tx.all(AskRow, QUERIES["find_asks"], ids=[machine_id.uuid for machine_id in machine_ids])
    return {MachineId(row.machine_id): row for row in rows}


async def all_asks(tx: Tx, limit: int) -> list[AskRow]:
    return await tx.all(AskRow, QUERIES["all_asks"], n=limit)
