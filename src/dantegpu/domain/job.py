"""The life of a job: states, events, effects as values, and one table that says what is allowed.

`transition(job, event, now)` is the only way to a new state. A machine's reports go through `fold_report`, which
decides stale epochs and doubled reports before the table is asked. Effects are returned, never done here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from dantegpu.domain.ids import AttemptId, JobId, MachineId, TeamId

RETRY_BACKOFF_BASE_SECONDS = 2
RETRY_BACKOFF_MAX_SECONDS = 300
DEFAULT_MAX_ATTEMPTS = 5
MAX_AVOIDED_MACHINES = 16


class JobState(StrEnum):
    QUEUED = "QUEUED"
    PLACED = "PLACED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL

    @property
    def live(self) -> bool:
        """An attempt of the job holds devices."""
        return self in _LIVE


_TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
_LIVE = frozenset({JobState.PLACED, JobState.STARTING, JobState.RUNNING, JobState.STOPPING})


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    PREEMPTED = "preempted"
    TIMED_OUT = "timed_out"
    PROVIDER_FAULT = "provider_fault"

    @property
    def interruption(self) -> bool:
        """Not the job's own doing: retried by default."""
        return self in _INTERRUPTIONS


_INTERRUPTIONS = frozenset({Outcome.LOST, Outcome.PREEMPTED, Outcome.PROVIDER_FAULT})


class QueueReason(StrEnum):
    """Why a queued job still waits. Every queued job has one."""

    NEW = "new"
    NO_FUNDS = "no_funds"
    NO_PROVIDER_ONLINE = "no_provider_online"
    NO_MATCHING_GPU = "no_matching_gpu"
    NO_MATCHING_MACHINE = "no_matching_machine"
    RESTRICTED = "restricted"
    PRICE_ABOVE_MAX = "price_above_max"
    NO_CAPACITY = "no_capacity"
    WAITING_FOR_RETRY = "waiting_for_retry"
    PLACEMENT_REVOKED = "placement_revoked"
    PAUSED = "paused"

    @property
    def text(self) -> str:
        """One sentence for people."""
        return _QUEUE_REASON_TEXTS[self]


_QUEUE_REASON_TEXTS: Mapping[QueueReason, str] = MappingProxyType({
    QueueReason.NEW: "It was just submitted and is looked at in the next scheduling round.",
    QueueReason.NO_FUNDS: "The team's wallet cannot cover the hold; the job starts when money comes in.",
    QueueReason.NO_PROVIDER_ONLINE: "No provider's machine is online.",
    QueueReason.NO_MATCHING_GPU: "No machine online has the requested GPUs.",
    QueueReason.NO_MATCHING_MACHINE: "Machines with such GPUs are online, but none is large enough otherwise.",
    QueueReason.RESTRICTED: "The machines that fit take only jobs of their own team (simulated GPUs or no sandbox).",
    QueueReason.PRICE_ABOVE_MAX: "Every machine that fits costs more than the job's max_price.",
    QueueReason.NO_CAPACITY: "Machines that fit are online, but busy.",
    QueueReason.WAITING_FOR_RETRY: "An attempt ended early; the next one starts after a short wait.",
    QueueReason.PLACEMENT_REVOKED: "The chosen machine could not take the job; another is being looked for.",
    QueueReason.PAUSED: "It is paused and waits to be resumed.",
})  # fmt: skip


class StopReason(StrEnum):
    """Why somebody asked for the job to stop; decides what the end of the attempt means."""

    USER = "user"
    OPERATOR = "operator"
    MAX_DURATION = "max_duration"
    BUDGET = "budget"
    NO_FUNDS = "no_funds"
    PREEMPTED = "preempted"
    MACHINE_DRAINED = "machine_drained"


_ENDS_JOB = frozenset({StopReason.USER, StopReason.OPERATOR, StopReason.MAX_DURATION, StopReason.BUDGET})


