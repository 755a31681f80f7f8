"""Jobs of one GPU are not passed by for ever either, and fill the gaps before others' reservations."""

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from dantegpu.domain.ids import TeamId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.resources import MachineInfo
from dantegpu.domain.scheduling import (
    MARGIN_SECONDS,
    Ends,
    JobQueue,
    Lease,
    Objective,
    PendingJob,
    Plan,
    Policy,
    Running,
    SchedulerState,
    Snapshot,
    schedule,
)
from tests.unit.test_domain_scheduling import T0, THEM, a_job, a_lease, a_machine
from tests.unit.test_domain_scheduling_gangs import a_gang, a_small, at, plan, reasons, started, until


def test_a_job_with_many_cores_is_not_starved_by_jobs_with_few():
    machine = a_machine(gpus=2, cpus=8)
    running = [until(a_lease(machine, gpus=1, cpus=6), 600)]
    wide, narrow = a_small("1", cpus=8, age=9), a_small("1", cpus=1, seconds=3600)
    found = plan([machine], [wide, narrow], running)
    assert (started(found), reasons(found)) == (
        set(),
        {wide.id: QueueReason.RESERVED, narrow.id: QueueReason.BEHIND_RESERVATION},
    )
    hints = {it.job_id: it.detail for it in found.unplaced}
    assert hints[wide.id] == "It starts at 2026-01-01 00:10 UTC at the latest."
    assert hints[narrow.id] == "With a max_duration of at most 9m it could start now."


def test_a_job_for_a_whole_gpu_is_not_starved_by_jobs_for_parts_of_it():
    machine = replace(a_machine(gpus=1), allows_fractions=True)
    running = [until(a_lease(machine, gpus=1, milli=500, team=THEM), 600)]
    whole, part = a_small("1", age=9), a_small("0.5", team=THEM, seconds=3600)
    found = plan([machine], [whole, part], running)
    assert started(found) == set()
    assert reasons(found)[whole.id] is QueueReason.RESERVED
    assert started(plan([machine], [whole, replace(part, max_duration_seconds=600 - MARGIN_SECONDS)], running)) == {
        part.id
    }


def test_a_job_without_gpus_but_with_many_cores_is_not_starved_either():
    machine = a_machine(gpus=1, cpus=8)
    running = [until(a_lease(machine, cpus=4), 600)]
    wide, narrow = a_small(None, cpus=8, age=9), a_small(None, cpus=1, seconds=3600)
    assert started(plan([machine], [wide, narrow], running)) == set()


def test_what_a_reservation_leaves_on_its_machine_goes_to_jobs_that_last_longer():
    machine = a_machine(gpus=4, cpus=16)
    running = [until(a_lease(machine, gpus=1, cpus=12), 600)]
    wide = a_small("1", cpus=8, age=9)
    late = [a_small("1", cpus=2, seconds=9999, age=age) for age in (5, 4, 3)]
    found = plan([machine], [wide, *late], running)
    # Of 16 cores 8 are reserved and 4 are free now: two such jobs have room beside it, the third has not.
    assert started(found) == {late[0].id, late[1].id}
    taken = {share.device_id for placement in found.placements for share in placement.devices}
    assert found.reservation is not None
    assert taken.isdisjoint({machine.devices[column].id for column in found.reservation.columns[0]})


def test_jobs_that_cannot_start_are_not_reserved_for_while_nobody_passes_them_by():
    machine = a_machine(gpus=1)
    running = [until(a_lease(machine, gpus=1), 600)]
    first, second = a_small("1", age=9), a_small("1", age=8)
    found = plan([machine], [first, second], running)
    assert set(reasons(found).values()) == {QueueReason.NO_CAPACITY}
    assert found.reservation is None


def test_several_jobs_that_cannot_start_have_reservations_on_machines_of_their_own():
    machines = [a_machine(gpus=2, cpus=8) for _ in range(3)]
    running = [until(a_lease(machine, gpus=1, cpus=4), 600 + number) for number, machine in enumerate(machines[:2])]
    large, wide = a_small("2", cpus=1, age=9), a_small("1", cpus=8, age=8, max_price=0)
    busy = until(a_lease(machines[2], gpus=2), 5000)
    second = a_small("2", cpus=2, age=7)
    late = a_small("1", cpus=1, seconds=9999)
    found = plan(machines, [large, second, late], [*running, busy])
    assert started(found) == set()
    assert [it.job.id for it in found.reservations] == [large.id, second.id]
    assert {row for it in found.reservations for row in it.rows} == {
        Snapshot.from_machines(machines).index_of[machine.id] for machine in machines[:2]
    }
    assert reasons(plan(machines, [wide], running))[wide.id] is QueueReason.PRICE_ABOVE_MAX


