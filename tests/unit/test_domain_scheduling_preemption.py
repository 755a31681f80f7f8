"""Who gives way for whom, and that what becomes free stays for the job that it became free for."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import Lease, PendingJob, Policy, Quota, Snapshot, schedule
from dantegpu.domain.scheduling.preemption import (
    Cause,
    Claim,
    Ground,
    Preemption,
    SpotWork,
    look_at_claims,
    preempt,
)
from dantegpu.domain.units import GIB

T0 = datetime(2026, 1, 1, tzinfo=UTC)
US, THEM = TeamId.new(), TeamId.new()
NO_QUOTAS = Policy()


def a_machine(gpus: int = 1, model: str = "T4", price: int = 1000, cpu_milli: int = 16_000) -> MachineInfo:
    gpu = KNOWN_GPUS[model]
    devices = tuple(DeviceInfo(DeviceId.new(), n, gpu.model, gpu.vram_bytes) for n in range(gpus))
    return MachineInfo(MachineId.new(), TeamId.new(), cpu_milli, 64 * GIB, 64 * GIB, devices, price, 10)


def a_job(gpu: str | None = "1", team: TeamId = US, number: int = 0, **fields: Any) -> PendingJob:
    submitted_at = T0 + timedelta(seconds=number)
    request = ResourceRequest(parse_gpu_spec(gpu) if gpu else None)
    return PendingJob(JobId.new(), team, submitted_at, request, **fields)


def on(machine: MachineInfo, *columns: int, team: TeamId = THEM, cpu_milli: int = 1000) -> Lease:
    devices = tuple((machine.devices[column].id, 1000) for column in columns)
    return Lease(machine.id, team, cpu_milli, GIB, GIB, devices)


def a_spot(*leases: Lease, priority: int = 50, **fields: Any) -> SpotWork:
    return SpotWork(JobId.new(), leases[0].team_id, priority, leases, **fields)


def decide(
    machines: list[MachineInfo], works: list[SpotWork], *waiting: PendingJob, policy: Policy = NO_QUOTAS, **more: Any
) -> tuple[Preemption, ...]:
    held = [lease for work in works for lease in work.leases]
    ground = Ground(Snapshot.from_machines(machines, [*held, *more.pop("others", ())]))
    return preempt(ground, works, waiting, policy, **more)


def test_an_on_demand_job_takes_the_place_of_spot_work():
    machine, job = a_machine(), a_job()
    work = a_spot(on(machine, 0))
    (found,) = decide([machine], [work], job)
    assert (found.victims, found.cause) == ((work,), Cause.ON_DEMAND)
    assert found.claim.job_id == job.id
    assert [(lease.machine_id, lease.devices) for lease in found.claim.leases] == [(machine.id, work.leases[0].devices)]


def test_spot_work_of_a_higher_priority_stays_and_of_a_lower_one_is_told_why_it_goes():
    machine = a_machine()
    assert decide([machine], [a_spot(on(machine, 0), priority=60)], a_job()) == ()
    (found,) = decide([machine], [a_spot(on(machine, 0), priority=40)], a_job())
    assert found.cause is Cause.PRIORITY


def test_spot_work_never_takes_the_place_of_spot_work():
    machine = a_machine()
    assert decide([machine], [a_spot(on(machine, 0), priority=1)], a_job(spot=True, priority=100)) == ()


def test_nobody_ends_for_a_job_that_would_not_fit_even_then():
    small, priced, few = a_machine(), a_machine(price=5000), a_machine(2)
    works = [a_spot(on(small, 0)), a_spot(on(priced, 0)), a_spot(on(few, 0))]
    others = [on(few, 1)]
    assert decide([small, few], works, a_job("2"), others=others) == ()
    assert decide([priced], works, a_job(max_price_udgpu_per_hour=4000)) == ()
    assert decide([replace(small, schedulable=False)], works, a_job()) == ()
    assert decide([small], works, a_job("H100")) == ()


def test_nobody_ends_where_there_will_be_room_anyway():
    machine, other = a_machine(2), a_machine()
    assert decide([machine], [a_spot(on(machine, 0))], a_job()) == ()
    assert decide([machine, other], [a_spot(on(machine, 0, 1))], a_job()) == ()
    assert decide([machine, other], [a_spot(on(machine, 0))], a_job(nodes=2)) == ()


def test_only_as_many_end_as_are_needed_and_those_that_lose_least():
    machine = a_machine(4)
    long, saved, short, old = (
        a_spot(on(machine, 0), lost_seconds=900, unsaved_seconds=900),
        a_spot(on(machine, 1), lost_seconds=0, unsaved_seconds=600),
        a_spot(on(machine, 2), lost_seconds=60, unsaved_seconds=60),
        a_spot(on(machine, 3), lost_seconds=0, unsaved_seconds=700),
    )
    works = [long, saved, short, old]
    assert decide([machine], works, a_job("1"))[0].victims == (saved,)
    assert set(decide([machine], works, a_job("2"))[0].victims) == {saved, old}
    assert set(decide([machine], works, a_job("3"))[0].victims) == {saved, old, short}


def test_one_attempt_ends_rather_than_two_and_the_lower_priority_of_equals():
    machine = a_machine(4)
    one, two = a_spot(on(machine, 0)), a_spot(on(machine, 1))
    both = a_spot(on(machine, 2, 3), lost_seconds=9000)
    assert decide([machine], [one, two, both], a_job("2"))[0].victims == (both,)
    low = a_spot(on(machine, 1), priority=20)
    assert decide([machine], [one, low, both], a_job("1"))[0].victims == (low,)


def test_many_small_ones_end_one_by_one_and_none_for_nothing():
    machine = a_machine(12)
    works = [a_spot(on(machine, column), lost_seconds=column) for column in range(10)]
    works.append(a_spot(on(machine, 10, 11), lost_seconds=1))
    victims = decide([machine], works, a_job("4"))[0].victims
    assert sum(len(work.leases[0].devices) for work in victims) == 4


def test_cores_alone_can_be_what_is_missing():
    machine = a_machine(2, cpu_milli=4000)
    work = a_spot(on(machine, 0, cpu_milli=3500))
    job = replace(a_job(), request=replace(a_job().request, cpu_milli=2000))
    (found,) = decide([machine], [work], job)
    assert found.victims == (work,)


def test_all_nodes_of_a_gang_end_or_none():
    first, second, third = a_machine(), a_machine(), a_machine()
    gang = a_spot(on(first, 0), on(second, 0))
    single = a_spot(on(third, 0), lost_seconds=9000)
    assert decide([first, second, third], [gang, single], a_job())[0].victims == (single,)
    (found,) = decide([first, second], [gang], a_job())
    assert found.victims == (gang,)


def test_a_gang_gets_machines_of_its_own_and_ends_no_more_than_it_needs():
    machines = [a_machine() for _ in range(4)]
    works = [a_spot(on(machine, 0), lost_seconds=number) for number, machine in enumerate(machines[:3])]
    (found,) = decide(machines, works, a_job(nodes=3))
    assert set(found.victims) == set(works[:2])
    assert len({lease.machine_id for lease in found.claim.leases}) == 3
    assert decide(machines[:2], works[:2], a_job(nodes=3)) == ()
    on_both = a_spot(on(machines[0], 0), on(machines[1], 0))
    wide = [replace(machines[0], devices=(*machines[0].devices, *a_machine().devices)), machines[1]]
    on_first = a_spot(on(wide[0], 1))
    assert decide(wide, [on_both, on_first], a_job(nodes=2))[0].victims == (on_both,)


def test_two_jobs_end_two_and_the_second_one_leaves_the_first_ones_place_alone():
    machine = a_machine(2)
    works = [a_spot(on(machine, 0)), a_spot(on(machine, 1))]
    found = decide([machine], works, a_job(number=1), a_job(number=2), a_job(number=3))
    assert sorted(work.job_id for each in found for work in each.victims) == sorted(work.job_id for work in works)
    devices = [lease.devices for each in found for lease in each.claim.leases]
    assert len(set(devices)) == len(devices) == 2


def test_what_one_preemption_leaves_over_spares_the_next_one():
    machine, other = a_machine(2), a_machine()
    works = [a_spot(on(machine, 0, 1)), a_spot(on(other, 0), lost_seconds=60)]
    (found,) = decide([machine, other], works, a_job(number=1), a_job(number=2))
    assert found.victims == (works[0],)


def test_a_machine_that_is_reserved_for_a_larger_job_is_not_emptied_for_a_smaller_one():
    machine, job = a_machine(), a_job()
    work = a_spot(on(machine, 0))
    assert decide([machine], [work], job, barred={job.id: frozenset({machine.id})}) == ()


def test_a_team_takes_back_what_it_lent_whatever_the_priorities_but_no_more_than_was_borrowed():
    machine = a_machine(3)
    policy = Policy(quotas={US: Quota(2000), THEM: Quota(1000)})
    works = [a_spot(on(machine, column), priority=100) for column in range(3)]
    mine = [a_job(team=US, number=number, priority=1, spot=number == 1) for number in range(3)]
    found = decide([machine], works, *mine, policy=policy)
    assert [each.claim.job_id for each in found] == [mine[0].id, mine[1].id]
    assert {each.cause for each in found} == {Cause.QUOTA}
    # All three at once would take the other team below its own quota.
    three = a_job("3", priority=1)
    assert decide([machine], works, three, policy=Policy(quotas={US: Quota(3000), THEM: Quota(1000)})) == ()


def test_who_borrows_ends_nobody_who_is_within_his_quota():
    machine = a_machine(2)
    policy = Policy(quotas={THEM: Quota(2000)})
    works = [a_spot(on(machine, 0), priority=1), a_spot(on(machine, 1), priority=1)]
    assert decide([machine], works, a_job(team=US, priority=100), policy=policy) == ()
    (found,) = decide([machine], works, a_job(team=THEM), policy=policy)
    assert len(found.victims) == 1


# --- claims -----------------------------------------------------------------------------------------------------------


def test_what_is_claimed_is_kept_from_everybody_else_until_those_that_stop_have_ended():
    machine, job = a_machine(2), a_job("2")
    victim = on(machine, 0)
    claim = Claim(job.id, (on(machine, 0, 1, team=US),))
    during = look_at_claims(Snapshot.from_machines([machine], [victim]), [victim], [(claim, job)])
    assert (during.placements, during.waiting, during.broken) == ((), {job.id}, frozenset())
    assert schedule(during.kept, [a_job(team=THEM)], now=T0).placements == ()
    (placed,) = look_at_claims(Snapshot.from_machines([machine]), [], [(claim, job)]).placements
    assert (placed.job_id, len(placed.devices)) == (job.id, 2)


def test_what_a_claim_leaves_over_is_for_everybody():
    machine, job = a_machine(2, cpu_milli=4000), a_job()
    victim = on(machine, 0, cpu_milli=1000)
    claim = Claim(job.id, (on(machine, 0, team=US, cpu_milli=1000),))
    kept = look_at_claims(Snapshot.from_machines([machine], [victim]), [victim], [(claim, job)]).kept
    assert (kept.cpu_free.tolist(), kept.device_free.tolist()) == ([3000], [[0, 1000]])
    large = Claim(job.id, (on(machine, 0, team=US, cpu_milli=3000),))
    kept = look_at_claims(Snapshot.from_machines([machine], [victim]), [victim], [(large, job)]).kept
    assert kept.cpu_free.tolist() == [1000]


def test_a_claim_on_what_went_away_is_broken():
    machine, job = a_machine(), a_job()
    claim = Claim(job.id, (on(machine, 0, team=US),))
    gone = Snapshot.from_machines([a_machine()])
    paused = Snapshot.from_machines([replace(machine, schedulable=False)])
    taken = Snapshot.from_machines([machine], [on(machine, 0)])
    for snapshot in (gone, paused, taken):
        assert look_at_claims(snapshot, [], [(claim, job)]).broken == {job.id}


def test_spot_work_pays_its_share_of_the_price_and_a_limit_is_compared_with_what_it_pays():
    machine = a_machine(price=1000)
    spot = a_job(spot=True, price_percent=70, max_price_udgpu_per_hour=700)
    (placed,) = schedule(Snapshot.from_machines([machine]), [spot], now=T0).placements
    assert placed.rate_udgpu_per_hour == 700
    assert schedule(Snapshot.from_machines([machine]), [replace(spot, price_percent=71)], now=T0).placements == ()


def test_on_demand_goes_before_spot_of_the_same_priority_and_after_that_of_a_higher_one():
    machine = a_machine()
    older, newer = a_job(spot=True, number=0), a_job(number=1)
    (placed,) = schedule(Snapshot.from_machines([machine]), [older, newer], now=T0).placements
    assert placed.job_id == newer.id
    (placed,) = schedule(Snapshot.from_machines([machine]), [replace(older, priority=51), newer], now=T0).placements
    assert placed.job_id == older.id
