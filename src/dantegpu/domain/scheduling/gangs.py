"""Gangs: all nodes of a job at once, each on a machine of its own, or none.

As no two nodes share a machine, a gang fits exactly when enough machines have room for one node each; nothing has to be
tried and taken back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dantegpu.domain.ids import JobId, TeamId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.pricing import rate_udgpu_per_hour
from dantegpu.domain.scheduling.board import DeviceShare, Placement
from dantegpu.domain.scheduling.constraints import (
    Capacity,
    PendingJob,
    all_of,
    constraint_counts,
    constraint_masks,
    eligible_devices,
    most_at_once,
    prices,
    sites,
    usable_devices,
    waiting_reason,
)
from dantegpu.domain.scheduling.snapshot import NOBODY, Bools, Ints, Snapshot, TeamUse
from dantegpu.domain.units import MILLI_PER_UNIT


@dataclass(frozen=True, slots=True)
class Waits:
    """A job that goes on waiting, and why."""

    job_id: JobId
    reason: QueueReason
    detail: str = ""


def find_gang(snapshot: Snapshot, job: PendingJob) -> list[tuple[int, list[int]]] | Waits:
    """A row and its device columns per node, by rank: GPUs of one model, if possible in one region, the cheapest.

    Avoided machines are taken only when there are too few others.
    """
    masks = constraint_masks(snapshot, job)
    fitting = all_of(snapshot, masks)
    rooms = Rooms.of(snapshot, job, fitting)
    best = _cheapest(snapshot, job, rooms)
    if best is not None:
        rows, model = best
        return [(row, rooms.devices(row, model)) for row in rows]
    count = most_at_once(snapshot, job, fitting)
    if 0 < count < job.nodes:
        where = " in one site" if job.within_a_site else ""
        return Waits(job.id, QueueReason.TOO_FEW_MACHINES, f"{count} fit{where}, {job.nodes} are needed at once.")
    excluded = ", ".join(f"{count.machines_excluded} {count.text}" for count in constraint_counts(masks))
    numbers = [excluded, f"{count} that fit, of which {rooms.most_of_one_model} are free" if count else ""]
    detail = f"{job.nodes} machines are needed at once; {'; '.join(filter(None, numbers))}"
    return Waits(job.id, waiting_reason(snapshot, masks), detail)


@dataclass(frozen=True, slots=True)
class Rooms:
    """Where one node of a job has room. `usable` (M, G) are devices that it could have; None without GPUs."""

    snapshot: Snapshot
    count: int
    milli: int
    rows: Bools
    usable: Bools | None

    @classmethod
    def of(cls, snapshot: Snapshot, job: PendingJob, among: Bools) -> "Rooms":
        request, gpu = job.request, job.request.gpu
        rows = among & (snapshot.cpu_free >= request.cpu_milli)
        rows &= (snapshot.memory_free >= request.memory_bytes) & (snapshot.disk_free >= request.disk_bytes)
        if gpu is None:
            return cls(snapshot, 0, 0, rows, None)
        every = np.arange(len(snapshot.machines))
        team = snapshot.team_number(job.team_id)
        usable = usable_devices(Capacity.of(snapshot), every, gpu, eligible_devices(snapshot, gpu), team)
        return cls(snapshot, gpu.count_min, gpu.milli, rows, usable)

    def models(self) -> list[int | None]:
        if self.usable is None:
            return [None]
        return [int(model) for model in np.unique(self.snapshot.device_model[self.usable & self.rows[:, None]])]

    def rows_with(self, model: int | None) -> Ints:
        """Machines with room for a node whose GPUs are of that model."""
        if self.usable is None or model is None:
            return np.flatnonzero(self.rows)
        alike = (self.usable & (self.snapshot.device_model == model)).sum(axis=1)
        return np.flatnonzero(self.rows & (alike >= self.count))

    @property
    def most_of_one_model(self) -> int:
        return max((len(self.rows_with(model)) for model in self.models()), default=0)

    def devices(self, row: int, model: int | None) -> list[int]:
        """The columns that a node takes there: of a fraction's candidates the fullest one."""
        if self.usable is None:
            return []
        free = self.snapshot.device_free[row]
        columns = np.flatnonzero(self.usable[row] & (self.snapshot.device_model[row] == model)).tolist()
        if self.milli < MILLI_PER_UNIT:
            return sorted(columns, key=lambda column: (int(free[column]), column))[:1]
        return columns[: self.count]