class RetryOn(StrEnum):
    """What a job file's `retry.on_events` may name."""

    NO_CAPACITY = "no-capacity"
    INTERRUPTION = "interruption"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Interruptions are always retried while attempts are left; the job's own errors only when asked.

    `max_attempts` counts all attempts that used up a try, the first included.
    `duration_seconds` bounds the time since submission in which a retry may still begin; None is unbounded.
    """

    on_events: frozenset[RetryOn] = frozenset({RetryOn.NO_CAPACITY, RetryOn.INTERRUPTION})
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    duration_seconds: int | None = None

    def backoff_seconds(self, attempts_used: int) -> int:
        """2, 4, 8, ... seconds after the first, second, third try, at most RETRY_BACKOFF_MAX_SECONDS."""
        return min(RETRY_BACKOFF_MAX_SECONDS, RETRY_BACKOFF_BASE_SECONDS << min(max(attempts_used - 1, 0), 16))


DEFAULT_RETRY = RetryPolicy()


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """All that a transition needs to know of a job. Times are the server's, aware UTC.

    `epoch` is the fencing token: it rises with each attempt and never falls. `report_seq` is the last report folded
    for the live attempt. `attempt_id`, `machine_id`, `placed_at` and `running_at` are of the live attempt, else None.
    """

    id: JobId
    team_id: TeamId
    submitted_at: datetime
    state: JobState = JobState.QUEUED
    epoch: int = 0
    attempts_used: int = 0
    retry: RetryPolicy = DEFAULT_RETRY
    queue_reason: QueueReason | None = QueueReason.NEW
    queue_detail: str = ""
    not_before: datetime | None = None
    attempt_id: AttemptId | None = None
    machine_id: MachineId | None = None
    report_seq: int = 0
    placed_at: datetime | None = None
    running_at: datetime | None = None
    stop_reason: StopReason | None = None
    stop_by: str = ""
    avoided_machines: tuple[MachineId, ...] = ()
    first_running_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: Outcome | None = None
    exit_code: int | None = None
    message: str = ""


# --- Events


@dataclass(frozen=True, slots=True)
class StillWaiting:
    """A round found no place. `detail` adds numbers to the reason's text."""

    reason: QueueReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The back-off is over."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A plan was applied: devices are leased and the hold is open."""

    attempt_id: AttemptId
    machine_id: MachineId


@dataclass(frozen=True, slots=True)
class PlacementRevoked:
    """The placement came to nothing before the machine began (refused, or the hold failed). Uses up no try."""

    reason: QueueReason = QueueReason.PLACEMENT_REVOKED
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AttemptStarting:
    """The machine prepares image and inputs. Not billed."""


@dataclass(frozen=True, slots=True)
class AttemptRunning:
    """The command runs. Billing begins."""


@dataclass(frozen=True, slots=True)
class AttemptStopping:
    """The machine is ending the attempt. Still billed until it says that it ended."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """`by` names the person or the part of the platform, for the audit log."""

    by: str
    why: StopReason = StopReason.USER


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """The machine says how the attempt ended. `exit_code` is None when no process ran."""

    outcome: Outcome
    exit_code: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class LeaseExpired:
    """The machine did not renew until receipt + lease + grace. Billing ends at `renewed_at`, the last renewal."""

    renewed_at: datetime
    message: str = "the machine stopped answering"


type Event = (
    StillWaiting
    | RetryDue
    | Placed
    | PlacementRevoked
    | AttemptStarting
    | AttemptRunning
    | AttemptStopping
    | StopRequested
    | AttemptEnded
    | LeaseExpired
)


# --- Effects: what the caller must do in the transaction that stores the new snapshot


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """Insert the attempt and lease its devices; then wake the machine."""

    attempt_id: AttemptId
    machine_id: MachineId
    epoch: int


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Set the stop flag in the machine's desired attempts; then wake the machine."""

    attempt_id: AttemptId
    machine_id: MachineId
    epoch: int
    why: StopReason


@dataclass(frozen=True, slots=True)
class CloseAttempt:
    """Write the attempt's outcome and free its devices. `outcome` None: revoked before the machine began."""

    attempt_id: AttemptId
    machine_id: MachineId
    epoch: int
    outcome: Outcome | None
    exit_code: int | None
    message: str


