"""Who goes next: by priority, then fair between teams, then by age.

A round draws jobs, and each that is drawn counts as placed for the fairness of what follows. What then finds no place
is put back with all that was drawn after it, so the order is the same as if each job were drawn after the one before it
had been placed.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.policy import Policy
from dantegpu.domain.scheduling.queue import JobGroup, JobQueue, QueuedJob, Shape
from dantegpu.domain.scheduling.snapshot import Lease, Snapshot, TeamUse

_EVERYBODY = -1
"""The team of all jobs where teams make no difference."""


class Shares:
    """What each team uses of the whole fleet. Teams are numbers here (`Shape.team`): a round asks very often.

    Source: Ghodsi et al., "Dominant Resource Fairness", NSDI 2011.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._use = {team_id.uuid.int: use for team_id, use in snapshot.team_use.items()}
        self._totals = (
            max(int(snapshot.device_total.sum()), 1),
            max(int(snapshot.cpu_total.sum()), 1),
            max(int(snapshot.memory_total.sum()), 1),
        )
        self._shares = {team: self._dominant(use) for team, use in self._use.items()}

    def of(self, team: int) -> float:
        """The team's dominant share, 0..1."""
        return self._shares.get(team, 0.0)

    def add(self, team: int, request: ResourceRequest, times: int = 1) -> None:
        """The team holds so much more (less, when `times` is negative)."""
        milli = request.gpu.total_milli * times if request.gpu is not None else 0
        self._change(team, milli, request.cpu_milli * times, request.memory_bytes * times)

    def remove_lease(self, lease: Lease) -> None:
        """The team no longer holds this."""
        milli = sum([milli for _, milli in lease.devices])
        self._change(lease.team_id.uuid.int, -milli, -lease.cpu_milli, -lease.memory_bytes)

    def _change(self, team: int, gpu_milli: int, cpu_milli: int, memory_bytes: int) -> None:
        use = self._use[team] = self._use.get(team, _NOTHING).plus(gpu_milli, cpu_milli, memory_bytes)
        self._shares[team] = self._dominant(use)

    def _dominant(self, use: TeamUse) -> float:
        gpu, cpu, memory = self._totals
        return max(use.gpu_milli / gpu, use.cpu_milli / cpu, use.memory_bytes / memory)


_NOTHING = TeamUse()


class _Run:
    """A group in a round. `place` is where its next job is; its entry in a heap is true while it says the same."""

    __slots__ = ("group", "level", "place", "team")

    def __init__(self, group: JobGroup, level: "_Level", team: int) -> None:
        self.group = group
        self.level = level
        self.team = team
        self.place: int | None = 0

    def entry(self, start: int) -> "_Head | None":
        """Go to the next job from `start` on."""
        self.place = place = self.group.next_index(start)
        if place is None:
            return None
        job = self.group.jobs[place]
        return job.at, job.id.uuid.int, place, self


type _Head = tuple[float, int, int, _Run]
type _Turn = tuple[float, float, int, int, int]


class Draw(NamedTuple):
    """One job that is to be placed now; `place` is its index in its group."""

    run: _Run
    shape: Shape
    job: QueuedJob
    place: int


