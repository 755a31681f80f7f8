"""A server as a child process, the lock on its data folder, and the leftovers of a killed platform."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import psutil

from dantegpu.apps.embedded.errors import DiskFull, FolderInUse, UnusableFolder

POLL_INTERVAL_SECONDS: Final = 0.01
LOG_BYTES_MAX: Final = 8 * 1024**2
"""A server's log above this size is moved to `.1` at the next start."""
LOG_TAIL_BYTES: Final = 4096

_LAUNCHER: Final = Path(__file__).with_name("launch.py")


@dataclass(frozen=True, slots=True)
class Launch:
    """How launch.py starts a server; the fields are described there."""

    argv: Sequence[str]
    directory: Path
    death_signal: int = 0
    map_to: tuple[int, int] | None = None
    become: tuple[int, int] | None = None
    socket_folder: Path | None = None

    def command(self) -> list[str]:
        order: dict[str, Any] = {
            "argv": list(self.argv),
            "directory": str(self.directory),
            "parent_pid": os.getpid(),
            "death_signal": self.death_signal,
            "map_to": self.map_to,
            "become": self.become,
            "socket_folder": str(self.socket_folder) if self.socket_folder else None,
        }
        return [sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(order)]


class FolderLock:
    """Held for as long as this process runs a server on the folder; the kernel frees it however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "owner.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises FolderInUse when another process holds it. Holding it already is fine."""
        if self._descriptor is not None:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise FolderInUse(self._folder, int(holder) if holder.isdigit() else None) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class ServerProcess:
    """A running server. It has its own session, so the terminal's Ctrl-C does not reach it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen

    @classmethod
    def start(cls, launch: Launch, log_path: Path, env: Mapping[str, str]) -> Self:
        """Call from a thread that lives as long as the server should: `death_signal` follows the thread's death."""
        rotate_log(log_path)
        with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            popen = subprocess.Popen(
                launch.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        return cls(popen)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Wait until the server has ended, however long, and return its exit code."""
        if self.exit_code is None and hasattr(os, "pidfd_open"):
            await _readable(os.pidfd_open(self._popen.pid))
        while (code := self.exit_code) is None:
            await asyncio.sleep(POLL_INTERVAL_SECONDS)
        return code

    async def stop(self, steps: Sequence[tuple[signal.Signals, float]]) -> int:
        """Send each signal and wait up to its seconds for the end; SIGKILL when no step did it."""
        for number, patience_seconds in steps:
            if self.exit_code is None:
                self._popen.send_signal(number)
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(self.wait(), patience_seconds)
        if self.exit_code is None:
            self._popen.kill()
        return await self.wait()


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def stop_leftovers(
    leftovers: Sequence[psutil.Process],
    signals_to: psutil.Process | None,
    steps: Sequence[tuple[signal.Signals, float]],
) -> None:
    """End the server that a killed platform left behind: `steps` go to its main process, then SIGKILL to what is left.

    Blocks; run it in a thread.
    """
    for number, patience_seconds in steps:
        if signals_to is not None and signals_to.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                signals_to.send_signal(number)
            _, alive = psutil.wait_procs(leftovers, timeout=patience_seconds)
            if not alive:
                return
    for process in leftovers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(leftovers, timeout=10)


def tail(log_path: Path, offset: int = 0) -> str:
    """The end of a log, at most LOG_TAIL_BYTES, of what was written after `offset`."""
    try:
        with log_path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(offset, end - LOG_TAIL_BYTES) if offset <= end else 0)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def log_size(log_path: Path) -> int:
    return log_path.stat().st_size if log_path.exists() else 0


def require_room(server: str, folder: Path, needed_bytes: int) -> None:
    """Raises DiskFull when the folder's disk has less than `needed_bytes` left."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskFull(server, folder, free_bytes, needed_bytes)


def make_private_folder(folder: Path) -> None:
    """Make `folder` with mode 0700, or set it so. Raises UnusableFolder when we may not."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UnusableFolder(
            f"cannot use the folder ({error.strerror})", folder, "Choose a folder of your own with DANTE_HOME."
        ) from error


def rotate_log(log_path: Path) -> None:
    """Move a log that has grown above LOG_BYTES_MAX to `.1`, over the one before."""
    if log_size(log_path) > LOG_BYTES_MAX:
        log_path.replace(log_path.with_name(log_path.name + ".1"))
