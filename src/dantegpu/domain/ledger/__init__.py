"""Double-entry money in integer micro-$dGPU: accounts, transfers, two-phase holds, and a ledger in memory."""

from dantegpu.domain.ledger.accounts import (
    ISSUANCE,
    PLATFORM_FEES,
    Account,
    AccountKind,
    Transfer,
    TransferKind,
    credit_transfer,
    earnings_of,
    usage_transfer_id,
    wallet_of,
)
from dantegpu.domain.ledger.book import Ledger, TransferConflict
from dantegpu.domain.ledger.holds import (
    Closing,
    FeeSplit,
    Hold,
    HoldAlreadyClosed,
    InsufficientFunds,
    LedgerError,
    close_hold,
    hold_id,
    open_hold,
    split_fee,
)

__all__ = [
    "ISSUANCE",
    "PLATFORM_FEES",
    "Account",
    "AccountKind",
    "Closing",
    "FeeSplit",
    "Hold",
    "HoldAlreadyClosed",
    "InsufficientFunds",
    "Ledger",
    "LedgerError",
    "Transfer",
    "TransferConflict",
    "TransferKind",
    "close_hold",
    "credit_transfer",
    "earnings_of",
    "hold_id",
    "open_hold",
    "split_fee",
    "usage_transfer_id",
    "wallet_of",
]
