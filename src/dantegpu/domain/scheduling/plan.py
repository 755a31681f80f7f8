"""`schedule(snapshot, pending, policy, now) -> Plan`: pure, deterministic, never over capacity.

A plan is made in four steps, each in a module of its own: `queue` knows what waits, `ordering` who goes next, `ranking`
which machine is the best one (with `objectives` and `fragmentation` for how good it is), and `board` takes it. `turns`
goes from one to the next; `gangs` and `backfill` say where jobs of several nodes go, and what is kept for whom.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from dantegpu.domain.ids import JobId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.scheduling.backfill import Backfill, Ends, Reservation
from dantegpu.domain.scheduling.board import Board, DeviceShare, Placement
from dantegpu.domain.scheduling.constraints import ConstraintCount, PendingJob
from dantegpu.domain.scheduling.fragmentation import FragmentationScorer
from dantegpu.domain.scheduling.gangs import Waits
from dantegpu.domain.scheduling.mix import RequestMix
from dantegpu.domain.scheduling.objectives import scorer_of
from dantegpu.domain.scheduling.policy import DEFAULT_POLICY, Objective, Policy
from dantegpu.domain.scheduling.queue import JobQueue, Shape, ShapeBook
from dantegpu.domain.scheduling.ranking import WINDOW, Refusal, ScoreTable
from dantegpu.domain.scheduling.shares import PastShares, Shares
from dantegpu.domain.scheduling.snapshot import Lease, Snapshot
from dantegpu.domain.scheduling.turns import Blocked, Decided, Turns

__all__ = ["Blocked", "DeviceShare", "Placement", "Plan", "SchedulerState", "Unplaced", "schedule"]

_MACHINES_PER_WINDOW = 16
"""At most one machine in so many is used between two looks at all of them."""
_EARLY = Refusal(QueueReason.WAITING_FOR_RETRY)


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A job that goes on waiting, and why."""

    job_id: JobId
    refusal: Refusal

    @property
    def reason(self) -> QueueReason:
        return self.refusal.reason

    @property
    def constraints(self) -> tuple[ConstraintCount, ...]:
        return self.refusal.constraints

    @property
    def machines_total(self) -> int:
        return self.refusal.machines_total

    @property
    def machines_fitting(self) -> int:
        return self.refusal.machines_fitting

    @property
    def detail(self) -> str:
        return self.refusal.detail


@dataclass(frozen=True, slots=True)
class Plan:
    """`placements` are in the order in which they were decided.

    Every pending job is in exactly one of `placements` and `unplaced`. Of a JobQueue, whose jobs are too many to list,
    `blocked` has the groups instead.
    """

    placements: tuple[Placement, ...]
    unplaced: tuple[Unplaced, ...]
    blocked: tuple[Blocked, ...] = ()
    told: tuple[Waits, ...] = ()
    """Of those that are blocked: who has a reservation, and the first of each group that waits for one's sake alone."""
    reservations: tuple[Reservation, ...] = ()


class SchedulerState:
    """What a caller may keep between calls of `schedule`, so that a call costs what changed and not what there is.

    It holds the mix of requests that has arrived (a job counts when it is first listed), what teams have used (`past`,
    which a caller that starts anew may `feed`), and for the snapshot of the last call what its plans have left free,
    with scores. Passing the same snapshot object again goes on from there: every placement so far counts as made, and
    `give_back` tells what has ended since. Another snapshot (or policy) starts from that snapshot's free capacity and
    keeps the mix and the past. So after a plan that was not applied as it is, give back what came to nothing, or pass
    a new snapshot.
    """

    def __init__(self, past: PastShares | None = None) -> None:
        self.mix = RequestMix()
        self.past = past or PastShares()
        self._book = ShapeBook()
        self._waiting: set[int] = set()
        self._round: _Round | None = None

    def give_back(self, leases: Iterable[Lease]) -> None:
        """What these held is free again. Nothing happens before the first plan: its snapshot will say so."""
        if self._round is not None:
            self._round.give_back(list(leases))

    def begin(self, snapshot: Snapshot, policy: Policy, arrivals: dict[Shape, int], now: datetime) -> "_Round":
        held = self._round.held if self._round is not None else Shares(snapshot, policy, self.past).held
        self.past.advance(held, policy.half_life_seconds, now)
        if policy.objective is Objective.FRAGMENTATION:
            for shape, count in arrivals.items():
                self.mix.count(shape.request, count)
            self.mix.fade()
        if self._round is None or not self._round.goes_on(snapshot, policy):
            self._round = _Round(snapshot, policy, self.mix, self.past)
        self._round.follow_mix()
        return self._round

    def queue_of(self, jobs: Iterable[PendingJob]) -> tuple[JobQueue, dict[Shape, int]]:
        """A queue of listed jobs, and how many of each shape are new."""
        queue = JobQueue(book=self._book)
        for job in jobs:
            queue.add(job)
        arrivals = queue.take_arrivals()
        waiting = self._waiting
        for job in queue if waiting else ():
            if job.id.uuid.int in waiting and job.group is not None:
                arrivals[job.group.shape] -= 1
        return queue, arrivals

    def end(self, unplaced: Sequence[Unplaced]) -> None:
        self._waiting = {job.job_id.uuid.int for job in unplaced}


