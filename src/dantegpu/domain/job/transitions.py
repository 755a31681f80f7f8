"""The one table of what is allowed, and the handlers behind it. `transition` is the only way to a new state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from dantegpu.domain.job.endings import (
    Ending,
    Step,
    avoid,
    back_to_queue,
    effective_outcome,
    end,
    finish_attempt,
    live_attempt,
    stop_outcome,
    without_attempt,
)
from dantegpu.domain.job.events import (
    AttemptEnded,
    AttemptRunning,
    AttemptStarting,
    AttemptStopping,
    Event,
    LeaseExpired,
    OnNode,
    Placed,
    PlacementRevoked,
    RetryDue,
    StillWaiting,
    StopRequested,
)
from dantegpu.domain.job.gang import on_node, open_nodes, revoke_attempts, stop_attempts, stopping_nodes
from dantegpu.domain.job.model import ENDS_JOB, JobSnapshot, JobState, Outcome, QueueReason

__all__ = ["TRANSITIONS", "IllegalTransition", "Row", "Step", "transition"]


class IllegalTransition(Exception):
    """The table has no row for (state, event): a bug in the caller, never an answer to a user."""

    def __init__(self, job: JobSnapshot, event: Event) -> None:
        super().__init__(f"{job.id} in {job.state} cannot take {type(event).__name__}")
        self.state = job.state
        self.event = event


def _unchanged(job: JobSnapshot, event: Event, now: datetime) -> Step:
    return job, ()


def _still_waiting(job: JobSnapshot, event: StillWaiting, now: datetime) -> Step:
    return job.but(queue_reason=event.reason, queue_detail=event.detail), ()


def _retry_due(job: JobSnapshot, event: RetryDue, now: datetime) -> Step:
    if job.not_before is None:
        return job, ()
    return job.but(not_before=None, queue_reason=QueueReason.NEW, queue_detail=""), ()


def _placed(job: JobSnapshot, event: Placed, now: datetime) -> Step:
    gang, opened = open_nodes(job, event)
    placed = job.but(
        state=JobState.PLACED,
        epoch=job.epoch + 1,
        attempt_id=event.attempt_id,
        machine_id=event.machine_id,
        report_seq=0,
        placed_at=now,
        running_at=None,
        exit_code=None,  # what the last attempt left is that attempt's
        message="",
        queue_reason=None,
        queue_detail="",
        not_before=None,
        gang=gang,
    )
    return placed, opened


def _cancel_queued(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    if event.why not in ENDS_JOB:
        return job, ()
    asked = job.but(stop_reason=event.why, stop_by=event.by, message=event.message or job.message)
    return end(asked, stop_outcome(event.why), now)


def _stop_live(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    stopping = job.but(state=JobState.STOPPING, stop_reason=event.why, stop_by=event.by, gang=stopping_nodes(job))
    return stopping, stop_attempts(job, event.why)


def _stop_stopping(job: JobSnapshot, event: StopRequested, now: datetime) -> Step:
    # A user's stop outranks a preemption that is under way: the job must not come back.
    if event.why in ENDS_JOB and job.stop_reason not in ENDS_JOB:
        return job.but(stop_reason=event.why, stop_by=event.by), ()
    return job, ()


def _starting(job: JobSnapshot, event: AttemptStarting, now: datetime) -> Step:
    return job.but(state=JobState.STARTING), ()


def _running(job: JobSnapshot, event: AttemptRunning, now: datetime) -> Step:
    return job.but(state=JobState.RUNNING, running_at=now, first_running_at=job.first_running_at or now), ()


def _running_while_stopping(job: JobSnapshot, event: AttemptRunning, now: datetime) -> Step:
    # The stop overtook the report; billing still needs the start.
    return job.but(running_at=job.running_at or now, first_running_at=job.first_running_at or now), ()


def _revoked(job: JobSnapshot, event: PlacementRevoked, now: datetime) -> Step:
    _, machine_id = live_attempt(job)
    effects = revoke_attempts(job, event.detail)
    if job.stop_reason in ENDS_JOB:
        ended, more = end(without_attempt(job), stop_outcome(job.stop_reason), now)
        return ended, effects + more
    waiting = back_to_queue(without_attempt(job), event.reason, event.detail)
    return waiting.but(avoided_machines=avoid(job, machine_id)), effects


def _attempt_ended(job: JobSnapshot, event: AttemptEnded, now: datetime) -> Step:
    outcome = effective_outcome(job, event.outcome)
    handed_back = event.outcome is Outcome.PREEMPTED
    ending = Ending(outcome, event.exit_code, event.message, now, results_uploaded=True, handed_back=handed_back)
    return finish_attempt(job, ending, now)


def _lease_expired(job: JobSnapshot, event: LeaseExpired, now: datetime) -> Step:
    # A stop that was asked for has come true: the machine killed the attempt when its lease ran out.
    outcome = effective_outcome(job, Outcome.CANCELLED) if job.stop_reason else Outcome.LOST
    return finish_attempt(job, Ending(outcome, None, event.message, event.renewed_at, results_uploaded=False), now)


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
        rows[live, OnNode] = Row(
            on_node, (_P, _S, _R, _X, *ends), "a gang's node: the job runs with the last and stops with the first"
        )
    for terminal in (_OK, _BAD, _OFF):
        rows[terminal, StopRequested] = Row(_unchanged, (terminal,), "it is over already")
        rows[terminal, RetryDue] = Row(_unchanged, (terminal,), "a late timer changes nothing")
    return rows


TRANSITIONS: Mapping[tuple[JobState, type[Event]], Row] = MappingProxyType(_rows())
_OF_ONE_ATTEMPT = (AttemptStarting, AttemptRunning, AttemptStopping, AttemptEnded, LeaseExpired)
"""Of a gang these say nothing without the node: they come in OnNode."""


def transition(job: JobSnapshot, event: Event, now: datetime) -> Step:
    """The job after `event`, and what to do about it.

    Raises `IllegalTransition` for a pair that is not listed, or for a gang's event that does not name the node.
    """
    row = TRANSITIONS.get((job.state, type(event)))
    if row is None or (job.gang and isinstance(event, _OF_ONE_ATTEMPT)):
        raise IllegalTransition(job, event)
    after, effects = row.handler(job, event, now)
    if after.state not in row.to:
        raise AssertionError(
            f"{job.state} + {type(event).__name__} led to {after.state}, which the table does not list"
        )
    return after, effects
