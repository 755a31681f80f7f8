"""The one way in which jobs and attempts change: lock, ask the transition table, write everything back at once."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import batched
from typing import Any
from uuid import UUID

from google.protobuf.message import Message

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import events_pb2, jobs_pb2, machine_pb2
from dantegpu.domain import job as lifecycle
from dantegpu.domain.ids import AttemptId, JobId, MachineId, TeamId
from dantegpu.domain.job import JobSnapshot, JobState, Outcome, QueueReason, RetryOn, RetryPolicy, StopReason
from dantegpu.domain.pricing import billable_seconds
from dantegpu.kit.db import Asked, Tx
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store, store_preemptions
from dantegpu.services.scheduler.store import AttemptRow, DesiredRow, JobRow, LeaseRow, RevisionRow

JOBS_PER_MESSAGE_MAX = 1000
"""NATS bounds a message."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A new attempt, with what its machine has to hear of it."""

    row: DesiredRow
    leases: Sequence[LeaseRow]


@dataclass(slots=True)
class Wakeups:
    """Whom to wake once changes are committed. Each is only a hint: everybody also looks by himself now and then."""

    machines: Callable[[set[UUID]], None] = field(default=lambda machine_ids: None)
    """These have to hear everything that they shall run."""
    opened: Callable[[Sequence[Opened], Mapping[UUID, int]], None] = field(default=lambda attempts, revisions: None)
    """Attempts that are new on their machines, of whose others nothing has changed, and the machines' revisions."""
    folded: Callable[[Sequence[tuple[MachineId, machine_pb2.AttemptStatus]]], None] = field(
        default=lambda reports: None
    )
    """What machines reported of ends is committed: they may forget it."""
    settlement: Callable[[], None] = field(default=lambda: None)
    placement: Callable[[], None] = field(default=lambda: None)
    submitted: Callable[[Sequence[JobRow]], None] = field(default=lambda rows: None)
    """Sooner than the message about them, when placement is led from this process."""
    ended: Callable[[Sequence[UUID]], None] = field(default=lambda attempt_ids: None)
    """Attempts that ended in the transaction that was just committed."""
    arrays: Callable[[], None] = field(default=lambda: None)
    dropped: Callable[[], None] = field(default=lambda: None)
    """Many waiting jobs ended at once: placement's queue holds what is over."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What a placement adds to the attempt that a Placed event opens; a gang has one of each per node, by rank."""

    attempts: tuple[Mapping[str, Any], ...]
    devices: tuple[tuple[Mapping[str, Any], ...], ...]
    message: str


MAX_RAN_MS = 10 * 365 * 24 * 3600 * 1000
MAX_MESSAGE_LENGTH = 2000
MAX_SANDBOX_LENGTH = 100
_NUL = "\x00"  # PostgreSQL's text cannot hold it

_ATTEMPT_END_STATES: Mapping[Outcome, JobState] = {
    Outcome.SUCCEEDED: JobState.SUCCEEDED,
    Outcome.CANCELLED: JobState.CANCELLED,
}


_A_JOB = JobSnapshot(JobId(UUID(int=0)), TeamId(UUID(int=0)), datetime.min.replace(tzinfo=UTC))
"""What the rows are made of: see JobSnapshot.but()."""


def snapshot_of(row: JobRow) -> JobSnapshot:
    """The row as the transition table wants it; the nodes of a live gang come from their attempts."""
    retry, nodes = _terms(row.spec)
    return _A_JOB.but(
        id=JobId(row.id),
        team_id=TeamId(row.team_id),
        submitted_at=row.submitted_at,
        state=JobState(row.state),
        epoch=row.epoch,
        attempts_used=row.attempts_used,
        retry=retry,
        queue_reason=QueueReason(row.reason) if row.reason else None,
        queue_detail=row.reason_detail,
        not_before=row.not_before,
        attempt_id=AttemptId(row.attempt_id) if row.attempt_id else None,
        machine_id=MachineId(row.machine_id) if row.machine_id else None,
        report_seq=row.report_seq,
        placed_at=row.placed_at,
        running_at=row.running_at,
        stop_reason=StopReason(row.stop_reason) if row.stop_reason else None,
        stop_by=row.stop_by,
        avoided_machines=tuple(MachineId(machine) for machine in row.avoided_machines),
        first_running_at=row.first_running_at,
        ended_at=row.ended_at,
        outcome=Outcome(row.outcome) if row.outcome else None,
        exit_code=row.exit_code,
        message=row.message,
        nodes=nodes,
    )


