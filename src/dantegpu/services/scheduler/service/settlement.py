"""Holds and what is posted of them: level-triggered, idempotent, on the leader.

Each pass looks at attempts that ended but are not settled, at windows that are used up, and at windows that are needed
next. Billing answers the same for the same window, so a pass that is cut off is simply done again.
"""

import time
from collections.abc import Sequence
from uuid import UUID

import structlog

from dantegpu.contracts.gen.dante.v1 import billing_pb2, billing_pb2_grpc, common_pb2
from dantegpu.domain import job as lifecycle
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, JobId, TeamId
from dantegpu.domain.job import StopReason
from dantegpu.domain.pricing import WINDOW_SECONDS, window_ends_at, windows_used
from dantegpu.domain.units import format_dgpu
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.db import Database
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Pace, Wakeup
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store
from dantegpu.services.scheduler.service.transitions import JobBatch, Wakeups, changed_messages
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import AttemptRow

log = structlog.get_logger(__name__)

BATCH = 500
PAUSE_SECONDS = 0.05
MOST_PAUSE_SECONDS = 0.5
OPEN_AHEAD_SECONDS = 60.0
"""How long before a window is used up the next one's hold is opened."""
OPEN_HOLDS_PAGE = 5000
CALL_TIMEOUT_SECONDS = 10.0


