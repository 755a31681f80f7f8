"""A spot job on a real platform gives way to an on-demand job, goes on where it was, and pays for what it used."""

import math
from pathlib import Path

import pytest

from dantegpu.contracts.rest.jobs import Job
from dantegpu.sdk import Dante
from tests.fixtures.cluster import wait_until
from tests.fixtures.platform import UpPlatform, json_of

pytestmark = pytest.mark.needs("bubblewrap")

NUMBERS = 60
COUNTING = f"""
import os, signal, sys, time
path = os.environ["DANTE_CHECKPOINT"]
number = int(open(path).read()) if os.path.exists(path) else 0
def save(*_):
    open(path, "w").write(str(number))
    sys.exit()
signal.signal(signal.SIGTERM, save)
while number < {NUMBERS}:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print(number, flush=True)
    number += 1
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(0.1)
"""


def log_of(client: Dante, job_id: str, epoch: int = 0) -> str:
    return b"".join(chunk.data for chunk in client.jobs.logs(job_id, epoch=epoch)).decode()


def a_running_job(platform: UpPlatform, client: Dante, folder: Path, cores: str) -> str:
    """One that `dante run` started, after it has counted for a while."""
    (folder / "count.py").write_text(COUNTING)
    done = platform.dante(
        "run", "-d", "--spot", "--checkpoint", "number", "--cpu", cores, "--", "python", "count.py", cwd=folder
    )
    job_id = done.stdout.strip()
    wait_until(lambda: "3\n" in log_of(client, job_id), "the job counts")
    return job_id


def is_right(client: Dante, job: Job) -> None:
    """Each attempt is charged for its seconds at its own rate, and the receipt says the same."""
    for attempt in job.attempts:
        assert attempt.cost_udgpu == math.ceil(attempt.rate_udgpu_per_hour * attempt.billed_seconds / 3600)
    assert client.jobs.receipt(job.id).total_udgpu == job.cost_udgpu == sum(a.cost_udgpu for a in job.attempts)


def test_a_spot_job_gives_way_goes_on_from_its_checkpoint_and_counts_right(platform: UpPlatform, tmp_path: Path):
    with platform.operator as client:
        cores = str(client.machines.list().machines[0].cpu_milli / 1000)
        spot = a_running_job(platform, client, tmp_path, cores)
        urgent = platform.dante("run", "--no-files", "--cpu", cores, "--json", "--", "echo", "urgent")
        assert json_of(urgent)["job"]["state"] == "SUCCEEDED"
        done = client.jobs.wait(spot, settled=True, timeout_seconds=90)
        assert (done.state, done.exit_code) == ("SUCCEEDED", 0)
        job = client.jobs.get(spot)
        assert [(a.outcome, a.spot, a.resumed_epoch) for a in job.attempts] == [
            ("preempted", True, None),
            ("succeeded", True, 1),
        ]
        counted = log_of(client, spot, epoch=1) + log_of(client, spot, epoch=2)
        assert counted == "".join(f"{number}\n" for number in range(NUMBERS))
        other = client.jobs.get(json_of(urgent)["job"]["id"])
        assert {a.rate_udgpu_per_hour for a in job.attempts} == {math.ceil(other.attempts[0].rate_udgpu_per_hour * 0.7)}
        for each in (job, other):
            is_right(client, each)
        shown = platform.dante("show", spot).stdout
        assert "went on from attempt 1; spot" in shown
        events = [event.message for event in client.jobs.events(spot)]
        assert "preempted for an on-demand job" in events
        ledger = client.admin.ledger()
    assert (ledger.balanced, ledger.problems) == (True, [])