@dataclass(frozen=True, slots=True)
class CloseHold:
    """Post the seconds from `billable_from` to `billable_until`, void the rest. Both None: nothing is billed."""

    attempt_id: AttemptId
    billable_from: datetime | None
    billable_until: datetime | None


@dataclass(frozen=True, slots=True)
class PublishResults:
    """Make `results/<job>/<epoch>/` the job's results, if the job's epoch still is `epoch`."""

    attempt_id: AttemptId
    epoch: int


@dataclass(frozen=True, slots=True)
class ScheduleRetry:
    """Send `RetryDue` at `at`."""

    at: datetime


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job is terminal: archive its logs, tell followers."""

    state: JobState
    outcome: Outcome


type Effect = OpenAttempt | StopAttempt | CloseAttempt | CloseHold | PublishResults | ScheduleRetry | EndJob
type Step = tuple[JobSnapshot, tuple[Effect, ...]]


class IllegalTransition(Exception):
    """The table has no row for (state, event): a bug in the caller, never an answer to a user."""

    def __init__(self, job: JobSnapshot, event: Event) -> None:
        super().__init__(f"{job.id} in {job.state} cannot take {type(event).__name__}")
        self.state = job.state
        self.event = event


# --- Handlers


def _unchanged(job: JobSnapshot, event: Event, now: datetime) -> Step:
    return job, ()


def _still_waiting(job: JobSnapshot, event: StillWaiting, now: datetime) -> Step:
    return replace(job, queue_reason=event.reason, queue_detail=event.detail), ()


def _retry_due(job: JobSnapshot, event: RetryDue, now: datetime) -> Step:
    if job.not_before is None:
        return job, ()
    return replace(job, not_before=None, queue_reason=QueueReason.NEW, queue_detail=""), ()


def _placed(job: JobSnapshot, event: Placed, now: datetime) -> Step:
    placed = replace(
        job,
        state=JobState.PLACED,
        epoch=job.epoch + 1,
        attempt_id=event.attempt_id,
        machine_id=event.machine_id,
        report_seq=0,
        placed_at=now,
        running_at=None,
        queue_reason=None,
        queue_detail="",
        not_before=None,
    )
    return placed, (OpenAttempt(event.attempt_id, event.machine_id, placed.epoch),)


def _cancel_queued(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    if event.why not in _ENDS_JOB:
        return job, ()
    return _end(replace(job, stop_reason=event.why, stop_by=event.by), _stop_outcome(event.why), now)


def _stop_live(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    attempt_id, machine_id = _live_attempt(job)
    stopping = replace(job, state=JobState.STOPPING, stop_reason=event.why, stop_by=event.by)
    return stopping, (StopAttempt(attempt_id, machine_id, job.epoch, event.why),)


def _stop_stopping(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    # A user's stop outranks a preemption that is under way: the job must not come back.
    if event.why in _ENDS_JOB and job.stop_reason not in _ENDS_JOB:
        return replace(job, stop_reason=event.why, stop_by=event.by), ()
    return job, ()


def _starting(job: JobSnapshot, event: AttemptStarting, now: datetime) -> Step:
    return replace(job, state=JobState.STARTING), ()


def _running(job: JobSnapshot, event: AttemptRunning, now: datetime) -> Step:
    return replace(job, state=JobState.RUNNING, running_at=now, first_running_at=job.first_running_at or now), ()


def _running_while_stopping(job: JobSnapshot, event: AttemptRunning, now: datetime) -> Step:
    # The stop overtook the report; billing still needs the start.
    return replace(job, running_at=job.running_at or now, first_running_at=job.first_running_at or now), ()


def _revoked(job: JobSnapshot, event: PlacementRevoked, now: datetime) -> Step:
    attempt_id, machine_id = _live_attempt(job)
    effects = (
        CloseAttempt(attempt_id, machine_id, job.epoch, None, None, event.detail),
        CloseHold(attempt_id, None, None),
    )
    if job.stop_reason in _ENDS_JOB:
        ended, more = _end(_without_attempt(job), _stop_outcome(job.stop_reason), now)
        return ended, effects + more
    waiting = _back_to_queue(_without_attempt(job), event.reason, event.detail)
    return replace(waiting, avoided_machines=_avoid(job, machine_id)), effects


@dataclass(frozen=True, slots=True)
class _Ending:
    """How the live attempt ended, and up to when it may be billed."""

    outcome: Outcome
    exit_code: int | None
    message: str
    billed_until: datetime
    results_uploaded: bool


def _attempt_ended(job: JobSnapshot, event: AttemptEnded, now: datetime) -> Step:
    outcome = _effective_outcome(job, event.outcome)
    return _finish_attempt(job, _Ending(outcome, event.exit_code, event.message, now, results_uploaded=True), now)


def _lease_expired(job: JobSnapshot, event: LeaseExpired, now: datetime) -> Step:
    # A stop that was asked for has come true: the machine killed the attempt when its lease ran out.
    outcome = _effective_outcome(job, Outcome.CANCELLED) if job.stop_reason else Outcome.LOST
    return _finish_attempt(job, _Ending(outcome, None, event.message, event.renewed_at, results_uploaded=False), now)


def _effective_outcome(job: JobSnapshot, reported: Outcome) -> Outcome:
    """What the attempt's end means, given who asked for it."""
    if reported in (Outcome.SUCCEEDED, Outcome.PROVIDER_FAULT):
        return reported
    if job.stop_reason is None:
        # A machine that gave up by itself: not the user's doing.
        return Outcome.PROVIDER_FAULT if reported in (Outcome.CANCELLED, Outcome.PREEMPTED) else reported
    if reported is Outcome.TIMED_OUT:
        return reported
    return _stop_outcome(job.stop_reason)


