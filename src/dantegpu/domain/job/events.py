"""What can happen to a job (events), and what the caller must do about it (effects). Values only."""

from dataclasses import dataclass
from datetime import datetime

from dantegpu.domain.ids import AttemptId, MachineId
from dantegpu.domain.job.model import JobState, Outcome, QueueReason, StopReason


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
    """A plan was applied: devices are leased and the hold is open. `others` are the nodes 1, 2, ... of a gang."""

    attempt_id: AttemptId
    machine_id: MachineId
    others: tuple[tuple[AttemptId, MachineId], ...] = ()


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
    """`by` names the person or the part of the platform, for the audit log.

    `message` becomes that of a job which ends at once.
    """

    by: str
    why: StopReason = StopReason.USER
    message: str = ""


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


@dataclass(frozen=True, slots=True)
class OnNode:
    """What happened to the attempt of one node of a gang."""

    rank: int
    event: AttemptStarting | AttemptRunning | AttemptStopping | AttemptEnded | LeaseExpired


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
    | OnNode
)


# Effects: what the caller must do in the transaction that stores the new snapshot.


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """Insert the attempt and lease its devices; then wake the machine."""

    attempt_id: AttemptId
    machine_id: MachineId
    epoch: int
    node_rank: int = 0


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
