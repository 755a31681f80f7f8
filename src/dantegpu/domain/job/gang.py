"""A job on several machines at once: how the attempts of its nodes fold into one job.

All nodes are placed together and share one epoch. The job runs when all of them run, and succeeds when all of them
succeed. The first node that ends otherwise ends the gang: the others are told to stop, and when the last of them has
ended, that first end decides what becomes of the job, as the end of a single attempt would.
"""

from dataclasses import replace
from datetime import datetime

from dantegpu.domain.ids import AttemptId, MachineId
from dantegpu.domain.job.endings import (
    Ending,
    Step,
    close_hold,
    effective_outcome,
    live_attempt,
    stop_outcome,
    what_follows,
)
from dantegpu.domain.job.events import (
    AttemptEnded,
    AttemptRunning,
    AttemptStarting,
    AttemptStopping,
    CloseAttempt,
    CloseHold,
    LeaseExpired,
    OnNode,
    OpenAttempt,
    Placed,
    StopAttempt,
)
from dantegpu.domain.job.model import ENDS_JOB, GangNode, JobSnapshot, JobState, Outcome, StopReason


def rank_of(job: JobSnapshot, attempt_id: AttemptId) -> int | None:
    """Which node of the live gang the attempt is; None: it is none of them."""
    for rank, node in enumerate(job.gang):
        if node.attempt_id == attempt_id:
            return rank
    return None


def open_nodes(job: JobSnapshot, event: Placed) -> tuple[tuple[GangNode, ...], tuple[OpenAttempt, ...]]:
    """The nodes of a placement (none for a job with one node) and their attempts, in the epoch that begins.

    Raises ValueError for a gang that is not whole: all nodes, each on a machine of its own, or none.
    """
    places = ((event.attempt_id, event.machine_id), *event.others)
    if len(places) != job.nodes or len({machine_id for _, machine_id in places}) != job.nodes:
        raise ValueError(f"{job.id} has {job.nodes} nodes, but a plan with {len(places)} for it")
    opened = tuple(
        OpenAttempt(attempt_id, machine_id, job.epoch + 1, rank) for rank, (attempt_id, machine_id) in enumerate(places)
    )
    return tuple(GangNode(*place) for place in places) if job.nodes > 1 else (), opened


def stop_attempts(job: JobSnapshot, why: StopReason) -> tuple[StopAttempt, ...]:
    """Tell everything of the job that still lives to stop."""
    if not job.gang:
        return (StopAttempt(*live_attempt(job), job.epoch, why),)
    return tuple(StopAttempt(node.attempt_id, node.machine_id, job.epoch, why) for node in job.gang if not node.ended)


def stopping_nodes(job: JobSnapshot) -> tuple[GangNode, ...]:
    """The gang once it was told to stop."""
    return tuple(node if node.ended else replace(node, state=JobState.STOPPING) for node in job.gang)


def revoke_attempts(job: JobSnapshot, detail: str) -> tuple[CloseAttempt | CloseHold, ...]:
    """Close everything that was opened for a placement, unbilled."""
    live = [(node.attempt_id, node.machine_id) for node in job.gang if not node.ended] or [live_attempt(job)]
    return tuple(
        effect
        for attempt_id, machine_id in live
        for effect in (
            CloseAttempt(attempt_id, machine_id, job.epoch, None, None, detail),
            CloseHold(attempt_id, None, None),
        )
    )


def on_node(job: JobSnapshot, event: OnNode, now: datetime) -> Step:
    """One node's report, or the end of its lease. Nothing counts of a node that has ended."""
    node = job.gang[event.rank]
    if node.ended:
        return job, ()
    match event.event:
        case AttemptStarting():
            state = JobState.STARTING if node.state is JobState.PLACED else node.state
            return _together(_with(job, event.rank, replace(node, state=state)), now), ()
        case AttemptRunning():
            state = node.state if node.state is JobState.STOPPING else JobState.RUNNING
            running = replace(node, state=state, running_at=node.running_at or now)
            return _together(_with(job, event.rank, running), now), ()
        case AttemptStopping():
            return job, ()
        case AttemptEnded() | LeaseExpired() as ended:
            return _node_ended(job, event.rank, node, ended, now)