@lru_cache(maxsize=4096)
def _terms(spec_bytes: bytes) -> tuple[RetryPolicy, int]:
    """What of a spec decides how its job goes on. A job changes several times, and many have the same spec."""
    spec = jobs_pb2.JobSpec.FromString(spec_bytes)
    return _retry_policy(spec), max(spec.nodes, 1)


def _gang_node(row: AttemptRow) -> lifecycle.GangNode:
    return lifecycle.GangNode(
        attempt_id=AttemptId(row.id),
        machine_id=MachineId(row.machine_id),
        state=JobState(row.state),
        report_seq=row.report_seq,
        running_at=row.running_at,
        ended_at=row.ended_at,
        outcome=Outcome(row.outcome) if row.outcome else None,
        exit_code=row.exit_code,
        message=row.message,
    )


def _retry_policy(spec: jobs_pb2.JobSpec) -> RetryPolicy:
    if not spec.HasField("retry"):
        return lifecycle.DEFAULT_RETRY
    return RetryPolicy(
        on_events=frozenset(RetryOn(event) for event in spec.retry.on_events),
        duration_seconds=spec.retry.duration_seconds or None,
    )


class JobBatch:
    """Some jobs, locked in one transaction. Apply events, then save() once."""

    def __init__(self, rows: Mapping[UUID, JobRow], now: datetime) -> None:
        self._rows = rows
        self._now = now
        self._jobs = {job_id: snapshot_of(row) for job_id, row in rows.items()}
        self._results_epoch = {job_id: row.results_epoch for job_id, row in rows.items()}
        self._event_seq = {job_id: row.event_seq for job_id, row in rows.items()}
        self._changed: set[UUID] = set()
        self._events: list[dict[str, Any]] = []
        self._attempts: dict[UUID, dict[str, Any]] = {}
        self._opened: list[Mapping[str, Any]] = []
        self._leases: list[Mapping[str, Any]] = []
        self._closed: list[UUID] = []
        self._machines: set[UUID] = set()
        """Whose desired attempts have changed."""
        self._to_tell: set[UUID] = set()
        """Those of them that do not know it yet, without the attempts that are new there."""
        self._openings: list[tuple[UUID, Opening]] = []
        """Job and how its attempt was opened, where its machine need not hear anything else."""
        self._revisions: Asked[RevisionRow] | None = None
        self._requeued: set[UUID] = set()
        self._out_of_lease: frozenset[AttemptId] = frozenset()
        self._checkpoints: dict[UUID, dict[str, Any]] = {}
        self._ports: dict[UUID, bytes] = {}

    @staticmethod
    async def lock(tx: Tx, job_ids: Iterable[UUID], now: datetime) -> "JobBatch":
        batch = JobBatch(await store.lock_jobs(tx, set(job_ids)), now)
        await batch.find_gangs(tx)
        return batch

    @staticmethod
    async def lock_reported(tx: Tx, statuses: Sequence[machine_pb2.AttemptStatus], now: datetime) -> "JobBatch":
        """For fold(). What is reported of attempts whose lease has run out changes nothing (I2)."""
        job_ids = {JobId.parse(status.job_id).uuid for status in statuses}
        attempts = list({AttemptId.parse(status.attempt_id).uuid for status in statuses})
        rows, expired = await store.lock_jobs_of_attempts(tx, job_ids, attempts, now)
        batch = JobBatch(rows, now)
        batch._out_of_lease = frozenset(map(AttemptId, expired))
        await batch.find_gangs(tx)
        return batch

    async def find_gangs(self, tx: Tx) -> None:
        """The attempts of the live gangs among the jobs; other jobs cost nothing here."""
        live = [job_id for job_id, job in self._jobs.items() if job.nodes > 1 and job.attempt_id is not None]
        for job_id, nodes in (await store.gang_nodes(tx, live)).items() if live else ():
            self._jobs[job_id] = self._jobs[job_id].but(gang=tuple(map(_gang_node, nodes)))

    def apply_to(self, job_id: UUID, attempt_id: UUID, event: lifecycle.LeaseExpired) -> None:
        """Like apply(), for what befalls one attempt of the job, which may be a node of a gang."""
        rank = lifecycle.rank_of(self._jobs[job_id], AttemptId(attempt_id))
        self.apply(job_id, event if rank is None else lifecycle.OnNode(rank, event))

    def holds(self, job_id: UUID, attempt_id: UUID) -> bool:
        """Does the attempt live, as the job's or as a node of its gang?"""
        job = self._jobs.get(job_id)
        return job is not None and AttemptId(attempt_id) in _live_attempts(job)

    def get(self, job_id: UUID) -> JobSnapshot | None:
        """The job as it is after what was applied so far; None when there is no such job."""
        return self._jobs.get(job_id)

    def apply(self, job_id: UUID, event: lifecycle.Event, opening: Opening | None = None) -> JobSnapshot:
        """Raises IllegalTransition for a pair that the table does not have."""
        before = self._jobs[job_id]
        after, effects = lifecycle.transition(before, event, self._now)
        self._take(before, after, effects, opening, None)
        return after

    def fold(self, machine_id: MachineId, status: machine_pb2.AttemptStatus) -> None:
        """What a machine says of one of its attempts; stale and repeated reports change nothing."""
        job_id = JobId.parse(status.job_id).uuid
        if job_id not in self._jobs or AttemptId.parse(status.attempt_id) in self._out_of_lease:
            return
        event = _event_of(status)
        if event is None:
            return
        if isinstance(event, lifecycle.AttemptEnded):
            self._start_unseen(job_id, machine_id, status)
        before = self._jobs[job_id]
        report = lifecycle.AttemptReport(
            AttemptId.parse(status.attempt_id), machine_id, status.epoch, status.seq, event
        )
        folded = lifecycle.fold_report(before, report, self._now)
        if isinstance(folded, lifecycle.Folded):
            if status.checkpoint.number:
                self._checkpoints[report.attempt_id.uuid] = _checkpoint(report.attempt_id, status.checkpoint)
            if status.ports:
                ports = machine_pb2.AttemptStatus(ports=status.ports)
                self._ports[report.attempt_id.uuid] = ports.SerializeToString()
            self._take(before, folded.job, folded.effects, None, status)

    def _start_unseen(self, job_id: UUID, machine_id: MachineId, status: machine_pb2.AttemptStatus) -> None:
        """The report of the start got lost or was overtaken: bill from when it must have started, never from before
        the placement."""
        before = self._jobs[job_id]
        if (
            _running_at(before, AttemptId.parse(status.attempt_id)) is not None
            or status.ran_ms <= 0
            or before.placed_at is None
        ):
            return
        ran = timedelta(milliseconds=min(status.ran_ms, MAX_RAN_MS))
        started_at = max(before.placed_at, self._now - ran)
        report = lifecycle.AttemptReport(
            AttemptId.parse(status.attempt_id), machine_id, status.epoch, status.seq - 1, lifecycle.AttemptRunning()
        )
        folded = lifecycle.fold_report(before, report, started_at)
        if isinstance(folded, lifecycle.Folded):
            self._take(before, folded.job, folded.effects, None, None)

    def _take(
        self,
        before: JobSnapshot,
        after: JobSnapshot,
        effects: tuple[lifecycle.Effect, ...],
        opening: Opening | None,
        status: machine_pb2.AttemptStatus | None,
    ) -> None:
        job_id = after.id.uuid
        if after == before and not effects:
            return
        self._jobs[job_id] = after
        self._changed.add(job_id)
        if after.gang and before.gang:
            self._nodes(before, after)
        elif before.attempt_id is not None and after.attempt_id == before.attempt_id:
            self._attempt(before.attempt_id.uuid, after)
        for effect in effects:
            self._effect(effect, before, opening, status)
        if after.state is JobState.QUEUED and before.state is not JobState.QUEUED:
            self._requeued.add(job_id)
        if told := _event_text(before, after, opening):
            type_, text = told
            if type_ == "running" and status is not None:
                # Of a gang only the last node is known here; an attempt has its own.
                text += "" if after.gang else _ports_text(status)
            self._tell(job_id, after, before.attempt_id or after.attempt_id, type_, text)

    def _attempt(self, attempt_id: UUID, job: JobSnapshot) -> dict[str, Any]:
        record = self._attempts.setdefault(attempt_id, {"id": attempt_id})
        record["state"] = job.state.value
        record["running_at"] = job.running_at
        return record

    def _nodes(self, before: JobSnapshot, after: JobSnapshot) -> None:
        for was, node in zip(before.gang, after.gang, strict=True):
            if node != was:
                record = self._attempts.setdefault(node.attempt_id.uuid, {"id": node.attempt_id.uuid})
                record |= {
                    "state": node.state.value,
                    "running_at": node.running_at,
                    "report_seq": node.report_seq,
                }

    def _effect(
        self,
        effect: lifecycle.Effect,
        before: JobSnapshot,
        opening: Opening | None,
        status: machine_pb2.AttemptStatus | None,
    ) -> None:
        match effect:
            case lifecycle.OpenAttempt(attempt_id, machine_id, epoch, rank):
                assert opening is not None, "a placement says what it opens"
                of_node = {"id": attempt_id.uuid, "epoch": epoch, "node_rank": rank, "nodes": before.nodes}
                self._opened.append({**opening.attempts[rank], **of_node})
                self._leases.extend({**device, "attempt_id": attempt_id.uuid} for device in opening.devices[rank])
                self._machines.add(machine_id.uuid)
                if epoch == 1 and before.nodes == 1:
                    self._openings.append((before.id.uuid, opening))
                else:
                    # It may have a checkpoint to go on from, or other nodes to find.
                    self._to_tell.add(machine_id.uuid)
            case lifecycle.StopAttempt(attempt_id, machine_id, _, why):
                record = (
                    self._attempts.setdefault(attempt_id.uuid, {"id": attempt_id.uuid})
                    if before.gang
                    else self._attempt(attempt_id.uuid, self._jobs[before.id.uuid])
                )
                record["stop_reason"] = why.value
                record["stop_requested_at"] = self._now
                self._machines.add(machine_id.uuid)
                self._to_tell.add(machine_id.uuid)
            case lifecycle.CloseAttempt(attempt_id, machine_id, _, outcome, exit_code, message):
                self._close(attempt_id.uuid, outcome, exit_code, message, before, status)
                self._machines.add(machine_id.uuid)
                if status is None or AttemptId.parse(status.attempt_id) != attempt_id:
                    self._to_tell.add(machine_id.uuid)
            case lifecycle.CloseHold(attempt_id, since, until):
                seconds = billable_seconds(since, until)
                if status is not None and status.ran_ms > 0:
                    # A provider's report may only lower what the server's clock says.
                    seconds = min(seconds, max(1, math.ceil(status.ran_ms / 1000)))
                self._attempts[attempt_id.uuid]["billed_seconds"] = seconds
            case lifecycle.PublishResults(_, epoch):
                # The other nodes of a gang have told theirs before.
                if before.gang or (status is not None and status.results):
                    self._results_epoch[before.id.uuid] = epoch
            case lifecycle.ScheduleRetry() | lifecycle.EndJob():
                pass  # `not_before` and the terminal state are in the job itself

    def _close(
        self,
        attempt_id: UUID,
        outcome: Outcome | None,
        exit_code: int | None,
        message: str,
        before: JobSnapshot,
        status: machine_pb2.AttemptStatus | None,
    ) -> None:
        record = self._attempts.setdefault(attempt_id, {"id": attempt_id})
        state = _ATTEMPT_END_STATES.get(outcome, JobState.FAILED) if outcome else JobState.CANCELLED
        record |= {
            "state": state.value,
            "outcome": outcome.value if outcome else None,
            "exit_code": exit_code,
            "message": message,
            "running_at": _running_at(before, AttemptId(attempt_id)),
            "ended_at": self._now,
        }
        if status is not None:
            record["results"] = machine_pb2.AttemptStatus(results=status.results).SerializeToString()
            record["sandbox"] = status.sandbox[:MAX_SANDBOX_LENGTH].replace(_NUL, "") or None
            record["silent"] = not status.log_bytes
        self._closed.append(attempt_id)

    def _tell(self, job_id: UUID, job: JobSnapshot, attempt_id: AttemptId | None, type_: str, message: str) -> None:
        self._event_seq[job_id] += 1
        self._events.append({
            "job_id": job_id,
            "seq": self._event_seq[job_id],
            "state": job.state.value,
            "type": type_,
            "message": message,
            "attempt_id": attempt_id.uuid if attempt_id else None,
            "occurred_at": self._now,
        })  # fmt: skip

    async def save(self, tx: Tx, outbox: Outbox, wakeups: Wakeups, *, lease_seconds: float) -> None:
        """Write every change of this batch, and what has to be published, into `tx`."""
        if not self._changed:
            return
        if self._checkpoints:
            await store_preemptions.save_checkpoints(tx, list(self._checkpoints.values()), self._now)
        if self._ports:
            await store.save_ports(tx, self._ports)
        if self._attempts:
            await store.save_attempts(tx, [_complete(record) for record in self._attempts.values()])
        if self._closed:
            await store.release_devices(tx, self._closed)
        await store.save_jobs(tx, [self._record(job_id) for job_id in self._changed])
        if self._opened:
            await store.insert_attempts(tx, self._opened, now=self._now, lease_seconds=lease_seconds)
            await store.lease_devices(tx, self._leases)
        if self._events:
            await store.insert_events(tx, self._events)
        if self._machines:
            self._revisions = await store.bump_machines(tx, self._machines)
        await outbox.add(tx, self._messages())
        lease_expires_at = self._now + timedelta(seconds=lease_seconds)
        tx.after_commit.append(lambda: self._wake(wakeups, lease_expires_at))

    def _wake(self, wakeups: Wakeups, lease_expires_at: datetime) -> None:
        if self._to_tell:
            wakeups.machines(self._to_tell)
        if self._openings and self._revisions is not None:
            revisions = {row.machine_id: row.desired_revision for row in self._revisions.known()}
            wakeups.opened([self._opened_attempt(*each, lease_expires_at) for each in self._openings], revisions)
        if self._closed:
            wakeups.ended(self._closed)
            wakeups.placement()
        if self._closed or any(self._jobs[job_id].state.terminal for job_id in self._changed):
            wakeups.settlement()
        if any(self._rows[job_id].array_id and self._jobs[job_id].state.terminal for job_id in self._changed):
            wakeups.arrays()

    def _opened_attempt(self, job_id: UUID, opening: Opening, lease_expires_at: datetime) -> Opened:
        job, row = self._jobs[job_id], self._rows[job_id]
        assert job.attempt_id is not None, "it was opened in this transaction"
        assert job.machine_id is not None, "it was opened in this transaction"
        attempt_id = job.attempt_id.uuid
        desired = DesiredRow(
            id=attempt_id,
            job_id=job_id,
            team_id=row.team_id,
            epoch=job.epoch,
            machine_id=job.machine_id.uuid,
            stop_reason=job.stop_reason.value if job.stop_reason else None,
            lease_expires_at=lease_expires_at,
            spec=row.spec,
            traceparent=row.traceparent,
            node_rank=0,
            first_attempt_id=attempt_id,
            node_machines=[],
        )
        return Opened(desired, [LeaseRow(attempt_id=attempt_id, **device) for device in opening.devices[0]])

    def _messages(self) -> list[tuple[str, Message]]:
        changed = dict.fromkeys(record["job_id"] for record in self._events)
        return [*changed_messages(list(changed)), *submitted_messages(sorted(self._requeued))]

    def _record(self, job_id: UUID) -> dict[str, Any]:
        job = self._jobs[job_id]
        return {
            "id": job_id,
            "state": job.state.value,
            "epoch": job.epoch,
            "attempts_used": job.attempts_used,
            "reason": job.queue_reason.value if job.queue_reason else None,
            "reason_detail": job.queue_detail,
            "not_before": job.not_before,
            "attempt_id": job.attempt_id.uuid if job.attempt_id else None,
            "machine_id": job.machine_id.uuid if job.machine_id else None,
            "report_seq": job.report_seq,
            "placed_at": job.placed_at,
            "running_at": job.running_at,
            "first_running_at": job.first_running_at,
            "stop_reason": job.stop_reason.value if job.stop_reason else None,
            "stop_by": job.stop_by,
            "avoided_machines": [str(machine.uuid) for machine in job.avoided_machines],
            "ended_at": job.ended_at,
            "outcome": job.outcome.value if job.outcome else None,
            "exit_code": job.exit_code,
            "message": job.message,
            "results_epoch": self._results_epoch[job_id],
            "event_seq": self._event_seq[job_id],
        }


