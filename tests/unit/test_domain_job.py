from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

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
    EndJob,
    Event,
    Folded,
    GangNode,
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
    RetryDue,
    RetryOn,
    RetryPolicy,
    ScheduleRetry,
    Stale,
    StillWaiting,
    StopAttempt,
    StopReason,
    StopRequested,
    fold_report,
    transition,
)
from dantegpu.domain.job.states_doc import job_states_markdown

T0 = datetime(2026, 1, 1, tzinfo=UTC)
ATTEMPT, MACHINE = AttemptId.new(), MachineId.new()


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def a_job(*events: Event, retry: RetryPolicy | None = None) -> JobSnapshot:
    """A job submitted at T0, with one event per second from then on."""
    job = JobSnapshot(JobId.new(), TeamId.new(), T0, retry=retry or RetryPolicy())
    for second, event in enumerate(events, 1):
        job, _ = transition(job, event, at(second))
    return job


PLACED = Placed(ATTEMPT, MACHINE)
RUNNING = (PLACED, AttemptStarting(), AttemptRunning())
ENDED_WELL = AttemptEnded(Outcome.SUCCEEDED, 0)


def a_job_in(state: JobState) -> JobSnapshot:
    return {
        JobState.QUEUED: a_job,
        JobState.PLACED: lambda: a_job(PLACED),
        JobState.STARTING: lambda: a_job(PLACED, AttemptStarting()),
        JobState.RUNNING: lambda: a_job(*RUNNING),
        JobState.STOPPING: lambda: a_job(*RUNNING, StopRequested("usr")),
        JobState.SUCCEEDED: lambda: a_job(*RUNNING, ENDED_WELL),
        JobState.FAILED: lambda: a_job(*RUNNING, AttemptEnded(Outcome.FAILED, 1)),
        JobState.CANCELLED: lambda: a_job(StopRequested("usr")),
    }[state]()


AN_EVENT: dict[type, Event] = {
    StillWaiting: StillWaiting(QueueReason.NO_CAPACITY),
    RetryDue: RetryDue(),
    Placed: PLACED,
    PlacementRevoked: PlacementRevoked(),
    AttemptStarting: AttemptStarting(),
    AttemptRunning: AttemptRunning(),
    AttemptStopping: AttemptStopping(),
    StopRequested: StopRequested("usr"),
    AttemptEnded: ENDED_WELL,
    LeaseExpired: LeaseExpired(T0),
    OnNode: OnNode(0, AttemptStarting()),
}


def test_a_job_that_goes_well_is_placed_runs_is_billed_and_published():
    job, effects = transition(a_job(), PLACED, at(1))
    assert (job.state, job.epoch, job.queue_reason) == (JobState.PLACED, 1, None)
    assert effects == (OpenAttempt(ATTEMPT, MACHINE, 1),)
    job, _ = transition(job, AttemptStarting(), at(2))
    job, _ = transition(job, AttemptRunning(), at(5))
    job, effects = transition(job, ENDED_WELL, at(65))
    assert (job.state, job.outcome, job.exit_code, job.ended_at) == (JobState.SUCCEEDED, Outcome.SUCCEEDED, 0, at(65))
    assert effects == (
        CloseAttempt(ATTEMPT, MACHINE, 1, Outcome.SUCCEEDED, 0, ""),
        CloseHold(ATTEMPT, at(5), at(65)),
        PublishResults(ATTEMPT, 1),
        EndJob(JobState.SUCCEEDED, Outcome.SUCCEEDED),
    )


@pytest.mark.parametrize(("state", "event_type"), list(product(JobState, get_args(Event.__value__))))
def test_every_pair_of_state_and_event_is_listed_or_raises(state: JobState, event_type: type[Event]):
    job, event = a_job_in(state), AN_EVENT[event_type]
    if event_type is OnNode and state.live:
        job = replace(job, nodes=2, gang=(GangNode(ATTEMPT, MACHINE), GangNode(AttemptId.new(), MachineId.new())))
    if (state, event_type) in TRANSITIONS:
        after, _ = transition(job, event, at(100))
        assert after.state in TRANSITIONS[state, event_type].to
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            transition(job, event, at(100))


@pytest.mark.parametrize("state", [state for state in JobState if state.terminal])
def test_nothing_leads_out_of_a_terminal_state(state: JobState):
    assert {target for (source, _), row in TRANSITIONS.items() if source is state for target in row.to} == {state}


def test_the_jobs_own_failure_is_final_and_billed():
    job, effects = transition(a_job(*RUNNING), AttemptEnded(Outcome.FAILED, 3, "exit code 3"), at(10))
    assert (job.state, job.exit_code, job.message) == (JobState.FAILED, 3, "exit code 3")
    assert CloseHold(ATTEMPT, at(3), at(10)) in effects


