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


class _Run:
    """A group in a round. `place` is where its next job is; its entry in a heap is true while it says the same."""

    __slots__ = ("group", "place", "team")

    def __init__(self, group: JobGroup, team: "_Team") -> None:
        self.group = group
        self.team = team
        self.place: int | None = 0

    def entry(self, start: int) -> "_Head | None":
        """Go to the next job from `start` on."""
        self.place = place = self.group.next_index(start)
        if place is None:
            return None
        job = self.group.jobs[place]
        return job.at, job.id.uuid.int, place, self


class _Team:
    """A team's groups of one level. `heads` is a heap by the age of the job that is next in each.

    Entries that are no longer true stay in it until they come up. `runs` are not in it yet: nobody has asked for them.
    `stamp` is that of the team's only true turn.
    """

    __slots__ = ("heads", "level", "number", "runs", "stamp")

    def __init__(self, number: int, level: "_Level") -> None:
        self.number = number
        self.level = level
        self.runs: list[_Run] = []
        self.heads: list[_Head] = []
        self.stamp = 0

    def head(self) -> "_Head | None":
        """The oldest of the jobs that are next in their groups."""
        heads = self.heads
        if self.runs:
            heads += [head for run in self.runs if (head := run.entry(0)) is not None]
            heapq.heapify(heads)
            self.runs.clear()
        while heads and heads[0][3].place != heads[0][2]:
            heapq.heappop(heads)
        return heads[0] if heads else None

    def advance(self, run: _Run, place: int) -> "_Head | None":
        """Go past the job at the head, which is this one of this run; the next head."""
        following = run.entry(place + 1)
        if following is None:
            heapq.heappop(self.heads)
        else:
            heapq.heapreplace(self.heads, following)
        return self.head()

    def leave(self, run: _Run) -> "_Head | None":
        """Nothing more is drawn from the run at the head; the next head."""
        run.place = None
        heapq.heappop(self.heads)
        return self.head()

    def back_to(self, run: _Run, place: int) -> None:
        head = run.entry(place)
        if head is not None:
            heapq.heappush(self.heads, head)


type _Head = tuple[float, int, int, _Run]
type _Turn = tuple[float, float, int, int, _Team]
"""The team's share, the age and number of its next job, and the stamp: an older turn of a team has a lower one."""


class Draw(NamedTuple):
    """One job that is to be placed now; `place` is its index in its group, `step` where the order was."""

    step: int
    run: _Run
    shape: Shape
    job: QueuedJob
    place: int


class _Level:
    """Groups of one priority, and a heap of their teams by share, or by age alone where it is not `fair`."""

    def __init__(self, groups: Sequence[JobGroup], fair: bool) -> None:
        self.fair = fair
        self._teams: dict[int, _Team] = {}
        for group in groups:
            number = group.shape.team
            team = self._teams.get(number)
            if team is None:
                team = self._teams[number] = _Team(number, self)
            team.runs.append(_Run(group, team))
        self.turns: list[_Turn] | None = None

    def line_up(self, shares: Shares) -> list[_Turn]:
        """All teams by their shares of now."""
        self.turns = []
        for team in self._teams.values():
            self.take_turn(team, shares)
        return self.turns

    def take_turn(self, team: _Team, shares: Shares) -> None:
        """The team's turn comes by what it has now; it loses the turn that it had."""
        team.stamp += 1
        head = team.head()
        if head is not None and self.turns is not None:
            share = shares.of(team.number) if self.fair else 0.0
            heapq.heappush(self.turns, (share, head[0], head[1], team.stamp, team))


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
            share, _, _, stamp, team = turn
            if team.stamp != stamp:
                turn = None
                continue
            head = team.heads[0]  # a true one: who changes heads asks for the head, and the turn is of that
            place, run = head[2], head[3]
            group = run.group
            shape = group.shape
            if closed(shape):
                if drawn and self._pauses:
                    break
                # The team holds what it held: only its next job is another one.
                self.refused.append((group, place))
                following = team.leave(run)
            elif own and not shares.within_quota(shape.team, shape.request, shape.nodes):
                turn = None
                continue  # until what is left is given to all
            else:
                drawn.append(Draw(self._step, run, shape, group.jobs[place], place))
                held = shares.add(shape.team, shape.request, shape.nodes)
                share = held if level.fair else 0.0
                following = team.advance(run, place)
            turn = None if following is None else (share, following[0], following[1], stamp, team)
        if turn is not None:
            heapq.heappush(turns, turn)
        return len(drawn) == count or bool(turns)

    def pass_over(self, draws: Iterable[Draw]) -> None:
        """These found no place: their teams hold less than was thought when they were drawn."""
        teams: dict[_Team, None] = {}
        for draw in draws:
            self._shares.add(draw.shape.team, draw.shape.request, -draw.shape.nodes)
            teams[draw.run.team] = None
        for team in teams:
            team.level.take_turn(team, self._shares)

    def put_back(self, draws: Sequence[Draw]) -> None:
        """These, the last that were drawn, are to be drawn again."""
        for draw in reversed(draws):
            draw.run.team.back_to(draw.run, draw.place)
        self.pass_over(draws)
        first = draws[0].step
        if first < self._step:
            self._step = first
            for level, _ in self._steps[first:]:
                level.turns = None  # the shares that it was lined up by are others now
