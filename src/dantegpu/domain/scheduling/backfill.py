"""Rounds in which something large waits: gangs, and jobs for several GPUs.

Small jobs would take every device that becomes free, and a large one would wait for ever. So the first large job that
cannot start gets a reservation: the machines, devices and moment at which it will start at the latest, as running jobs
end by their max_duration. Smaller jobs behind it start meanwhile only if they end before that moment or leave the
reserved devices alone. Source: Lifka, "The ANL/IBM SP Scheduling System", JSSPP 1995 (EASY backfill).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

import numpy as np

from dantegpu.domain.ids import DeviceId, JobId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.scheduling.constraints import (
    Capacity,
    PendingJob,
    all_of,
    constraint_masks,
    eligible_devices,
    free_now,
    prices,
    sites,
)
from dantegpu.domain.scheduling.gangs import Waits, after, place_gang
from dantegpu.domain.scheduling.ordering import Draw, Order
from dantegpu.domain.scheduling.plan import Placement, SchedulerState, schedule
from dantegpu.domain.scheduling.policy import DEFAULT_POLICY, Policy
from dantegpu.domain.scheduling.queue import JobQueue
from dantegpu.domain.scheduling.shares import PastShares, Shares
from dantegpu.domain.scheduling.snapshot import NOBODY, Bools, Ints, Lease, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT, format_duration

MARGIN_SECONDS = 60
"""How much longer than its max_duration a job may hold its devices: it is prepared before and stopped after."""


@dataclass(frozen=True, slots=True)
class Running:
    """What a live attempt holds, and when it will have ended at the latest."""

    lease: Lease
    ends_at: datetime


class Decision(Protocol):
    """A job that goes on waiting, and why."""

    @property
    def job_id(self) -> JobId: ...
    @property
    def reason(self) -> QueueReason: ...
    @property
    def detail(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """Where a job starts at `start_at` at the latest: machine rows, and the device columns of each."""

    job: PendingJob
    start_at: datetime
    rows: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Like a Plan. The placements of a gang follow one another, by rank."""

    placements: tuple[Placement, ...]
    unplaced: tuple[Decision, ...]
    reservation: Reservation | None


def is_large(job: PendingJob) -> bool:
    """Would it starve behind small jobs? Only such a job is worth a reservation."""
    gpu = job.request.gpu
    return job.nodes > 1 or (gpu is not None and gpu.count_min > 1)


def plan_round(
    snapshot: Snapshot,
    running: Sequence[Running],
    pending: Iterable[PendingJob],
    policy: Policy = DEFAULT_POLICY,
    *,
    now: datetime,
    past: PastShares | None = None,
) -> RoundPlan:
    """Place as many as fit, without delaying the first large job that does not.

    Large and small jobs have one order, that of `schedule`: quotas, priority, fair shares, age. `past` is what teams
    held lately; it is brought up to date.
    """
    jobs = {job.id: job for job in pending}
    past = past or PastShares()
    shares = Shares(snapshot, policy, past)
    past.advance(shares.held, policy.half_life_seconds, now)
    queue = JobQueue()
    for job in jobs.values():
        queue.add(job)
    queue.wake(now)
    order = Order(queue, policy, shares, lambda _: False)
    round_ = _Round(snapshot, running, policy, now, past)
    round_.unplaced += [Waits(job.id, QueueReason.WAITING_FOR_RETRY) for job in queue.sleeping()]
    small: list[Draw] = []
    while drawn := order.draw(1):
        draw = drawn[0]
        if not is_large(draw.shape.job):
            small.append(draw)
            continue
        if round_.reservation is None and small:
            # What was drawn before it goes before it. Behind a reservation they only keep out of its way.
            order.pass_over(round_.place_small(small, jobs))
            small = []
        if not round_.place_large(jobs[draw.job.id]):
            order.pass_over(drawn)
    round_.place_small(small, jobs)
    return RoundPlan(tuple(round_.placements), tuple(round_.unplaced), round_.reservation)


