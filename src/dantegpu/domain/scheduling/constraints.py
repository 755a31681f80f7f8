"""Which machines can take a job: one boolean column per constraint, over what machines have and what is free."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np

from dantegpu.domain.ids import JobId, MachineId, TeamId
from dantegpu.domain.images import ImageReference, InvalidImage
from dantegpu.domain.job import QueueReason
from dantegpu.domain.pricing import FULL_PRICE_PERCENT
from dantegpu.domain.resources import VRAM_TOLERANCE_MILLI, GpuRequest, ResourceRequest
from dantegpu.domain.scheduling.snapshot import NOBODY, Bools, Ints, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT


@dataclass(frozen=True, slots=True)
class PendingJob:
    """A queued job as placement sees it.

    `max_price_udgpu_per_hour` is per GPU-hour, or per core-hour for a job without GPUs; None takes any price.
    `requires_sandbox`: never on a machine that cannot isolate it, not even an own one. `image`: its whole name, if any.
    A job with several `nodes` is a gang: each takes the whole request on a machine of its own, all or none.
    `excluded_machines` are never taken, `avoided_machines` only when nothing else fits. `regions` empty: anywhere.
    `ports`: it publishes some. `spot` work may be preempted, and pays only `price_percent` of what machines ask.
    """

    id: JobId
    team_id: TeamId
    submitted_at: datetime
    request: ResourceRequest
    priority: int = 50
    max_price_udgpu_per_hour: int | None = None
    regions: frozenset[str] = frozenset()
    requires_sandbox: bool = False
    image: str = ""
    network: bool = False
    ports: bool = False
    excluded_machines: frozenset[MachineId] = frozenset()
    avoided_machines: frozenset[MachineId] = frozenset()
    not_before: datetime | None = None
    nodes: int = 1
    max_duration_seconds: int | None = None
    spot: bool = False
    price_percent: int = FULL_PRICE_PERCENT

    @property
    def within_a_site(self) -> bool:
        """Its nodes are containers, and reach one another only on machines of one site."""
        return self.nodes > 1 and self.network and bool(self.image)

    @property
    def standing(self) -> int:
        """The higher goes first: by priority, then on-demand before spot, which would only be preempted again."""
        return 2 * self.priority + (not self.spot)

    @property
    def shape(self) -> tuple[object, ...]:
        """Two jobs of one shape fit the same machines. The team comes first: most machines do not tell teams apart."""
        return (
            self.team_id,
            self.request,
            self.max_price_udgpu_per_hour,
            self.regions,
            self.requires_sandbox,
            self.image,
            self.network,
            self.ports,
            self.excluded_machines,
            self.nodes,
            self.spot,
            self.price_percent,
        )


class Constraint(StrEnum):
    """In the order in which a waiting job's reason is looked for."""

    STATUS = "status"
    GPU_MODEL = "gpu_model"
    VRAM = "vram"
    COMPUTE_CAPABILITY = "compute_capability"
    FRACTION = "fraction"
    GPU_COUNT = "gpu_count"
    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    OWNERSHIP = "ownership"
    SANDBOX = "sandbox"
    IMAGE = "image"
    ALLOWED_IMAGES = "allowed_images"
    NETWORK = "network"
    PORTS = "ports"
    SITE = "site"
    REGION = "region"
    EXCLUDED = "excluded"
    MAX_PRICE = "max_price"

    @property
    def text(self) -> str:
        return _TEXTS[self]

    @property
    def reason(self) -> QueueReason:
        """Why a job waits for which this constraint leaves no machine."""
        return _REASONS[self]


_TEXTS: Mapping[Constraint, str] = {
    Constraint.STATUS: "offline, paused, draining or in quarantine",
    Constraint.GPU_MODEL: "no such GPU model",
    Constraint.VRAM: "GPU memory out of the requested range",
    Constraint.COMPUTE_CAPABILITY: "compute capability out of the requested range",
    Constraint.FRACTION: "does not share its GPUs",
    Constraint.GPU_COUNT: "too few such GPUs",
    Constraint.CPU: "too few CPU cores",
    Constraint.MEMORY: "too little memory",
    Constraint.DISK: "too little disk",
    Constraint.OWNERSHIP: "takes only its own team's jobs (simulated GPUs or no sandbox)",
    Constraint.SANDBOX: "cannot isolate jobs",
    Constraint.IMAGE: "does not run container images",
    Constraint.ALLOWED_IMAGES: "its owner does not allow this image",
    Constraint.NETWORK: "gives such jobs no network",
    Constraint.PORTS: "publishes no ports of jobs",
    Constraint.SITE: "is in no site in which nodes with an image reach one another",
    Constraint.REGION: "in another region",
    Constraint.EXCLUDED: "excluded for this job",
    Constraint.MAX_PRICE: "costs more than max_price",
}

