"""The inventory as columns: one row per machine, and a (machine, device) matrix. A missing device has 0 milli-GPUs.

A snapshot is never changed; a scheduling round works on a copy of its free columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dantegpu.domain.ids import DeviceId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, MachineInfo
from dantegpu.domain.units import MILLI_PER_UNIT

type Bools = NDArray[np.bool_]
type Ints = NDArray[np.int64]

NOBODY = -1
"""A device that no team shares yet, and the index of a team that owns nothing here."""
MANY = -2
"""A device shared by several teams; nobody else may join."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What one live attempt holds on one machine. `devices` are (device, milli-GPUs)."""

    machine_id: MachineId
    team_id: TeamId
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    devices: tuple[tuple[DeviceId, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TeamUse:
    """What a team's live attempts hold in all."""

    gpu_milli: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0

    def plus(self, gpu_milli: int, cpu_milli: int, memory_bytes: int) -> "TeamUse":
        return TeamUse(self.gpu_milli + gpu_milli, self.cpu_milli + cpu_milli, self.memory_bytes + memory_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Columns over machines (length M) and matrices over their devices (M x G). Build it with `from_machines`."""

    machines: tuple[MachineInfo, ...]
    index_of: Mapping[MachineId, int]
    team_index: Mapping[TeamId, int]
    schedulable: Bools
    own_team_only: Bools
    allows_fractions: Bools
    team: Ints
    region: NDArray[np.str_]
    price_gpu: Ints
    price_cpu: Ints
    cpu_total: Ints
    memory_total: Ints
    disk_total: Ints
    cpu_free: Ints
    memory_free: Ints
    disk_free: Ints
    device_total: Ints
    device_free: Ints
    device_model: Ints
    device_vram: Ints
    device_capability: Ints
    device_tenant: Ints
    models: tuple[str, ...]
    team_use: Mapping[TeamId, TeamUse] = field(default_factory=dict[TeamId, TeamUse])
    overdrawn: frozenset[MachineId] = frozenset()
    """Machines that shrank under their leases: what one of those gives back is not free."""

    @classmethod
    def from_machines(cls, machines: Iterable[MachineInfo], leases: Iterable[Lease] = ()) -> "Snapshot":
        """Machines with what live attempts hold taken off. A lease on an unknown machine or device is ignored.

        Free amounts never go below zero, also when a machine shrank under its leases.
        """
        builder = SnapshotBuilder()
        for machine in machines:
            builder.add_machine(machine)
        for lease in leases:
            builder.add_lease(lease)
        return builder.build()

    def is_overdrawn(self, machine_id: MachineId) -> bool:
        """Is more held there than it has?"""
        return bool(self.overdrawn) and machine_id in self.overdrawn

    def team_number(self, team_id: TeamId) -> int:
        """The team's number in `team` and `device_tenant`; NOBODY when it owns and holds nothing here."""
        return self.team_index.get(team_id, NOBODY)


class SnapshotBuilder:
    """Collects machines and leases, then makes the columns in one go."""

    def __init__(self) -> None:
        self._machines: dict[MachineId, MachineInfo] = {}
        self._leases: list[Lease] = []

    def add_machine(self, machine: MachineInfo) -> None:
        """Add or replace a machine."""
        self._machines[machine.id] = machine

    def remove_machine(self, machine_id: MachineId) -> None:
        self._machines.pop(machine_id, None)

    def add_lease(self, lease: Lease) -> None:
        self._leases.append(lease)

    def build(self) -> Snapshot:
        # In id order: the same inventory gives the same snapshot, however it arrived.
        machines = tuple(sorted(self._machines.values(), key=lambda machine: machine.id))
        index_of = {machine.id: index for index, machine in enumerate(machines)}
        team_index: dict[TeamId, int] = {}
        for team_id in (*(machine.team_id for machine in machines), *(lease.team_id for lease in self._leases)):
            team_index.setdefault(team_id, len(team_index))
        devices = _DeviceColumns(machines)
        cpu_total = _column([machine.cpu_milli for machine in machines])
        memory_total = _column([machine.memory_bytes for machine in machines])
        disk_total = _column([machine.disk_bytes for machine in machines])
        cpu_free, memory_free, disk_free = cpu_total.copy(), memory_total.copy(), disk_total.copy()
        team_use: dict[TeamId, TeamUse] = {}
        for lease in self._leases:
            gpu_milli = sum(milli for _, milli in lease.devices)
            used = team_use.get(lease.team_id, TeamUse())
            team_use[lease.team_id] = used.plus(gpu_milli, lease.cpu_milli, lease.memory_bytes)
            row = index_of.get(lease.machine_id)
            if row is None:
                continue
            cpu_free[row] -= lease.cpu_milli
            memory_free[row] -= lease.memory_bytes
            disk_free[row] -= lease.disk_bytes
            devices.take(row, lease.devices, team_index[lease.team_id])
        over = (cpu_free < 0) | (memory_free < 0) | (disk_free < 0) | (devices.free < 0).any(axis=1)
        overdrawn = frozenset(machines[row].id for row in np.flatnonzero(over))
        for free in (cpu_free, memory_free, disk_free, devices.free):
            np.maximum(free, 0, out=free)
        return Snapshot(
            machines=machines,
            index_of=index_of,
            team_index=team_index,
            schedulable=np.array([machine.schedulable for machine in machines], dtype=np.bool_),
            own_team_only=np.array([machine.simulated or not machine.sandboxed for machine in machines], np.bool_),
            allows_fractions=np.array([machine.allows_fractions for machine in machines], dtype=np.bool_),
            team=_column([team_index[machine.team_id] for machine in machines]),
            region=np.array([machine.region for machine in machines], dtype=np.str_),
            price_gpu=_column([machine.price_udgpu_per_gpu_hour for machine in machines]),
            price_cpu=_column([machine.price_udgpu_per_cpu_hour for machine in machines]),
            cpu_total=cpu_total,
            memory_total=memory_total,
            disk_total=disk_total,
            cpu_free=cpu_free,
            memory_free=memory_free,
            disk_free=disk_free,
            device_total=devices.total,
            device_free=devices.free,
            device_model=devices.model,
            device_vram=devices.vram,
            device_capability=devices.capability,
            device_tenant=devices.tenant,
            models=devices.models,
            team_use=team_use,
            overdrawn=overdrawn,
        )


class _DeviceColumns:
    """The (machine, device) matrices while they are built."""

    def __init__(self, machines: Sequence[MachineInfo]) -> None:
        width = max((len(machine.devices) for machine in machines), default=0)
        shape = (len(machines), width)
        self.total = np.zeros(shape, dtype=np.int64)
        self.model = np.full(shape, -1, dtype=np.int64)
        self.vram = np.zeros(shape, dtype=np.int64)
        self.capability = np.zeros(shape, dtype=np.int64)
        self.tenant = np.full(shape, NOBODY, dtype=np.int64)
        self._withheld = np.zeros(shape, dtype=np.bool_)
        self._column_of: dict[tuple[int, DeviceId], int] = {}
        model_number: dict[str, int] = {}
        for row, machine in enumerate(machines):
            for column, device in enumerate(machine.devices):
                self._set(row, column, device, model_number)
        self.models = tuple(model_number)
        # A withheld device still counts as there, so a job for it waits instead of hearing that there is no such GPU.
        self.free = np.where(self._withheld, 0, self.total)

    def _set(self, row: int, column: int, device: DeviceInfo, model_number: dict[str, int]) -> None:
        self._column_of[row, device.id] = column
        self.total[row, column] = MILLI_PER_UNIT
        self.model[row, column] = model_number.setdefault(device.model, len(model_number))
        self.vram[row, column] = device.vram_bytes
        self.capability[row, column] = device.compute_capability
        self._withheld[row, column] = device.withheld

    def take(self, row: int, devices: Iterable[tuple[DeviceId, int]], team: int) -> None:
        for device_id, milli in devices:
            column = self._column_of.get((row, device_id))
            if column is None:
                continue
            self.free[row, column] -= milli
            tenant = self.tenant[row, column]
            self.tenant[row, column] = team if tenant in (NOBODY, team) else MANY


def _column(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)
