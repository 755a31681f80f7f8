"""Who goes next: teams within their quotas, then by priority, then fair between teams, then by age.

A round draws jobs, and each that is drawn counts as placed for the fairness of what follows. What then finds no place
is put back with all that was drawn after it, so the order is the same as if each job were drawn after the one before it
had been placed.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dantegpu.domain.scheduling.policy import Policy
from dantegpu.domain.scheduling.queue import JobGroup, JobQueue, QueuedJob, Shape
from dantegpu.domain.scheduling.shares import Shares

_EVERYBODY = -1
"""The team of all jobs where teams make no difference."""


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
    """One job that is to be placed now; `place` is its index in its group, `step` where the order was."""

    step: int
    run: _Run
    shape: Shape
    job: QueuedJob
    place: int


class _Level:
    """Groups of one priority: per team a heap by the age of the next job, and a heap of teams by share.

    Entries that are no longer true stay in the heaps until they come up: an older turn of a team has a lower stamp.
    """

    def __init__(self, groups: Sequence[JobGroup], fair: bool) -> None:
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
        turn = self.next_turn(team, shares)
        if turn is not None and self.turns is not None:
            heapq.heappush(self.turns, turn)

    def next_turn(self, team: int, shares: Shares) -> "_Turn | None":
        """The same for a caller that looks at the turn itself. None: the team has nobody left."""
        stamp = self._stamps[team] = self._stamps.get(team, 0) + 1
        head = self.head(team)
        if head is None:
            return None
        return (0.0 if team == _EVERYBODY else shares.of(team)), head[0], head[1], team, stamp

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

    def __init__(
        self, queue: JobQueue, policy: Policy, shares: Shares, closed: Callable[[Shape], bool], *, pauses: bool = False
    ) -> None:
        """`closed`: no job of the shape fits anywhere any more; such groups are not drawn from.

        `pauses`: a draw ends before a group that is refused, so whoever is drawn after it is drawn by another call.
        """
        self._shares = shares
        self._closed = closed
        self._pauses = pauses
        levels = [_Level(groups, policy.fair_share) for _, groups in queue.levels()]
        # Twice through all priorities: what belongs to teams by their quotas, then what is left.
        own = [(level, True) for level in levels] if policy.quotas else []
        self._steps = [*own, *((level, False) for level in levels)]
        self._step = 0
        self.refused: list[tuple[JobGroup, int]] = []
        """Groups that have jobs for which there is no room, and the place of the first of them."""

    def draw(self, count: int) -> list[Draw]:
        """Up to `count` jobs in their order. None means that nobody is left."""
        drawn: list[Draw] = []
        while self._step < len(self._steps):
            if self._draw_from(*self._steps[self._step], count, drawn):
                break
            self._step += 1
            if self._step < len(self._steps):
                self._steps[self._step][0].turns = None
        return drawn

    def _draw_from(self, level: _Level, own: bool, count: int, drawn: list[Draw]) -> bool:
        """False: the level has nobody left for this step."""
        shares, closed = self._shares, self._closed
        turns = level.turns if level.turns is not None else level.line_up(shares)
        turn: _Turn | None = None
        while len(drawn) < count:
            # A team that is still the first goes on without a way through the heap.
            if turn is None:
                if not turns:
                    break
                turn = heapq.heappop(turns)
            elif turns and turns[0] < turn:
                turn = heapq.heapreplace(turns, turn)
            if not level.is_true(turn):
                turn = None
                continue
            team = turn[3]
            head = level.head(team)
            assert head is not None, "a turn is taken with a job in hand"
            place, run = head[2], head[3]
            shape = run.group.shape
            if closed(shape):
                if drawn and self._pauses:
                    heapq.heappush(turns, turn)
                    return True
                self.refused.append((run.group, place))
                level.leave(head)
                following = level.head(team)
                # The team holds what it held: only its next job is another one.
                turn = None if following is None else (turn[0], following[0], following[1], team, turn[4])
                continue
            if own and not shares.within_quota(shape.team, shape.request, shape.nodes):
                turn = None
                continue  # until what is left is given to all
            drawn.append(Draw(self._step, run, shape, run.group.jobs[place], place))
            shares.add(shape.team, shape.request, shape.nodes)
            level.advance(head)
            turn = level.next_turn(team, shares)
        if turn is not None:
            heapq.heappush(turns, turn)
        return len(drawn) == count

    def pass_over(self, draws: Iterable[Draw]) -> None:
        """These found no place: their teams hold less than was thought when they were drawn."""
        teams: dict[tuple[_Level, int], None] = {}
        for draw in draws:
            self._shares.add(draw.shape.team, draw.shape.request, -draw.shape.nodes)
            teams[draw.run.level, draw.run.team] = None
        for level, team in teams:
            level.take_turn(team, self._shares)

    def put_back(self, draws: Sequence[Draw]) -> None:
        """These, the last that were drawn, are to be drawn again."""
        for draw in reversed(draws):
            draw.run.level.back_to(draw.run, draw.place)
        self.pass_over(draws)
        first = draws[0].step
        if first < self._step:
            self._step = first
            for level, _ in self._steps[first:]:
                level.turns = None  # the shares that it was lined up by are others now
