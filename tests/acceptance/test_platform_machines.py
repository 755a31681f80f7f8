"""Machines that may not take everybody's jobs: simulated GPUs, and no sandbox. And a store with a full disk."""

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from dantegpu.contracts.rest.jobs import Job
from dantegpu.sdk import ApiError, Dante
from tests.fixtures.cluster import wait_until
from tests.fixtures.folders import quick_folder
from tests.fixtures.people import new_person
from tests.fixtures.platform import UpPlatform, json_of, start_up, stop_up

TOKEN_SECONDS = 10


@contextlib.contextmanager
def _up(settings: str, *arguments: str, env: dict[str, str] | None = None) -> Generator[UpPlatform]:
    home = quick_folder("dante-")
    config = home / "settings.toml"
    config.write_text(settings)
    platform = start_up(home, "--config", str(config), *arguments, env=env)
    yield platform
    stop_up(platform)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def simulating() -> Generator[UpPlatform]:
    """This machine says that it has two GPUs, and access tokens live for seconds."""
    settings = f"[auth-service]\naccess_token_seconds = {TOKEN_SECONDS}\n"
    with _up(settings, "--simulate-gpus", "RTX 4090:2") as platform:
        yield platform


@pytest.fixture(scope="module")
def unsandboxed() -> Generator[UpPlatform]:
    """A machine without bubblewrap, and a store that takes nothing more."""
    env = {"DANTE_DAEMON_SANDBOX": "none"}
    with _up("[storage-service]\nfree_bytes_min = 1000000000000000\n", env=env) as platform:
        yield platform


def waits_for(client: Dante, job: Job, reason: str) -> Job:
    return wait_until(
        lambda: found if (found := client.jobs.get(job.id)).reason == reason else None, f"{job.id} waits for {reason}"
    )


@pytest.mark.needs("bubblewrap")
def test_simulated_gpus_run_their_own_teams_jobs_and_are_marked_everywhere(simulating: UpPlatform):
    said = simulating.dante("run", "--no-files", "--gpu", "RTX 4090:2", "--", "sh", "-c", "echo $DANTE_SIMULATED_GPUS")
    assert (said.returncode, "RTX 4090" in said.stdout) == (0, True)
    with simulating.operator as operator:
        job = operator.jobs.get(operator.jobs.list().jobs[0].id)
        assert [attempt.simulated for attempt in job.attempts] == [True]
        (machine,) = operator.machines.list().machines
        assert machine.simulated
        assert [device.simulated for device in machine.devices] == [True, True]
        assert [offer.machine.simulated for offer in operator.offers.list().offers] == [True]
    for command in (["show", job.id], ["offers"], ["provider", "list"], ["status"]):
        assert "simulated" in simulating.dante(*command).stdout, command


@pytest.mark.needs("bubblewrap")
def test_a_strangers_job_waits_because_the_gpus_are_simulated(simulating: UpPlatform):
    person = new_person(simulating)
    with person.client as client:
        job = client.jobs.submit({"command": ["true"], "resources": {"gpu": "RTX 4090"}})
        waits_for(client, job, "restricted")
        why = simulating.dante("why", job.id, env={"DANTE_API_KEY": person.secret}).stdout
        assert "simulated GPUs" in why
        assert client.jobs.stop(job.id).state == "CANCELLED"


@pytest.mark.needs("bubblewrap")
def test_an_expired_token_is_refused_and_the_sdk_renews_it_unseen(simulating: UpPlatform):
    person = new_person(simulating)
    with Dante(simulating.running.url) as session:
        first = session.auth.login(person.email, person.password).access_token

        def answer_to_the_first_token() -> ApiError | None:
            with Dante(simulating.running.url, api_key=first) as client:
                try:
                    client.auth.me()
                except ApiError as error:
                    return error
            return None

        refused = wait_until(answer_to_the_first_token, "the token has expired", seconds=3 * TOKEN_SECONDS)
        assert (refused.status, "expired" in str(refused)) == (401, True)
        assert session.auth.me().user.email == person.email


def test_a_machine_without_a_sandbox_says_so_and_runs_its_own_teams_jobs(unsandboxed: UpPlatform):
    said = unsandboxed.home / "up.log"
    wait_until(lambda: "Ctrl-C stops" in said.read_text(), "dante up has said all")
    assert "runs only your own team's, unsandboxed: `dante doctor`" in said.read_text()
    done = unsandboxed.dante("run", "--no-files", "--", "sh", "-c", "echo open")
    assert (done.returncode, done.stdout) == (0, "open\n")
    with unsandboxed.operator as operator:
        job = operator.jobs.get(operator.jobs.list().jobs[0].id)
        assert [attempt.sandbox for attempt in job.attempts] == ["none"]
    assert json_of(unsandboxed.dante("status", "--json"))["provider"]["sandbox"] == "none"


def test_a_strangers_job_waits_because_the_machine_has_no_sandbox(unsandboxed: UpPlatform):
    person = new_person(unsandboxed)
    with person.client as client:
        job = client.jobs.submit({"command": ["true"]})
        waits_for(client, job, "restricted")
        assert "no sandbox" in unsandboxed.dante("why", job.id, env={"DANTE_API_KEY": person.secret}).stdout
        client.jobs.stop(job.id)


def test_a_full_store_refuses_inputs_in_one_line_and_no_job_is_made(unsandboxed: UpPlatform, tmp_path: Path):
    person = new_person(unsandboxed)
    (tmp_path / "train.py").write_text("print(1)")
    done = unsandboxed.dante(
        "run", "--workdir", str(tmp_path), "--", "python3", "train.py", env={"DANTE_API_KEY": person.secret}
    )
    assert done.returncode == 1
    assert "storage refused the upload: the platform's disk is full" in done.stderr
    assert '"type"' not in done.stderr
    with person.client as client:
        assert client.jobs.list().jobs == []


def test_results_that_the_full_store_refuses_are_not_half_visible_and_cost_nothing(unsandboxed: UpPlatform):
    spec = {
        "command": ["sh", "-c", "echo 1 > $DANTE_OUTPUT/a; echo 2 > $DANTE_OUTPUT/b"],
        "retry": {"duration": "1s"},
    }
    with unsandboxed.operator as operator:
        job = operator.jobs.submit(spec)
        done = operator.jobs.wait(job.id, settled=True, timeout_seconds=60)
        assert (done.state, done.outcome, done.cost_udgpu) == ("FAILED", "provider_fault", 0)
        assert "could not be uploaded: the store answered 507" in done.message
        assert operator.jobs.results(job.id).files == []
