"""Who gives way: spot work, for on-demand work of at least its priority, or for a team that takes its quota back.

A waiting job preempts only where it could start on what becomes free, and only as much as it needs. What it will get is
a *claim*: nobody else is placed there while those that give way save their work and end.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations

import numpy as np

from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.pricing import rate_udgpu_per_hour
from dantegpu.domain.resources import GpuRequest
from dantegpu.domain.scheduling.board import Placement
from dantegpu.domain.scheduling.constraints import (
    Capacity,
    PendingJob,
    all_of,
    constraint_masks,
    eligible_devices,
    free_now,
    prices,
)
from dantegpu.domain.scheduling.gangs import after, placement_at
from dantegpu.domain.scheduling.policy import Policy, borrowed
from dantegpu.domain.scheduling.snapshot import MANY, NOBODY, Bools, Lease, Snapshot, TeamUse
from dantegpu.domain.units import MILLI_PER_UNIT, MicroDgpu

MAX_SITES = 256
"""Machines that are looked at for one job: those where the least has to end come first."""
MAX_SETS_OF = 8
"""Up to so many spot jobs on a machine all sets of them are tried; of more, they are taken one by one."""
NO_MODEL = -1


class Cause(StrEnum):
    """Why somebody had to give way, as people read it after `preempted`."""

    PRIORITY = "for a job of higher priority"
    ON_DEMAND = "for an on-demand job"
    QUOTA = "for a team that takes back what it lent of its quota"


@dataclass(frozen=True, slots=True)
class SpotWork:
    """A spot job that runs; its attempts (those of all nodes) end together or not at all.

    `lost_seconds` is the work that is lost with it: 0 for a job that saves a checkpoint when it has to stop.
    `unsaved_seconds` have passed since its last checkpoint, or since it began.
    """

    job_id: JobId
    team_id: TeamId
    priority: int
    leases: tuple[Lease, ...]
    lost_seconds: float = 0.0
    unsaved_seconds: float = 0.0

    @property
    def cost(self) -> "Cost":
        return Cost(len(self.leases), self.lost_seconds, self.unsaved_seconds, self.priority)


@dataclass(frozen=True, slots=True, order=True)
class Cost:
    """The least is preempted first: the fewest attempts, then the least work lost, then the lowest priority."""

    attempts: int = 0
    lost_seconds: float = 0.0
    unsaved_seconds: float = 0.0
    priority: int = 0

    @classmethod
    def of(cls, works: Iterable[SpotWork]) -> "Cost":
        costs = [work.cost for work in works]
        return cls(
            sum(cost.attempts for cost in costs),
            sum(cost.lost_seconds for cost in costs),
            sum(cost.unsaved_seconds for cost in costs),
            sum(cost.priority for cost in costs),
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """What is kept for a job until it starts: one lease per node, by rank."""

    job_id: JobId
    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Preemption:
    """`victims` end, and what they and others leave is kept for the claim's job."""

    claim: Claim
    victims: tuple[SpotWork, ...]
    cause: Cause


@dataclass(frozen=True, slots=True)
class ClaimsView:
    """What the claims of a round mean. `kept` is what everybody else may have, `ground` what will be free."""

    placements: tuple[Placement, ...]
    waiting: frozenset[JobId]
    broken: frozenset[JobId]
    kept: Snapshot
    ground: "Ground"


