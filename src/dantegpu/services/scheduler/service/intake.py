"""What users ask of their jobs: submit, look, stop, why."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from dantegpu.contracts.gen.dante.v1 import common_pb2, jobs_pb2, storage_pb2, storage_pb2_grpc
from dantegpu.contracts.rest.convert import array_of
from dantegpu.contracts.rest.spec import (
    CHECKPOINT_GRACE_MAX_SECONDS,
    CHECKPOINT_INTERVAL_MIN_SECONDS,
    CHECKPOINT_SIGNALS,
)
from dantegpu.domain import job as lifecycle
from dantegpu.domain.arrays import InvalidArray
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import InvalidId, JobId, TeamId
from dantegpu.domain.job import JobState, QueueReason, StopReason
from dantegpu.domain.resources import InvalidGpuSpec
from dantegpu.domain.scheduling import Snapshot, Why, explain, schedule
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, Actor
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import Forbidden, InvalidArgument
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.paging import MAX_PAGE, page_limit
from dantegpu.kit.telemetry import current_traceparent
from dantegpu.services.scheduler import store, store_arrays, store_lifetimes
from dantegpu.services.scheduler.errors import InputNotUploaded, InvalidJob, JobNotFound, NoOfferFits, TaskNotFound
from dantegpu.services.scheduler.service.arrays import split, stop_array
from dantegpu.services.scheduler.service.fleet import live_leases
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.service.machines import is_safe_path
from dantegpu.services.scheduler.service.placement import pending_of, pending_of_spec, request_of
from dantegpu.services.scheduler.service.transitions import (
    JobBatch,
    Wakeups,
    submitted_messages,
)
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import AttemptRow, JobRow, LeaseRow
from dantegpu.services.scheduler.store_arrays import ProgressRow

MAX_JOBS_PER_CALL = 10_000
MAX_SPEC_BYTES = 64 << 10
"""A machine hears of all its attempts in one NATS message, whose payload is bounded (2 MiB embedded)."""
MAX_NODES = 64
MAX_NAME_LENGTH = 100
MAX_EVENTS_PAGE = 1000
MAX_ARRAY_BYTES = 256 << 20
"""What the tasks of one array may take up in the database, all together."""
MAX_CURSOR_DIGITS = 9
MAX_AFTER = 100
MAX_SHOWN_AFTER = 3
SPOT_POLICIES = ("", "spot", "on-demand", "auto")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class JobDetails:
    """A job with its attempts and what they hold."""

    job: JobRow
    attempts: Sequence[AttemptRow]
    leases: dict[UUID, list[LeaseRow]]
    progress: ProgressRow | None = None


@dataclass(frozen=True, slots=True)
class JobExplanation:
    """A job and why it waits."""

    job: JobRow
    why: Why | None
    """None once the job does not wait any more."""
    asked: JobId
    """What was asked for; `job` may be a task that stands for an array."""


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job, or a task by its array and its index."""

    job_id: JobId
    index: int | None = None

    @staticmethod
    def parse(text: str) -> "JobRef":
        """`job_...` or `job_...:17`. Raises InvalidId."""
        job_id, colon, index = text.partition(":")
        if not colon:
            return JobRef(JobId.parse(text))
        if not (index.isascii() and index.isdigit() and len(index) <= MAX_CURSOR_DIGITS):
            raise InvalidId("job", text, "what follows the colon is no index of a task")
        return JobRef(JobId.parse(job_id), int(index))


