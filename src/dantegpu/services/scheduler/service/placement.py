"""The leader's rounds: what waits, what is free, one plan, holds for it, one transaction that applies it."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
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
from dantegpu.domain.ids import AttemptId, InvalidId, JobId, MachineId, TeamId
from dantegpu.domain.job import JobState, QueueReason
from dantegpu.domain.pricing import FULL_PRICE_PERCENT, WINDOW_SECONDS
from dantegpu.domain.resources import MachineInfo, ResourceRequest, parse_gpu_spec
from dantegpu.domain.scheduling import (
    MARGIN_SECONDS,
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
from dantegpu.kit.db import Database
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership, LostLeadership
from dantegpu.kit.lifecycle import Pace, Wakeup
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.telemetry import span
from dantegpu.services.scheduler import store
from dantegpu.services.scheduler.errors import PlanConflict
from dantegpu.services.scheduler.service.fleet import Fleet, lease_of, running_of
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.service.preemption import Room
from dantegpu.services.scheduler.service.transitions import JobBatch, Opening, Wakeups
from dantegpu.services.scheduler.service.waiting import Note, WaitingJobs
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import JobRow

log = structlog.get_logger(__name__)

LOAD_PAGE = 1000
MAX_PLACEMENTS_PER_ROUND = 1000
MAX_REASONS_PER_ROUND = 1000
MAX_TAKEN = 200_000
MAX_REASONS_BESIDE_PLACEMENTS = 100
MAX_TAKEN_IN_PER_ROUND = 2000
MAX_BACKFILL_JOBS = 2000
MAX_LARGE_JOBS = 100
"""While a large job waits, a round looks at so many of the first small and large ones; the others wait their turn."""
IDLE_ROUND_SECONDS = 5.0
"""A round also runs this often while something waits: what woke nobody is found all the same."""
ROUND_PAUSE_SECONDS = 0.01
SWEEP_SECONDS = 15.0
"""How often the queue in memory is compared with PostgreSQL."""


def pending_of(
    row: JobRow, spot_price_percent: int, spec: jobs_pb2.JobSpec | None = None, max_duration_seconds: int | None = None
) -> PendingJob:
    """A waiting job as placement sees it. `spec` is the row's, when it has been read; `max_duration_seconds` holds for
    a job that names none."""
    spec = spec or jobs_pb2.JobSpec.FromString(row.spec)
    pending = pending_of_spec(
        JobId(row.id), TeamId(row.team_id), row.submitted_at, spec, spot_price_percent, max_duration_seconds
    )
    if not row.avoided_machines and row.not_before is None:
        return pending
    avoided = frozenset(MachineId(machine) for machine in row.avoided_machines)
    return replace(pending, avoided_machines=avoided, not_before=row.not_before)


def is_spot(spec: jobs_pb2.JobSpec) -> bool:
    """May it be preempted? With `auto` it may when it can go on from a checkpoint."""
    return spec.spot_policy == "spot" or (spec.spot_policy == "auto" and spec.HasField("checkpoint"))


def pending_of_spec(
    job_id: JobId,
    team_id: TeamId,
    submitted_at: datetime,
    spec: jobs_pb2.JobSpec,
    spot_price_percent: int,
    max_duration_seconds: int | None = None,
) -> PendingJob:
    """A job that was just submitted as placement sees it."""
    spot = is_spot(spec)
    has_limit = spec.HasField("max_price_udgpu_per_gpu_hour")
    return PendingJob(
        id=job_id,
        team_id=team_id,
        submitted_at=submitted_at,
        request=request_of(spec),
        priority=spec.priority,
        max_price_udgpu_per_hour=spec.max_price_udgpu_per_gpu_hour if has_limit else None,
        image=spec.image,
        network=spec.network,
        ports=bool(spec.ports),
        nodes=max(spec.nodes, 1),
        spot=spot,
        price_percent=spot_price_percent if spot else FULL_PRICE_PERCENT,
        max_duration_seconds=spec.max_duration_seconds or max_duration_seconds,
    )


def request_of(spec: jobs_pb2.JobSpec) -> ResourceRequest:
    """Raises InvalidGpuSpec or ValueError when the spec asks for what cannot be."""
    resources = spec.resources
    return _request(resources.gpu, resources.cpu_milli, resources.memory_bytes, resources.disk_bytes)


@lru_cache(maxsize=4096)
def _request(gpu: str, cpu_milli: int, memory_bytes: int, disk_bytes: int) -> ResourceRequest:
    """Jobs that ask for the same share one object: many wait."""
    return ResourceRequest(parse_gpu_spec(gpu) if gpu else None, cpu_milli, memory_bytes, disk_bytes)


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
        self._queue = WaitingJobs(clock)
        self.room = Room(db, inventory, billing, outbox, wakeups, clock, settings, self._queue)
        self._incoming: deque[JobRow] = deque()
        """Written and not in the queue yet."""
        self._taken: set[UUID] = set()
        """Queued by submitted(); the message about them is still to come."""
        self._leading = False
        self._fleet = Fleet(db, inventory, clock)
        self._policy = settings.policy
        self._again = Wakeup()
        self._pace = Pace(ROUND_PAUSE_SECONDS)
        self._sweep_now = Wakeup()
        # What NATS lost is still in PostgreSQL.
        bus.on_reconnect(self._sweep_now.notify)
        self.leadership: Leadership | None = None
        inventory.on_change.append(self._again)

    def notify(self) -> None:
        self._again.notify()

    def ended(self, attempts: Sequence[UUID]) -> None:
        """What these held is free; the transaction in which they ended has been committed."""
        self._fleet.ended(attempts)

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
        self._incoming.clear()
        self._taken.clear()
        self.room.forget()
        self._fleet.watch(True)
        async with AsyncExitStack() as stack:
            stack.callback(self._fleet.watch, False)
            await self._load()
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
        """The next rounds take them in: whoever has just written thousands of jobs does not wait for that."""
        self._incoming.extend(rows)
        self._again.notify()

    def _take_in(self) -> None:
        for _ in range(min(len(self._incoming), MAX_TAKEN_IN_PER_ROUND)):
            row = self._incoming.popleft()
            if row.state == JobState.QUEUED.value:
                spec = jobs_pb2.JobSpec.FromString(row.spec)
                duration = spec.max_duration_seconds or self._settings.max_duration_seconds
                try:
                    pending = pending_of(row, self._settings.spot_price_percent, spec, duration)
                except ValueError as error:
                    # It passed the intake's check once; it must not keep the others from being placed now.
                    log.error("job_unreadable", job_id=str(JobId(row.id)), error=str(error))
                    continue
                told = (row.reason or "", row.reason_detail)
                note = Note(duration, told, row.traceparent, row.array_id, row.deadline_at, pending.spot)
                note.saves = spec.HasField("checkpoint")
                self._queue.add(pending, note)

    async def _load(self) -> None:
        """Every QUEUED job of PostgreSQL that is not in memory, and nothing in memory that is not QUEUED."""
        after: UUID | None = None
        gone = self._queue.ids()
        while True:
            async with self._db.transaction() as tx:
                ids = await store.queued_ids(tx, after=after, limit=LOAD_PAGE)
                missing = [job_id for job_id in ids if job_id not in self._queue]
                rows = await store.jobs_by_id(tx, missing) if missing else {}
            gone.difference_update(ids)
            if rows:
                self._add(rows.values())
            if len(ids) < LOAD_PAGE:
                break
            after = ids[-1]
        for job_id in gone:
            self._queue.discard(job_id)

    async def _sweeps(self) -> None:
        while True:
            await self._sweep_now.wait(SWEEP_SECONDS)
            try:
                await self._load()
            except ServiceError as error:
                log.warning("queue_sweep_failed", error=error.message)

    async def _wallet_changed(self, message: Msg) -> None:
        _, event = unwrap(message.data, events_pb2.WalletChanged)
        self._queue.money_came_in(TeamId.parse(event.team_id))
        self._again.notify()

    # --- rounds -------------------------------------------------------------------------------------------------------

    async def _rounds(self) -> None:
        while True:
            again = False
            self._pace.begin()
            self._take_in()
            if self._queue and self._inventory.loaded:
                try:
                    again = await self._round()
                except ServiceError as error:
                    log.warning("round_failed", error=error.message)
                except PlanConflict as error:
                    # Somebody changed what the plan was made of. The constraint held; the next round sees the truth.
                    log.warning("plan_rejected", error=str(error))
            if not again and not self._incoming:
                # The first job is placed at once; those that come until the pause is over share a round.
                await self._pace.rest()
                await self._again.wait(self._pause_seconds())

    def _pause_seconds(self) -> float | None:
        pause, room = self._queue.pause_seconds(IDLE_ROUND_SECONDS), self.room.pause_seconds()
        return room if pause is None else pause if room is None else min(pause, room)

    async def _round(self) -> bool:
        """One plan, applied. True when the next round should follow at once."""
        if not self._queue.ready:
            return False
        now = self._clock.now()
        with span("placement round", jobs=str(len(self._queue))):
            try:
                snapshot, plan = await self._plan(now)
                chosen = _Chosen.of(plan.placements, MAX_PLACEMENTS_PER_ROUND)
                refused = await self._carry_out(chosen, plan, snapshot, now)
            except BaseException:
                # What of the plan is true now is not known: the next round reads it.
                self._fleet.forget()
                self._queue.forget_told()
                self.room.forget()
                raise
            if len(plan.placements) < MAX_PLACEMENTS_PER_ROUND:
                await self.room.make(now, plan)
        return len(plan.placements) >= MAX_PLACEMENTS_PER_ROUND or bool(refused and self._queue.ready)

    async def _plan(self, now: datetime) -> tuple[Snapshot, Plan | RoundPlan]:
        """A round goes on from the one before; where something is kept for those who preempt, it looks at all anew."""
        await self._fleet.remember(self._policy, now)
        claims = await self.room.claims()
        if not claims:
            snapshot = await self._fleet.look()
            queue, state, limit = self._queue.queue, self._fleet.state, MAX_PLACEMENTS_PER_ROUND
            plan = schedule(snapshot, queue, self._policy, now=now, state=state, limit=limit, ends=self._fleet.ends)
            return snapshot, plan
        self._fleet.forget()
        async with self._db.statement() as tx:
            live = await store.live_leases(tx)
        large = self._queue.first(MAX_LARGE_JOBS, is_large)
        small = self._queue.first(MAX_BACKFILL_JOBS, lambda job: not is_large(job))
        view = self.room.look(Snapshot.from_machines(self._inventory.machines(), map(lease_of, live)), live, claims)
        own = view.waiting | {placement.job_id for placement in view.placements}
        others = [job for job in (*small, *large) if job.id not in own]
        running, past = [running_of(row, now) for row in live], self._fleet.state.past
        plan = plan_round(view.kept, running, others, self._policy, now=now, past=past)
        return view.kept, RoundPlan((*view.placements, *plan.placements), plan.unplaced, plan.reservations)

    async def _carry_out(
        self, chosen: Sequence[_Chosen], plan: Plan | RoundPlan, snapshot: Snapshot, now: datetime
    ) -> bool:
        """Open the holds, write the plan. True when billing refused some of it."""
        ends_at = {job.job_id: self._ends_at(job.job_id, now) for job in chosen}
        refused = await self._open_holds(chosen, snapshot)
        try:
            unused = await self._apply(chosen, refused, plan, snapshot, now)
        except (PlanConflict, LostLeadership):
            # Rolled back for certain. After anything else the commit may have happened, and the attempts need
            # their holds (I5): settlement's sweep looks which of them exist.
            await self._void(_attempts_of(chosen))
            raise
        idle = refused.keys() | unused
        for job in chosen:
            leases = [placement.lease for placement in job.placements]
            self.room.began()
            if job.job_id in idle:
                self._fleet.came_to_nothing(leases)
            else:
                running = (Running(lease, ends_at[job.job_id]) for lease in leases)
                self._fleet.began(zip((attempt.uuid for attempt in job.attempts), running, strict=True))
        # Of a gang that is refused for one node, the holds of the others were opened for nothing.
        partly = [job for job in chosen if job.job_id in refused and len(job.attempts) > 1]
        await self._void(_attempts_of([*(job for job in chosen if job.job_id in unused), *partly]))
        return bool(refused)

    def _ends_at(self, job_id: UUID, now: datetime) -> datetime:
        note = self._queue.note(job_id)
        seconds = note.max_duration_seconds if note is not None else self._settings.max_duration_seconds
        return now + timedelta(seconds=seconds + MARGIN_SECONDS)

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
        waiting = self._queue.note(placement.job_id.uuid)
        return waiting.array_id if waiting else None

    async def _apply(
        self,
        chosen: Sequence[_Chosen],
        refused: dict[UUID, billing_pb2.HoldResult],
        plan: Plan | RoundPlan,
        snapshot: Snapshot,
        now: datetime,
    ) -> set[UUID]:
        """Write the plan. Returns jobs whose attempts came to nothing because the job changed meanwhile."""
        told = self._news(plan, refused)
        placed = [job for job in chosen if job.job_id not in refused]
        if not placed and not told:
            return set()
        unused: set[UUID] = set()
        done: list[UUID] = []
        gone: list[UUID] = []
        async with self._db.transaction() as tx:
            assert self.leadership is not None, "rounds run under a lease"
            await self.leadership.assert_held(tx)
            batch = await JobBatch.lock(tx, [*(job.job_id for job in placed), *told], now)
            for place in placed:
                job = batch.get(place.job_id)
                if job is None or job.state is not JobState.QUEUED:
                    unused.add(place.job_id)
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
            await self.room.placed(tx, done)
            await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        for job_id in (*done, *gone):
            self._queue.discard(job_id)
        self._queue.told(told.items())
        return unused

    def _span(self, place: _Chosen) -> AbstractContextManager[object]:
        """The placement as a part of its submission's trace; the round has one of its own."""
        waiting = self._queue.note(place.job_id)
        return span(
            "placement",
            waiting.traceparent if waiting else "",
            job_id=str(JobId(place.job_id)),
            attempt_id=str(place.attempts[0]),
            machine_id=str(place.placements[0].machine_id),
        )

    def _news(self, plan: Plan | RoundPlan, refused: dict[UUID, billing_pb2.HoldResult]) -> dict[UUID, tuple[str, str]]:
        """Jobs whose reason is another one than the database has. Placements go first: they are what rounds are for."""
        limit = MAX_REASONS_BESIDE_PLACEMENTS if plan.placements else MAX_REASONS_PER_ROUND
        news = self._queue.news_of_round(plan, limit)
        for job_id, refusal in refused.items():
            note = self._queue.note(job_id)
            if note is None:
                continue
            self._queue.without_funds(job_id)
            reason = _refusal_reason(refusal)
            if note.told != reason:
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
        waiting = self._queue.note(placement.job_id.uuid)
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
            "spot": waiting.spot if waiting else False,
            "saves": waiting.saves if waiting else False,
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
