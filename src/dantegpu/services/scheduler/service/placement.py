"""The leader's rounds: what waits, what is free, one plan, holds for it, one transaction that applies it."""

import asyncio
import heapq
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import UnexpectedEvent, unwrap
from dantegpu.contracts.gen.dante.v1 import billing_pb2, billing_pb2_grpc, events_pb2, jobs_pb2
from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, DeviceId, InvalidId, JobId, MachineId, TeamId
from dantegpu.domain.job import JobState, QueueReason
from dantegpu.domain.pricing import WINDOW_SECONDS
from dantegpu.domain.resources import MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    DEFAULT_POLICY,
    MARGIN_SECONDS,
    Decision,
    Lease,
    PendingJob,
    Placement,
    Plan,
    RoundPlan,
    Running,
    Snapshot,
    is_large,
    plan_round,
    schedule,
)
from dantegpu.domain.units import format_dgpu
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.bus import Bus, unsubscribe
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership, LostLeadership
from dantegpu.kit.lifecycle import Wakeup
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.telemetry import span
from dantegpu.services.scheduler import store
from dantegpu.services.scheduler.errors import PlanConflict
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.service.transitions import JobBatch, Opening, Wakeups
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import JobRow, LiveLeaseRow

log = structlog.get_logger(__name__)

LOAD_PAGE = 1000
MAX_PLACEMENTS_PER_ROUND = 1000
MAX_REASONS_PER_ROUND = 1000
MAX_TAKEN = 200_000
MAX_BACKFILL_JOBS = 2000
MAX_LARGE_JOBS = 100
"""While a large job waits, a round looks at so many of the first small and large ones; the others wait their turn."""
NO_FUNDS_RETRY_SECONDS = 10.0
IDLE_ROUND_SECONDS = 5.0
"""A round also runs this often while something waits: what woke nobody is found all the same."""
ROUND_PAUSE_SECONDS = 0.01
TEAM_PAUSE_SECONDS = 1.0
"""A team that could not pay is left out of rounds for so long: its other jobs must not keep the rounds busy."""
SWEEP_SECONDS = 15.0
"""How often the queue in memory is compared with PostgreSQL."""


def pending_of(row: JobRow) -> PendingJob:
    """A waiting job as placement sees it."""
    spec = jobs_pb2.JobSpec.FromString(row.spec)
    pending = pending_of_spec(JobId(row.id), TeamId(row.team_id), row.submitted_at, spec)
    avoided = frozenset(MachineId(machine) for machine in row.avoided_machines)
    return replace(pending, avoided_machines=avoided, not_before=row.not_before)


def pending_of_spec(job_id: JobId, team_id: TeamId, submitted_at: datetime, spec: jobs_pb2.JobSpec) -> PendingJob:
    """A job that was just submitted as placement sees it."""
    has_limit = spec.HasField("max_price_udgpu_per_gpu_hour")
    return PendingJob(
        id=job_id,
        team_id=team_id,
        submitted_at=submitted_at,
        request=request_of(spec),
        priority=spec.priority,
        max_price_udgpu_per_hour=spec.max_price_udgpu_per_gpu_hour if has_limit else None,
        runs_image=bool(spec.image),
        nodes=max(spec.nodes, 1),
    )


def request_of(spec: jobs_pb2.JobSpec) -> ResourceRequest:
    """Raises InvalidGpuSpec or ValueError when the spec asks for what cannot be."""
    resources = spec.resources
    return ResourceRequest(
        gpu=parse_gpu_spec(resources.gpu) if resources.gpu else None,
        cpu_milli=resources.cpu_milli,
        memory_bytes=resources.memory_bytes,
        disk_bytes=resources.disk_bytes,
    )


async def live_leases(tx: Tx) -> list[Lease]:
    return [_lease(row) for row in await store.live_leases(tx)]


def _lease(row: LiveLeaseRow) -> Lease:
    return Lease(
        machine_id=MachineId(row.machine_id),
        team_id=TeamId(row.team_id),
        cpu_milli=row.cpu_milli,
        memory_bytes=row.memory_bytes,
        disk_bytes=row.disk_bytes,
        devices=tuple((DeviceId(device), milli) for device, milli in zip(row.device_ids, row.millis, strict=True)),
    )


