"""Accounts and transfers. A transfer takes money from its debit account and gives it to its credit account.

A balance is the credits minus the debits; all balances of a ledger add up to zero. Money comes into being by a debit of
the issuance account, the only one that may go below zero: its balance is minus all money in circulation.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from dantegpu.domain.ids import AccountId, AttemptId, TeamId, TransferId
from dantegpu.domain.units import MicroDgpu


class AccountKind(StrEnum):
    TEAM_WALLET = "team_wallet"
    TEAM_EARNINGS = "team_earnings"
    PLATFORM_FEES = "platform_fees"
    ISSUANCE = "issuance"

    @property
    def per_team(self) -> bool:
        return self in (AccountKind.TEAM_WALLET, AccountKind.TEAM_EARNINGS)

    @property
    def may_go_negative(self) -> bool:
        return self is AccountKind.ISSUANCE


@dataclass(frozen=True, slots=True)
class Account:
    """One account. Its id derives from kind and team, so it is the same wherever it is computed."""

    kind: AccountKind
    team_id: TeamId | None = None

    def __post_init__(self) -> None:
        if self.kind.per_team != (self.team_id is not None):
            raise ValueError(f"a {self.kind.value} account {'has a' if self.kind.per_team else 'has no'} team")

    @property
    def id(self) -> AccountId:
        return _id_of(self.kind, self.team_id)


@lru_cache(maxsize=4096)
def _id_of(kind: AccountKind, team_id: TeamId | None) -> AccountId:
    return AccountId.derived(kind.value, *([] if team_id is None else [team_id]))


ISSUANCE = Account(AccountKind.ISSUANCE)
PLATFORM_FEES = Account(AccountKind.PLATFORM_FEES)


def wallet_of(team_id: TeamId) -> Account:
    """What the team pays from."""
    return Account(AccountKind.TEAM_WALLET, team_id)


def earnings_of(team_id: TeamId) -> Account:
    """What the team earned as a provider."""
    return Account(AccountKind.TEAM_EARNINGS, team_id)


class TransferKind(StrEnum):
    CREDIT = "credit"
    USAGE = "usage"
    FEE = "fee"
    PAYOUT = "payout"
    REFUND = "refund"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One movement of money, never changed. `linked` names the transfer that it stands or falls with."""

    id: TransferId
    debit: Account
    credit: Account
    amount_udgpu: MicroDgpu
    kind: TransferKind
    linked: TransferId | None = None

    def __post_init__(self) -> None:
        if self.amount_udgpu <= 0:
            raise ValueError("a transfer moves more than nothing")
        if self.debit == self.credit:
            raise ValueError("a transfer has two different accounts")


def usage_transfer_id(attempt_id: AttemptId, window: int, kind: TransferKind) -> TransferId:
    """The one transfer of this kind for a window: billing it again makes the same id, which exists already."""
    return TransferId.derived(attempt_id, window, kind.value)


def credit_transfer(team_id: TeamId, amount_udgpu: int, idempotency_key: str) -> Transfer:
    """New money into a team's wallet, by the operator. The same key is the same transfer."""
    return Transfer(
        TransferId.derived(team_id, idempotency_key, TransferKind.CREDIT.value),
        debit=ISSUANCE,
        credit=wallet_of(team_id),
        amount_udgpu=MicroDgpu(amount_udgpu),
        kind=TransferKind.CREDIT,
    )
