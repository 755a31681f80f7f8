"""Billing under parallel callers, cut connections and replays, with the domain's Ledger as the oracle."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from random import Random

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dantegpu.contracts.gen.dante.v1 import billing_pb2 as pb
from dantegpu.domain.ids import AttemptId, JobId, TeamId
from dantegpu.domain.ledger import InsufficientFunds, Ledger, TransferConflict, earnings_of, wallet_of
from dantegpu.kit.errors import ErrorStatus, RemoteError, ServiceError, status_of
from dantegpu.kit.lifecycle import Wakeup
from tests.fixtures.billing import CEILING_UDGPU, BillingClient, BillingReplica, a_hold, closing, dgpu

RETRIES = 200


async def _until_it_answers[T](ask: Callable[[], Awaitable[T]]) -> T:
    """What every caller of billing does: the same call again when nobody answered."""
    for _ in range(RETRIES):
        try:
            return await ask()
        except ServiceError as error:
            if status_of(error) is not ErrorStatus.UNAVAILABLE:
                raise
    raise AssertionError(f"no answer in {RETRIES} tries")


# --- parallel callers -------------------------------------------------------------------------------------------------


async def test_parallel_holds_never_overdraw_a_wallet(billing: BillingClient, billing_replica: BillingReplica):
    team = TeamId.new()
    await billing.credit(team, 7 * CEILING_UDGPU + 1)
    async with billing_replica("second") as second:
        answers = await asyncio.gather(*(client.open(a_hold(team)) for client in (billing, second) for _ in range(20)))
    assert Counter(answer[0].opened for answer in answers) == {True: 7, False: 33}
    assert (await billing.wallet(team)).available_udgpu == 1
    await billing.check_balanced()


async def test_the_same_calls_from_two_replicas_at_once_count_once(
    billing: BillingClient, billing_replica: BillingReplica
):
    payer, provider = TeamId.new(), TeamId.new()
    holds = [a_hold(payer, provider) for _ in range(10)]
    async with billing_replica("second") as second:
        clients = (billing, second) * 5
        await asyncio.gather(*(client.credit(payer, dgpu(100), key="once") for client in clients))
        opened = await asyncio.gather(*(client.open(*holds) for client in clients))
        # Each caller says something else; whoever comes first decides, for everybody.
        closed = await asyncio.gather(
            *(client.close(*(closing(h, 10 * i + 1) for h in holds)) for i, client in enumerate(clients))
        )
    assert all(answer == opened[0] for answer in opened)
    assert all(answer == closed[0] for answer in closed)
    charged = sum(result.charged_udgpu for result in closed[0])
    wallet = await billing.wallet(payer)
    assert (wallet.balance_udgpu, wallet.held_udgpu) == (dgpu(100) - charged, 0)
    assert (await billing.check_balanced()).transfers == 1 + 2 * len(holds)


async def test_teams_that_pay_each_other_crosswise_do_not_deadlock(
    billing: BillingClient, billing_replica: BillingReplica
):
    teams = [TeamId.new() for _ in range(4)]
    random = Random(7)
    for team in teams[:2]:  # the others' accounts are made in the middle of it
        await billing.credit(team, dgpu(100))

    async def rounds(client: BillingClient) -> None:
        for number in range(12):
            holds = [a_hold(*random.sample(teams, 2)) for _ in range(6)]
            opened = await client.open(*holds)
            await client.close(*(closing(h, number) for h, o in zip(holds, opened, strict=True) if o.opened))
            await client.credit(random.choice(teams), dgpu(1))

    async with billing_replica("second") as second:
        await asyncio.gather(*(rounds(client) for client in (billing, second) for _ in range(5)))
    assert (await billing.check_balanced()).open_holds == 0


async def test_the_audit_sees_one_moment_while_others_post(billing: BillingClient):
    payer = TeamId.new()
    await billing.credit(payer, dgpu(1000))
    done = asyncio.Event()

    async def work() -> None:
        for _ in range(30):
            holds = [a_hold(payer) for _ in range(5)]
            await billing.open(*holds)
            await billing.close(*(closing(hold, 3) for hold in holds))
        done.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(work())
        checks = 0
        while not done.is_set():
            await billing.check_balanced()
            checks += 1
    assert checks > 3


async def test_cut_connections_and_repeated_calls_change_nothing_twice(
    billing: BillingClient, billing_replica: BillingReplica, postgres_dsn: str
):
    """After each answer some busy connection is cut, before or after its commit; callers repeat what got no answer."""
    payer, provider = TeamId.new(), TeamId.new()
    used = {number: 1 + number % 13 for number in range(40)}
    holds = {number: a_hold(payer, provider) for number in used}
    answered = Wakeup()

    async def job(client: BillingClient, number: int) -> None:
        await _until_it_answers(lambda: client.credit(payer, CEILING_UDGPU, key=f"credit {number}"))
        answered.notify()
        (opened,) = await _until_it_answers(lambda: client.open(holds[number]))
        assert opened.opened
        answered.notify()
        (closed,) = await _until_it_answers(lambda: client.close(closing(holds[number], used[number])))
        assert (closed.found, closed.charged_udgpu) == (True, used[number] * 1000)
        answered.notify()

    cuts = 0

    async def cut() -> None:
        nonlocal cuts
        async with await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as connection:
            while True:
                await answered.wait()
                cursor = await connection.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity"
                    " WHERE application_name = 'dante billing' AND state <> 'idle' ORDER BY random() LIMIT 1) AS one"
                )
                row = await cursor.fetchone()
                cuts += row[0] if row else 0

    async with billing_replica("second") as second:
        cutting = asyncio.create_task(cut())
        async with asyncio.TaskGroup() as tasks:
            for number in used:
                tasks.create_task(job((billing, second)[number % 2], number))
        cutting.cancel()
        await asyncio.wait([cutting])
        assert cuts > 10
        wallet = await _until_it_answers(lambda: billing.wallet(payer))
    spent = sum(used.values()) * 1000
    assert (wallet.balance_udgpu, wallet.held_udgpu) == (len(used) * CEILING_UDGPU - spent, 0)
    assert (await billing.check_balanced()).transfers == 3 * len(used)


# --- the oracle -------------------------------------------------------------------------------------------------------

ATTEMPTS = 4
WINDOWS = 2
TEAMS = 3

_credits = st.tuples(st.just("credit"), st.integers(0, TEAMS - 1), st.integers(1, 2_000_000), st.integers(0, 3))
_slots = st.tuples(st.integers(0, ATTEMPTS - 1), st.integers(0, WINDOWS - 1))
_opens = st.tuples(st.just("open"), st.lists(_slots, min_size=1, max_size=6))
_closes = st.tuples(st.just("close"), st.lists(st.tuples(_slots, st.integers(0, 400)), min_size=1, max_size=6))
_steps = st.lists(st.one_of(_credits, _opens, _closes), min_size=1, max_size=25)
_terms = st.lists(
    st.tuples(st.integers(0, TEAMS - 1), st.integers(0, TEAMS - 1), st.integers(0, 20_000_000)),
    min_size=ATTEMPTS,
    max_size=ATTEMPTS,
)


class _World:
    """The same calls to the service and to the domain's ledger; their answers and balances have to agree."""

    def __init__(self, billing: BillingClient, terms: list[tuple[int, int, int]]) -> None:
        self._billing = billing
        self._ledger = Ledger()
        self._teams = [TeamId.new() for _ in range(TEAMS)]
        self._attempts = [(AttemptId.new(), JobId.new(), *term) for term in terms]

    async def credit(self, team_index: int, amount: int, key: int) -> None:
        team = self._teams[team_index]
        try:
            self._ledger.credit(team, amount, str(key))
        except TransferConflict:
            with pytest.raises(RemoteError, match="nothing was credited now"):
                await self._billing.credit(team, amount, str(key))
        else:
            await self._billing.credit(team, amount, str(key))

    async def open(self, slots: list[tuple[int, int]]) -> None:
        answers = await self._billing.open(*(self._hold(*slot) for slot in slots))
        assert [(a.opened, a.ceiling_udgpu if a.opened else a.available_udgpu) for a in answers] == [
            self._expected_open(*slot) for slot in slots
        ]

    def _hold(self, attempt_index: int, window: int) -> pb.HoldRequest:
        attempt, job, payer, provider, rate = self._attempts[attempt_index]
        return a_hold(self._teams[payer], self._teams[provider], attempt=attempt, job=job, window=window, rate=rate)

    def _expected_open(self, attempt_index: int, window: int) -> tuple[bool, int]:
        attempt, _, payer, provider, rate = self._attempts[attempt_index]
        try:
            hold = self._ledger.open_hold(
                attempt,
                window,
                payer_team_id=self._teams[payer],
                provider_team_id=self._teams[provider],
                rate_udgpu_per_hour=rate,
            )
        except InsufficientFunds as refused:
            return False, refused.available_udgpu
        return True, hold.ceiling_udgpu

    async def close(self, closes: list[tuple[tuple[int, int], int]]) -> None:
        answers = await self._billing.close(*(closing(self._hold(*slot), used) for slot, used in closes))
        assert [(a.found, a.charged_udgpu) for a in answers] == list(self._expected_closes(closes))

    def _expected_closes(self, closes: list[tuple[tuple[int, int], int]]) -> Iterator[tuple[bool, int]]:
        for (attempt_index, window), used in closes:
            try:
                yield True, self._ledger.close_hold(self._attempts[attempt_index][0], window, used).charged_udgpu
            except KeyError:
                yield False, 0

    async def agrees(self) -> None:
        assert self._ledger.problems() == []
        for team in self._teams:
            wallet = await self._billing.wallet(team)
            assert (wallet.balance_udgpu, wallet.held_udgpu, wallet.available_udgpu, wallet.earned_udgpu) == (
                self._ledger.balance_udgpu(wallet_of(team)),
                self._ledger.pending_udgpu(wallet_of(team)),
                self._ledger.available_udgpu(wallet_of(team)),
                self._ledger.balance_udgpu(earnings_of(team)),
            )
            posted = [
                (str(t.id), t.kind.value, t.amount_udgpu if t.credit == wallet_of(team) else -t.amount_udgpu)
                for t in self._ledger.transfers
                if wallet_of(team) in (t.debit, t.credit)
            ]
            entries = (await self._billing.entries(team, limit=500)).entries
            assert [(e.transfer_id, e.kind, e.amount_udgpu) for e in reversed(entries)] == posted
        await self._billing.check_balanced()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(terms=_terms, steps=_steps)
async def test_any_sequence_of_calls_answers_as_the_domains_ledger_does(
    billing: BillingClient, terms: list[tuple[int, int, int]], steps: list[tuple[str, ...]]
):
    world = _World(billing, terms)
    for name, *arguments in steps:
        await getattr(world, name)(*arguments)
    await world.agrees()
