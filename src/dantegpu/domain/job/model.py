"""States, reasons, outcomes, and the snapshot of a job that transitions work on."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
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
    TOO_FEW_MACHINES = "too_few_machines"
    NO_CAPACITY = "no_capacity"
    RESERVED = "reserved"
    BEHIND_RESERVATION = "behind_reservation"
    WAITING_FOR_RETRY = "waiting_for_retry"
    PLACEMENT_REVOKED = "placement_revoked"
    PAUSED = "paused"
    WAITING_FOR_JOBS = "waiting_for_jobs"
    PREEMPTED = "preempted"

    @property
    def text(self) -> str:
        """One sentence for people."""
        return _QUEUE_REASON_TEXTS[self]


_QUEUE_REASON_TEXTS: Mapping[QueueReason, str] = MappingProxyType({
    QueueReason.NEW: "It was just submitted and is looked at in the next scheduling round.",
    QueueReason.NO_FUNDS: "The team's wallet cannot cover the hold; the job starts when money comes in.",
    QueueReason.NO_PROVIDER_ONLINE: "No provider's machine is online.",
    QueueReason.NO_MATCHING_GPU: "No machine online has the requested GPUs.",
    QueueReason.NO_MATCHING_MACHINE: "Machines are online, but none has all that the job asks for.",
    QueueReason.RESTRICTED: "The machines that fit take only jobs of their own team (simulated GPUs or no sandbox).",
    QueueReason.PRICE_ABOVE_MAX: "Every machine that fits costs more than the job's max_price.",
    QueueReason.TOO_FEW_MACHINES: "Fewer machines fit than the job has nodes.",
    QueueReason.NO_CAPACITY: "Machines that fit are online, but busy.",
    QueueReason.RESERVED: "Machines that fit are busy; it has a reservation, and jobs behind it do not delay it.",
    QueueReason.BEHIND_RESERVATION: "What is free is kept for a job that goes before it and needs more of it at once.",
    QueueReason.WAITING_FOR_RETRY: "An attempt ended early; the next one starts after a short wait.",
    QueueReason.PLACEMENT_REVOKED: "The chosen machine could not take the job; another is being looked for.",
    QueueReason.PAUSED: "It is paused and waits to be resumed.",
    QueueReason.WAITING_FOR_JOBS: "It begins when the jobs that it comes after have succeeded.",
    QueueReason.PREEMPTED: "It gave way and waits at its old place in the queue.",
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
    NODE_FAILED = "node_failed"
    DEADLINE = "deadline"
    DEPENDENCY = "dependency"


ENDS_JOB = frozenset({
    StopReason.USER, StopReason.OPERATOR, StopReason.MAX_DURATION, StopReason.BUDGET, StopReason.DEADLINE,
    StopReason.DEPENDENCY,
})  # fmt: skip
"""A stop for one of these reasons ends the job; for the others it comes back to the queue."""


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
class GangNode:
    """One node of a gang in its live epoch: an attempt of its own, with its own machine, reports and end.

    `state` is PLACED to STOPPING while the attempt lives, and terminal once it has ended.
    """

    attempt_id: AttemptId
    machine_id: MachineId
    state: JobState = JobState.PLACED
    report_seq: int = 0
    running_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: Outcome | None = None
    exit_code: int | None = None
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.ended_at is not None


@dataclass(frozen=True)
class JobSnapshot:
    """All that a transition needs to know of a job. Times are the server's, aware UTC.

    `epoch` is the fencing token: it rises with each attempt and never falls. `report_seq` is the last report folded
    for the live attempt. `attempt_id`, `machine_id`, `placed_at` and `running_at` are of the live attempt, else None.

    A job with several `nodes` is a gang: while it lives, `gang` has one entry per node rank, `attempt_id` and
    `machine_id` are those of node 0, and `running_at` is when the last of its nodes began to run.
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
    nodes: int = 1
    gang: tuple[GangNode, ...] = ()

    def but(self, **changes: Any) -> "JobSnapshot":
        """The same job with other values. dataclasses.replace() takes ten times as long, and a job changes often."""
        other = object.__new__(JobSnapshot)
        values = vars(other)
        values.update(vars(self), **changes)
        if len(values) != len(vars(self)):
            raise TypeError(f"no such field: {', '.join(changes.keys() - vars(self).keys())}")
        return other