class _Round:
    """What is free as the round goes on, and what is kept for the reservation."""

    def __init__(
        self, snapshot: Snapshot, running: Sequence[Running], policy: Policy, now: datetime, past: PastShares
    ) -> None:
        self.placements: list[Placement] = []
        self.unplaced: list[Decision] = []
        self.reservation: Reservation | None = None
        self._free = snapshot
        self._kept = snapshot
        """What jobs that end too late may have: `_free` without what is reserved."""
        self._running = list(running)
        self._policy = policy
        self._now = now
        self._past = past

    def place_large(self, job: PendingJob) -> bool:
        """Place it now; else reserve its start, unless another job has a reservation already."""
        found, refusal = self._try(job, self._free if self._in_time(job) else self._kept)
        if found:
            self._take(found, [job])
            return True
        if self.reservation is None:
            self.reservation = reserve(self._free, self._running, job, self._now)
            if self.reservation is not None:
                self._kept = hold_back(self._free, self._running, self.reservation)
                at = self.reservation.start_at
                text = f"It starts at {at:%Y-%m-%d %H:%M} UTC at the latest."
                self.unplaced.append(Waits(job.id, QueueReason.RESERVED, text))
                return False
        self.unplaced.extend(refusal)
        return False

    def place_small(self, draws: Sequence[Draw], jobs: Mapping[JobId, PendingJob]) -> list[Draw]:
        """Jobs that end in time take what is free, the others what is free and not reserved. Who found no place."""
        drawn = [jobs[draw.job.id] for draw in draws]
        refused = self._schedule([job for job in drawn if self._in_time(job)], self._free)
        late = self._schedule([job for job in drawn if not self._in_time(job)], self._kept)
        self.unplaced += refused
        self.unplaced += [self._behind(jobs[decision.job_id], decision) for decision in late]
        waiting = {decision.job_id for decision in (*refused, *late)}
        return [draw for draw in draws if draw.job.id in waiting]

    def _schedule(self, jobs: Sequence[PendingJob], free: Snapshot) -> Sequence[Decision]:
        if not jobs:
            return ()
        plan = schedule(free, jobs, self._policy, now=self._now, state=SchedulerState(self._past))
        self._take(plan.placements, jobs)
        return plan.unplaced

    def _try(self, job: PendingJob, free: Snapshot) -> tuple[Sequence[Placement], Sequence[Decision]]:
        if job.nodes > 1:
            found = place_gang(free, job)
            return (found, ()) if isinstance(found, tuple) else ((), (found,))
        plan = schedule(free, [job], self._policy, now=self._now)
        return plan.placements, plan.unplaced

    def _take(self, placements: Sequence[Placement], jobs: Sequence[PendingJob]) -> None:
        by_id = {job.id: job for job in jobs}
        self.placements += placements
        self._free = after(self._free, placements)
        self._kept = after(self._kept, placements) if self.reservation is not None else self._free
        self._running += [_running(placement, _ends_at(by_id[placement.job_id], self._now)) for placement in placements]

    def _in_time(self, job: PendingJob) -> bool:
        return self.reservation is None or _ends_at(job, self._now) <= self.reservation.start_at

    def _behind(self, job: PendingJob, decision: Decision) -> Decision:
        """Say so when a job waits only for the reservation's sake."""
        if self.reservation is None or decision.reason is not QueueReason.NO_CAPACITY:
            return decision
        fitting = all_of(self._free, constraint_masks(self._free, job))
        if not (fitting & free_now(self._free, Capacity.of(self._free), job)).any():
            return decision
        seconds = int((self.reservation.start_at - self._now).total_seconds()) - MARGIN_SECONDS
        hint = f"With a max_duration of at most {format_duration(seconds)} it could start now." if seconds > 0 else ""
        return Waits(job.id, QueueReason.BEHIND_RESERVATION, hint)


def _ends_at(job: PendingJob, now: datetime) -> datetime:
    """When it has ended at the latest if it starts now; a job without a bound never does."""
    if job.max_duration_seconds is None:
        return datetime.max.replace(tzinfo=now.tzinfo)
    return now + timedelta(seconds=job.max_duration_seconds + MARGIN_SECONDS)


def _running(placement: Placement, ends_at: datetime) -> Running:
    devices = tuple((share.device_id, share.milli) for share in placement.devices)
    lease = Lease(
        placement.machine_id,
        placement.team_id,
        placement.cpu_milli,
        placement.memory_bytes,
        placement.disk_bytes,
        devices,
    )
    return Running(lease, ends_at)


@dataclass(frozen=True, slots=True)
class _Machine:
    """One machine as its leases end."""

    snapshot: Snapshot
    row: int
    leases: Sequence[Running]

    def at(self, moment: datetime) -> "_Room":
        over = [running.lease for running in self.leases if running.ends_at <= moment]
        snapshot, row = self.snapshot, self.row
        back: dict[DeviceId, int] = {}
        for lease in over:
            for device_id, milli in lease.devices:
                back[device_id] = back.get(device_id, 0) + milli
        device = snapshot.device_free[row].copy()
        for column, info in enumerate(snapshot.machines[row].devices):
            device[column] += back.get(info.id, 0)
        return _Room(
            int(snapshot.cpu_free[row]) + sum(lease.cpu_milli for lease in over),
            int(snapshot.memory_free[row]) + sum(lease.memory_bytes for lease in over),
            int(snapshot.disk_free[row]) + sum(lease.disk_bytes for lease in over),
            device,
        )


