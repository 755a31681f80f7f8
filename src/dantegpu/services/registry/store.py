"""The registry's table. Named SQL: sql/queries.sql."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.domain.ids import MachineId, TeamId
from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.registry")


@dataclass(frozen=True, slots=True)
class MachineRow:
    """A machine. `inventory` and `device_utilisation` are serialised protobuf (see the migration)."""

    id: UUID
    team_id: UUID
    inventory: bytes
    intent: str
    liveness: str
    joined_at: datetime
    last_heartbeat_at: datetime | None
    heard_at: datetime
    running_attempts: int
    cpu_utilisation: float
    memory_used_bytes: int
    device_utilisation: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Beat:
    """What a machine's heartbeats of one batch come to. `inventory` is None where none was sent."""

    machine_id: MachineId
    running_attempts: int
    cpu_utilisation: float
    memory_used_bytes: int
    device_utilisation: bytes
    leaving: bool
    inventory: bytes | None


async def register(
    tx: Tx, machine_id: MachineId, team_id: TeamId, inventory: bytes, now: datetime
) -> MachineRow | None:
    """The machine's row when that made or changed it; None when nothing changed or it is another team's."""
    return await tx.one(
        MachineRow, QUERIES["register_machine"], id=machine_id.uuid, team_id=team_id.uuid, inventory=inventory, now=now
    )


async def by_id(tx: Tx, machine_ids: Sequence[MachineId]) -> dict[UUID, MachineRow]:
    rows = await tx.all(MachineRow, QUERIES["machines_by_id"], ids=[machine_id.uuid for machine_id in machine_ids])
    return {row.id: row for row in rows}


async def page(tx: Tx, team_id: TeamId | None, after: UUID | None, limit: int) -> list[MachineRow]:
    """Machines that have not left, in id order; all teams' when `team_id` is None."""
    team = team_id.uuid if team_id else None
    return await tx.all(MachineRow, QUERIES["list_machines"], team_id=team, after=after, limit=limit)


async def lock(tx: Tx, machine_id: MachineId) -> MachineRow | None:
    return await tx.one(MachineRow, QUERIES["lock_machine"], id=machine_id.uuid)


async def set_intent(tx: Tx, machine_id: MachineId, intent: str) -> MachineRow:
    row = await tx.one(MachineRow, QUERIES["set_intent"], id=machine_id.uuid, intent=intent)
    assert row is not None, "the row is locked by this transaction"
    return row


async def snapshot(tx: Tx) -> tuple[int, list[MachineRow]]:
    """The latest revision, and all machines that have not left. The revision first: what changes in between comes
    as an event, too, instead of being missed."""
    revision = int(await tx.value(QUERIES["latest_revision"]))
    return revision, await tx.all(MachineRow, QUERIES["snapshot"])


async def fold(tx: Tx, beats: Sequence[Beat], now: datetime) -> list[MachineRow]:
    """Fold heartbeats, one per machine; the machines whose liveness or inventory changed by it."""
    return await tx.all(
        MachineRow, QUERIES["fold_heartbeats"], now=now,
        ids=[beat.machine_id.uuid for beat in beats],
        running=[beat.running_attempts for beat in beats],
        cpu=[beat.cpu_utilisation for beat in beats],
        memory=[beat.memory_used_bytes for beat in beats],
        devices=[beat.device_utilisation for beat in beats],
        leaving=[beat.leaving for beat in beats],
        inventories=[beat.inventory for beat in beats],
    )  # fmt: skip


async def flip_liveness(
    tx: Tx, watching_since: datetime, unknown_before: datetime, offline_before: datetime, limit: int
) -> list[MachineRow]:
    """Mark those unknown or offline that were not heard since; at most `limit` at once."""
    return await tx.all(
        MachineRow, QUERIES["flip_liveness"], watching_since=watching_since, unknown_before=unknown_before,
        offline_before=offline_before, limit=limit,
    )  # fmt: skip


async def clamp_future(tx: Tx, now: datetime, latest: datetime) -> int:
    """Signs of life later than `latest` become `now`; how many."""
    return await tx.run(QUERIES["clamp_future"], now=now, latest=latest)
