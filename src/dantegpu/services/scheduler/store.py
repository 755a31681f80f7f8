"""Jobs, attempts and leases in PostgreSQL. Named SQL: sql/queries.sql."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any
from uuid import UUID

from psycopg.errors import CheckViolation, UniqueViolation
from psycopg.types.json import Jsonb

from dantegpu.domain.pricing import WINDOW_SECONDS
from dantegpu.kit.db import Asked, Queries, Tx
from dantegpu.services.scheduler.errors import PlanConflict

QUERIES = Queries.of("dantegpu.services.scheduler")
_ZERO = UUID(int=0)


# Not frozen: thousands are made in one call, and a frozen one takes three times as long.
@dataclass(slots=True)
class JobRow:
    id: UUID
    team_id: UUID
    user_id: UUID | None
    spec: bytes
    state: str
    priority: int
    submitted_at: datetime
    traceparent: str
    epoch: int
    attempts_used: int
    reason: str | None
    reason_detail: str
    not_before: datetime | None
    attempt_id: UUID | None
    machine_id: UUID | None
    report_seq: int
    placed_at: datetime | None
    running_at: datetime | None
    first_running_at: datetime | None
    stop_reason: str | None
    stop_by: str
    avoided_machines: list[UUID]
    ended_at: datetime | None
    outcome: str | None
    exit_code: int | None
    message: str
    results_epoch: int
    cost_udgpu: int
    settled: bool
    event_seq: int
    array_size: int | None
    array_id: UUID | None
    array_index: int | None
    held: bool
    deadline_at: datetime | None
    schedule_id: UUID | None
    due_at: datetime | None


@dataclass(slots=True)
class AttemptRow:
    id: UUID
    job_id: UUID
    team_id: UUID
    epoch: int
    machine_id: UUID
    provider_team_id: UUID
    simulated: bool
    sandbox: str
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    rate_udgpu_per_hour: int
    max_duration_seconds: int
    state: str
    stop_reason: str | None
    outcome: str | None
    exit_code: int | None
    message: str
    created_at: datetime
    running_at: datetime | None
    ended_at: datetime | None
    lease_renewed_at: datetime
    lease_expires_at: datetime
    results: bytes
    billed_seconds: int
    windows_opened: int
    windows_closed: int
    cost_udgpu: int
    settled: bool
    stop_requested_at: datetime | None
    node_rank: int
    nodes: int
    report_seq: int
    array_id: UUID | None
    spot: bool
    saves: bool
    checkpoint_number: int
    checkpoint_sha256: str | None
    checkpoint_size_bytes: int | None
    checkpoint_slot: int
    checkpointed_at: datetime | None
    ports: bytes
    checkpoints_deleted: bool
    silent: bool


@dataclass(frozen=True, slots=True)
class LeaseRow:
    attempt_id: UUID
    device_id: UUID
    device_index: int
    milli: int


@dataclass(frozen=True, slots=True)
class DesiredRow:
    id: UUID
    job_id: UUID
    team_id: UUID
    epoch: int
    machine_id: UUID
    stop_reason: str | None
    lease_expires_at: datetime
    spec: bytes
    traceparent: str
    node_rank: int
    first_attempt_id: UUID
    node_machines: list[UUID]
    """By rank; empty: the job has one node."""


@dataclass(frozen=True, slots=True)
class EventRow:
    job_id: UUID
    seq: int
    state: str
    type: str
    message: str
    attempt_id: UUID | None
    occurred_at: datetime


@dataclass(frozen=True, slots=True)
class PastUseRow:
    """Decayed averages; a team that held one GPU for a half-life has 500 milli-GPUs."""

    team_id: UUID
    gpu_milli: float
    cpu_milli: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class LiveLeaseRow:
    attempt_id: UUID
    machine_id: UUID
    team_id: UUID
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    running_at: datetime | None
    max_duration_seconds: int
    stopping: bool
    device_ids: list[UUID]
    millis: list[int]


@dataclass(frozen=True, slots=True)
class DueRow:
    job_id: UUID
    attempt_id: UUID
    lease_renewed_at: datetime
    lost: bool
    overdue: bool


@dataclass(frozen=True, slots=True)
class ResolvedRow:
    id: UUID
    job_id: UUID
    team_id: UUID
    machine_id: UUID
    epoch: int
    node_rank: int
    live: bool


@dataclass(frozen=True, slots=True)
class UnsettledRow:
    """An attempt that has ended."""

    id: UUID
    job_id: UUID
    billed_seconds: int
    windows_opened: int
    windows_closed: int


@dataclass(frozen=True, slots=True)
class EndedRow:
    """A job that has ended."""

    id: UUID
    team_id: UUID
    state: str
    event_seq: int
    cost_udgpu: int


@dataclass(frozen=True, slots=True)
class RevisionRow:
    machine_id: UUID
    desired_revision: int


@dataclass(frozen=True, slots=True)
class _IdRow:
    id: UUID


@dataclass(frozen=True, slots=True)
class _Position:
    id: UUID
    report_seq: int


type Record = Mapping[str, Any]
"""A row for jsonb_to_recordset: column -> value."""


def json_rows(rows: Iterable[Record]) -> Jsonb:
    """Rows as the parameter of a query that takes a list of them."""
    return Jsonb(list(rows), dumps=_json)


_PLAIN: Mapping[type, Callable[[Any], str]] = {
    UUID: attrgetter("hex"), datetime: datetime.isoformat, bytes: bytes.hex
}  # fmt: skip
_encode = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode


def _json(rows: list[Record]) -> str:
    """NULL is what a record has in columns that it leaves out, so most columns of most rows need not be written."""
    return _encode(
        [
            {
                key: value if (plain := _PLAIN.get(value.__class__)) is None else plain(value)
                for key, value in row.items()
                if value is not None
            }
            for row in rows
        ]
    )


_NEW_JOB: Record = {
    "state": "QUEUED", "epoch": 0, "attempts_used": 0, "reason": "new", "reason_detail": "", "not_before": None,
    "attempt_id": None, "machine_id": None, "report_seq": 0, "placed_at": None, "running_at": None,
    "first_running_at": None, "stop_reason": None, "stop_by": "", "ended_at": None, "outcome": None, "exit_code": None,
    "message": "", "results_epoch": 0, "cost_udgpu": 0, "settled": False, "event_seq": 1, "array_size": None,
    "array_id": None, "array_index": None, "held": False, "deadline_at": None, "schedule_id": None, "due_at": None,
}  # fmt: skip
"""What insert_jobs writes into every row: reading it back would cost as much as writing it."""
JOBS_PER_INSERT = 1000
"""So many fit into a socket's buffer at once: PostgreSQL writes them while the next ones are put together."""


