"""Two-phase payment for one window of one attempt: a hold sets money aside, closing posts what was used, once."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from dantegpu.domain.ids import AttemptId, HoldId, TeamId
from dantegpu.domain.ledger.accounts import (
    PLATFORM_FEES,
    Transfer,
    TransferKind,
    earnings_of,
    usage_transfer_id,
    wallet_of,
)
from dantegpu.domain.pricing import (
    BASIS_POINTS,
    DEFAULT_PLATFORM_FEE_BASIS_POINTS,
    WINDOW_SECONDS,
    charge_udgpu,
    hold_ceiling_udgpu,
)
from dantegpu.domain.units import MicroDgpu, format_dgpu


class LedgerError(Exception):
    """Base of what a ledger refuses: InsufficientFunds, HoldAlreadyClosed, TransferConflict."""


class InsufficientFunds(LedgerError):
    """The available balance is below what is asked for."""

    def __init__(self, available_udgpu: int, required_udgpu: int) -> None:
        super().__init__(
            f"{format_dgpu(required_udgpu)} $dGPU needed, {format_dgpu(available_udgpu)} available: "
            f"add at least {format_dgpu(required_udgpu - available_udgpu)}"
        )
        self.available_udgpu = MicroDgpu(available_udgpu)
        self.required_udgpu = MicroDgpu(required_udgpu)


class HoldAlreadyClosed(LedgerError):
    """A hold is closed exactly once; `charged_udgpu` is what the first close posted."""

    def __init__(self, hold_id: HoldId, charged_udgpu: int) -> None:
        super().__init__(f"{hold_id} is closed already; {format_dgpu(charged_udgpu)} $dGPU were posted")
        self.hold_id = hold_id
        self.charged_udgpu = MicroDgpu(charged_udgpu)


@dataclass(frozen=True, slots=True)
class Hold:
    """Money of `payer_team_id` set aside for one window. `charged_udgpu` is None while the hold is open."""

    attempt_id: AttemptId
    window: int
    payer_team_id: TeamId
    provider_team_id: TeamId
    rate_udgpu_per_hour: MicroDgpu
    ceiling_udgpu: MicroDgpu
    fee_basis_points: int
    charged_udgpu: MicroDgpu | None = None

    @property
    def id(self) -> HoldId:
        return hold_id(self.attempt_id, self.window)

    @property
    def pending_udgpu(self) -> MicroDgpu:
        """What it keeps from being spent: the ceiling while open, nothing afterwards."""
        return self.ceiling_udgpu if self.charged_udgpu is None else MicroDgpu(0)


@lru_cache(maxsize=4096)
def hold_id(attempt_id: AttemptId, window: int) -> HoldId:
    """A window has one hold, so opening it twice is opening it once."""
    return HoldId.derived(attempt_id, window)


def open_hold(
    attempt_id: AttemptId,
    window: int,
    *,
    payer_team_id: TeamId,
    provider_team_id: TeamId,
    rate_udgpu_per_hour: int,
    available_udgpu: int,
    window_seconds: int = WINDOW_SECONDS,
    fee_basis_points: int = DEFAULT_PLATFORM_FEE_BASIS_POINTS,
) -> Hold:
    """Set aside the charge for a whole window. Raises `InsufficientFunds` when the wallet cannot cover it."""
    if window < 0:
        raise ValueError("windows count from 0")
    _check_fee(fee_basis_points)
    ceiling = hold_ceiling_udgpu(rate_udgpu_per_hour, window_seconds)
    if ceiling > available_udgpu:
        raise InsufficientFunds(available_udgpu, ceiling)
    return Hold(
        attempt_id,
        window,
        payer_team_id,
        provider_team_id,
        MicroDgpu(rate_udgpu_per_hour),
        ceiling,
        fee_basis_points,
    )


class FeeSplit(NamedTuple):
    """The two parts of a charge; they add up to it exactly."""

    provider_udgpu: MicroDgpu
    fee_udgpu: MicroDgpu


class Closing(NamedTuple):
    """The closed hold, and the linked transfers to post. No transfers: nothing was used, the hold is void."""

    hold: Hold
    charged_udgpu: MicroDgpu
    split: FeeSplit
    transfers: tuple[Transfer, ...]


def close_hold(hold: Hold, used_seconds: int) -> Closing:
    """Post ceil(rate * seconds / 3600), never above the ceiling, split into share and fee; the rest is free again.

    Raises `HoldAlreadyClosed` with what the first close posted.
    """
    if hold.charged_udgpu is not None:
        raise HoldAlreadyClosed(hold.id, hold.charged_udgpu)
    charged = MicroDgpu(min(charge_udgpu(hold.rate_udgpu_per_hour, used_seconds), hold.ceiling_udgpu))
    split = split_fee(charged, hold.fee_basis_points)
    payer = wallet_of(hold.payer_team_id)
    usage_id = usage_transfer_id(hold.attempt_id, hold.window, TransferKind.USAGE)
    fee_id = usage_transfer_id(hold.attempt_id, hold.window, TransferKind.FEE)
    transfers: list[Transfer] = []
    if split.provider_udgpu:
        earnings = earnings_of(hold.provider_team_id)
        linked = fee_id if split.fee_udgpu else None
        transfers.append(Transfer(usage_id, payer, earnings, split.provider_udgpu, TransferKind.USAGE, linked))
    if split.fee_udgpu:
        linked = usage_id if split.provider_udgpu else None
        transfers.append(Transfer(fee_id, payer, PLATFORM_FEES, split.fee_udgpu, TransferKind.FEE, linked))
    return Closing(replace(hold, charged_udgpu=charged), charged, split, tuple(transfers))


def split_fee(amount_udgpu: int, fee_basis_points: int) -> FeeSplit:
    """The fee is rounded down, the provider gets the rest. One basis point is 1/100 of a percent."""
    _check_fee(fee_basis_points)
    if amount_udgpu < 0:
        raise ValueError("an amount is not negative")
    fee = amount_udgpu * fee_basis_points // BASIS_POINTS
    return FeeSplit(MicroDgpu(amount_udgpu - fee), MicroDgpu(fee))


def _check_fee(fee_basis_points: int) -> None:
    if not 0 <= fee_basis_points <= BASIS_POINTS:
        raise ValueError(f"a fee is 0 to {BASIS_POINTS} basis points")