def test_the_jobs_own_failure_is_retried_when_the_job_asks_for_it():
    retry = RetryPolicy(on_events=frozenset({RetryOn.ERROR}), max_attempts=2)
    job, effects = transition(a_job(*RUNNING, retry=retry), AttemptEnded(Outcome.FAILED, 1), at(10))
    assert (job.state, job.queue_reason) == (JobState.QUEUED, QueueReason.WAITING_FOR_RETRY)
    assert effects[-1] == ScheduleRetry(at(12))
    job, _ = transition(job, RetryDue(), at(12))
    for event in (Placed(AttemptId.new(), MACHINE), AttemptRunning(), AttemptEnded(Outcome.FAILED, 1)):
        job, _ = transition(job, event, at(20))
    assert job.state is JobState.FAILED


def test_a_lost_machine_is_billed_to_its_last_renewal_and_avoided_by_the_retry():
    job, effects = transition(a_job(*RUNNING), LeaseExpired(renewed_at=at(8)), at(40))
    assert (job.state, job.queue_reason, job.not_before) == (JobState.QUEUED, QueueReason.WAITING_FOR_RETRY, at(42))
    assert CloseHold(ATTEMPT, at(3), at(8)) in effects
    assert job.avoided_machines == (MACHINE,)
    assert not any(isinstance(effect, PublishResults) for effect in effects)


def test_a_retry_is_a_new_attempt_with_a_higher_epoch():
    lost = a_job(*RUNNING, LeaseExpired(T0))
    job, effects = transition(lost, Placed(second := AttemptId.new(), MACHINE), at(60))
    assert (job.epoch, job.attempt_id, job.report_seq, job.running_at) == (2, second, 0, None)
    assert effects == (OpenAttempt(second, MACHINE, 2),)


def test_retries_back_off_and_end_after_the_last_attempt():
    job, waits = a_job(), list[float]()
    while not job.state.terminal:
        job, _ = transition(job, Placed(AttemptId.new(), MACHINE), T0)
        job, effects = transition(job, AttemptEnded(Outcome.PROVIDER_FAULT, message="disk full"), T0)
        waits += [(effect.at - T0).total_seconds() for effect in effects if isinstance(effect, ScheduleRetry)]
    assert (job.state, job.outcome, waits) == (JobState.FAILED, Outcome.PROVIDER_FAULT, [2, 4, 8, 16])


def test_no_retry_begins_after_the_retry_duration():
    job = a_job(*RUNNING, retry=RetryPolicy(duration_seconds=30))
    job, _ = transition(job, LeaseExpired(T0), at(31))
    assert (job.state, job.outcome) == (JobState.FAILED, Outcome.LOST)


def test_a_providers_fault_is_free():
    _, effects = transition(a_job(*RUNNING), AttemptEnded(Outcome.PROVIDER_FAULT), at(50))
    assert CloseHold(ATTEMPT, None, None) in effects


def test_an_attempt_that_never_ran_is_free():
    _, effects = transition(a_job(PLACED, AttemptStarting()), LeaseExpired(at(5)), at(50))
    assert CloseHold(ATTEMPT, None, None) in effects


def test_a_command_that_ended_before_its_start_was_told_is_billed_the_least():
    _, effects = transition(a_job(PLACED), ENDED_WELL, at(50))
    assert CloseHold(ATTEMPT, at(50), at(50)) in effects


def test_stopping_a_queued_job_cancels_it_at_once():
    job, effects = transition(a_job(), StopRequested("usr_1"), at(1))
    assert (job.state, job.stop_by) == (JobState.CANCELLED, "usr_1")
    assert effects == (EndJob(JobState.CANCELLED, Outcome.CANCELLED),)


def test_stopping_a_running_job_tells_the_machine_and_ends_with_its_report():
    job, effects = transition(a_job(*RUNNING), StopRequested("usr_1"), at(10))
    assert job.state is JobState.STOPPING
    assert effects == (StopAttempt(ATTEMPT, MACHINE, 1, StopReason.USER),)
    job, effects = transition(job, AttemptEnded(Outcome.CANCELLED, -15), at(12))
    assert (job.state, job.outcome) == (JobState.CANCELLED, Outcome.CANCELLED)
    assert CloseHold(ATTEMPT, at(3), at(12)) in effects


@pytest.mark.parametrize("end", [AttemptEnded(Outcome.FAILED, 143), LeaseExpired(T0), AttemptEnded(Outcome.PREEMPTED)])
def test_a_job_that_its_user_stopped_never_comes_back(end: Event):
    job, _ = transition(a_job(*RUNNING, StopRequested("usr")), end, at(20))
    assert job.state is JobState.CANCELLED


