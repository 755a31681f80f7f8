"""Placement as a pure function over a snapshot: `schedule(snapshot, pending, policy, now=...) -> Plan`.

`explain(snapshot, job, now)` answers why one job waits and what the smallest change would open.
"""

from dantegpu.domain.scheduling.backfill import MARGIN_SECONDS, Decision, RoundPlan, Running, is_large, plan_round
from dantegpu.domain.scheduling.constraints import Constraint, ConstraintCount, PendingJob
from dantegpu.domain.scheduling.explain import Relaxation, Why, explain
from dantegpu.domain.scheduling.plan import Blocked, DeviceShare, Placement, Plan, SchedulerState, Unplaced, schedule
from dantegpu.domain.scheduling.policy import DEFAULT_POLICY, Objective, Policy, Quota, borrowed
from dantegpu.domain.scheduling.queue import JobGroup, JobQueue, QueuedJob
from dantegpu.domain.scheduling.ranking import Refusal
from dantegpu.domain.scheduling.shares import PastShares
from dantegpu.domain.scheduling.snapshot import Lease, Snapshot, SnapshotBuilder, TeamUse

__all__ = [
    "DEFAULT_POLICY",
    "MARGIN_SECONDS",
    "Blocked",
    "Constraint",
    "ConstraintCount",
    "Decision",
    "DeviceShare",
    "JobGroup",
    "JobQueue",
    "Lease",
    "Objective",
    "PastShares",
    "PendingJob",
    "Placement",
    "Plan",
    "Policy",
    "QueuedJob",
    "Quota",
    "Refusal",
    "Relaxation",
    "RoundPlan",
    "Running",
    "SchedulerState",
    "Snapshot",
    "SnapshotBuilder",
    "TeamUse",
    "Unplaced",
    "Why",
    "borrowed",
    "explain",
    "is_large",
    "plan_round",
    "schedule",
]