# --- jobs -------------------------------------------------------------------------------------------------------------


async def insert_jobs(
    tx: Tx, *, ids: list[UUID], specs: list[bytes], priorities: list[int], team_id: UUID, user_id: UUID | None,
    submitted_at: datetime, traceparent: str,
) -> list[JobRow]:  # fmt: skip
    """The new jobs with the first line of their history, in the order of `ids`."""
    for first in range(0, len(ids), JOBS_PER_INSERT):
        some = slice(first, first + JOBS_PER_INSERT)
        await tx.send(
            QUERIES["insert_jobs"], ids=ids[some], specs=specs[some], priorities=priorities[some], team_id=team_id,
            user_id=user_id, submitted_at=submitted_at, traceparent=traceparent,
        )  # fmt: skip
    shared: dict[str, Any] = {
        **_NEW_JOB, "team_id": team_id, "user_id": user_id, "submitted_at": submitted_at, "traceparent": traceparent
    }  # fmt: skip
    return [
        JobRow(id=job_id, spec=spec, priority=priority, avoided_machines=[], **shared)
        for job_id, spec, priority in zip(ids, specs, priorities, strict=True)
    ]


async def jobs_by_id(tx: Tx, ids: Sequence[UUID]) -> dict[UUID, JobRow]:
    return {row.id: row for row in await tx.all(JobRow, QUERIES["jobs_by_id"], ids=list(ids))}