def _checkpoint(attempt_id: AttemptId, saved: machine_pb2.Saved) -> dict[str, Any]:
    return {
        "id": attempt_id.uuid,
        "checkpoint_number": saved.number,
        "checkpoint_sha256": saved.sha256 or None,
        "checkpoint_size_bytes": saved.size_bytes,
        "checkpoint_slot": saved.slot,
    }


def _ports_text(status: machine_pb2.AttemptStatus) -> str:
    return "".join(f"; port {port.number} is {port.address}:{port.machine_port}" for port in status.ports)


_ATTEMPT_COLUMNS = (
    "id", "state", "stop_reason", "outcome", "exit_code", "message", "running_at", "ended_at", "results",
    "billed_seconds", "sandbox", "stop_requested_at", "report_seq", "silent",
)  # fmt: skip


def _live_attempts(job: JobSnapshot) -> list[AttemptId]:
    if job.gang:
        return [node.attempt_id for node in job.gang if not node.ended]
    return [job.attempt_id] if job.attempt_id is not None else []


def _running_at(job: JobSnapshot, attempt_id: AttemptId) -> datetime | None:
    rank = lifecycle.rank_of(job, attempt_id)
    return job.running_at if rank is None else job.gang[rank].running_at


def _complete(record: Mapping[str, Any]) -> dict[str, Any]:
    return {column: record.get(column) for column in _ATTEMPT_COLUMNS}