def test_a_stopped_job_is_cancelled_also_when_the_machine_broke_meanwhile():
    job, effects = transition(a_job(*RUNNING, StopRequested("usr")), AttemptEnded(Outcome.PROVIDER_FAULT), at(20))
    assert job.state is JobState.CANCELLED
    assert CloseHold(ATTEMPT, None, None) in effects


def test_a_job_that_succeeded_before_the_stop_reached_it_has_succeeded():
    job, _ = transition(a_job(*RUNNING, StopRequested("usr")), ENDED_WELL, at(20))
    assert job.state is JobState.SUCCEEDED


def test_a_job_over_its_time_fails_as_timed_out():
    stop = StopRequested("scheduler", StopReason.MAX_DURATION)
    job, _ = transition(a_job(*RUNNING, stop), AttemptEnded(Outcome.CANCELLED, -15), at(20))
    assert (job.state, job.outcome) == (JobState.FAILED, Outcome.TIMED_OUT)


def test_a_job_without_funds_waits_for_money_and_uses_up_no_try():
    stop = StopRequested("billing", StopReason.NO_FUNDS)
    job, effects = transition(a_job(*RUNNING, stop), AttemptEnded(Outcome.CANCELLED), at(20))
    assert (job.state, job.queue_reason, job.attempts_used) == (JobState.QUEUED, QueueReason.NO_FUNDS, 0)
    assert (job.stop_reason, job.not_before) == (None, None)
    assert not any(isinstance(effect, ScheduleRetry) for effect in effects)


def test_a_users_stop_outranks_a_preemption_under_way():
    job = a_job(*RUNNING, StopRequested("scheduler", StopReason.PREEMPTED), StopRequested("usr"))
    job, _ = transition(job, AttemptEnded(Outcome.PREEMPTED), at(20))
    assert job.state is JobState.CANCELLED


def test_a_revoked_placement_uses_up_no_try_and_costs_nothing():
    job, effects = transition(a_job(PLACED), PlacementRevoked(detail="device busy"), at(2))
    assert (job.state, job.queue_reason, job.attempts_used) == (JobState.QUEUED, QueueReason.PLACEMENT_REVOKED, 0)
    assert CloseHold(ATTEMPT, None, None) in effects


def test_a_machine_that_gives_up_by_itself_is_a_providers_fault():
    job, effects = transition(a_job(*RUNNING), AttemptEnded(Outcome.CANCELLED), at(20))
    assert job.state is JobState.QUEUED
    assert isinstance(effects[0], CloseAttempt)
    assert effects[0].outcome is Outcome.PROVIDER_FAULT


def a_report(job: JobSnapshot, seq: int = 1, event: AttemptRunning | AttemptEnded = ENDED_WELL) -> AttemptReport:
    return AttemptReport(ATTEMPT, MACHINE, job.epoch, seq, event)


def test_a_report_is_folded_once():
    job = a_job(PLACED)
    folded = fold_report(job, a_report(job, 1, AttemptRunning()), at(3))
    assert isinstance(folded, Folded)
    assert (folded.job.state, folded.job.report_seq) == (JobState.RUNNING, 1)
    assert isinstance(fold_report(folded.job, a_report(job, 1, AttemptRunning()), at(4)), Stale)


def test_a_late_report_of_an_earlier_change_is_stale():
    job = replace(a_job(*RUNNING), report_seq=3)
    assert isinstance(fold_report(job, a_report(job, 2), at(9)), Stale)


@pytest.mark.parametrize("epoch", [0, 2, 99])
def test_a_report_of_another_epoch_is_stale(epoch: int):
    job = a_job(*RUNNING)
    assert isinstance(fold_report(job, replace(a_report(job, 9), epoch=epoch), at(9)), Stale)


def test_a_report_of_another_machine_is_stale():
    job = a_job(*RUNNING)
    assert isinstance(fold_report(job, replace(a_report(job, 9), machine_id=MachineId.new()), at(9)), Stale)


def test_a_report_about_a_job_that_is_over_is_stale():
    job = a_job_in(JobState.CANCELLED)
    assert isinstance(fold_report(job, a_report(job, 9), at(9)), Stale)


def test_every_reason_has_a_sentence_for_people():
    assert all(reason.text.endswith(".") for reason in QueueReason)


def test_the_page_of_job_states_is_current():
    page = Path(__file__).parents[2] / "docs" / "job_states.md"
    assert page.read_text() == job_states_markdown(), (
        "run: python -m dantegpu.domain.job.states_doc > docs/job_states.md"
    )