class Ground:
    """Free capacity that changes while something is decided; the snapshot below it stays."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.capacity = Capacity.of(snapshot)
        self.use: dict[TeamId, TeamUse] = dict(snapshot.team_use)

    def give(self, leases: Iterable[Lease]) -> None:
        """These will have ended."""
        for lease in leases:
            self._change(lease, 1)

    def take(self, leases: Iterable[Lease]) -> None:
        """These will have begun."""
        for lease in leases:
            self._change(lease, -1)

    def _change(self, lease: Lease, sign: int) -> None:
        gpu_milli = sum(milli for _, milli in lease.devices)
        use = self.use.get(lease.team_id, TeamUse())
        self.use[lease.team_id] = use.plus(-sign * gpu_milli, -sign * lease.cpu_milli, -sign * lease.memory_bytes)
        row = self.snapshot.index_of.get(lease.machine_id)
        if row is None:
            return
        capacity = self.capacity
        capacity.cpu[row] += sign * lease.cpu_milli
        capacity.memory[row] += sign * lease.memory_bytes
        capacity.disk[row] += sign * lease.disk_bytes
        for column, milli in _columns(self.snapshot, row, lease.devices):
            capacity.device[row, column] += sign * milli
            if capacity.device[row, column] >= MILLI_PER_UNIT:
                capacity.tenant[row, column] = NOBODY
            elif sign < 0:
                team = self.snapshot.team_number(lease.team_id)
                capacity.tenant[row, column] = team if team != NOBODY else MANY

    def fits(self, leases: Sequence[Lease]) -> bool:
        """Is all of it free? The leases are on machines of their own."""
        return all(self._has_room(lease) for lease in leases)

    def _has_room(self, lease: Lease) -> bool:
        row, capacity = self.snapshot.index_of.get(lease.machine_id), self.capacity
        if row is None:
            return False
        found = _columns(self.snapshot, row, lease.devices)
        return (
            len(found) == len(lease.devices)
            and int(capacity.cpu[row]) >= lease.cpu_milli
            and int(capacity.memory[row]) >= lease.memory_bytes
            and int(capacity.disk[row]) >= lease.disk_bytes
            and all(int(capacity.device[row, column]) >= milli for column, milli in found)
        )


def _columns(snapshot: Snapshot, row: int, devices: Iterable[tuple[DeviceId, int]]) -> list[tuple[int, int]]:
    """(column, milli) of those devices that the machine has."""
    column_of = {device.id: column for column, device in enumerate(snapshot.machines[row].devices)}
    return [(column_of[device_id], milli) for device_id, milli in devices if device_id in column_of]


def look_at_claims(
    snapshot: Snapshot, stopping: Sequence[Lease], claims: Sequence[tuple[Claim, PendingJob]]
) -> ClaimsView:
    """Which claims can be taken up now, which wait for leases that are `stopping`, and which have come to nothing."""
    now, later = Ground(snapshot), Ground(snapshot)
    later.give(stopping)
    placements: list[Placement] = []
    waiting: dict[JobId, Claim] = {}
    broken: set[JobId] = set()
    for claim, job in claims:
        rows = [snapshot.index_of.get(lease.machine_id) for lease in claim.leases]
        fitting = all_of(snapshot, constraint_masks(snapshot, job))
        if not all(row is not None and fitting[row] for row in rows) or not later.fits(claim.leases):
            broken.add(job.id)
            continue
        later.take(claim.leases)
        if now.fits(claim.leases):
            now.take(claim.leases)
            placements += [_placement(snapshot, job, lease) for lease in claim.leases]
        else:
            waiting[job.id] = claim
    kept = _kept(snapshot, placements, later, waiting.values())
    return ClaimsView(tuple(placements), frozenset(waiting), frozenset(broken), kept, later)


def _kept(snapshot: Snapshot, placements: Sequence[Placement], later: Ground, waiting: Iterable[Claim]) -> Snapshot:
    """What is free now and is not needed for a claim later."""
    free = after(snapshot, placements)
    then = later.capacity
    for lease in (lease for claim in waiting for lease in claim.leases):
        row = snapshot.index_of[lease.machine_id]
        for column, milli in _columns(snapshot, row, lease.devices):
            if milli < MILLI_PER_UNIT:
                then.device[row, column] = 0  # or another team could come to share it meanwhile
    return replace(
        free,
        cpu_free=np.clip(then.cpu, 0, free.cpu_free),
        memory_free=np.clip(then.memory, 0, free.memory_free),
        disk_free=np.clip(then.disk, 0, free.disk_free),
        device_free=np.clip(then.device, 0, free.device_free),
    )


def _placement(snapshot: Snapshot, job: PendingJob, lease: Lease) -> Placement:
    row = snapshot.index_of[lease.machine_id]
    return placement_at(snapshot, job, row, [column for column, _ in _columns(snapshot, row, lease.devices)])


def claimed_rate(snapshot: Snapshot, lease: Lease, price_percent: int) -> MicroDgpu:
    """What an hour of it will cost."""
    machine = snapshot.machines[snapshot.index_of[lease.machine_id]]
    return rate_udgpu_per_hour(
        gpu_milli=sum(milli for _, milli in lease.devices),
        cpu_milli=lease.cpu_milli,
        price_udgpu_per_gpu_hour=machine.price_udgpu_per_gpu_hour,
        price_udgpu_per_cpu_hour=machine.price_udgpu_per_cpu_hour,
        price_percent=price_percent,
    )


def preempt(
    ground: Ground,
    works: Sequence[SpotWork],
    waiting: Sequence[PendingJob],
    policy: Policy,
    barred: Mapping[JobId, frozenset[MachineId]] | None = None,
) -> tuple[Preemption, ...]:
    """Who gives way for whom. `waiting` jobs are in their order; `ground` is what will be free anyway, and is changed.

    `barred`: machines that are not for this job, because a larger one has a reservation there.
    """
    decided: list[Preemption] = []
    left = list(works)
    # Room is looked for machine by machine: a job within one site could end work of several for nothing.
    waiting = [job for job in waiting if not job.within_a_site]
    for job in sorted(waiting, key=lambda job: not _within_quota(ground, job, policy)):
        found = _Search(ground, left, job, policy, (barred or {}).get(job.id, frozenset())).run()
        if found is None:
            continue
        decided.append(found)
        for victim in found.victims:
            ground.give(victim.leases)
            left.remove(victim)
        ground.take(found.claim.leases)
    return tuple(decided)


def _within_quota(ground: Ground, job: PendingJob, policy: Policy) -> bool:
    """Would all nodes of the job be the team's own?"""
    quota = policy.quotas.get(job.team_id)
    return quota is not None and quota.allows(ground.use.get(job.team_id, TeamUse()), job.request, job.nodes)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Spot work as it is on one machine."""

    work: SpotWork
    lease: Lease
    columns: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Option:
    """The cheapest way to make room for one node on a machine, with GPUs of one model."""

    cost: Cost
    price_udgpu: int
    row: int
    columns: tuple[int, ...]
    victims: tuple[SpotWork, ...]

    @property
    def key(self) -> tuple[Cost, int, int]:
        return self.cost, self.price_udgpu, self.row


@dataclass(slots=True)
class _Site:
    """One machine as plain numbers: many sets of victims are tried on it."""

    row: int
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    device: list[int]
    model: list[int]
    eligible: list[bool]
    shareable: list[bool]
    """Not in use by another team that has parts of it."""
    units: list[_Unit]

    def room(self, units: Sequence[_Unit], job: PendingJob) -> dict[int, tuple[int, ...]]:
        """Model -> the columns that a node would take once `units` have ended. Empty: there is no room."""
        request = job.request
        leases = [unit.lease for unit in units]
        if self.cpu_milli + sum(lease.cpu_milli for lease in leases) < request.cpu_milli:
            return {}
        if self.memory_bytes + sum(lease.memory_bytes for lease in leases) < request.memory_bytes:
            return {}
        if self.disk_bytes + sum(lease.disk_bytes for lease in leases) < request.disk_bytes:
            return {}
        if request.gpu is None:
            return {NO_MODEL: ()}
        free = list(self.device)
        for unit in units:
            for column, milli in unit.columns:
                free[column] += milli
        return self._devices(free, request.gpu)

    def _devices(self, free: Sequence[int], gpu: GpuRequest) -> dict[int, tuple[int, ...]]:
        by_model: dict[int, list[int]] = {}
        for column, milli in enumerate(free):
            if self.eligible[column] and milli >= gpu.milli and (milli >= MILLI_PER_UNIT or self.shareable[column]):
                by_model.setdefault(self.model[column], []).append(column)
        if gpu.milli < MILLI_PER_UNIT:
            # The fullest one first: whole devices stay whole.
            for columns in by_model.values():
                columns.sort(key=lambda column: free[column])
        return {
            model: tuple(columns[: gpu.count_min])
            for model, columns in by_model.items()
            if len(columns) >= gpu.count_min
        }


class _Search:
    """The cheapest set of spot work whose end makes room for one job."""

    def __init__(
        self, ground: Ground, works: Sequence[SpotWork], job: PendingJob, policy: Policy, barred: frozenset[MachineId]
    ) -> None:
        self._ground = ground
        self._job = job
        self._barred = barred
        self._own = _within_quota(ground, job, policy)
        self._over = borrowed(ground.use, policy)
        self._policy = policy
        self._reclaimed: set[JobId] = set()
        self._works = [work for work in works if self._gives_way(work)]
        self._site_of: dict[int, _Site] = {}
        self._prices = prices(ground.snapshot, job)
        self._most = sys.maxsize
        """No set of more work can be the cheapest one."""

    def _gives_way(self, work: SpotWork) -> bool:
        job = self._job
        outranked = not job.spot and job.priority >= work.priority
        if not self._policy.quotas or work.team_id == job.team_id:
            return outranked
        borrows = work.team_id in self._over
        if self._own and borrows and not outranked:
            self._reclaimed.add(work.job_id)
        return (self._own and borrows) or (outranked and self._own == (not borrows))

    def run(self) -> Preemption | None:
        if not self._works or self._fits_anyway():
            return None
        options: dict[int, list[_Option]] = {}
        for site in self._sites():
            self._site_of[site.row] = site
            for model, option in self._cheapest(site).items():
                options.setdefault(model, []).append(option)
        found = [
            chosen
            for model, of_model in options.items()
            if (chosen := self._together(model, sorted(of_model, key=lambda it: it.key)[: self._job.nodes])) is not None
        ]
        if not found:
            return None
        victims, chosen = min(found, key=lambda it: (Cost.of(it[0]), [option.key for option in it[1]]))
        if not victims:
            return None  # it fits as soon as those have ended that stop anyway
        return Preemption(Claim(self._job.id, tuple(map(self._lease, chosen))), victims, self._cause(victims))

    def _fits_anyway(self) -> bool:
        """Once those have ended that stop already. A gang may need GPUs that are alike: the search finds that out."""
        snapshot, capacity, job = self._ground.snapshot, self._ground.capacity, self._job
        if job.nodes > 1:
            return False
        return bool((all_of(snapshot, constraint_masks(snapshot, job)) & free_now(snapshot, capacity, job)).any())

    def _cause(self, victims: Sequence[SpotWork]) -> Cause:
        if any(work.job_id in self._reclaimed for work in victims):
            return Cause.QUOTA
        higher = any(self._job.priority > work.priority for work in victims)
        return Cause.PRIORITY if higher else Cause.ON_DEMAND

    def _sites(self) -> Iterator[_Site]:
        snapshot, job = self._ground.snapshot, self._job
        fitting = all_of(snapshot, constraint_masks(snapshot, job))
        units: dict[int, list[_Unit]] = {}
        for work in self._works:
            for lease in work.leases:
                row = snapshot.index_of.get(lease.machine_id)
                if row is not None and fitting[row]:
                    columns = tuple(_columns(snapshot, row, lease.devices))
                    units.setdefault(row, []).append(_Unit(work, lease, columns))
        # A gang also uses machines where nothing has to end.
        rows = np.flatnonzero(fitting).tolist() if job.nodes > 1 else list(units)
        rows = [row for row in rows if snapshot.machines[row].id not in self._barred]
        gpu = job.request.gpu
        eligible = eligible_devices(snapshot, gpu) if gpu is not None else None
        capacity = self._ground.capacity
        free = capacity.cpu if gpu is None else capacity.device.sum(axis=1)
        for of_row in units.values():
            of_row.sort(key=lambda it: (it.work.cost, it.work.job_id))
        rows.sort(key=lambda row: (-int(free[row]), units[row][0].work.cost if row in units else Cost(), row))
        for row in rows[:MAX_SITES]:
            yield self._site(row, eligible, units.get(row, []))

    def _site(self, row: int, eligible: Bools | None, units: list[_Unit]) -> _Site:
        capacity, snapshot = self._ground.capacity, self._ground.snapshot
        team = snapshot.team_number(self._job.team_id)
        tenants = capacity.tenant[row].tolist()
        return _Site(
            row,
            int(capacity.cpu[row]),
            int(capacity.memory[row]),
            int(capacity.disk[row]),
            capacity.device[row].tolist(),
            snapshot.device_model[row].tolist(),
            eligible[row].tolist() if eligible is not None else [],
            [tenant == NOBODY or (tenant == team and team != NOBODY) for tenant in tenants],
            units,
        )

    def _cheapest(self, site: _Site) -> dict[int, _Option]:
        """Model -> the cheapest way to make room on this machine."""
        best: dict[int, _Option] = {}
        models = site.room(site.units, self._job).keys()
        if not models:
            return best
        price = int(self._prices[site.row])
        for units in self._sets(site):
            if len(units) > self._most or (best.keys() == models and len(units) > _attempts(best.values())):
                break  # each of them has an attempt at least, and larger sets follow
            victims = tuple(unit.work for unit in units)
            cost = Cost.of(victims)
            for model, columns in site.room(units, self._job).items():
                known = best.get(model)
                if known is None or cost < known.cost:
                    best[model] = _Option(cost, price, site.row, columns, victims)
        if best and self._job.nodes == 1:
            self._most = min(self._most, *(option.cost.attempts for option in best.values()))
        return best

    def _sets(self, site: _Site) -> Iterator[Sequence[_Unit]]:
        """Sets of work that may end together."""
        if len(site.units) <= MAX_SETS_OF:
            sets = (units for size in range(len(site.units) + 1) for units in combinations(site.units, size))
            yield from (units for units in sets if self._may_reclaim([unit.work for unit in units]))
            return
        chosen: list[_Unit] = []
        for unit in site.units:
            if site.room(chosen, self._job):
                break
            if self._may_reclaim([it.work for it in (*chosen, unit)]):
                chosen.append(unit)
        for unit in reversed(list(chosen)):
            fewer = [it for it in chosen if it is not unit]
            if site.room(fewer, self._job):
                chosen = fewer
        yield chosen

    def _may_reclaim(self, works: Sequence[SpotWork]) -> bool:
        """Of a team that borrows no more is taken than reaches down to its quota with the last of its jobs."""
        taken: dict[TeamId, list[int]] = {}
        on_gpus = self._job.request.gpu is not None
        for work in works:
            if work.job_id in self._reclaimed:
                milli = sum(milli for lease in work.leases for _, milli in lease.devices)
                cores = sum(lease.cpu_milli for lease in work.leases)
                taken.setdefault(work.team_id, []).append(milli if on_gpus else cores)
        for team_id, amounts in taken.items():
            over = self._over[team_id]
            if sum(amounts) - max(amounts) >= (over.gpu_milli if on_gpus else over.cpu_milli):
                return False
        return True

    def _together(
        self, model: int, options: Sequence[_Option]
    ) -> tuple[tuple[SpotWork, ...], Sequence[_Option]] | None:
        """The work that ends for all nodes, none of it for nothing; None when there are too few machines."""
        if len(options) < self._job.nodes:
            return None
        works = {work.job_id: work for option in options for work in option.victims}
        victims = sorted(works.values(), key=lambda work: (work.cost, work.job_id))
        if not self._may_reclaim(victims):
            return None
        # Of work on several machines all ends: what was to end beside it on one of them may not be needed.
        for work in reversed(list(victims) if self._job.nodes > 1 else []):
            fewer = [it for it in victims if it is not work]
            places = self._places(model, options, fewer)
            if places is not None:
                victims, options = fewer, places
        return tuple(victims), options

    def _places(self, model: int, options: Sequence[_Option], victims: Sequence[SpotWork]) -> list[_Option] | None:
        """The same machines, once exactly these have ended; None when one of them has no room then."""
        places: list[_Option] = []
        for option in options:
            site = self._site_of[option.row]
            columns = site.room([unit for unit in site.units if unit.work in victims], self._job).get(model)
            if columns is None:
                return None
            places.append(replace(option, columns=columns))
        return places

    def _lease(self, option: _Option) -> Lease:
        job, machine = self._job, self._ground.snapshot.machines[option.row]
        milli = job.request.gpu.milli if job.request.gpu is not None else 0
        return Lease(
            machine.id,
            job.team_id,
            job.request.cpu_milli,
            job.request.memory_bytes,
            job.request.disk_bytes,
            tuple((machine.devices[column].id, milli) for column in option.columns),
        )


def _attempts(options: Iterable[_Option]) -> int:
    return max(option.cost.attempts for option in options)
