"""The queue that is kept between rounds, and rounds over it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    JobQueue,
    Lease,
    Objective,
    PendingJob,
    Policy,
    SchedulerState,
    Snapshot,
    schedule,
)
from dantegpu.domain.units import GIB

T0 = datetime(2026, 1, 1, tzinfo=UTC)
US, THEM = TeamId.new(), TeamId.new()


def a_machine(gpus: int = 1, model: str = "T4", price: int = 1000) -> MachineInfo:
    gpu = KNOWN_GPUS[model]
    devices = tuple(DeviceInfo(DeviceId.new(), n, gpu.model, gpu.vram_bytes) for n in range(gpus))
    return MachineInfo(MachineId.new(), TeamId.new(), 64_000, 64 * GIB, 64 * GIB, devices, price, 10)


def a_job(gpu: str = "1", team: TeamId = US, number: int = 0, priority: int = 50) -> PendingJob:
    submitted_at = T0 + timedelta(seconds=number)
    return PendingJob(JobId.new(), team, submitted_at, ResourceRequest(parse_gpu_spec(gpu)), priority)


class Rounds:
    """Rounds over one queue, as a leader makes them."""

    def __init__(self, *machines: MachineInfo, policy: Policy | None = None) -> None:
        self.snapshot = Snapshot.from_machines(machines)
        self.queue, self.state, self.policy = JobQueue(), SchedulerState(), policy or Policy()

    def add(self, *jobs: PendingJob) -> None:
        for job in jobs:
            self.queue.add(job)

    def next(self, after: float = 0.0, limit: int | None = None) -> list[JobId]:
        now = T0 + timedelta(seconds=after)
        plan = schedule(self.snapshot, self.queue, self.policy, now=now, state=self.state, limit=limit)
        for placement in plan.placements:
            self.queue.discard(placement.job_id)
        self.leases = [placement.lease for placement in plan.placements]
        return [placement.job_id for placement in plan.placements]


def test_a_round_goes_on_from_the_one_before_and_takes_what_was_given_back():
    rounds = Rounds(a_machine())
    first, second = a_job(number=1), a_job(number=2)
    rounds.add(second, first)
    assert rounds.next() == [first.id]
    assert rounds.next() == []
    rounds.state.give_back([])
    assert rounds.next() == []
    rounds.next()
    ended = Lease(
        rounds.snapshot.machines[0].id, US, 1000, GIB, GIB, ((rounds.snapshot.machines[0].devices[0].id, 1000),)
    )
    rounds.state.give_back([ended])
    assert rounds.next() == [second.id]
    assert len(rounds.queue) == 0


def test_a_job_that_was_taken_back_is_not_placed_and_the_next_one_is():
    rounds = Rounds(a_machine())
    first, second = a_job(number=1), a_job(number=2)
    rounds.add(first, second)
    rounds.queue.discard(first.id)
    assert first.id not in rounds.queue
    assert rounds.next() == [second.id]


def test_an_older_job_that_comes_late_goes_before_the_younger_ones():
    rounds = Rounds(a_machine())
    young, old = a_job(number=9), a_job(number=1)
    rounds.add(young, old)
    assert rounds.next() == [old.id]


def test_a_new_version_of_a_job_takes_the_place_of_the_old_one():
    rounds = Rounds(a_machine(gpus=2))
    job = a_job("2")
    rounds.add(job, replace(job, request=ResourceRequest(parse_gpu_spec("1"))))
    assert len(rounds.queue) == 1
    assert rounds.next() == [job.id]
    assert [milli for _, milli in rounds.leases[0].devices] == [1000]


def test_a_job_that_may_not_start_yet_waits_and_then_takes_its_place_by_age():
    rounds = Rounds(a_machine())
    early, other = replace(a_job(number=1), not_before=T0 + timedelta(seconds=30)), a_job("2", number=2)
    rounds.add(early, other)
    assert rounds.queue.next_wake() == T0 + timedelta(seconds=30)
    assert rounds.next(after=29) == []
    rounds.add(a_job(number=3))
    assert rounds.next(after=30) == [early.id]


def test_a_job_on_hold_is_left_out_and_keeps_its_place():
    rounds = Rounds(a_machine(gpus=3))
    jobs = [a_job(number=number) for number in range(3)]
    rounds.add(*jobs)
    rounds.queue.hold(jobs[0].id, T0 + timedelta(seconds=10))
    assert rounds.next(limit=1) == [jobs[1].id]
    assert rounds.next(after=10) == [jobs[0].id, jobs[2].id]


def test_the_jobs_of_a_paused_team_are_left_out_until_it_is_resumed():
    rounds = Rounds(a_machine(gpus=2))
    ours, theirs = a_job(number=1), a_job(team=THEM, number=2)
    rounds.add(ours, theirs)
    rounds.queue.hold(ours.id, T0 + timedelta(hours=1))
    rounds.queue.pause_team(US, T0 + timedelta(hours=1))
    assert rounds.next() == [theirs.id]
    assert not rounds.queue.ready
    rounds.queue.resume_team(US)
    assert rounds.next() == [ours.id]


def test_a_job_that_may_not_start_yet_does_not_start_because_its_team_is_resumed():
    rounds = Rounds(a_machine())
    rounds.add(replace(a_job(), not_before=T0 + timedelta(seconds=30)))
    rounds.queue.resume_team(US)
    assert rounds.next() == []


def test_what_waits_is_told_by_group_with_its_reason():
    rounds = Rounds(a_machine(gpus=2))
    for number in range(50):
        rounds.add(a_job(number=number), a_job("A100", number=number))
    plan = schedule(rounds.snapshot, rounds.queue, now=T0)
    assert len(plan.placements) == 2
    told = {it.refusal.reason.value: len(list(it.jobs())) for it in plan.blocked}
    assert told == {"no_capacity": 48, "no_matching_gpu": 50}


def test_not_more_jobs_are_placed_than_the_limit_says():
    rounds = Rounds(a_machine(gpus=4))
    jobs = [a_job(number=number) for number in range(4)]
    rounds.add(*jobs)
    assert rounds.next(limit=3) == [job.id for job in jobs[:3]]
    assert rounds.next(limit=3) == [jobs[3].id]


@pytest.mark.parametrize("objective", Objective)
def test_rounds_over_a_queue_place_what_one_call_over_a_list_places(objective: Objective):
    machines = [a_machine(gpus=4, model=model, price=price) for price in (3, 1, 2) for model in ("T4", "A100")]
    specs: list[Callable[[int], PendingJob]] = [
        lambda n: a_job("1", US, n),
        lambda n: a_job("0.5", THEM, n, priority=90),
        lambda n: a_job("A100:2", THEM, n),
        lambda n: a_job("0.5", US, n),
    ]
    jobs = [specs[number % 4](number) for number in range(60)]
    policy = Policy(objective)
    listed = schedule(Snapshot.from_machines(machines), jobs, policy, now=T0).placements
    queued = schedule(Snapshot.from_machines(machines), JobQueue(jobs), policy, now=T0).placements
    assert len(listed) > 20
    assert queued == listed


def test_a_queue_stays_in_order_while_thousands_come_and_go():
    rounds = Rounds(*[a_machine(gpus=8) for _ in range(4)])
    jobs = [a_job(number=number) for number in range(3000)]
    rounds.add(*reversed(jobs))
    for job in jobs[10:2000]:
        rounds.queue.discard(job.id)
    expected = [job.id for job in (*jobs[:10], *jobs[2000:])]
    placed: list[JobId] = []
    while ids := rounds.next():
        placed += ids
        rounds.state.give_back(rounds.leases)
    assert placed == expected
