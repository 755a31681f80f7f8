from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import Lease, Objective, PendingJob, Plan, Policy, SchedulerState, Snapshot, schedule
from dantegpu.domain.scheduling.fragmentation import ALPHA, FragmentationValue
from dantegpu.domain.scheduling.mix import MAX_SHAPES, MEMORY_ARRIVALS, MixShape, RequestMix
from dantegpu.domain.units import GIB

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM = TeamId.new()
FRAGMENTATION = Policy(Objective.FRAGMENTATION)


def a_machine(gpus: int = 0, cpus: int = 16, model: str = "T4") -> MachineInfo:
    gpu = KNOWN_GPUS[model]
    devices = tuple(DeviceInfo(DeviceId.new(), index, gpu.model, gpu.vram_bytes) for index in range(gpus))
    return MachineInfo(MachineId.new(), TEAM, cpus * 1000, 64 * GIB, 64 * GIB, devices, 1_000_000, 10_000)


def a_job(gpu: str | None, cpus: int = 1, number: int = 0) -> PendingJob:
    request = ResourceRequest(None if gpu is None else parse_gpu_spec(gpu), cpus * 1000)
    return PendingJob(JobId.new(), TEAM, T0 + timedelta(seconds=number), request)


def machines_of(plan: Plan) -> list[MachineId]:
    return [placement.machine_id for placement in plan.placements]


def one_by_one(snapshot: Snapshot, jobs: list[PendingJob], state: SchedulerState) -> list[MachineId]:
    return [
        machine
        for job in jobs
        for machine in machines_of(schedule(snapshot, [job], FRAGMENTATION, now=T0, state=state))
    ]


def a_state_that_saw(*jobs: PendingJob) -> SchedulerState:
    state = SchedulerState()
    schedule(Snapshot.from_machines([]), jobs, FRAGMENTATION, now=T0, state=state)
    return state


def test_a_fraction_goes_to_a_device_that_is_already_broken():
    machine = a_machine(gpus=2)
    state = a_state_that_saw(a_job("1"), a_job("1"))
    snapshot = Snapshot.from_machines([machine])
    plan = schedule(snapshot, [a_job("0.5"), a_job("0.3", number=1)], FRAGMENTATION, now=T0, state=state)
    assert [placement.devices[0].index for placement in plan.placements] == [0, 0]


def test_a_machine_stays_whole_for_the_requests_that_need_all_of_it():
    large, half = a_machine(gpus=4), a_machine(gpus=4)
    leases = [Lease(half.id, TEAM, 1000, GIB, GIB, tuple((device.id, 1000) for device in half.devices[:2]))]
    snapshot = Snapshot.from_machines([large, half], leases)
    state = a_state_that_saw(a_job("4"), a_job("1"))
    assert one_by_one(snapshot, [a_job("1"), a_job("1"), a_job("4")], state) == [half.id, half.id, large.id]


def test_a_request_with_many_cores_goes_where_cores_are_plenty_and_one_with_few_where_they_are_scarce():
    rich, poor = a_machine(gpus=2, cpus=96), a_machine(gpus=2, cpus=8)
    state = a_state_that_saw(*(a_job("1", cpus) for cpus in (1, 2, 12)))
    snapshot = Snapshot.from_machines([rich, poor])
    assert one_by_one(snapshot, [a_job("1", cpus=1), a_job("1", cpus=8)], state) == [poor.id, rich.id]


def test_a_job_without_gpus_takes_cores_that_no_gpu_will_miss():
    rich, poor = a_machine(gpus=2, cpus=96), a_machine(gpus=2, cpus=16)
    state = a_state_that_saw(*(a_job("1", 8) for _ in range(3)))
    assert one_by_one(Snapshot.from_machines([poor, rich]), [a_job(None, cpus=8)], state) == [rich.id]


def test_scarce_models_are_kept_for_the_requests_that_name_them():
    scarce, common = a_machine(gpus=1, model="A100"), a_machine(gpus=1, model="T4")
    snapshot = Snapshot.from_machines([scarce, common])
    for wanted, free in ((scarce, common), (common, scarce)):
        named = a_job(wanted.devices[0].model)
        assert one_by_one(snapshot, [a_job("1")], a_state_that_saw(named, named)) == [free.id]


def test_a_state_goes_on_from_the_plans_made_of_one_snapshot_and_starts_anew_with_another():
    machine = a_machine(gpus=1)
    first, second = Snapshot.from_machines([machine]), Snapshot.from_machines([machine])
    state = SchedulerState()
    assert one_by_one(first, [a_job("1"), a_job("1")], state) == [machine.id]
    assert one_by_one(second, [a_job("1"), a_job("1")], state) == [machine.id]


@pytest.mark.parametrize("objective", Objective)
def test_one_by_one_with_a_state_never_uses_a_device_twice(objective: Objective):
    machines = [a_machine(gpus=4, model=model) for model in ("T4", "A100")]
    snapshot, state = Snapshot.from_machines(machines), SchedulerState()
    used: dict[DeviceId, int] = {}
    for number in range(60):
        job = a_job(["0.4", "1", "2", "0.7"][number % 4], number=number)
        for placement in schedule(snapshot, [job], Policy(objective), now=T0, state=state).placements:
            for share in placement.devices:
                used[share.device_id] = used.get(share.device_id, 0) + share.milli
    assert len(used) == 8
    assert max(used.values()) <= 1000


