"""The one table of what is allowed, and the handlers behind it. `transition` is the only way to a new state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from dantegpu.domain.ids import AttemptId, MachineId
from dantegpu.domain.job.events import (
    AttemptEnded,
    AttemptRunning,
    AttemptStarting,
    AttemptStopping,
    CloseAttempt,
    CloseHold,
    Effect,
    EndJob,
    Event,
    LeaseExpired,
    OpenAttempt,
    Placed,
    PlacementRevoked,
    PublishResults,
    RetryDue,
    ScheduleRetry,
    StillWaiting,
    StopAttempt,
    StopRequested,
)
from dantegpu.domain.job.model import (
    ENDS_JOB,
    MAX_AVOIDED_MACHINES,
    JobSnapshot,
    JobState,
    Outcome,
    QueueReason,
    RetryOn,
    StopReason,
)

type Step = tuple[JobSnapshot, tuple[Effect, ...]]


class IllegalTransition(Exception):
    """The table has no row for (state, event): a bug in the caller, never an answer to a user."""

    def __init__(self, job: JobSnapshot, event: Event) -> None:
        super().__init__(f"{job.id} in {job.state} cannot take {type(event).__name__}")
        self.state = job.state
        self.event = event


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
    if event.why not in ENDS_JOB:
        return job, ()
    asked = replace(job, stop_reason=event.why, stop_by=event.by, message=event.message or job.message)
    return _end(asked, _stop_outcome(event.why), now)


def _stop_live(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    attempt_id, machine_id = _live_attempt(job)
    stopping = replace(job, state=JobState.STOPPING, stop_reason=event.why, stop_by=event.by)
    return stopping, (StopAttempt(attempt_id, machine_id, job.epoch, event.why),)


def _stop_stopping(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    # A user's stop outranks a preemption that is under way: the job must not come back.
    if event.why in ENDS_JOB and job.stop_reason not in ENDS_JOB:
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
    if job.stop_reason in ENDS_JOB:
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
    handed_back: bool = False
    """The machine gave the attempt up in order, as its daemon stopped: nothing has gone wrong with the job."""


def _attempt_ended(job: JobSnapshot, event: AttemptEnded, now: datetime) -> Step:
    outcome = _effective_outcome(job, event.outcome)
    handed_back = event.outcome is Outcome.PREEMPTED
    ending = _Ending(outcome, event.exit_code, event.message, now, results_uploaded=True, handed_back=handed_back)
    return _finish_attempt(job, ending, now)


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
        case StopReason.MAX_DURATION | StopReason.BUDGET | StopReason.DEADLINE:
            return Outcome.TIMED_OUT
        case StopReason.NO_FUNDS | StopReason.PREEMPTED | StopReason.MACHINE_DRAINED:
            return Outcome.PREEMPTED
        case StopReason.USER | StopReason.OPERATOR | StopReason.DEPENDENCY | None:
            return Outcome.CANCELLED


def _finish_attempt(job: JobSnapshot, ending: _Ending, now: datetime) -> Step:
    attempt_id, machine_id = _live_attempt(job)
    outcome = ending.outcome
    effects: tuple[Effect, ...] = (
        CloseAttempt(attempt_id, machine_id, job.epoch, outcome, ending.exit_code, ending.message),
        _close_hold(job, attempt_id, ending),
    )
    if outcome.interruption and job.stop_reason in ENDS_JOB:
        outcome = _stop_outcome(job.stop_reason)
    freed = replace(
        _without_attempt(job),
        exit_code=ending.exit_code,
        message=ending.message,
        # Running out of money, giving way to others, or a machine that is switched off in order: no try went wrong.
        attempts_used=job.attempts_used + (outcome is not Outcome.PREEMPTED and not ending.handed_back),
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
