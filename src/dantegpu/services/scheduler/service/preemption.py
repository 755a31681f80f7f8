"""Making room: spot work is told to give way, and what it leaves is kept for the job that it gave way to.

Claims are rows of PostgreSQL, so a new leader keeps them too. Only the leader writes them, fenced by its epoch.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from uuid import UUID

import structlog

from dantegpu.contracts.gen.dante.v1 import billing_pb2, billing_pb2_grpc
from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.job import JobState, QueueReason, StopReason
from dantegpu.domain.pricing import hold_ceiling_udgpu
from dantegpu.domain.scheduling import (
    Claim,
    ClaimsView,
    Lease,
    PendingJob,
    Plan,
    Policy,
    Preemption,
    RoundPlan,
    Snapshot,
    SpotWork,
    claimed_rate,
    look_at_claims,
    preempt,
)
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.lease import Leadership
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store, store_preemptions
from dantegpu.services.scheduler.service.fleet import lease_of
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.service.transitions import JobBatch, Wakeups
from dantegpu.services.scheduler.service.waiting import WaitingJobs
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import LiveLeaseRow
from dantegpu.services.scheduler.store_preemptions import ClaimRow, SpotRow

log = structlog.get_logger(__name__)

MAX_SPOT_ATTEMPTS = 10_000
MAX_JOBS_OF_A_SHAPE = 4
MAX_JOBS = 40
"""For so many of the first jobs that wait a round looks for room."""
LOOK_SECONDS = 0.25
"""Room is looked for at most this often: it takes a look at everything that runs."""

type Claimed = tuple[Claim, PendingJob]


class Room:
    """Belongs to the leader of placement and its queue."""

    def __init__(
        self,
        db: Database,
        inventory: Inventory,
        billing: billing_pb2_grpc.BillingServiceStub,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
        queue: WaitingJobs,
    ) -> None:
        self._db = db
        self._inventory = inventory
        self._billing = billing
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings
        self._policy: Policy = settings.policy
        self._queue = queue
        self._claims: dict[UUID, list[ClaimRow]] | None = None
        self._broken: frozenset[JobId] = frozenset()
        self._any_spot = True
        self._next_look_seconds = 0.0
        self._looks_again = False
        self.leadership: Leadership | None = None

    def forget(self) -> None:
        """What is known may be wrong: read it before the next plan."""
        self._claims = None
        self._any_spot = True

    def began(self) -> None:
        """Something was placed, which may be spot work."""
        self._any_spot = True

    def pause_seconds(self) -> float | None:
        """When room is to be looked for again; None: when something happens."""
        return max(0.0, self._next_look_seconds - self._clock.monotonic()) if self._looks_again else None

    # --- claims -------------------------------------------------------------------------------------------------------

    async def claims(self) -> list[Claimed]:
        """The claims of jobs that still wait for what is kept for them, the oldest first."""
        if self._claims is None:
            async with self._db.statement() as tx:
                self._claims = await store_preemptions.claims(tx)
        found = [(job, rows) for job_id, rows in self._claims.items() if (job := self._waiting(job_id)) is not None]
        return [(_claim(job, rows), job) for job, rows in found]

    def _waiting(self, job_id: UUID) -> PendingJob | None:
        """The job, if it could be placed now: one that cannot pay, say, keeps nothing from others."""
        queued = self._queue.queue.get(JobId(job_id))
        note = self._queue.note(job_id)
        if queued is None or queued.group is None or queued.until is not None or note is None:
            return None
        return self._queue.queue.pending(queued)

    def look(self, snapshot: Snapshot, live: Sequence[LiveLeaseRow], claims: Sequence[Claimed]) -> ClaimsView:
        """What the claims mean for this round."""
        view = look_at_claims(snapshot, [lease_of(row) for row in live if row.stopping], claims)
        self._broken = view.broken
        return view

    async def placed(self, tx: Tx, job_ids: Iterable[UUID]) -> None:
        """These have what was kept for them."""
        done = [job_id for job_id in job_ids if self._claims and job_id in self._claims]
        if done:
            await store_preemptions.delete_claims(tx, done)
            tx.after_commit.append(lambda: self._dropped(done))

    def _dropped(self, job_ids: Iterable[UUID]) -> None:
        for job_id in job_ids:
            if self._claims is not None:
                self._claims.pop(job_id, None)

    def _over(self) -> list[UUID]:
        """Claims that keep something for nobody."""
        known = self._claims or {}
        broken = {job_id.uuid for job_id in self._broken}
        return [job_id for job_id in known if job_id in broken or self._waiting(job_id) is None]

    # --- making room --------------------------------------------------------------------------------------------------

    async def make(self, now: datetime, plan: Plan | RoundPlan) -> None:
        """After a round: for jobs that found no place, tell spot work to give way where that helps."""
        over = self._over()
        waiting = self._candidates() if self._any_spot else []
        self._looks_again = bool(waiting) and self._clock.monotonic() < self._next_look_seconds
        if self._looks_again:
            waiting = []
        found: Sequence[Preemption] = ()
        epochs: dict[UUID, int] = {}
        if waiting:
            self._next_look_seconds = self._clock.monotonic() + LOOK_SECONDS
            found, epochs = await self._decide(now, waiting, plan, over)
        if over or found:
            await self._apply(found, epochs, over, now)

    def _candidates(self) -> list[PendingJob]:
        """The first jobs of each shape that may have others give way and have no claim yet."""
        jobs: list[PendingJob] = []
        for _, groups in self._queue.queue.levels():
            for group in groups:
                if group.shape.job.spot and group.team_id not in self._policy.quotas:
                    continue
                for queued in islice(group.from_index(0), MAX_JOBS_OF_A_SHAPE):
                    note = self._queue.note(queued.id.uuid)
                    if note is not None and queued.id.uuid not in (self._claims or {}):
                        jobs.append(self._queue.queue.pending(queued))
            if len(jobs) >= MAX_JOBS:
                break
        jobs.sort(key=lambda job: (-job.standing, job.submitted_at, job.id))
        return jobs[:MAX_JOBS]

    async def _decide(
        self, now: datetime, waiting: Sequence[PendingJob], plan: Plan | RoundPlan, over: Sequence[UUID]
    ) -> tuple[Sequence[Preemption], dict[UUID, int]]:
        async with self._db.statement() as tx:
            spot = await store_preemptions.spot_attempts(tx, MAX_SPOT_ATTEMPTS)
        self._any_spot = bool(spot)
        if not spot:
            return (), {}
        async with self._db.statement() as tx:
            live = await store.live_leases(tx)
        leases = {row.attempt_id: lease_of(row) for row in live}
        snapshot = Snapshot.from_machines(self._inventory.machines(), leases.values())
        claims = [(claim, job) for claim, job in await self.claims() if job.id.uuid not in over]
        view = look_at_claims(snapshot, [lease_of(row) for row in live if row.stopping], claims)
        works = _works(spot, leases, now)
        found = preempt(view.ground, works, waiting, self._policy, _barred(plan, snapshot, waiting))
        return await self._affordable(found, snapshot), {row.job_id: row.epoch for row in spot}

    async def _affordable(self, found: Sequence[Preemption], snapshot: Snapshot) -> list[Preemption]:
        """Nobody gives way to a job whose team could not pay for its start."""
        left: dict[TeamId, int] = {}
        kept: list[Preemption] = []
        for each in found:
            team_id = each.claim.leases[0].team_id
            if team_id not in left:
                request = billing_pb2.GetWalletRequest(team_id=str(team_id))
                answer = await rpc.call(self._billing.GetWallet, request, actor=SERVICE)
                left[team_id] = answer.wallet.available_udgpu
            percent = self._price_percent(each.claim.job_id)
            needed = sum(hold_ceiling_udgpu(claimed_rate(snapshot, lease, percent)) for lease in each.claim.leases)
            if needed <= left[team_id]:
                left[team_id] -= needed
                kept.append(each)
        return kept

    def _price_percent(self, job_id: JobId) -> int:
        job = self._waiting(job_id.uuid)
        return job.price_percent if job is not None else 100

    async def _apply(
        self, found: Sequence[Preemption], epochs: dict[UUID, int], over: Sequence[UUID], now: datetime
    ) -> None:
        told: list[tuple[UUID, tuple[str, str]]] = []
        rows: list[ClaimRow] = []
        try:
            async with self._db.transaction() as tx:
                assert self.leadership is not None, "room is made under a lease"
                await self.leadership.assert_held(tx)
                if over:
                    await store_preemptions.delete_claims(tx, over)
                ids = [work.job_id.uuid for each in found for work in each.victims]
                batch = await JobBatch.lock(tx, [*ids, *(each.claim.job_id.uuid for each in found)], now)
                for each in found:
                    if self._still_true(batch, each, epochs):
                        told.append(self._give_way(batch, each))
                        rows += _claim_rows(each.claim)
                if rows:
                    await store_preemptions.insert_claims(tx, rows, now)
                await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
        except BaseException:
            self.forget()
            raise
        self._dropped(over)
        self._broken = frozenset()
        for row in rows:
            if self._claims is not None:
                self._claims.setdefault(row.job_id, []).append(row)
        self._queue.told(told)

    @staticmethod
    def _still_true(batch: JobBatch, each: Preemption, epochs: dict[UUID, int]) -> bool:
        """All or nothing: a job that has begun meanwhile needs no room, and work that has ended leaves it anyway."""
        job = batch.get(each.claim.job_id.uuid)
        if job is None or job.state is not JobState.QUEUED:
            return False
        for work in each.victims:
            victim = batch.get(work.job_id.uuid)
            if victim is None or not victim.state.live or victim.state is JobState.STOPPING:
                return False
            if victim.epoch != epochs[work.job_id.uuid]:
                return False
        return True

    @staticmethod
    def _give_way(batch: JobBatch, each: Preemption) -> tuple[UUID, tuple[str, str]]:
        for work in each.victims:
            stop = lifecycle.StopRequested(by=each.cause.value, why=StopReason.PREEMPTED)
            batch.apply(work.job_id.uuid, stop)
        count = len(each.victims)
        detail = "A spot job makes room for it." if count == 1 else f"{count} spot jobs make room for it."
        batch.apply(each.claim.job_id.uuid, lifecycle.StillWaiting(QueueReason.RESERVED, detail))
        log.info("preempted", job_id=str(each.claim.job_id), victims=count, cause=each.cause.value)
        return each.claim.job_id.uuid, (QueueReason.RESERVED.value, detail)


def _works(spot: Sequence[SpotRow], leases: dict[UUID, Lease], now: datetime) -> list[SpotWork]:
    by_job: dict[UUID, list[SpotRow]] = {}
    for row in spot:
        by_job.setdefault(row.job_id, []).append(row)
    if len(spot) == MAX_SPOT_ATTEMPTS and len(by_job) > 1:
        by_job.popitem()  # of the last job, some nodes may be missing
    return [
        SpotWork(
            JobId(job_id),
            TeamId(rows[0].team_id),
            rows[0].priority,
            tuple(leases[row.attempt_id] for row in rows),
            sum(0.0 if row.saves else max(0.0, (now - row.began_at).total_seconds()) for row in rows),
            sum(max(0.0, (now - row.saved_at).total_seconds()) for row in rows),
        )
        for job_id, rows in by_job.items()
        # One that ended between the two reads holds nothing any more.
        if all(row.attempt_id in leases for row in rows)
    ]


def _barred(
    plan: Plan | RoundPlan, snapshot: Snapshot, waiting: Sequence[PendingJob]
) -> dict[JobId, frozenset[MachineId]]:
    """Machines on which others that go before these jobs have reservations, which they could delay."""
    barred: dict[JobId, frozenset[MachineId]] = {}
    for reservation in plan.reservations:
        machines = frozenset(snapshot.machines[row].id for row in reservation.rows if row < len(snapshot.machines))
        first = reservation.job
        for job in waiting:
            if job.id != first.id and (-job.standing, job.submitted_at) > (-first.standing, first.submitted_at):
                barred[job.id] = barred.get(job.id, frozenset()) | machines
    return barred


def _claim(job: PendingJob, rows: Sequence[ClaimRow]) -> Claim:
    request = job.request
    milli = request.gpu.milli if request.gpu is not None else 0
    return Claim(
        job.id,
        tuple(
            Lease(
                MachineId(row.machine_id),
                job.team_id,
                request.cpu_milli,
                request.memory_bytes,
                request.disk_bytes,
                tuple((DeviceId(device_id), milli) for device_id in row.device_ids),
            )
            for row in rows
        ),
    )


def _claim_rows(claim: Claim) -> list[ClaimRow]:
    return [
        ClaimRow(claim.job_id.uuid, rank, lease.machine_id.uuid, [device_id.uuid for device_id, _ in lease.devices])
        for rank, lease in enumerate(claim.leases)
    ]