class Intake:
    """What users ask of their jobs; every id in a request is somebody else's until checked."""

    def __init__(
        self,
        db: Database,
        inventory: Inventory,
        storage: storage_pb2_grpc.StorageServiceStub,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
    ) -> None:
        self._db = db
        self._inventory = inventory
        self._storage = storage
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings

    async def check(self, actor: Actor, specs: Sequence[jobs_pb2.JobSpec], *, no_wait: bool) -> None:
        """Everything about a submission that needs no transaction. Raises InvalidJob, InputNotUploaded, NoOfferFits."""
        team_id = actor.require_writer()
        if not 1 <= len(specs) <= MAX_JOBS_PER_CALL:
            raise InvalidArgument(f"{len(specs)} jobs in one call; 1 to {MAX_JOBS_PER_CALL} are accepted")
        alike: set[bytes] = set()
        for index, spec in enumerate(specs):
            where = f"job {index + 1}: " if len(specs) > 1 else ""
            self._check_own(spec, where)
            # Thousands in one call have most in common.
            shape = _shape(spec) if len(specs) > 1 else b""
            if shape not in alike:
                self._check_spec(spec, where)
                self._check_priority(actor, team_id, spec, where)
                alike.add(shape)
        await self._check_inputs(team_id, specs)
        await self._check_after(actor, specs)
        if no_wait:
            await self._check_fits_now(team_id, specs)

    def _check_own(self, spec: jobs_pb2.JobSpec, where: str) -> None:
        """What is not in its shape."""
        if bool(spec.argv) == bool(spec.commands):
            raise InvalidJob(f"{where}give either a command or `commands`: what shall run?", field="commands")
        written = spec.SerializeToString()
        if len(written) > MAX_SPEC_BYTES:
            raise InvalidJob(f"{where}the job is {len(written)} bytes long, at most {MAX_SPEC_BYTES} are accepted")
        # Most specs have no such byte anywhere.
        if b"\x00" in written and any("\x00" in text for text in _texts(spec)):
            raise InvalidJob(f"{where}a command or variable holds a NUL character, which no process can be given")
        if len(spec.name) > MAX_NAME_LENGTH:
            raise InvalidJob(f"{where}name: at most {MAX_NAME_LENGTH} characters", field="name")
        try:
            self._check_array(spec)
        except ValueError as error:
            raise InvalidJob(f"{where}{error}") from error

    def _check_spec(self, spec: jobs_pb2.JobSpec, where: str) -> None:
        if not 0 <= spec.nodes <= MAX_NODES:
            raise InvalidJob(f"{where}nodes {spec.nodes}: expected 1 to {MAX_NODES}", field="nodes")
        if not 0 <= spec.priority <= 100:
            raise InvalidJob(f"{where}priority {spec.priority}: expected 0 to 100", field="priority")
        if spec.input_sha256 and not _SHA256.fullmatch(spec.input_sha256):
            raise InvalidJob(f"{where}input: expected a SHA-256 in hex", field="input")
        if not 0 <= spec.max_duration_seconds <= self._settings.max_duration_seconds:
            most = self._settings.max_duration_seconds
            raise InvalidJob(f"{where}max_duration: 1 to {most} seconds", field="max_duration")
        try:
            self._check_lifetime(spec)
            _check_preemptible(spec)
            request_of(spec)
            for event in spec.retry.on_events:
                lifecycle.RetryOn(event)
        except InvalidGpuSpec as error:
            raise InvalidJob(f"{where}{error}", field="resources.gpu") from error
        except ValueError as error:
            raise InvalidJob(f"{where}{error}") from error

    def _check_priority(self, actor: Actor, team_id: TeamId, spec: jobs_pb2.JobSpec, where: str) -> None:
        most = self._settings.priority_max_of(team_id)
        if spec.priority > most and not actor.operator:
            raise InvalidJob(
                f"{where}priority {spec.priority}: your team's jobs may have up to {most}; the operator can allow more",
                field="priority",
            )

    def _check_array(self, spec: jobs_pb2.JobSpec) -> None:
        """Raises ValueError."""
        if not spec.HasField("array"):
            return
        size = array_of(spec.array).size
        if spec.array.max_parallel < 0:
            raise InvalidArray("max_parallel: at least 1")
        if (total := size * split(spec).ByteSize()) > MAX_ARRAY_BYTES:
            raise InvalidArray(
                f"{size} tasks of {total // size} bytes each are more than {MAX_ARRAY_BYTES >> 20} MiB "
                "(MAX_ARRAY_BYTES); put what is long into a file"
            )

    def _check_lifetime(self, spec: jobs_pb2.JobSpec) -> None:
        """Raises ValueError."""
        if len(spec.after) > MAX_AFTER:
            raise ValueError(f"after: {len(spec.after)} jobs; at most {MAX_AFTER}")
        for text in spec.after:
            JobId.parse(text)
        if spec.HasField("deadline") and spec.deadline_seconds:
            raise ValueError("deadline: give either a moment or a duration")
        if spec.deadline_seconds < 0:
            raise ValueError("deadline: a duration of at least 1s")
        if spec.HasField("deadline") and spec.deadline.ToDatetime(UTC) <= (now := self._clock.now()):
            raise ValueError(
                f"deadline: {spec.deadline.ToJsonString()} has passed already; it is {now:%Y-%m-%dT%H:%M:%SZ}"
            )
        if spec.HasField("schedule"):
            raise ValueError(
                "schedule: a repeated job is not submitted as one: POST /v1/schedules (`dante submit` does)"
            )

    async def _check_after(self, actor: Actor, specs: Sequence[jobs_pb2.JobSpec]) -> None:
        wanted = list(dict.fromkeys(JobId.parse(text) for spec in specs for text in spec.after))
        if not wanted:
            return
        async with self._db.transaction() as tx:
            rows = await self._own_jobs(tx, actor, wanted)
        for row in rows:
            if row.state in (JobState.FAILED.value, JobState.CANCELLED.value):
                raise InvalidJob(
                    f"after: {JobId(row.id)} has ended {row.state}: this job could never begin", field="after"
                )

    async def _check_inputs(self, team_id: TeamId, specs: Sequence[jobs_pb2.JobSpec]) -> None:
        digests = sorted({spec.input_sha256 for spec in specs if spec.input_sha256})
        if not digests:
            return
        request = storage_pb2.StatBlobsRequest(team_id=str(team_id), sha256s=digests)
        answer = await rpc.call(self._storage.StatBlobs, request, actor=SERVICE)
        for digest, size_bytes in zip(digests, answer.sizes_bytes, strict=True):
            if size_bytes < 0:
                raise InputNotUploaded(
                    f"the input {digest[:12]}... is not in your team's storage; upload it first (POST /v1/uploads)",
                    sha256=digest,
                )

    async def _check_fits_now(self, team_id: TeamId, specs: Sequence[jobs_pb2.JobSpec]) -> None:
        await self._inventory.ready()
        now = self._clock.now()
        percent = self._settings.spot_price_percent
        pending = [pending_of_spec(JobId.new(), team_id, now, spec, percent) for spec in specs]
        async with self._db.transaction() as tx:
            live = await live_leases(tx)
        snapshot = Snapshot.from_machines(self._inventory.machines(), live.values())
        plan = schedule(snapshot, pending, self._settings.policy, now=now)
        if plan.unplaced:
            first = plan.unplaced[0]
            detail = f" ({first.detail})" if first.detail else ""
            raise NoOfferFits(
                f"no machine can take this job now: {first.reason.text}{detail} Without --no-wait it would be queued.",
                reason=first.reason.value,
            )

    async def submit(self, tx: Tx, actor: Actor, specs: Sequence[jobs_pb2.JobSpec]) -> list[JobRow]:
        """Write the jobs and wake placement. What was checked by check() is not checked again."""
        jobs = await self._insert(tx, actor, [spec for spec in specs if not spec.HasField("array")])
        arrays = await self._insert(tx, actor, [spec for spec in specs if spec.HasField("array")])
        if arrays:
            tx.after_commit.append(self._wakeups.arrays)
        await self._outbox.add(tx, submitted_messages([row.id for row in (*jobs, *arrays)]))
        of_kind = {True: iter(arrays), False: iter(jobs)}
        rows = [next(of_kind[spec.HasField("array")]) for spec in specs]
        bound = await self._bind(tx, rows, specs)
        tx.after_commit.append(lambda: self._wakeups.submitted(bound))
        return bound

    async def _bind(self, tx: Tx, rows: Sequence[JobRow], specs: Sequence[jobs_pb2.JobSpec]) -> list[JobRow]:
        """Note what the new jobs wait for and until when they may go on."""
        bound = {row.id: row for row in rows}
        now = self._clock.now()
        pairs = [(row, spec) for row, spec in zip(rows, specs, strict=True)]
        deadlines = {row.id: at for row, spec in pairs if (at := _deadline_of(spec, now))}
        if deadlines:
            bound |= {row.id: row for row in await store_lifetimes.set_deadlines(tx, deadlines)}
        for row, spec in pairs:
            if spec.after:
                after = [JobId.parse(text).uuid for text in spec.after]
                shown = ", ".join(spec.after[:MAX_SHOWN_AFTER]) + (", ..." if len(after) > MAX_SHOWN_AFTER else "")
                bound[row.id] = await store_lifetimes.hold_jobs(tx, row.id, after, shown)
        return [bound[row.id] for row in rows]

    async def _insert(self, tx: Tx, actor: Actor, specs: Sequence[jobs_pb2.JobSpec]) -> list[JobRow]:
        """Specs that all are arrays, or none of which is one."""
        if not specs:
            return []
        columns: dict[str, Any] = {
            "ids": JobId.new_uuids(len(specs)),
            "specs": [spec.SerializeToString() for spec in specs],
            "priorities": [spec.priority for spec in specs],
            "team_id": actor.require_writer().uuid,
            "user_id": actor.user_id.uuid if actor.user_id else None,
            "submitted_at": self._clock.now(),
            "traceparent": current_traceparent(),
        }
        if not specs[0].HasField("array"):
            return await store.insert_jobs(tx, **columns)
        return await store_arrays.insert_arrays(
            tx,
            sizes=[array_of(spec.array).size for spec in specs],
            max_parallels=[spec.array.max_parallel for spec in specs],
            task_specs=[split(spec).SerializeToString() for spec in specs],
            **columns,
        )

    async def get(self, tx: Tx, actor: Actor, refs: Sequence[JobRef]) -> list[JobDetails]:
        """Raises JobNotFound for the first id that does not exist or is another team's."""
        rows = await self._own_jobs(tx, actor, await self._resolve(tx, actor, refs))
        progress = await progress_of(tx, rows)
        attempts = await store.attempts_of_jobs(tx, [row.id for row in rows])
        leases = await store.leases_of_attempts(tx, [attempt.id for attempt in attempts]) if attempts else {}
        of_job: defaultdict[UUID, list[AttemptRow]] = defaultdict(list)
        for attempt in attempts:
            of_job[attempt.job_id].append(attempt)
        return [JobDetails(row, of_job[row.id], leases, progress.get(row.id)) for row in rows]

    async def _resolve(self, tx: Tx, actor: Actor, refs: Sequence[JobRef]) -> list[JobId]:
        """The ids, also of tasks that are named by their array and index. Raises TaskNotFound."""
        asked = [(ref.job_id.uuid, ref.index) for ref in refs if ref.index is not None]
        tasks = await store_arrays.tasks_by_index(tx, asked) if asked else {}
        found: list[JobId] = []
        for ref in refs:
            task = None if ref.index is None else tasks.get((ref.job_id.uuid, ref.index))
            # Whether another team's array has such a task is not told.
            if ref.index is not None and (task is None or not _may_see(actor, task)):
                raise TaskNotFound(ref.job_id, ref.index)
            found.append(JobId(task.id) if task else ref.job_id)
        return found

    async def list_jobs(
        self, tx: Tx, actor: Actor, *, states: Sequence[JobState], cursor: str, limit: int, all_teams: bool
    ) -> tuple[list[JobRow], str]:
        """Newest first, without tasks; the rows and the cursor of the next page (empty at the end)."""
        team_id = team_of(actor)
        if all_teams:
            actor.require_operator()
        size = page_limit(limit)
        rows = await store.list_jobs(
            tx,
            team_id=None if all_teams else team_id.uuid,
            before=JobId.parse(cursor).uuid if cursor else None,
            states=[state.value for state in states] or None,
            limit=size + 1,
        )
        next_cursor = str(JobId(rows[size - 1].id)) if len(rows) > size else ""
        return rows[:size], next_cursor

    async def list_tasks(
        self, tx: Tx, actor: Actor, array_id: JobId, *, states: Sequence[JobState], cursor: str, limit: int
    ) -> tuple[list[JobRow], str]:
        """The tasks of an array that were created, by index; the rows and the cursor of the next page."""
        await self._own_jobs(tx, actor, [array_id])
        size = page_limit(limit)
        if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) <= MAX_CURSOR_DIGITS):
            raise InvalidArgument(f"cursor: expected `next_cursor` of the page before, got {cursor[:80]!r}")
        rows = await store_arrays.tasks_from(
            tx, array_id.uuid, first=int(cursor or 0), states=[state.value for state in states] or None, limit=size + 1
        )
        return rows[:size], str(rows[size].array_index) if len(rows) > size else ""

    async def stop(self, tx: Tx, actor: Actor, job_ids: Sequence[JobId]) -> list[JobRow]:
        """Ask the jobs to end; those that ended already stay as they are."""
        actor.require_writer()
        found = {row.id: row for row in await self._own_jobs(tx, actor, job_ids)}
        now = self._clock.now()
        by = str(actor.user_id or "operator")
        jobs = [row for row in found.values() if row.array_size is None]
        batch = await JobBatch.lock(tx, [row.id for row in jobs], now)
        for row in jobs:
            batch.apply(row.id, lifecycle.StopRequested(by=by, why=_stop_reason(actor, row)))
        for row in sorted(found.values(), key=lambda row: row.id):
            if row.array_size is not None:
                await stop_array(tx, row, _stop_reason(actor, row), by, now, self._outbox, self._wakeups)
        await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        rows = await store.jobs_by_id(tx, [job_id.uuid for job_id in job_ids])
        return [rows[job_id.uuid] for job_id in job_ids]

    async def events(self, tx: Tx, actor: Actor, job_id: JobId, after: int, limit: int) -> list[store.EventRow]:
        await self._own_jobs(tx, actor, [job_id])
        size = page_limit(limit, default=MAX_EVENTS_PAGE, maximum=MAX_EVENTS_PAGE)
        return await store.events_after(tx, job_id.uuid, after, size)

    async def explain(self, tx: Tx, actor: Actor, job_ids: Sequence[JobId]) -> list[JobExplanation]:
        await self._inventory.ready()
        rows = await self._own_jobs(tx, actor, job_ids)
        snapshot = Snapshot.from_machines(self._inventory.machines(), (await live_leases(tx)).values())
        now = self._clock.now()
        found: list[JobExplanation] = []
        for row in rows:
            waiting = await _waiting_part(tx, row)
            why = explain(snapshot, pending_of(waiting, self._settings.spot_price_percent), now) if waiting else None
            found.append(JobExplanation(waiting or row, why, JobId(row.id)))
        return found

    async def _own_jobs(self, tx: Tx, actor: Actor, job_ids: Sequence[JobId]) -> list[JobRow]:
        if not actor.is_service:
            team_of(actor)
        if len(job_ids) > MAX_PAGE:
            raise InvalidArgument(f"{len(job_ids)} jobs in one call; at most {MAX_PAGE}")
        rows = await store.jobs_by_id(tx, [job_id.uuid for job_id in job_ids])
        for job_id in job_ids:
            row = rows.get(job_id.uuid)
            if row is None or not _may_see(actor, row):
                raise JobNotFound(job_id)
        return [rows[job_id.uuid] for job_id in job_ids]


