"""`schedule(snapshot, pending, policy, now) -> Plan`: pure, deterministic, never over capacity."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.job import QueueReason
from dantegpu.domain.pricing import rate_udgpu_per_hour
from dantegpu.domain.scheduling.constraints import (
    Capacity,
    ConstraintCount,
    PendingJob,
    all_of,
    constraint_counts,
    constraint_masks,
    eligible_devices,
    has_count_of_one_model,
    prices,
    usable_devices,
    waiting_reason,
)
from dantegpu.domain.scheduling.fragmentation import FragmentationIndex, ShapeScores, tightest_group
from dantegpu.domain.scheduling.mix import RequestMix
from dantegpu.domain.scheduling.policy import DEFAULT_POLICY, Objective, Policy
from dantegpu.domain.scheduling.snapshot import Bools, Ints, Snapshot, TeamUse
from dantegpu.domain.units import MILLI_PER_UNIT, MicroDgpu

MAX_KNOWN_SHAPES = 4096
"""Shapes whose candidates and scores are remembered; when there are more, all are looked at again."""


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A device of the placement's machine; `index` is its place there, `milli` 1000 for the whole of it."""

    device_id: DeviceId
    index: int
    milli: int


@dataclass(frozen=True, slots=True)
class Placement:
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


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A job that goes on waiting, and why. `machines_fitting` counts machines that fit but are busy."""

    job_id: JobId
    reason: QueueReason
    constraints: tuple[ConstraintCount, ...] = ()
    machines_total: int = 0
    machines_fitting: int = 0

    @property
    def detail(self) -> str:
        """Numbers for people: `12 machines: 7 no such GPU model, 5 costs more than max_price`."""
        if not self.machines_total:
            return ""
        counts = ", ".join(f"{count.machines_excluded} {count.text}" for count in self.constraints)
        head = f"{self.machines_total} machine{'' if self.machines_total == 1 else 's'}"
        fitting = f"{self.machines_fitting} that fit{'s' if self.machines_fitting == 1 else ''}, all busy"
        parts = [part for part in (counts, fitting if self.machines_fitting else "") if part]
        return f"{head}: {', '.join(parts)}" if parts else head


@dataclass(frozen=True, slots=True)
class Plan:
    """Every pending job is in exactly one of the two. `placements` are in the order in which they were decided."""

    placements: tuple[Placement, ...]
    unplaced: tuple[Unplaced, ...]


class SchedulerState:
    """What a caller may keep between calls of `schedule`, so that a call costs what changed and not what there is.

    It holds the mix of requests that has arrived (a job counts when it is first listed), and for the snapshot of the
    last call what its plans have left free, with scores. Passing the same snapshot object again goes on from there:
    every placement so far counts as made. Another snapshot (or policy) starts from that snapshot's free capacity and
    keeps only the mix. So after a plan that was not applied as it is, pass a new snapshot.
    """

    def __init__(self) -> None:
        self.mix = RequestMix()
        self._waiting: set[JobId] = set()
        self._round: _Round | None = None

    def begin(self, snapshot: Snapshot, policy: Policy, jobs: dict[JobId, PendingJob]) -> "_Round":
        if policy.objective is Objective.FRAGMENTATION:
            self.mix.count(job.request for job in jobs.values() if job.id not in self._waiting)
        if self._round is None or not self._round.goes_on(snapshot, policy):
            self._round = _Round(snapshot, policy, self.mix)
        self._round.follow_mix()
        return self._round

    def end(self, unplaced: Sequence["Unplaced"]) -> None:
        self._waiting = {job.job_id for job in unplaced}


def schedule(
    snapshot: Snapshot,
    pending: Iterable[PendingJob],
    policy: Policy = DEFAULT_POLICY,
    *,
    now: datetime,
    state: SchedulerState | None = None,
) -> Plan:
    """Place as many pending jobs as fit, best first: by priority, then fair between teams, then by age.

    The same arguments give the same plan. A job that is listed twice counts once. A job whose `not_before` lies
    ahead waits as WAITING_FOR_RETRY. Raises nothing for what a job may ask. `state` is what earlier calls left and is
    changed; without it the call stands alone.
    """
    jobs = {job.id: job for job in pending}
    state = state or SchedulerState()
    round_ = state.begin(snapshot, policy, jobs)
    early = [job for job in jobs.values() if job.not_before is not None and job.not_before > now]
    unplaced = [Unplaced(job.id, QueueReason.WAITING_FOR_RETRY) for job in sorted(early, key=_by_age)]
    for job in early:
        del jobs[job.id]
    placements: list[Placement] = []
    for job in round_.in_order(list(jobs.values())):
        decision = round_.place(job)
        if isinstance(decision, Placement):
            placements.append(decision)
        else:
            unplaced.append(decision)
    state.end(unplaced)
    return Plan(tuple(placements), tuple(unplaced))


def _by_age(job: PendingJob) -> tuple[datetime, JobId]:
    return job.submitted_at, job.id


@dataclass(slots=True)
class _Shape:
    """What all jobs of one shape share within a round."""

    candidates: Ints
    eligible: Bools | None
    prices: Ints
    refusal: tuple[QueueReason, tuple[ConstraintCount, ...], int]
    exhausted: bool
    scores: ShapeScores | None = None


class _Round:
    """The free capacity of one snapshot as plans use it up, and what is known about each shape."""

    def __init__(self, snapshot: Snapshot, policy: Policy, mix: RequestMix) -> None:
        self._snapshot = snapshot
        self._policy = policy
        self._mix = mix
        self._capacity = Capacity.of(snapshot)
        self._index: FragmentationIndex | None = None
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._use = dict(snapshot.team_use)
        # Teams that own and hold nothing yet get a number here, or two of them could share a device.
        self._teams = dict(snapshot.team_index)
        self._totals = (
            max(int(snapshot.device_total.sum()), 1),
            max(int(snapshot.cpu_total.sum()), 1),
            max(int(snapshot.memory_total.sum()), 1),
        )

    def goes_on(self, snapshot: Snapshot, policy: Policy) -> bool:
        return self._snapshot is snapshot and self._policy == policy

    def follow_mix(self) -> None:
        """Score by the mix of today. Once per call: within a call the order of jobs must not change a weight."""
        if self._policy.objective is not Objective.FRAGMENTATION:
            return
        if self._index is None:
            self._index = FragmentationIndex(self._snapshot, self._capacity)
            self._index.use(self._mix.shapes())
        elif self._mix.stale:
            self._index.use(self._mix.shapes())

    def in_order(self, jobs: Sequence[PendingJob]) -> Iterator[PendingJob]:
        """Highest priority first; within it the team with the smallest dominant share; within it the oldest.

        Source: Ghodsi et al., "Dominant Resource Fairness", NSDI 2011. Shares count what is placed on the way.
        """
        for priority in sorted({job.priority for job in jobs}, reverse=True):
            level = sorted((job for job in jobs if job.priority == priority), key=_by_age, reverse=True)
            if not self._policy.fair_share:
                yield from reversed(level)
                continue
            queues: dict[TeamId, list[PendingJob]] = {}
            for job in level:
                queues.setdefault(job.team_id, []).append(job)
            heap = [(self._share(team), *_by_age(queue[-1]), team) for team, queue in queues.items()]
            heapq.heapify(heap)
            while heap:
                team = heap[0][3]
                queue = queues[team]
                yield queue.pop()
                if queue:
                    heapq.heapreplace(heap, (self._share(team), *_by_age(queue[-1]), team))
                else:
                    heapq.heappop(heap)

    def _share(self, team_id: TeamId) -> float:
        use = self._use.get(team_id, TeamUse())
        gpu, cpu, memory = self._totals
        return max(use.gpu_milli / gpu, use.cpu_milli / cpu, use.memory_bytes / memory)

    def place(self, job: PendingJob) -> Placement | Unplaced:
        shape = self._shapes.get(job.shape)
        if shape is None:
            if len(self._shapes) >= MAX_KNOWN_SHAPES:
                self._shapes.clear()
            shape = self._shapes[job.shape] = self._look_at(job)
        if not shape.exhausted:
            placement = self._best(job, shape)
            if placement is not None:
                return placement
            # Capacity only shrinks within a round: no other job of this shape can fit either.
            shape.exhausted = True
        reason, counts, fitting = shape.refusal
        return Unplaced(job.id, reason, counts, len(self._snapshot.machines), fitting)

    def _look_at(self, job: PendingJob) -> _Shape:
        snapshot, gpu = self._snapshot, job.request.gpu
        masks = constraint_masks(snapshot, job)
        candidates = np.flatnonzero(all_of(snapshot, masks))
        refusal = (waiting_reason(snapshot, masks), constraint_counts(masks), len(candidates))
        eligible = None if gpu is None else eligible_devices(snapshot, gpu)
        return _Shape(candidates, eligible, prices(snapshot, job), refusal, exhausted=not len(candidates))

    def _best(self, job: PendingJob, shape: _Shape) -> Placement | None:
        if self._index is not None:
            return self._least_fragmenting(job, shape, self._index)
        rows, usable = self._fitting(job, shape, shape.candidates)
        if not len(rows):
            return None
        best = self._rank(job, shape, rows)
        row = int(rows[best])
        columns = [] if usable is None else self._choose_devices(row, usable[best], job)
        return self._take(job, row, columns)

    def _fitting(self, job: PendingJob, shape: _Shape, rows: Ints) -> tuple[Ints, Bools | None]:
        """Those of `rows` that can take the job at this moment, and which of their devices it could have."""
        capacity, request = self._capacity, job.request
        rows = rows[
            (capacity.cpu[rows] >= request.cpu_milli)
            & (capacity.memory[rows] >= request.memory_bytes)
            & (capacity.disk[rows] >= request.disk_bytes)
        ]
        if request.gpu is None or shape.eligible is None:
            return rows, None
        usable = usable_devices(capacity, rows, request.gpu, shape.eligible, self._team_number(job.team_id))
        fits = has_count_of_one_model(usable, self._snapshot.device_model[rows], request.gpu.count_min)
        return rows[fits], usable[fits]

    def _least_fragmenting(self, job: PendingJob, shape: _Shape, index: FragmentationIndex) -> Placement | None:
        known = shape.scores
        if known is None:
            known = shape.scores = ShapeScores(len(self._snapshot.machines))
        stale = index.stale_rows(known, shape.candidates)
        if len(stale):
            rows, usable = self._fitting(job, shape, stale)
            if len(rows):
                index.rescore(known, job.request, rows, usable)
        scores = known.scores
        if job.avoided_machines:
            avoided = [self._snapshot.index_of.get(machine_id, -1) for machine_id in job.avoided_machines]
            others = scores.copy()
            others[[row for row in avoided if row >= 0]] = np.inf
            scores = others if np.isfinite(others).any() else scores
        row = int(scores.argmin()) if len(scores) else 0
        if not len(scores) or scores[row] == np.inf:
            return None
        column = int(known.columns[row])
        return self._take(job, row, [column] if column >= 0 else self._whole_devices(row, shape, job))

    def _whole_devices(self, row: int, shape: _Shape, job: PendingJob) -> list[int]:
        if job.request.gpu is None or shape.eligible is None:
            return []
        rows = np.array([row])
        usable = usable_devices(self._capacity, rows, job.request.gpu, shape.eligible, self._team_number(job.team_id))
        return self._choose_devices(row, usable[0], job)

    def _team_number(self, team_id: TeamId) -> int:
        return self._teams.setdefault(team_id, len(self._teams))

    def _rank(self, job: PendingJob, shape: _Shape, rows: Ints) -> int:
        """Which of `rows` is best: avoided machines last, then the policy's objective, then its tie-breakers."""
        capacity = self._capacity
        avoided = [self._snapshot.index_of.get(machine_id, -1) for machine_id in job.avoided_machines]
        gpus_free = capacity.device[rows].sum(axis=1)
        cpu_free = capacity.cpu[rows]
        price = shape.prices[rows]
        match self._policy.objective:
            case Objective.CHEAPEST:
                keys = [price, gpus_free, cpu_free]
            case Objective.SPREAD:
                keys = [-gpus_free, -cpu_free, price]
            case Objective.FRAGMENTATION:
                raise AssertionError("ranked by its index")
        # lexsort takes the most important key last; the row number keeps ties deterministic.
        return int(np.lexsort((rows, *reversed(keys), np.isin(rows, avoided)))[0])

    def _choose_devices(self, row: int, usable: Bools, job: PendingJob) -> list[int]:
        """Columns of the devices to take: all of one model; of a fraction's candidates the fullest one."""
        gpu = job.request.gpu
        if gpu is None:
            return []
        models = self._snapshot.device_model[row]
        columns = [int(column) for column in np.flatnonzero(usable)]
        if gpu.milli < MILLI_PER_UNIT:
            free = self._capacity.device[row]
            return [min(columns, key=lambda column: (int(free[column]), column))]
        return tightest_group(models, usable, gpu.count_min)

    def _take(self, job: PendingJob, row: int, columns: list[int]) -> Placement:
        capacity, request, machine = self._capacity, job.request, self._snapshot.machines[row]
        milli = request.gpu.milli if request.gpu is not None else 0
        capacity.cpu[row] -= request.cpu_milli
        capacity.memory[row] -= request.memory_bytes
        capacity.disk[row] -= request.disk_bytes
        team = self._team_number(job.team_id)
        for column in columns:
            capacity.device[row, column] -= milli
            capacity.tenant[row, column] = team
        if self._index is not None:
            self._index.changed(row)
        gpu_milli = milli * len(columns)
        used = self._use.get(job.team_id, TeamUse())
        self._use[job.team_id] = used.plus(gpu_milli, request.cpu_milli, request.memory_bytes)
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
                gpu_milli=gpu_milli,
                cpu_milli=request.cpu_milli,
                price_udgpu_per_gpu_hour=machine.price_udgpu_per_gpu_hour,
                price_udgpu_per_cpu_hour=machine.price_udgpu_per_cpu_hour,
            ),
        )
