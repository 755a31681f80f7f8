"""The whole way of a job with every service in a process of its own, and with each of them killed in the middle."""

import asyncio
import shutil
from pathlib import Path

import pytest

from dantegpu.apps.targets import TARGETS
from dantegpu.contracts.rest.jobs import Job
from dantegpu.sdk import Dante
from tests.fixtures.cluster import Cluster, wait_until

pytestmark = pytest.mark.needs("bubblewrap")

LINES = 40
SCRIPT = f"""
import os, time
for number in range({LINES}):
    print(number, flush=True)
    time.sleep(0.1)
open(os.path.join(os.environ["DANTE_OUTPUT"], "answer.txt"), "w").write("42")
"""


def submit(client: Dante, script: str = SCRIPT) -> Job:
    return client.jobs.submit({"command": ["python", "-c", script], "resources": {"cpu": 0.1, "memory": "128MB"}})


def wait_for_state(client: Dante, job: Job, state: str) -> Job:
    return wait_until(
        lambda: found if (found := client.jobs.get(job.id)).state == state else None, f"{job.id} is {state}"
    )


def log_of(client: Dante, job: Job) -> str:
    return b"".join(chunk.data for chunk in client.jobs.logs(job.id, follow=True)).decode()


def assert_ended_once_and_billed_once(cluster: Cluster, client: Dante, job: Job, tmp_path: Path) -> Job:
    """One attempt, the whole log in order, the results, one bill, a balanced ledger."""
    done = client.jobs.wait(job.id, settled=True, timeout_seconds=90)
    assert (done.state, done.exit_code) == ("SUCCEEDED", 0)
    done = client.jobs.get(job.id)
    assert [attempt.outcome for attempt in done.attempts] == ["succeeded"]
    assert log_of(client, job) == "".join(f"{number}\n" for number in range(LINES))
    client.jobs.download(job.id, tmp_path / "results")
    assert (tmp_path / "results" / "answer.txt").read_text() == "42"
    receipt = client.jobs.receipt(job.id)
    assert receipt.total_udgpu == done.cost_udgpu > 0
    assert len({(line.attempt_id, line.window) for line in receipt.lines}) == len(receipt.lines)
    used = [entry for entry in client.wallet.entries().entries if entry.job_id == job.id]
    assert sum(entry.amount_udgpu for entry in used) == -done.cost_udgpu
    ledger = cluster.operator.admin.ledger()
    assert (ledger.balanced, ledger.sum_udgpu, ledger.problems) == (True, 0, [])
    return done


def test_a_job_goes_through_every_service_in_a_process_of_its_own(cluster: Cluster, tmp_path: Path):
    with cluster.new_consumer() as client:
        job = submit(client)
        done = assert_ended_once_and_billed_once(cluster, client, job, tmp_path)
        assert done.attempts[0].sandbox == "bubblewrap"
        seen = [event.state for event in client.jobs.events(job.id)]
        assert seen == sorted(seen, key=["QUEUED", "PLACED", "STARTING", "RUNNING", "SUCCEEDED"].index)


@pytest.mark.parametrize("victim", [*TARGETS, "provider"])
def test_kill_9_in_mid_job_changes_nothing_for_the_job(cluster: Cluster, tmp_path: Path, victim: str):
    with cluster.new_consumer() as client:
        job = submit(client)
        wait_for_state(client, job, "RUNNING")
        cluster.kill(victim)
        cluster.start(victim)
        if victim != "provider":
            cluster.wait_ready(victim)
        assert_ended_once_and_billed_once(cluster, client, job, tmp_path)


def test_nats_with_its_whole_store_deleted_in_mid_job_loses_nothing(cluster: Cluster, tmp_path: Path):
    with cluster.new_consumer() as client:
        running = submit(client)
        wait_for_state(client, running, "RUNNING")
        asyncio.run(cluster.nats.stop())
        shutil.rmtree(cluster.nats.store_path)
        queued = submit(client)
        asyncio.run(cluster.nats.start())
        assert_ended_once_and_billed_once(cluster, client, running, tmp_path / "running")
        assert_ended_once_and_billed_once(cluster, client, queued, tmp_path / "queued")


def test_postgresql_killed_in_mid_job_loses_nothing(cluster: Cluster, tmp_path: Path):
    with cluster.new_consumer() as client:
        job = submit(client)
        wait_for_state(client, job, "RUNNING")
        asyncio.run(cluster.postgres.stop())
        asyncio.run(cluster.postgres.start())
        assert_ended_once_and_billed_once(cluster, client, job, tmp_path)