async def progress_of(tx: Tx, rows: Sequence[JobRow]) -> dict[UUID, ProgressRow]:
    """How far those of the jobs are that are arrays."""
    return await store_arrays.array_progress(tx, [row.id for row in rows if row.array_size is not None])


async def _waiting_part(tx: Tx, row: JobRow) -> JobRow | None:
    """The job itself, or a task that stands for all that wait; None when nothing does."""
    if row.array_size is not None:
        return await store_arrays.first_waiting_task(tx, row.id)
    return row if row.state == JobState.QUEUED.value else None


def _check_preemptible(spec: jobs_pb2.JobSpec) -> None:
    """Raises ValueError."""
    if spec.spot_policy not in SPOT_POLICIES:
        raise ValueError(f"spot_policy {spec.spot_policy[:40]!r}: expected {', '.join(filter(None, SPOT_POLICIES))}")
    if not spec.HasField("checkpoint"):
        return
    saved = spec.checkpoint
    if not is_safe_path(saved.path):
        raise ValueError("checkpoint.path: expected a file or folder below the work folder, without '..'")
    if saved.signal and saved.signal not in CHECKPOINT_SIGNALS:
        raise ValueError(f"checkpoint.signal: expected one of {', '.join(CHECKPOINT_SIGNALS)}")
    if not 0 <= saved.grace_seconds <= CHECKPOINT_GRACE_MAX_SECONDS:
        raise ValueError(f"checkpoint.grace: at most {CHECKPOINT_GRACE_MAX_SECONDS} seconds")
    if saved.interval_seconds and saved.interval_seconds < CHECKPOINT_INTERVAL_MIN_SECONDS:
        raise ValueError(f"checkpoint.interval: at least {CHECKPOINT_INTERVAL_MIN_SECONDS} seconds")