def schedule(
    snapshot: Snapshot,
    pending: Iterable[PendingJob] | JobQueue,
    policy: Policy = DEFAULT_POLICY,
    *,
    now: datetime,
    state: SchedulerState | None = None,
    limit: int | None = None,
    ends: Ends | None = None,
) -> Plan:
    """Place as many pending jobs as fit, best first: by priority, then fair between teams, then by age.

    The same arguments give the same plan. A job that is listed twice counts once. A job whose `not_before` lies
    ahead waits as WAITING_FOR_RETRY. Raises nothing for what a job may ask. `state` is what earlier calls left and is
    changed; without it the call stands alone. Not more than `limit` jobs are placed, of a JobQueue: jobs after them are
    in no part of the plan. `ends`, with a JobQueue, is what runs: then those that cannot start have reservations.
    """
    state = state or SchedulerState()
    if isinstance(pending, JobQueue):
        pending.wake(now)
        round_ = state.begin(snapshot, policy, pending.take_arrivals(), now)
        backfill = None if ends is None else Backfill(ends, now)
        decided = round_.place(pending, limit, backfill)
        reservations = () if backfill is None else tuple(backfill.reservations)
        return Plan(decided.placements, (), decided.blocked, decided.told, reservations)
    queue, arrivals = state.queue_of(pending)
    queue.wake(now)
    round_ = state.begin(snapshot, policy, arrivals, now)
    decided = round_.place(queue, limit)
    unplaced = [Unplaced(job.id, _EARLY) for job in queue.sleeping()]
    unplaced += [Unplaced(job.id, each.refusal) for each in decided.blocked for job in each.jobs()]
    state.end(unplaced)
    return Plan(decided.placements, tuple(unplaced))


class _Round:
    """The free capacity of one snapshot as plans use it up, and what is known about each shape."""

    def __init__(self, snapshot: Snapshot, policy: Policy, mix: RequestMix, past: PastShares) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self._mix = mix
        self._board = Board(snapshot)
        self._shares = Shares(snapshot, policy, past)
        self._scorer = scorer_of(policy.objective, self._board, mix)
        self._table = ScoreTable(self._board, self._scorer)
        # A price is what somebody pays: `cheapest` looks at every machine for every job. A fragment more or less is
        # nobody's bill, and looking at many shapes in one go is what makes rounds fast.
        several = policy.objective is Objective.FRAGMENTATION
        self._window = max(1, min(WINDOW, len(snapshot.machines) // _MACHINES_PER_WINDOW)) if several else 1

    @property
    def held(self) -> Mapping[int, float]:
        """What teams hold, as shares of the fleet."""
        return self._shares.held

    def goes_on(self, snapshot: Snapshot, policy: Policy) -> bool:
        return self._snapshot is snapshot and self._policy == policy

    def follow_mix(self) -> None:
        """Score by the mix of today. Once per call: within a call the order of jobs must not change a weight."""
        if isinstance(self._scorer, FragmentationScorer) and self._mix.stale:
            self._scorer.use(self._mix.shapes())
            self._table.rescore()

    def give_back(self, leases: Sequence[Lease]) -> None:
        self._board.give_back(leases)
        for lease in leases:
            self._shares.remove_lease(lease)

    def place(self, queue: JobQueue, limit: int | None, backfill: Backfill | None = None) -> Decided:
        return Turns(queue, self._policy, self._board, self._table, self._shares, self._window, backfill).run(limit)
