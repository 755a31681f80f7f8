"""The reasons that waiting jobs are told, round by round."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from dantegpu.domain.clock import SystemClock
from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    Blocked,
    PendingJob,
    Plan,
    Policy,
    Refusal,
    SchedulerState,
    Snapshot,
    Waits,
    schedule,
)
from dantegpu.domain.units import GIB
from dantegpu.services.scheduler.service import waiting
from dantegpu.services.scheduler.service.waiting import Note, Reason, WaitingJobs

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM = TeamId.new()
T4 = KNOWN_GPUS["T4"]


class Rounds:
    """A leader's queue before machines that have `gpus` GPUs, one each."""

    def __init__(self, gpus: int) -> None:
        self.waiting = WaitingJobs(SystemClock())
        devices = tuple(DeviceInfo(DeviceId.new(), n, T4.model, T4.vram_bytes) for n in range(gpus))
        machine = MachineInfo(MachineId.new(), TEAM, 64_000, 64 * GIB, 64 * GIB, devices, 1000, 10)
        self.snapshot, self.state = Snapshot.from_machines([machine]), SchedulerState()
        self.added = 0

    def add(self, count: int) -> list[UUID]:
        ids: list[UUID] = []
        for _ in range(count):
            self.added += 1
            at = T0 + timedelta(seconds=self.added)
            job = PendingJob(JobId.new(), TEAM, at, ResourceRequest(parse_gpu_spec("T4")), 50)
            self.waiting.add(job, Note(60, ("new", ""), ""))
            ids.append(job.id.uuid)
        return ids

    def told(self, limit: int = 1000) -> dict[UUID, Reason]:
        """What a round has to tell; it is written and remembered."""
        plan = schedule(self.snapshot, self.waiting.queue, Policy(), now=T0, state=self.state)
        news = self.waiting.news(plan.blocked, limit)
        self.waiting.told(news.items())
        for placement in plan.placements:
            self.waiting.discard(placement.job_id.uuid)
        return news


def test_a_job_that_comes_behind_those_that_were_told_is_the_only_news():
    rounds = Rounds(gpus=0)
    many = rounds.add(30)
    assert rounds.told().keys() == set(many)
    assert rounds.told() == {}
    for _ in range(3):
        (late,) = rounds.add(1)
        assert rounds.told().keys() == {late}


def test_a_job_that_is_placed_at_once_is_not_told_why_it_waits():
    rounds = Rounds(gpus=2)
    ids = rounds.add(3)
    assert rounds.told().keys() == {ids[2]}


def test_what_comes_in_while_many_are_still_to_be_told_is_told_after_them():
    rounds = Rounds(gpus=0)
    first = rounds.add(5)
    assert rounds.told(limit=3).keys() == set(first[:3])
    late = rounds.add(2)
    assert rounds.told(limit=3).keys() == set(first[3:])
    assert rounds.told(limit=3).keys() == set(late)
    assert rounds.told() == {}


def test_who_was_behind_a_reservation_hears_that_machines_are_busy_once_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "REASONS_EVERY_SECONDS", 0.0)
    rounds = Rounds(gpus=2)
    (behind,) = rounds.add(1)
    group = rounds.waiting.queue.levels()[0][1][0]
    busy = Blocked(group, 0, Refusal(QueueReason.NO_CAPACITY))
    kept = Waits(JobId(behind), QueueReason.BEHIND_RESERVATION, "soon")

    def told(*singled: Waits) -> dict[UUID, Reason]:
        news = rounds.waiting.news_of_round(Plan((), (), (busy,), singled), 1000)
        rounds.waiting.told(news.items())
        return news

    assert told(kept) == {behind: ("behind_reservation", "soon")}
    assert told(kept) == {}
    assert told() == {behind: ("no_capacity", "")}
    assert told() == {}
