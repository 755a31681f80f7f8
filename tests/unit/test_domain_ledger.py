import pytest

from dantegpu.domain.ids import AttemptId, TeamId, TransferId
from dantegpu.domain.ledger import (
    ISSUANCE,
    PLATFORM_FEES,
    Account,
    AccountKind,
    HoldAlreadyClosed,
    InsufficientFunds,
    Ledger,
    Transfer,
    TransferConflict,
    TransferKind,
    close_hold,
    earnings_of,
    open_hold,
    split_fee,
    wallet_of,
)
from dantegpu.domain.units import MicroDgpu

PAYER, PROVIDER = TeamId.new(), TeamId.new()
RATE = 3_600_000  # 1,000 micro-$dGPU per second
WINDOW_SECONDS = 300


def a_ledger(credit_udgpu: int = 1_000_000) -> Ledger:
    ledger = Ledger()
    ledger.credit(PAYER, credit_udgpu, "start")
    return ledger


def hold(ledger: Ledger, attempt: AttemptId, window: int = 0) -> None:
    ledger.open_hold(
        attempt,
        window,
        payer_team_id=PAYER,
        provider_team_id=PROVIDER,
        rate_udgpu_per_hour=RATE,
        window_seconds=WINDOW_SECONDS,
        fee_basis_points=500,
    )


def test_a_credit_comes_from_the_issuance_account():
    ledger = a_ledger(5)
    assert ledger.balance_udgpu(wallet_of(PAYER)) == 5
    assert ledger.balance_udgpu(ISSUANCE) == -5


def test_a_hold_sets_the_whole_window_aside_and_moves_no_money():
    ledger = a_ledger()
    hold(ledger, AttemptId.new())
    assert ledger.available_udgpu(wallet_of(PAYER)) == 700_000
    assert ledger.balance_udgpu(wallet_of(PAYER)) == 1_000_000


def test_closing_posts_the_seconds_used_and_frees_the_rest():
    ledger, attempt = a_ledger(), AttemptId.new()
    hold(ledger, attempt)
    closing = ledger.close_hold(attempt, 0, used_seconds=60)
    assert closing.charged_udgpu == 60_000
    assert ledger.available_udgpu(wallet_of(PAYER)) == 940_000
    assert ledger.balance_udgpu(earnings_of(PROVIDER)) == 57_000
    assert ledger.balance_udgpu(PLATFORM_FEES) == 3_000
    assert ledger.problems() == []


def test_share_and_fee_are_linked_transfers():
    ledger, attempt = a_ledger(), AttemptId.new()
    hold(ledger, attempt)
    usage, fee = ledger.close_hold(attempt, 0, used_seconds=60).transfers
    assert (usage.kind, usage.linked, fee.kind, fee.linked) == (TransferKind.USAGE, fee.id, TransferKind.FEE, usage.id)


def test_a_hold_closed_with_no_seconds_is_void():
    ledger, attempt = a_ledger(), AttemptId.new()
    hold(ledger, attempt)
    assert ledger.close_hold(attempt, 0, used_seconds=0).transfers == ()
    assert ledger.available_udgpu(wallet_of(PAYER)) == 1_000_000


def test_closing_never_charges_more_than_was_held():
    ledger, attempt = a_ledger(), AttemptId.new()
    hold(ledger, attempt)
    assert ledger.close_hold(attempt, 0, used_seconds=10_000).charged_udgpu == 300_000


def test_a_hold_above_the_available_balance_is_refused_with_both_amounts():
    ledger = a_ledger(400_000)
    hold(ledger, AttemptId.new())
    with pytest.raises(InsufficientFunds, match=r"0\.30 \$dGPU needed, 0\.10 available: add at least 0\.20"):
        hold(ledger, AttemptId.new())


def test_opening_the_same_window_again_holds_nothing_more():
    ledger, attempt = a_ledger(), AttemptId.new()
    hold(ledger, attempt)
    hold(ledger, attempt)
    assert ledger.pending_udgpu(wallet_of(PAYER)) == 300_000


def test_closing_again_posts_nothing_and_answers_the_first_charge():
    ledger, attempt = a_ledger(), AttemptId.new()
    hold(ledger, attempt)
    ledger.close_hold(attempt, 0, used_seconds=60)
    again = ledger.close_hold(attempt, 0, used_seconds=300)
    assert (again.charged_udgpu, again.transfers) == (60_000, ())
    hold(ledger, attempt)
    assert ledger.pending_udgpu(wallet_of(PAYER)) == 0


def test_a_closed_hold_cannot_be_closed_by_the_pure_function():
    opened = open_hold(
        AttemptId.new(),
        0,
        payer_team_id=PAYER,
        provider_team_id=PROVIDER,
        rate_udgpu_per_hour=RATE,
        available_udgpu=10**9,
    )
    closed = close_hold(opened, 1).hold
    with pytest.raises(HoldAlreadyClosed) as caught:
        close_hold(closed, 1)
    assert caught.value.charged_udgpu == 1000


def test_a_replayed_transfer_changes_nothing_and_a_changed_one_is_refused():
    ledger = a_ledger(5)
    ledger.credit(PAYER, 5, "start")
    assert ledger.balance_udgpu(wallet_of(PAYER)) == 5
    with pytest.raises(TransferConflict):
        ledger.credit(PAYER, 6, "start")


def test_money_that_is_held_cannot_be_paid_out():
    ledger = a_ledger(300_000)
    hold(ledger, AttemptId.new())
    payout = Transfer(TransferId.new(), wallet_of(PAYER), ISSUANCE, MicroDgpu(1), TransferKind.PAYOUT)
    with pytest.raises(InsufficientFunds):
        ledger.post(payout)


def test_the_fee_is_rounded_down_and_nothing_is_lost():
    assert split_fee(19, 500) == (19, 0)
    assert split_fee(39, 500) == (38, 1)
    assert split_fee(1, 10_000) == (0, 1)
    with pytest.raises(ValueError, match="basis points"):
        split_fee(1, 10_001)


def test_transfers_of_nothing_or_to_oneself_cannot_be_made():
    for amount, credit in ((0, PLATFORM_FEES), (-1, PLATFORM_FEES), (1, ISSUANCE)):
        with pytest.raises(ValueError, match="transfer"):
            Transfer(TransferId.new(), ISSUANCE, credit, MicroDgpu(amount), TransferKind.CREDIT)


def test_an_account_knows_whether_it_belongs_to_a_team():
    with pytest.raises(ValueError, match="has a team"):
        Account(AccountKind.TEAM_WALLET)
    with pytest.raises(ValueError, match="has no team"):
        Account(AccountKind.ISSUANCE, PAYER)
    assert wallet_of(PAYER).id == wallet_of(PAYER).id != earnings_of(PAYER).id
