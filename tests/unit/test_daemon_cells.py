"""Cells and their keeper: one start per attempt, one cell for many, nothing left of either."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptSpec,
    ExitStatus,
    Handle,
    SandboxKind,
    StopReason,
)
from dantegpu.daemon.executors.cells import Keeper, Launch
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.executors.processes import process_info
from dantegpu.daemon.workspace import MARK_BYTES, SPARE_EXIT, SPARE_STARTED, Workspace
from dantegpu.domain.ids import AttemptId
from tests.fixtures.machines import until


def an_executor(folder: Path) -> ProcessExecutor:
    return ProcessExecutor(Workspace(folder), sandbox=SandboxKind.NONE)


async def started(executor: ProcessExecutor, *command: str) -> Handle:
    spec = AttemptSpec(AttemptId.new(), command)
    handle = await executor.prepare(spec)
    await executor.start(handle, spec)
    return handle


@pytest.mark.parametrize("used_again", [False, True])
async def test_of_two_cells_for_one_attempt_only_one_starts_it(tmp_path: Path, used_again: bool):
    """The guard of the last resort, below every check that a daemon makes."""
    if used_again:
        (tmp_path / SPARE_STARTED).write_text(" " * MARK_BYTES)
        (tmp_path / SPARE_EXIT).write_text("127            \n")
    launch = Launch(["sh", "-c", "echo started"], {"PATH": "/usr/bin:/bin"}, "/")
    keeper = Keeper()
    cells = [await keeper.cell([]) for _ in range(8)]
    results = await asyncio.gather(*(cell.start(tmp_path, launch) for cell in cells), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == [*["AlreadyStarted"] * 7, "NoneType"]
    await until((tmp_path / "exit").exists)
    assert (tmp_path / "output.log").read_text() == "started\n"
    assert int((tmp_path / "exit").read_text()) == 0
    assert int((tmp_path / "started").read_text().split()[0]) in {cell.pid for cell in cells}
    for cell in cells:
        cell.close()
    keeper.close()


async def test_a_cell_whose_daemon_died_before_the_start_leaves():
    keeper = Keeper()
    cell = await keeper.cell([])
    cell.close()
    await until(lambda: process_info(cell.pid) is None)
    keeper.close()


async def test_a_keeper_that_died_is_replaced():
    keeper = Keeper()
    (await keeper.cell([])).close()
    os.kill(keeper._pid, signal.SIGKILL)  # pyright: ignore[reportPrivateUsage]
    await until(lambda: (info := process_info(keeper._pid)) is None or info.zombie)  # pyright: ignore[reportPrivateUsage]
    cell = await keeper.cell([])
    assert cell.alive
    cell.close()
    keeper.close()


async def test_a_daemon_that_restarts_keeps_what_runs_in_the_groups_of_what_is_over(tmp_path: Path):
    executor = an_executor(tmp_path)
    over = await started(executor, "true")
    await executor.wait(over)
    running = await started(executor, "sleep", "600")
    assert json.loads(over.data)["slot"] == json.loads(running.data)["slot"]
    await executor.close()
    other = an_executor(tmp_path)
    assert await other.adopt(over) is Adoption.ENDED
    assert await other.adopt(running) is Adoption.RUNNING
    await other.sweep({over.attempt_id, running.attempt_id})
    assert await other.wait(over) == ExitStatus(0)
    await other.destroy(over)
    assert (await other.stats(running)).pids >= 1
    await other.stop(running, grace_seconds=0, reason=StopReason.REQUESTED)
    assert (await other.wait(running)).exit_code == 137
    await other.sweep(set())
    await other.close()


async def test_the_groups_of_what_ended_while_the_next_daemon_started_are_removed(tmp_path: Path):
    executor = an_executor(tmp_path)
    handle = await started(executor, "sh", "-c", "until [ -e go ]; do sleep 0.01; done")
    folders = [Path(entry[0]) for entry in json.loads(handle.data)["groups"].values()]
    await executor.close()
    other = an_executor(tmp_path)
    await other.probe()
    folder = Workspace(tmp_path).attempt(handle.attempt_id)
    (folder.work / "go").touch()
    await until(folder.exit.exists)
    assert await other.adopt(handle) is Adoption.ENDED
    await other.sweep({handle.attempt_id})
    assert await other.wait(handle) == ExitStatus(0)
    await other.destroy(handle)
    assert not [path for path in folders if path.exists()]
    await other.close()


@pytest.mark.parametrize("started_late", [False, True])
async def test_the_groups_of_what_another_daemon_had_prepared_are_removed(tmp_path: Path, started_late: bool):
    executor = an_executor(tmp_path)
    spec = AttemptSpec(AttemptId.new(), ("true",))
    handle = await executor.prepare(spec)
    folders = [Path(entry[0]) for entry in json.loads(handle.data)["groups"].values()]
    cell = executor._runs[handle.attempt_id].cell  # pyright: ignore[reportPrivateUsage]
    other = an_executor(tmp_path)
    assert await other.adopt(handle) is Adoption.NOT_STARTED
    await other.sweep({handle.attempt_id})
    if started_late:
        # The first daemon died right after it had told its cell.
        assert cell is not None
        await cell.start(Workspace(tmp_path).attempt(handle.attempt_id).root, Launch(["true"], {}, "/"))
        await cell.ended
        await executor.close()
        with pytest.raises(AlreadyStarted):
            await other.start(handle, spec)
        assert await other.adopt(handle) is Adoption.ENDED
    else:
        await executor.close()
        await other.start(handle, spec)
    assert await other.wait(handle) == ExitStatus(0)
    await other.destroy(handle)
    assert not [path for path in folders if path.exists()]
    await other.close()


def mount_points(pid: int | str) -> set[str]:
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return {line.split()[4].replace(r"\040", " ") for line in lines}


@pytest.fixture
def two_mounts(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two file systems of this machine; a mount made below the second one appears everywhere."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    kept, other = (str(tmp_path / name) for name in ("kept", "an other"))
    for folder in (kept, other):
        Path(folder).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    subprocess.run(["mount", "--make-shared", other], check=True)
    yield kept, other
    subprocess.run(["umount", "--lazy", kept, other], check=True)


async def test_a_cell_for_sandboxes_has_the_mounts_they_need_and_the_machine_keeps_all(two_mounts: tuple[str, str]):
    kept, other = two_mounts
    keeper = Keeper()
    keeper.needed_mounts = [f"{kept}/", "/proc/", "/dev/"]
    cell = await keeper.cell([])
    assert mount_points(cell.pid) & {kept, other, "/", "/proc"} == {kept, "/", "/proc"}
    assert mount_points("self") >= {kept, other}
    cell.close()
    keeper.needed_mounts = []
    keeper.close()
    cell = await keeper.cell([])
    assert mount_points(cell.pid) >= {kept, other}
    cell.close()
    keeper.close()
