"""`dante why`: which constraint excludes how many machines, and the smallest single change that would open one."""

from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from dantegpu.domain.job import QueueReason
from dantegpu.domain.resources import CapabilityRange, GpuRequest, ResourceRequest, format_capability
from dantegpu.domain.scheduling.constraints import (
    Capacity,
    Constraint,
    ConstraintCount,
    PendingJob,
    all_of,
    constraint_counts,
    constraint_masks,
    free_now,
    most_at_once,
    prices,
    waiting_reason,
)
from dantegpu.domain.scheduling.snapshot import Bools, Snapshot
from dantegpu.domain.units import (
    MILLI_PER_UNIT,
    MemoryRange,
    format_bytes,
    format_dgpu,
)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One change of the job file and what it would open. `machines` counts machines that did not fit before."""

    field: str
    before: str
    after: str
    machines: int
    machines_free: int

    @property
    def available_now(self) -> bool:
        """The job would start at once."""
        return self.machines_free > 0

    @property
    def text(self) -> str:
        """`max_price 2.10 -> 2.40: 14 machines, start now`"""
        count = f"{self.machines} machine{'' if self.machines == 1 else 's'}"
        when = "start now" if self.available_now else f"busy: all {self.machines}"
        return f"{self.field} {self.before} -> {self.after}: {count}, {when}"


@dataclass(frozen=True, slots=True)
class Why:
    """Why a job waits, or that it fits. `machines_free` of the `machines_fitting` could take it at this moment."""

    reason: QueueReason | None
    machines_total: int
    machines_fitting: int
    machines_free: int
    constraints: tuple[ConstraintCount, ...]
    relaxations: tuple[Relaxation, ...]


def explain(snapshot: Snapshot, job: PendingJob, now: datetime) -> Why:
    """What stands between the job and a machine. `reason` is None when a machine could take it now."""
    masks = constraint_masks(snapshot, job)
    fitting = all_of(snapshot, masks)
    free = fitting & free_now(snapshot, Capacity.of(snapshot), job)
    free_at_once = most_at_once(snapshot, job, free)
    starts = free_at_once >= job.nodes
    relaxations: list[Relaxation] = []
    if job.not_before is not None and job.not_before > now:
        reason: QueueReason | None = QueueReason.WAITING_FOR_RETRY
    elif not starts and 0 < most_at_once(snapshot, job, fitting) < job.nodes:
        reason = QueueReason.TOO_FEW_MACHINES
    else:
        reason = None if starts else waiting_reason(snapshot, masks)
    if not starts:
        fewer = free_at_once or min(most_at_once(snapshot, job, fitting), job.nodes - 1)
        if fewer:
            relaxations.append(Relaxation("nodes", str(job.nodes), str(fewer), fewer, free_at_once))
        for constraint in masks:
            change = _smallest_change(snapshot, job, constraint, all_of(snapshot, masks, but=constraint))
            if change is not None and (relaxation := _measure(snapshot, change, fitting)) is not None:
                relaxations.append(relaxation)
    return Why(
        reason,
        len(snapshot.machines),
        int(fitting.sum()),
        int(free.sum()),
        constraint_counts(masks),
        tuple(sorted(relaxations, key=lambda it: (not it.available_now, -it.machines_free, -it.machines, it.field))),
    )


@dataclass(frozen=True, slots=True)
class _Change:
    field: str
    before: str
    after: str
    job: PendingJob


def _measure(snapshot: Snapshot, change: _Change, fitting_before: Bools) -> Relaxation | None:
    """What the changed job would find that the job as it is does not."""
    opened = all_of(snapshot, constraint_masks(snapshot, change.job)) & ~fitting_before
    if not opened.any():
        return None
    free = opened & free_now(snapshot, Capacity.of(snapshot), change.job)
    return Relaxation(change.field, change.before, change.after, int(opened.sum()), int(free.sum()))


def _smallest_change(snapshot: Snapshot, job: PendingJob, constraint: Constraint, others: Bools) -> _Change | None:
    """The least that `constraint` must give way so that one machine of `others` (those that meet the rest) fits."""
    if not others.any():
        return None
    match constraint:
        case Constraint.MAX_PRICE:
            return _higher_price(snapshot, job, others)
        case Constraint.CPU | Constraint.MEMORY | Constraint.DISK:
            return _smaller_host(snapshot, job, constraint, others)
        case Constraint.REGION:
            return _more_regions(snapshot, job, others)
        case Constraint.GPU_MODEL | Constraint.VRAM | Constraint.COMPUTE_CAPABILITY | Constraint.GPU_COUNT:
            return _other_gpu(snapshot, job, constraint, others)
        case Constraint.FRACTION:
            gpu = job.request.gpu
            whole = None if gpu is None else _with_gpu(job, replace(gpu, milli=MILLI_PER_UNIT))
            return None if gpu is None or whole is None else _Change("gpu", str(gpu), str(whole.request.gpu), whole)
        case Constraint.NETWORK:
            return _Change("network", "true", "false", replace(job, network=False, ports=False))
        case Constraint.SITE:
            return _Change("network", "true", "false", replace(job, network=False, ports=False))
        case Constraint.PORTS:
            return _Change("ports", "some", "none", replace(job, ports=False))
        case (
            Constraint.STATUS | Constraint.OWNERSHIP | Constraint.SANDBOX | Constraint.IMAGE
            | Constraint.ALLOWED_IMAGES | Constraint.EXCLUDED
        ):  # fmt: skip
            # Not the submitter's to change.
            return None


def _higher_price(snapshot: Snapshot, job: PendingJob, others: Bools) -> _Change | None:
    limit = job.max_price_udgpu_per_hour
    asked = prices(snapshot, job)
    if limit is None:
        return None
    # A price that opens a free machine is worth more than a lower one that opens a busy one.
    above = others & (asked > limit)
    free = above & free_now(snapshot, Capacity.of(snapshot), job)
    opened = free if free.any() else above
    if not opened.any():
        return None
    price = int(asked[opened].min())
    return _Change("max_price", format_dgpu(limit), format_dgpu(price), replace(job, max_price_udgpu_per_hour=price))


def _smaller_host(snapshot: Snapshot, job: PendingJob, constraint: Constraint, others: Bools) -> _Change | None:
    request = job.request
    if constraint is Constraint.CPU:
        largest = int(snapshot.cpu_total[others].max())
        if not 1 <= largest < request.cpu_milli:
            return None
        smaller = replace(request, cpu_milli=largest)
        return _Change("cpu", _cores(request), _cores(smaller), replace(job, request=smaller))
    if constraint is Constraint.MEMORY:
        largest = int(snapshot.memory_total[others].max())
        before, smaller = request.memory_bytes, replace(request, memory_bytes=largest)
    else:
        largest = int(snapshot.disk_total[others].max())
        before, smaller = request.disk_bytes, replace(request, disk_bytes=largest)
    if largest >= before:
        return None
    return _Change(constraint.value, format_bytes(before), format_bytes(largest), replace(job, request=smaller))


def _cores(request: ResourceRequest) -> str:
    return f"{request.cpu_milli / MILLI_PER_UNIT:g}"


def _more_regions(snapshot: Snapshot, job: PendingJob, others: Bools) -> _Change | None:
    elsewhere = others & ~np.isin(snapshot.region, sorted(job.regions))
    names, counts = np.unique(snapshot.region[elsewhere], return_counts=True)
    if not len(names):
        return None
    region = str(names[int(np.argmax(counts))])
    wider = job.regions | {region}
    return _Change("regions", ", ".join(sorted(job.regions)), ", ".join(sorted(wider)), replace(job, regions=wider))


def _other_gpu(snapshot: Snapshot, job: PendingJob, constraint: Constraint, others: Bools) -> _Change | None:
    """Try what machines that meet the rest have; take the first change that fits one of them."""
    gpu = job.request.gpu
    if gpu is None:
        return None
    for changed in _gpu_changes(snapshot, gpu, constraint, others):
        wider = _with_gpu(job, changed)
        if (all_of(snapshot, constraint_masks(snapshot, wider)) & others).any():
            before, after = _gpu_field(gpu, constraint), _gpu_field(changed, constraint)
            return _Change(_GPU_FIELDS[constraint], before, after, wider)
    return None


_GPU_FIELDS = {
    Constraint.GPU_MODEL: "gpu.name",
    Constraint.VRAM: "gpu.memory",
    Constraint.COMPUTE_CAPABILITY: "gpu.compute_capability",
    Constraint.GPU_COUNT: "gpu.count",
}


def _gpu_changes(snapshot: Snapshot, gpu: GpuRequest, constraint: Constraint, others: Bools) -> list[GpuRequest]:
    """Single changes of the request, the smallest first."""
    present = others[:, None] & (snapshot.device_total > 0)
    match constraint:
        case Constraint.GPU_MODEL:
            counts = np.bincount(snapshot.device_model[present], minlength=len(snapshot.models))
            common_first = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
            models = [snapshot.models[number] for number in common_first]
            return [replace(gpu, names=(*gpu.names, model)) for model in models if not gpu.accepts_model(model)]
        case Constraint.GPU_COUNT:
            return [replace(gpu, count_min=count) for count in range(gpu.count_min - 1, 0, -1)]
        case Constraint.VRAM if gpu.vram is not None:
            low, high = gpu.vram.minimum_bytes, gpu.vram.maximum_bytes
            sizes = np.unique(snapshot.device_vram[present]).tolist()
            smaller = [MemoryRange(size, high) for size in reversed(sizes) if size < low]
            larger = [MemoryRange(low, size) for size in sizes if high is not None and size > high]
            return [replace(gpu, vram=sizes) for sizes in (*smaller, *larger)]
        case Constraint.COMPUTE_CAPABILITY if gpu.compute_capability is not None:
            low, high = gpu.compute_capability.minimum, gpu.compute_capability.maximum
            known = [value for value in np.unique(snapshot.device_capability[present]).tolist() if value]
            older = [CapabilityRange(value, high) for value in reversed(known) if value < low]
            newer = [CapabilityRange(low, value) for value in known if high is not None and value > high]
            return [replace(gpu, compute_capability=values) for values in (*older, *newer)]
        case _:
            return []


def _gpu_field(gpu: GpuRequest, constraint: Constraint) -> str:
    match constraint:
        case Constraint.GPU_MODEL:
            return ", ".join(gpu.names)
        case Constraint.VRAM:
            return "" if gpu.vram is None else str(gpu.vram)
        case Constraint.COMPUTE_CAPABILITY:
            if gpu.compute_capability is None:
                return ""
            return str(gpu.compute_capability) or format_capability(gpu.compute_capability.minimum)
        case _:
            return str(gpu.count_min)


def _with_gpu(job: PendingJob, gpu: GpuRequest) -> PendingJob:
    return replace(job, request=replace(job.request, gpu=gpu))
