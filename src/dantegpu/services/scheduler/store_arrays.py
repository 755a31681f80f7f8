"""Arrays and their tasks in PostgreSQL. Named SQL: sql/arrays.sql."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.kit.db import Queries, Tx
from dantegpu.services.scheduler.store import EventRow, JobRow

QUERIES = Queries.of("dantegpu.services.scheduler", "arrays")


@dataclass(frozen=True, slots=True)
class OpenArrayRow:
    """An array that something may be left to do for."""

    id: UUID
    size: int
    max_parallel: int
    created: int
    shown_state: str
    stop_reason: str | None
    stop_by: str
    spec: bytes
    ended: bool
    waiting: int
    live: int


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """An array and its tasks by state."""

    id: UUID
    size: int
    max_parallel: int
    created: int
    shown_state: str
    reason: str | None
    queued: int
    placed: int
    starting: int
    running: int
    stopping: int
    succeeded: int
    failed: int
    cancelled: int
    cost_udgpu: int


@dataclass(frozen=True, slots=True)
class TasksSettledRow:
    """What all tasks of an array came to."""

    succeeded: int
    failed: int
    cost_udgpu: int
    settled: bool


@dataclass(frozen=True, slots=True)
class TasksStoppedRow:
    """How many tasks a stop changed, and the machines that must hear of it."""

    tasks: int
    machine_ids: list[UUID]


async def insert_arrays(
    tx: Tx, *, ids: list[UUID], specs: list[bytes], priorities: list[int], sizes: list[int], max_parallels: list[int],
    task_specs: list[bytes], team_id: UUID, user_id: UUID | None, submitted_at: datetime, traceparent: str,
) -> list[JobRow]:  # fmt: skip
    """The new arrays, none of their tasks, in the order of `ids`."""
    rows = await tx.all(
        JobRow, QUERIES["insert_arrays"], ids=ids, specs=specs, priorities=priorities, sizes=sizes,
        max_parallels=max_parallels, task_specs=task_specs, team_id=team_id, user_id=user_id,
        submitted_at=submitted_at, traceparent=traceparent,
    )  # fmt: skip
    by_id = {row.id: row for row in rows}
    return [by_id[job_id] for job_id in ids]


async def create_tasks(
    tx: Tx, array_id: UUID, *, first: int, ids: list[UUID], environments: list[bytes], now: datetime
) -> list[JobRow]:
    """Tasks `first`, `first` + 1, ... by index; none when they are not the next ones, or the array is stopped.

    `environments` are JobSpecs with `env` only: behind the array's bytes they are the task's (protobuf merges).
    """
    return await tx.all(
        JobRow, QUERIES["create_tasks"], array_id=array_id, first=first, ids=ids, environments=environments, now=now
    )


async def open_arrays(tx: Tx, limit: int) -> list[OpenArrayRow]:
    """Arrays that something may be left to do for."""
    return await tx.all(OpenArrayRow, QUERIES["open_arrays"], limit=limit)


async def array_progress(tx: Tx, ids: Iterable[UUID]) -> dict[UUID, ProgressRow]:
    wanted = list(ids)
    rows = await tx.all(ProgressRow, QUERIES["array_progress"], ids=wanted) if wanted else []
    return {row.id: row for row in rows}


async def tasks_from(tx: Tx, array_id: UUID, *, first: int, states: list[str] | None, limit: int) -> list[JobRow]:
    return await tx.all(JobRow, QUERIES["tasks_from"], array_id=array_id, first=first, states=states, limit=limit)


async def tasks_by_index(tx: Tx, tasks: Sequence[tuple[UUID, int]]) -> dict[tuple[UUID, int], JobRow]:
    rows = await tx.all(
        JobRow, QUERIES["tasks_by_index"],
        array_ids=[array_id for array_id, _ in tasks], indexes=[index for _, index in tasks],
    )  # fmt: skip
    return {(row.array_id, row.array_index): row for row in rows if row.array_id and row.array_index is not None}


async def first_waiting_task(tx: Tx, array_id: UUID) -> JobRow | None:
    return await tx.one(JobRow, QUERIES["first_waiting_task"], array_id=array_id)


async def begin_array(tx: Tx, array_id: UUID, now: datetime) -> EventRow | None:
    return await tx.one(EventRow, QUERIES["begin_array"], array_id=array_id, now=now)


async def stop_array(
    tx: Tx, array_id: UUID, *, stop_reason: str, stop_by: str, message: str, now: datetime
) -> EventRow | None:
    """None: it has ended, or was stopped before."""
    return await tx.one(
        EventRow, QUERIES["stop_array"], array_id=array_id, stop_reason=stop_reason, stop_by=stop_by, message=message,
        now=now,
    )  # fmt: skip


async def stop_tasks(
    tx: Tx, array_id: UUID, *, stop_reason: str, stop_by: str, ending_reasons: list[str], end_state: str, outcome: str,
    message: str, now: datetime,
) -> TasksStoppedRow:  # fmt: skip
    found = await tx.one(
        TasksStoppedRow, QUERIES["stop_tasks"], array_id=array_id, stop_reason=stop_reason, stop_by=stop_by,
        ending_reasons=ending_reasons, end_state=end_state, outcome=outcome, message=message, now=now,
    )  # fmt: skip
    return found or TasksStoppedRow(0, [])


async def tasks_settled(tx: Tx, array_id: UUID) -> TasksSettledRow:
    found = await tx.one(TasksSettledRow, QUERIES["tasks_settled"], array_id=array_id)
    assert found is not None, "an aggregate has a row"
    return found


async def end_array(
    tx: Tx, array_id: UUID, *, state: str, outcome: str, message: str, stop_reason: str | None, stop_by: str,
    now: datetime,
) -> EventRow | None:  # fmt: skip
    return await tx.one(
        EventRow, QUERIES["end_array"], array_id=array_id, state=state, outcome=outcome, message=message,
        stop_reason=stop_reason, stop_by=stop_by, now=now,
    )  # fmt: skip


async def settle_array(
    tx: Tx, array_id: UUID, *, succeeded: int, failed: int, cancelled: int, cost_udgpu: int, message: str, now: datetime
) -> EventRow | None:
    return await tx.one(
        EventRow, QUERIES["settle_array"], array_id=array_id, succeeded=succeeded, failed=failed, cancelled=cancelled,
        cost_udgpu=cost_udgpu, message=message, now=now,
    )  # fmt: skip
