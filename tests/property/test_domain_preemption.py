"""Whoever gives way is spot work that is outranked; what becomes free suffices, and less would not."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, GpuRequest, MachineInfo, ResourceRequest
from dantegpu.domain.scheduling import Ground, Lease, PendingJob, Policy, Snapshot, SpotWork, preempt, schedule

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM, OTHER = TeamId(UUID(int=1)), TeamId(UUID(int=2))
MODELS = ("A100", "T4")
NO_QUOTAS = Policy()
MACHINES = 3


def a_machine(number: int, models: Sequence[str]) -> MachineInfo:
    devices = tuple(
        DeviceInfo(
            DeviceId(UUID(int=number * 10 + index + 1)), index, KNOWN_GPUS[name].model, KNOWN_GPUS[name].vram_bytes
        )
        for index, name in enumerate(models)
    )
    return MachineInfo(MachineId(UUID(int=number + 1)), TEAM, 4000, 64, 64, devices)


def gpus(count: int) -> GpuRequest:
    return GpuRequest((), count, count, 1000)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[MachineInfo], list[SpotWork], list[Lease], PendingJob]:
    """Machines, spot work on them, other leases, and a job that waits."""
    machines = [
        a_machine(number, draw(st.lists(st.sampled_from(MODELS), min_size=1, max_size=3)))
        for number in range(draw(st.integers(1, MACHINES)))
    ]
    leases: list[Lease] = []
    for machine in machines:
        cores = 0
        for device in machine.devices:
            cpu_milli = draw(st.sampled_from([0, 500, 1000, 2000]))
            if draw(st.booleans()) and cores + cpu_milli <= machine.cpu_milli:
                cores += cpu_milli
                leases.append(Lease(machine.id, OTHER, cpu_milli, 1, 1, ((device.id, 1000),)))
    kinds = [draw(st.integers(0, 3)) for _ in leases]
    works: list[SpotWork] = []
    for number, (lease, kind) in enumerate(zip(leases, kinds, strict=True)):
        if not kind:
            continue
        seconds = float(draw(st.integers(0, 5)))
        # A gang: nodes on machines of their own.
        if kind == 1 and works and all(each.machine_id != lease.machine_id for each in works[-1].leases):
            last = works.pop()
            works.append(SpotWork(last.job_id, OTHER, last.priority, (*last.leases, lease), last.lost_seconds))
        else:
            works.append(SpotWork(JobId(UUID(int=number + 1)), OTHER, draw(st.integers(48, 52)), (lease,), seconds))
    gpu = draw(st.none() | st.builds(gpus, st.integers(1, 3)))
    request = ResourceRequest(gpu, draw(st.sampled_from([500, 2000, 4000])), 1, 1)
    job = PendingJob(JobId(UUID(int=999)), TEAM, T0, request, nodes=draw(st.sampled_from([1, 1, 2])))
    others = [lease for lease, kind in zip(leases, kinds, strict=True) if not kind]
    return machines, works, others, job


def suffices(
    machines: list[MachineInfo], works: list[SpotWork], others: list[Lease], job: PendingJob, ended: Sequence[SpotWork]
) -> bool:
    """Would a round place the job once `ended` have ended?"""
    left = [lease for work in works if work not in ended for lease in work.leases]
    if job.nodes == 1:
        return bool(schedule(Snapshot.from_machines(machines, [*left, *others]), [job], now=T0).placements)
    rooms = [
        bool(
            schedule(
                Snapshot.from_machines([machine], [it for it in (*left, *others) if it.machine_id == machine.id]),
                [PendingJob(job.id, job.team_id, T0, job.request)],
                now=T0,
            ).placements
        )
        for machine in machines
    ]
    return sum(rooms) >= job.nodes


@given(fleets())
def test_who_gives_way_is_outranked_suffices_and_is_all_needed(
    fleet: tuple[list[MachineInfo], list[SpotWork], list[Lease], PendingJob],
):
    machines, works, others, job = fleet
    held = [*(lease for work in works for lease in work.leases), *others]
    ground = Ground(Snapshot.from_machines(machines, held))
    found = preempt(ground, works, [job], NO_QUOTAS)
    outranked = [work for work in works if work.priority <= job.priority]
    if job.nodes == 1:
        sets = [some for size in range(len(outranked) + 1) for some in combinations(outranked, size)]
        enough = [some for some in sets if suffices(machines, works, others, job, some)]
        fewest = min((sum(len(work.leases) for work in some) for some in enough), default=0)
        assert sum(len(work.leases) for each in found for work in each.victims) == fewest
    for each in found:
        assert set(each.victims) <= set(outranked)
        kept = [lease for work in works if work not in each.victims for lease in work.leases]
        # With the claim taken as a lease nothing is over capacity: what was claimed is really free.
        after = Snapshot.from_machines(machines, [*kept, *others, *each.claim.leases])
        assert not after.overdrawn
        assert len({lease.machine_id for lease in each.claim.leases}) == job.nodes
        assert job.nodes > 1 or not suffices(machines, works, others, job, ())
        for victim in each.victims:
            fewer = [work for work in each.victims if work is not victim]
            still = [*kept, *victim.leases, *others, *each.claim.leases]
            assert Snapshot.from_machines(machines, still).overdrawn, (victim, fewer)
