"""The leader's queue in memory: the jobs of PostgreSQL that are QUEUED, and what has been told about each."""

import gc
import heapq
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.scheduling import (
    Blocked,
    Decision,
    JobGroup,
    JobQueue,
    PendingJob,
    Plan,
    QueuedJob,
    Refusal,
    RoundPlan,
)

NO_FUNDS_RETRY_SECONDS = 10.0
REASONS_EVERY_SECONDS = 0.25
TEAM_PAUSE_SECONDS = 1.0
"""A team that could not pay is left out of rounds for so long: its other jobs must not keep the rounds busy."""

FREEZE_FROM_JOBS, FREEZE_GROWTH = 50_000, 1.25
"""A queue of this size, and one that has grown by so much since, is taken out of the garbage collector's sight.

A full walk of the collector through 300,000 waiting jobs took 0.4 s. What leaves the queue is freed all the same.
"""

type Reason = tuple[str, str]
"""A reason and its detail, as the database has them."""


@dataclass(slots=True)
class Note:
    """What a round has to know of a waiting job beside its place in the queue."""

    max_duration_seconds: int
    told: Reason
    traceparent: str
    """Of the submission."""
    array_id: UUID | None = None
    """A task's array, under whose id its attempts are paid for."""
    deadline_at: datetime | None = None
    """Not placed from then on."""
    spot: bool = False
    saves: bool = False
    """It saves a checkpoint when it has to stop."""


@dataclass(slots=True)
class _Mark:
    """How far the jobs of a group have been told: `rest` are those that have not been looked at."""

    refusal: Refusal
    rest: Iterator[QueuedJob] | None