def _deadline_of(spec: jobs_pb2.JobSpec, now: datetime) -> datetime | None:
    if spec.deadline_seconds:
        return now + timedelta(seconds=spec.deadline_seconds)
    return spec.deadline.ToDatetime(UTC) if spec.HasField("deadline") else None


def _may_see(actor: Actor, row: JobRow) -> bool:
    return actor.is_service or actor.operator or row.team_id == team_of(actor).uuid


def _stop_reason(actor: Actor, row: JobRow) -> StopReason:
    own = actor.team_id is not None and row.team_id == actor.team_id.uuid
    return StopReason.USER if own else StopReason.OPERATOR


def _shape(spec: jobs_pb2.JobSpec) -> bytes:
    """The spec without its name and what it runs."""
    shape = jobs_pb2.JobSpec()
    shape.CopyFrom(spec)
    shape.name = ""
    del shape.argv[:], shape.commands[:]
    if shape.env:
        shape.env.clear()
    return shape.SerializeToString()


def _texts(spec: jobs_pb2.JobSpec) -> Iterator[str]:
    yield from spec.argv
    yield from spec.commands
    yield from spec.env
    yield from spec.env.values()


def team_of(actor: Actor) -> TeamId:
    """The team whose jobs a person may see."""
    if actor.kind == common_pb2.Actor.MACHINE:
        # Its credential lies on a machine whose owner lends it out; it hears of its attempts over NATS alone.
        raise Forbidden("a machine's credential cannot see jobs; log in as a person")
    return actor.require_team()


def reason_text(row: JobRow) -> str:
    """The reason for people, with its numbers."""
    if row.reason is None:
        return ""
    text = QueueReason(row.reason).text
    return f"{text} {row.reason_detail}" if row.reason_detail else text
