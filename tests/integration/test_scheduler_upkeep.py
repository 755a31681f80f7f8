"""What nobody needs any more is deleted: old checkpoints, and the passwords of ended jobs' registries."""

from pathlib import Path

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.domain.ids import JobId
from dantegpu.services.scheduler.service.upkeep import UPLOADS_END_SECONDS
from tests.fixtures.scheduler import ENDED, World, a_spec, until
from tests.integration.test_scheduler_preemption import keep, saves


@pytest.fixture
async def world(quiet_world: World) -> World:
    await quiet_world.start(upkeep_seconds=0.05)
    await quiet_world.credit()
    return quiet_world


def kept(folder: Path) -> set[str]:
    """What lies below checkpoints/ in the platform's storage, as epoch/slot."""
    return {f"{path.parent.name}/{path.name}" for path in folder.glob("objects/**/checkpoints/*/*/*") if path.is_file()}


async def test_checkpoints_go_when_a_later_attempt_has_saved_and_the_last_ones_with_the_job(
    world: World, short_dir: Path
) -> None:
    machine = await world.machine()
    job_id = await world.submit_one(a_spec(checkpoint=saves(interval_seconds=60)))
    for epoch in (1, 2):
        attempt = await machine.given(job_id, epoch=epoch)
        await machine.runs(attempt)
        await world.reached(job_id, jobs_pb2.RUNNING)
        saved = await keep(machine, attempt, b"epoch %d" % epoch)
        await machine.ends(attempt, jobs_pb2.FAILED, checkpoint=saved, outcome=jobs_pb2.OUTCOME_PREEMPTED)
        await world.when(job_id, lambda job: job.state == jobs_pb2.QUEUED)
        world.clock.advance(5)
    await machine.given(job_id, epoch=3)
    # At once nothing is deleted: an upload could still be on its way.
    assert kept(short_dir) == {"1/0", "2/0"}
    world.clock.advance(UPLOADS_END_SECONDS + 1)
    await until(lambda: _is(short_dir, {"2/0"}))
    await world.stop_job(job_id)
    # Its machine says nothing any more.
    world.clock.advance(UPLOADS_END_SECONDS + 1)
    await world.reached(job_id, *ENDED)
    world.clock.advance(UPLOADS_END_SECONDS + 1)
    await until(lambda: _has_no_folders(short_dir))
    assert (await world.get(job_id)).attempts[1].resumed_epoch == 1


async def _is(folder: Path, expected: set[str]) -> bool:
    return kept(folder) == expected


async def _has_no_folders(folder: Path) -> bool:
    return not list(folder.glob("objects/**/checkpoints/*"))


async def test_the_password_of_a_registry_is_gone_from_the_database_once_the_job_is_over(world: World) -> None:
    machine = await world.machine(executors=["process", "container"])
    auth = jobs_pb2.RegistryAuth(username="me", password="hunter2-in-a-row")
    job_id = await world.submit_one(a_spec(image="acme/train", registry_auth=auth))
    attempt = await machine.given(job_id)
    assert attempt.spec.registry_auth.password == "hunter2-in-a-row"

    async def written() -> bool:
        rows = await world.sql("SELECT spec FROM jobs WHERE id = %(id)s", id=JobId.parse(job_id).uuid)
        return b"hunter2-in-a-row" in bytes(rows[0][0])

    assert await written()
    await machine.ends(attempt)
    await world.settled(job_id)

    async def gone() -> bool:
        return not await written()

    await until(gone)
    assert (await world.get(job_id)).spec.image == "acme/train"
    tables = await world.sql("SELECT table_name FROM information_schema.tables WHERE table_schema = 'scheduler'")
    for (table,) in tables:
        rows = await world.sql(f"SELECT t::text FROM {table} t")
        assert not [text for (text,) in rows if "hunter2" in text or b"hunter2".hex() in text]