async def lock_jobs(tx: Tx, ids: Iterable[UUID]) -> dict[UUID, JobRow]:
    """The jobs, locked in id order until the transaction ends: so no two transactions wait for one another."""
    return {row.id: row for row in await tx.all(JobRow, QUERIES["lock_jobs"], ids=list(ids))}


async def lock_job_ids(tx: Tx, ids: Iterable[UUID]) -> None:
    """The same for those whose jobs need not be looked at. It is waited for with what comes next."""
    await tx.send(QUERIES["lock_job_ids"], ids=list(ids))


async def lock_jobs_of_attempts(
    tx: Tx, ids: Iterable[UUID], attempts: Sequence[UUID], now: datetime
) -> tuple[dict[UUID, JobRow], set[UUID]]:
    """lock_jobs, then out_of_lease, in one round trip."""
    locked = await tx.ask(JobRow, QUERIES["lock_jobs"], ids=list(ids))
    expired = await out_of_lease(tx, attempts, now)
    return {row.id: row for row in locked.known()}, expired


async def list_jobs(
    tx: Tx, *, team_id: UUID | None, before: UUID | None, states: list[str] | None, limit: int
) -> list[JobRow]:
    return await tx.all(JobRow, QUERIES["list_jobs"], team_id=team_id, before=before, states=states, limit=limit)


async def queued_jobs(tx: Tx, *, after: JobRow | None, limit: int) -> list[JobRow]:
    """Waiting jobs in order of submission, from behind `after`."""
    return await tx.all(
        JobRow, QUERIES["queued_jobs"], limit=limit,
        after_time=after.submitted_at if after else "-infinity", after_id=after.id if after else _ZERO,
    )  # fmt: skip


async def queued_ids(tx: Tx, *, after: UUID | None, limit: int) -> list[UUID]:
    """Ids of waiting jobs in their order, from behind `after`."""
    rows = await tx.all(_IdRow, QUERIES["queued_ids"], after_id=after or _ZERO, limit=limit)
    return [row.id for row in rows]


async def save_jobs(tx: Tx, rows: Sequence[Record]) -> None:
    await tx.send(QUERIES["save_jobs"], rows=json_rows(rows))


async def insert_events(tx: Tx, rows: Sequence[Record]) -> None:
    await tx.send(QUERIES["insert_events"], rows=json_rows(rows))


async def events_after(tx: Tx, job_id: UUID, after: int, limit: int) -> list[EventRow]:
    return await tx.all(EventRow, QUERIES["events_after"], job_id=job_id, after=after, limit=limit)


# --- attempts ---------------------------------------------------------------------------------------------------------


async def insert_attempts(tx: Tx, rows: Sequence[Record], *, now: datetime, lease_seconds: float) -> None:
    """Raises PlanConflict when a job would get a second live attempt, or a gang would be placed in part."""
    try:
        await tx.run(QUERIES["insert_attempts"], rows=json_rows(rows), now=now, lease_seconds=lease_seconds)
    except UniqueViolation as error:
        raise PlanConflict("a job has a live attempt already") from error
    except CheckViolation as error:
        raise PlanConflict("a gang was to be placed in part") from error


async def lease_devices(tx: Tx, rows: Sequence[Record]) -> None:
    """Raises PlanConflict when a device would be leased twice."""
    if rows:
        try:
            await tx.run(QUERIES["lease_devices"], rows=json_rows(rows))
        except CheckViolation as error:
            raise PlanConflict("a device is leased already") from error


async def release_devices(tx: Tx, attempt_ids: Sequence[UUID]) -> None:
    await tx.send(QUERIES["release_devices"], attempt_ids=list(attempt_ids))