class Settlement:
    """Drives billing from what attempts really used."""

    def __init__(
        self,
        db: Database,
        billing: billing_pb2_grpc.BillingServiceStub,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
    ) -> None:
        self._db = db
        self._billing = billing
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings
        self._again = Wakeup()
        self._pace = Pace(PAUSE_SECONDS, MOST_PAUSE_SECONDS)

    def notify(self) -> None:
        self._again.notify()

    async def run(self) -> None:
        """Until cancelled."""
        next_windows_seconds = 0.0
        next_sweep_seconds = time.monotonic() + self._settings.orphan_sweep_seconds
        while True:
            busy = False
            self._pace.begin()
            try:
                busy = await self.settle_ended() == BATCH
                if time.monotonic() >= next_windows_seconds:
                    next_windows_seconds = time.monotonic() + self._settings.settlement_seconds
                    await self.settle_full_windows()
                    await self.open_next_windows()
                    # Those that ended without an attempt, and what a crash left between two steps.
                    busy |= await self.mark_settled() == BATCH
                if time.monotonic() >= next_sweep_seconds:
                    next_sweep_seconds = time.monotonic() + self._settings.orphan_sweep_seconds
                    await self.void_orphans()
            except ServiceError as error:
                log.warning("settlement_failed", error=error.message)
            if not busy:
                # The first end is paid for at once; those that come until the pause is over go together.
                await self._pace.rest()
                await self._again.wait(max(0.0, next_windows_seconds - time.monotonic()))

    async def settle_ended(self) -> int:
        """Close every hold of ended attempts and write the final cost; how many attempts."""
        async with self._db.statement() as tx:
            ended = await store.unsettled_attempts(tx, BATCH)
        if not ended:
            return 0
        closes: list[billing_pb2.HoldClose] = []
        for attempt in ended:
            used = dict(windows_used(attempt.billed_seconds))
            # One window more than was noted: its hold may be open without our knowing, after a crash.
            windows = range(attempt.windows_closed, attempt.windows_opened + 1)
            closes.extend(_close(attempt.id, window, used.get(window, 0)) for window in windows)
        charged = await self._close_holds(closes)
        rows = [
            {
                "id": attempt.id,
                "closed_before": attempt.windows_closed,
                "windows_closed": attempt.windows_opened,
                "cost_udgpu": charged.get(attempt.id, 0),
                "settled": True,
            }
            for attempt in ended
        ]
        job_ids = {attempt.job_id for attempt in ended}
        async with self._db.transaction() as tx:
            await store.lock_job_ids(tx, job_ids)
            await store.close_windows(tx, rows)
            # Only among those: locks that are taken out of order could wait for one another.
            await self._mark(tx, await store.jobs_to_mark_settled(tx, BATCH, among=job_ids))
        return len(ended)

    async def settle_full_windows(self) -> None:
        """Post the windows that running attempts have used up."""
        async with self._db.statement() as tx:
            running = await store.attempts_with_full_windows(tx, limit=BATCH)
        if not running:
            return
        charged = await self._close_holds([_close(a.id, a.windows_closed, WINDOW_SECONDS) for a in running])
        rows = [
            {
                "id": attempt.id,
                "closed_before": attempt.windows_closed,
                "windows_closed": attempt.windows_closed + 1,
                "cost_udgpu": charged.get(attempt.id, 0),
                "settled": False,
            }
            for attempt in running
        ]
        async with self._db.transaction() as tx:
            await store.lock_job_ids(tx, {attempt.job_id for attempt in running})
            await store.close_windows(tx, rows)

    async def open_next_windows(self) -> None:
        """Hold the money of the next window; an attempt whose team cannot pay is stopped when its window is over."""
        now = self._clock.now()
        async with self._db.statement() as tx:
            needing = await store.attempts_needing_window(tx, now=now, ahead_seconds=OPEN_AHEAD_SECONDS, limit=BATCH)
        if not needing:
            return
        request = billing_pb2.OpenHoldsRequest(holds=[_next_hold(attempt) for attempt in needing])
        answer = await rpc.call(self._billing.OpenHolds, request, actor=SERVICE, timeout_seconds=CALL_TIMEOUT_SECONDS)
        opened = {
            attempt.id: attempt.windows_opened + 1
            for attempt, result in zip(needing, answer.results, strict=True)
            if result.opened
        }
        broke = [
            attempt
            for attempt in needing
            if attempt.id not in opened
            and attempt.running_at is not None
            and window_ends_at(attempt.running_at, attempt.windows_opened - 1) <= now
        ]
        async with self._db.transaction() as tx:
            if broke:
                batch = await JobBatch.lock(tx, [attempt.job_id for attempt in broke], now)
                for attempt in broke:
                    if batch.holds(attempt.job_id, attempt.id):
                        batch.apply(attempt.job_id, lifecycle.StopRequested(by="billing", why=StopReason.NO_FUNDS))
                await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)
            if opened:
                await store.open_windows(tx, opened)

    async def void_orphans(self) -> None:
        """Void holds that no attempt will close: their plan was not committed, or their attempt is settled."""
        cursor = ""
        while True:
            page = common_pb2.PageRequest(limit=OPEN_HOLDS_PAGE, cursor=cursor)
            request = billing_pb2.ListOpenHoldsRequest(older_than_seconds=self._settings.orphan_age_seconds, page=page)
            answer = await rpc.call(
                self._billing.ListOpenHolds, request, actor=SERVICE, timeout_seconds=CALL_TIMEOUT_SECONDS
            )
            holds = [(AttemptId.parse(hold.attempt_id).uuid, hold.window) for hold in answer.holds]
            async with self._db.transaction() as tx:
                needed = await store.attempts_to_settle(tx, [attempt for attempt, _ in holds])
            orphans = [_close(attempt, window, 0) for attempt, window in holds if attempt not in needed]
            if orphans:
                log.warning("orphaned_holds_voided", holds=len(orphans))
                await self._close_holds(orphans)
            cursor = answer.next_cursor
            if not cursor:
                break

    async def _close_holds(self, closes: Sequence[billing_pb2.HoldClose]) -> dict[UUID, int]:
        """Attempt -> what was charged for the windows given."""
        answer = await rpc.call(
            self._billing.CloseHolds,
            billing_pb2.CloseHoldsRequest(holds=closes),
            actor=SERVICE,
            timeout_seconds=CALL_TIMEOUT_SECONDS,
        )
        charged: dict[UUID, int] = {}
        for close, result in zip(closes, answer.results, strict=True):
            if close.used_seconds and not result.found:
                log.error("window_without_hold", attempt_id=close.attempt_id, window=close.window)
            attempt_id = AttemptId.parse(result.attempt_id).uuid
            charged[attempt_id] = charged.get(attempt_id, 0) + result.charged_udgpu
        return charged

    async def mark_settled(self) -> int:
        """Note that the cost of ended jobs is final; how many."""
        async with self._db.transaction() as tx:
            rows = await store.jobs_to_mark_settled(tx, BATCH)
            await self._mark(tx, rows)
        return len(rows)

    async def _mark(self, tx: store.Tx, rows: Sequence[store.EndedRow]) -> None:
        if not rows:
            return
        await store.mark_jobs_settled(tx, [row.id for row in rows])
        now = self._clock.now()
        events = [
            store.EventRow(
                row.id, row.event_seq + 1, row.state, "settled", f"{format_dgpu(row.cost_udgpu)} $dGPU", None, now
            )
            for row in rows
        ]
        await store.insert_events(tx, [_record(event) for event in events])
        await self._outbox.add(tx, changed_messages([row.id for row in rows]))


def _record(event: store.EventRow) -> dict[str, object]:
    return {name: getattr(event, name) for name in event.__slots__}


def _close(attempt_id: UUID, window: int, used_seconds: int) -> billing_pb2.HoldClose:
    return billing_pb2.HoldClose(attempt_id=str(AttemptId(attempt_id)), window=window, used_seconds=used_seconds)


def _next_hold(attempt: AttemptRow) -> billing_pb2.HoldRequest:
    return billing_pb2.HoldRequest(
        attempt_id=str(AttemptId(attempt.id)),
        job_id=str(JobId(attempt.array_id or attempt.job_id)),
        window=attempt.windows_opened,
        payer_team_id=str(TeamId(attempt.team_id)),
        provider_team_id=str(TeamId(attempt.provider_team_id)),
        rate_udgpu_per_hour=attempt.rate_udgpu_per_hour,
        window_seconds=WINDOW_SECONDS,
        simulated=attempt.simulated,
    )
