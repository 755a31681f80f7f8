"""Reservations: who is first and cannot start is not passed by for ever.

Jobs that ask for less would take all that becomes free, and one that needs more of it at once would wait for ever:
several GPUs, several machines, a whole GPU among parts of them, or one GPU with many cores. So the first jobs that
cannot start get reservations: the machines, devices and moment at which each starts at the latest, as running jobs end
by their max_duration. Jobs behind them start meanwhile only if they end before that or leave alone what is reserved.
Source: Lifka, "The ANL/IBM SP Scheduling System", JSSPP 1995 (EASY backfill), for more than one job.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from heapq import merge
from itertools import count
from uuid import UUID

import numpy as np

from dantegpu.domain.ids import DeviceId
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.board import Placement
from dantegpu.domain.scheduling.constraints import (
    PendingJob,
    all_of,
    constraint_masks,
    eligible_devices,
    prices,
    sites,
)
from dantegpu.domain.scheduling.gangs import Rooms
from dantegpu.domain.scheduling.snapshot import NOBODY, Lease, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT, format_duration

MARGIN_SECONDS = 60
"""How much longer than its max_duration a job may hold its devices: it is prepared before and stopped after."""
MAX_RESERVATIONS = 4
"""For so many large jobs, and for so many others. What comes after them is passed by until it is one of the first."""
MAX_LOOKS = 16
"""Jobs for which a round looks for a reservation. Not each finds one: a machine is reserved for one job at most."""
MAX_BLOCKED = 64
"""Jobs that are kept in mind for it."""

NO_MODEL = -1


@dataclass(frozen=True, slots=True)
class Running:
    """What a live attempt holds, and when it will have ended at the latest."""

    lease: Lease
    ends_at: datetime


class Ends:
    """What runs, in the order of its end. Kept from round to round by whoever knows what begins and ends."""

    def __init__(self, running: Mapping[UUID, Running] | None = None) -> None:
        self._running: dict[UUID, Running] = {}
        self._order: list[tuple[datetime, int, UUID, Running]] = []
        self._numbers = count()
        self._sorted = True
        for attempt_id, each in (running or {}).items():
            self.begin(attempt_id, each)

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, attempt_id: UUID, running: Running) -> None:
        """It runs, or what was known of it is another now."""
        self._running[attempt_id] = running
        self._order.append((running.ends_at, next(self._numbers), attempt_id, running))
        self._sorted = False

    def end(self, attempt_id: UUID) -> Running | None:
        return self._running.pop(attempt_id, None)

    def in_order(self) -> Iterator[Running]:
        if not self._sorted:
            # What has ended leaves the list here, not by a search for each.
            self._order = [entry for entry in self._order if self._running.get(entry[2]) is entry[3]]
            self._order.sort()
            self._sorted = True
        for _, _, attempt_id, running in self._order:
            if self._running.get(attempt_id) is running:
                yield running


@dataclass(frozen=True, slots=True)
class Reservation:
    """Where a job starts at `start_at` at the latest: machine rows, and the device columns of each."""

    job: PendingJob
    start_at: datetime
    rows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]

    @property
    def detail(self) -> str:
        return f"It starts at {self.start_at:%Y-%m-%d %H:%M} UTC at the latest."


def is_large(job: PendingJob) -> bool:
    """Does it need several GPUs or machines? Such a job has a reservation as soon as it cannot start."""
    gpu = job.request.gpu
    return job.nodes > 1 or (gpu is not None and gpu.count_min > 1)


def ends_at(job: PendingJob, now: datetime) -> datetime:
    """When it has ended at the latest if it starts now; a job without a bound never does."""
    if job.max_duration_seconds is None:
        return datetime.max.replace(tzinfo=now.tzinfo)
    return now + timedelta(seconds=job.max_duration_seconds + MARGIN_SECONDS)


@dataclass(slots=True)
class _Hold:
    """What a reservation means for one machine: devices, and what is left there beside it when it begins."""

    start_at: datetime
    columns: frozenset[int]
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int

    def has_room(self, request: ResourceRequest) -> bool:
        return (
            self.cpu_milli >= request.cpu_milli
            and self.memory_bytes >= request.memory_bytes
            and self.disk_bytes >= request.disk_bytes
        )

    def take(self, request: ResourceRequest) -> None:
        self.cpu_milli -= request.cpu_milli
        self.memory_bytes -= request.memory_bytes
        self.disk_bytes -= request.disk_bytes


type Holds = Mapping[int, frozenset[int] | None]
"""Machine row -> the columns that are not for a job; None: nothing is for it there."""


class Backfill:
    """The reservations of one round. `ends` is what ran when it began; what the round places is added."""

    def __init__(self, ends: Ends, now: datetime) -> None:
        self._ends = ends
        self._now = now
        self._placed: list[tuple[datetime, Placement]] = []
        self._holds: dict[int, _Hold] = {}
        self._blocked: list[PendingJob] = []
        self._left = {True: MAX_RESERVATIONS, False: MAX_RESERVATIONS}
        self._looks = MAX_LOOKS
        self.reservations: list[Reservation] = []

    def wants(self, job: PendingJob) -> bool:
        """May such a job still get a reservation?"""
        return self._left[is_large(job)] > 0 and self._looks > 0 and len(self._blocked) < MAX_BLOCKED

    @property
    def pending(self) -> bool:
        """Is anybody blocked who was not looked at?"""
        return bool(self._blocked)

    def block(self, job: PendingJob) -> None:
        """The job cannot start, and goes before all that are drawn from now on."""
        self._blocked.append(job)

    def reserve(self, free: Snapshot, *, only_large: bool = False) -> bool:
        """Reserve for those that are blocked. Needed once somebody behind them could start. True: something is new."""
        before = len(self.reservations)
        blocked, self._blocked = self._blocked, []
        for job in blocked:
            large = is_large(job)
            if not self._left[large] or not self._looks or (only_large and not large):
                continue
            self._looks -= 1
            placed = sorted((Running(it.lease, end) for end, it in self._placed), key=_end)
            ends = merge(self._ends.in_order(), placed, key=_end)
            found = _Search(free, job, self._now, self._holds).run(ends)
            if found is not None:
                reservation, holds = found
                self._left[large] -= 1
                self._holds |= holds
                self.reservations.append(reservation)
        return len(self.reservations) > before

    def holds(self, job: PendingJob) -> Holds:
        """Where the job would be in the way if it started now."""
        if not self._holds:
            return {}
        end, request = ends_at(job, self._now), job.request
        return {
            row: hold.columns if hold.has_room(request) else None
            for row, hold in self._holds.items()
            if hold.start_at < end
        }

    def take(self, job: PendingJob, placement: Placement, row: int) -> None:
        """A node of the job begins there."""
        end = ends_at(job, self._now)
        self._placed.append((end, placement))
        hold = self._holds.get(row)
        if hold is not None and hold.start_at < end:
            hold.take(job.request)

    def hint(self, rows: Iterable[int]) -> str:
        """Which max_duration would let a job start that fits there but for reservations."""
        first = min((self._holds[row].start_at for row in rows if row in self._holds), default=self._now)
        seconds = int((first - self._now).total_seconds()) - MARGIN_SECONDS
        return f"With a max_duration of at most {format_duration(seconds)} it could start now." if seconds > 0 else ""


def without(free: Snapshot, holds: Holds) -> Snapshot:
    """What is free less what is held there."""
    if not holds:
        return free
    cpu, device = free.cpu_free.copy(), free.device_free.copy()
    for row, columns in holds.items():
        if columns is None:
            cpu[row] = -1
        else:
            device[row, list(columns)] = 0
    return replace(free, cpu_free=cpu, device_free=device)


def _end(running: Running) -> datetime:
    return running.ends_at


class _Room:
    """One machine as its leases end."""

    def __init__(self, free: Snapshot, row: int) -> None:
        self.cpu_milli = int(free.cpu_free[row])
        self.memory_bytes = int(free.memory_free[row])
        self.disk_bytes = int(free.disk_free[row])
        self.device: list[int] = free.device_free[row].tolist()
        self._column_of: dict[DeviceId, int] = {
            device.id: column for column, device in enumerate(free.machines[row].devices)
        }

    def give(self, lease: Lease) -> None:
        self.cpu_milli += lease.cpu_milli
        self.memory_bytes += lease.memory_bytes
        self.disk_bytes += lease.disk_bytes
        for device_id, milli in lease.devices:
            column = self._column_of.get(device_id)
            if column is not None:
                self.device[column] += milli

    def has_room(self, request: ResourceRequest) -> bool:
        return (
            self.cpu_milli >= request.cpu_milli
            and self.memory_bytes >= request.memory_bytes
            and self.disk_bytes >= request.disk_bytes
        )


class _Search:
    """The earliest start of a job that does not fit now, on machines that are not reserved for another one."""

    def __init__(self, free: Snapshot, job: PendingJob, now: datetime, reserved: Iterable[int]) -> None:
        self._free = free
        self._job = job
        self._now = now
        gpu = job.request.gpu
        candidates = all_of(free, constraint_masks(free, job))
        candidates[list(reserved)] = False
        self._candidates = candidates
        self._eligible = None if gpu is None else eligible_devices(free, gpu)
        self._price = prices(free, job)
        self._site_of: dict[int, int] | None = None
        if job.within_a_site:
            groups = enumerate(sites(free, np.flatnonzero(candidates)))
            self._site_of = {row: number for number, rows in groups for row in rows.tolist()}
        self._rooms: dict[int, _Room] = {}
        self._known: set[tuple[int, int]] = set()
        self._starts: dict[tuple[int, int], list[tuple[datetime, int, int]]] = {}
        """(model, site) -> machines with room for a node, since when, in that order."""
        self._enough: set[tuple[int, int]] = set()

    def run(self, ends: Iterator[Running]) -> tuple[Reservation, dict[int, _Hold]] | None:
        """None: it does not fit however many jobs end."""
        if int(self._candidates.sum()) < self._job.nodes:
            return None
        self._look_at_now()
        moment = self._now
        touched = set[int]()
        for each in ends:
            if each.ends_at > moment:
                self._look_at(touched, moment)
                if self._enough:
                    break
                moment, touched = each.ends_at, set[int]()
            row = self._free.index_of.get(each.lease.machine_id)
            if row is not None and self._candidates[row]:
                self._room(row).give(each.lease)
                touched.add(row)
        else:
            self._look_at(touched, moment)
        return self._best() if self._enough else None

    def _look_at_now(self) -> None:
        rooms = Rooms.of(self._free, self._job, self._candidates)
        for model in rooms.models():
            for row in rooms.rows_with(model).tolist():
                self._note(NO_MODEL if model is None else model, row, self._now)

    def _look_at(self, rows: Iterable[int], moment: datetime) -> None:
        for row in rows:
            for model in self._columns(row):
                self._note(model, row, moment)

    def _note(self, model: int, row: int, moment: datetime) -> None:
        site = 0 if self._site_of is None else self._site_of.get(row)
        if site is None or (model, row) in self._known:
            return
        self._known.add((model, row))
        starts = self._starts.setdefault((model, site), [])
        starts.append((moment, int(self._price[row]), row))
        if len(starts) >= self._job.nodes:
            self._enough.add((model, site))

    def _room(self, row: int) -> _Room:
        room = self._rooms.get(row)
        if room is None:
            room = self._rooms[row] = _Room(self._free, row)
        return room

    def _columns(self, row: int) -> dict[int, list[int]]:
        """Model -> the devices that a node could have there; a job without GPUs asks for NO_MODEL."""
        room, request = self._room(row), self._job.request
        if not room.has_room(request):
            return {}
        gpu = request.gpu
        if gpu is None or self._eligible is None:
            return {NO_MODEL: []}
        if sum([milli >= gpu.milli for milli in room.device]) < gpu.count_min:
            return {}
        by_model: dict[int, list[int]] = {}
        for column, milli in enumerate(room.device):
            if milli >= gpu.milli and self._eligible[row, column] and self._may_share(row, column, milli):
                by_model.setdefault(int(self._free.device_model[row, column]), []).append(column)
        return {model: columns for model, columns in by_model.items() if len(columns) >= gpu.count_min}

    def _may_share(self, row: int, column: int, milli: int) -> bool:
        if milli >= MILLI_PER_UNIT:
            return True
        tenant = int(self._free.device_tenant[row, column])
        return tenant in (NOBODY, self._free.team_number(self._job.team_id))

    def _best(self) -> tuple[Reservation, dict[int, _Hold]]:
        """Of those that have enough machines at the same moment, the cheapest."""
        nodes = self._job.nodes
        found = [(sorted(self._starts[key])[:nodes], key[0]) for key in self._enough]
        best, model = min(found, key=lambda it: (it[0][-1][0], sum(price for _, price, _ in it[0]), it))
        start_at, rows = best[-1][0], tuple(row for _, _, row in best)
        columns = tuple(self._reserved(row, model) for row in rows)
        request = self._job.request
        holds: dict[int, _Hold] = {}
        for row, reserved in zip(rows, columns, strict=True):
            room = self._room(row)
            holds[row] = hold = _Hold(start_at, frozenset(reserved), room.cpu_milli, room.memory_bytes, room.disk_bytes)
            hold.take(request)
        return Reservation(self._job, start_at, rows, columns), holds

    def _reserved(self, row: int, model: int) -> tuple[int, ...]:
        gpu = self._job.request.gpu
        if gpu is None:
            return ()
        # Devices that are busy until then first: what is free now stays open to others.
        free = self._free.device_free[row]
        alike = self._columns(row)[model]
        return tuple(sorted(alike, key=lambda column: (int(free[column]), column))[: gpu.count_min])
