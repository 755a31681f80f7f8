"""What nobody needs any more: the simulation's tables in memory do what PostgreSQL's do."""

from uuid import UUID

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.kit.db import Database
from dantegpu.services.scheduler import store, store_upkeep
from tests.conformance.test_stores import a_job, at
from tests.conformance.test_stores_preemptions import an_ended, saved
from tests.fixtures.stores import Databases

NOBODY = UUID(int=0)


@pytest.fixture
def db(databases: Databases) -> Database:
    return databases.scheduler


async def stale(db: Database, now: float) -> set[UUID]:
    async with db.transaction() as tx:
        return {row.id for row in await store_upkeep.stale_checkpoints(tx, before=at(now), limit=100)}


async def test_checkpoints_are_stale_once_every_node_of_a_later_epoch_has_saved_or_the_job_is_over(db: Database):
    async with db.transaction() as tx:
        job = await a_job(tx)
    first = await an_ended(db, job, 1, saved(NOBODY, 1), saved(NOBODY, 1), nodes=2)
    assert await stale(db, 9) == set()
    half = await an_ended(db, job, 2, saved(NOBODY, 1), {}, nodes=2)
    assert await stale(db, 9) == set()
    last = await an_ended(db, job, 3, saved(NOBODY, 1), saved(NOBODY, 1, None), nodes=2)
    assert await stale(db, 1) == set()
    assert await stale(db, 9) == {*first, *half}
    async with db.transaction() as tx:
        await store_upkeep.checkpoints_deleted(tx, first)
    assert await stale(db, 9) == set(half)
    async with db.transaction() as tx:
        row = (await store.jobs_by_id(tx, [job.id]))[job.id]
        ended = {"id": job.id, "state": "FAILED", "outcome": "failed", "ended_at": at(5), "reason": None}
        names = (
            "epoch", "attempts_used", "reason_detail", "report_seq", "stop_by", "message", "results_epoch", "event_seq",
        )  # fmt: skip
        more = {name: getattr(row, name) for name in names} | {"avoided_machines": list[str]()}
        await store.save_jobs(tx, [ended | more])
    assert await stale(db, 4) == set(half)
    assert await stale(db, 9) == {*half, *last}


async def test_only_jobs_that_are_over_are_asked_for_their_passwords(db: Database):
    spec = jobs_pb2.JobSpec(image="acme/x", registry_auth=jobs_pb2.RegistryAuth(username="me", password="hunter2"))
    async with db.transaction() as tx:
        jobs = [await a_job(tx, spec=spec) for _ in range(2)]
        plain = await a_job(tx)
        await store.mark_jobs_settled(tx, [jobs[0].id, plain.id])
        found = await store_upkeep.specs_with_auth(tx, after=NOBODY, limit=9)
        assert [row.id for row in found] == [jobs[0].id]
        await store_upkeep.replace_specs(tx, {jobs[0].id: b"", jobs[1].id: b""})
        rows = await store.jobs_by_id(tx, [job.id for job in jobs])
        assert [rows[job.id].spec for job in jobs] == [b"", spec.SerializeToString()]
        assert await store_upkeep.specs_with_auth(tx, after=NOBODY, limit=9) == []