def test_kept_scores_are_those_of_a_fresh_start():
    machines = [a_machine(gpus=gpus, cpus=cpus) for gpus in (1, 2, 4) for cpus in (8, 16, 64)]
    specs = ("0.3", "1", "0.5", "2", None, "4", "1", "0.81")
    jobs = [a_job(specs[number % 8], 1 + number % 7, number) for number in range(40)]
    snapshot, state, leases = Snapshot.from_machines(machines), a_state_that_saw(*jobs), list[Lease]()
    for job in jobs:
        kept = schedule(snapshot, [job], FRAGMENTATION, now=T0, state=state)
        fresh = schedule(
            Snapshot.from_machines(machines, leases), [job], FRAGMENTATION, now=T0, state=a_state_that_saw(*jobs)
        )
        assert machines_of(kept) == machines_of(fresh)
        for it in kept.placements:
            shares = tuple((share.device_id, share.milli) for share in it.devices)
            leases.append(Lease(it.machine_id, TEAM, it.cpu_milli, it.memory_bytes, it.disk_bytes, shares))


def test_the_value_is_the_formula():
    machine = replace(a_machine(gpus=3, cpus=10), memory_bytes=8 * GIB)
    snapshot = Snapshot.from_machines([machine])
    shapes = [
        MixShape(4000, GIB, parse_gpu_spec("1"), 0.5),
        MixShape(1000, 5 * GIB, parse_gpu_spec("0.3"), 0.25),
        MixShape(1000, GIB, parse_gpu_spec("2"), 0.125),
        MixShape(1000, GIB, parse_gpu_spec("A100"), 0.125),
        MixShape(20_000, GIB, parse_gpu_spec("1"), 0.5),
    ]
    value = FragmentationValue(snapshot, np.zeros((1, 3), dtype=np.int64), 1, shapes)
    devices = value.devices[[1000, 1000, 650]].sum(axis=0)
    whole, copies = value.of(devices[None], np.array([10_000]), np.array([8 * GIB]))[:, 0]
    # Copies: two whole devices; 8 GiB / 5 GiB of 0.3; one pair; half of the one with 20 cores.
    # Reach: 2 GPUs, all 2.65, 2, none of an A100, and none for 20 cores.
    assert copies == pytest.approx(0.5 * 2 + 0.25 * 0.3 * 1.6 + 0.125 * 2 + 0.5 * 0.5)
    reach = 0.5 * 2 + 0.25 * 2.65 + 0.125 * 2
    assert whole == pytest.approx(ALPHA * reach + (1 - ALPHA) * copies)


def test_a_fleet_without_gpus_takes_jobs_that_need_none():
    snapshot = Snapshot.from_machines([a_machine(gpus=0)])
    plan = schedule(snapshot, [a_job(None), a_job("1")], FRAGMENTATION, now=T0)
    assert [placement.machine_index for placement in plan.placements] == [0]
    assert len(plan.unplaced) == 1


def test_a_waiting_job_counts_once_in_the_mix():
    snapshot, state, waiting = Snapshot.from_machines([a_machine(gpus=1)]), SchedulerState(), a_job("4")
    for _ in range(5):
        schedule(snapshot, [waiting, a_job("0.1")], FRAGMENTATION, now=T0, state=state)
    mix = state.mix.shapes()
    share = {str(shape.gpu): shape.weight for shape in mix}
    # One of 4 GPUs over sqrt(4), five of 0.1 over sqrt(0.1).
    assert share["4"] / share["0.1"] == pytest.approx((1 / 2) / (5 / 0.1**0.5))


def test_a_mix_is_bounded_and_fades():
    mix = RequestMix()
    old, new = (a_job(gpu).request for gpu in ("1", "2"))
    mix.count(old, MEMORY_ARRIVALS)
    for _ in range(4):
        mix.fade()
        mix.count(new, MEMORY_ARRIVALS // 2)
    weights = {shape.gpu.count_min: shape.weight * shape.gpu.count_min**0.5 for shape in mix.shapes()}
    assert weights[2] > 5 * weights[1]
    for cpus in range(1, 3 * MAX_SHAPES):
        mix.count(a_job("1", cpus=cpus).request)
    assert len(mix.shapes()) <= MAX_SHAPES


def test_requests_for_the_same_gpus_are_one_shape_unless_their_cores_differ_much():
    mix = RequestMix()
    for gpu, cpus, times in (("1", 4, 3), ("1", 5, 1), ("1", 16, 1), ("2", 4, 1)):
        mix.count(a_job(gpu, cpus=cpus).request, times)
    shapes = {(str(shape.gpu), shape.cpu_milli): shape.weight for shape in mix.shapes()}
    # The mean by weight: three requests with 4 cores, one with 5.
    assert set(shapes) == {("1", 4250), ("1", 16_000), ("2", 4000)}
    assert shapes["1", 4250] == pytest.approx(4 * shapes["1", 16_000])


def test_the_mix_does_not_depend_on_the_order_of_arrival():
    requests = [a_job(gpu, cpus).request for gpu in ("1", "0.5", "A100:2") for cpus in (1, 2)]
    forward, backward = RequestMix(), RequestMix()
    for request in requests:
        forward.count(request)
    for request in reversed(requests):
        backward.count(request)
    assert forward.shapes() == backward.shapes()