_REASONS: Mapping[Constraint, QueueReason] = {
    Constraint.STATUS: QueueReason.NO_PROVIDER_ONLINE,
    Constraint.GPU_MODEL: QueueReason.NO_MATCHING_GPU,
    Constraint.VRAM: QueueReason.NO_MATCHING_GPU,
    Constraint.COMPUTE_CAPABILITY: QueueReason.NO_MATCHING_GPU,
    Constraint.FRACTION: QueueReason.NO_MATCHING_GPU,
    Constraint.GPU_COUNT: QueueReason.NO_MATCHING_GPU,
    Constraint.CPU: QueueReason.NO_MATCHING_MACHINE,
    Constraint.MEMORY: QueueReason.NO_MATCHING_MACHINE,
    Constraint.DISK: QueueReason.NO_MATCHING_MACHINE,
    Constraint.OWNERSHIP: QueueReason.RESTRICTED,
    Constraint.SANDBOX: QueueReason.RESTRICTED,
    Constraint.IMAGE: QueueReason.NO_MATCHING_MACHINE,
    Constraint.ALLOWED_IMAGES: QueueReason.NO_MATCHING_MACHINE,
    Constraint.NETWORK: QueueReason.NO_MATCHING_MACHINE,
    Constraint.PORTS: QueueReason.NO_MATCHING_MACHINE,
    Constraint.SITE: QueueReason.NO_MATCHING_MACHINE,
    Constraint.REGION: QueueReason.RESTRICTED,
    Constraint.EXCLUDED: QueueReason.RESTRICTED,
    Constraint.MAX_PRICE: QueueReason.PRICE_ABOVE_MAX,
}


@dataclass(frozen=True, slots=True)
class ConstraintCount:
    """How many machines one constraint excludes, each constraint counted for itself."""

    constraint: Constraint
    machines_excluded: int

    @property
    def text(self) -> str:
        return self.constraint.text


@dataclass(frozen=True, slots=True)
class Capacity:
    """What is free while a round goes on. The arrays change; the snapshot they were copied from does not."""

    cpu: Ints
    memory: Ints
    disk: Ints
    device: Ints
    tenant: Ints

    @classmethod
    def of(cls, snapshot: Snapshot) -> "Capacity":
        return cls(
            snapshot.cpu_free.copy(),
            snapshot.memory_free.copy(),
            snapshot.disk_free.copy(),
            snapshot.device_free.copy(),
            snapshot.device_tenant.copy(),
        )


def eligible_devices(snapshot: Snapshot, gpu: GpuRequest) -> Bools:
    """(M, G): devices whose model, memory and compute capability satisfy the request, free or not."""
    return _models(snapshot, gpu) & _vram(snapshot, gpu) & _capability(snapshot, gpu)


def usable_devices(capacity: Capacity, rows: Ints, gpu: GpuRequest, eligible: Bools, team: int) -> Bools:
    """(rows, G): eligible devices with the requested share free. A device in parts belongs to one team at a time."""
    usable = eligible[rows] & (capacity.device[rows] >= gpu.milli)
    if gpu.milli < MILLI_PER_UNIT:
        tenant = capacity.tenant[rows]
        usable &= (tenant == NOBODY) | ((tenant == team) & (team != NOBODY))
    return usable


def has_count_of_one_model(devices: Bools, models: Ints, count: int) -> Bools:
    """(rows,): are `count` of the marked devices of one model? A job's GPUs are all alike."""
    enough = devices.sum(axis=1) >= count
    if count == 1 or not enough.any():
        return enough
    alike = np.zeros_like(enough)
    for model in np.unique(models[devices]):
        alike |= (devices & (models == model)).sum(axis=1) >= count
    return alike


