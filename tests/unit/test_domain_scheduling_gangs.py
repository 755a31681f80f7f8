"""Gangs are placed whole, and large jobs start in the end although small ones go on."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from dantegpu.domain.job import QueueReason
from dantegpu.domain.resources import MachineInfo
from dantegpu.domain.scheduling import (
    MARGIN_SECONDS,
    Lease,
    PastShares,
    PendingJob,
    Policy,
    Quota,
    RoundPlan,
    Running,
    Snapshot,
    explain,
    plan_round,
)
from tests.unit.test_domain_scheduling import T0, THEM, a_job, a_lease, a_machine


def a_gang(nodes: int, gpu: str | None = "1", *, seconds: int | None = None, **fields: Any) -> PendingJob:
    return replace(a_job(gpu, **fields), nodes=nodes, max_duration_seconds=seconds)


def a_small(gpu: str | None = "1", *, seconds: int | None = None, **fields: Any) -> PendingJob:
    return replace(a_job(gpu, **fields), max_duration_seconds=seconds)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def until(lease: Lease, seconds: float) -> Running:
    return Running(lease, at(seconds))


def plan(
    machines: Sequence[MachineInfo], jobs: Sequence[PendingJob], running: Sequence[Running] = (), now: datetime = T0
) -> RoundPlan:
    snapshot = Snapshot.from_machines(machines, [each.lease for each in running])
    return plan_round(snapshot, running, jobs, now=now)


def started(found: RoundPlan) -> set[object]:
    return {placement.job_id for placement in found.placements}


def reasons(found: RoundPlan) -> dict[object, QueueReason]:
    return {decision.job_id: decision.reason for decision in found.unplaced}


def test_each_node_of_a_gang_gets_the_whole_request_on_a_machine_of_its_own():
    machines = [a_machine(gpus=4), a_machine(gpus=2), a_machine(gpus=2)]
    found = plan(machines, [job := a_gang(2, "2", cpus=3)])
    assert [placement.job_id for placement in found.placements] == [job.id, job.id]
    assert len({placement.machine_id for placement in found.placements}) == 2
    for placement in found.placements:
        assert (len(placement.devices), placement.cpu_milli, placement.rate_udgpu_per_hour) == (2, 3000, 2_000_000)


def test_a_gang_that_fits_in_part_takes_nothing():
    busy = a_machine(gpus=1)
    machines = [a_machine(gpus=1), a_machine(gpus=1), busy]
    found = plan(machines, [job := a_gang(3)], [until(a_lease(busy, gpus=1), 600)])
    assert found.placements == ()
    assert reasons(found) == {job.id: QueueReason.RESERVED}


def test_a_gang_with_more_nodes_than_there_are_machines_says_so_and_keeps_nobody_waiting():
    machines = [a_machine(gpus=8), a_machine(gpus=8)]
    gang, small = a_gang(3), a_small()
    found = plan(machines, [gang, small])
    assert (started(found), found.reservation) == ({small.id}, None)
    assert reasons(found) == {gang.id: QueueReason.TOO_FEW_MACHINES}
    assert [it.detail for it in found.unplaced] == ["2 fit, 3 are needed at once."]


def test_all_nodes_of_a_gang_have_gpus_of_one_model():
    machines = [a_machine(1, "RTX 4090"), a_machine(1, "A100"), a_machine(1, "A100")]
    found = plan(machines, [a_gang(2)])
    assert {placement.machine_id for placement in found.placements} == {machine.id for machine in machines[1:]}
    assert plan(machines[:2], [a_gang(2)]).placements == ()


def test_a_gang_stays_in_one_region_where_it_can_and_takes_the_cheapest_machines_there():
    east = [a_machine(1, region="east", price=price) for price in (3, 1, 2)]
    west = [a_machine(1, region="west", price=1)]
    found = plan([*east, *west], [a_gang(2)])
    assert {placement.machine_id for placement in found.placements} == {east[1].id, east[2].id}
    found = plan([east[0], *west], [a_gang(2)])
    assert len(found.placements) == 2


def test_a_gang_avoids_machines_that_failed_it_unless_there_are_too_few_others():
    machines = [a_machine(gpus=1) for _ in range(3)]
    gang = replace(a_gang(2), avoided_machines=frozenset({machines[0].id}))
    assert machines[0].id not in {placement.machine_id for placement in plan(machines, [gang]).placements}
    assert len(plan(machines[:2], [gang]).placements) == 2


def test_two_gangs_and_a_small_job_share_a_round_without_sharing_a_device():
    machines = [a_machine(gpus=2), a_machine(gpus=2)]
    found = plan(machines, [a_gang(2, age=3), a_gang(2, age=2), a_small(age=1)])
    taken = [share.device_id for placement in found.placements for share in placement.devices]
    assert len(taken) == len(set(taken)) == 4
    assert len(found.unplaced) == 1


def test_a_small_job_does_not_take_the_device_that_a_large_one_waits_for():
    machine = a_machine(gpus=2)
    large, small = a_small("2", age=9), a_small("1", seconds=3600)
    found = plan([machine], [large, small], [until(a_lease(machine, gpus=1), 600)])
    assert found.placements == ()
    assert found.reservation is not None
    assert found.reservation.start_at == at(600)
    assert reasons(found) == {large.id: QueueReason.RESERVED, small.id: QueueReason.BEHIND_RESERVATION}
    hints = {it.job_id: it.detail for it in found.unplaced}
    assert hints[large.id] == "It starts at 2026-01-01 00:10 UTC at the latest."
    assert hints[small.id] == "With a max_duration of at most 9m it could start now."


def test_a_small_job_that_ends_before_the_reservation_fills_the_gap():
    machine = a_machine(gpus=2)
    large = a_small("2", age=9)
    fits, slow = a_small(seconds=600 - MARGIN_SECONDS), a_small(seconds=601 - MARGIN_SECONDS)
    running = [until(a_lease(machine, gpus=1), 600)]
    assert started(plan([machine], [large, fits], running)) == {fits.id}
    assert started(plan([machine], [large, slow], running)) == set()


def test_a_long_small_job_starts_where_nothing_is_reserved():
    one, other = a_machine(gpus=2), a_machine(gpus=1)
    large, small = a_small("2", age=9), a_small("1")
    found = plan([one, other], [large, small], [until(a_lease(one, gpus=1), 600)])
    assert [(placement.job_id, placement.machine_id) for placement in found.placements] == [(small.id, other.id)]


def test_a_long_job_without_gpus_leaves_the_cores_that_are_reserved():
    machine = a_machine(gpus=2, cpus=4)
    large = a_small("2", cpus=2, age=9)
    fits, too_wide = a_small(None, cpus=2), a_small(None, cpus=3)
    running = [until(a_lease(machine, gpus=1), 600)]
    assert started(plan([machine], [large, fits], running)) == {fits.id}
    assert started(plan([machine], [large, too_wide], running)) == set()


def test_what_outranks_a_large_job_goes_first_and_what_is_younger_or_lower_does_not():
    machine = a_machine(gpus=2)
    running = [until(a_lease(machine, gpus=1), 600)]
    large = a_small("2", age=5)
    for first in (a_small(priority=60), a_small(age=6)):
        assert started(plan([machine], [large, first], running)) == {first.id}
    for later in (a_small(priority=40, age=9), a_small(age=4)):
        assert started(plan([machine], [large, later], running)) == set()


def test_only_the_first_large_job_has_a_reservation_and_others_may_fill_its_gaps():
    machine = a_machine(gpus=4)
    running = [until(a_lease(machine, gpus=2), 600)]
    first, second = a_small("4", age=9), a_small("2", seconds=60, age=8)
    third = a_small("3", age=7)
    found = plan([machine], [first, second, third], running)
    assert started(found) == {second.id}
    assert found.reservation is not None
    assert found.reservation.job.id == first.id


def test_a_gang_is_reserved_for_when_the_last_of_its_machines_is_free():
    machines = [a_machine(gpus=1) for _ in range(3)]
    ends = [until(a_lease(machine, gpus=1), 100 * (number + 1)) for number, machine in enumerate(machines)]
    found = plan(machines, [a_gang(2)], ends)
    assert found.reservation is not None
    assert found.reservation.start_at == at(200)
    assert plan(machines, [a_gang(2)], ends[2:], now=at(200)).placements


def test_a_waiting_gang_is_told_how_many_nodes_would_start():
    machines = [a_machine(gpus=1) for _ in range(3)]
    leases = [a_lease(machines[0], gpus=1, team=THEM)]
    why = explain(Snapshot.from_machines(machines, leases), a_gang(3), T0)
    assert (why.reason, why.machines_free) == (QueueReason.NO_CAPACITY, 2)
    assert why.relaxations[0].text == "nodes 3 -> 2: 2 machines, start now"
    assert explain(Snapshot.from_machines(machines), a_gang(4), T0).reason is QueueReason.TOO_FEW_MACHINES
    assert explain(Snapshot.from_machines(machines), a_gang(3), T0).reason is None


def test_large_jobs_take_turns_by_what_their_teams_hold():
    machine, busy = a_machine(gpus=2), a_machine(gpus=4)
    ours, theirs = a_small("2", age=60), a_small("2", team=THEM)
    lease = a_lease(busy, gpus=4, team=ours.team_id)
    assert started(plan([machine, busy], [ours, theirs], [until(lease, 600)])) == {theirs.id}
    assert started(plan([machine], [ours, theirs])) == {ours.id}


def test_all_nodes_of_a_gang_count_for_its_team():
    busy, machines = a_machine(gpus=2), [a_machine(gpus=1) for _ in range(4)]
    running = [until(a_lease(busy, gpus=2, milli=750, team=THEM), 600)]
    first, ours, theirs = a_gang(2, age=9), a_gang(2, age=8), a_gang(2, age=7, team=THEM)
    assert started(plan([*machines, busy], [first, ours, theirs], running)) == {first.id, theirs.id}


def test_a_gang_that_found_no_place_does_not_count_for_its_team():
    machines = [a_machine(gpus=1) for _ in range(2)]
    too_large, ours, theirs = a_gang(3, age=9), a_gang(2, age=8), a_gang(2, age=7, team=THEM)
    assert started(plan(machines, [too_large, ours, theirs])) == {ours.id}


def test_a_large_job_waits_for_its_turn_behind_small_ones_of_teams_that_hold_less():
    machine, busy = a_machine(gpus=2), a_machine(gpus=4)
    ours, theirs = a_small("2", age=60), [a_small("1", team=THEM, age=n) for n in range(2)]
    found = plan([machine, busy], [ours, *theirs], [until(a_lease(busy, gpus=4, team=ours.team_id), 600)])
    assert started(found) == {job.id for job in theirs}


def test_what_a_team_held_lately_counts_against_its_large_jobs():
    past, machine = PastShares(), a_machine(gpus=2)
    ours, theirs = a_small("2", age=60), a_small("2", team=THEM)
    past.feed({ours.team_id: 0.5}, T0)
    found = plan_round(Snapshot.from_machines([machine]), [], [ours, theirs], now=T0, past=past)
    assert started(found) == {theirs.id}


def test_a_gang_within_its_teams_quota_goes_before_one_that_would_borrow():
    machines = [a_machine(gpus=1) for _ in range(2)]
    ours, theirs = a_gang(2, age=60, priority=90), a_gang(2, team=THEM)
    policy = Policy(quotas={ours.team_id: Quota(1000), THEM: Quota(2000)})
    found = plan_round(Snapshot.from_machines(machines), [], [ours, theirs], policy, now=T0)
    assert started(found) == {theirs.id}


def in_site(site: str, address: str, *, gpus: int = 1, **fields: Any) -> MachineInfo:
    kinds = frozenset({"image", "gang"})
    return replace(a_machine(gpus=gpus, **fields), runs_images=True, networks=kinds, site=site, address=address)


def of_containers(nodes: int, gpu: str | None = "1", **fields: Any) -> PendingJob:
    return replace(a_gang(nodes, gpu, **fields), image="acme/train", network=True)


def test_containers_of_a_gang_go_to_machines_of_one_site_and_to_each_host_once():
    one = [in_site("a", "10.0.0.1"), in_site("a", "10.0.0.1"), in_site("b", "10.0.0.2")]
    job = of_containers(2)
    assert reasons(plan(one, [job])) == {job.id: QueueReason.TOO_FEW_MACHINES}
    assert explain(Snapshot.from_machines(one), job, T0).reason == QueueReason.TOO_FEW_MACHINES
    more = [*one, in_site("b", "10.0.0.3")]
    found = plan(more, [job])
    assert {placement.machine_id for placement in found.placements} == {more[2].id, more[3].id}
    outside = replace(a_machine(gpus=1), runs_images=True, networks=frozenset({"image"}))
    why = explain(Snapshot.from_machines([outside, replace(outside, id=a_machine(gpus=1).id)]), job, T0)
    assert [count.constraint for count in why.constraints] == ["site"]
    assert [change.field for change in why.relaxations] == ["network"]


def test_a_gang_of_containers_has_its_reservation_within_one_site():
    machines = [in_site("a", "10.0.0.1"), in_site("b", "10.0.0.2"), in_site("a", "10.0.0.3")]
    running = [until(a_lease(machines[2], gpus=1), 600), until(a_lease(machines[1], gpus=1), 60)]
    job = of_containers(2)
    found = plan(machines, [job], running)
    assert found.reservation is not None
    assert {found.reservation.rows[i] for i in range(2)} == {
        Snapshot.from_machines(machines).index_of[machines[row].id] for row in (0, 2)
    }
    assert found.reservation.start_at == at(600)