def _cheapest(snapshot: Snapshot, job: PendingJob, rooms: Rooms) -> tuple[list[int], int | None] | None:
    """The machines with the lowest price in all, of one model, within one region unless only several have enough."""
    price = prices(snapshot, job)
    avoided = np.zeros(len(snapshot.machines), dtype=np.bool_)
    avoided[[snapshot.index_of[machine] for machine in job.avoided_machines if machine in snapshot.index_of]] = True
    gpus_free = snapshot.device_free.sum(axis=1)
    found: list[tuple[tuple[int, bool, int, int], list[int], int | None]] = []
    for number, model in enumerate(rooms.models()):
        rows = rooms.rows_with(model)
        if job.within_a_site:
            groups = [(False, group) for group in sites(snapshot, rows[np.argsort(price[rows], kind="stable")])]
        else:
            groups = [(False, rows[snapshot.region[rows] == region]) for region in np.unique(snapshot.region[rows])]
            groups.append((True, rows))
        for scattered, group in groups:
            if len(group) < job.nodes:
                continue
            # The most important key last. The fullest machines first, so that whole ones stay whole.
            order = np.lexsort((group, gpus_free[group], price[group], avoided[group]))
            chosen = group[order[: job.nodes]]
            key = (int(avoided[chosen].sum()), scattered, int(price[chosen].sum()), number)
            found.append((key, chosen.tolist(), model))
    if not found:
        return None
    _, rows, model = min(found, key=lambda it: it[0])
    return rows, model


def placement_at(snapshot: Snapshot, job: PendingJob, row: int, columns: Sequence[int]) -> Placement:
    """One node's place on machine `row` with the devices of these columns."""
    machine, request = snapshot.machines[row], job.request
    milli = request.gpu.milli if request.gpu is not None else 0
    devices = [machine.devices[column] for column in columns]
    return Placement(
        job_id=job.id,
        team_id=job.team_id,
        machine_id=machine.id,
        machine_index=row,
        devices=tuple(DeviceShare(device.id, device.index, milli) for device in devices),
        cpu_milli=request.cpu_milli,
        memory_bytes=request.memory_bytes,
        disk_bytes=request.disk_bytes,
        rate_udgpu_per_hour=rate_udgpu_per_hour(
            gpu_milli=milli * len(devices),
            cpu_milli=request.cpu_milli,
            price_udgpu_per_gpu_hour=machine.price_udgpu_per_gpu_hour,
            price_udgpu_per_cpu_hour=machine.price_udgpu_per_cpu_hour,
            price_percent=job.price_percent,
        ),
    )


def after(snapshot: Snapshot, placements: Iterable[Placement]) -> Snapshot:
    """The snapshot once these are made."""
    cpu, memory, disk = snapshot.cpu_free.copy(), snapshot.memory_free.copy(), snapshot.disk_free.copy()
    device, tenant = snapshot.device_free.copy(), snapshot.device_tenant.copy()
    teams, use = dict(snapshot.team_index), dict(snapshot.team_use)
    for placement in placements:
        row, team_id = placement.machine_index, placement.team_id
        team = _number(teams, team_id)
        cpu[row] -= placement.cpu_milli
        memory[row] -= placement.memory_bytes
        disk[row] -= placement.disk_bytes
        shares = {share.device_id: share.milli for share in placement.devices}
        for column, info in enumerate(snapshot.machines[row].devices):
            if info.id in shares:
                device[row, column] -= shares[info.id]
                if tenant[row, column] == NOBODY:
                    tenant[row, column] = team
        used = use.get(team_id, TeamUse())
        use[team_id] = used.plus(placement.gpu_milli, placement.cpu_milli, placement.memory_bytes)
    return replace(
        snapshot,
        cpu_free=cpu,
        memory_free=memory,
        disk_free=disk,
        device_free=device,
        device_tenant=tenant,
        team_index=teams,
        team_use=use,
    )


def _number(teams: dict[TeamId, int], team_id: TeamId) -> int:
    return teams.setdefault(team_id, len(teams))
