"""Whatever happens in whatever order: one end at most, one hold closed per attempt, and nothing counts twice."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from dantegpu.domain.ids import AttemptId, JobId, MachineId, TeamId
from dantegpu.domain.job import (
    TRANSITIONS,
    AttemptEnded,
    AttemptReport,
    AttemptRunning,
    AttemptStarting,
    AttemptStopping,
    CloseAttempt,
    CloseHold,
    Effect,
    EndJob,
    Event,
    Folded,
    JobSnapshot,
    JobState,
    LeaseExpired,
    OpenAttempt,
    Outcome,
    Placed,
    PlacementRevoked,
    QueueReason,
    RetryDue,
    RetryOn,
    RetryPolicy,
    Stale,
    StillWaiting,
    StopReason,
    StopRequested,
    fold_report,
    transition,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
MACHINES = [MachineId(UUID(int=number)) for number in range(1, 4)]

ENDS = st.builds(AttemptEnded, st.sampled_from(Outcome), st.none() | st.integers(-15, 255))
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(StillWaiting, st.sampled_from(QueueReason)),
    st.just(RetryDue()),
    st.builds(Placed, st.builds(AttemptId, st.uuids()), st.sampled_from(MACHINES)),
    st.just(PlacementRevoked()),
    st.just(AttemptStarting()),
    st.just(AttemptRunning()),
    st.just(AttemptStopping()),
    st.builds(StopRequested, st.just("usr"), st.sampled_from(StopReason)),
    ENDS,
    st.just(LeaseExpired(T0)),
)
POLICIES = st.builds(
    RetryPolicy, st.frozensets(st.sampled_from(RetryOn)), st.integers(1, 4), st.none() | st.integers(0, 30)
)


def a_job(policy: RetryPolicy) -> JobSnapshot:
    return JobSnapshot(JobId(UUID(int=1)), TeamId(UUID(int=2)), T0, retry=policy)


def run(job: JobSnapshot, events: Sequence[Event]) -> tuple[list[JobSnapshot], list[Effect]]:
    """Take every event that the table lists for the state it meets."""
    history, effects = [job], list[Effect]()
    for second, event in enumerate(events):
        if (job.state, type(event)) in TRANSITIONS:
            job, more = transition(job, event, T0 + timedelta(seconds=second))
            history.append(job)
            effects += more
    return history, effects


@given(POLICIES, st.lists(EVENTS, max_size=40))
def test_a_snapshot_is_always_whole(policy: RetryPolicy, events: list[Event]):
    for job in run(a_job(policy), events)[0]:
        assert (job.attempt_id is not None) == (job.machine_id is not None) == job.state.live
        assert (job.queue_reason is not None) == (job.state is JobState.QUEUED)
        assert (job.ended_at is not None) == (job.outcome is not None) == job.state.terminal
        assert job.state.live or job.running_at is None
        assert job.attempts_used <= policy.max_attempts
        assert job.state is not JobState.QUEUED or job.stop_reason is None


@given(POLICIES, st.lists(EVENTS, max_size=40))
def test_every_attempt_is_closed_once_with_its_hold_and_a_job_ends_at_most_once(
    policy: RetryPolicy, events: list[Event]
):
    history, effects = run(a_job(policy), events)
    opened = [effect.attempt_id for effect in effects if isinstance(effect, OpenAttempt)]
    closed = [effect.attempt_id for effect in effects if isinstance(effect, CloseAttempt)]
    held = [effect.attempt_id for effect in effects if isinstance(effect, CloseHold)]
    live = [history[-1].attempt_id] if history[-1].state.live else []
    assert closed == held
    assert [*closed, *live] == opened
    assert len([effect for effect in effects if isinstance(effect, EndJob)]) == history[-1].state.terminal


@given(POLICIES, st.lists(EVENTS, max_size=40))
def test_the_epoch_rises_by_one_with_each_attempt_and_never_falls(policy: RetryPolicy, events: list[Event]):
    history, effects = run(a_job(policy), events)
    epochs = [effect.epoch for effect in effects if isinstance(effect, OpenAttempt)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert [job.epoch for job in history] == sorted(job.epoch for job in history)


@given(POLICIES, st.lists(EVENTS, max_size=40))
def test_billing_never_covers_time_before_the_command_ran_or_backwards(policy: RetryPolicy, events: list[Event]):
    for effect in run(a_job(policy), events)[1]:
        if isinstance(effect, CloseHold) and effect.billable_from is not None:
            assert effect.billable_until is not None
            assert effect.billable_from <= effect.billable_until


type Reported = AttemptStarting | AttemptRunning | AttemptStopping | AttemptEnded

REPORTS: st.SearchStrategy[Reported] = st.one_of(
    st.just(AttemptStarting()), st.just(AttemptRunning()), st.just(AttemptStopping()), ENDS
)


@given(POLICIES, st.lists(REPORTS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_reports_doubled_and_shuffled_never_raise_and_count_at_most_once(
    policy: RetryPolicy, reports: list[Reported], random: Random
):
    attempt = AttemptId(UUID(int=7))
    job, _ = transition(a_job(policy), Placed(attempt, MACHINES[0]), T0)
    sent = [AttemptReport(attempt, MACHINES[0], 1, seq, event) for seq, event in enumerate(reports, 1)] * 2
    random.shuffle(sent)
    ends = 0
    for report in sent:
        before = job
        folded = fold_report(job, report, T0)
        if isinstance(folded, Folded):
            assert report.seq > before.report_seq
            job = folded.job
            ends += any(isinstance(effect, CloseHold) for effect in folded.effects)
            assert isinstance(fold_report(job, report, T0), Stale)
    assert ends <= 1