def plan_of(
    machines: Iterable[MachineInfo], live: Sequence[LiveLeaseRow], pending: Sequence[PendingJob], now: datetime
) -> tuple[Snapshot, Plan | RoundPlan]:
    """What is there, and who gets it. Only where something large waits does a round cost what reservations cost."""
    leases = [_lease(row) for row in live]
    snapshot = Snapshot.from_machines(machines, leases)
    large = [job for job in pending if is_large(job)]
    if not large:
        return snapshot, schedule(snapshot, pending, DEFAULT_POLICY, now=now)
    small = [job for job in pending if not is_large(job)]
    first = heapq.nsmallest(MAX_BACKFILL_JOBS, small, key=_rank) + heapq.nsmallest(MAX_LARGE_JOBS, large, key=_rank)
    running = [
        Running(lease, (row.running_at or now) + timedelta(seconds=row.max_duration_seconds + MARGIN_SECONDS))
        for lease, row in zip(leases, live, strict=True)
    ]
    return snapshot, plan_round(snapshot, running, first, DEFAULT_POLICY, now=now)


def _rank(job: PendingJob) -> tuple[int, datetime]:
    return -job.priority, job.submitted_at


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A job's place in a plan: one placement per node, by rank, and the attempt that each will open."""

    job_id: UUID
    placements: tuple[Placement, ...]
    attempts: tuple[AttemptId, ...]

    @staticmethod
    def of(placements: Sequence[Placement], limit: int) -> "list[_Chosen]":
        """About `limit` placements, job by job: a gang is never cut."""
        by_job: dict[UUID, list[Placement]] = {}
        for number, placement in enumerate(placements):
            job_id = placement.job_id.uuid
            if number >= limit and job_id not in by_job:
                break
            by_job.setdefault(job_id, []).append(placement)
        return [
            _Chosen(job_id, tuple(nodes), tuple(AttemptId.new() for _ in nodes)) for job_id, nodes in by_job.items()
        ]


@dataclass(slots=True)
class _Waiting:
    job: PendingJob
    max_duration_seconds: int
    told: tuple[str, str]
    """The reason and detail that the database has."""
    traceparent: str
    """Of the submission."""
    array_id: UUID | None = None
    """A task's array, under whose id its attempts are paid for."""
    deadline_at: datetime | None = None
    """Not placed from then on."""
    blocked_until_seconds: float = 0.0
    """Monotonic; no funds: billing is not asked again before, unless money came in."""


