"""`dante up` through its life: stopped, killed and started again, with a job running all the while."""

import contextlib
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import psutil
import pytest

from dantegpu.apps.platform import Running
from dantegpu.contracts.rest.jobs import Job
from dantegpu.sdk import Dante
from tests.fixtures.cluster import wait_until
from tests.fixtures.platform import UpPlatform, json_of, run_dante, start_up, stop_up

pytestmark = pytest.mark.needs("bubblewrap")

Up = Callable[..., UpPlatform]

LINES = 60
COUNTING = f"""
import os, time
for number in range({LINES}):
    print(number, flush=True)
    time.sleep(0.1)
open(os.path.join(os.environ["DANTE_OUTPUT"], "answer.txt"), "w").write("42")
"""


@pytest.fixture
def up(dante_home: Path) -> Generator[Up]:
    """Start `dante up` on one and the same folder; what still runs at the end is stopped."""
    started: list[UpPlatform] = []

    def start(*arguments: str) -> UpPlatform:
        started.append(start_up(dante_home, *arguments))
        return started[-1]

    yield start
    for platform in started:
        with contextlib.suppress(ProcessLookupError):
            stop_up(platform)
    run_dante("down", home=dante_home)


def submit(client: Dante, script: str = COUNTING) -> Job:
    return client.jobs.submit({"command": ["python", "-c", script], "resources": {"cpu": 0.1, "memory": "128MB"}})


def a_running_job(client: Dante, script: str = COUNTING) -> Job:
    job = submit(client, script)
    wait_until(lambda: client.jobs.get(job.id).state == "RUNNING", "the job runs")
    wait_until(lambda: log_of(client, job), "the job has written something")
    return job


def log_of(client: Dante, job: Job) -> str:
    return b"".join(chunk.data for chunk in client.jobs.logs(job.id)).decode()


def family(platform: UpPlatform) -> list[psutil.Process]:
    """Every process of a platform, with those of its jobs."""
    process = psutil.Process(platform.process.pid)
    return [process, *process.children(recursive=True)]


def run_folder(platform: UpPlatform) -> Path:
    """Where its sockets and the services' credentials lie."""
    return (platform.home / "platform" / "run").resolve()


def ended_well(client: Dante, job: Job) -> Job:
    done = client.jobs.wait(job.id, settled=True, timeout_seconds=90)
    assert (done.state, done.exit_code) == ("SUCCEEDED", 0)
    return client.jobs.get(job.id)


def assert_ledger_balanced(platform: UpPlatform) -> None:
    with platform.operator as operator:
        ledger = operator.admin.ledger()
    assert (ledger.balanced, ledger.open_holds, ledger.problems) == (True, 0, [])


def test_a_second_up_finds_jobs_wallets_results_and_logs_again(up: Up, dante_home: Path, tmp_path: Path):
    first = up()
    first.dante("run", "--no-files", "--", "sh", "-c", "echo hello; echo 42 > $DANTE_OUTPUT/answer.txt")
    job = json_of(first.dante("ps", "--all", "--json"))["jobs"][0]
    with first.operator as operator:
        operator.jobs.wait(job["id"], settled=True)
        wallet, entries = operator.wallet.get(), operator.wallet.entries()
    assert run_dante("down", home=dante_home).stdout == "stopped\n"
    second = up()
    with second.operator as operator:
        assert operator.jobs.get(job["id"]).state == "SUCCEEDED"
        assert (operator.wallet.get(), operator.wallet.entries()) == (wallet, entries)
        assert [machine.id for machine in operator.machines.list().machines] == [
            attempt.machine_id for attempt in operator.jobs.get(job["id"]).attempts
        ]
    assert second.dante("logs", job["id"]).stdout == "hello\n"
    assert second.dante("results", job["id"], "-o", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "answer.txt").read_text() == "42\n"


