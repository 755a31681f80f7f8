"""Use cases of billing. Amounts are micro-$dGPU; all arithmetic about money is `domain.ledger`'s."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import common_pb2, events_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, HoldId, JobId, TeamId, TransferId
from dantegpu.domain.ledger import (
    ISSUANCE,
    PLATFORM_FEES,
    Account,
    Hold,
    InsufficientFunds,
    TransferKind,
    close_hold,
    credit_transfer,
    earnings_of,
    hold_id,
    open_hold,
    wallet_of,
)
from dantegpu.domain.pricing import hold_ceiling_udgpu
from dantegpu.domain.units import MAX_AMOUNT_UDGPU, MAX_DURATION_SECONDS, format_dgpu, format_duration
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import Forbidden, InvalidArgument
from dantegpu.kit.idempotency import MAX_KEY_LENGTH
from dantegpu.kit.outbox import Outbox
from dantegpu.kit.paging import decode_cursor, encode_cursor, page_limit
from dantegpu.services.billing import store
from dantegpu.services.billing.errors import CreditConflict, ReceiptNotFound, WalletFull, WalletNotFound

MAX_HOLDS_PER_CALL = 10_000
MAX_WINDOW_SECONDS = 86_400
MAX_WINDOW_INDEX = MAX_DURATION_SECONDS
MAX_TEXT_LENGTH = 500
MAX_RECEIPT_LINES = 5_000
MAX_OPEN_HOLDS_PAGE = 5_000
MAX_PROBLEMS = 100
_NO_SEQ_YET = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Refusal(StrEnum):
    """Why a hold was not opened. Normal, so a value in its result and no error."""

    NO_FUNDS = "no-funds"
    SIMULATED_MACHINE = "simulated-machine"
    """A simulated machine's jobs are never billable to strangers."""
    HOLD_CONFLICT = "hold-conflict"
    """The window has a hold with other terms."""


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """Money to set aside for one window of one attempt. `rate_udgpu_per_hour` was locked at placement."""

    attempt_id: AttemptId
    window: int
    job_id: JobId
    payer_team_id: TeamId
    provider_team_id: TeamId
    rate_udgpu_per_hour: int
    window_seconds: int
    simulated: bool = False

    @property
    def hold_id(self) -> HoldId:
        return hold_id(self.attempt_id, self.window)

    @property
    def billable(self) -> bool:
        return not self.simulated or self.payer_team_id == self.provider_team_id


@dataclass(frozen=True, slots=True)
class HoldOutcome:
    """`refusal` None: the hold is open (or was, when this is a replay). `available_udgpu` is told with a refusal."""

    request: HoldRequest
    refusal: Refusal | None
    ceiling_udgpu: int
    available_udgpu: int = 0


@dataclass(frozen=True, slots=True)
class CloseRequest:
    """One hold to close, and the seconds that were used of it."""

    attempt_id: AttemptId
    window: int
    used_seconds: int

    @property
    def hold_id(self) -> HoldId:
        return hold_id(self.attempt_id, self.window)


@dataclass(frozen=True, slots=True)
class CloseOutcome:
    """`charged_udgpu` is what the first close posted; None: the window never had a hold."""

    request: CloseRequest
    charged_udgpu: int | None


@dataclass(frozen=True, slots=True)
class Page[T]:
    """Some rows and the cursor of the next ones."""

    items: list[T]
    next_cursor: str


