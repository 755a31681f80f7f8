"""The daemon of a Slurm cluster against a real one: what Slurm does, and what the platform hears of it."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon import agent
from dantegpu.daemon.enrol import EnrolmentRefused
from dantegpu.daemon.executors.base import ExitStatus, SandboxFailed, StopReason
from dantegpu.daemon.executors.processes import processes_with_env
from dantegpu.daemon.leases import LEASES, LeaseFile, boottime
from tests.fixtures.executors import a_shell_job
from tests.fixtures.machines import KilledDaemon, MachinePlatform, RunningDaemon, daemon_settings, until
from tests.fixtures.slurm import GPU_TYPE, NODES, SlurmServer, slurm_executor

pytestmark = pytest.mark.needs("slurm", "bubblewrap")

NODE = NODES[0]
FOREVER = ("sh", "-c", "echo ready; exec sleep 600")


def cluster_options(server: SlurmServer, state: Path) -> dict[str, Any]:
    # What the node's trial job has found out for an earlier test.
    if (known := server.shared / "nodes").is_dir():
        shutil.copytree(known, state / "slurm" / "nodes")
    return {
        "executor": "slurm", "slurm_conf": server.config, "slurm_partition": "main", "slurm_nodes": NODE,
        "slurm_simulated_gpus": True, "slurm_poll_seconds": 0.2,
    }  # fmt: skip


def cluster_settings(platform: MachinePlatform, server: SlurmServer, state: Path, **fields: Any) -> Any:
    return daemon_settings(platform, state, **(cluster_options(server, state) | fields))


@pytest.fixture
async def cluster(
    machine_platform: MachinePlatform, slurm_server: SlurmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningDaemon]:
    monkeypatch.setattr(agent, "HOURS_CHECK_SECONDS", 0.1)
    daemon = RunningDaemon(cluster_settings(machine_platform, slurm_server, tmp_path / "c"))
    await daemon.start()
    yield daemon
    await daemon.stop()
    if not (slurm_server.shared / "nodes").is_dir():
        shutil.copytree(daemon.settings.state / "slurm" / "nodes", slurm_server.shared / "nodes")


def numbers_of(server: SlurmServer, attempt_id: str) -> list[str]:
    """The numbers of an attempt's jobs in Slurm that have not ended."""
    lines = server.run("squeue", "--noheader", "--array", "--format=%i|%k").splitlines()
    return [number for number, _, comment in (line.partition("|") for line in lines) if attempt_id in comment]


async def placed(platform: MachinePlatform, *command: str, gpus: int = 0, **fields: Any) -> str:
    devices = [machine_pb2.DeviceLease(index=index, milli=1000) for index in range(gpus)]
    return await platform.place(*(command or FOREVER), devices=devices, **fields)


async def running(platform: MachinePlatform, **fields: Any) -> str:
    attempt_id = await placed(platform, **fields)
    await platform.reached(attempt_id, jobs_pb2.RUNNING)
    return attempt_id


def last_inventory(platform: MachinePlatform) -> machine_pb2.Inventory | None:
    found = [heartbeat.inventory for heartbeat in platform.heartbeats if heartbeat.HasField("inventory")]
    return found[-1] if found else None


async def test_a_node_is_a_machine_with_what_slurm_says_of_it(
    machine_platform: MachinePlatform, cluster: RunningDaemon
):
    inventory = machine_platform.enrolments[0].inventory
    assert (inventory.hostname, inventory.cpu_milli) == (NODE, 8000)
    assert inventory.memory_bytes == (8000 - 8 * 32) << 20
    assert [(device.model, device.simulated) for device in inventory.devices] == [("NVIDIA GeForce RTX 4090", True)] * 2
    assert (inventory.executors, inventory.sandbox) == (["slurm"], "bubblewrap")


async def test_a_job_runs_on_the_cluster_and_its_log_and_results_arrive(
    machine_platform: MachinePlatform, cluster: RunningDaemon
):
    script = 'cat data.txt; echo "$DANTE_SIMULATED_GPUS"; echo 42 > "$DANTE_OUTPUT/answer.txt"'
    attempt_id = await placed(machine_platform, "sh", "-c", script, gpus=1, files={"data.txt": b"hello\n"})
    status = await machine_platform.ended(attempt_id)
    assert (status.state, status.outcome, status.exit_code) == (jobs_pb2.SUCCEEDED, jobs_pb2.OUTCOME_SUCCEEDED, 0)
    assert machine_platform.logs[attempt_id] == b"hello\nNVIDIA GeForce RTX 4090\n"
    assert machine_platform.results == {"answer.txt": b"42\n"}
    assert status.sandbox == "bubblewrap"


