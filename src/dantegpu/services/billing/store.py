"""The ledger's tables. Named SQL: sql/queries.sql; what must never happen: sql/migrations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dantegpu.domain.ids import AttemptId, HoldId, JobId, TeamId, TransferId
from dantegpu.domain.ledger import Account, Closing, Hold, Transfer, wallet_of
from dantegpu.domain.units import MicroDgpu
from dantegpu.kit.db import Asked, Queries, Tx

QUERIES = Queries.of("dantegpu.services.billing")


@dataclass(frozen=True, slots=True)
class BalanceRow:
    account_id: UUID
    balance_udgpu: int
    held_udgpu: int

    @property
    def available_udgpu(self) -> int:
        return self.balance_udgpu - self.held_udgpu


@dataclass(frozen=True, slots=True)
class HoldRow:
    id: UUID
    attempt_id: UUID
    window_index: int
    job_id: UUID
    payer_team_id: UUID
    provider_team_id: UUID
    rate_udgpu_per_hour: int
    window_seconds: int
    ceiling_udgpu: int
    fee_basis_points: int
    simulated: bool
    charged_udgpu: int | None


@dataclass(frozen=True, slots=True)
class HeldWindow:
    """A domain hold and what the tables keep beside it."""

    hold: Hold
    job_id: JobId
    window_seconds: int
    simulated: bool


@dataclass(frozen=True, slots=True)
class ClosedWindow:
    """A hold's closing. `used_seconds` are the billed ones, so never more than the window has."""

    closing: Closing
    job_id: JobId
    used_seconds: int


@dataclass(frozen=True, slots=True)
class Posting:
    """A transfer to post, with what people want to know of it."""

    transfer: Transfer
    text: str
    job_id: JobId | None = None
    attempt_id: AttemptId | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class TransferRow:
    id: UUID
    amount_udgpu: int
    text: str


@dataclass(frozen=True, slots=True)
class WalletRow:
    balance_udgpu: int
    held_udgpu: int
    earned_udgpu: int


@dataclass(frozen=True, slots=True)
class EntryRow:
    id: UUID
    seq: int
    kind: str
    amount_udgpu: int
    balance_after_udgpu: int
    job_id: UUID | None
    attempt_id: UUID | None
    text: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    attempt_id: UUID
    window_index: int
    payer_team_id: UUID
    rate_udgpu_per_hour: int
    state: str
    used_seconds: int | None
    charged_udgpu: int | None
    provider_udgpu: int | None
    fee_udgpu: int | None
    opened_at: datetime
    closed_at: datetime | None
    total_udgpu: int | None


@dataclass(frozen=True, slots=True)
class OpenHoldRow:
    id: UUID
    attempt_id: UUID
    window_index: int
    opened_at: datetime


@dataclass(frozen=True, slots=True)
class AuditRow:
    accounts: int
    transfers: int
    open_holds: int
    sum_udgpu: int
    problems: list[str]


async def lock_accounts(tx: Tx, accounts: Collection[Account]) -> dict[Account, BalanceRow]:
    """Make the accounts that are not there yet and lock the balances of all, in id order."""
    by_id = {account.id.uuid: account for account in accounts}
    if not by_id:
        return {}
    locked = await _lock_accounts(tx, by_id)
    return {by_id[row.account_id]: row for row in await locked.rows()}


async def _lock_accounts(tx: Tx, by_id: Mapping[UUID, Account]) -> Asked[BalanceRow]:
    await tx.send(
        QUERIES["ensure_accounts"],
        ids=list(by_id),
        kinds=[account.kind.value for account in by_id.values()],
        team_ids=[account.team_id.uuid if account.team_id else None for account in by_id.values()],
    )
    return await tx.ask(BalanceRow, QUERIES["lock_balances"], ids=list(by_id))


async def find_holds(tx: Tx, ids: Collection[HoldId]) -> dict[HoldId, HeldWindow]:
    """What is true of them only after the payers' balances are locked: until then another call may change them."""
    rows = await tx.all(HoldRow, QUERIES["find_holds"], ids=[hold_id.uuid for hold_id in ids])
    return {HoldId(row.id): _held_window(row) for row in rows}


async def lock_and_find_holds(
    tx: Tx, accounts: Collection[Account], ids: Collection[HoldId]
) -> tuple[dict[Account, BalanceRow], dict[HoldId, HeldWindow]]:
    """lock_accounts, then find_holds, in one round trip."""
    by_id = {account.id.uuid: account for account in accounts}
    locked = await _lock_accounts(tx, by_id) if by_id else None
    known = await find_holds(tx, ids)
    return {by_id[row.account_id]: row for row in await locked.rows()} if locked else {}, known


def _held_window(row: HoldRow) -> HeldWindow:
    hold = Hold(
        AttemptId(row.attempt_id),
        row.window_index,
        TeamId(row.payer_team_id),
        TeamId(row.provider_team_id),
        MicroDgpu(row.rate_udgpu_per_hour),
        MicroDgpu(row.ceiling_udgpu),
        row.fee_basis_points,
        None if row.charged_udgpu is None else MicroDgpu(row.charged_udgpu),
    )
    return HeldWindow(hold, JobId(row.job_id), row.window_seconds, row.simulated)