def _stop_outcome(why: StopReason | None) -> Outcome:
    match why:
        case StopReason.MAX_DURATION | StopReason.BUDGET:
            return Outcome.TIMED_OUT
        case StopReason.NO_FUNDS | StopReason.PREEMPTED | StopReason.MACHINE_DRAINED:
            return Outcome.PREEMPTED
        case StopReason.USER | StopReason.OPERATOR | None:
            return Outcome.CANCELLED


def _finish_attempt(job: JobSnapshot, ending: _Ending, now: datetime) -> Step:
    attempt_id, machine_id = _live_attempt(job)
    outcome = ending.outcome
    effects: tuple[Effect, ...] = (
        CloseAttempt(attempt_id, machine_id, job.epoch, outcome, ending.exit_code, ending.message),
        _close_hold(job, attempt_id, ending),
    )
    if outcome.interruption and job.stop_reason in _ENDS_JOB:
        outcome = _stop_outcome(job.stop_reason)
    freed = replace(
        _without_attempt(job),
        exit_code=ending.exit_code,
        message=ending.message,
        # Running out of money or giving way to others is not a try that went wrong.
        attempts_used=job.attempts_used + (outcome is not Outcome.PREEMPTED),
    )
    if outcome is Outcome.PREEMPTED and job.stop_reason is StopReason.NO_FUNDS:
        # No timer: the next round asks billing again.
        return _back_to_queue(freed, QueueReason.NO_FUNDS, ""), effects
    if _may_retry(freed, outcome, now):
        if outcome in (Outcome.LOST, Outcome.PROVIDER_FAULT):
            freed = replace(freed, avoided_machines=_avoid(job, machine_id))
        return _retry_later(freed, outcome, now, effects)
    if ending.results_uploaded:
        effects += (PublishResults(attempt_id, job.epoch),)
    ended, more = _end(freed, outcome, now)
    return ended, effects + more


def _close_hold(job: JobSnapshot, attempt_id: AttemptId, ending: _Ending) -> CloseHold:
    """Only the time in which the command ran on a healthy machine is billed."""
    running_at = job.running_at
    if running_at is None and ending.exit_code is not None:
        # A command so short that its start was never told on its own: the least that is billed.
        running_at = ending.billed_until
    if running_at is None or ending.outcome is Outcome.PROVIDER_FAULT:
        return CloseHold(attempt_id, None, None)
    return CloseHold(attempt_id, running_at, max(ending.billed_until, running_at))