@dataclass(frozen=True, slots=True)
class _Room:
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    device: Ints

    def columns(self, snapshot: Snapshot, row: int, job: PendingJob, eligible: Bools | None) -> Ints | None:
        """The devices that a node of the job could have, of all models; None when there is no room for it."""
        request = job.request
        if self.cpu_milli < request.cpu_milli or self.memory_bytes < request.memory_bytes:
            return None
        if self.disk_bytes < request.disk_bytes:
            return None
        if request.gpu is None or eligible is None:
            return np.zeros(0, dtype=np.int64)
        usable = eligible[row] & (self.device >= request.gpu.milli)
        if request.gpu.milli < MILLI_PER_UNIT:
            tenant = snapshot.device_tenant[row]
            own = snapshot.team_number(job.team_id)
            usable &= (self.device == MILLI_PER_UNIT) | (tenant == NOBODY) | ((tenant == own) & (own != NOBODY))
        return np.flatnonzero(usable)


def reserve(snapshot: Snapshot, running: Sequence[Running], job: PendingJob, now: datetime) -> Reservation | None:
    """The earliest start of a job that does not fit now; None when it does not fit however many jobs end."""
    gpu = job.request.gpu
    eligible = None if gpu is None else eligible_devices(snapshot, gpu)
    candidates = np.flatnonzero(all_of(snapshot, constraint_masks(snapshot, job)))
    leases: dict[int, list[Running]] = {}
    for each in sorted(running, key=lambda it: it.ends_at):
        row = snapshot.index_of.get(each.lease.machine_id)
        if row is not None:
            leases.setdefault(row, []).append(each)
    price = prices(snapshot, job)
    groups = sites(snapshot, candidates) if job.within_a_site else [candidates]
    starts: dict[tuple[int, int], list[tuple[datetime, int, int]]] = {}
    for number, row in ((number, row) for number, rows in enumerate(groups) for row in rows.tolist()):
        machine = _Machine(snapshot, row, leases.get(row, ()))
        for model, moment in _earliest(machine, job, eligible, now).items():
            starts.setdefault((model, number), []).append((moment, int(price[row]), row))
    enough = [sorted(found)[: job.nodes] for found in starts.values() if len(found) >= job.nodes]
    if not enough:
        return None
    best = min(enough, key=lambda found: (found[-1][0], sum(money for _, money, _ in found), found))
    start_at = best[-1][0]
    model = next(model for (model, _), found in starts.items() if sorted(found)[: job.nodes] == best)
    rows = tuple(row for _, _, row in best)
    columns = tuple(
        _reserved(_Machine(snapshot, row, leases.get(row, ())), job, eligible, model, start_at) for row in rows
    )
    return Reservation(job, start_at, rows, columns)


def _earliest(machine: _Machine, job: PendingJob, eligible: Bools | None, now: datetime) -> Mapping[int, datetime]:
    """Model -> when the machine has room for a node with GPUs of it. A job without GPUs asks for model -1."""
    found: dict[int, datetime] = {}
    for moment in dict.fromkeys([now, *(running.ends_at for running in machine.leases)]):
        columns = machine.at(moment).columns(machine.snapshot, machine.row, job, eligible)
        if columns is None:
            continue
        if job.request.gpu is None:
            return {-1: moment}
        models, counts = np.unique(machine.snapshot.device_model[machine.row][columns], return_counts=True)
        for model, count in zip(models.tolist(), counts.tolist(), strict=True):
            if count >= job.request.gpu.count_min:
                found.setdefault(model, moment)
    return found


def _reserved(
    machine: _Machine, job: PendingJob, eligible: Bools | None, model: int, start_at: datetime
) -> tuple[int, ...]:
    columns = machine.at(start_at).columns(machine.snapshot, machine.row, job, eligible)
    if job.request.gpu is None or columns is None:
        return ()
    alike = columns[machine.snapshot.device_model[machine.row][columns] == model]
    # Devices that are busy until then first: what is free now stays open to others.
    free = machine.snapshot.device_free[machine.row]
    return tuple(sorted(alike.tolist(), key=lambda column: (int(free[column]), column))[: job.request.gpu.count_min])


def hold_back(snapshot: Snapshot, running: Sequence[Running], reservation: Reservation) -> Snapshot:
    """What is left for jobs that will still run when the reservation begins."""
    cpu, memory, disk = snapshot.cpu_free.copy(), snapshot.memory_free.copy(), snapshot.disk_free.copy()
    device = snapshot.device_free.copy()
    request = reservation.job.request
    for row, columns in zip(reservation.rows, reservation.columns, strict=True):
        machine_id = snapshot.machines[row].id
        leases = [each for each in running if each.lease.machine_id == machine_id]
        then = _Machine(snapshot, row, leases).at(reservation.start_at)
        cpu[row] = max(0, min(int(cpu[row]), then.cpu_milli - request.cpu_milli))
        memory[row] = max(0, min(int(memory[row]), then.memory_bytes - request.memory_bytes))
        disk[row] = max(0, min(int(disk[row]), then.disk_bytes - request.disk_bytes))
        device[row, list(columns)] = 0
    return replace(snapshot, cpu_free=cpu, memory_free=memory, disk_free=disk, device_free=device)
