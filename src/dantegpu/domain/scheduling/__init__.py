"""Placement as a pure function over a snapshot: `schedule(snapshot, pending, policy, now=...) -> Plan`.

`explain(snapshot, job, now)` answers why one job waits and what the smallest change would open.
"""

from dantegpu.domain.scheduling.backfill import MARGIN_SECONDS, Ends, Reservation, Running, is_large
from dantegpu.domain.scheduling.constraints import Constraint, ConstraintCount, PendingJob
from dantegpu.domain.scheduling.explain import Relaxation, Why, explain
from dantegpu.domain.scheduling.gangs import Waits
from dantegpu.domain.scheduling.plan import Blocked, DeviceShare, Placement, Plan, SchedulerState, Unplaced, schedule
from dantegpu.domain.scheduling.policy import DEFAULT_POLICY, Objective, Policy, Quota, borrowed
from dantegpu.domain.scheduling.preemption import (
    Cause,
    Claim,
    ClaimsView,
    Ground,
    Preemption,
    SpotWork,
    claimed_rate,
    look_at_claims,
    preempt,
)
from dantegpu.domain.scheduling.queue import JobGroup, JobQueue, QueuedJob
from dantegpu.domain.scheduling.ranking import Refusal
from dantegpu.domain.scheduling.rounds import Decision, RoundPlan, plan_round
from dantegpu.domain.scheduling.shares import PastShares, average_shares
from dantegpu.domain.scheduling.snapshot import Lease, Snapshot, SnapshotBuilder, TeamUse

__all__ = [
    "DEFAULT_POLICY",
    "MARGIN_SECONDS",
    "Blocked",
    "Cause",
    "Claim",
    "ClaimsView",
    "Constraint",
    "ConstraintCount",
    "Decision",
    "DeviceShare",
    "Ends",
    "Ground",
    "JobGroup",
    "JobQueue",
    "Lease",
    "Objective",
    "PastShares",
    "PendingJob",
    "Placement",
    "Plan",
    "Policy",
    "Preemption",
    "QueuedJob",
    "Quota",
    "Refusal",
    "Relaxation",
    "Reservation",
    "RoundPlan",
    "Running",
    "SchedulerState",
    "Snapshot",
    "SnapshotBuilder",
    "SpotWork",
    "TeamUse",
    "Unplaced",
    "Waits",
    "Why",
    "average_shares",
    "borrowed",
    "claimed_rate",
    "explain",
    "is_large",
    "look_at_claims",
    "plan_round",
    "preempt",
    "schedule",
]
