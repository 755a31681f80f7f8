"""The leader's queue in memory, apart from its rounds."""

import gc
from datetime import UTC, datetime

import pytest

from dantegpu.domain.clock import ManualClock
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling import PendingJob
from dantegpu.services.scheduler.service import waiting
from dantegpu.services.scheduler.service.waiting import Note, WaitingJobs

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_long_queue_is_no_work_for_the_garbage_collector_whenever_it_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "FREEZE_FROM_JOBS", 100)
    queue, team, request = WaitingJobs(ManualClock()), TeamId.new(), ResourceRequest()

    def frozen_after_adding(jobs: int) -> int:
        for _ in range(jobs):
            queue.add(PendingJob(JobId.new(), team, T0, request), Note(60, ("new", ""), ""))
        return gc.get_freeze_count()

    before = gc.get_freeze_count()
    try:
        assert frozen_after_adding(99) == before
        first = frozen_after_adding(1)
        assert first > before + 100
        assert frozen_after_adding(24) <= first
        assert frozen_after_adding(1) > first + 25
    finally:
        gc.unfreeze()
