"""billing-payment-service against real PostgreSQL and NATS, called through its gRPC door."""

import asyncio

import psycopg
import pytest
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import unwrap
from dantegpu.contracts.gen.dante.v1 import billing_pb2 as pb
from dantegpu.contracts.gen.dante.v1 import common_pb2, events_pb2
from dantegpu.domain.ids import AttemptId, JobId, TeamId
from dantegpu.kit.actor import ANONYMOUS, SERVICE, Actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_machine, a_member, an_operator
from tests.fixtures.billing import (
    CEILING_UDGPU,
    RATE_UDGPU_PER_HOUR,
    WINDOW_SECONDS,
    BillingClient,
    a_hold,
    closing,
    dgpu,
)
from tests.fixtures.servers import NatsForTests

# --- credit and wallet ------------------------------------------------------------------------------------------------


async def test_a_credit_is_in_the_wallet_and_comes_from_the_issuance_account(billing: BillingClient):
    team = TeamId.new()
    wallet = await billing.credit(team, dgpu(5))
    assert (wallet.balance_udgpu, wallet.held_udgpu, wallet.available_udgpu) == (dgpu(5), 0, dgpu(5))
    assert await billing.wallet(None, a_member(team)) == wallet
    check = await billing.check_balanced()
    assert (check.accounts, check.transfers) == (2, 1)


async def test_the_same_key_credits_once_and_another_amount_under_it_is_refused(billing: BillingClient):
    team = TeamId.new()
    for _ in range(3):
        wallet = await billing.credit(team, dgpu(5), key="first")
        assert wallet.balance_udgpu == dgpu(5)
    with pytest.raises(RemoteError, match="nothing was credited now") as refused:
        await billing.credit(team, dgpu(6), key="first")
    assert refused.value.remote_type == "idempotency-key-reused"
    assert (await billing.credit(team, dgpu(5))).balance_udgpu == dgpu(10)  # without a key it is a new credit


async def test_the_same_key_for_another_team_is_another_credit(billing: BillingClient):
    for team in (TeamId.new(), TeamId.new()):
        assert (await billing.credit(team, dgpu(1), key="same")).balance_udgpu == dgpu(1)


@pytest.mark.parametrize("amount_udgpu", [0, -1, 10**12 + 1, 2**63 - 1, -(2**63)])
async def test_a_credit_of_nothing_less_than_nothing_or_too_much_is_refused(billing: BillingClient, amount_udgpu: int):
    with pytest.raises(RemoteError, match="expected more than 0 and at most") as refused:
        await billing.credit(TeamId.new(), amount_udgpu)
    assert refused.value.remote_type == "invalid-argument"


async def test_only_the_operator_credits(billing: BillingClient):
    team = TeamId.new()
    for actor in (a_member(team, "owner"), a_machine(team), ANONYMOUS):
        with pytest.raises(RemoteError) as refused:
            await billing.credit(team, dgpu(1), actor=actor)
        assert refused.value.remote_type == "forbidden"
    assert (await billing.wallet(team)).balance_udgpu == 0


async def test_a_wallet_has_a_limit_so_that_no_sum_overflows(billing: BillingClient):
    team = TeamId.new()
    for _ in range(20):  # a thousand credits, at most 50 of them waiting for one another's locks
        await asyncio.gather(*(billing.credit(team, 10**12) for _ in range(50)))
    with pytest.raises(RemoteError) as refused:
        await billing.credit(team, 1)
    assert refused.value.remote_type == "wallet-full"


async def test_a_credit_tells_everybody_whose_wallet_changed(billing: BillingClient, nats_server: NatsForTests):
    team = TeamId.new()
    changed: asyncio.Queue[str] = asyncio.Queue()
    bus = Bus(nats_server.url, nats_server.services_creds, name="listener")
    await bus.start()

    async def heard(message: Msg) -> None:
        changed.put_nowait(unwrap(message.data, events_pb2.WalletChanged)[1].team_id)

    await bus.subscribe(subjects.ALL_WALLET_EVENTS, heard)
    await billing.credit(team, dgpu(1), key="once")
    async with asyncio.timeout(10):
        assert await changed.get() == str(team)
    await billing.credit(team, dgpu(1), key="once")  # nothing changed, nothing to tell
    hold = a_hold(team)
    await billing.open(hold)
    await billing.close(closing(hold, 1))  # frees most of the hold: another job may start
    async with asyncio.timeout(10):
        assert await changed.get() == str(team)
    assert changed.empty()
    await bus.stop()


