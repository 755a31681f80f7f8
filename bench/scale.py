"""How long a round of the production `schedule()` takes when the fleet and the queue are huge.

A fleet of machines with eight GPUs each is full, and jobs of 200 teams wait for it. In each round 1,000 devices become
free and 2,000 jobs arrive; the round is everything from there to the plan and the queue without what was placed.
"""

import gc
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from uuid import UUID

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    JobQueue,
    Lease,
    Objective,
    PendingJob,
    Placement,
    Policy,
    SchedulerState,
    Snapshot,
    schedule,
)
from dantegpu.domain.units import GIB

T0 = datetime(2026, 1, 1, tzinfo=UTC)
SIZES = ((1_000, 100_000), (3_000, 300_000), (10_000, 1_000_000))
"""(machines, waiting jobs): 1x, 3x and 10x."""
GPUS_PER_MACHINE = 8
TEAMS = 200
SHAPES_PER_TEAM = 10
DEVICES_FREED, JOBS_ARRIVED = 1_000, 2_000
PRIORITIES = (30, 50, 50, 50, 50, 50, 50, 70)
MODELS = ("H100", "A100", "A100", "L40S", "L40S", "RTX 4090", "RTX 4090", "T4")
GPU_SPECS = (
    "1", "1", "1", "2", "4", "8", "0.25", "0.5", "A100", "A100:4", "H100:8", "RTX 4090", "L40S:2", "24GB", None,
)  # fmt: skip
CORES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """One size. `round_ms_*` by the wall clock, `round_cpu_ms_p50` what the process itself used; memory at its peak."""

    machines: int
    gpus: int
    jobs: int
    teams: int
    objective: str
    rounds: int
    placed_per_round: float
    round_ms_p50: float
    round_ms_max: float
    round_cpu_ms_p50: float
    rss_mb: float


def measure(
    sizes: Sequence[tuple[int, int]], *, rounds: int, objective: str, progress: Callable[[str], None]
) -> list[ScaleResult]:
    """What `dante bench scale` does, the sizes one after the other."""
    results: list[ScaleResult] = []
    for machines, jobs in sizes:
        progress(f"{machines:,} machines, {jobs:,} waiting jobs")
        results.append(_measure(machines, jobs, rounds, Objective(objective)))
        gc.unfreeze()
        gc.collect()
    return results


def _measure(machine_count: int, job_count: int, rounds: int, objective: Objective) -> ScaleResult:
    source = random.Random(1)
    snapshot = Snapshot.from_machines(_machines(machine_count, source))
    policy, state, queue = Policy(objective), SchedulerState(), JobQueue()
    arrivals = _arrivals(source)
    # Enough for the fleet to fill up, and then the queue.
    for job in _take(arrivals, machine_count * GPUS_PER_MACHINE):
        queue.add(job)
    live = list(schedule(snapshot, queue, policy, now=T0, state=state).placements)
    for placement in live:
        queue.discard(placement.job_id)
    for job in _take(arrivals, job_count - len(queue)):
        queue.add(job)
    gc.collect()
    wall: list[float] = []
    cpu: list[float] = []
    placed = 0
    for number in range(rounds + 1):
        if number == 1:
            # The round before has filled what the fleet's filling left open.
            for job in _take(arrivals, job_count - len(queue)):
                queue.add(job)
            placed = 0
            gc.collect()
            gc.freeze()  # as the scheduler does with a long queue
        ended, arrived = _freed(live, source), _take(arrivals, JOBS_ARRIVED)
        started, started_cpu = time.perf_counter(), time.process_time()
        state.give_back(ended)
        for job in arrived:
            queue.add(job)
        plan = schedule(snapshot, queue, policy, now=T0, state=state)
        for placement in plan.placements:
            queue.discard(placement.job_id)
        wall.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.process_time() - started_cpu))
        live.extend(plan.placements)
        placed += len(plan.placements)
    return ScaleResult(
        machines=machine_count,
        gpus=machine_count * GPUS_PER_MACHINE,
        jobs=len(queue),
        teams=TEAMS,
        objective=objective.value,
        rounds=rounds,
        placed_per_round=round(placed / rounds, 1),
        round_ms_p50=round(median(wall[1:]), 1),
        round_ms_max=round(max(wall[1:]), 1),
        round_cpu_ms_p50=round(median(cpu[1:]), 1),
        rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


def _machines(count: int, source: random.Random) -> Iterator[MachineInfo]:
    for number in range(count):
        gpu = KNOWN_GPUS[MODELS[number % len(MODELS)]]
        first = number * GPUS_PER_MACHINE + 1
        yield MachineInfo(
            id=MachineId(UUID(int=number + 1)),
            team_id=TeamId(UUID(int=1 + number % TEAMS)),
            cpu_milli=source.choice((64, 96, 128)) * 1000,
            memory_bytes=source.choice((256, 512, 1024)) * GIB,
            disk_bytes=4096 * GIB,
            devices=tuple(
                DeviceInfo(DeviceId(UUID(int=first + n)), n, gpu.model, gpu.vram_bytes, gpu.compute_capability)
                for n in range(GPUS_PER_MACHINE)
            ),
            price_udgpu_per_gpu_hour=source.randrange(500_000, 3_000_000, 1000),
            price_udgpu_per_cpu_hour=source.randrange(5_000, 30_000, 10),
        )


def _arrivals(source: random.Random) -> Iterator[PendingJob]:
    """Jobs without end, one a second, of teams of very different sizes."""
    shapes = [
        ResourceRequest(None if spec is None else parse_gpu_spec(spec), cores * 1000, 4 * cores * GIB, 10 * GIB)
        for spec in GPU_SPECS
        for cores in CORES
    ]
    teams = [(TeamId(UUID(int=number + 1)), source.sample(shapes, SHAPES_PER_TEAM)) for number in range(TEAMS)]
    weights = [1 / (1 + number) ** 0.5 for number in range(TEAMS)]
    number = 0
    while True:
        for team_id, requests in source.choices(teams, weights, k=10_000):
            number += 1
            submitted_at = T0 + timedelta(seconds=number)
            request, priority = source.choice(requests), source.choice(PRIORITIES)
            yield PendingJob(JobId(UUID(int=number)), team_id, submitted_at, request, priority)


def _take(arrivals: Iterator[PendingJob], count: int) -> list[PendingJob]:
    return [next(arrivals) for _ in range(count)]


def _freed(live: list[Placement], source: random.Random) -> list[Lease]:
    """Random placements that end, until they have given back DEVICES_FREED devices."""
    leases: list[Lease] = []
    freed = 0
    while freed < DEVICES_FREED:
        place = source.randrange(len(live))
        live[place], ended = live[-1], live[place]
        live.pop()
        freed += len(ended.devices)
        leases.append(ended.lease)
    return leases
