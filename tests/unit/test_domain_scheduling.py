from dataclasses import replace
from datetime import UTC, datetime, timedelta

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    Constraint,
    Lease,
    Objective,
    PendingJob,
    Plan,
    Policy,
    Snapshot,
    explain,
    schedule,
)
from dantegpu.domain.units import GIB

T0 = datetime(2026, 1, 1, tzinfo=UTC)
US, THEM, PROVIDER = TeamId.new(), TeamId.new(), TeamId.new()


def a_machine(  # one argument per thing that a test wants to vary
    gpus: int = 0,
    model: str = "RTX 4090",
    *,
    price: int = 1_000_000,
    cpus: int = 16,
    team: TeamId = PROVIDER,
    simulated: bool = False,
    sandboxed: bool = True,
    schedulable: bool = True,
    region: str = "",
    fractions: bool = True,
) -> MachineInfo:
    gpu = KNOWN_GPUS[model]
    return MachineInfo(
        id=MachineId.new(),
        team_id=team,
        cpu_milli=cpus * 1000,
        memory_bytes=64 * GIB,
        disk_bytes=100 * GIB,
        devices=tuple(
            DeviceInfo(DeviceId.new(), index, gpu.model, gpu.vram_bytes, gpu.compute_capability, simulated)
            for index in range(gpus)
        ),
        price_udgpu_per_gpu_hour=price,
        price_udgpu_per_cpu_hour=price // 100,
        region=region,
        schedulable=schedulable,
        sandboxed=sandboxed,
        allows_fractions=fractions,
    )


def a_job(
    gpu: str | None = None,
    *,
    team: TeamId = US,
    cpus: int = 1,
    priority: int = 50,
    max_price: int | None = None,
    age: int = 0,
    regions: frozenset[str] = frozenset(),
) -> PendingJob:
    request = ResourceRequest(gpu=None if gpu is None else parse_gpu_spec(gpu), cpu_milli=cpus * 1000)
    return PendingJob(
        id=JobId.new(),
        team_id=team,
        submitted_at=T0 - timedelta(seconds=age),
        request=request,
        priority=priority,
        max_price_udgpu_per_hour=max_price,
        regions=regions,
    )


def a_lease(machine: MachineInfo, gpus: int = 0, *, milli: int = 1000, team: TeamId = THEM, cpus: int = 1) -> Lease:
    devices = tuple((device.id, milli) for device in machine.devices[:gpus])
    return Lease(machine.id, team, cpus * 1000, GIB, GIB, devices)


def plan(machines: list[MachineInfo], jobs: list[PendingJob], leases: list[Lease] | None = None) -> Plan:
    return schedule(Snapshot.from_machines(machines, leases or []), jobs, now=T0)


def why_unplaced(machines: list[MachineInfo], job: PendingJob, leases: list[Lease] | None = None) -> QueueReason:
    unplaced = plan(machines, [job], leases).unplaced
    assert [it.job_id for it in unplaced] == [job.id]
    return unplaced[0].reason


def test_a_job_for_two_gpus_skips_a_machine_with_one_free():
    busy, free = a_machine(gpus=2), a_machine(gpus=2)
    placed = plan([busy, free], [a_job("2")], [a_lease(busy, gpus=1)]).placements
    assert [placement.machine_id for placement in placed] == [free.id]
    assert [(share.index, share.milli) for share in placed[0].devices] == [(0, 1000), (1, 1000)]


def test_a_job_takes_the_device_that_is_free():
    machine = a_machine(gpus=2)
    (placement,) = plan([machine], [a_job("1")], [a_lease(machine, gpus=1)]).placements
    assert [share.device_id for share in placement.devices] == [machine.devices[1].id]


def test_nothing_is_placed_on_a_withheld_device_and_the_job_waits_for_it():
    machine = a_machine(gpus=2)
    ill = replace(machine, devices=(replace(machine.devices[0], withheld=True), machine.devices[1]))
    made = plan([ill], [a_job("RTX4090"), a_job("RTX4090")])
    assert [share.device_id for it in made.placements for share in it.devices] == [ill.devices[1].id]
    assert [it.reason for it in made.unplaced] == [QueueReason.NO_CAPACITY]


def test_the_cheapest_machine_is_taken_and_its_rate_locked():
    cheap = a_machine(gpus=2, price=900_000)
    (placement,) = plan([a_machine(gpus=2), cheap, a_machine(gpus=2)], [a_job("2")]).placements
    assert (placement.machine_id, placement.rate_udgpu_per_hour) == (cheap.id, 1_800_000)