async def test_attempts_that_are_ready_at_one_moment_are_one_array_of_slurms(
    machine_platform: MachinePlatform, cluster: RunningDaemon, slurm_server: SlurmServer
):
    attempts = [await machine_platform.place(*FOREVER, push=False) for _ in range(4)]
    await machine_platform.change()
    for attempt_id in attempts:
        await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    numbers = [number for attempt_id in attempts for number in set(numbers_of(slurm_server, attempt_id))]
    assert len({number.partition("_")[0] for number in numbers}) < len(attempts)
    machine_platform.desired[attempts[0]].stop = True
    await machine_platform.change()
    assert (await machine_platform.ended(attempts[0])).outcome == jobs_pb2.OUTCOME_CANCELLED
    assert [machine_platform.statuses[attempt_id].state for attempt_id in attempts[1:]] == [jobs_pb2.RUNNING] * 3


async def test_what_an_administrator_of_the_cluster_cancels_has_given_way(
    machine_platform: MachinePlatform, cluster: RunningDaemon, slurm_server: SlurmServer
):
    attempt_id = await running(machine_platform)
    slurm_server.run("scancel", *numbers_of(slurm_server, attempt_id))
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_PREEMPTED
    assert "administrator" in status.message


async def test_what_slurm_preempts_has_given_way(
    machine_platform: MachinePlatform, cluster: RunningDaemon, slurm_server: SlurmServer
):
    attempt_id = await running(machine_platform, gpus=2)
    options = ("--partition=urgent", f"--nodelist={NODE}", "--gres=gpu:2", "--output=/dev/null", "--parsable")
    number = slurm_server.run("sbatch", *options, stdin="#!/bin/sh\nsleep 600\n").strip()
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_PREEMPTED
    assert "preempted it for another job" in status.message
    slurm_server.run("scancel", number)


async def test_what_slurm_starts_again_does_not_run_twice(
    machine_platform: MachinePlatform, cluster: RunningDaemon, slurm_server: SlurmServer
):
    attempt_id = await running(machine_platform)
    (number,) = numbers_of(slurm_server, attempt_id)
    slurm_server.run("scontrol", "update", f"jobid={number}", "requeue=1")
    slurm_server.run("scontrol", "requeue", number)
    status = await machine_platform.ended(attempt_id)
    assert (status.outcome, status.message.partition(" (")[0]) == (
        jobs_pb2.OUTCOME_PREEMPTED,
        "the cluster requeued it",
    )
    assert machine_platform.logs[attempt_id].count(b"ready") == 1
    assert not numbers_of(slurm_server, attempt_id)


async def test_a_node_that_fails_is_the_providers_fault_and_closed_until_it_is_back(
    machine_platform: MachinePlatform, cluster: RunningDaemon, slurm_server: SlurmServer
):
    attempt_id = await running(machine_platform)
    slurm_server.run("scontrol", "update", f"nodename={NODE}", "state=down", "reason=smoke")
    try:
        status = await machine_platform.ended(attempt_id)
        assert status.outcome == jobs_pb2.OUTCOME_PROVIDER_FAULT
        assert status.message.startswith("the node failed")
        await until(lambda: (i := last_inventory(machine_platform)) is not None and "smoke" in i.closed)
    finally:
        slurm_server.run("scontrol", "update", f"nodename={NODE}", "state=resume")
    await until(lambda: (i := last_inventory(machine_platform)) is not None and not i.closed)


async def test_gpus_that_others_use_are_not_for_rent_and_a_full_node_hands_the_attempt_back(
    machine_platform: MachinePlatform, slurm_server: SlurmServer, tmp_path: Path
):
    settings = cluster_settings(machine_platform, slurm_server, tmp_path / "c", slurm_start_seconds=4)
    daemon = RunningDaemon(settings)
    await daemon.start()
    options = (
        f"--nodelist={NODE}",
        f"--gres=gpu:{GPU_TYPE}:1",
        "--cpus-per-task=8",
        "--output=/dev/null",
        "--parsable",
    )
    number = slurm_server.run("sbatch", *options, stdin="#!/bin/sh\nsleep 600\n").strip()
    try:
        await until(
            lambda: (
                (i := last_inventory(machine_platform)) is not None
                and [device.problem for device in i.devices] == ["", "is used by another job of the cluster"]
            )
        )
        attempt_id = await placed(machine_platform, gpus=1)
        await until(
            lambda: (s := machine_platform.statuses.get(attempt_id)) is not None and "queue (Resources)" in s.message
        )
        status = await machine_platform.ended(attempt_id)
        assert (status.outcome, status.ran_ms) == (jobs_pb2.OUTCOME_PREEMPTED, 0)
        assert f"Slurm did not start it on {NODE} within" in status.message
        assert not numbers_of(slurm_server, attempt_id)
        waiting = await placed(machine_platform)
        await until(lambda: numbers_of(slurm_server, waiting))
        machine_platform.desired[waiting].stop = True
        await machine_platform.change()
        assert (await machine_platform.ended(waiting)).outcome == jobs_pb2.OUTCOME_CANCELLED
        assert not numbers_of(slurm_server, waiting)
    finally:
        slurm_server.run("scancel", number)
        await daemon.stop()