async def save_attempts(tx: Tx, rows: Sequence[Record]) -> None:
    await tx.send(QUERIES["save_attempts"], rows=json_rows(rows))


async def save_ports(tx: Tx, ports: Mapping[UUID, bytes]) -> None:
    """Where live attempts publish their ports."""
    rows: list[Record] = [{"id": attempt_id, "ports": message} for attempt_id, message in ports.items()]
    await tx.send(QUERIES["save_ports"], rows=json_rows(rows))


async def attempts_by_id(tx: Tx, ids: Iterable[UUID]) -> dict[UUID, AttemptRow]:
    return {row.id: row for row in await tx.all(AttemptRow, QUERIES["attempts_by_id"], ids=list(ids))}


async def lock_attempts(tx: Tx, ids: Iterable[UUID]) -> dict[UUID, AttemptRow]:
    """Like attempts_by_id, locked until the transaction ends. Lock their jobs before."""
    return {row.id: row for row in await tx.all(AttemptRow, QUERIES["lock_attempts"], ids=list(ids))}


async def attempts_of_jobs(tx: Tx, job_ids: Sequence[UUID]) -> list[AttemptRow]:
    return await tx.all(AttemptRow, QUERIES["attempts_of_jobs"], job_ids=list(job_ids))


async def gang_nodes(tx: Tx, job_ids: Sequence[UUID]) -> dict[UUID, list[AttemptRow]]:
    """Job -> the attempts of its latest epoch, by node rank."""
    found: dict[UUID, list[AttemptRow]] = {}
    for row in await tx.all(AttemptRow, QUERIES["gang_nodes"], job_ids=list(job_ids)):
        found.setdefault(row.job_id, []).append(row)
    return found


async def leases_of_attempts(tx: Tx, attempt_ids: Sequence[UUID]) -> dict[UUID, list[LeaseRow]]:
    found: dict[UUID, list[LeaseRow]] = {}
    for row in await tx.all(LeaseRow, QUERIES["leases_of_attempts"], attempt_ids=list(attempt_ids)):
        found.setdefault(row.attempt_id, []).append(row)
    return found


async def renew_leases(
    tx: Tx, machine_id: UUID, live: Sequence[tuple[UUID, int]], *, now: datetime, lease_seconds: float,
    stop_timeout_seconds: float,
) -> int:  # fmt: skip
    """Renew the leases of (attempt, epoch) pairs that this machine still holds; how many it does."""
    return await tx.run(
        QUERIES["renew_leases"], machine_id=machine_id, now=now, lease_seconds=lease_seconds,
        stop_timeout_seconds=stop_timeout_seconds,
        ids=[attempt for attempt, _ in live], epochs=[epoch for _, epoch in live],
    )  # fmt: skip


async def out_of_lease(tx: Tx, ids: Sequence[UUID], now: datetime) -> set[UUID]:
    """Those of the attempts whose lease has run out."""
    return {row.id for row in await tx.all(_IdRow, QUERIES["out_of_lease"], ids=list(ids), now=now)}


async def report_positions(tx: Tx, machine_id: UUID, job_ids: Sequence[UUID]) -> dict[UUID, int]:
    """Live attempt of these jobs on this machine -> the last report of it that was folded."""
    rows = await tx.all(_Position, QUERIES["report_positions"], machine_id=machine_id, job_ids=list(job_ids))
    found: dict[UUID, int] = {}
    for row in rows:
        found[row.id] = max(row.report_seq, found.get(row.id, 0))
    return found


async def resolve_attempts(tx: Tx, ids: Sequence[UUID]) -> list[ResolvedRow]:
    return await tx.all(ResolvedRow, QUERIES["resolve_attempts"], ids=list(ids))


async def attempts_to_settle(tx: Tx, ids: Sequence[UUID]) -> set[UUID]:
    """Those of the ids that are attempts whose holds are still needed."""
    return {row.id for row in await tx.all(_IdRow, QUERIES["attempts_to_settle"], ids=list(ids))}