def _event_of(status: machine_pb2.AttemptStatus) -> (
    lifecycle.AttemptStarting | lifecycle.AttemptRunning | lifecycle.AttemptStopping | lifecycle.AttemptEnded | None
):  # fmt: skip
    match status.state:
        case jobs_pb2.STARTING:
            return lifecycle.AttemptStarting()
        case jobs_pb2.RUNNING:
            return lifecycle.AttemptRunning()
        case jobs_pb2.STOPPING:
            return lifecycle.AttemptStopping()
        case jobs_pb2.SUCCEEDED | jobs_pb2.FAILED | jobs_pb2.CANCELLED:
            outcome = outcome_of(status.outcome) or Outcome.PROVIDER_FAULT
            exit_code = status.exit_code if status.HasField("exit_code") else None
            return lifecycle.AttemptEnded(outcome, exit_code, status.message[:MAX_MESSAGE_LENGTH].replace(_NUL, ""))
        case _:
            return None


def outcome_of(value: "jobs_pb2.Outcome.ValueType") -> Outcome | None:
    """None for OUTCOME_UNSPECIFIED and for values of a newer daemon."""
    if value not in jobs_pb2.Outcome.values() or value == jobs_pb2.OUTCOME_UNSPECIFIED:
        return None
    return Outcome(jobs_pb2.Outcome.Name(value).removeprefix("OUTCOME_").lower())