def test_of_equally_cheap_machines_the_tightest_is_taken():
    tight = a_machine(gpus=1)
    (placement,) = plan([a_machine(gpus=8), tight, a_machine(gpus=4)], [a_job("1")]).placements
    assert placement.machine_id == tight.id


def test_fragmentation_looks_at_the_fit_before_the_price_and_spread_at_the_emptiest():
    tight, roomy = a_machine(gpus=1, price=2_000_000), a_machine(gpus=4)
    snapshot = Snapshot.from_machines([roomy, tight])
    places = [
        schedule(snapshot, [a_job("1")], Policy(objective), now=T0).placements[0].machine_id
        for objective in (Objective.FRAGMENTATION, Objective.SPREAD)
    ]
    assert places == [tight.id, roomy.id]


def test_a_job_without_gpus_leaves_machines_with_gpus_alone_and_pays_for_cores():
    plain = a_machine()
    (placement,) = plan([a_machine(gpus=4), plain], [a_job(cpus=4)]).placements
    assert (placement.machine_id, placement.devices, placement.rate_udgpu_per_hour) == (plain.id, (), 40_000)


def test_an_avoided_machine_is_taken_only_when_nothing_else_fits():
    cheap, dear = a_machine(gpus=1, price=1), a_machine(gpus=1)
    job = replace(a_job("1"), avoided_machines=frozenset({cheap.id}))
    assert plan([cheap, dear], [job]).placements[0].machine_id == dear.id
    assert plan([cheap], [job]).placements[0].machine_id == cheap.id


def test_an_excluded_machine_is_never_taken():
    machine = a_machine(gpus=1)
    assert why_unplaced([machine], replace(a_job("1"), excluded_machines=frozenset({machine.id}))) == "restricted"


def test_two_halves_of_one_team_share_a_device():
    machine = a_machine(gpus=2)
    placed = plan([machine], [a_job("0.5"), a_job("0.5")]).placements
    assert {share.index for placement in placed for share in placement.devices} == {0}
    assert placed[0].rate_udgpu_per_hour == 500_000


def test_two_teams_never_share_a_device_not_even_when_they_are_new():
    machine = a_machine(gpus=1)
    first, second = a_job("0.5", age=9), a_job("0.5", team=THEM)
    result = plan([machine], [first, second])
    assert [placement.job_id for placement in result.placements] == [first.id]
    assert [unplaced.reason for unplaced in result.unplaced] == [QueueReason.NO_CAPACITY]


def test_a_device_that_another_team_uses_in_part_is_not_joined():
    machine = a_machine(gpus=1)
    lease = a_lease(machine, gpus=1, milli=200, team=THEM)
    assert why_unplaced([machine], a_job("0.5"), [lease]) == QueueReason.NO_CAPACITY
    assert plan([machine], [a_job("0.5", team=THEM)], [lease]).placements


def test_a_machine_that_does_not_share_its_gpus_takes_no_fractions():
    assert why_unplaced([a_machine(gpus=1, fractions=False)], a_job("0.5")) == QueueReason.NO_MATCHING_GPU


def test_the_gpus_of_one_job_are_all_of_one_model():
    mixed = a_machine(gpus=2)
    a100 = KNOWN_GPUS["A100"]
    others = tuple(DeviceInfo(DeviceId.new(), 2 + n, a100.model, a100.vram_bytes, 80) for n in range(2))
    mixed = replace(mixed, devices=mixed.devices[1:] + others)
    (placement,) = plan([mixed], [a_job("RTX4090,A100:2")]).placements
    assert [share.index for share in placement.devices] == [2, 3]
    assert why_unplaced([mixed], a_job("RTX4090,A100:3")) == QueueReason.NO_MATCHING_GPU


def test_higher_priority_goes_first_then_the_older_job():
    machine = a_machine(gpus=2)
    urgent, old, young = a_job("1", priority=90), a_job("1", age=60), a_job("1", age=30)
    placed = plan([machine], [young, old, urgent]).placements
    assert [placement.job_id for placement in placed] == [urgent.id, old.id]


def test_a_team_with_many_jobs_does_not_starve_a_team_with_few():
    machines = [a_machine(gpus=4)]
    ours = [a_job("1", age=60) for _ in range(10)]
    theirs = [a_job("1", team=THEM) for _ in range(2)]
    placed = plan(machines, ours + theirs).placements
    assert [placement.team_id for placement in placed].count(THEM) == 2


