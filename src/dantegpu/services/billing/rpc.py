"""billing-payment-service's gRPC door: one transaction per call, protobuf to typed values and back."""

from typing import TYPE_CHECKING, Any, override

from dantegpu.contracts.gen.dante.v1 import billing_pb2 as pb
from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.contracts.gen.dante.v1.billing_pb2_grpc import BillingServiceServicer
from dantegpu.domain.ids import AttemptId, JobId, TeamId, TransferId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.db import Database
from dantegpu.services.billing import store
from dantegpu.services.billing.service import Billing, CloseOutcome, CloseRequest, HoldOutcome, HoldRequest

if TYPE_CHECKING:
    from grpc import aio

    type Context = aio.ServicerContext[Any, Any]


class BillingRpc(BillingServiceServicer):
    def __init__(self, db: Database, billing: Billing, *, holds_wait_for_disk: bool = True) -> None:
        self._db = db
        self._billing = billing
        self._holds_wait_for_disk = holds_wait_for_disk

    @override
    async def OpenHolds(self, request: pb.OpenHoldsRequest, context: "Context") -> pb.OpenHoldsResponse:
        asked = [_hold_request(hold) for hold in request.holds]
        async with self._db.transaction(durable=self._holds_wait_for_disk) as tx:
            outcomes = await self._billing.open_holds(tx, current_actor(), asked)
        return pb.OpenHoldsResponse(results=map(_hold_result, outcomes))

    @override
    async def CloseHolds(self, request: pb.CloseHoldsRequest, context: "Context") -> pb.CloseHoldsResponse:
        asked = [CloseRequest(AttemptId.parse(h.attempt_id), h.window, h.used_seconds) for h in request.holds]
        async with self._db.transaction(durable=self._holds_wait_for_disk) as tx:
            outcomes = await self._billing.close_holds(tx, current_actor(), asked)
        return pb.CloseHoldsResponse(results=map(_close_result, outcomes))

    @override
    async def ListOpenHolds(self, request: pb.ListOpenHoldsRequest, context: "Context") -> pb.ListOpenHoldsResponse:
        async with self._db.transaction() as tx:
            page = await self._billing.list_open_holds(
                tx, current_actor(), request.older_than_seconds, request.page.limit, request.page.cursor
            )
        return pb.ListOpenHoldsResponse(holds=map(_open_hold, page.items), next_cursor=page.next_cursor)

    @override
    async def GetWallet(self, request: pb.GetWalletRequest, context: "Context") -> pb.GetWalletResponse:
        async with self._db.transaction() as tx:
            team_id, row = await self._billing.wallet(tx, current_actor(), _team(request.team_id))
        return pb.GetWalletResponse(wallet=_wallet(team_id, row))

    @override
    async def ListEntries(self, request: pb.ListEntriesRequest, context: "Context") -> pb.ListEntriesResponse:
        async with self._db.transaction() as tx:
            page = await self._billing.entries(
                tx, current_actor(), _team(request.team_id), request.page.limit, request.page.cursor
            )
        return pb.ListEntriesResponse(entries=map(_entry, page.items), next_cursor=page.next_cursor)

    @override
    async def Credit(self, request: pb.CreditRequest, context: "Context") -> pb.CreditResponse:
        team_id = TeamId.parse(request.team_id)
        async with self._db.transaction() as tx:
            row = await self._billing.credit(
                tx, current_actor(), team_id, request.amount_udgpu, request.text, request.idempotency_key
            )
        return pb.CreditResponse(wallet=_wallet(team_id, row))

    @override
    async def GetReceipt(self, request: pb.GetReceiptRequest, context: "Context") -> pb.GetReceiptResponse:
        job_id = JobId.parse(request.job_id)
        attempt_ids = [AttemptId.parse(text) for text in request.attempt_ids]
        async with self._db.transaction() as tx:
            rows = await self._billing.receipt(tx, current_actor(), job_id, attempt_ids)
        return pb.GetReceiptResponse(
            receipt=pb.Receipt(
                job_id=str(job_id),
                payer_team_id=str(TeamId(rows[0].payer_team_id)),
                lines=map(_receipt_line, rows),
                total_udgpu=rows[0].total_udgpu or 0,
            )
        )

    @override
    async def CheckLedger(self, request: common_pb2.Empty, context: "Context") -> pb.CheckLedgerResponse:
        async with self._db.transaction() as tx:
            audit = await self._billing.check_ledger(tx, current_actor())
        return pb.CheckLedgerResponse(
            balanced=not audit.problems,
            accounts=audit.accounts,
            transfers=audit.transfers,
            open_holds=audit.open_holds,
            sum_udgpu=audit.sum_udgpu,
            problems=audit.problems,
        )


