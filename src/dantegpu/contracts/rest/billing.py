"""Wallets, entries, receipts and the ledger's check."""

from typing import Annotated

from pydantic import Field

from dantegpu.contracts.rest.base import Page, Request, Response, Timestamp, Udgpu, id_field
from dantegpu.domain.ids import TeamId
from dantegpu.domain.units import MAX_AMOUNT_UDGPU


class Wallet(Response):
    """A team's money."""

    team_id: str
    balance_udgpu: Udgpu = Field(description="Posted")
    held_udgpu: Udgpu = Field(description="Reserved for running jobs")
    available_udgpu: Udgpu = Field(description="balance - held")
    earned_udgpu: Udgpu = Field(description="As a provider")


class Entry(Response):
    """One movement of a wallet."""

    transfer_id: str
    kind: str = Field(description="credit, usage, fee, payout, ...")
    amount_udgpu: Udgpu = Field(description="Signed, as the wallet sees it")
    balance_after_udgpu: Udgpu
    job_id: str | None = None
    attempt_id: str | None = None
    text: str = ""
    created_at: Timestamp


class EntryPage(Page):
    """A wallet's movements, by page."""

    entries: list[Entry] = Field(description="Newest first")


class Credit(Request):
    """Money that the operator gives a team."""

    team_id: Annotated[str, id_field(TeamId)]
    amount_udgpu: int = Field(strict=True, ge=1, le=MAX_AMOUNT_UDGPU)
    text: str = Field(default="", max_length=500)


class ReceiptLine(Response):
    """One window of one attempt."""

    attempt_id: str
    window: int
    rate_udgpu_per_hour: Udgpu
    used_seconds: int
    charged_udgpu: Udgpu
    provider_udgpu: Udgpu = Field(description="The provider's share of it")
    fee_udgpu: Udgpu = Field(description="The platform's share of it")
    closed_at: Timestamp | None = None
    open: bool = Field(description="Still held, not charged yet")


class Receipt(Response):
    """What a job cost."""

    job_id: str
    payer_team_id: str
    lines: list[ReceiptLine]
    total_udgpu: Udgpu


class LedgerCheck(Response):
    """The books, added up again."""

    balanced: bool
    accounts: int
    transfers: int
    open_holds: int
    sum_udgpu: Udgpu = Field(description="0 when the books are right")
    problems: list[str]
