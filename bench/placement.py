"""The production `schedule()` on a cluster trace: how much of its GPUs a stream of requests fills, and how fast.

The experiment is that of Weng et al., "Beware of Fragmentation", USENIX ATC 2023, section 6: requests arrive until they
ask for 130 % of the cluster's milli-GPUs, nothing departs, and what does not fit is dropped.
"""

import csv
import gc
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from uuid import UUID

from dantegpu.domain.gpus import find_known_gpu
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, GpuRequest, MachineInfo, ResourceRequest
from dantegpu.domain.scheduling import Objective, PendingJob, Placement, Policy, SchedulerState, Snapshot, schedule
from dantegpu.domain.units import GIB, MIB, MILLI_PER_UNIT

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM = TeamId(UUID(int=1))
REQUEST_FIELDS = ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "gpu_spec")
NO_VRAM_BYTES = GIB


class InvalidTrace(ValueError):
    """A file that is not in the trace's format; the text says which line and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a request file."""

    cpu_milli: int
    memory_mib: int
    num_gpu: int
    gpu_milli: int
    gpu_spec: str

    @property
    def total_milli(self) -> int:
        """milli-GPUs in all. Of several GPUs each is a whole one, whatever `gpu_milli` says."""
        return self.gpu_milli if self.num_gpu == 1 else self.num_gpu * MILLI_PER_UNIT


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """`allocation_*`: milli-GPUs placed / in the cluster, in %, when 100 % had arrived (None: never) and at the end.

    `per_s` counts requests, placed or not, per second of `schedule()` calls; `seconds` is their sum. `cpu_seconds` is
    the process's own time in them: less than `seconds` when other processes had the core meanwhile.
    """

    requests: int
    placed: int
    allocation_at_100: float | None
    allocation_at_end: float
    per_s: float
    seconds: float
    cpu_seconds: float
    batch: int
    machines: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures, and each request's placement (None: dropped) on `serials` of machines."""

    result: PlacementResult
    placements: list[Placement | None]
    serials: list[str]


def read_machines(path: Path) -> list[tuple[str, MachineInfo]]:
    """(sn, machine) in file order. Raises InvalidTrace."""
    machines: list[tuple[str, MachineInfo]] = []
    device_number = 0
    for line, row in _rows(path, ("sn", "cpu_milli", "memory_mib", "gpu", "model")):
        known = find_known_gpu(row["model"])
        devices: list[DeviceInfo] = []
        for index in range(_int(path, line, row, "gpu")):
            device_number += 1
            vram_bytes = known.vram_bytes if known else NO_VRAM_BYTES
            devices.append(DeviceInfo(DeviceId(UUID(int=device_number)), index, row["model"], vram_bytes))
        machine = MachineInfo(
            id=MachineId(UUID(int=line)),
            team_id=TEAM,
            cpu_milli=_int(path, line, row, "cpu_milli"),
            memory_bytes=_int(path, line, row, "memory_mib") * MIB,
            disk_bytes=0,
            devices=tuple(devices),
        )
        machines.append((row["sn"], machine))
    if not machines:
        raise InvalidTrace(f"{path}: no machines")
    return machines


def read_requests(path: Path) -> list[Request]:
    """In file order. Raises InvalidTrace."""
    requests: list[Request] = []
    for line, row in _rows(path, REQUEST_FIELDS[:4]):
        cpu_milli, memory_mib, num_gpu = (_int(path, line, row, name) for name in REQUEST_FIELDS[:3])
        gpu_milli = _int(path, line, row, "gpu_milli") if num_gpu == 1 else MILLI_PER_UNIT * bool(num_gpu)
        if num_gpu == 1 and not 1 <= gpu_milli <= MILLI_PER_UNIT:
            raise InvalidTrace(f"{path}, line {line}: gpu_milli is 1 to {MILLI_PER_UNIT}, not {gpu_milli}")
        requests.append(Request(cpu_milli, memory_mib, num_gpu, gpu_milli, row.get("gpu_spec") or ""))
    return requests


def sample(requests: Sequence[Request], capacity_milli: int, ratio: float, seed: int) -> list[Request]:
    """Arrivals that ask for `ratio` of the capacity: the file shuffled, then drawn from it with replacement.

    Raises InvalidTrace when no request asks for a GPU.
    """
    if not any(request.total_milli for request in requests):
        raise InvalidTrace("no request asks for a GPU: no number of them asks for a share of the cluster")
    source = random.Random(seed)
    shuffled = list(requests)
    source.shuffle(shuffled)
    arrivals: list[Request] = []
    asked_milli = 0
    while asked_milli < capacity_milli * ratio:
        place = len(arrivals)
        request = shuffled[place] if place < len(shuffled) else requests[source.randrange(len(requests))]
        arrivals.append(request)
        asked_milli += request.total_milli
    return arrivals