# --- holds ------------------------------------------------------------------------------------------------------------


async def test_a_hold_sets_its_ceiling_aside(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    (result,) = await billing.open(a_hold(team))
    assert (result.opened, result.ceiling_udgpu, result.refusal) == (True, CEILING_UDGPU, "")
    wallet = await billing.wallet(team)
    assert (wallet.balance_udgpu, wallet.held_udgpu) == (dgpu(1), CEILING_UDGPU)
    assert wallet.available_udgpu == dgpu(1) - CEILING_UDGPU
    assert (await billing.check_balanced()).open_holds == 1


async def test_one_hold_without_funds_does_not_stop_the_others(billing: BillingClient):
    poor, rich, unknown = TeamId.new(), TeamId.new(), TeamId.new()
    await billing.credit(poor, CEILING_UDGPU + 5)
    await billing.credit(rich, dgpu(1))
    asked = [a_hold(poor), a_hold(poor), a_hold(unknown), a_hold(rich), a_hold(poor, rate=60)]
    results = await billing.open(*asked)
    assert [r.attempt_id for r in results] == [h.attempt_id for h in asked]
    assert [r.opened for r in results] == [True, False, False, True, True]
    assert [(r.refusal, r.available_udgpu) for r in results[1:3]] == [("no-funds", 5), ("no-funds", 0)]
    assert (await billing.wallet(poor)).available_udgpu == 0
    await billing.check_balanced()


async def test_opening_again_answers_the_same_and_holds_once(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, CEILING_UDGPU)
    hold = a_hold(team)
    first = await billing.open(hold, hold)
    assert first[0] == first[1]
    assert await billing.open(hold) == first[:1]
    assert (await billing.wallet(team)).held_udgpu == CEILING_UDGPU
    await billing.close(closing(hold, 10))
    assert await billing.open(hold) == first[:1]  # also when it has been closed meanwhile, and holds nothing again
    assert (await billing.wallet(team)).held_udgpu == 0


async def test_a_window_cannot_get_a_second_hold_with_other_terms(billing: BillingClient):
    team, attempt = TeamId.new(), AttemptId.new()
    await billing.credit(team, dgpu(1))
    await billing.open(a_hold(team, attempt=attempt))
    (result,) = await billing.open(a_hold(team, attempt=attempt, rate=1))
    assert (result.opened, result.refusal) == (False, "hold-conflict")


async def test_a_refused_hold_opens_once_money_has_come(billing: BillingClient):
    team = TeamId.new()
    hold = a_hold(team)
    assert [r.opened for r in await billing.open(hold)] == [False]
    await billing.credit(team, CEILING_UDGPU)
    assert [r.opened for r in await billing.open(hold)] == [True]


async def test_a_simulated_machine_is_never_billable_to_strangers(billing: BillingClient):
    team, stranger = TeamId.new(), TeamId.new()
    await billing.credit(team, dgpu(1))
    await billing.credit(stranger, dgpu(1))
    results = await billing.open(
        a_hold(stranger, team, simulated=True), a_hold(team, team, simulated=True), a_hold(stranger, team)
    )
    assert [(r.opened, r.refusal) for r in results] == [(False, "simulated-machine"), (True, ""), (True, "")]


async def test_a_free_machine_needs_no_money(billing: BillingClient):
    team = TeamId.new()
    hold = a_hold(team, rate=0)
    assert [(r.opened, r.ceiling_udgpu) for r in await billing.open(hold)] == [(True, 0)]
    assert [(r.found, r.charged_udgpu) for r in await billing.close(closing(hold, 300))] == [(True, 0)]
    await billing.check_balanced()


async def test_closing_pays_the_provider_and_the_platform_and_frees_the_rest(billing: BillingClient):
    payer, provider = TeamId.new(), TeamId.new()
    await billing.credit(payer, dgpu(1))
    hold = a_hold(payer, provider)
    await billing.open(hold)
    (result,) = await billing.close(closing(hold, 61))
    assert (result.found, result.charged_udgpu) == (True, 61_000)
    wallet = await billing.wallet(payer)
    assert (wallet.balance_udgpu, wallet.held_udgpu) == (dgpu(1) - 61_000, 0)
    earned = await billing.wallet(provider)
    assert (earned.earned_udgpu, earned.balance_udgpu, earned.available_udgpu) == (57_950, 0, 0)  # 5 % fee
    check = await billing.check_balanced()
    assert (check.transfers, check.open_holds) == (3, 0)


async def test_a_started_micro_dgpu_is_a_whole_one_and_the_ceiling_is_never_passed(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    slow, long = a_hold(team, rate=1), a_hold(team)
    await billing.open(slow, long)
    results = await billing.close(closing(slow, 1), closing(long, 10 * WINDOW_SECONDS))
    assert [r.charged_udgpu for r in results] == [1, CEILING_UDGPU]
    await billing.check_balanced()


async def test_a_hold_is_closed_once_whatever_later_calls_say(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    hold = a_hold(team)
    await billing.open(hold)
    results = await billing.close(closing(hold, 10), closing(hold, 200))
    results += await billing.close(closing(hold, 300))
    assert [(r.found, r.charged_udgpu) for r in results] == [(True, 10_000)] * 3
    assert (await billing.wallet(team)).balance_udgpu == dgpu(1) - 10_000
    assert (await billing.check_balanced()).transfers == 3


async def test_closing_with_no_seconds_used_voids_the_hold(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, CEILING_UDGPU)
    hold = a_hold(team)
    await billing.open(hold)
    for used_seconds in (0, 100):
        (result,) = await billing.close(closing(hold, used_seconds))
        assert (result.found, result.charged_udgpu) == (True, 0)
    assert (await billing.wallet(team)).available_udgpu == CEILING_UDGPU
    assert (await billing.check_balanced()).transfers == 1


async def test_a_window_without_a_hold_is_not_found_and_does_not_stop_the_others(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    hold = a_hold(team)
    await billing.open(hold)
    results = await billing.close(closing(a_hold(team), 5), closing(hold, 5))
    assert [(r.found, r.charged_udgpu) for r in results] == [(False, 0), (True, 5000)]


async def test_a_team_may_rent_its_own_machine_and_pays_the_fee_only(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    hold = a_hold(team, team)
    await billing.open(hold)
    await billing.close(closing(hold, 100))
    wallet = await billing.wallet(team)
    assert (wallet.balance_udgpu, wallet.earned_udgpu) == (dgpu(1) - 100_000, 95_000)
    await billing.check_balanced()


async def test_only_services_open_close_and_list_holds(billing: BillingClient):
    team = TeamId.new()
    for actor in (a_member(team, "owner"), an_operator(team), a_machine(team), ANONYMOUS):
        listing = call(billing.stub.ListOpenHolds, pb.ListOpenHoldsRequest(), actor=actor)
        for refused in (billing.open(a_hold(team), actor=actor), billing.close(actor=actor), listing):
            with pytest.raises(RemoteError, match="own services") as error:
                await refused
            assert error.value.remote_type == "forbidden"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", -1),
        ("rate_udgpu_per_hour", -1),
        ("rate_udgpu_per_hour", 2**63 - 1),
        ("window_seconds", 0),
        ("window_seconds", 2**62),
        ("attempt_id", "job_01h455vb4pex5vsknk084sn02q"),
        ("payer_team_id", ""),
    ],
)
async def test_a_hold_that_makes_no_sense_is_refused_by_name(billing: BillingClient, field: str, value: object):
    hold = a_hold(TeamId.new())
    setattr(hold, field, value)
    with pytest.raises(RemoteError) as refused:
        await billing.open(hold)
    assert refused.value.remote_type == "invalid-argument"


async def test_negative_seconds_are_refused(billing: BillingClient):
    with pytest.raises(RemoteError, match="used_seconds") as refused:
        await billing.close(closing(a_hold(TeamId.new()), -1))
    assert refused.value.remote_type == "invalid-argument"


async def test_open_holds_are_listed_oldest_first_in_pages_once_they_are_old_enough(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    old = [a_hold(team, rate=1) for _ in range(5)]
    await billing.open(*old[:3])
    billing.clock.advance(10)
    await billing.open(*old[3:])
    billing.clock.advance(60)
    await billing.open(a_hold(team, rate=1))  # too young
    await billing.close(closing(old[0], 0))
    found: list[str] = []
    cursor = ""
    while True:
        request = pb.ListOpenHoldsRequest(older_than_seconds=60, page=common_pb2.PageRequest(limit=3, cursor=cursor))
        page = await call(billing.stub.ListOpenHolds, request, actor=SERVICE)
        assert len(page.holds) <= 3
        found += [hold.attempt_id for hold in page.holds]
        cursor = page.next_cursor
        if not cursor:
            break
    assert set(found[:2]) == {hold.attempt_id for hold in old[1:3]}
    assert set(found[2:]) == {hold.attempt_id for hold in old[3:]}


# --- looking back -----------------------------------------------------------------------------------------------------


async def test_entries_carry_the_running_balance_newest_first_page_by_page(billing: BillingClient):
    payer = TeamId.new()
    await billing.credit(payer, dgpu(1))
    for used in (1, 2, 3):
        hold = a_hold(payer, payer)
        await billing.open(hold)
        await billing.close(closing(hold, used))
    await billing.credit(payer, dgpu(2))
    entries: list[pb.Entry] = []
    cursor = ""
    while True:
        page = await billing.entries(payer, limit=3, cursor=cursor)
        entries += page.entries
        cursor = page.next_cursor
        if not cursor:
            break
    assert [(e.kind, e.amount_udgpu) for e in entries] == [
        ("credit", dgpu(2)),
        ("fee", -150), ("usage", -2850),
        ("fee", -100), ("usage", -1900),
        ("fee", -50), ("usage", -950),
        ("credit", dgpu(1)),
    ]  # fmt: skip
    balance = 0
    for entry in reversed(entries):
        balance += entry.amount_udgpu
        assert entry.balance_after_udgpu == balance
    assert balance == (await billing.wallet(payer)).balance_udgpu
    assert "3s at 3.60 $dGPU/h" in entries[2].text


@pytest.mark.parametrize(
    "cursor", ["x", "WzFd" * 200, "WyJhIl0", "W10", "bnVsbA", "Wy0xXQ", "WzE4NDQ2NzQ0MDczNzA5NTUxNjE2XQ"]
)
async def test_a_forged_cursor_is_refused(billing: BillingClient, cursor: str):
    with pytest.raises(RemoteError, match="cursor") as refused:
        await billing.entries(TeamId.new(), cursor=cursor)
    assert refused.value.remote_type == "invalid-argument"


async def test_a_receipt_lists_every_window_and_its_total(billing: BillingClient):
    payer, provider, job, attempt = TeamId.new(), TeamId.new(), JobId.new(), AttemptId.new()
    await billing.credit(payer, dgpu(1))
    windows = [a_hold(payer, provider, job=job, attempt=attempt, window=index) for index in range(3)]
    for hold in windows:
        await billing.open(hold)
        billing.clock.advance(1)
    await billing.close(closing(windows[0], 300), closing(windows[1], 7))
    receipt = await billing.receipt(str(job), a_member(payer, "viewer"))
    assert (receipt.payer_team_id, receipt.total_udgpu) == (str(payer), 307_000)
    assert [
        (x.window, x.used_seconds, x.charged_udgpu, x.provider_udgpu, x.fee_udgpu, x.open) for x in receipt.lines
    ] == [
        (0, 300, 300_000, 285_000, 15_000, False),
        (1, 7, 7_000, 6_650, 350, False),
        (2, 0, 0, 0, 0, True),
    ]
    assert {line.rate_udgpu_per_hour for line in receipt.lines} == {RATE_UDGPU_PER_HOUR}


async def test_a_provider_sees_its_own_lines_of_a_receipt_and_strangers_none(billing: BillingClient):
    payer, first, second, job = TeamId.new(), TeamId.new(), TeamId.new(), JobId.new()
    await billing.credit(payer, dgpu(1))
    holds = [a_hold(payer, first, job=job), a_hold(payer, second, job=job)]
    await billing.open(*holds)
    await billing.close(closing(holds[0], 10), closing(holds[1], 20))
    own = await billing.receipt(str(job), a_member(second))
    assert ([line.attempt_id for line in own.lines], own.total_udgpu) == ([holds[1].attempt_id], 20_000)
    assert len((await billing.receipt(str(job), an_operator())).lines) == 2
    for job_id in (str(job), str(JobId.new())):
        with pytest.raises(RemoteError) as refused:
            await billing.receipt(job_id, a_member(TeamId.new(), "owner"))
        assert refused.value.remote_type == "receipt-not-found"


async def test_another_teams_wallet_and_entries_are_not_found(billing: BillingClient):
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    stranger = a_member(TeamId.new(), "owner")
    entries = call(billing.stub.ListEntries, pb.ListEntriesRequest(team_id=str(team)), actor=stranger)
    for refused in (billing.wallet(team, stranger), entries):
        with pytest.raises(RemoteError) as error:
            await refused
        assert error.value.remote_type == "wallet-not-found"
    assert (await billing.wallet(team, an_operator())).balance_udgpu == dgpu(1)


@pytest.mark.parametrize(("actor", "refusal"), [(a_machine(TeamId.new()), "forbidden"), (ANONYMOUS, "unauthenticated")])
async def test_machines_and_nobody_see_no_money(billing: BillingClient, actor: Actor, refusal: str):
    for asking in (billing.wallet(None, actor), billing.receipt(str(JobId.new()), actor)):
        with pytest.raises(RemoteError) as refused:
            await asking
        assert refused.value.remote_type == refusal


async def test_a_member_may_not_ask_for_the_ledgers_check(billing: BillingClient):
    with pytest.raises(RemoteError) as refused:
        await billing.check(a_member(TeamId.new(), "owner"))
    assert refused.value.remote_type == "forbidden"


# --- what the tables themselves refuse --------------------------------------------------------------------------------


async def _a_closed_and_an_open_hold(billing: BillingClient) -> None:
    team = TeamId.new()
    await billing.credit(team, dgpu(1))
    holds = [a_hold(team), a_hold(team)]
    await billing.open(*holds)
    await billing.close(closing(holds[0], 10))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE transfers SET amount_udgpu = 1",
        "DELETE FROM transfers",
        "TRUNCATE transfers CASCADE",
        "UPDATE accounts SET team_id = NULL",
        "DELETE FROM accounts",
        "DELETE FROM holds",
        "UPDATE holds SET charged_udgpu = 0, provider_udgpu = 0, fee_udgpu = 0 WHERE state = 'posted'",
        "UPDATE holds SET state = 'open' WHERE state = 'posted'",
        "UPDATE holds SET ceiling_udgpu = 1 WHERE state = 'open'",
        "UPDATE holds SET state = 'voided' WHERE state = 'open'",
        "UPDATE balances SET held_udgpu = balance_udgpu + 1 WHERE kind = 'team_wallet'",
        "UPDATE balances SET balance_udgpu = -1 WHERE kind = 'platform_fees'",
        (
            "INSERT INTO transfers (id, kind, debit_account_id, credit_account_id, amount_udgpu,"
            " debit_balance_after_udgpu, credit_balance_after_udgpu, job_id, attempt_id, window_index, created_at)"
            " SELECT gen_random_uuid(), kind,"
            " debit_account_id, credit_account_id, 1, 0, 0, job_id, attempt_id, window_index, now() FROM transfers"
            " WHERE kind = 'fee'"
        ),
    ],
)
async def test_the_tables_refuse_what_must_never_happen(billing: BillingClient, postgres_dsn: str, statement: str):
    await _a_closed_and_an_open_hold(billing)
    with (
        psycopg.connect(postgres_dsn, options="-c search_path=billing") as connection,
        pytest.raises(psycopg.errors.IntegrityError),
    ):
        connection.execute(statement.encode())
    await billing.check_balanced()


@pytest.mark.parametrize(
    ("table", "change", "problem"),
    [
        ("transfers", "UPDATE transfers SET amount_udgpu = amount_udgpu + 1 WHERE kind = 'usage'", "add up to"),
        ("transfers", "UPDATE transfers SET linked_id = NULL WHERE kind = 'usage'", "not linked as a pair"),
        ("transfers", "UPDATE transfers SET attempt_id = gen_random_uuid() WHERE kind = 'fee'", "the hold says"),
        ("balances", "UPDATE balances SET balance_udgpu = balance_udgpu + 1", "all balances add up to"),
        ("balances", "UPDATE balances SET held_udgpu = 0", "cached as held"),
        ("transfers", "UPDATE transfers SET credit_balance_after_udgpu = 7 WHERE kind = 'credit'", "says balance 7"),
    ],
)
async def test_the_audit_finds_what_somebody_changed_behind_the_ledgers_back(
    billing: BillingClient, postgres_dsn: str, table: str, change: str, problem: str
):
    await _a_closed_and_an_open_hold(billing)
    await billing.check_balanced()
    with psycopg.connect(postgres_dsn, options="-c search_path=billing") as connection:
        connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER".encode())
        connection.execute(change.encode())
    check = await billing.check()
    assert not check.balanced
    assert any(problem in text for text in check.problems), check.problems
