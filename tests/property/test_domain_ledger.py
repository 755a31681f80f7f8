"""Debits equal credits after any sequence of steps; replays are harmless; nobody goes below zero."""

from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from dantegpu.domain.ids import AttemptId, TeamId
from dantegpu.domain.ledger import InsufficientFunds, Ledger, TransferConflict, split_fee
from dantegpu.domain.pricing import charge_udgpu, hold_ceiling_udgpu, windows_used

TEAMS = [TeamId(UUID(int=number)) for number in range(1, 4)]
ATTEMPTS = [AttemptId(UUID(int=number)) for number in range(1, 5)]


@dataclass(frozen=True)
class Credit:
    team: TeamId
    amount: int
    key: str


@dataclass(frozen=True)
class Open:
    attempt: AttemptId
    window: int
    payer: TeamId
    provider: TeamId
    rate: int
    fee: int


@dataclass(frozen=True)
class Close:
    attempt: AttemptId
    window: int
    seconds: int


type LedgerStep = Credit | Open | Close

STEPS: st.SearchStrategy[LedgerStep] = st.one_of(
    st.builds(Credit, st.sampled_from(TEAMS), st.integers(1, 10_000), st.sampled_from("abc")),
    st.builds(
        Open,
        st.sampled_from(ATTEMPTS),
        st.integers(0, 2),
        st.sampled_from(TEAMS),
        st.sampled_from(TEAMS),
        st.integers(0, 50_000),
        st.sampled_from([0, 1, 500, 10_000]),
    ),
    st.builds(Close, st.sampled_from(ATTEMPTS), st.integers(0, 2), st.integers(0, 700)),
)


def apply(ledger: Ledger, step: LedgerStep) -> None:
    match step:
        case Credit(team, amount, key):
            with suppress(TransferConflict):
                ledger.credit(team, amount, key)
        case Open(attempt, window, payer, provider, rate, fee):
            with suppress(InsufficientFunds):
                ledger.open_hold(
                    attempt,
                    window,
                    payer_team_id=payer,
                    provider_team_id=provider,
                    rate_udgpu_per_hour=rate,
                    fee_basis_points=fee,
                )
        case Close(attempt, window, seconds):
            with suppress(KeyError):
                ledger.close_hold(attempt, window, seconds)


@given(st.lists(STEPS, max_size=40))
def test_the_ledger_sums_to_zero_after_any_sequence_and_nobody_goes_below_zero(steps: list[LedgerStep]):
    ledger = Ledger()
    for step in steps:
        apply(ledger, step)
        assert ledger.problems() == []


@given(st.lists(STEPS, max_size=30))
def test_a_step_taken_twice_is_a_step_taken_once(steps: list[LedgerStep]):
    once, twice = Ledger(), Ledger()
    for step in steps:
        apply(once, step)
        apply(twice, step)
        apply(twice, step)
        assert once.transfers == twice.transfers
        assert once.holds == twice.holds


@given(st.lists(STEPS, max_size=40))
def test_a_closed_window_moved_exactly_what_it_charged(steps: list[LedgerStep]):
    ledger = Ledger()
    for step in steps:
        apply(ledger, step)
    charged = sum(hold.charged_udgpu or 0 for hold in ledger.holds)
    moved = sum(transfer.amount_udgpu for transfer in ledger.transfers if transfer.kind in ("usage", "fee"))
    assert moved == charged
    assert all((hold.charged_udgpu or 0) <= hold.ceiling_udgpu for hold in ledger.holds)


@given(st.integers(0, 10**15), st.integers(0, 10_000))
def test_share_and_fee_add_up_to_the_charge(amount: int, fee_basis_points: int):
    split = split_fee(amount, fee_basis_points)
    assert split.provider_udgpu + split.fee_udgpu == amount
    assert min(split) >= 0


@given(st.integers(0, 10**9), st.integers(0, 10**6))
def test_windows_charge_what_the_whole_time_costs_and_less_than_a_micro_more_for_each(rate: int, seconds: int):
    uses = windows_used(seconds)
    assert sum(use.used_seconds for use in uses) == seconds
    assert all(charge_udgpu(rate, use.used_seconds) <= hold_ceiling_udgpu(rate) for use in uses)
    charged, exact = sum(charge_udgpu(rate, use.used_seconds) for use in uses), charge_udgpu(rate, seconds)
    assert exact <= charged <= exact + len(uses)
