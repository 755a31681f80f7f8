"""What waits, kept between rounds: by priority, team, shape and age. A round looks at heads, never at all jobs.

A million waiting jobs are a few thousand groups. A job here is a small record; what it asks for is kept once per shape.
"""

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count

from dantegpu.domain.ids import JobId, TeamId
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.constraints import PendingJob

MAX_BOOK_SHAPES = 100_000
"""Shapes that are recognised. When there are more, an old shape may get a second object, and with it a second group."""
MAX_BOOK_REQUESTS = 4096
"""Requests that are recognised as objects."""
_MAX_RECENT = 100_000
_COMPACT_AFTER = 64


class Shape:
    """What jobs have in common that fit the same machines equally well, for as long. Compared by identity: get it from
    a ShapeBook.

    `job` is one job of the shape; its id and age mean nothing. `team` is the team's id as a number, for quick look-ups.
    """

    __slots__ = ("job", "nodes", "request", "team", "team_id")

    def __init__(self, job: PendingJob) -> None:
        self.job = job
        self.team_id: TeamId = job.team_id
        self.team: int = job.team_id.uuid.int
        self.request: ResourceRequest = job.request
        self.nodes = job.nodes


class ShapeBook:
    """One Shape object per shape."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[object, ...], Shape] = {}
        self._requests: dict[int, tuple[ResourceRequest, int]] = {}
        self._numbers: dict[ResourceRequest, int] = {}

    def shape_of(self, job: PendingJob) -> Shape:
        # Ids and numbers instead of what they stand for: to hash a request costs as much as all the rest.
        request = self._number_of(job.request)
        key = (job.team_id.uuid.int, request, *job.shape[2:], job.avoided_machines, job.max_duration_seconds)
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MAX_BOOK_SHAPES:
                self._shapes.clear()
            shape = self._shapes[key] = Shape(job)
        return shape

    def _number_of(self, request: ResourceRequest) -> int:
        """Equal requests have one number; those that are one object are recognised at once."""
        known = self._requests.get(id(request))
        if known is not None and known[0] is request:
            return known[1]
        if len(self._requests) >= MAX_BOOK_REQUESTS:
            self._requests.clear()
        if len(self._numbers) >= MAX_BOOK_SHAPES:
            self._numbers.clear()
            self._requests.clear()
            self._shapes.clear()
        number = self._numbers.setdefault(request, len(self._numbers))
        self._requests[id(request)] = request, number
        return number


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A waiting job: `at` is when it was submitted (seconds since 1970), `until` when it may go on if it sleeps.

    `held`: it sleeps because of its team, and goes on when the team is resumed; else only its time counts.
    `group` is None once it has left the queue.
    """

    id: JobId
    at: float
    group: "JobGroup | None"
    until: float | None = None
    held: bool = False

    @property
    def age(self) -> tuple[float, int]:
        """Orders jobs: the oldest first, of equally old ones the lower id."""
        return self.at, self.id.uuid.int


@dataclass(slots=True, eq=False)
class JobGroup:
    """Waiting jobs of one priority, team and shape, the oldest first. `jobs` may hold some that have left."""

    priority: int
    standing: int
    shape: Shape
    jobs: list[QueuedJob] = field(default_factory=list[QueuedJob])
    start: int = 0
    waiting: int = 0
    recent: list[QueuedJob] | None = field(default_factory=list[QueuedJob])
    """What came in since take_recent(); None: too much for that."""

    @property
    def team_id(self) -> TeamId:
        return self.shape.team_id

    def next_index(self, index: int) -> int | None:
        """The first place from `index` on with a job that waits; None when there is none."""
        jobs = self.jobs
        for place in range(max(index, self.start), len(jobs)):
            job = jobs[place]
            if job.group is self and job.until is None:
                return place
        return None

    def from_index(self, index: int) -> Iterator[QueuedJob]:
        """Jobs that wait, from the one at `index` on."""
        for job in self.jobs[max(index, self.start) :]:
            if job.group is self and job.until is None:
                yield job

    def insert(self, job: QueuedJob) -> None:
        self.waiting += 1
        if self.recent is not None:
            self.recent.append(job)
            if len(self.recent) > _MAX_RECENT:
                self.recent = None
        if not self.jobs or self.jobs[-1].age <= job.age:
            self.jobs.append(job)
        else:
            insort(self.jobs, job, lo=self.start, key=lambda it: it.age)

    def take_recent(self) -> list[QueuedJob] | None:
        """The jobs that came in since this was asked last; None: look at all."""
        recent, self.recent = self.recent, []
        return recent

    def left(self) -> None:
        """One of the jobs waits no more."""
        self.waiting -= 1
        if not self.waiting:
            self.recent = []
            self.jobs.clear()
            self.start = 0
            return
        jobs, start = self.jobs, self.start
        while jobs[start].group is not self or jobs[start].until is not None:
            start += 1
        self.start = start
        if len(jobs) - self.waiting > max(_COMPACT_AFTER, self.waiting):
            self.jobs = list(self.from_index(start))
            self.start = 0