def constraint_masks(snapshot: Snapshot, job: PendingJob) -> dict[Constraint, Bools]:
    """For each constraint that the job has: the machines that meet it, whether or not they are busy."""
    request, gpu = job.request, job.request.gpu
    masks: dict[Constraint, Bools] = {Constraint.STATUS: snapshot.schedulable}
    if gpu is not None:
        masks |= _gpu_masks(snapshot, gpu)
    masks[Constraint.CPU] = snapshot.cpu_total >= request.cpu_milli
    masks[Constraint.MEMORY] = snapshot.memory_total >= request.memory_bytes
    masks[Constraint.DISK] = snapshot.disk_total >= request.disk_bytes
    masks[Constraint.OWNERSHIP] = ~snapshot.own_team_only | (snapshot.team == snapshot.team_number(job.team_id))
    if job.requires_sandbox:
        masks[Constraint.SANDBOX] = np.array([machine.sandboxed for machine in snapshot.machines], dtype=np.bool_)
    if job.image:
        masks[Constraint.IMAGE] = np.array([machine.runs_images for machine in snapshot.machines], dtype=np.bool_)
        masks[Constraint.ALLOWED_IMAGES] = _allowing(snapshot, job.image)
    if job.network:
        kind = "image" if job.image else "plain"
        masks[Constraint.NETWORK] = np.array([kind in machine.networks for machine in snapshot.machines], np.bool_)
    if job.ports:
        masks[Constraint.PORTS] = np.array(["ports" in machine.networks for machine in snapshot.machines], np.bool_)
    if job.within_a_site:
        masks[Constraint.SITE] = np.array(["gang" in machine.networks for machine in snapshot.machines], np.bool_)
    if job.regions:
        masks[Constraint.REGION] = np.isin(snapshot.region, sorted(job.regions))
    if job.excluded_machines:
        masks[Constraint.EXCLUDED] = _all_but(snapshot, job.excluded_machines)
    if job.max_price_udgpu_per_hour is not None:
        masks[Constraint.MAX_PRICE] = prices(snapshot, job) <= job.max_price_udgpu_per_hour
    return masks


