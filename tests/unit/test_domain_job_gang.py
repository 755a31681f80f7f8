"""Gangs: several attempts of one epoch fold into one job."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest

from dantegpu.domain.ids import AttemptId, JobId, MachineId, TeamId
from dantegpu.domain.job import (
    AttemptEnded,
    AttemptReport,
    AttemptRunning,
    AttemptStarting,
    CloseAttempt,
    CloseHold,
    EndJob,
    Event,
    Folded,
    IllegalTransition,
    JobSnapshot,
    JobState,
    LeaseExpired,
    OnNode,
    OpenAttempt,
    Outcome,
    Placed,
    PlacementRevoked,
    PublishResults,
    QueueReason,
    RetryOn,
    RetryPolicy,
    Stale,
    StopAttempt,
    StopReason,
    StopRequested,
    fold_report,
    transition,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
ATTEMPTS = [AttemptId.new() for _ in range(3)]
MACHINES = [MachineId.new() for _ in range(3)]
WELL = AttemptEnded(Outcome.SUCCEEDED, 0)
BADLY = AttemptEnded(Outcome.FAILED, 3, "exit code 3")


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def placed(nodes: int = 2) -> Placed:
    return Placed(ATTEMPTS[0], MACHINES[0], tuple(zip(ATTEMPTS[1:nodes], MACHINES[1:nodes], strict=True)))


def a_gang(*events: Event, nodes: int = 2, retry: RetryPolicy | None = None) -> JobSnapshot:
    """A gang that was placed at second 1, with one more event per second."""
    job = JobSnapshot(JobId.new(), TeamId.new(), T0, nodes=nodes, retry=retry or RetryPolicy())
    for second, event in enumerate((placed(nodes), *events), 1):
        job, _ = transition(job, event, at(second))
    return job


def all_run(nodes: int = 2) -> list[Event]:
    return [OnNode(rank, AttemptRunning()) for rank in range(nodes)]


def test_a_gang_opens_one_attempt_per_node_in_one_epoch():
    job = JobSnapshot(JobId.new(), TeamId.new(), T0, nodes=3)
    job, effects = transition(job, placed(3), at(1))
    assert effects == tuple(OpenAttempt(ATTEMPTS[rank], MACHINES[rank], 1, rank) for rank in range(3))
    assert (job.state, job.epoch, job.attempt_id) == (JobState.PLACED, 1, ATTEMPTS[0])


@pytest.mark.parametrize(
    "half",
    [
        Placed(ATTEMPTS[0], MACHINES[0]),
        Placed(ATTEMPTS[0], MACHINES[0], ((ATTEMPTS[1], MACHINES[0]),)),
        placed(3),
    ],
    ids=["one node", "two nodes on one machine", "a node too many"],
)
def test_a_gang_is_not_placed_in_part(half: Placed):
    with pytest.raises(ValueError, match="2 nodes"):
        transition(JobSnapshot(JobId.new(), TeamId.new(), T0, nodes=2), half, at(1))


def test_a_gang_starts_with_its_first_node_and_runs_with_its_last():
    job = a_gang(OnNode(1, AttemptStarting()))
    assert job.state is JobState.STARTING
    job, _ = transition(job, OnNode(1, AttemptRunning()), at(3))
    assert (job.state, job.running_at) == (JobState.STARTING, None)
    job, _ = transition(job, OnNode(0, AttemptRunning()), at(4))
    assert (job.state, job.running_at, job.first_running_at) == (JobState.RUNNING, at(4), at(4))
    assert [node.running_at for node in job.gang] == [at(4), at(3)]


def test_a_gang_succeeds_when_all_nodes_have_and_each_is_billed_for_itself():
    job, effects = transition(a_gang(*all_run()), OnNode(0, WELL), at(10))
    assert job.state is JobState.RUNNING
    assert effects == (
        CloseAttempt(ATTEMPTS[0], MACHINES[0], 1, Outcome.SUCCEEDED, 0, ""),
        CloseHold(ATTEMPTS[0], at(2), at(10)),
    )
    job, effects = transition(job, OnNode(1, WELL), at(20))
    assert (job.state, job.exit_code, job.gang) == (JobState.SUCCEEDED, 0, ())
    assert effects == (
        CloseAttempt(ATTEMPTS[1], MACHINES[1], 1, Outcome.SUCCEEDED, 0, ""),
        CloseHold(ATTEMPTS[1], at(3), at(20)),
        PublishResults(ATTEMPTS[0], 1),
        EndJob(JobState.SUCCEEDED, Outcome.SUCCEEDED),
    )


def test_the_first_node_that_fails_stops_the_others_and_decides_how_the_job_ends():
    job, effects = transition(a_gang(*all_run(3), nodes=3), OnNode(1, BADLY), at(10))
    assert (job.state, job.stop_reason) == (JobState.STOPPING, StopReason.NODE_FAILED)
    assert [effect for effect in effects if isinstance(effect, StopAttempt)] == [
        StopAttempt(ATTEMPTS[rank], MACHINES[rank], 1, StopReason.NODE_FAILED) for rank in (0, 2)
    ]
    job, effects = transition(job, OnNode(0, AttemptEnded(Outcome.CANCELLED, 143, "stopped")), at(11))
    assert job.state is JobState.STOPPING
    assert CloseHold(ATTEMPTS[0], at(2), at(11)) in effects
    job, _ = transition(job, OnNode(2, AttemptEnded(Outcome.FAILED, 1, "lost its peer")), at(12))
    assert (job.state, job.outcome, job.exit_code) == (JobState.FAILED, Outcome.FAILED, 3)
    assert job.message == "node 1: exit code 3"


def test_a_failed_node_restarts_the_gang_when_the_job_retries_errors():
    retry = RetryPolicy(on_events=frozenset({RetryOn.ERROR}), max_attempts=2)
    job = a_gang(*all_run(), OnNode(0, BADLY), OnNode(1, AttemptEnded(Outcome.CANCELLED, 143)), retry=retry)
    assert (job.state, job.queue_reason, job.attempts_used) == (JobState.QUEUED, QueueReason.WAITING_FOR_RETRY, 1)
    assert (job.stop_reason, job.gang, job.attempt_id) == (None, (), None)
    job, _ = transition(job, placed(), at(30))
    assert (job.epoch, len(job.gang)) == (2, 2)


def test_a_lost_machine_restarts_the_gang_elsewhere_and_is_billed_to_its_last_renewal():
    job, effects = transition(a_gang(*all_run()), OnNode(1, LeaseExpired(renewed_at=at(8))), at(40))
    assert CloseHold(ATTEMPTS[1], at(3), at(8)) in effects
    assert job.state is JobState.STOPPING
    job, _ = transition(job, OnNode(0, AttemptEnded(Outcome.CANCELLED, 143)), at(41))
    assert (job.state, job.attempts_used, job.avoided_machines) == (JobState.QUEUED, 1, (MACHINES[1],))


def test_a_node_whose_owner_switches_it_off_is_unbilled_and_uses_up_no_try():
    job, effects = transition(a_gang(*all_run()), OnNode(1, AttemptEnded(Outcome.PREEMPTED, 143)), at(9))
    assert CloseHold(ATTEMPTS[1], None, None) in effects
    job, _ = transition(job, OnNode(0, AttemptEnded(Outcome.CANCELLED, 143)), at(10))
    assert (job.state, job.attempts_used) == (JobState.QUEUED, 0)


def test_a_stop_by_its_user_stops_every_node_that_still_lives_and_outranks_a_failure():
    job, _ = transition(a_gang(*all_run(3), nodes=3), OnNode(2, WELL), at(9))
    job, effects = transition(job, StopRequested("usr"), at(10))
    assert [effect.attempt_id for effect in effects if isinstance(effect, StopAttempt)] == ATTEMPTS[:2]
    for rank in range(2):
        job, _ = transition(job, OnNode(rank, AttemptEnded(Outcome.CANCELLED, 143)), at(12 + rank))
    assert (job.state, job.outcome) == (JobState.CANCELLED, Outcome.CANCELLED)

    retry = RetryPolicy(on_events=frozenset({RetryOn.ERROR}))
    job = a_gang(*all_run(), OnNode(0, BADLY), StopRequested("usr"), retry=retry)
    job, _ = transition(job, OnNode(1, AttemptEnded(Outcome.CANCELLED, 143)), at(20))
    assert job.state is JobState.CANCELLED


def test_a_revoked_gang_closes_every_node_unbilled():
    job, effects = transition(a_gang(), PlacementRevoked(), at(2))
    assert job.state is JobState.QUEUED
    assert [effect for effect in effects if isinstance(effect, CloseHold)] == [
        CloseHold(attempt, None, None) for attempt in ATTEMPTS[:2]
    ]


@pytest.mark.parametrize("event", [AttemptStarting(), AttemptRunning(), WELL, LeaseExpired(T0)])
def test_an_event_that_does_not_name_the_node_is_refused(event: Event):
    with pytest.raises(IllegalTransition):
        transition(a_gang(), event, at(2))


@pytest.mark.parametrize(("rank", "lie"), list(product((0, 1), ("machine", "epoch", "seq", "attempt"))))
def test_a_stale_report_of_a_node_changes_nothing(rank: int, lie: str):
    report = AttemptReport(ATTEMPTS[rank], MACHINES[rank], 1, 1, AttemptRunning())
    folded = fold_report(a_gang(), report, at(2))
    assert isinstance(folded, Folded)
    lies = {
        "machine": replace(report, machine_id=MACHINES[1 - rank], seq=2),
        "epoch": replace(report, epoch=2, seq=2),
        "seq": report,
        "attempt": replace(report, attempt_id=AttemptId.new(), seq=2),
    }
    assert isinstance(fold_report(folded.job, lies[lie], at(3)), Stale)
    other = AttemptReport(ATTEMPTS[1 - rank], MACHINES[1 - rank], 1, 1, AttemptRunning())
    assert isinstance(fold_report(folded.job, other, at(3)), Folded)