def _team(text: str) -> TeamId | None:
    return TeamId.parse(text) if text else None


def _hold_request(hold: pb.HoldRequest) -> HoldRequest:
    return HoldRequest(
        attempt_id=AttemptId.parse(hold.attempt_id),
        window=hold.window,
        job_id=JobId.parse(hold.job_id),
        payer_team_id=TeamId.parse(hold.payer_team_id),
        provider_team_id=TeamId.parse(hold.provider_team_id),
        rate_udgpu_per_hour=hold.rate_udgpu_per_hour,
        window_seconds=hold.window_seconds,
        simulated=hold.simulated,
    )


def _hold_result(outcome: HoldOutcome) -> pb.HoldResult:
    return pb.HoldResult(
        attempt_id=str(outcome.request.attempt_id),
        window=outcome.request.window,
        opened=outcome.refusal is None,
        ceiling_udgpu=outcome.ceiling_udgpu,
        available_udgpu=outcome.available_udgpu,
        refusal=outcome.refusal.value if outcome.refusal else "",
    )


def _close_result(outcome: CloseOutcome) -> pb.CloseResult:
    return pb.CloseResult(
        attempt_id=str(outcome.request.attempt_id),
        window=outcome.request.window,
        charged_udgpu=outcome.charged_udgpu or 0,
        found=outcome.charged_udgpu is not None,
    )


def _open_hold(row: store.OpenHoldRow) -> pb.OpenHold:
    hold = pb.OpenHold(attempt_id=str(AttemptId(row.attempt_id)), window=row.window_index)
    hold.opened_at.FromDatetime(row.opened_at)
    return hold


def _wallet(team_id: TeamId, row: store.WalletRow) -> pb.Wallet:
    return pb.Wallet(
        team_id=str(team_id),
        balance_udgpu=row.balance_udgpu,
        held_udgpu=row.held_udgpu,
        available_udgpu=row.balance_udgpu - row.held_udgpu,
        earned_udgpu=row.earned_udgpu,
    )


def _entry(row: store.EntryRow) -> pb.Entry:
    entry = pb.Entry(
        transfer_id=str(TransferId(row.id)),
        kind=row.kind,
        amount_udgpu=row.amount_udgpu,
        balance_after_udgpu=row.balance_after_udgpu,
        job_id=str(JobId(row.job_id)) if row.job_id else "",
        attempt_id=str(AttemptId(row.attempt_id)) if row.attempt_id else "",
        text=row.text,
    )
    entry.created_at.FromDatetime(row.created_at)
    return entry


def _receipt_line(row: store.ReceiptRow) -> pb.ReceiptLine:
    line = pb.ReceiptLine(
        attempt_id=str(AttemptId(row.attempt_id)),
        window=row.window_index,
        rate_udgpu_per_hour=row.rate_udgpu_per_hour,
        used_seconds=row.used_seconds or 0,
        charged_udgpu=row.charged_udgpu or 0,
        provider_udgpu=row.provider_udgpu or 0,
        fee_udgpu=row.fee_udgpu or 0,
        open=row.closed_at is None,
    )
    if row.closed_at:
        line.closed_at.FromDatetime(row.closed_at)
    return line