class _Level:
    """Groups of one priority: per team a heap by the age of the next job, and a heap of teams by share.

    Entries that are no longer true stay in the heaps until they come up: an older turn of a team has a lower stamp.
    """

    def __init__(self, number: int, groups: Sequence[JobGroup], fair: bool) -> None:
        self.number = number
        self._runs: dict[int, list[_Run]] = {}
        for group in groups:
            team = group.shape.team if fair else _EVERYBODY
            self._runs.setdefault(team, []).append(_Run(group, self, team))
        self._heads: dict[int, list[_Head]] = {}
        self._stamps: dict[int, int] = {}
        self.turns: list[_Turn] | None = None

    def line_up(self, shares: Shares) -> list[_Turn]:
        """All teams by their shares of now."""
        self.turns = []
        for team, runs in self._runs.items():
            if team not in self._heads:
                heads = [head for run in runs if (head := run.entry(0)) is not None]
                heapq.heapify(heads)
                self._heads[team] = heads
            self.take_turn(team, shares)
        return self.turns

    def take_turn(self, team: int, shares: Shares) -> None:
        """The team's turn comes by what it has now; it loses the turn that it had."""
        stamp = self._stamps[team] = self._stamps.get(team, 0) + 1
        head = self.head(team)
        if head is not None and self.turns is not None:
            share = 0.0 if team == _EVERYBODY else shares.of(team)
            heapq.heappush(self.turns, (share, head[0], head[1], team, stamp))

    def is_true(self, turn: _Turn) -> bool:
        return self._stamps[turn[3]] == turn[4]

    def head(self, team: int) -> _Head | None:
        """The oldest of the jobs that are next in their groups."""
        heads = self._heads[team]
        while heads and heads[0][3].place != heads[0][2]:
            heapq.heappop(heads)
        return heads[0] if heads else None

    def advance(self, head: _Head) -> None:
        """Go past the job, which is the head of its team."""
        run, heads = head[3], self._heads[head[3].team]
        following = run.entry(head[2] + 1)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, following)

    def leave(self, head: _Head) -> None:
        """Nothing more is drawn from this group."""
        head[3].place = None
        heapq.heappop(self._heads[head[3].team])

    def back_to(self, run: _Run, place: int) -> None:
        head = run.entry(place)
        if head is not None:
            heapq.heappush(self._heads[run.team], head)


class Order:
    """The order of one round over a queue that does not change meanwhile."""

    def __init__(self, queue: JobQueue, policy: Policy, shares: Shares, closed: Callable[[Shape], bool]) -> None:
        """`closed`: no job of the shape fits anywhere any more; such groups are not drawn from."""
        self._shares = shares
        self._closed = closed
        self._levels = [_Level(number, groups, policy.fair_share) for number, (_, groups) in enumerate(queue.levels())]
        self._current = 0
        self.refused: list[tuple[JobGroup, int]] = []
        """Groups that have jobs for which there is no room, and the place of the first of them."""

    def draw(self, count: int) -> list[Draw]:
        """Up to `count` jobs in their order. None means that nobody is left."""
        drawn: list[Draw] = []
        while self._current < len(self._levels):
            self._draw_from(self._levels[self._current], count, drawn)
            if len(drawn) == count:
                break
            self._current += 1
        return drawn

    def _draw_from(self, level: _Level, count: int, drawn: list[Draw]) -> None:
        shares, closed = self._shares, self._closed
        turns = level.turns if level.turns is not None else level.line_up(shares)
        while turns and len(drawn) < count:
            turn = heapq.heappop(turns)
            if not level.is_true(turn):
                continue
            team = turn[3]
            head = level.head(team)
            assert head is not None, "a turn is taken with a job in hand"
            place, run = head[2], head[3]
            shape = run.group.shape
            if closed(shape):
                self.refused.append((run.group, place))
                level.leave(head)
            else:
                drawn.append(Draw(run, shape, run.group.jobs[place], place))
                shares.add(shape.team, shape.request)
                level.advance(head)
            level.take_turn(team, shares)

    def put_back(self, draws: Sequence[Draw]) -> None:
        """These, the last that were drawn, are to be drawn again."""
        for draw in reversed(draws):
            self._shares.add(draw.shape.team, draw.shape.request, -1)
            draw.run.level.back_to(draw.run, draw.place)
        for level, team in {(draw.run.level, draw.run.team): None for draw in draws}:
            level.take_turn(team, self._shares)
        first = min(draw.run.level.number for draw in draws)
        self._current = min(first, self._current)
        for level in self._levels[first + 1 :]:
            level.turns = None  # the shares that it was lined up by are others now
