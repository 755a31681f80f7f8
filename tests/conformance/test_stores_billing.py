"""Billing's tables in the simulation's memory and in PostgreSQL: one suite, run on both."""

from datetime import UTC, datetime
from typing import Any, cast

import pytest
from psycopg.errors import CheckViolation

from dantegpu.domain.clock import ManualClock
from dantegpu.domain.ids import AttemptId, JobId, TeamId
from dantegpu.domain.ledger import Hold, wallet_of
from dantegpu.domain.units import MicroDgpu
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.db import Database
from dantegpu.kit.outbox import Outbox
from dantegpu.services.billing import store as billing_store
from dantegpu.services.billing.service import Billing, CloseRequest, HoldRequest
from tests.fixtures.stores import Databases

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM = TeamId.new()
PROVIDER = TeamId.new()
WINDOW_SECONDS = 300


class Bank:
    """Billing's use cases, a transaction each."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.billing = Billing(
            Outbox(db, cast(Any, None), ManualClock(T0)), ManualClock(T0), fee_basis_points=500, max_credit_udgpu=10**12
        )

    async def credit(self, amount_udgpu: int, key: str = "") -> tuple[int, int]:
        async with self.db.transaction() as tx:
            row = await self.billing.credit(tx, SERVICE, TEAM, amount_udgpu, "", key)
        return row.balance_udgpu, row.held_udgpu

    async def open(self, attempt: AttemptId, window: int = 0) -> str | None:
        hold = HoldRequest(attempt, window, JobId(attempt.uuid), TEAM, PROVIDER, 3_600_000, WINDOW_SECONDS)
        async with self.db.transaction() as tx:
            return (await self.billing.open_holds(tx, SERVICE, [hold]))[0].refusal

    async def close(self, attempt: AttemptId, used_seconds: int, window: int = 0) -> int | None:
        async with self.db.transaction() as tx:
            done = await self.billing.close_holds(tx, SERVICE, [CloseRequest(attempt, window, used_seconds)])
        return done[0].charged_udgpu

    async def state(self) -> tuple[int, int, int, int, list[str]]:
        """Balance, held, open holds, transfers, what the auditor says."""
        async with self.db.transaction() as tx:
            _, wallet = await self.billing.wallet(tx, SERVICE, TEAM)
            audit = await self.billing.check_ledger(tx, SERVICE)
        return wallet.balance_udgpu, wallet.held_udgpu, audit.open_holds, audit.transfers, audit.problems


async def test_a_window_is_held_once_and_closed_once(databases: Databases):
    bank, attempt = Bank(databases.billing), AttemptId.new()
    assert await bank.credit(400_000, "a key") == (400_000, 0)
    assert await bank.credit(400_000, "a key") == (400_000, 0)
    assert [await bank.open(attempt), await bank.open(attempt)] == [None, None]
    assert await bank.state() == (400_000, 300_000, 1, 1, [])
    assert await bank.open(AttemptId.new()) == "no-funds"
    assert [await bank.close(attempt, 100), await bank.close(attempt, 300)] == [100_000, 100_000]
    assert await bank.close(AttemptId.new(), 1) is None
    assert await bank.state() == (300_000, 0, 0, 3, [])


async def test_what_was_paid_is_listed_newest_first(databases: Databases):
    bank, attempt = Bank(databases.billing), AttemptId.new()
    await bank.credit(1_000_000)
    for window, used_seconds in enumerate((300, 0)):
        await bank.open(attempt, window)
        await bank.close(attempt, used_seconds, window)
    await bank.open(attempt, 2)
    async with databases.billing.transaction() as tx:
        entries = await bank.billing.entries(tx, SERVICE, TEAM, 10, "")
        receipt = await bank.billing.receipt(tx, SERVICE, JobId(attempt.uuid))
        open_holds = await bank.billing.list_open_holds(tx, SERVICE, 0, 10, "")
    assert [(entry.kind, entry.amount_udgpu, entry.balance_after_udgpu) for entry in entries.items] == [
        ("fee", -15_000, 700_000), ("usage", -285_000, 715_000), ("credit", 1_000_000, 1_000_000),
    ]  # fmt: skip
    lines = sorted((line.window_index, line.state, line.charged_udgpu, line.total_udgpu) for line in receipt)
    assert lines == [(0, "posted", 300_000, 300_000), (1, "voided", 0, 300_000), (2, "open", None, 300_000)]
    assert [(hold.attempt_id, hold.window_index) for hold in open_holds.items] == [(attempt.uuid, 2)]


async def test_a_wallet_is_never_overdrawn_whatever_the_service_thinks(databases: Databases):
    bank, attempt = Bank(databases.billing), AttemptId.new()
    await bank.credit(100)
    hold = Hold(attempt, 0, TEAM, PROVIDER, MicroDgpu(3600), MicroDgpu(300), 500)
    window = billing_store.HeldWindow(hold, JobId(attempt.uuid), WINDOW_SECONDS, simulated=False)

    async def overdraw() -> None:
        async with databases.billing.transaction() as tx:
            await billing_store.lock_accounts(tx, [wallet_of(TEAM)])
            await billing_store.insert_holds(tx, [window], T0)

    with pytest.raises(CheckViolation):
        await overdraw()
    assert await bank.state() == (100, 0, 0, 1, [])
