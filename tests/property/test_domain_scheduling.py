"""No plan over capacity, each job once, the same answer for the same question."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, GpuRequest, MachineInfo, ResourceRequest
from dantegpu.domain.scheduling import (
    JobQueue,
    Lease,
    Objective,
    PendingJob,
    Plan,
    Policy,
    Quota,
    SchedulerState,
    Snapshot,
    explain,
    schedule,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAMS = [TeamId(UUID(int=number)) for number in range(1, 4)]
MODELS = ["RTX 4090", "A100", "T4"]


@st.composite
def machines(draw: st.DrawFn, number: int) -> MachineInfo:
    models = draw(st.lists(st.sampled_from(MODELS), max_size=4))
    known = [KNOWN_GPUS[model] for model in models]
    simulated = draw(st.booleans()) and draw(st.booleans())
    return MachineInfo(
        id=MachineId(UUID(int=number + 1)),
        team_id=draw(st.sampled_from(TEAMS)),
        cpu_milli=draw(st.integers(0, 8)) * 1000,
        memory_bytes=draw(st.integers(0, 8)),
        disk_bytes=draw(st.integers(0, 8)),
        devices=tuple(
            DeviceInfo(
                DeviceId(UUID(int=number * 100 + index + 1)),
                index,
                gpu.model,
                gpu.vram_bytes,
                gpu.compute_capability,
                simulated,
            )
            for index, gpu in enumerate(known)
        ),
        price_udgpu_per_gpu_hour=draw(st.integers(0, 5)),
        price_udgpu_per_cpu_hour=draw(st.integers(0, 5)),
        schedulable=draw(st.sampled_from([True, True, False])),
        sandboxed=draw(st.sampled_from([True, True, False])),
        allows_fractions=draw(st.booleans()),
    )


@st.composite
def jobs(draw: st.DrawFn, number: int) -> PendingJob:
    gpu: GpuRequest | None = None
    if draw(st.booleans()):
        names = tuple(draw(st.lists(st.sampled_from(MODELS), max_size=2, unique=True)))
        milli = draw(st.sampled_from([1000, 1000, 500, 300]))
        count = draw(st.integers(1, 3)) if milli == 1000 else 1
        gpu = GpuRequest(names, count, count, milli)
    return PendingJob(
        id=JobId(UUID(int=number + 1)),
        team_id=draw(st.sampled_from(TEAMS)),
        submitted_at=T0 - timedelta(seconds=draw(st.integers(0, 3))),
        request=ResourceRequest(gpu, draw(st.integers(1, 3000)), draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        priority=draw(st.sampled_from([0, 50, 100])),
        max_price_udgpu_per_hour=draw(st.none() | st.integers(0, 5)),
    )


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[MachineInfo], list[PendingJob], Policy]:
    fleet = [draw(machines(number)) for number in range(draw(st.integers(0, 4)))]
    pending = [draw(jobs(number)) for number in range(draw(st.integers(0, 10)))]
    quotas = draw(st.dictionaries(st.sampled_from(TEAMS), st.builds(Quota, st.integers(0, 4000)), max_size=3))
    return fleet, pending, Policy(draw(st.sampled_from(Objective)), draw(st.booleans()), quotas=quotas)


def leases_of(plan: Plan) -> list[Lease]:
    return [
        Lease(
            placement.machine_id,
            placement.team_id,
            placement.cpu_milli,
            placement.memory_bytes,
            placement.disk_bytes,
            tuple((share.device_id, share.milli) for share in placement.devices),
        )
        for placement in plan.placements
    ]


# A deadline would measure the machine's other work.
@given(rounds())
def test_no_plan_is_over_capacity(given_round: tuple[list[MachineInfo], list[PendingJob], Policy]):
    fleet, pending, policy = given_round
    plan = schedule(Snapshot.from_machines(fleet), pending, policy, now=T0)
    devices: Counter[DeviceId] = Counter()
    for machine in fleet:
        here = [placement for placement in plan.placements if placement.machine_id == machine.id]
        assert sum(placement.cpu_milli for placement in here) <= machine.cpu_milli
        assert sum(placement.memory_bytes for placement in here) <= machine.memory_bytes
        assert sum(placement.disk_bytes for placement in here) <= machine.disk_bytes
        own = {device.id for device in machine.devices}
        for placement in here:
            assert {share.device_id for share in placement.devices} <= own
            assert len({share.device_id for share in placement.devices}) == len(placement.devices)
            devices.update({share.device_id: share.milli for share in placement.devices})
    assert all(milli <= 1000 for milli in devices.values())


@given(rounds())
def test_each_job_is_placed_or_told_why_not_exactly_once(
    given_round: tuple[list[MachineInfo], list[PendingJob], Policy],
):
    fleet, pending, policy = given_round
    plan = schedule(Snapshot.from_machines(fleet), [*pending, *pending[:2]], policy, now=T0)
    answered = [placement.job_id for placement in plan.placements] + [unplaced.job_id for unplaced in plan.unplaced]
    assert sorted(answered) == sorted(job.id for job in pending)


@given(rounds())
def test_every_placement_keeps_the_jobs_and_the_machines_conditions(
    given_round: tuple[list[MachineInfo], list[PendingJob], Policy],
):
    fleet, pending, policy = given_round
    machine_of, job_of = {machine.id: machine for machine in fleet}, {job.id: job for job in pending}
    for placement in schedule(Snapshot.from_machines(fleet), pending, policy, now=T0).placements:
        machine, job = machine_of[placement.machine_id], job_of[placement.job_id]
        gpu = job.request.gpu
        price = machine.price_udgpu_per_cpu_hour if gpu is None else machine.price_udgpu_per_gpu_hour
        assert machine.schedulable
        assert job.max_price_udgpu_per_hour is None or price <= job.max_price_udgpu_per_hour
        assert (machine.sandboxed and not machine.simulated) or machine.team_id == job.team_id
        taken = {share.device_id for share in placement.devices}
        models = [device.model for device in machine.devices if device.id in taken]
        assert len(models) == (0 if gpu is None else gpu.count_min)
        assert len(set(models)) <= 1
        assert all(gpu.accepts_model(model) for model in models) if gpu is not None else not models
        assert gpu is None or gpu.milli == 1000 or machine.allows_fractions


@given(rounds())
def test_no_device_is_ever_shared_by_two_teams(given_round: tuple[list[MachineInfo], list[PendingJob], Policy]):
    fleet, pending, policy = given_round
    plan = schedule(Snapshot.from_machines(fleet), pending, policy, now=T0)
    teams: dict[DeviceId, TeamId] = {}
    for placement in plan.placements:
        for share in placement.devices:
            assert teams.setdefault(share.device_id, placement.team_id) == placement.team_id


@given(rounds(), st.randoms(use_true_random=False))
def test_the_same_question_has_the_same_answer_in_whatever_order_it_is_asked(
    given_round: tuple[list[MachineInfo], list[PendingJob], Policy], random: Random
):
    fleet, pending, policy = given_round
    first = schedule(Snapshot.from_machines(fleet), pending, policy, now=T0)
    random.shuffle(fleet)
    random.shuffle(pending)
    assert schedule(Snapshot.from_machines(fleet), pending, policy, now=T0) == first


@given(rounds())
def test_what_was_not_placed_does_not_fit_into_what_is_left(
    given_round: tuple[list[MachineInfo], list[PendingJob], Policy],
):
    fleet, pending, policy = given_round
    plan = schedule(Snapshot.from_machines(fleet), pending, policy, now=T0)
    left = Snapshot.from_machines(fleet, leases_of(plan))
    refused = {unplaced.job_id: unplaced.reason for unplaced in plan.unplaced}
    for job in pending:
        if job.id in refused:
            why = explain(left, job, T0)
            assert why.reason == refused[job.id]
            assert why.machines_free == 0


@given(rounds())
def test_every_relaxation_opens_what_it_promises(given_round: tuple[list[MachineInfo], list[PendingJob], Policy]):
    fleet, pending, _ = given_round
    snapshot = Snapshot.from_machines(fleet)
    for job in pending:
        why = explain(snapshot, job, T0)
        for relaxation in why.relaxations:
            assert 0 < relaxation.machines <= len(fleet) - why.machines_fitting
            assert relaxation.before != relaxation.after


@given(rounds())
def test_nobody_borrows_while_a_team_within_its_quota_goes_without(
    given_round: tuple[list[MachineInfo], list[PendingJob], Policy],
):
    fleet, pending, policy = given_round
    job_of = {job.id: job for job in pending}
    plan = schedule(Snapshot.from_machines(fleet), pending, policy, now=T0)
    held: dict[TeamId, int] = dict.fromkeys(TEAMS, 0)
    taken: list[Lease] = []
    for placement, lease in zip(plan.placements, leases_of(plan), strict=True):
        quota = policy.quotas.get(placement.team_id)
        borrows = quota is None or held[placement.team_id] + placement.gpu_milli > quota.gpu_milli
        if borrows and policy.quotas:
            # What a team could have had of its own by then did not fit into what was free by then.
            left = Snapshot.from_machines(fleet, taken)
            for refused in plan.unplaced:
                job = job_of[refused.job_id]
                own = policy.quotas.get(job.team_id)
                asked = job.request.gpu.total_milli if job.request.gpu is not None else 0
                first = not any(it.team_id == job.team_id and it.id != job.id for it in pending)
                if own is not None and first and held[job.team_id] + asked <= own.gpu_milli:
                    assert explain(left, job, T0).machines_free == 0
        held[placement.team_id] += placement.gpu_milli
        taken.append(lease)


@given(rounds(), st.randoms(use_true_random=False))
def test_rounds_that_give_back_and_go_on_are_those_of_a_fresh_start(
    given_round: tuple[list[MachineInfo], list[PendingJob], Policy], random: Random
):
    """Deltas are an economy: what is left free, and so what is placed, is that of a snapshot made anew."""
    fleet, pending, policy = given_round
    snapshot, state, live = Snapshot.from_machines(fleet), SchedulerState(), list[Lease]()
    for first in range(0, len(pending), 3):
        jobs = pending[first : first + 3]
        placed = schedule(snapshot, JobQueue(jobs), policy, now=T0, state=state)
        again = schedule(Snapshot.from_machines(fleet, live), JobQueue(jobs), policy, now=T0, state=SchedulerState())
        assert {it.job_id for it in placed.placements} == {it.job_id for it in again.placements}
        live += leases_of(placed)
        random.shuffle(live)
        ended, live = live[: len(live) // 2], live[len(live) // 2 :]
        state.give_back(ended)