def _event_text(before: JobSnapshot, after: JobSnapshot, opening: Opening | None) -> tuple[str, str] | None:
    """(type, message) of the job's history line for this change; None when people need not hear of it."""
    if after.state is JobState.QUEUED:
        if before.state is not JobState.QUEUED:
            return "requeued", after.queue_detail or (after.queue_reason.text if after.queue_reason else "")
        if after.queue_reason != before.queue_reason and after.queue_reason is not None:
            return "waiting", after.queue_detail or after.queue_reason.text
        return None
    if after.state is before.state:
        return None
    match after.state:
        case JobState.PLACED:
            return "placed", opening.message if opening else ""
        case JobState.STARTING:
            return "starting", "the machine fetches the inputs"
        case JobState.RUNNING:
            return "running", "the command runs; billing began"
        case JobState.STOPPING:
            why = after.stop_reason.value if after.stop_reason else ""
            if after.stop_reason is StopReason.PREEMPTED:
                return "stop_requested", f"{why} {after.stop_by}"
            return "stop_requested", f"{why} (by {after.stop_by})" if after.stop_by else why
        case _:
            code = f", exit code {after.exit_code}" if after.exit_code is not None else ""
            outcome = after.outcome.value if after.outcome else ""
            return "ended", f"{outcome}{code}" + (f": {after.message}" if after.message else "")


def submitted_messages(job_ids: Sequence[UUID]) -> Iterator[tuple[str, Message]]:
    """What tells placement about jobs."""
    for some in batched(job_ids, JOBS_PER_MESSAGE_MAX):
        yield subjects.JOB_SUBMITTED, events_pb2.JobsSubmitted(job_ids=[str(JobId(job_id)) for job_id in some])


def changed_messages(job_ids: Sequence[UUID]) -> Iterator[tuple[str, Message]]:
    """What tells followers about jobs. Of those that are just submitted nobody can be one."""
    for some in batched(job_ids, JOBS_PER_MESSAGE_MAX):
        yield subjects.JOBS_CHANGED, events_pb2.JobsChanged(job_ids=[str(JobId(job_id)) for job_id in some])


def event_message(row: store.EventRow) -> jobs_pb2.JobEvent:
    event = jobs_pb2.JobEvent(
        job_id=str(JobId(row.job_id)),
        seq=row.seq,
        state=jobs_pb2.JobState.Value(row.state),
        type=row.type,
        message=row.message,
        attempt_id=str(AttemptId(row.attempt_id)) if row.attempt_id else "",
    )
    event.occurred_at.FromDatetime(row.occurred_at)
    return event
