"""Who goes next: by priority, then fair between teams, then by age.

A round draws jobs, and each that is drawn counts as placed for the fairness of what follows. What then finds no place
is put back with all that was drawn after it, so the order is the same as if each job were drawn after the one before it
had been placed.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dantegpu.domain.ids import TeamId
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.policy import Policy
from dantegpu.domain.scheduling.queue import JobGroup, JobQueue, QueuedJob, Shape
from dantegpu.domain.scheduling.snapshot import Lease, Snapshot, TeamUse


class Draw(NamedTuple):
    """One job that is to be placed now; `place` is its index in its group."""

    group: JobGroup
    job: QueuedJob
    place: int


class Shares:
    """What each team uses of the whole fleet.

    Source: Ghodsi et al., "Dominant Resource Fairness", NSDI 2011.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._use = dict(snapshot.team_use)
        self._totals = (
            max(int(snapshot.device_total.sum()), 1),
            max(int(snapshot.cpu_total.sum()), 1),
            max(int(snapshot.memory_total.sum()), 1),
        )

    def of(self, team_id: TeamId) -> float:
        """The team's dominant share, 0..1."""
        use = self._use.get(team_id)
        if use is None:
            return 0.0
        gpu, cpu, memory = self._totals
        return max(use.gpu_milli / gpu, use.cpu_milli / cpu, use.memory_bytes / memory)

    def add(self, team_id: TeamId, request: ResourceRequest, times: int = 1) -> None:
        """The team holds so much more (less, when `times` is negative)."""
        used = self._use.get(team_id, TeamUse())
        milli = request.gpu.total_milli if request.gpu is not None else 0
        self._use[team_id] = used.plus(milli * times, request.cpu_milli * times, request.memory_bytes * times)

    def remove_lease(self, lease: Lease) -> None:
        """The team no longer holds this."""
        used = self._use.get(lease.team_id, TeamUse())
        milli = sum(milli for _, milli in lease.devices)
        self._use[lease.team_id] = used.plus(-milli, -lease.cpu_milli, -lease.memory_bytes)


class _Level:
    """Groups of one priority: per team a heap by the age of the next job, and a heap of teams."""

    def __init__(self, groups: Sequence[JobGroup], fair: bool) -> None:
        self.fair = fair
        self.groups: dict[TeamId | None, list[JobGroup]] = {}
        for group in groups:
            self.groups.setdefault(group.team_id if fair else None, []).append(group)
        self.next_of: dict[int, int] = {}
        self.heads: dict[TeamId | None, list[tuple[float, int, int, JobGroup]]] = {}
        self.teams: list[tuple[float, float, int, TeamId | None]] | None = None

    def head(self, group: JobGroup) -> tuple[float, int, int, JobGroup] | None:
        """(age, place, group) of the group's next job."""
        index = group.next_index(self.next_of.get(id(group), 0))
        if index is None:
            return None
        job = group.jobs[index]
        return job.at, job.id.uuid.int, index, group

    def heads_of(self, team: TeamId | None, without: set[int]) -> list[tuple[float, int, int, JobGroup]]:
        groups = [group for group in self.groups[team] if id(group) not in without]
        heads = [head for group in groups if (head := self.head(group)) is not None]
        heapq.heapify(heads)
        return heads


class Order:
    """The order of one round over a queue that does not change meanwhile."""

    def __init__(self, queue: JobQueue, policy: Policy, shares: Shares, closed: Callable[[Shape], bool]) -> None:
        """`closed`: no job of the shape fits anywhere any more; such groups are not drawn from."""
        self._shares = shares
        self._closed = closed
        self._levels = [_Level(groups, policy.fair_share) for _, groups in queue.levels()]
        self._level_of = {
            id(group): n for n, it in enumerate(self._levels) for gs in it.groups.values() for group in gs
        }
        self._current = 0
        self.refused: list[tuple[JobGroup, int]] = []
        """Groups that have jobs for which there is no room, and the place of the first of them."""
        self._refused: set[int] = set()

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
        shares = self._shares
        if level.teams is None:
            level.teams = self._line_up(level)
        teams = level.teams
        while teams and len(drawn) < count:
            team = teams[0][3]
            heads = level.heads[team]
            _, _, index, group = heads[0]
            if self._closed(group.shape):
                self.refused.append((group, index))
                self._refused.add(id(group))
                heapq.heappop(heads)
            else:
                drawn.append(Draw(group, group.jobs[index], index))
                shares.add(group.shape.team_id, group.shape.request)
                level.next_of[id(group)] = index + 1
                head = level.head(group)
                if head is None:
                    heapq.heappop(heads)
                else:
                    heapq.heapreplace(heads, head)
            if heads:
                heapq.heapreplace(teams, (self._share(team), heads[0][0], heads[0][1], team))
            else:
                heapq.heappop(teams)

    def put_back(self, draws: Sequence[Draw]) -> None:
        """These, the last that were drawn, are to be drawn again."""
        touched: dict[int, set[TeamId | None]] = {}
        for draw in reversed(draws):
            group = draw.group
            self._shares.add(group.shape.team_id, group.shape.request, -1)
            number = self._level_of[id(group)]
            level = self._levels[number]
            level.next_of[id(group)] = draw.place
            touched.setdefault(number, set()).add(group.team_id if level.fair else None)
        for number, teams in touched.items():
            level = self._levels[number]
            for team in teams:
                level.heads[team] = level.heads_of(team, self._refused)
        self._current = min((*touched, self._current))
        for level in self._levels[self._current :]:
            level.teams = None  # the shares that it was lined up by are others now

    def _line_up(self, level: _Level) -> list[tuple[float, float, int, TeamId | None]]:
        teams: list[tuple[float, float, int, TeamId | None]] = []
        for team in level.groups:
            heads = level.heads.get(team)
            if heads is None:
                heads = level.heads[team] = level.heads_of(team, self._refused)
            if heads:
                teams.append((self._share(team), heads[0][0], heads[0][1], team))
        heapq.heapify(teams)
        return teams

    def _share(self, team: TeamId | None) -> float:
        return 0.0 if team is None else self._shares.of(team)