class PlacementLeader:
    """Runs on the one replica that holds the lease. Its queue is a cache of PostgreSQL's QUEUED rows."""

    def __init__(
        self,
        db: Database,
        bus: Bus,
        inventory: Inventory,
        billing: billing_pb2_grpc.BillingServiceStub,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
    ) -> None:
        self._db = db
        self._bus = bus
        self._inventory = inventory
        self._billing = billing
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings
        self._queue: dict[UUID, _Waiting] = {}
        self._paused_teams: dict[TeamId, float] = {}
        self._taken: set[UUID] = set()
        """Queued by take(); the message about them is still to come."""
        self._leading = False
        self._again = Wakeup()
        self._sweep_now = Wakeup()
        # What NATS lost is still in PostgreSQL.
        bus.on_reconnect(self._sweep_now.notify)
        self.leadership: Leadership | None = None
        inventory.on_change.append(self._again)

    def notify(self) -> None:
        self._again.notify()

    def drop_ended(self) -> None:
        """Compare the queue with PostgreSQL soon."""
        self._sweep_now.notify()

    def submitted(self, rows: Sequence[JobRow]) -> None:
        """Queue jobs that were just submitted here; a message about them is under way. Only a leader listens."""
        if not self._leading or not self._bus.connected:
            return  # without NATS no machine could be told either; the message comes when it is back
        if len(self._taken) > MAX_TAKEN:
            self._taken.clear()  # their messages got lost; should they come after all, PostgreSQL is asked
        self._taken.update(row.id for row in rows if row.state == JobState.QUEUED.value)
        self.take(rows)

    def take(self, rows: Sequence[JobRow]) -> None:
        """Queue jobs that were just written: sooner than a message or a sweep would."""
        self._add(rows)

    async def lead(self) -> None:
        """Until cancelled: the queue from PostgreSQL, then rounds."""
        self._leading = True
        try:
            await self._lead()
        finally:
            self._leading = False

    async def _lead(self) -> None:
        self._queue.clear()
        self._taken.clear()
        self._paused_teams.clear()
        await self._load()
        async with AsyncExitStack() as stack:
            wallets = await self._bus.subscribe(subjects.ALL_WALLET_EVENTS, self._wallet_changed)
            stack.push_async_callback(unsubscribe, wallets)
            consuming = await self._bus.consume(subjects.JOBS, subjects.PLACEMENT_CONSUMER, self._submitted)
            stack.push_async_callback(consuming.close)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._rounds(), name="placement rounds")
                tasks.create_task(self._sweeps(), name="placement sweeps")

    # --- the queue ----------------------------------------------------------------------------------------------------

    async def _submitted(self, messages: Sequence[Msg]) -> None:
        ids: list[UUID] = []
        for message in messages:
            try:
                ids += [JobId.parse(text).uuid for text in unwrap(message.data, events_pb2.JobsSubmitted)[1].job_ids]
            except (InvalidId, UnexpectedEvent, DecodeError) as error:
                log.error("submission_unreadable", error=str(error))
        # Most were submitted in this process and taken at once; they may be running by now.
        taken = {job_id for job_id in ids if job_id in self._taken}
        self._taken -= taken
        ids = [job_id for job_id in ids if job_id not in taken]
        if not ids:
            return
        async with self._db.statement() as tx:
            rows = await store.jobs_by_id(tx, ids)
        self._add(rows.values())
        if any(row.array_size for row in rows.values()):
            self._wakeups.arrays()

    def _add(self, rows: Iterable[JobRow]) -> None:
        for row in rows:
            if row.state == JobState.QUEUED.value:
                spec = jobs_pb2.JobSpec.FromString(row.spec)
                duration = spec.max_duration_seconds or self._settings.max_duration_seconds
                try:
                    pending = pending_of(row)
                except ValueError as error:
                    # It passed the intake's check once; it must not keep the others from being placed now.
                    log.error("job_unreadable", job_id=str(JobId(row.id)), error=str(error))
                    continue
                pending = replace(pending, max_duration_seconds=duration)
                told = (row.reason or "", row.reason_detail)
                self._queue[row.id] = _Waiting(pending, duration, told, row.traceparent, row.array_id, row.deadline_at)
        self._again.notify()

    async def _load(self) -> None:
        """Every QUEUED job of PostgreSQL that is not in memory, and nothing in memory that is not QUEUED."""
        after: JobRow | None = None
        seen: set[UUID] = set()
        before = set(self._queue)
        while True:
            async with self._db.transaction() as tx:
                rows = await store.queued_jobs(tx, after=after, limit=LOAD_PAGE)
            seen.update(row.id for row in rows)
            self._add(row for row in rows if row.id not in self._queue)
            if len(rows) < LOAD_PAGE:
                break
            after = rows[-1]
        for gone in before - seen:
            self._queue.pop(gone, None)

    async def _sweeps(self) -> None:
        while True:
            await self._sweep_now.wait(SWEEP_SECONDS)
            try:
                await self._load()
            except ServiceError as error:
                log.warning("queue_sweep_failed", error=error.message)

    async def _wallet_changed(self, message: Msg) -> None:
        _, event = unwrap(message.data, events_pb2.WalletChanged)
        team_id = TeamId.parse(event.team_id)
        self._paused_teams.pop(team_id, None)
        for waiting in self._queue.values():
            if waiting.job.team_id == team_id:
                waiting.blocked_until_seconds = 0.0
        self._again.notify()

    # --- rounds -------------------------------------------------------------------------------------------------------

    async def _rounds(self) -> None:
        while True:
            again = False
            if self._queue and self._inventory.loaded:
                try:
                    again = await self._round()
                except ServiceError as error:
                    log.warning("round_failed", error=error.message)
                except PlanConflict as error:
                    # Somebody changed what the plan was made of. The constraint held; the next round sees the truth.
                    log.warning("plan_rejected", error=str(error))
            if not again:
                # The first job is placed at once; those that come until the pause is over share a round.
                await asyncio.sleep(ROUND_PAUSE_SECONDS)
                await self._again.wait(self._pause_seconds())

    def _pause_seconds(self) -> float | None:
        if not self._queue:
            return None
        now = self._clock.now()
        due = [w.job.not_before for w in self._queue.values() if w.job.not_before and w.job.not_before > now]
        until_due = (min(due) - now).total_seconds() if due else IDLE_ROUND_SECONDS
        return max(0.02, min(IDLE_ROUND_SECONDS, until_due))

    async def _round(self) -> bool:
        """One plan, applied. True when the next round should follow at once."""
        now = self._clock.now()
        monotonic = self._clock.monotonic()
        ready = self._ready(monotonic, now)
        if not ready:
            return False
        with span("placement round", jobs=str(len(ready))):
            async with self._db.statement() as tx:
                live = await store.live_leases(tx)
            snapshot, plan = plan_of(self._inventory.machines(), live, ready, now)
            chosen = _Chosen.of(plan.placements, MAX_PLACEMENTS_PER_ROUND)
            refused = await self._open_holds(chosen, snapshot)
            try:
                unused = await self._apply(chosen, refused, plan.unplaced, snapshot, now)
            except (PlanConflict, LostLeadership):
                # Rolled back for certain. After anything else the commit may have happened, and the attempts need
                # their holds (I5): settlement's sweep looks which of them exist.
                await self._void(_attempts_of(chosen))
                raise
            # Of a gang that is refused for one node, the holds of the others were opened for nothing.
            partly = [job for job in chosen if job.job_id in refused and len(job.attempts) > 1]
            await self._void([*unused, *_attempts_of(partly)])
        more = len(plan.placements) > sum(len(job.placements) for job in chosen)
        return more or bool(refused and self._ready(monotonic, now))

    def _ready(self, monotonic: float, now: datetime) -> list[PendingJob]:
        self._paused_teams = {team: until for team, until in self._paused_teams.items() if until > monotonic}
        return [
            waiting.job
            for waiting in self._queue.values()
            if waiting.blocked_until_seconds <= monotonic and waiting.job.team_id not in self._paused_teams
            if waiting.deadline_at is None or waiting.deadline_at > now
        ]

    async def _open_holds(self, chosen: Sequence[_Chosen], snapshot: Snapshot) -> dict[UUID, billing_pb2.HoldResult]:
        """Open the first window's hold of each placement; the refusals by job."""
        if not chosen:
            return {}
        requests = [
            billing_pb2.HoldRequest(
                attempt_id=str(attempt_id),
                job_id=str(JobId(self._array_of(placement) or placement.job_id.uuid)),
                window=0,
                payer_team_id=str(placement.team_id),
                provider_team_id=str(snapshot.machines[placement.machine_index].team_id),
                rate_udgpu_per_hour=placement.rate_udgpu_per_hour,
                window_seconds=WINDOW_SECONDS,
                simulated=snapshot.machines[placement.machine_index].simulated,
            )
            for job in chosen
            for placement, attempt_id in zip(job.placements, job.attempts, strict=True)
        ]
        try:
            answer = await rpc.call(
                self._billing.OpenHolds, billing_pb2.OpenHoldsRequest(holds=requests), actor=SERVICE, timeout_seconds=10
            )
        except ServiceError:
            # Some may be open all the same, and would tie up money until the sweep finds them.
            await self._void(_attempts_of(chosen))
            raise
        jobs = (job.job_id for job in chosen for _ in job.attempts)
        return {job_id: result for job_id, result in zip(jobs, answer.results, strict=True) if not result.opened}

    def _array_of(self, placement: Placement) -> UUID | None:
        waiting = self._queue.get(placement.job_id.uuid)
        return waiting.array_id if waiting else None

    async def _apply(
        self,
        chosen: Sequence[_Chosen],
        refused: dict[UUID, billing_pb2.HoldResult],
        unplaced: Sequence[Decision],
        snapshot: Snapshot,
        now: datetime,
    ) -> list[AttemptId]:
        """Write the plan. Returns the attempts that came to nothing because their job changed meanwhile."""
        told = self._news(unplaced, refused)
        placed = [job for job in chosen if job.job_id not in refused]
        if not placed and not told:
            return []
        unused: list[AttemptId] = []
        done: list[UUID] = []
        gone: list[UUID] = []
        async with self._db.transaction() as tx:
            assert self.leadership is not None, "rounds run under a lease"
            await self.leadership.assert_held(tx)
            batch = await JobBatch.lock(tx, [*(job.job_id for job in placed), *told], now)
            for place in placed:
                job = batch.get(place.job_id)
                if job is None or job.state is not JobState.QUEUED:
                    unused.extend(place.attempts)
                    gone.append(place.job_id)
                    continue
                first, *others = zip(place.attempts, (node.machine_id for node in place.placements), strict=True)
                with self._span(place):
                    batch.apply(place.job_id, lifecycle.Placed(*first, tuple(others)), self._opening(place, snapshot))
                done.append(place.job_id)
            for job_id, reason in told.items():
                job = batch.get(job_id)
                if job is None or job.state is not JobState.QUEUED:
                    gone.append(job_id)
                else:
                    batch.apply(job_id, lifecycle.StillWaiting(QueueReason(reason[0]), reason[1]))
            await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        for job_id in (*done, *gone):
            self._queue.pop(job_id, None)
        for job_id, reason in told.items():
            if job_id in self._queue:
                self._queue[job_id].told = reason
        return unused

    def _span(self, place: _Chosen) -> AbstractContextManager[object]:
        """The placement as a part of its submission's trace; the round has one of its own."""
        waiting = self._queue.get(place.job_id)
        return span(
            "placement",
            waiting.traceparent if waiting else "",
            job_id=str(JobId(place.job_id)),
            attempt_id=str(place.attempts[0]),
            machine_id=str(place.placements[0].machine_id),
        )

    def _news(
        self, unplaced: Sequence[Decision], refused: dict[UUID, billing_pb2.HoldResult]
    ) -> dict[UUID, tuple[str, str]]:
        """Jobs whose reason is another one than the database has."""
        news: dict[UUID, tuple[str, str]] = {}
        for decision in unplaced:
            waiting = self._queue.get(decision.job_id.uuid)
            reason = (decision.reason.value, decision.detail)
            # A retry's reason says what happened to the last attempt; a round has nothing to add to that.
            if waiting and decision.reason is not QueueReason.WAITING_FOR_RETRY and waiting.told != reason:
                news[decision.job_id.uuid] = reason
            if len(news) >= MAX_REASONS_PER_ROUND:
                break
        for job_id, refusal in refused.items():
            waiting = self._queue.get(job_id)
            if waiting is None:
                continue
            monotonic = self._clock.monotonic()
            waiting.blocked_until_seconds = monotonic + NO_FUNDS_RETRY_SECONDS
            self._paused_teams[waiting.job.team_id] = monotonic + TEAM_PAUSE_SECONDS
            reason = _refusal_reason(refusal)
            if waiting.told != reason:
                news[job_id] = reason
        return news

    def _opening(self, place: _Chosen, snapshot: Snapshot) -> Opening:
        machines = [snapshot.machines[placement.machine_index] for placement in place.placements]
        known = [self._inventory.machine(machine.id) for machine in machines]
        names = [
            f"{found.inventory.hostname if found else machine.id} ({machine.id})"
            for found, machine in zip(known, machines, strict=True)
        ]
        rate = sum(placement.rate_udgpu_per_hour for placement in place.placements)
        return Opening(
            attempts=tuple(map(self._attempt, place.placements, machines)),
            devices=tuple(
                tuple(
                    {"device_id": share.device_id.uuid, "device_index": share.index, "milli": share.milli}
                    for share in placement.devices
                )
                for placement in place.placements
            ),
            message=f"on {', '.join(names)}, {format_dgpu(rate)} $dGPU per hour",
        )

    def _attempt(self, placement: Placement, machine: MachineInfo) -> dict[str, Any]:
        waiting = self._queue.get(placement.job_id.uuid)
        known = self._inventory.machine(machine.id)
        return {
            "job_id": placement.job_id.uuid,
            "array_id": waiting.array_id if waiting else None,
            "team_id": placement.team_id.uuid,
            "machine_id": machine.id.uuid,
            "provider_team_id": machine.team_id.uuid,
            "simulated": any(machine.devices[share.index].simulated for share in placement.devices),
            "sandbox": known.inventory.sandbox if known else "",
            "cpu_milli": placement.cpu_milli,
            "memory_bytes": placement.memory_bytes,
            "disk_bytes": placement.disk_bytes,
            "rate_udgpu_per_hour": placement.rate_udgpu_per_hour,
            "max_duration_seconds": waiting.max_duration_seconds if waiting else self._settings.max_duration_seconds,
        }

    async def _void(self, attempts: Iterable[AttemptId]) -> None:
        """Give back holds whose attempt came to nothing. When this fails, settlement's sweep finds them."""
        closes = [billing_pb2.HoldClose(attempt_id=str(attempt), window=0, used_seconds=0) for attempt in attempts]
        if not closes:
            return
        try:
            await rpc.call(self._billing.CloseHolds, billing_pb2.CloseHoldsRequest(holds=closes), actor=SERVICE)
        except ServiceError as error:
            log.warning("holds_not_voided", holds=len(closes), error=error.message)


def _attempts_of(chosen: Iterable[_Chosen]) -> list[AttemptId]:
    return [attempt_id for job in chosen for attempt_id in job.attempts]


def _refusal_reason(refusal: billing_pb2.HoldResult) -> tuple[str, str]:
    if refusal.refusal not in ("", "no-funds"):
        log.error("hold_refused", attempt_id=refusal.attempt_id, refusal=refusal.refusal)
        return QueueReason.RESTRICTED.value, f"billing refused the machine: {refusal.refusal}"
    return QueueReason.NO_FUNDS.value, (
        f"{format_dgpu(refusal.available_udgpu)} $dGPU are available, the first {WINDOW_SECONDS // 60} minutes cost "
        f"{format_dgpu(refusal.ceiling_udgpu)}."
    )