# --- machines ---------------------------------------------------------------------------------------------------------


async def desired_attempts(tx: Tx, machine_ids: Sequence[UUID], now: datetime) -> list[DesiredRow]:
    return await tx.all(DesiredRow, QUERIES["desired_attempts"], machine_ids=list(machine_ids), now=now)


async def bump_machines(tx: Tx, machine_ids: Iterable[UUID]) -> Asked[RevisionRow]:
    """What these shall run has changed; their new revisions."""
    return await tx.ask(RevisionRow, QUERIES["bump_machines"], machine_ids=list(machine_ids))


async def machine_revisions(tx: Tx, machine_ids: Sequence[UUID]) -> dict[UUID, int]:
    rows = await tx.all(RevisionRow, QUERIES["machine_revisions"], machine_ids=list(machine_ids))
    return {row.machine_id: row.desired_revision for row in rows}


async def live_leases(tx: Tx) -> list[LiveLeaseRow]:
    """What every live attempt holds."""
    return await tx.all(LiveLeaseRow, QUERIES["live_leases"])


async def past_use(tx: Tx, *, now: datetime, since: datetime, half_life_seconds: float, limit: int) -> list[PastUseRow]:
    """What teams held on average, of attempts that live or ended after `since`, at most `limit`."""
    return await tx.all(
        PastUseRow, QUERIES["past_use"], now=now, since=since, half_life_seconds=half_life_seconds, limit=limit
    )


# --- timers -----------------------------------------------------------------------------------------------------------


async def due_attempts(
    tx: Tx, *, now: datetime, lease_grace_seconds: float, stop_grace_seconds: float, limit: int
) -> list[DueRow]:
    """Live attempts whose lease and grace are over, or their max_duration and its grace."""
    return await tx.all(
        DueRow, QUERIES["due_attempts"], now=now, limit=limit,
        lease_grace_seconds=lease_grace_seconds, stop_grace_seconds=stop_grace_seconds,
    )  # fmt: skip


# --- settlement -------------------------------------------------------------------------------------------------------


async def unsettled_attempts(tx: Tx, limit: int) -> list[UnsettledRow]:
    return await tx.all(UnsettledRow, QUERIES["unsettled_attempts"], limit=limit)


async def attempts_needing_window(tx: Tx, *, now: datetime, ahead_seconds: float, limit: int) -> list[AttemptRow]:
    return await tx.all(
        AttemptRow, QUERIES["attempts_needing_window"],
        now=now, ahead_seconds=ahead_seconds, window_seconds=WINDOW_SECONDS, limit=limit,
    )  # fmt: skip


async def attempts_with_full_windows(tx: Tx, *, limit: int) -> list[AttemptRow]:
    return await tx.all(AttemptRow, QUERIES["attempts_with_full_windows"], window_seconds=WINDOW_SECONDS, limit=limit)


async def open_windows(tx: Tx, windows_opened: Mapping[UUID, int]) -> None:
    await tx.send(
        QUERIES["open_windows"], ids=list(windows_opened), windows_opened=list(windows_opened.values())
    )  # fmt: skip


async def close_windows(tx: Tx, rows: Sequence[Record]) -> None:
    await tx.send(QUERIES["close_windows"], rows=json_rows(rows))


async def jobs_to_mark_settled(tx: Tx, limit: int, *, among: Iterable[UUID] | None = None) -> list[EndedRow]:
    """Ended jobs of which every attempt is settled, locked."""
    ids = None if among is None else list(among)
    return await tx.all(EndedRow, QUERIES["jobs_to_mark_settled"], limit=limit, ids=ids)


async def mark_jobs_settled(tx: Tx, job_ids: Iterable[UUID]) -> None:
    await tx.send(QUERIES["mark_jobs_settled"], job_ids=list(job_ids))
