"""Sandboxes that are made before their job is there: the job sees no difference, and none of them outlives its use."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import AttemptSpec
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.executors.processes import descendants, process_info
from dantegpu.daemon.executors.slots import SPARE_CELLS, Slot
from tests.fixtures.executors import TIMEOUT_SECONDS, Bench, a_job, a_python_job, a_shell_job, read_bytes, until

VIEW = """
import json, os, sys
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
kept = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigIgn",
        "SigBlk", "SigCgt", "Umask")
mounts = sorted(line.split(" - ")[0].split()[4:6] for line in open("/proc/self/mountinfo"))
print(json.dumps({
    "environ": {k: v for k, v in os.environ.items() if k != "DANTE_ATTEMPT_ID"}, "cwd": os.getcwd(),
    "arguments": sys.argv[1:], "status": {name: status[name] for name in kept}, "mounts": mounts,
    "stdin": os.readlink("/proc/self/fd/0"), "open": len(os.listdir("/proc/self/fd")),
    "work": sorted(os.listdir()), "output": os.listdir(os.environ["DANTE_OUTPUT"]), "owner": os.stat(".").st_uid,
    "processes": sorted(p for p in os.listdir("/proc") if p.isdigit())[:1],
    "interfaces": os.listdir("/proc/self/net/dev_snmp6"),
}, indent=0))
"""
ODD = {"IFS": "x", "OPTIND": "3", "PWD": "/nowhere"}
VALUES = {"A": "it's", "B": '"$(touch /work/bad)` \\', "C": "two\nlines", "D": "", "E": "ü"}


async def waiting(bench: Bench) -> list[Slot]:
    """The idle slots, once the shell of a sandbox waits in each."""
    assert isinstance(bench.executor, ProcessExecutor)
    slots = bench.executor._slots._idle  # pyright: ignore[reportPrivateUsage]
    await bench.run(a_job("true"))
    return await until(lambda: list(slots) if len(slots) >= SPARE_CELLS and all(map(waits, slots)) else None)


def waits(slot: Slot) -> bool:
    commands = [read_bytes(Path(f"/proc/{pid}/cmdline")) for pid in descendants(slot.cell.pid)]
    return slot.parked is not None and any(command.startswith(b"/bin/sh\0-s") for command in commands)


async def made_anew(bench: Bench, spec: AttemptSpec) -> str:
    """What the same job says in a sandbox that was not made ahead."""
    for slot in await waiting(bench):
        slot.parked = None
    return (await bench.run(spec))[1]


def sandboxes(slots: list[Slot]) -> set[int]:
    return {pid for slot in slots for pid in descendants(slot.cell.pid)}


@pytest.mark.parametrize("variables", [VALUES, ODD], ids=["values", "names of the shell's own"])
async def test_a_job_sees_no_difference(bubblewrap: Bench, variables: dict[str, str]):
    def view() -> AttemptSpec:
        return a_job("python3", "-c", VIEW, "an 'argument'", "", "$A\n", env=variables, cpu_milli=500)

    await waiting(bubblewrap)
    status, ahead = await bubblewrap.run(view())
    assert status.exit_code == 0
    assert ahead == await made_anew(bubblewrap, view())
    assert '"work": []' in ahead


async def test_a_job_gets_the_sandbox_that_waits(bubblewrap: Bench):
    before = sandboxes(await waiting(bubblewrap))
    handle = await bubblewrap.start(a_shell_job("echo here; exec sleep 600"))
    await bubblewrap.until_logged(handle, "here")
    pids = await bubblewrap.executor.processes(handle)
    assert pids
    assert pids <= before
    await bubblewrap.executor.destroy(handle)


async def test_a_command_that_is_not_there_ends_with_127(bubblewrap: Bench):
    await waiting(bubblewrap)
    status, text = await bubblewrap.run(a_job("no-such-command"))
    assert status.exit_code == 127
    assert "no-such-command" in text


async def test_a_job_that_is_to_see_something_else_gets_a_sandbox_of_its_own(bubblewrap: Bench):
    before = sandboxes(await waiting(bubblewrap))
    size = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize)"
    status, text = await bubblewrap.run(a_python_job(size, shm_bytes=1 << 20))
    assert (status.exit_code, text) == (0, f"{1 << 20}\n")
    # The one that was made for nothing is gone.
    await until(lambda: len([pid for pid in before if process_info(pid) is not None]) < len(before))


async def test_a_job_whose_sandbox_has_died_meanwhile_gets_a_new_one(bubblewrap: Bench):
    for pid in sandboxes(await waiting(bubblewrap)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status, text = await bubblewrap.run(a_shell_job("echo here; exit 3"))
    assert (status.exit_code, text) == (3, "here\n")


async def test_an_attempt_that_never_starts_leaves_no_sandbox(bubblewrap: Bench):
    await waiting(bubblewrap)
    prepared = await bubblewrap.prepare(a_job("true"))
    await bubblewrap.executor.destroy(prepared)
    status, text = await bubblewrap.run(a_shell_job("echo here; ls -A . $DANTE_OUTPUT"))
    assert (status.exit_code, text.split()) == (0, ["here", ".:", "/output:"])


async def test_what_waits_dies_with_the_daemon(bubblewrap: Bench):
    slots = await waiting(bubblewrap)
    left = sandboxes(slots) | {slot.cell.pid for slot in slots}
    for slot in slots:
        slot.cell.close()  # as the kernel does for a daemon that was killed
    await asyncio.wait_for(until(lambda: not any(process_info(pid) for pid in left)), TIMEOUT_SECONDS)
