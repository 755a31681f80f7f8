"""A round over listed jobs, with reservations: what `schedule` does with a queue, for a caller that keeps none."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from dantegpu.domain.ids import JobId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.scheduling.backfill import Ends, Reservation, Running
from dantegpu.domain.scheduling.board import Placement
from dantegpu.domain.scheduling.constraints import PendingJob
from dantegpu.domain.scheduling.plan import SchedulerState, Unplaced, schedule
from dantegpu.domain.scheduling.policy import DEFAULT_POLICY, Policy
from dantegpu.domain.scheduling.queue import JobQueue
from dantegpu.domain.scheduling.ranking import Refusal
from dantegpu.domain.scheduling.shares import PastShares
from dantegpu.domain.scheduling.snapshot import Snapshot


class Decision(Protocol):
    """A job that goes on waiting, and why."""

    @property
    def job_id(self) -> JobId: ...
    @property
    def reason(self) -> QueueReason: ...
    @property
    def detail(self) -> str: ...


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Like a Plan. The placements of a gang follow one another, by rank."""

    placements: tuple[Placement, ...]
    unplaced: tuple[Decision, ...]
    reservations: tuple[Reservation, ...]

    @property
    def reservation(self) -> Reservation | None:
        """Of the first that cannot start."""
        return self.reservations[0] if self.reservations else None


def plan_round(
    snapshot: Snapshot,
    running: Sequence[Running],
    pending: Iterable[PendingJob],
    policy: Policy = DEFAULT_POLICY,
    *,
    now: datetime,
    past: PastShares | None = None,
) -> RoundPlan:
    """Place as many as fit, without delaying the first that do not.

    Every job is in exactly one of `placements` and `unplaced`. `past` is what teams held lately; it is brought up to
    date.
    """
    queue, ends = JobQueue(pending), Ends({UUID(int=number): each for number, each in enumerate(running)})
    plan = schedule(snapshot, queue, policy, now=now, state=SchedulerState(past), ends=ends)
    told = {each.job_id: each for each in plan.told}
    unplaced: list[Decision] = [Unplaced(job.id, Refusal(QueueReason.WAITING_FOR_RETRY)) for job in queue.sleeping()]
    for it in plan.blocked:
        unplaced += [told.get(job.id) or Unplaced(job.id, it.refusal) for job in it.jobs()]
    return RoundPlan(plan.placements, tuple(unplaced), plan.reservations)