def _may_retry(job: JobSnapshot, outcome: Outcome, now: datetime) -> bool:
    asked = outcome.interruption or (outcome is Outcome.FAILED and RetryOn.ERROR in job.retry.on_events)
    window_seconds = job.retry.duration_seconds
    in_time = window_seconds is None or now <= job.submitted_at + timedelta(seconds=window_seconds)
    return asked and in_time and job.attempts_used < job.retry.max_attempts


def _retry_later(job: JobSnapshot, outcome: Outcome, now: datetime, effects: tuple[Effect, ...]) -> Step:
    at = now + timedelta(seconds=job.retry.backoff_seconds(job.attempts_used))
    detail = f"the last attempt ended {outcome.value}" + (f": {job.message}" if job.message else "")
    waiting = replace(_back_to_queue(job, QueueReason.WAITING_FOR_RETRY, detail), not_before=at)
    return waiting, (*effects, ScheduleRetry(at))


def _back_to_queue(job: JobSnapshot, reason: QueueReason, detail: str) -> JobSnapshot:
    return replace(job, state=JobState.QUEUED, queue_reason=reason, queue_detail=detail, stop_reason=None, stop_by="")


def _end(job: JobSnapshot, outcome: Outcome, now: datetime) -> Step:
    match outcome:
        case Outcome.SUCCEEDED:
            state = JobState.SUCCEEDED
        case Outcome.CANCELLED:
            state = JobState.CANCELLED
        case Outcome.FAILED | Outcome.LOST | Outcome.PREEMPTED | Outcome.TIMED_OUT | Outcome.PROVIDER_FAULT:
            state = JobState.FAILED
    ended = replace(
        job, state=state, outcome=outcome, ended_at=now, queue_reason=None, queue_detail="", not_before=None
    )
    return ended, (EndJob(state, outcome),)


def _without_attempt(job: JobSnapshot) -> JobSnapshot:
    return replace(job, attempt_id=None, machine_id=None, placed_at=None, running_at=None)


def _avoid(job: JobSnapshot, machine_id: MachineId) -> tuple[MachineId, ...]:
    others = tuple(machine for machine in job.avoided_machines if machine != machine_id)
    return (*others, machine_id)[-MAX_AVOIDED_MACHINES:]


def _live_attempt(job: JobSnapshot) -> tuple[AttemptId, MachineId]:
    if job.attempt_id is None or job.machine_id is None:
        raise ValueError(f"{job.id} is {job.state} without an attempt")
    return job.attempt_id, job.machine_id


# --- The table


@dataclass(frozen=True, slots=True)
class Row:
    """One allowed (state, event): what runs, where it can lead, and the sentence in docs/job_states.md."""

    # Each handler takes its own event type; the table's key guarantees the match.
    handler: Callable[[JobSnapshot, Any, datetime], Step] = field(repr=False)
    to: tuple[JobState, ...]
    says: str


_Q, _P, _S, _R, _X = (
    JobState.QUEUED,
    JobState.PLACED,
    JobState.STARTING,
    JobState.RUNNING,
    JobState.STOPPING,
)
_OK, _BAD, _OFF = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED


def _rows() -> dict[tuple[JobState, type[Event]], Row]:
    rows: dict[tuple[JobState, Any], Row] = {
        (_Q, StillWaiting): Row(_still_waiting, (_Q,), "keeps the newest reason why it waits"),
        (_Q, RetryDue): Row(_retry_due, (_Q,), "may be placed again"),
        (_Q, Placed): Row(_placed, (_P,), "a new attempt with the next epoch"),
        (_Q, StopRequested): Row(_cancel_queued, (_Q, _OFF, _BAD), "ends at once; nothing ran, nothing is billed"),
        (_P, AttemptStarting): Row(_starting, (_S,), "the machine prepares image and inputs"),
        (_S, AttemptStarting): Row(_unchanged, (_S,), "said again after the daemon restarted"),
        (_R, AttemptStarting): Row(_unchanged, (_R,), "said again after the daemon restarted"),
        (_X, AttemptStarting): Row(_unchanged, (_X,), "the stop overtook the report"),
        (_P, AttemptRunning): Row(_running, (_R,), "billing begins"),
        (_S, AttemptRunning): Row(_running, (_R,), "billing begins"),
        (_R, AttemptRunning): Row(_unchanged, (_R,), "said again after the daemon adopted it"),
        (_X, AttemptRunning): Row(
            _running_while_stopping, (_X,), "the stop overtook the report; billing has its start"
        ),
        (_P, PlacementRevoked): Row(
            _revoked, (_Q, _OFF, _BAD), "back to the queue, no try is used up, nothing is billed"
        ),
        (_X, PlacementRevoked): Row(_revoked, (_Q, _OFF, _BAD), "ends, or goes back to the queue after a preemption"),
    }
    for live in (_P, _S, _R):
        rows[live, StopRequested] = Row(_stop_live, (_X,), "the machine is told to stop the attempt")
    rows[_X, StopRequested] = Row(_stop_stopping, (_X,), "a user's stop outranks a preemption under way")
    for live in (_P, _S, _R, _X):
        rows[live, AttemptStopping] = Row(_unchanged, (live,), "the machine is ending it; its end follows")
        ends = (_OK, _BAD, _OFF, _Q)
        rows[live, AttemptEnded] = Row(_attempt_ended, ends, "ends, or waits for a retry (see outcomes)")
        rows[live, LeaseExpired] = Row(
            _lease_expired, (_Q, _BAD, _OFF), "lost: billed to the last renewal, then a retry"
        )
        rows[live, RetryDue] = Row(_unchanged, (live,), "a late timer changes nothing")
    for terminal in (_OK, _BAD, _OFF):
        rows[terminal, StopRequested] = Row(_unchanged, (terminal,), "it is over already")
        rows[terminal, RetryDue] = Row(_unchanged, (terminal,), "a late timer changes nothing")
    return rows


TRANSITIONS: Mapping[tuple[JobState, type[Event]], Row] = MappingProxyType(_rows())


def transition(job: JobSnapshot, event: Event, now: datetime) -> Step:
    """The job after `event`, and what to do about it. Raises `IllegalTransition` for a pair that is not listed."""
    row = TRANSITIONS.get((job.state, type(event)))
    if row is None:
        raise IllegalTransition(job, event)
    after, effects = row.handler(job, event, now)
    if after.state not in row.to:
        raise AssertionError(
            f"{job.state} + {type(event).__name__} led to {after.state}, which the table does not list"
        )
    return after, effects


# --- Reports of machines


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """One change of an attempt as its machine tells it. `seq` rises by one per change within an attempt."""

    attempt_id: AttemptId
    machine_id: MachineId
    epoch: int
    seq: int
    event: AttemptStarting | AttemptRunning | AttemptStopping | AttemptEnded


@dataclass(frozen=True, slots=True)
class Stale:
    """The report changes nothing: doubled, late, or of an attempt that this machine no longer holds."""

    why: str


@dataclass(frozen=True, slots=True)
class Folded:
    job: JobSnapshot
    effects: tuple[Effect, ...]


def fold_report(job: JobSnapshot, report: AttemptReport, now: datetime) -> Folded | Stale:
    """Apply a machine's report, or say why it changes nothing. Never raises for what a machine may send."""
    if not job.state.live or job.attempt_id is None:
        return Stale(f"the job has no live attempt ({job.state})")
    if report.epoch != job.epoch or report.attempt_id != job.attempt_id:
        return Stale(f"epoch {report.epoch} is not the live attempt's epoch {job.epoch}")
    if report.machine_id != job.machine_id:
        return Stale("the attempt belongs to another machine")
    if report.seq <= job.report_seq:
        return Stale(f"report {report.seq} was already folded (the last was {job.report_seq})")
    after, effects = transition(job, report.event, now)
    return Folded(replace(after, report_seq=report.seq), effects)
