"""The life of a job: states, events, effects as values, and one table that says what is allowed.

`transition(job, event, now)` is the only way to a new state. A machine's reports go through `fold_report`, which
decides stale epochs and doubled reports before the table is asked. Effects are returned, never done here.
"""

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
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_RETRY,
    JobSnapshot,
    JobState,
    Outcome,
    QueueReason,
    RetryOn,
    RetryPolicy,
    StopReason,
)
from dantegpu.domain.job.reports import AttemptReport, Folded, Stale, fold_report
from dantegpu.domain.job.transitions import TRANSITIONS, IllegalTransition, Step, transition

__all__ = [
    "DEFAULT_MAX_ATTEMPTS",
    "DEFAULT_RETRY",
    "TRANSITIONS",
    "AttemptEnded",
    "AttemptReport",
    "AttemptRunning",
    "AttemptStarting",
    "AttemptStopping",
    "CloseAttempt",
    "CloseHold",
    "Effect",
    "EndJob",
    "Event",
    "Folded",
    "IllegalTransition",
    "JobSnapshot",
    "JobState",
    "LeaseExpired",
    "OpenAttempt",
    "Outcome",
    "Placed",
    "PlacementRevoked",
    "PublishResults",
    "QueueReason",
    "RetryDue",
    "RetryOn",
    "RetryPolicy",
    "ScheduleRetry",
    "Stale",
    "Step",
    "StillWaiting",
    "StopAttempt",
    "StopReason",
    "StopRequested",
    "fold_report",
    "transition",
]
