"""What is free while plans are made of one snapshot, and which machines changed since somebody looked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.pricing import FULL_PRICE_PERCENT, rate_udgpu_per_hour
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.constraints import Capacity
from dantegpu.domain.scheduling.snapshot import NOBODY, Bools, Ints, Lease, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT, MicroDgpu

_REMEMBERED_CHANGES = 4096


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A device of the placement's machine; `index` is its place there, `milli` 1000 for the whole of it."""

    device_id: DeviceId
    index: int
    milli: int


class Placement(NamedTuple):
    """A job's place: what the attempt will hold, at which rate."""

    job_id: JobId
    team_id: TeamId
    machine_id: MachineId
    machine_index: int
    devices: tuple[DeviceShare, ...]
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    rate_udgpu_per_hour: MicroDgpu

    @property
    def gpu_milli(self) -> int:
        return sum(device.milli for device in self.devices)

    @property
    def lease(self) -> Lease:
        """What the attempt holds from now on."""
        return Lease(
            self.machine_id,
            self.team_id,
            self.cpu_milli,
            self.memory_bytes,
            self.disk_bytes,
            tuple([(device.device_id, device.milli) for device in self.devices]),
        )


class Board:
    """The one place where free capacity changes. Whoever keeps figures about machines asks for `changed_since`.

    What is free is kept in plain lists, which are read and changed far quicker one at a time; `capacity` has the same
    as columns, brought up to date when they are asked for.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._capacity = capacity = Capacity.of(snapshot)
        self.clock = 1
        """Rises by one with every change of a machine."""
        self._synced = 1
        self._changes: Ints = np.zeros(2 * _REMEMBERED_CHANGES, dtype=np.int64)
        self._changes_end = 0
        """The machines of the last changes, the latest at the end."""
        self.given_back = 0
        """The clock when something became free last. What did not fit since then does not fit now."""
        self.given_back_before = 0
        """The same of the time before."""
        self.changed_at: list[int] = [1] * len(snapshot.machines)
        """The clock at each machine's last change."""
        self._last_change: Ints = np.ones(len(snapshot.machines), dtype=np.int64)
        self.classes, self.class_count = device_classes(snapshot)
        """(M, G): devices with equal numbers are equal to every request."""
        self.class_rows: list[list[int]] = self.classes.tolist()
        models = np.where(snapshot.device_total > 0, snapshot.device_model, -1)
        self.mixed = ((models != models.max(axis=1, initial=-1)[:, None]) & (models >= 0)).any(axis=1)
        """(M,): machines with devices of several models."""
        self.alike = _class_of_all(snapshot, self.classes)
        """(M,): the class of each machine's devices; -1 when they are not alike, or there are none."""
        self.alike_rows: list[int] = self.alike.tolist()
        self.cores: list[int] = capacity.cpu.tolist()
        self.memory: list[int] = capacity.memory.tolist()
        self.disk: list[int] = capacity.disk.tolist()
        self.device: list[list[int]] = capacity.device.tolist()
        self.tenant: list[list[int]] = capacity.tenant.tolist()
        self.gpu_milli: list[int] = capacity.device.sum(axis=1).tolist()
        """What all devices of a machine have left together."""
        self._untouched: Ints = _untouched(capacity.device, capacity.tenant).sum(axis=1)
        self.untouched_rows: list[int] = self._untouched.tolist()
        # Teams that own and hold nothing yet get a number here, or two of them could share a device.
        self._teams = dict(snapshot.team_index)
        self._team_numbers = {team_id.uuid.int: number for team_id, number in self._teams.items()}
        self._shares: dict[tuple[int, int, int], DeviceShare] = {}

    def team_number(self, team_id: TeamId) -> int:
        number = self._team_numbers.get(team_id.uuid.int)
        if number is None:
            number = self._teams[team_id] = self._team_numbers[team_id.uuid.int] = len(self._teams)
        return number

    def changed_since(self, clock: int) -> Ints | None:
        """Machines that changed after that time, some of them several times; None when that is not known any more."""
        count, end = self.clock - clock, self._changes_end
        return None if count > end else self._changes[end - count : end]

    @property
    def capacity(self) -> Capacity:
        """What is free, as columns; true until the next change."""
        self._sync()
        return self._capacity

    @property
    def untouched(self) -> Ints:
        """(M,): devices that nobody has a part of."""
        self._sync()
        return self._untouched

    @property
    def last_change(self) -> Ints:
        """(M,): `changed_at` as a column."""
        self._sync()
        return self._last_change

    def _sync(self) -> None:
        if self._synced == self.clock:
            return
        at, capacity = self.changed_since(self._synced), self._capacity
        assert at is not None, "nothing is forgotten before it is here"
        rows: list[int] = at.tolist()
        columns: tuple[tuple[Ints, list[int] | list[list[int]]], ...] = (
            (capacity.cpu, self.cores),
            (capacity.memory, self.memory),
            (capacity.disk, self.disk),
            (capacity.device, self.device),
            (capacity.tenant, self.tenant),
            (self._untouched, self.untouched_rows),
            (self._last_change, self.changed_at),
        )
        for column, values in columns:
            if len(rows) == 1:
                column[rows[0]] = values[rows[0]]
            else:
                column[at] = [values[row] for row in rows]
        self._synced = self.clock

    def _changed(self, row: int) -> None:
        if self._changes_end == len(self._changes):
            self._sync()
            self._changes[:_REMEMBERED_CHANGES] = self._changes[_REMEMBERED_CHANGES:]
            self._changes_end = _REMEMBERED_CHANGES
        self.clock += 1
        self.changed_at[row] = self.clock
        self._changes[self._changes_end] = row
        self._changes_end += 1

    @property
    def free(self) -> Snapshot:
        """The snapshot with what is free now; true until the next change."""
        capacity = self.capacity
        return replace(
            self.snapshot,
            cpu_free=capacity.cpu,
            memory_free=capacity.memory,
            disk_free=capacity.disk,
            device_free=capacity.device,
            device_tenant=capacity.tenant,
            team_index=self._teams,
        )

    def take(
        self,
        job_id: JobId,
        team_id: TeamId,
        request: ResourceRequest,
        row: int,
        columns: Sequence[int],
        price_percent: int = FULL_PRICE_PERCENT,
    ) -> Placement:
        """Give the job these devices of machine `row`; the caller has seen that they are free."""
        machine, gpu = self.snapshot.machines[row], request.gpu
        self.cores[row] -= request.cpu_milli
        self.memory[row] -= request.memory_bytes
        self.disk[row] -= request.disk_bytes
        devices: tuple[DeviceShare, ...] = ()
        gpu_milli = 0
        if gpu is not None:
            milli, free, tenant = gpu.milli, self.device[row], self.tenant[row]
            team = self.team_number(team_id)
            for column in columns:
                free[column] -= milli
                if tenant[column] == NOBODY:
                    tenant[column] = team
                    self.untouched_rows[row] -= 1
            devices = tuple([self._share(row, column, milli) for column in columns])
            gpu_milli = milli * len(columns)
            self.gpu_milli[row] -= gpu_milli
        self._changed(row)
        return Placement(
            job_id,
            team_id,
            machine.id,
            row,
            devices,
            request.cpu_milli,
            request.memory_bytes,
            request.disk_bytes,
            rate_udgpu_per_hour(
                gpu_milli=gpu_milli,
                cpu_milli=request.cpu_milli,
                price_udgpu_per_gpu_hour=machine.price_udgpu_per_gpu_hour,
                price_udgpu_per_cpu_hour=machine.price_udgpu_per_cpu_hour,
                price_percent=price_percent,
            ),
        )

    def give_back(self, leases: Iterable[Lease]) -> None:
        """What these held is free again. Leases on machines or devices that the snapshot lacks are ignored."""
        for lease in leases:
            row = self.snapshot.index_of.get(lease.machine_id)
            if row is None:
                continue
            self.cores[row] += lease.cpu_milli
            self.memory[row] += lease.memory_bytes
            self.disk[row] += lease.disk_bytes
            free, tenant = self.device[row], self.tenant[row]
            for device_id, milli in lease.devices:
                column = self._column_of(row, device_id)
                if column is None:
                    continue
                free[column] += milli
                self.gpu_milli[row] += milli
                if free[column] >= MILLI_PER_UNIT:
                    tenant[column] = NOBODY
            if lease.devices:
                pairs = zip(free, tenant, strict=True)
                self.untouched_rows[row] = sum([milli >= MILLI_PER_UNIT and team == NOBODY for milli, team in pairs])
            self._changed(row)
        self.given_back_before, self.given_back = self.given_back, self.clock

    def _column_of(self, row: int, device_id: DeviceId) -> int | None:
        for column, device in enumerate(self.snapshot.machines[row].devices):
            if device.id is device_id or device.id == device_id:
                return column
        return None

    def _share(self, row: int, column: int, milli: int) -> DeviceShare:
        share = self._shares.get((row, column, milli))
        if share is None:
            device = self.snapshot.machines[row].devices[column]
            share = self._shares[row, column, milli] = DeviceShare(device.id, device.index, milli)
        return share


def _untouched(free_milli: Ints, tenant: Ints) -> Bools:
    return (free_milli >= MILLI_PER_UNIT) & (tenant == NOBODY)


def _class_of_all(snapshot: Snapshot, classes: Ints) -> Ints:
    there = snapshot.device_total > 0
    if not there.size:
        return np.full(len(snapshot.machines), -1, dtype=np.int64)
    first = classes[:, 0]
    return np.where(there[:, 0] & ((classes == first[:, None]) | ~there).all(axis=1), first, -1)


def device_classes(snapshot: Snapshot) -> tuple[Ints, int]:
    """(M, G): devices with equal numbers are equal to every request."""
    if not snapshot.device_total.size:
        return np.zeros(snapshot.device_total.shape, dtype=np.int64), 1
    columns = (snapshot.device_total, snapshot.device_model, snapshot.device_vram, snapshot.device_capability)
    kinds = np.stack([column.ravel() for column in columns], axis=1)
    _, numbers = np.unique(kinds, axis=0, return_inverse=True)
    return numbers.reshape(snapshot.device_total.shape).astype(np.int64), int(numbers.max()) + 1