def test_what_a_team_holds_already_counts_for_its_share():
    machine = a_machine(gpus=3)
    ours, theirs = a_job("1", age=60), a_job("1", team=THEM)
    placed = plan([machine], [ours, theirs], [a_lease(machine, gpus=2, team=US)]).placements
    assert [placement.team_id for placement in placed] == [THEM]


def test_simulated_and_unsandboxed_machines_take_only_their_own_teams_jobs():
    for machine in (a_machine(gpus=1, simulated=True), a_machine(gpus=1, sandboxed=False)):
        assert why_unplaced([machine], a_job("1")) == QueueReason.RESTRICTED
        assert plan([machine], [a_job("1", team=PROVIDER)]).placements


def test_a_job_with_an_image_goes_only_to_a_machine_that_runs_images():
    job = replace(a_job("1"), image="docker.io/library/python:3.12")
    without, with_images = a_machine(gpus=1), replace(a_machine(gpus=1), runs_images=True)
    assert why_unplaced([without], job) == QueueReason.NO_MATCHING_MACHINE
    assert [placement.machine_id for placement in plan([without, with_images], [job]).placements] == [with_images.id]


def test_a_job_goes_only_where_the_owner_allows_its_image():
    job = replace(a_job("1"), image="python:3.12")
    narrow = replace(
        a_machine(gpus=1), runs_images=True, allowed_images=("ghcr.io/acme/*", "docker.io/library/py*:3.*")
    )
    other = replace(narrow, id=MachineId.new(), allowed_images=("ghcr.io/*",))
    assert why_unplaced([other], job) == QueueReason.NO_MATCHING_MACHINE
    assert plan([other], [job]).unplaced[0].detail == "1 machine: 1 its owner does not allow this image"
    assert [placement.machine_id for placement in plan([other, narrow], [job]).placements] == [narrow.id]


def test_a_job_that_asks_for_a_network_goes_only_where_jobs_of_its_kind_get_one():
    plain, with_image = (replace(a_job("1"), network=True, image=image) for image in ("", "python:3.12"))
    machine = replace(a_machine(gpus=1), runs_images=True, networks=frozenset({"plain"}))
    assert why_unplaced([machine], with_image) == QueueReason.NO_MATCHING_MACHINE
    assert [placement.machine_id for placement in plan([machine], [plain]).placements] == [machine.id]
    why = explain(Snapshot.from_machines([machine]), with_image, T0)
    assert [(it.field, it.after) for it in why.relaxations] == [("network", "false")]


def test_a_job_that_publishes_ports_goes_only_where_the_owner_lets_it():
    job = replace(a_job("1"), network=True, image="acme/serve", ports=True)
    shut = replace(a_machine(gpus=1), runs_images=True, networks=frozenset({"image"}))
    open_ = replace(a_machine(gpus=1), runs_images=True, networks=frozenset({"image", "ports"}))
    assert why_unplaced([shut], job) == QueueReason.NO_MATCHING_MACHINE
    assert plan([shut], [job]).unplaced[0].detail == "1 machine: 1 publishes no ports of jobs"
    assert [it.field for it in explain(Snapshot.from_machines([shut]), job, T0).relaxations] == ["ports"]
    assert [placement.machine_id for placement in plan([shut, open_], [job]).placements] == [open_.id]


def test_a_job_that_requires_a_sandbox_refuses_even_its_own_teams_unsandboxed_machine():
    job = replace(a_job("1", team=PROVIDER), requires_sandbox=True)
    assert why_unplaced([a_machine(gpus=1, sandboxed=False)], job) == QueueReason.RESTRICTED


def test_every_waiting_job_says_why():
    online = a_machine(gpus=1)
    assert why_unplaced([], a_job("1")) == QueueReason.NO_PROVIDER_ONLINE
    assert why_unplaced([replace(online, schedulable=False)], a_job("1")) == QueueReason.NO_PROVIDER_ONLINE
    assert why_unplaced([online], a_job("H100")) == QueueReason.NO_MATCHING_GPU
    assert why_unplaced([online], a_job("48GB")) == QueueReason.NO_MATCHING_GPU
    assert why_unplaced([online], a_job("8")) == QueueReason.NO_MATCHING_GPU
    assert why_unplaced([online], a_job("cc9.0..")) == QueueReason.NO_MATCHING_GPU
    assert why_unplaced([online], a_job("1", cpus=100)) == QueueReason.NO_MATCHING_MACHINE
    assert why_unplaced([online], a_job("1", max_price=999_999)) == QueueReason.PRICE_ABOVE_MAX
    assert why_unplaced([online], a_job("1", regions=frozenset({"eu"}))) == QueueReason.RESTRICTED
    assert why_unplaced([online], a_job("1"), [a_lease(online, gpus=1)]) == QueueReason.NO_CAPACITY