async def test_a_look_at_the_queue_from_before_a_start_is_not_believed(slurm_server: SlurmServer, short_dir: Path):
    executor = slurm_executor(slurm_server.folder, short_dir / "data", poll_seconds=3600)
    for code in (4, 5):
        spec = a_shell_job(f"sleep 0.3; exit {code}")
        handle = await executor.prepare(spec)
        starting = asyncio.create_task(executor.start(handle, spec))
        if code == 5:
            # Looked at while it still waits in Slurm's queue, where it is for some tenths of a second.
            await until(partial(numbers_of, slurm_server, str(spec.attempt_id)))
            await executor.adopt(handle)
        await starting
        assert await executor.wait(handle) == ExitStatus(code)
        await executor.destroy(handle)


def leases_of(node_state: Path) -> dict[str, float]:
    return LeaseFile(node_state / LEASES).read()


async def test_a_job_lives_while_its_lease_is_renewed_and_ends_with_it_when_its_daemon_is_gone(
    machine_platform: MachinePlatform, slurm_server: SlurmServer, tmp_path: Path
):
    machine_platform.lease_ms = 4000
    state = tmp_path / "c"
    daemon = KilledDaemon(machine_platform, state, **cluster_options(slurm_server, state))
    try:
        attempt_id = await running(machine_platform)
        mark = f"DANTE_ATTEMPT_ID={attempt_id}".encode()
        first = await until(lambda: leases_of(state / "nodes" / NODE).get(attempt_id))
        await until(lambda: leases_of(state / "nodes" / NODE)[attempt_id] > first + 4.5)
        assert processes_with_env(mark)
        machine_platform.answers_syncs = False
        await asyncio.to_thread(daemon.kill)
        until_seconds = leases_of(state / "nodes" / NODE)[attempt_id]
        await until(lambda: not processes_with_env(mark) or None)
        assert boottime() > until_seconds
        await until(lambda: not numbers_of(slurm_server, attempt_id) or None)
        folder = state / "nodes" / NODE / "work" / "attempts" / attempt_id
        assert ((folder / "stop").read_text(), (folder / "exit").read_text().strip()) == ("lease_lost", "137")
        machine_platform.answers_syncs = True
        daemon.start_again()
        status = await machine_platform.ended(attempt_id)
        assert (status.state, status.outcome) == (jobs_pb2.FAILED, jobs_pb2.OUTCOME_LOST)
        assert status.message == "the lease could not be renewed in time, so the machine ended it"
        assert machine_platform.states[attempt_id].count("FAILED") == 1
        assert await asyncio.to_thread(daemon.end) == 0
    finally:
        await asyncio.to_thread(daemon.kill)


async def test_what_slurm_starts_after_the_end_of_its_lease_does_not_run(slurm_server: SlurmServer, short_dir: Path):
    """As when the daemon has died while the job waited in Slurm's queue."""
    leases = short_dir / "leases.json"
    executor = slurm_executor(slurm_server.folder, short_dir / "data", leases=leases)
    spec = a_shell_job("echo ran")
    leases.write_text(
        json.dumps({"boot": "b", "at": 5, "wall": time.time() - 60, "leases": {str(spec.attempt_id): 5.5}})
    )
    handle = await executor.prepare(spec)
    with pytest.raises(SandboxFailed, match=f"{NODE} sees no renewal of its lease"):
        await executor.start(handle, spec)
    assert await executor.wait(handle) == ExitStatus(137, stop_reason=StopReason.LEASE_LOST)
    assert not (short_dir / "data" / "attempts" / str(spec.attempt_id) / "output.log").read_text()
    await executor.destroy(handle)


async def test_a_cluster_whose_token_serves_too_few_machines_says_for_which_node(
    machine_platform: MachinePlatform, slurm_server: SlurmServer, tmp_path: Path
):
    settings = cluster_settings(machine_platform, slurm_server, tmp_path / "c", join_token=SecretStr("used up"))
    with pytest.raises(EnrolmentRefused, match=rf"the node {NODE}: the join token has been used.*--max-uses"):
        await RunningDaemon(settings).start()