class WaitingJobs:
    """Groups of jobs that are alike share their reason, so a round touches only groups whose reason has changed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.queue = JobQueue()
        self._notes: dict[UUID, Note] = {}
        self._marks: dict[JobGroup, _Mark] = {}
        self._singled: set[UUID] = set()
        """Jobs that waited for a reason of their own when that was told last."""
        self._deadlines: list[tuple[datetime, UUID]] = []
        self._tell_at_seconds = 0.0
        self._untold = False
        """Some wait for a reason that is not written yet."""
        self._freeze_at = FREEZE_FROM_JOBS

    def __len__(self) -> int:
        return len(self._notes)

    def __contains__(self, job_id: UUID) -> bool:
        return job_id in self._notes

    def ids(self) -> set[UUID]:
        return set(self._notes)

    def clear(self) -> None:
        self.queue = JobQueue()
        self._notes.clear()
        self._marks.clear()
        self._singled.clear()
        self._deadlines.clear()

    def add(self, job: PendingJob, note: Note) -> None:
        """Add the job, or take its new version."""
        self.queue.add(job)
        self._notes[job.id.uuid] = note
        if note.deadline_at is not None:
            heapq.heappush(self._deadlines, (note.deadline_at, job.id.uuid))
        if len(self._notes) >= self._freeze_at:
            gc.collect(1)
            gc.freeze()
            self._freeze_at = int(len(self._notes) * FREEZE_GROWTH)

    def discard(self, job_id: UUID) -> None:
        self._notes.pop(job_id, None)
        self.queue.discard(JobId(job_id))

    def note(self, job_id: UUID) -> Note | None:
        return self._notes.get(job_id)

    @property
    def ready(self) -> bool:
        """Is there anybody for a round now?"""
        now = self._clock.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            at, job_id = heapq.heappop(self._deadlines)
            note = self._notes.get(job_id)
            if note is not None and note.deadline_at == at:
                # Its note stays until PostgreSQL says that it has ended, or a sweep would add it again.
                self.queue.discard(JobId(job_id))
        self.queue.wake(now)
        return self.queue.ready

    def pause_seconds(self, most: float) -> float | None:
        """Until somebody who is left out may go on, at most `most`; None when nobody waits."""
        if not self._notes:
            return None
        due = self.queue.next_wake()
        until_due = (due - self._clock.now()).total_seconds() if due is not None else most
        pause_seconds = max(0.02, min(most, until_due))
        if self._untold:
            pause_seconds = max(0.0, min(pause_seconds, self._tell_at_seconds - time.monotonic()))
        return pause_seconds

    def without_funds(self, job_id: UUID) -> None:
        """Billing is not asked again for a while, unless money comes in."""
        queued = self.queue.get(JobId(job_id))
        if queued is not None and queued.group is not None:
            now = self._clock.now()
            self.queue.pause_team(queued.group.team_id, now + timedelta(seconds=TEAM_PAUSE_SECONDS))
            self.queue.hold(queued.id, now + timedelta(seconds=NO_FUNDS_RETRY_SECONDS))

    def money_came_in(self, team_id: TeamId) -> None:
        self.queue.resume_team(team_id)

    def news_of_round(self, plan: Plan | RoundPlan, limit: int) -> dict[UUID, Reason]:
        """Jobs whose reason is another one than the database has, when it is time to tell.

        Most that wait now are placed soon, and of those nobody needs to hear why they waited.
        """
        now_seconds = time.monotonic()
        self._untold = now_seconds < self._tell_at_seconds
        if self._untold:
            return {}
        if isinstance(plan, Plan):
            news = self._news_of_some(plan, limit)
            news |= self.news(plan.blocked, limit - len(news), news.keys() | self._singled)
        else:
            news = self.news_of(plan.unplaced, limit)
        self._untold = len(news) >= limit
        if news:
            self._tell_at_seconds = now_seconds + REASONS_EVERY_SECONDS
        return news

    def _news_of_some(self, plan: Plan, limit: int) -> dict[UUID, Reason]:
        """Of jobs that wait for another reason than their group, and of those that did so the last time."""
        news = self.news_of(plan.told, limit)
        before, self._singled = self._singled, {decision.job_id.uuid for decision in plan.told}
        refusal_of = {it.group: it.refusal for it in plan.blocked} if before - self._singled else {}
        for job_id in before - self._singled:
            queued, note = self.queue.get(JobId(job_id)), self._notes.get(job_id)
            refusal = refusal_of.get(queued.group) if queued is not None and queued.group is not None else None
            if refusal is not None and note is not None and _is_news(note, reason := _reason_of(refusal)):
                news[job_id] = reason
        return news

    def news(
        self, blocked: Sequence[Blocked], limit: int, singled: Collection[UUID] = frozenset()
    ) -> dict[UUID, Reason]:
        """At most `limit` jobs whose reason is another one than the database has; the next call goes on behind them.

        `singled` have a reason of their own.
        """
        news: dict[UUID, Reason] = {}
        if len(self._marks) > 2 * len(blocked) + 1000:
            self._marks.clear()
        for it in blocked:
            if len(news) >= limit:
                break
            mark = self._marks.get(it.group)
            if mark is None or mark.refusal != it.refusal:
                it.group.take_recent()  # they are among all
                mark = self._marks[it.group] = _Mark(it.refusal, iter(it.jobs()))
            elif mark.rest is None and it.group.recent != []:
                mark.rest = _recent_of(it)
            if mark.rest is not None:
                self._tell(mark, news, limit, singled)
        return news

    def news_of(self, unplaced: Iterable[Decision], limit: int) -> dict[UUID, Reason]:
        """The same for jobs that are listed one by one."""
        news: dict[UUID, Reason] = {}
        for decision in unplaced:
            note = self._notes.get(decision.job_id.uuid)
            reason = (decision.reason.value, decision.detail)
            # A retry's reason says what happened to the last attempt; a round has nothing to add to that.
            if note is not None and decision.reason is not QueueReason.WAITING_FOR_RETRY and _is_news(note, reason):
                news[decision.job_id.uuid] = reason
            if len(news) >= limit:
                break
        return news

    def first(self, limit: int, which: Callable[[PendingJob], bool]) -> list[PendingJob]:
        """The first jobs that may go on, by priority, then age, of the shapes that are asked for."""
        found: list[PendingJob] = []
        for _, groups in self.queue.levels():
            wanted = [group.from_index(0) for group in groups if which(group.shape.job)]
            for job in heapq.merge(*wanted, key=lambda job: job.age):
                note = self._notes.get(job.id.uuid)
                if note is not None:
                    found.append(self.queue.pending(job))
                if len(found) >= limit:
                    return found
        return found

    def told(self, news: Iterable[tuple[UUID, Reason]]) -> None:
        """The database has these now."""
        for job_id, reason in news:
            note = self._notes.get(job_id)
            if note is not None:
                note.told = reason

    def forget_told(self) -> None:
        """What news() answered has not been written: look at all groups again."""
        self._marks.clear()

    def _tell(self, mark: _Mark, news: dict[UUID, Reason], limit: int, singled: Collection[UUID]) -> None:
        assert mark.rest is not None
        reason = _reason_of(mark.refusal)
        for job in mark.rest:
            note = self._notes.get(job.id.uuid)
            if note is not None and job.id.uuid not in singled and _is_news(note, reason):
                news[job.id.uuid] = reason
                if len(news) >= limit:
                    return
        mark.rest = None


def _reason_of(refusal: Refusal) -> Reason:
    return refusal.reason.value, refusal.detail


def _recent_of(blocked: Blocked) -> Iterator[QueuedJob]:
    """Those of the jobs that came in since the last look: however many wait, only they have to hear the reason."""
    group = blocked.group
    recent = group.take_recent()
    if recent is None:
        return iter(blocked.jobs())
    # Those before it are being placed.
    first = next(iter(group.jobs[blocked.first : blocked.first + 1]), None)
    return (job for job in recent if first and job.age >= first.age and job.group is group and job.until is None)


def _is_news(note: Note, reason: Reason) -> bool:
    """That machines are busy says less than that one was taken from the job, and why."""
    known = (QueueReason.PREEMPTED.value, QueueReason.NO_CAPACITY.value)
    return note.told != reason and (note.told[0], reason[0]) != known