def prices(snapshot: Snapshot, job: PendingJob) -> Ints:
    """(M,): what the job would pay per GPU-hour, or per core-hour for a job without GPUs."""
    asked = snapshot.price_cpu if job.request.gpu is None else snapshot.price_gpu
    return asked if job.price_percent == FULL_PRICE_PERCENT else -(-asked * job.price_percent // FULL_PRICE_PERCENT)


def all_of(snapshot: Snapshot, masks: Mapping[Constraint, Bools], but: Constraint | None = None) -> Bools:
    """Machines that meet every constraint, one left out on request."""
    fitting = np.ones(len(snapshot.machines), dtype=np.bool_)
    for constraint, mask in masks.items():
        if constraint is not but:
            fitting &= mask
    return fitting


def free_now(snapshot: Snapshot, capacity: Capacity, job: PendingJob) -> Bools:
    """(M,): machines with enough free for the job at this moment."""
    request, gpu = job.request, job.request.gpu
    free = capacity.cpu >= request.cpu_milli
    free &= capacity.memory >= request.memory_bytes
    free &= capacity.disk >= request.disk_bytes
    if gpu is not None:
        every = np.arange(len(snapshot.machines))
        usable = usable_devices(
            capacity, every, gpu, eligible_devices(snapshot, gpu), snapshot.team_number(job.team_id)
        )
        free &= has_count_of_one_model(usable, snapshot.device_model, gpu.count_min)
    return free


def sites(snapshot: Snapshot, rows: Ints) -> list[Ints]:
    """Of these machines, those of each site, in the order given: of several daemons on one host only the first."""
    by_site: dict[tuple[TeamId, str], dict[str, int]] = {}
    for row in map(int, rows):
        machine = snapshot.machines[row]
        by_site.setdefault((machine.team_id, machine.site), {}).setdefault(machine.address, row)
    return [np.array(list(rows_of.values()), dtype=np.int64) for rows_of in by_site.values()]


def most_at_once(snapshot: Snapshot, job: PendingJob, fitting: Bools) -> int:
    """How many nodes of the job these machines could take together."""
    if not job.within_a_site:
        return int(fitting.sum())
    return max((len(rows) for rows in sites(snapshot, np.flatnonzero(fitting))), default=0)


def waiting_reason(snapshot: Snapshot, masks: Mapping[Constraint, Bools]) -> QueueReason:
    """The first constraint that leaves no machine, in the order of `Constraint`; NO_CAPACITY when machines fit."""
    left = np.ones(len(snapshot.machines), dtype=np.bool_)
    for constraint in Constraint:
        mask = masks.get(constraint)
        if mask is None:
            continue
        left &= mask
        if not left.any():
            return constraint.reason
    return QueueReason.NO_CAPACITY


def constraint_counts(masks: Mapping[Constraint, Bools]) -> tuple[ConstraintCount, ...]:
    """Only constraints that exclude a machine."""
    counts = (ConstraintCount(constraint, int((~mask).sum())) for constraint, mask in masks.items())
    return tuple(count for count in counts if count.machines_excluded)


def _gpu_masks(snapshot: Snapshot, gpu: GpuRequest) -> dict[Constraint, Bools]:
    models, vram, capability = _models(snapshot, gpu), _vram(snapshot, gpu), _capability(snapshot, gpu)
    masks = {Constraint.GPU_MODEL: (models & (snapshot.device_total > 0)).any(axis=1)}
    possible = masks[Constraint.GPU_MODEL]
    for constraint, asked, devices in (
        (Constraint.VRAM, gpu.vram, vram),
        (Constraint.COMPUTE_CAPABILITY, gpu.compute_capability, capability),
    ):
        if asked is not None:
            masks[constraint] = devices.any(axis=1)
            possible = possible & masks[constraint]
    if gpu.milli < MILLI_PER_UNIT:
        masks[Constraint.FRACTION] = snapshot.allows_fractions
    # The count is to blame only where such GPUs are there at all.
    enough = has_count_of_one_model(models & vram & capability, snapshot.device_model, gpu.count_min)
    masks[Constraint.GPU_COUNT] = ~possible | enough
    return masks


def _models(snapshot: Snapshot, gpu: GpuRequest) -> Bools:
    if not gpu.names:
        return snapshot.device_model >= 0
    accepted = [number for number, model in enumerate(snapshot.models) if gpu.accepts_model(model)]
    return np.isin(snapshot.device_model, accepted)


def _vram(snapshot: Snapshot, gpu: GpuRequest) -> Bools:
    if gpu.vram is None:
        return snapshot.device_total > 0
    enough = snapshot.device_vram * 1000 >= gpu.vram.minimum_bytes * VRAM_TOLERANCE_MILLI
    if gpu.vram.maximum_bytes is not None:
        enough &= snapshot.device_vram <= gpu.vram.maximum_bytes
    return enough & (snapshot.device_total > 0)


def _capability(snapshot: Snapshot, gpu: GpuRequest) -> Bools:
    if gpu.compute_capability is None:
        return snapshot.device_total > 0
    meets = snapshot.device_capability >= gpu.compute_capability.minimum
    if gpu.compute_capability.maximum is not None:
        meets &= snapshot.device_capability <= gpu.compute_capability.maximum
    return meets & (snapshot.device_total > 0)


def _allowing(snapshot: Snapshot, image: str) -> Bools:
    """(M,): machines whose owners let this image run. Most say nothing about it, and many the same."""
    try:
        reference = ImageReference.parse(image)
    except InvalidImage:
        # Refused at submission; what came here all the same must not stop everybody's placement.
        return np.zeros(len(snapshot.machines), dtype=np.bool_)
    answers: dict[tuple[str, ...], bool] = {(): True}
    for machine in snapshot.machines:
        if machine.allowed_images not in answers:
            answers[machine.allowed_images] = reference.matches(machine.allowed_images)
    return np.array([answers[machine.allowed_images] for machine in snapshot.machines], dtype=np.bool_)


def _all_but(snapshot: Snapshot, machine_ids: frozenset[MachineId]) -> Bools:
    mask = np.ones(len(snapshot.machines), dtype=np.bool_)
    mask[[snapshot.index_of[machine_id] for machine_id in machine_ids if machine_id in snapshot.index_of]] = False
    return mask