class JobQueue:
    """The jobs that wait. `schedule` removes nothing from it: what was placed is discarded once that is certain."""

    def __init__(self, jobs: Iterable[PendingJob] = (), *, book: ShapeBook | None = None) -> None:
        self._book = book or ShapeBook()
        self._levels: dict[int, dict[Shape, JobGroup]] = {}
        self._jobs: dict[int, QueuedJob] = {}
        self._sleepers: list[tuple[float, int, QueuedJob]] = []
        self._numbers = count()
        self._paused: dict[TeamId, float] = {}
        self._arrivals: dict[Shape, int] = {}
        for job in jobs:
            self.add(job)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: JobId) -> bool:
        return job_id.uuid.int in self._jobs

    def __iter__(self) -> Iterator[QueuedJob]:
        return iter(self._jobs.values())

    def get(self, job_id: JobId) -> QueuedJob | None:
        return self._jobs.get(job_id.uuid.int)

    def pending(self, job: QueuedJob) -> PendingJob:
        """The job as it was added, so far as its shape says."""
        assert job.group is not None, "a job that waits"
        submitted_at, like = datetime.fromtimestamp(job.at, UTC), job.group.shape.job
        return replace(like, id=job.id, submitted_at=submitted_at, priority=job.group.priority, not_before=None)

    def add(self, job: PendingJob) -> QueuedJob:
        """Add the job, or take its new version instead of the one that is here."""
        number = job.id.uuid.int
        shape = self._book.shape_of(job)
        if number in self._jobs:
            self.discard(job.id)
        else:
            self._arrivals[shape] = self._arrivals.get(shape, 0) + 1
        level = self._levels.get(job.standing)
        if level is None:
            level = self._levels[job.standing] = {}
        group = level.get(shape)
        if group is None:
            group = level[shape] = JobGroup(job.priority, job.standing, shape)
        queued = self._jobs[number] = QueuedJob(job.id, job.submitted_at.timestamp(), group)
        if job.not_before is None:
            group.insert(queued)
        else:
            self._sleep(queued, job.not_before.timestamp())
        return queued

    def discard(self, job_id: JobId) -> None:
        """The job waits no more, whatever became of it."""
        job = self._jobs.pop(job_id.uuid.int, None)
        if job is None or job.group is None:
            return
        group, job.group = job.group, None
        if job.until is None:
            group.left()
        self._drop_if_empty(group)

    def hold(self, job_id: JobId, until: datetime) -> None:
        """Leave the job out of rounds until then; it keeps its place."""
        job = self._jobs.get(job_id.uuid.int)
        if job is not None and job.group is not None:
            asleep = job.until is not None
            job.held = True
            self._sleep(job, until.timestamp())
            if not asleep:
                job.group.left()

    def pause_team(self, team_id: TeamId, until: datetime) -> None:
        """Leave the team's jobs out of rounds until then."""
        self._paused[team_id] = until.timestamp()

    def resume_team(self, team_id: TeamId) -> None:
        """The team's jobs take part again, those on hold as well."""
        self._paused.pop(team_id, None)
        for _, _, job in list(self._sleepers):
            if job.held and job.group is not None and job.group.team_id == team_id:
                self._awake(job)

    def wake(self, now: datetime) -> None:
        """Jobs and teams whose time has come take part again."""
        moment = now.timestamp()
        while self._sleepers and self._sleepers[0][0] <= moment:
            until, _, job = heapq.heappop(self._sleepers)
            if job.group is not None and job.until == until:
                self._awake(job)
        if self._paused:
            self._paused = {team: until for team, until in self._paused.items() if until > moment}

    def next_wake(self) -> datetime | None:
        """When `wake` will find somebody."""
        times = [self._sleepers[0][0]] if self._sleepers else []
        times += self._paused.values()
        return datetime.fromtimestamp(min(times), UTC) if times else None

    def sleeping(self) -> list[QueuedJob]:
        """Jobs that are left out for now, the oldest first."""
        asleep = {job.id.uuid: job for until, _, job in self._sleepers if job.group is not None and job.until == until}
        return sorted(asleep.values(), key=lambda job: job.age)

    @property
    def ready(self) -> bool:
        """Is there anybody for a round? A team that is paused does not count."""
        return any(
            group.waiting and group.team_id not in self._paused
            for level in self._levels.values()
            for group in level.values()
        )

    def levels(self) -> list[tuple[int, list[JobGroup]]]:
        """Groups with somebody to place, by standing, the highest first."""
        found: list[tuple[int, list[JobGroup]]] = []
        for standing in sorted(self._levels, reverse=True):
            groups = [
                group
                for group in self._levels[standing].values()
                if group.waiting and (not self._paused or group.team_id not in self._paused)
            ]
            if groups:
                found.append((standing, groups))
        return found

    def groups(self) -> Iterator[JobGroup]:
        for level in self._levels.values():
            yield from level.values()

    def take_arrivals(self) -> dict[Shape, int]:
        """How many jobs of each shape have been added since this was asked last."""
        arrivals, self._arrivals = self._arrivals, {}
        return arrivals

    def _sleep(self, job: QueuedJob, until: float) -> None:
        job.until = until
        heapq.heappush(self._sleepers, (until, next(self._numbers), job))

    def _awake(self, job: QueuedJob) -> None:
        assert job.group is not None
        group = self._levels.setdefault(job.group.standing, {}).setdefault(job.group.shape, job.group)
        # A new record: the old one may still be in the list, at a place that is looked at no more.
        awake = self._jobs[job.id.uuid.int] = QueuedJob(job.id, job.at, group)
        job.group = None
        group.insert(awake)

    def _drop_if_empty(self, group: JobGroup) -> None:
        if group.waiting:
            return
        level = self._levels.get(group.standing)
        if level is not None and level.get(group.shape) is group:
            del level[group.shape]
            if not level:
                del self._levels[group.standing]
