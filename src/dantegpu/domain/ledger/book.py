"""A whole ledger in memory: the rules that billing's tables keep, for property tests and simulations."""

from collections import defaultdict

from dantegpu.domain.ids import AttemptId, HoldId, TeamId, TransferId
from dantegpu.domain.ledger.accounts import Account, Transfer, credit_transfer, wallet_of
from dantegpu.domain.ledger.holds import (
    Closing,
    Hold,
    InsufficientFunds,
    LedgerError,
    close_hold,
    hold_id,
    open_hold,
    split_fee,
)
from dantegpu.domain.pricing import DEFAULT_PLATFORM_FEE_BASIS_POINTS, WINDOW_SECONDS
from dantegpu.domain.units import MicroDgpu


class TransferConflict(LedgerError):
    """A transfer with this id exists and says something else."""

    def __init__(self, transfer_id: TransferId) -> None:
        super().__init__(f"{transfer_id} exists with another content")
        self.transfer_id = transfer_id


class Ledger:
    """Transfers in order, balances as a cache, holds by id. Every method is safe to repeat with the same arguments."""

    def __init__(self) -> None:
        self._transfers: dict[TransferId, Transfer] = {}
        self._holds: dict[HoldId, Hold] = {}
        self._balances: defaultdict[Account, int] = defaultdict(int)
        self._pending: defaultdict[Account, int] = defaultdict(int)

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers, oldest first."""
        return tuple(self._transfers.values())

    @property
    def holds(self) -> tuple[Hold, ...]:
        return tuple(self._holds.values())

    def balance_udgpu(self, account: Account) -> MicroDgpu:
        """Posted credits minus posted debits."""
        return MicroDgpu(self._balances.get(account, 0))

    def pending_udgpu(self, account: Account) -> MicroDgpu:
        """What open holds keep from being spent."""
        return MicroDgpu(self._pending.get(account, 0))

    def available_udgpu(self, account: Account) -> MicroDgpu:
        """Balance minus pending: never below zero, except on the issuance account."""
        return MicroDgpu(self.balance_udgpu(account) - self.pending_udgpu(account))

    def credit(self, team_id: TeamId, amount_udgpu: int, idempotency_key: str) -> Transfer:
        """New money into the team's wallet. Raises `TransferConflict` for a used key with another amount."""
        transfer = credit_transfer(team_id, amount_udgpu, idempotency_key)
        self.post(transfer)
        return transfer

    def post(self, transfer: Transfer) -> bool:
        """Apply a transfer; False when it was applied before. Raises `InsufficientFunds`, `TransferConflict`."""
        known = self._transfers.get(transfer.id)
        if known is not None:
            if known != transfer:
                raise TransferConflict(transfer.id)
            return False
        available = self.available_udgpu(transfer.debit)
        if not transfer.debit.kind.may_go_negative and available < transfer.amount_udgpu:
            raise InsufficientFunds(available, transfer.amount_udgpu)
        self._transfers[transfer.id] = transfer
        self._balances[transfer.debit] -= transfer.amount_udgpu
        self._balances[transfer.credit] += transfer.amount_udgpu
        return True

    def open_hold(
        self,
        attempt_id: AttemptId,
        window: int,
        *,
        payer_team_id: TeamId,
        provider_team_id: TeamId,
        rate_udgpu_per_hour: int,
        window_seconds: int = WINDOW_SECONDS,
        fee_basis_points: int = DEFAULT_PLATFORM_FEE_BASIS_POINTS,
    ) -> Hold:
        """Open the window's hold, or answer the one that exists. Raises `InsufficientFunds`."""
        known = self._holds.get(hold_id(attempt_id, window))
        if known is not None:
            return known
        payer = wallet_of(payer_team_id)
        hold = open_hold(
            attempt_id,
            window,
            payer_team_id=payer_team_id,
            provider_team_id=provider_team_id,
            rate_udgpu_per_hour=rate_udgpu_per_hour,
            available_udgpu=self.available_udgpu(payer),
            window_seconds=window_seconds,
            fee_basis_points=fee_basis_points,
        )
        self._holds[hold.id] = hold
        self._pending[payer] += hold.ceiling_udgpu
        return hold

    def close_hold(self, attempt_id: AttemptId, window: int, used_seconds: int) -> Closing:
        """Close the window's hold; a repeated close posts nothing and answers what the first one charged.

        Raises KeyError when the window has no hold.
        """
        hold = self._holds[hold_id(attempt_id, window)]
        if hold.charged_udgpu is not None:
            return Closing(hold, hold.charged_udgpu, split_fee(hold.charged_udgpu, hold.fee_basis_points), ())
        closing = close_hold(hold, used_seconds)
        self._holds[hold.id] = closing.hold
        self._pending[wallet_of(hold.payer_team_id)] -= hold.ceiling_udgpu
        for transfer in closing.transfers:
            self.post(transfer)
        return closing

    def problems(self) -> list[str]:
        """What is wrong with the book, in words; an empty list when it balances."""
        summed: defaultdict[Account, int] = defaultdict(int)
        for transfer in self._transfers.values():
            summed[transfer.debit] -= transfer.amount_udgpu
            summed[transfer.credit] += transfer.amount_udgpu
        held: defaultdict[Account, int] = defaultdict(int)
        for hold in self._holds.values():
            held[wallet_of(hold.payer_team_id)] += hold.pending_udgpu
        found: list[str] = []
        if sum(self._balances.values()):
            found.append(f"the balances add up to {sum(self._balances.values())}, not 0")
        for account in {*summed, *held, *self._balances, *self._pending}:
            if summed[account] != self._balances[account]:
                found.append(f"{account.kind}: balance {self._balances[account]}, transfers say {summed[account]}")
            if held[account] != self._pending[account]:
                found.append(f"{account.kind}: pending {self._pending[account]}, holds say {held[account]}")
            if self.available_udgpu(account) < 0 and not account.kind.may_go_negative:
                found.append(f"{account.kind}: {self.available_udgpu(account)} available is below zero")
        return found
