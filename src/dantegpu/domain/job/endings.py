"""What the end of an attempt means for its job: billed or not, tried again or over."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from dantegpu.domain.ids import AttemptId, MachineId
from dantegpu.domain.job.events import CloseAttempt, CloseHold, Effect, EndJob, PublishResults, ScheduleRetry
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


@dataclass(frozen=True, slots=True)
class Ending:
    """How the live attempt ended, and up to when it may be billed."""

    outcome: Outcome
    exit_code: int | None
    message: str
    billed_until: datetime
    results_uploaded: bool
    handed_back: bool = False
    """The machine gave the attempt up in order, as its daemon stopped: nothing has gone wrong with the job."""


def effective_outcome(job: JobSnapshot, reported: Outcome) -> Outcome:
    """What the attempt's end means, given who asked for it."""
    if reported in (Outcome.SUCCEEDED, Outcome.PROVIDER_FAULT):
        return reported
    if job.stop_reason is StopReason.NODE_FAILED:
        # Another node of the gang was first; how this one ended is its own affair.
        return reported
    if job.stop_reason is None:
        # A machine that gave up by itself: not the user's doing.
        return Outcome.PROVIDER_FAULT if reported in (Outcome.CANCELLED, Outcome.PREEMPTED) else reported
    if reported is Outcome.TIMED_OUT:
        return reported
    return stop_outcome(job.stop_reason)


def stop_outcome(why: StopReason | None) -> Outcome:
    match why:
        case StopReason.MAX_DURATION | StopReason.BUDGET | StopReason.DEADLINE:
            return Outcome.TIMED_OUT
        case StopReason.NO_FUNDS | StopReason.PREEMPTED | StopReason.MACHINE_DRAINED:
            return Outcome.PREEMPTED
        case StopReason.USER | StopReason.OPERATOR | StopReason.DEPENDENCY | StopReason.NODE_FAILED | None:
            return Outcome.CANCELLED


def finish_attempt(job: JobSnapshot, ending: Ending, now: datetime) -> Step:
    attempt_id, machine_id = live_attempt(job)
    effects = (
        CloseAttempt(attempt_id, machine_id, job.epoch, ending.outcome, ending.exit_code, ending.message),
        close_hold(attempt_id, job.running_at, ending),
    )
    at_fault = (machine_id,) if ending.outcome in (Outcome.LOST, Outcome.PROVIDER_FAULT) else ()
    return what_follows(job, ending, at_fault, effects, now)


def what_follows(
    job: JobSnapshot, ending: Ending, at_fault: tuple[MachineId, ...], effects: tuple[Effect, ...], now: datetime
) -> Step:
    """After the last of a job's live attempts has ended: back to the queue, or over."""
    attempt_id, _ = live_attempt(job)
    outcome = ending.outcome
    if outcome.interruption and job.stop_reason in ENDS_JOB:
        outcome = stop_outcome(job.stop_reason)
    freed = replace(
        without_attempt(job),
        exit_code=ending.exit_code,
        message=ending.message,
        # Running out of money, giving way to others, or a machine that is switched off in order: no try went wrong.
        attempts_used=job.attempts_used + (outcome is not Outcome.PREEMPTED and not ending.handed_back),
    )
    if outcome is Outcome.PREEMPTED and job.stop_reason is StopReason.NO_FUNDS:
        # No timer: the next round asks billing again.
        return back_to_queue(freed, QueueReason.NO_FUNDS, ""), effects
    if outcome is Outcome.PREEMPTED and job.stop_reason is StopReason.PREEMPTED:
        # Whatever its retries say, and without a pause: it was there before those that came meanwhile.
        return back_to_queue(freed, QueueReason.PREEMPTED, f"Preempted {job.stop_by}."), effects
    if _may_retry(freed, outcome, now):
        freed = freed.but(avoided_machines=avoid(job, *at_fault))
        return _retry_later(freed, outcome, now, effects)
    if ending.results_uploaded:
        effects += (PublishResults(attempt_id, job.epoch),)
    ended, more = end(freed, outcome, now)
    return ended, effects + more


def close_hold(attempt_id: AttemptId, running_at: datetime | None, ending: Ending) -> CloseHold:
    """Only the time in which the command ran on a healthy machine is billed."""
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
    waiting = back_to_queue(job, QueueReason.WAITING_FOR_RETRY, detail).but(not_before=at)
    return waiting, (*effects, ScheduleRetry(at))


def back_to_queue(job: JobSnapshot, reason: QueueReason, detail: str) -> JobSnapshot:
    return job.but(state=JobState.QUEUED, queue_reason=reason, queue_detail=detail, stop_reason=None, stop_by="")


def end(job: JobSnapshot, outcome: Outcome, now: datetime) -> Step:
    match outcome:
        case Outcome.SUCCEEDED:
            state = JobState.SUCCEEDED
        case Outcome.CANCELLED:
            state = JobState.CANCELLED
        case Outcome.FAILED | Outcome.LOST | Outcome.PREEMPTED | Outcome.TIMED_OUT | Outcome.PROVIDER_FAULT:
            state = JobState.FAILED
    ended = job.but(state=state, outcome=outcome, ended_at=now, queue_reason=None, queue_detail="", not_before=None)
    return ended, (EndJob(state, outcome),)


def without_attempt(job: JobSnapshot) -> JobSnapshot:
    return job.but(attempt_id=None, machine_id=None, placed_at=None, running_at=None, gang=())


def avoid(job: JobSnapshot, *machines: MachineId) -> tuple[MachineId, ...]:
    others = tuple(machine for machine in job.avoided_machines if machine not in machines)
    return (*others, *machines)[-MAX_AVOIDED_MACHINES:]


def live_attempt(job: JobSnapshot) -> tuple[AttemptId, MachineId]:
    if job.attempt_id is None or job.machine_id is None:
        raise ValueError(f"{job.id} is {job.state} without an attempt")
    return job.attempt_id, job.machine_id
