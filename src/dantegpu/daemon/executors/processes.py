"""Processes of this machine, named so that a reused pid can never be mistaken for an old one."""

import asyncio
import itertools
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MAX_PROCESSES_READ = 512
"""Of one attempt, for its disk traffic: a job with more of them must not slow the machine down by being measured."""
_STAT_STATE = 0
_STAT_PPID = 1
_STAT_SESSION = 3
_STAT_STARTTIME = 19
# The cell and the sandbox around the job live in the cell's session; whatever the job starts does not.


@cache
def boot_id() -> str:
    """Changes with each boot: pids and start times of an older boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """What /proc says of one process."""

    pid: int
    parent_pid: int
    session: int
    start_ticks: int
    """Clock ticks since boot at which it started: pid and this name a process for ever (per boot)."""
    zombie: bool


def process_info(pid: int) -> ProcessInfo | None:
    """None when there is no such process. Source: proc(5), /proc/pid/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in parentheses and may itself hold blanks and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessInfo(
        pid=pid,
        parent_pid=int(fields[_STAT_PPID]),
        session=int(fields[_STAT_SESSION]),
        start_ticks=int(fields[_STAT_STARTTIME]),
        zombie=fields[_STAT_STATE] in "ZX",
    )


def descendants(root_pid: int) -> set[int]:
    """Processes below `root_pid`, without itself. One pass over /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (info := process_info(int(entry))) is not None:
            children.setdefault(info.parent_pid, []).append(info.pid)
    found: set[int] = set()
    waiting = [root_pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def disk_bytes(pids: Iterable[int]) -> tuple[int, int]:
    """(read, written) so far by these processes and by children of theirs that have ended, from and to disks.

    Source: proc(5), /proc/pid/io; the kernel adds an ended child's to its parent's (wait_task_zombie).
    """
    read = written = 0
    for pid in itertools.islice(pids, MAX_PROCESSES_READ):
        try:
            text = Path(f"/proc/{pid}/io").read_text()
        except OSError:
            continue  # gone, or another user's
        numbers = dict(line.split(": ") for line in text.splitlines())
        read += int(numbers.get("read_bytes", 0))
        written += int(numbers.get("write_bytes", 0))
    return read, written


def processes_with_env(entry: bytes) -> set[int]:
    """Processes whose initial environment holds `entry` (`NAME=value`): finds daemonised children without cgroups."""
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            environment = Path(f"/proc/{name}/environ").read_bytes()
        except (OSError, ProcessLookupError):
            continue
        if entry in environment.split(b"\0"):
            found.add(int(name))
    return found


def open_process(pid: int, start_ticks: int) -> int | None:
    """A pidfd of exactly that process, or None when it is gone (a zombie counts as gone)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Looked at after the descriptor is open: from here on the pid cannot be given to somebody else unseen.
    info = process_info(pid)
    if info is None or info.zombie or info.start_ticks != start_ticks:
        os.close(descriptor)
        return None
    return descriptor


def signal_processes(pids: set[int], still: "set[int]", number: int) -> None:
    """Send a signal to those of `pids` that are also in `still`, a look taken after their descriptors were opened."""
    for pid in pids & still:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            signal.pidfd_send_signal(descriptor, number)
        except (ProcessLookupError, PermissionError):
            pass
        finally:
            os.close(descriptor)


def handlers(pids: set[int], number: int) -> set[int]:
    """Those of `pids` that have a handler of their own for the signal."""
    return {pid for pid in pids if _caught(pid) >> (number - 1) & 1}


def _caught(pid: int) -> int:
    """The kernel's bit mask of the signals that the process handles; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return int(line.split()[1], 16)


async def process_ended(pidfd: int) -> None:
    """Wait, without polling, until the process behind `pidfd` has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    # A descriptor of its own: two waiters on one would take each other's reader away.
    descriptor = os.dup(pidfd)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def reap(pid: int) -> None:
    """Take the exit status of an ended child, so that no zombie stays. Not our child: nothing to do."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