def write_requests(path: Path, requests: Iterable[Request]) -> None:
    """In the format that `read_requests` reads."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("name", *REQUEST_FIELDS))
        for number, it in enumerate(requests):
            row = (it.cpu_milli, it.memory_mib, it.num_gpu, it.gpu_milli, it.gpu_spec)
            writer.writerow((f"request-{number:05d}", *row))


def write_placements(path: Path, outcome: Outcome) -> None:
    """`request,machine,devices,milli`, one row per request that was placed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("request", "machine", "devices", "milli"))
        for number, placement in enumerate(outcome.placements):
            if placement is None:
                continue
            devices = ";".join(str(device.index) for device in placement.devices)
            milli = placement.devices[0].milli if placement.devices else 0
            writer.writerow((number, outcome.serials[placement.machine_index], devices, milli))


def replay(
    machines: Sequence[tuple[str, MachineInfo]],
    requests: Sequence[Request],
    *,
    batch: int = 1,
    objective: Objective = Objective.FRAGMENTATION,
) -> Outcome:
    """Hand the requests to `schedule()` in order, `batch` at a time; each once, nothing departs."""
    snapshot = Snapshot.from_machines(machine for _, machine in machines)
    serial_of = {machine.id: serial for serial, machine in machines}
    capacity_milli = int(snapshot.device_total.sum())
    jobs = _jobs(requests)
    number_of = {job.id: number for number, job in enumerate(jobs)}
    placements: list[Placement | None] = [None] * len(jobs)
    # The trace belongs to one team; fairness between teams has nothing to say.
    policy, state = Policy(objective), SchedulerState()
    gc.collect()
    started, started_cpu = time.perf_counter(), time.process_time()
    plans = [
        schedule(snapshot, jobs[first : first + batch], policy, now=T0, state=state).placements
        for first in range(0, len(jobs), batch)
    ]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    for placement in chain.from_iterable(plans):
        placements[number_of[placement.job_id]] = placement
    at_100: float | None = None
    arrived_milli = placed_milli = 0
    for request, placement in zip(requests, placements, strict=True):
        arrived_milli += request.total_milli
        placed_milli += placement.gpu_milli if placement else 0
        if at_100 is None and arrived_milli >= capacity_milli:
            at_100 = round(100 * placed_milli / max(capacity_milli, 1), 3)
    result = PlacementResult(
        requests=len(jobs),
        placed=sum(placement is not None for placement in placements),
        allocation_at_100=at_100,
        allocation_at_end=round(100 * placed_milli / max(capacity_milli, 1), 3),
        per_s=round(len(jobs) / seconds, 1) if seconds else 0.0,
        seconds=round(seconds, 3),
        cpu_seconds=round(cpu_seconds, 3),
        batch=batch,
        machines=len(machines),
        gpus=capacity_milli // MILLI_PER_UNIT,
    )
    return Outcome(result, placements, [serial_of[machine.id] for machine in snapshot.machines])


def measure(
    machines_path: Path,
    requests_path: Path,
    *,
    batch: int,
    objective: str,
    sample_ratio: float | None,
    seed: int,
    arrivals_out: Path | None,
    out: Path | None,
) -> PlacementResult:
    """What `dante bench placement` does. Raises InvalidTrace and OSError."""
    machines, requests = read_machines(machines_path), read_requests(requests_path)
    if sample_ratio is not None:
        capacity_milli = sum(len(machine.devices) for _, machine in machines) * MILLI_PER_UNIT
        requests = sample(requests, capacity_milli, sample_ratio, seed)
    if arrivals_out is not None:
        write_requests(arrivals_out, requests)
    outcome = replay(machines, requests, batch=batch, objective=Objective(objective))
    if out is not None:
        write_placements(out, outcome)
    return outcome.result


def _jobs(requests: Sequence[Request]) -> list[PendingJob]:
    """One job per request. Equal requests are one object, as they are in a scheduler that reads them once."""
    known: dict[Request, ResourceRequest] = {}
    jobs: list[PendingJob] = []
    for number, request in enumerate(requests):
        resources = known.get(request)
        if resources is None:
            resources = known[request] = _resources(request)
        submitted_at = T0 + timedelta(microseconds=number)
        jobs.append(PendingJob(JobId(UUID(int=number + 1)), TEAM, submitted_at, resources))
    return jobs


def _resources(request: Request) -> ResourceRequest:
    gpu: GpuRequest | None = None
    if request.num_gpu:
        names = tuple(name for name in request.gpu_spec.split("|") if name)
        gpu = GpuRequest(names, request.num_gpu, request.num_gpu, request.gpu_milli)
    return ResourceRequest(gpu, max(request.cpu_milli, 1), request.memory_mib * MIB, 0)


def _rows(path: Path, required: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in required if name not in (reader.fieldnames or ())]
        if missing:
            raise InvalidTrace(
                f"{path}: the first line lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
            )
        for row in reader:
            yield reader.line_num, {name: value or "" for name, value in row.items() if name}


def _int(path: Path, line: int, row: dict[str, str], name: str) -> int:
    text = row[name].strip() or "0"
    if not (text.isascii() and text.isdigit()):
        raise InvalidTrace(f"{path}, line {line}: {name} is a whole number, not {text!r}")
    return int(text)