async def insert_holds(tx: Tx, windows: Sequence[HeldWindow], now: datetime) -> None:
    """Write new holds and set their ceilings aside. The payers' balances must be locked."""
    holds = [window.hold for window in windows]
    await tx.send(
        QUERIES["insert_holds"],
        ids=[hold.id.uuid for hold in holds],
        attempt_ids=[hold.attempt_id.uuid for hold in holds],
        windows=[hold.window for hold in holds],
        job_ids=[window.job_id.uuid for window in windows],
        payers=[hold.payer_team_id.uuid for hold in holds],
        providers=[hold.provider_team_id.uuid for hold in holds],
        payer_accounts=[wallet_of(hold.payer_team_id).id.uuid for hold in holds],
        rates=[hold.rate_udgpu_per_hour for hold in holds],
        window_seconds=[window.window_seconds for window in windows],
        ceilings=[hold.ceiling_udgpu for hold in holds],
        fees=[hold.fee_basis_points for hold in holds],
        simulated=[window.simulated for window in windows],
        now=now,
    )


async def resolve_holds_if_open(tx: Tx, closed: Sequence[ClosedWindow], now: datetime) -> int:
    """Write the results of holds; how many were still open."""
    return await tx.run(
        QUERIES["resolve_holds_if_open"],
        ids=[window.closing.hold.id.uuid for window in closed],
        used_seconds=[window.used_seconds for window in closed],
        charged=[window.closing.charged_udgpu for window in closed],
        provider=[window.closing.split.provider_udgpu for window in closed],
        fee=[window.closing.split.fee_udgpu for window in closed],
        now=now,
    )


async def post_transfers(tx: Tx, postings: Sequence[Posting], freed: Mapping[Account, int], now: datetime) -> int:
    """Post in order and free held money, micro-$dGPU per account; how many balances changed.

    The balances of every account involved must be locked.
    """
    transfers = [posting.transfer for posting in postings]
    return await tx.run(
        QUERIES["post_transfers"],
        ids=[transfer.id.uuid for transfer in transfers],
        kinds=[transfer.kind.value for transfer in transfers],
        debits=[transfer.debit.id.uuid for transfer in transfers],
        credits=[transfer.credit.id.uuid for transfer in transfers],
        amounts=[transfer.amount_udgpu for transfer in transfers],
        linked=[transfer.linked.uuid if transfer.linked else None for transfer in transfers],
        job_ids=[posting.job_id.uuid if posting.job_id else None for posting in postings],
        attempt_ids=[posting.attempt_id.uuid if posting.attempt_id else None for posting in postings],
        windows=[posting.window for posting in postings],
        texts=[posting.text for posting in postings],
        freed_accounts=[account.id.uuid for account in freed],
        freed=list(freed.values()),
        now=now,
    )


async def find_transfer(tx: Tx, transfer_id: TransferId) -> TransferRow | None:
    return await tx.one(TransferRow, QUERIES["find_transfer"], id=transfer_id.uuid)


async def wallet(tx: Tx, wallet_account: Account, earnings_account: Account) -> WalletRow:
    """Zeros for a team that never had money."""
    row = await tx.one(
        WalletRow, QUERIES["wallet"], wallet_id=wallet_account.id.uuid, earnings_id=earnings_account.id.uuid
    )
    return row or WalletRow(0, 0, 0)


async def entries_before(tx: Tx, account: Account, before_seq: int, limit: int) -> list[EntryRow]:
    """Newest first."""
    return await tx.all(EntryRow, QUERIES["entries_before"], account_id=account.id.uuid, before=before_seq, n=limit)


async def receipt(
    tx: Tx, job_id: JobId, team_id: TeamId | None, attempt_ids: Sequence[AttemptId], limit: int
) -> list[ReceiptRow]:
    """Newest first. `team_id` None sees every line, else those that the team pays or earns. No attempts: all."""
    return await tx.all(
        ReceiptRow, QUERIES["receipt"], job_id=job_id.uuid, team_id=team_id.uuid if team_id else None,
        attempt_ids=[attempt_id.uuid for attempt_id in attempt_ids] or None, n=limit,
    )  # fmt: skip


async def open_holds_after(
    tx: Tx, until: datetime, after: tuple[datetime, HoldId] | None, limit: int
) -> list[OpenHoldRow]:
    """Oldest first."""
    after_time, after_id = after or (None, None)
    return await tx.all(
        OpenHoldRow,
        QUERIES["open_holds_after"],
        until=until,
        after=after_time,
        after_id=after_id.uuid if after_id else None,
        n=limit,
    )


async def audit(tx: Tx, max_problems: int) -> AuditRow:
    """Re-sum everything from the facts."""
    row = await tx.one(AuditRow, QUERIES["audit"], n=max_problems)
    assert row is not None, "an aggregate without GROUP BY has one row"
    return row
