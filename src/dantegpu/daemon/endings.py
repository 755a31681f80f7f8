"""How an attempt ends on its machine: outcome and text for people."""

from collections.abc import Mapping
from signal import Signals

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon.executors.base import ExitStatus, InterruptedBy
from dantegpu.domain.units import format_bytes

SAVED_FOR = frozenset({"preempted", "no_funds", "machine_drained", "hours_over"})
"""Stopped for one of these, a job goes on elsewhere: its checkpoint is kept."""


_INTERRUPTED: "Mapping[InterruptedBy, jobs_pb2.Outcome.ValueType]" = {
    InterruptedBy.OWNER: jobs_pb2.OUTCOME_PREEMPTED,
    InterruptedBy.FAULT: jobs_pb2.OUTCOME_PROVIDER_FAULT,
    InterruptedBy.TIME_LIMIT: jobs_pb2.OUTCOME_TIMED_OUT,
}


class Ended(Exception):
    """Ends the attempt before or instead of a normal exit: state, outcome, and what to tell people."""

    def __init__(self, outcome: "jobs_pb2.Outcome.ValueType", message: str) -> None:
        super().__init__(message)
        self.outcome: jobs_pb2.Outcome.ValueType = outcome
        self.message = message


def stopped(reason: str) -> Ended:
    """Somebody wanted it to end."""
    if reason in ("max_duration", "timed_out", "budget"):
        return Ended(jobs_pb2.OUTCOME_TIMED_OUT, f"stopped: {reason}")
    if reason == "hours_over":
        return Ended(jobs_pb2.OUTCOME_PREEMPTED, "the hours are over in which the machine's owner rents it out")
    if reason == "daemon_stopped":
        return Ended(jobs_pb2.OUTCOME_PREEMPTED, "the machine's owner stopped the daemon")
    return Ended(jobs_pb2.OUTCOME_CANCELLED, f"stopped: {reason}" if reason else "stopped")


def saves(spec: jobs_pb2.JobSpec, stop_reason: str) -> bool:
    """Has the job a checkpoint that its next attempt will want?"""
    return spec.HasField("checkpoint") and stop_reason in SAVED_FOR


def notice_of(spec: jobs_pb2.JobSpec) -> Signals:
    """The signal that tells it to save its work."""
    return Signals[spec.checkpoint.signal] if spec.checkpoint.signal else Signals.SIGTERM


def judge(
    ending: Ended | None, exit_status: ExitStatus | None, desired: machine_pb2.DesiredAttempt | None
) -> "tuple[jobs_pb2.Outcome.ValueType, str]":
    """Outcome and text of an attempt's end."""
    if ending is not None:
        return ending.outcome, ending.message
    if exit_status is not None and exit_status.interruption is not None:
        return _INTERRUPTED[exit_status.interruption.by], exit_status.interruption.message
    if exit_status is None or exit_status.exit_code is None:
        return jobs_pb2.OUTCOME_PROVIDER_FAULT, "the machine lost sight of the job (killed from outside, or a reboot)"
    if exit_status.oom_killed:
        limit = format_bytes(desired.spec.resources.memory_bytes) if desired is not None else "its limit"
        return jobs_pb2.OUTCOME_FAILED, f"killed: it needed more memory than the {limit} that it asked for"
    if exit_status.exit_code == 0:
        return jobs_pb2.OUTCOME_SUCCEEDED, ""
    if exit_status.signal is not None:
        return jobs_pb2.OUTCOME_FAILED, f"ended by signal {exit_status.signal} (exit code {exit_status.exit_code})"
    return jobs_pb2.OUTCOME_FAILED, f"exit code {exit_status.exit_code}"