def test_ctrl_c_stops_everything_and_leaves_no_process_and_no_socket(up: Up, dante_home: Path):
    platform = up()
    with platform.operator as operator:
        submit(operator, "import time; print('begun', flush=True); time.sleep(600)")
        wait_until(lambda: operator.jobs.list().jobs[0].state == "RUNNING", "the job runs")
    processes, sockets = family(platform), run_folder(platform)
    assert len(processes) > 5
    platform.process.send_signal(signal.SIGINT)
    assert platform.process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert not sockets.exists()
    left = {path.name for path in (dante_home / "platform").iterdir()}
    assert not left & {"run", "runtime.json"}
    assert (dante_home / "up.log").read_text().endswith("stopped; everything is kept for the next `dante up`\n")
    status = run_dante("status", home=dante_home)
    assert (status.returncode, status.stdout.startswith("not running")) == (1, True)
    assert run_dante("down", home=dante_home).stdout == "not running\n"


def test_a_job_that_runs_at_down_is_handed_back_unbilled_and_ends_with_the_next_up(up: Up, dante_home: Path):
    first = up()
    with first.operator as operator:
        job = a_running_job(operator)
    run_dante("down", home=dante_home)
    second = up()
    with second.operator as operator:
        done = ended_well(operator, job)
        outcomes = [(attempt.outcome, attempt.epoch) for attempt in done.attempts]
        assert outcomes == [("provider_fault", 1), ("succeeded", 2)]
        assert "stopped the daemon" in done.attempts[0].message
        assert done.attempts[0].cost_udgpu == 0 < done.attempts[1].cost_udgpu == done.cost_udgpu
        assert log_of(operator, job).endswith(f"\n{LINES - 1}\n")
    assert_ledger_balanced(second)


def test_a_job_outlives_kill_9_of_up_and_ends_once_with_the_next_one(up: Up):
    first = up()
    with first.operator as operator:
        job = a_running_job(operator)
    sockets, daemon = run_folder(first), psutil.Process(first.running.provider_pid)
    first.process.kill()
    first.process.wait()
    assert daemon.is_running()
    second = up()
    assert not sockets.exists()
    assert not daemon.is_running()
    with second.operator as operator:
        done = ended_well(operator, job)
        assert [attempt.outcome for attempt in done.attempts] == ["succeeded"]
        assert log_of(operator, job) == "".join(f"{number}\n" for number in range(LINES))
    assert_ledger_balanced(second)


def test_down_ends_the_daemon_that_a_killed_platform_left_behind(up: Up, dante_home: Path):
    platform = up()
    daemon = psutil.Process(platform.running.provider_pid)
    platform.process.kill()
    platform.process.wait()
    assert daemon.is_running()
    assert "ended the provider daemon" in run_dante("down", home=dante_home).stdout
    assert not daemon.is_running()
    assert run_dante("reset", "--yes", home=dante_home).stdout.startswith("deleted")
    assert not (dante_home / "platform").exists()


def test_a_daemon_and_servers_that_die_are_started_again_under_a_running_job(up: Up, dante_home: Path):
    platform = up()
    with platform.operator as operator:
        job = a_running_job(operator)
        for process in family(platform):
            if process.name() in ("nats-server", "postgres") and process.ppid() == platform.process.pid:
                process.kill()
        assert platform.running.provider_pid
        psutil.Process(platform.running.provider_pid).kill()

        def another_daemon() -> bool:
            running = Running.read(dante_home / "platform")
            return running is not None and running.provider_pid not in (None, platform.running.provider_pid)

        wait_until(another_daemon, "the daemon is started again")
        assert [attempt.outcome for attempt in ended_well(operator, job).attempts] == ["succeeded"]
        wait_until(
            lambda: run_dante("status", home=dante_home).returncode == 0, "dante status says that every part answers"
        )
    assert_ledger_balanced(platform)


def test_status_tells_where_everything_is_and_what_the_machine_offers(platform: UpPlatform):
    said = platform.dante("status")
    assert said.returncode == 0
    assert f"{platform.running.url}/v1" in said.stdout
    assert "idle" in said.stdout or "busy" in said.stdout
    assert "sandbox bubblewrap" in said.stdout
    told = json_of(platform.dante("status", "--json"))
    assert (told["running"], told["problems"]) == (True, {})
    assert told["provider"]["sandbox"] == "bubblewrap"
    wait_until(
        lambda: f"\n  provider  {told['provider']['hostname']}: " in (platform.home / "up.log").read_text(),
        "dante up has told of the machine",
    )