def test_a_waiting_job_comes_with_numbers():
    machines = [a_machine(gpus=1), a_machine(gpus=1, model="A100"), a_machine()]
    (unplaced,) = plan(machines, [a_job("H100", max_price=10)]).unplaced
    counts = {count.constraint: count.machines_excluded for count in unplaced.constraints}
    assert counts == {Constraint.GPU_MODEL: 3, Constraint.MAX_PRICE: 3}
    assert unplaced.detail == "3 machines: 3 no such GPU model, 3 costs more than max_price"


def test_a_job_that_waits_for_its_retry_is_left_alone():
    job = replace(a_job("1"), not_before=T0 + timedelta(seconds=1))
    assert why_unplaced([a_machine(gpus=1)], job) == QueueReason.WAITING_FOR_RETRY


def test_a_machine_that_shrank_under_its_leases_has_nothing_free():
    machine = a_machine(cpus=2)
    assert why_unplaced([machine], a_job(), [a_lease(machine, cpus=8)]) == QueueReason.NO_CAPACITY


def test_a_lease_on_an_unknown_machine_is_ignored():
    assert plan([a_machine(gpus=1)], [a_job("1")], [a_lease(a_machine(gpus=1), gpus=1)]).placements


def test_why_names_the_smallest_price_that_opens_a_machine():
    machines = [a_machine(gpus=1, price=price) for price in (2_400_000, 2_400_000, 3_000_000)]
    why = explain(Snapshot.from_machines(machines), a_job("1", max_price=2_100_000), T0)
    assert (why.reason, why.machines_total, why.machines_fitting) == (QueueReason.PRICE_ABOVE_MAX, 3, 0)
    assert [relaxation.text for relaxation in why.relaxations] == ["max_price 2.10 -> 2.40: 2 machines, start now"]


def test_why_prefers_a_price_that_opens_a_free_machine_to_a_lower_one_that_opens_a_busy_one():
    busy, free = a_machine(gpus=1, price=2_200_000), a_machine(gpus=1, price=2_500_000)
    snapshot = Snapshot.from_machines([busy, free], [a_lease(busy, gpus=1)])
    why = explain(snapshot, a_job("1", max_price=2_100_000), T0)
    assert [(it.after, it.available_now) for it in why.relaxations] == [("2.50", True)]


def test_why_offers_a_single_change_of_the_gpu_request():
    snapshot = Snapshot.from_machines([a_machine(gpus=4), a_machine(gpus=1, model="A100")])

    def changes(gpu: str) -> list[tuple[str, str, str, int]]:
        found = explain(snapshot, a_job(gpu), T0).relaxations
        return [(it.field, it.before, it.after, it.machines) for it in found]

    assert changes("H100") == [("gpu.name", "H100", "H100, NVIDIA GeForce RTX 4090", 1)]
    assert changes("RTX4090:8") == [("gpu.count", "8", "4", 1)]
    assert changes("RTX4090:48GB") == [
        ("gpu.memory", "48GB..", "24GB..", 1),
        ("gpu.name", "RTX 4090", "RTX 4090, NVIDIA A100-SXM4-80GB", 1),
    ]
    assert changes("cc9.0..") == [("gpu.compute_capability", "9.0..", "8.9..", 1)]


def test_why_offers_a_smaller_host_or_another_region():
    snapshot = Snapshot.from_machines([a_machine(gpus=1, region="us")])
    assert [it.text for it in explain(snapshot, a_job("1", cpus=32), T0).relaxations] == [
        "cpu 32 -> 16: 1 machine, start now"
    ]
    assert [it.after for it in explain(snapshot, a_job("1", regions=frozenset({"eu"})), T0).relaxations] == ["eu, us"]


def test_why_of_a_job_that_fits_now_has_no_reason_and_no_changes():
    why = explain(Snapshot.from_machines([a_machine(gpus=1)]), a_job("1", max_price=1_000_000), T0)
    assert (why.reason, why.machines_free, why.relaxations) == (None, 1, ())


def test_why_with_no_single_change_that_helps_offers_none():
    why = explain(Snapshot.from_machines([a_machine(gpus=1)]), a_job("H100:8", cpus=64), T0)
    assert why.relaxations == ()