def _with(job: JobSnapshot, rank: int, node: GangNode) -> JobSnapshot:
    return job.but(gang=(*job.gang[:rank], node, *job.gang[rank + 1 :]))


def _together(job: JobSnapshot, now: datetime) -> JobSnapshot:
    """What the nodes are in common: RUNNING is what all have reached, STARTING what one has."""
    if job.state in (JobState.RUNNING, JobState.STOPPING):
        return job
    if all(node.running_at is not None or node.outcome is Outcome.SUCCEEDED for node in job.gang):
        first_running_at = job.first_running_at or now
        return job.but(state=JobState.RUNNING, running_at=now, first_running_at=first_running_at)
    begun = any(node.state is not JobState.PLACED for node in job.gang)
    return job.but(state=JobState.STARTING) if begun else job


def _node_ended(job: JobSnapshot, rank: int, node: GangNode, event: AttemptEnded | LeaseExpired, now: datetime) -> Step:
    ending = _ending(job, event, now)
    outcome = ending.outcome
    if isinstance(event, AttemptEnded) and event.outcome is Outcome.PREEMPTED and job.stop_reason is None:
        # Unbilled like a fault of the machine, but its owner switched it off in order: it uses up no try.
        outcome = Outcome.PREEMPTED
    ended = replace(
        node,
        state=_END_STATES.get(outcome, JobState.FAILED),
        ended_at=now,
        outcome=outcome,
        exit_code=ending.exit_code,
        message=ending.message,
    )
    effects = (
        CloseAttempt(node.attempt_id, node.machine_id, job.epoch, outcome, ending.exit_code, ending.message),
        close_hold(node.attempt_id, node.running_at, ending),
    )
    after = _together(_with(job, rank, ended), now)
    if all(each.ended for each in after.gang):
        verdict, at_fault = _verdict(after, now)
        return what_follows(after, verdict, at_fault, effects, now)
    if outcome is Outcome.SUCCEEDED or after.state is JobState.STOPPING:
        return after, effects
    why = StopReason.NODE_FAILED
    stopping = replace(
        after,
        state=JobState.STOPPING,
        stop_reason=why,
        stop_by=f"node {rank}, which ended {outcome.value}",
        gang=stopping_nodes(after),
    )
    return stopping, (*effects, *stop_attempts(after, why))


_END_STATES = {Outcome.SUCCEEDED: JobState.SUCCEEDED, Outcome.CANCELLED: JobState.CANCELLED}


def _ending(job: JobSnapshot, event: AttemptEnded | LeaseExpired, now: datetime) -> Ending:
    if isinstance(event, AttemptEnded):
        outcome = effective_outcome(job, event.outcome)
        return Ending(outcome, event.exit_code, event.message, now, results_uploaded=True)
    # A stop that was asked for has come true: the machine killed the attempt when its lease ran out.
    stopped = job.stop_reason not in (None, StopReason.NODE_FAILED)
    outcome = effective_outcome(job, Outcome.CANCELLED) if stopped else Outcome.LOST
    return Ending(outcome, None, event.message, event.renewed_at, results_uploaded=False)


def _verdict(job: JobSnapshot, now: datetime) -> tuple[Ending, tuple[MachineId, ...]]:
    """How a gang of which nothing lives any more ended, and the machines that are to blame."""
    failed = [
        # Of those that ended at the same moment, one that was merely stopped is not what ended the gang.
        (node.ended_at or now, node.outcome is Outcome.CANCELLED, rank, node)
        for rank, node in enumerate(job.gang)
        if node.outcome is not Outcome.SUCCEEDED
    ]
    if not failed:
        return Ending(Outcome.SUCCEEDED, 0, "", now, results_uploaded=True), ()
    _, _, rank, first = min(failed, key=lambda it: it[:3])
    outcome = first.outcome or Outcome.LOST
    if job.stop_reason in ENDS_JOB and outcome is not Outcome.TIMED_OUT:
        outcome = stop_outcome(job.stop_reason)
    message = f"node {rank}: {first.message}" if first.message else f"node {rank} ended {outcome.value}"
    at_fault = tuple(node.machine_id for node in job.gang if node.outcome in (Outcome.LOST, Outcome.PROVIDER_FAULT))
    return Ending(outcome, first.exit_code, message, now, results_uploaded=True), at_fault
