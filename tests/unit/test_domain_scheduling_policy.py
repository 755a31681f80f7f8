"""Whose turn it is, and which machine is the best one: policy is data."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    JobQueue,
    Lease,
    Objective,
    PendingJob,
    Policy,
    Quota,
    SchedulerState,
    Snapshot,
    TeamUse,
    average_shares,
    borrowed,
    schedule,
)
from dantegpu.domain.scheduling.speeds import TFLOPS, speed_of
from dantegpu.domain.units import GIB

T0 = datetime(2026, 1, 1, tzinfo=UTC)
US, THEM = TeamId.new(), TeamId.new()


def a_machine(gpus: int = 1, model: str = "T4", price: int = 1000) -> MachineInfo:
    gpu = KNOWN_GPUS[model]
    devices = tuple(DeviceInfo(DeviceId.new(), n, gpu.model, gpu.vram_bytes) for n in range(gpus))
    return MachineInfo(MachineId.new(), TeamId.new(), 64_000, 64 * GIB, 64 * GIB, devices, price, 10)


def a_job(team: TeamId, gpu: str = "1", number: int = 0, priority: int = 50) -> PendingJob:
    submitted_at = T0 + timedelta(seconds=number)
    return PendingJob(JobId.new(), team, submitted_at, ResourceRequest(parse_gpu_spec(gpu)), priority)


def teams_placed(machine: MachineInfo, jobs: list[PendingJob], policy: Policy, *leases: Lease) -> list[TeamId]:
    plan = schedule(Snapshot.from_machines([machine], leases), jobs, policy, now=T0)
    return [placement.team_id for placement in plan.placements]


def test_the_fastest_gpu_is_taken_and_of_equally_fast_ones_the_cheapest():
    cheap, slow, dear = (
        a_machine(model="H100", price=5),
        a_machine(model="T4", price=1),
        a_machine(model="H100", price=9),
    )
    snapshot = Snapshot.from_machines([dear, slow, cheap])
    jobs = [a_job(US, number=number) for number in range(3)]
    placements = schedule(snapshot, jobs, Policy(Objective.FASTEST), now=T0).placements
    assert [placement.machine_id for placement in placements] == [cheap.id, dear.id, slow.id]


def test_every_known_gpu_has_a_speed_and_an_unknown_one_comes_last():
    assert set(TFLOPS) == set(KNOWN_GPUS)
    assert speed_of("NVIDIA H100 80GB HBM3") > speed_of("Tesla T4") > speed_of("Voodoo 2") == 0


def test_a_team_that_used_much_lately_waits_behind_one_that_did_not():
    machine = a_machine()
    snapshot, state, policy = Snapshot.from_machines([machine]), SchedulerState(), Policy(half_life_seconds=3600)
    queue = JobQueue([a_job(US)])
    (used,) = schedule(snapshot, queue, policy, now=T0, state=state).placements
    queue.discard(used.job_id)
    after_an_hour = T0 + timedelta(hours=1)
    schedule(snapshot, queue, policy, now=after_an_hour, state=state)
    state.give_back([used.lease])
    for job in (a_job(US, number=1), a_job(THEM, number=2)):
        queue.add(job)
    (placed,) = schedule(snapshot, queue, policy, now=after_an_hour, state=state).placements
    assert placed.team_id == THEM


def test_an_average_use_is_measured_by_what_the_team_had_most_of_in_the_whole_fleet():
    machines = [a_machine(gpus=2), a_machine(gpus=2)]
    cores, memory = (sum(getattr(it, name) for it in machines) for name in ("cpu_milli", "memory_bytes"))
    used = {US: (1000.0, cores / 2, 0.0), THEM: (1000.0, 0.0, memory / 8)}
    assert average_shares(Snapshot.from_machines(machines), used) == {US: 0.5, THEM: 0.25}


def test_what_was_used_long_ago_counts_no_more():
    machine, policy = a_machine(gpus=2), Policy(half_life_seconds=60)
    snapshot, state = Snapshot.from_machines([machine]), SchedulerState()
    state.past.feed({US: 1.0, THEM: 0.1}, T0)
    state.past.advance({}, policy.half_life_seconds, T0 + timedelta(seconds=120))
    assert round(state.past.of(US.uuid.int), 6) == 0.25
    state.past.advance({}, policy.half_life_seconds, T0 + timedelta(hours=2))
    jobs = [a_job(US, number=1), a_job(THEM, number=2)]
    plan = schedule(snapshot, jobs, policy, now=T0 + timedelta(hours=2), state=state)
    assert [placement.team_id for placement in plan.placements] == [US, THEM]


def test_a_team_within_its_quota_goes_before_any_priority_of_the_others():
    policy = Policy(quotas={US: Quota(2000)})
    jobs = [*(a_job(THEM, priority=100) for _ in range(4)), *(a_job(US, number=9, priority=0) for _ in range(4))]
    placed = teams_placed(a_machine(gpus=4), jobs, policy)
    assert placed[:2] == [US, US]
    assert placed[2:] == [THEM, THEM]


def test_what_is_idle_is_borrowed():
    policy = Policy(quotas={US: Quota(1000), THEM: Quota(3000)})
    assert teams_placed(a_machine(gpus=4), [a_job(US, number=n) for n in range(6)], policy) == [US] * 4


def test_what_a_borrower_gives_back_goes_to_the_team_that_it_belongs_to():
    machine = a_machine(gpus=4)
    snapshot, state, queue = Snapshot.from_machines([machine]), SchedulerState(), JobQueue()
    policy = Policy(quotas={US: Quota(1000), THEM: Quota(3000)})
    for number in range(8):
        queue.add(a_job(US, number=number))
    lent = schedule(snapshot, queue, policy, now=T0, state=state).placements
    for placement in lent:
        queue.discard(placement.job_id)
    for number in range(8):
        queue.add(a_job(THEM, number=100 + number))
    state.give_back([placement.lease for placement in lent[:3]])
    placed = schedule(snapshot, queue, policy, now=T0, state=state).placements
    assert [placement.team_id for placement in placed] == [THEM] * 3


def test_a_job_that_would_leave_the_quota_borrows_and_one_that_would_not_does_not():
    policy = Policy(quotas={US: Quota(2000)})
    jobs = [a_job(US, "2"), a_job(US, number=1), a_job(THEM, number=2)]
    placed = teams_placed(a_machine(gpus=3), jobs, policy)
    assert placed == [US, THEM]


def test_an_older_job_that_borrows_does_not_hide_a_team_within_its_quota_where_shares_do_not_count():
    policy = Policy(fair_share=False, quotas={US: Quota(1000)})
    assert teams_placed(a_machine(gpus=1), [a_job(THEM), a_job(US, number=1)], policy) == [US]


def test_borrowed_is_what_teams_hold_beyond_their_quotas():
    use = {US: TeamUse(3000, 8000, GIB), THEM: TeamUse(500, 1000, GIB)}
    assert borrowed(use, Policy(quotas={US: Quota(1000, 6000), THEM: Quota(500)})) == {US: TeamUse(2000, 2000)}
    assert borrowed(use, Policy(quotas={US: Quota(3000)})) == {THEM: TeamUse(500, 1000)}
    assert borrowed(use, Policy()) == {}


def test_cores_count_for_a_quota_that_names_them():
    quota = Quota(0, cpu_milli=2000)
    request = replace(a_job(US).request, gpu=None, cpu_milli=1500)
    assert quota.allows(TeamUse(0, 500), request)
    assert not quota.allows(TeamUse(0, 501), request)
    assert Quota(0).allows(TeamUse(0, 10**9), request)