class Billing:
    """Wallets, holds and the ledger. Every method works in the caller's transaction and is safe to repeat."""

    def __init__(self, outbox: Outbox, clock: Clock, *, fee_basis_points: int, max_credit_udgpu: int) -> None:
        self._outbox = outbox
        self._clock = clock
        self._fee_basis_points = fee_basis_points
        self._max_credit_udgpu = max_credit_udgpu

    # --- holds --------------------------------------------------------------------------------------------------------

    async def open_holds(self, tx: Tx, actor: Actor, requests: Sequence[HoldRequest]) -> list[HoldOutcome]:
        """Open each hold for which its payer has funds left, in the order asked for; a replay answers the same.

        A refused hold changes nothing and does not stop the ones after it. Raises Forbidden, InvalidArgument.
        """
        actor.require_service()
        _check_count(requests)
        for request in requests:
            _check_request(request)
        payers = {wallet_of(r.payer_team_id) for r in requests if r.billable}
        locked, known = await store.lock_and_find_holds(tx, payers, {request.hold_id for request in requests})
        available = {account: row.available_udgpu for account, row in locked.items()}
        opened: list[store.HeldWindow] = []
        outcomes: list[HoldOutcome] = []
        for request in requests:
            window = known.get(request.hold_id)
            outcome = _replay(request, window) if window else None
            if outcome is None:
                outcome, window = self._open(request, available)
                if window:
                    opened.append(window)
                    known[request.hold_id] = window
                    available[wallet_of(request.payer_team_id)] -= window.hold.ceiling_udgpu
            outcomes.append(outcome)
        if opened:
            await store.insert_holds(tx, opened, self._clock.now())
        return outcomes

    def _open(self, request: HoldRequest, available: dict[Account, int]) -> tuple[HoldOutcome, store.HeldWindow | None]:
        ceiling = hold_ceiling_udgpu(request.rate_udgpu_per_hour, request.window_seconds)
        if not request.billable:
            return HoldOutcome(request, Refusal.SIMULATED_MACHINE, ceiling), None
        try:
            hold = open_hold(
                request.attempt_id,
                request.window,
                payer_team_id=request.payer_team_id,
                provider_team_id=request.provider_team_id,
                rate_udgpu_per_hour=request.rate_udgpu_per_hour,
                available_udgpu=available[wallet_of(request.payer_team_id)],
                window_seconds=request.window_seconds,
                fee_basis_points=self._fee_basis_points,
            )
        except InsufficientFunds as error:
            return HoldOutcome(request, Refusal.NO_FUNDS, ceiling, error.available_udgpu), None
        window = store.HeldWindow(hold, request.job_id, request.window_seconds, request.simulated)
        return HoldOutcome(request, None, hold.ceiling_udgpu), window

    async def close_holds(self, tx: Tx, actor: Actor, requests: Sequence[CloseRequest]) -> list[CloseOutcome]:
        """Post what each window used, free the rest; a repeated close answers what the first one charged.

        Raises Forbidden, InvalidArgument.
        """
        actor.require_service()
        _check_count(requests)
        for request in requests:
            if not 0 <= request.used_seconds <= MAX_DURATION_SECONDS:
                raise InvalidArgument(f"used_seconds: expected 0 to {MAX_DURATION_SECONDS}, got {request.used_seconds}")
        ids = {request.hold_id for request in requests}
        known = await store.find_holds(tx, ids)
        still_open = {window.hold.id for window in known.values() if window.hold.charged_udgpu is None}
        if still_open:
            used = {request.hold_id for request in requests if request.used_seconds}
            accounts = _accounts_to_close([known[hold_id].hold for hold_id in still_open], used)
            _, current = await store.lock_and_find_holds(tx, accounts, still_open)
            known |= current
        closed: list[store.ClosedWindow] = []
        outcomes: list[CloseOutcome] = []
        for request in requests:
            window = known.get(request.hold_id)
            if window is None:
                outcomes.append(CloseOutcome(request, None))
                continue
            if window.hold.charged_udgpu is None:
                closing = close_hold(window.hold, request.used_seconds)
                used_seconds = min(request.used_seconds, window.window_seconds)
                closed.append(store.ClosedWindow(closing, window.job_id, used_seconds))
                window = store.HeldWindow(closing.hold, window.job_id, window.window_seconds, window.simulated)
                known[request.hold_id] = window
            outcomes.append(CloseOutcome(request, window.hold.charged_udgpu))
        if closed:
            await self._settle(tx, closed)
        return outcomes

    async def _settle(self, tx: Tx, closed: list[store.ClosedWindow]) -> None:
        now = self._clock.now()
        freed: defaultdict[Account, int] = defaultdict(int)
        postings: list[store.Posting] = []
        richer: set[TeamId] = set()
        for window in closed:
            hold = window.closing.hold
            freed[wallet_of(hold.payer_team_id)] += hold.ceiling_udgpu
            if window.closing.charged_udgpu < hold.ceiling_udgpu:
                richer.add(hold.payer_team_id)
            postings += [
                store.Posting(transfer, _usage_text(transfer.kind, window), window.job_id, hold.attempt_id, hold.window)
                for transfer in window.closing.transfers
            ]
        resolved = await store.resolve_holds_if_open(tx, closed, now)
        if resolved != len(closed):
            raise AssertionError(f"{resolved} of {len(closed)} holds were open although their payers are locked")
        await self._post(tx, postings, freed, now)
        # Money that came free may be what another job of the team waits for.
        await self._tell(tx, richer)

    async def _post(self, tx: Tx, postings: Sequence[store.Posting], freed: dict[Account, int], now: datetime) -> None:
        accounts = {account for p in postings for account in (p.transfer.debit, p.transfer.credit)} | freed.keys()
        changed = await store.post_transfers(tx, postings, freed, now)
        if changed != len(accounts):
            raise AssertionError(f"{changed} of {len(accounts)} balances changed: an account was not made and locked")

    async def _tell(self, tx: Tx, team_ids: Iterable[TeamId]) -> None:
        await self._outbox.add(
            tx,
            [(subjects.wallet_event(team), events_pb2.WalletChanged(team_id=str(team))) for team in sorted(team_ids)],
        )

    async def list_open_holds(
        self, tx: Tx, actor: Actor, older_than_seconds: int, limit: int, cursor: str
    ) -> Page[store.OpenHoldRow]:
        """Holds that nobody closed, oldest first. Services only."""
        actor.require_service()
        if not 0 <= older_than_seconds <= MAX_DURATION_SECONDS:
            raise InvalidArgument(f"older_than_seconds: expected 0 to {MAX_DURATION_SECONDS}, got {older_than_seconds}")
        size = page_limit(limit, default=1000, maximum=MAX_OPEN_HOLDS_PAGE)
        after: tuple[datetime, HoldId] | None = None
        if cursor:
            microseconds, last = decode_cursor(cursor, int, str)
            try:
                after = _EPOCH + timedelta(microseconds=microseconds), HoldId.parse(last)
            except OverflowError as error:
                raise InvalidArgument("cursor: not one of this list's") from error
        until = self._clock.now() - timedelta(seconds=older_than_seconds)
        rows = await store.open_holds_after(tx, until, after, size + 1)
        page = rows[:size]
        more = len(rows) > size
        next_cursor = (
            encode_cursor((page[-1].opened_at - _EPOCH) // _MICROSECOND, str(HoldId(page[-1].id))) if more else ""
        )
        return Page(page, next_cursor)

    # --- wallets ------------------------------------------------------------------------------------------------------

    async def wallet(self, tx: Tx, actor: Actor, team_id: TeamId | None) -> tuple[TeamId, store.WalletRow]:
        """The actor's own team's wallet, or for operator and services any. Raises WalletNotFound."""
        team = _team_of(actor, team_id)
        return team, await store.wallet(tx, wallet_of(team), earnings_of(team))

    async def entries(
        self, tx: Tx, actor: Actor, team_id: TeamId | None, limit: int, cursor: str
    ) -> Page[store.EntryRow]:
        """What went in and out of the wallet, newest first. Raises WalletNotFound."""
        team = _team_of(actor, team_id)
        size = page_limit(limit)
        before = int(decode_cursor(cursor, int)[0]) if cursor else _NO_SEQ_YET
        if not 0 <= before <= _NO_SEQ_YET:
            raise InvalidArgument("cursor: not one of this list's")
        rows = await store.entries_before(tx, wallet_of(team), before, size + 1)
        page = rows[:size]
        return Page(page, encode_cursor(page[-1].seq) if len(rows) > size else "")

    async def credit(
        self, tx: Tx, actor: Actor, team_id: TeamId, amount_udgpu: int, text: str, idempotency_key: str
    ) -> store.WalletRow:
        """New money for a team, by the operator. The same key is the same credit, for ever; no key is always a new one.

        Raises Forbidden, InvalidArgument, CreditConflict, WalletFull.
        """
        actor.require_operator()
        if not 0 < amount_udgpu <= self._max_credit_udgpu:
            limit = format_dgpu(self._max_credit_udgpu)
            raise InvalidArgument(
                f"amount: expected more than 0 and at most {limit} $dGPU, got {format_dgpu(amount_udgpu)}"
            )
        if len(text) > MAX_TEXT_LENGTH or "\x00" in text:
            raise InvalidArgument(f"text: at most {MAX_TEXT_LENGTH} characters and no NUL, this one has {len(text)}")
        if len(idempotency_key) > MAX_KEY_LENGTH:
            raise InvalidArgument(f"Idempotency-Key: at most {MAX_KEY_LENGTH} characters")
        transfer = credit_transfer(team_id, amount_udgpu, idempotency_key or str(TransferId.new()))
        wallet = wallet_of(team_id)
        locked = await store.lock_accounts(tx, [wallet, ISSUANCE])
        # Looked for under the locks: of two calls with one key at the same time, the second finds the first's.
        known = await store.find_transfer(tx, transfer.id)
        if known is None:
            if locked[wallet].balance_udgpu + amount_udgpu > MAX_AMOUNT_UDGPU:
                raise WalletFull(MAX_AMOUNT_UDGPU)
            await self._post(tx, [store.Posting(transfer, text)], {}, self._clock.now())
            await self._tell(tx, [team_id])
        elif (known.amount_udgpu, known.text) != (amount_udgpu, text):
            raise CreditConflict(idempotency_key, known.amount_udgpu)
        return await store.wallet(tx, wallet, earnings_of(team_id))

    # --- looking back -------------------------------------------------------------------------------------------------

    async def receipt(
        self, tx: Tx, actor: Actor, job_id: JobId, attempt_ids: Sequence[AttemptId] = ()
    ) -> list[store.ReceiptRow]:
        """Windows of a job or of some of its attempts, oldest first. Raises ReceiptNotFound.

        At most MAX_RECEIPT_LINES, the newest. The payer's team sees all, a provider's team what it earned, operator and
        services everything.
        """
        _refuse_machines(actor)
        team_id = None if actor.operator or actor.is_service else actor.require_team()
        rows = await store.receipt(tx, job_id, team_id, attempt_ids, MAX_RECEIPT_LINES)
        if not rows:
            raise ReceiptNotFound(job_id)
        return rows[::-1]

    async def check_ledger(self, tx: Tx, actor: Actor) -> store.AuditRow:
        """Re-sum the whole ledger. Operator and services only."""
        actor.require_operator()
        return await store.audit(tx, MAX_PROBLEMS)


def _replay(request: HoldRequest, window: store.HeldWindow) -> HoldOutcome:
    """The answer for a window that has its hold already."""
    hold = window.hold
    known = (hold.payer_team_id, hold.provider_team_id, hold.rate_udgpu_per_hour, window.window_seconds, window.job_id)
    asked = (
        request.payer_team_id,
        request.provider_team_id,
        request.rate_udgpu_per_hour,
        request.window_seconds,
        request.job_id,
    )
    return HoldOutcome(request, None if asked == known else Refusal.HOLD_CONFLICT, hold.ceiling_udgpu)


def _accounts_to_close(holds: Iterable[Hold], used: set[HoldId]) -> set[Account]:
    accounts: set[Account] = set()
    for hold in holds:
        accounts.add(wallet_of(hold.payer_team_id))
        if hold.id in used:  # the one account of all fees is locked only by those who pay into it
            accounts |= {earnings_of(hold.provider_team_id), PLATFORM_FEES}
    return accounts


def _usage_text(kind: TransferKind, window: store.ClosedWindow) -> str:
    hold = window.closing.hold
    what = "platform fee for" if kind is TransferKind.FEE else "provider's share of"
    rate = format_dgpu(hold.rate_udgpu_per_hour)
    return f"{what} {format_duration(window.used_seconds)} at {rate} $dGPU/h, window {hold.window}"


def _check_count(requests: Sequence[object]) -> None:
    if len(requests) > MAX_HOLDS_PER_CALL:
        raise InvalidArgument(f"holds: at most {MAX_HOLDS_PER_CALL} in one call, got {len(requests)}")


def _check_request(request: HoldRequest) -> None:
    bounds = (
        ("window", request.window, 0, MAX_WINDOW_INDEX),
        ("rate_udgpu_per_hour", request.rate_udgpu_per_hour, 0, MAX_AMOUNT_UDGPU),
        ("window_seconds", request.window_seconds, 1, MAX_WINDOW_SECONDS),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise InvalidArgument(f"{name} of {request.attempt_id}: expected {low} to {high}, got {value}")


def _refuse_machines(actor: Actor) -> None:
    # A machine's credential lies on a machine that its provider lends out; money is none of its business.
    if actor.kind == common_pb2.Actor.MACHINE:
        raise Forbidden("a machine's credential cannot see money; log in as a person")


def _team_of(actor: Actor, asked: TeamId | None) -> TeamId:
    _refuse_machines(actor)
    if asked is None:
        return actor.require_team()
    if not (actor.operator or actor.is_service) and asked != actor.require_team():
        raise WalletNotFound(asked)
    return asked
