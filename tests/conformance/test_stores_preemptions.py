"""Spot work, claims and checkpoints: the simulation's tables in memory do what PostgreSQL's do."""

from datetime import datetime
from typing import Any
from uuid import UUID

import pytest

from dantegpu.domain.ids import DeviceId, MachineId
from dantegpu.kit.db import Database
from dantegpu.services.scheduler import store, store_preemptions
from dantegpu.services.scheduler.store_preemptions import ClaimRow
from tests.conformance.test_stores import a_change, a_job, an_attempt, at, open_attempts
from tests.fixtures.stores import Databases


@pytest.fixture
def db(databases: Databases) -> Database:
    return databases.scheduler


def saved(attempt: UUID, number: int, sha256: str | None = "a" * 64, slot: int = 0) -> dict[str, Any]:
    return {
        "id": attempt, "checkpoint_number": number, "checkpoint_sha256": sha256, "checkpoint_size_bytes": number,
        "checkpoint_slot": slot,
    }  # fmt: skip


async def an_ended(db: Database, job: Any, epoch: int, *rows: dict[str, Any], nodes: int = 1) -> list[UUID]:
    """An epoch whose nodes have told these checkpoints (by rank; empty: none) and ended."""
    async with db.transaction() as tx:
        attempts = [
            an_attempt(job, epoch, MachineId.new(), nodes=nodes, node_rank=rank, spot=True, saves=True)
            for rank in range(nodes)
        ]
        await open_attempts(tx, *attempts)
        told = [row | {"id": attempt["id"]} for row, attempt in zip(rows, attempts, strict=True) if row]
        await store_preemptions.save_checkpoints(tx, told, at(1))
        ends = [a_change(attempt["id"], state="FAILED", ended_at=at(2)) for attempt in attempts]
        await store.save_attempts(tx, ends)
    return [attempt["id"] for attempt in attempts]


async def test_only_spot_work_that_was_not_told_to_stop_can_give_way(db: Database):
    async with db.transaction() as tx:
        jobs = [await a_job(tx) for _ in range(4)]
        attempts = [an_attempt(job, spot=number > 0, saves=number == 1) for number, job in enumerate(jobs)]
        await open_attempts(tx, *attempts)
        runs = a_change(attempts[1]["id"], state="RUNNING", running_at=at(5))
        stops = a_change(attempts[2]["id"], state="STOPPING", stop_requested_at=at(6))
        await store.save_attempts(tx, [runs, stops])
        await store_preemptions.save_checkpoints(tx, [saved(attempts[1]["id"], 1)], at(7))
        rows = {row.attempt_id: row for row in await store_preemptions.spot_attempts(tx, 10)}
        assert rows.keys() == {attempts[1]["id"], attempts[3]["id"]}
        one, other = rows[attempts[1]["id"]], rows[attempts[3]["id"]]
        assert (one.saves, one.began_at, one.saved_at, one.epoch) == (True, at(5), at(7), 1)
        assert (other.saves, other.began_at, other.saved_at) == (False, at(0), at(0))
        assert len(await store_preemptions.spot_attempts(tx, 1)) == 1
        stopping = {row.attempt_id for row in await store.live_leases(tx) if row.stopping}
        assert stopping == {attempts[2]["id"]}


async def test_claims_are_kept_by_age_until_they_are_deleted(db: Database):
    async with db.transaction() as tx:
        jobs = [await a_job(tx) for _ in range(2)]

        def a_claim(job: Any, rank: int) -> ClaimRow:
            return ClaimRow(job.id, rank, MachineId.new().uuid, [DeviceId.new().uuid for _ in range(rank)])

        late, early = [a_claim(jobs[0], 0)], [a_claim(jobs[1], 0), a_claim(jobs[1], 1)]
        await store_preemptions.insert_claims(tx, late, at(9))
        await store_preemptions.insert_claims(tx, early, at(3))
        assert list((await store_preemptions.claims(tx)).items()) == [(jobs[1].id, early), (jobs[0].id, late)]
        await store_preemptions.delete_claims(tx, [jobs[1].id])
        assert list(await store_preemptions.claims(tx)) == [jobs[0].id]


async def test_a_checkpoint_only_goes_forward_and_not_after_the_end(db: Database):
    async with db.transaction() as tx:
        job = await a_job(tx)
        attempt = an_attempt(job, spot=True)
        await open_attempts(tx, attempt)

    async def told(number: int, when: datetime, sha256: str) -> tuple[int, str | None, datetime | None]:
        async with db.transaction() as tx:
            await store_preemptions.save_checkpoints(tx, [saved(attempt["id"], number, sha256, number % 2)], when)
            row = (await store.attempts_by_id(tx, [attempt["id"]]))[attempt["id"]]
            return row.checkpoint_number, row.checkpoint_sha256, row.checkpointed_at

    assert await told(2, at(1), "b" * 64) == (2, "b" * 64, at(1))
    assert await told(2, at(2), "c" * 64) == (2, "b" * 64, at(1))
    assert await told(1, at(3), "c" * 64) == (2, "b" * 64, at(1))
    async with db.transaction() as tx:
        await store.save_attempts(tx, [a_change(attempt["id"], state="FAILED", ended_at=at(4))])
    assert await told(3, at(5), "c" * 64) == (2, "b" * 64, at(1))


async def test_an_attempt_begins_with_the_last_epoch_of_which_every_node_has_told(db: Database):
    async with db.transaction() as tx:
        job, gang = await a_job(tx), await a_job(tx)
    nothing: dict[str, Any] = {}
    unknown = MachineId.new().uuid
    await an_ended(db, job, 1, saved(unknown, 4, "a" * 64))
    await an_ended(db, job, 2, saved(unknown, 1, None))
    await an_ended(db, job, 3, nothing)
    (fourth,) = await an_ended(db, job, 4, nothing)
    await an_ended(db, gang, 1, saved(unknown, 1, "b" * 64), saved(unknown, 1, None), nodes=2)
    await an_ended(db, gang, 2, saved(unknown, 1, "c" * 64), nothing, nodes=2)
    first, second = await an_ended(db, gang, 3, nothing, nothing, nodes=2)
    async with db.transaction() as tx:
        found = await store_preemptions.checkpoints_before(tx, [fourth, first, second])
    assert {attempt: (row.epoch, row.node_rank, row.sha256[0]) for attempt, row in found.items()} == {
        fourth: (1, 0, "a"),
        first: (1, 0, "b"),
        second: (1, 0, "b"),
    }