def test_a_job_for_which_no_machine_fits_gets_no_reservation():
    machine = a_machine(gpus=2, cpus=8)
    too_wide, narrow = a_small("1", cpus=99, age=9), a_small("1", cpus=1)
    assert started(plan([machine], [too_wide, narrow])) == {narrow.id}


class Cluster:
    """A queue, a state and what runs, kept from round to round as the scheduler keeps them."""

    def __init__(self, machines: Sequence[MachineInfo], objective: Objective = Objective.CHEAPEST) -> None:
        self.snapshot = Snapshot.from_machines(machines)
        self.policy, self.queue, self.state, self.ends = Policy(objective), JobQueue(), SchedulerState(), Ends()
        self.jobs: dict[UUID, PendingJob] = {}
        self.held: dict[UUID, Lease] = {}

    def add(self, *jobs: PendingJob) -> None:
        for job in jobs:
            self.jobs[job.id.uuid] = job
            self.queue.add(job)

    def round(self, seconds: float) -> Plan:
        now = at(seconds)
        plan = schedule(self.snapshot, self.queue, self.policy, now=now, state=self.state, ends=self.ends)
        for number, placement in enumerate(plan.placements):
            job_id, rank = placement.job_id.uuid, UUID(int=placement.job_id.uuid.int + number)
            lasts = (self.jobs[job_id].max_duration_seconds or 10**6) + MARGIN_SECONDS
            self.held[rank] = placement.lease
            self.ends.begin(rank, Running(placement.lease, at(seconds + lasts)))
            self.queue.discard(placement.job_id)
        return plan

    def end(self) -> None:
        """All that runs ends, long before its time."""
        self.state.give_back(self.held.values())
        for attempt_id in self.held:
            self.ends.end(attempt_id)
        self.held.clear()


def test_a_stream_of_small_jobs_does_not_keep_a_wide_one_from_starting():
    for objective in Objective:
        cluster = Cluster([a_machine(gpus=8, cpus=8)], objective)
        cluster.add(a_small("1", cpus=1, seconds=9999, age=10))
        cluster.round(0)
        wide = a_small("1", cpus=8, age=9)
        cluster.add(wide)
        for second in range(1, 4):
            cluster.add(*(a_small("1", cpus=1, seconds=9999) for _ in range(8)))
            assert cluster.round(second).placements == ()
        cluster.end()
        assert started_in(cluster.round(4)) == {wide.id}


def started_in(plan: Plan) -> set[object]:
    return {placement.job_id for placement in plan.placements}


def test_a_gang_in_a_queue_that_is_kept_starts_whole_once_its_machines_are_free():
    machines = [a_machine(gpus=1) for _ in range(2)]
    cluster = Cluster(machines)
    cluster.add(a_small("1", seconds=100, age=10))
    cluster.round(0)
    gang = a_gang(2, age=9)
    cluster.add(gang, a_small("1", seconds=9999))
    waiting = cluster.round(1)
    assert waiting.placements == ()
    assert {it.job_id: it.reason for it in waiting.told}[gang.id] is QueueReason.RESERVED
    cluster.end()
    found = cluster.round(2)
    assert [placement.job_id for placement in found.placements] == [gang.id, gang.id]
    assert len({placement.machine_id for placement in found.placements}) == 2


def test_who_keeps_a_place_free_does_not_depend_on_how_many_wait_behind():
    cluster = Cluster([a_machine(gpus=2, cpus=8)], Objective.FRAGMENTATION)
    cluster.add(a_small("1", cpus=6, seconds=9999, age=10))
    cluster.round(0)
    wide = a_small("1", cpus=8, priority=60)
    cluster.add(wide, *(a_small("1", cpus=1, seconds=9999, age=5, team=TeamId(UUID(int=n + 1))) for n in range(100)))
    found = cluster.round(1)
    assert found.placements == ()
    assert sum(it.reason is QueueReason.BEHIND_RESERVATION for it in found.told) == 100
    assert [it.job.id for it in found.reservations] == [wide.id]


def test_a_job_that_would_end_in_time_is_placed_behind_one_of_its_shape_that_would_not():
    machine = a_machine(gpus=2)
    running = [until(a_lease(machine, gpus=1), 600)]
    large, slow = a_small("2", age=9), a_small("1", seconds=9999, age=8)
    quick = a_small("1", seconds=60, age=7)
    assert started(plan([machine], [large, slow, quick], running)) == {quick.id}


def test_what_has_ended_is_no_longer_counted_upon():
    ends = Ends()
    lease = a_lease(a_machine(gpus=1), gpus=1)
    first, second = UUID(int=1), UUID(int=2)
    ends.begin(first, until(lease, 20))
    ends.begin(second, until(lease, 10))
    assert [each.ends_at for each in ends.in_order()] == [at(10), at(20)]
    ends.end(second)
    ends.begin(first, until(lease, 5))
    assert [each.ends_at for each in ends.in_order()] == [at(5)]
    assert at(5) > T0
    assert a_job("1").max_duration_seconds is None
