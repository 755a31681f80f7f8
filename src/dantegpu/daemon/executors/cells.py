"""Cells: a parked shim in fresh cgroups under a user of its own, ready for one attempt.

Joining cgroups costs the kernel several milliseconds (it waits for an RCU grace period), so it is done before an
attempt comes: `start` then only has to send a line through a pipe.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dantegpu.daemon.executors.base import AlreadyStarted, AttemptRefused, SandboxFailed
from dantegpu.daemon.executors.processes import process_ended, process_info, reap
from dantegpu.daemon.executors.sandbox import MAX_PAYLOAD_BYTES, Launch

SHIM = Path(__file__).with_name("shim.sh")
START_TIMEOUT_SECONDS = 20.0
_SMALL_PIPE_BYTES = 60_000
_FIRST_FREE_DESCRIPTOR = 10
EXIT_ALREADY_STARTED = 75
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


@dataclass(slots=True)
class ParkedShim:
    """A shim that has joined its cgroups and waits for the line that says which attempt it runs."""

    pid: int
    start_ticks: int
    pidfd: int
    go: int
    script: int
    arguments: int
    inner_arguments: int
    ready: int

    @classmethod
    def spawn(cls, procs_files: Sequence[Path]) -> "ParkedShim":
        """Start it in a session of its own. Its environment is a constant: a job's never reaches root's processes."""
        pipes = [_pipe() for _ in range(6)]  # go, script, arguments, inner arguments, between the halves, ready
        (go, script, arguments, inner, halves, ready) = pipes
        inherited = (go[0], script[0], arguments[0], inner[0], halves[0], halves[1], ready[0], ready[1])
        numbers = (0, 3, 4, 5, 6, 7, 8, 9)
        actions: list[tuple[int, ...]] = [
            (os.POSIX_SPAWN_DUP2, source, number) for source, number in zip(inherited, numbers, strict=True)
        ]
        null = _above(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        actions += [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
        # What the daemon itself inherited without close-on-exec must not end up in a job.
        actions += [(os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in _inheritable()]
        shell = "/bin/sh"
        command = [shell, str(SHIM), shutil.which("mv", path="/usr/bin:/bin") or "mv", *map(str, procs_files)]
        pid = os.posix_spawn(shell, command, ENVIRONMENT, file_actions=actions, setsid=True)
        pidfd = os.pidfd_open(pid)
        info = process_info(pid)
        for descriptor in (null, go[0], script[0], arguments[0], inner[0], *halves, ready[1]):
            os.close(descriptor)
        os.set_blocking(ready[0], False)
        return cls(pid, info.start_ticks if info else 0, pidfd, go[1], script[1], arguments[1], inner[1], ready[0])

    async def start(self, directory: Path, launch: Launch) -> None:
        """Hand over and return when the command runs.

        Raises AlreadyStarted, SandboxFailed (with nothing in `detail`: the attempt's log has it), AttemptRefused.
        """
        payloads = (
            (self.script, launch.script),
            (self.arguments, launch.arguments),
            (self.inner_arguments, launch.inner_arguments),
        )
        try:
            # All of it lies in the pipes before the line that starts it: a daemon dying here starts nothing.
            for descriptor, payload in payloads:
                _send(descriptor, payload)
            _send(self.go, f"{directory}\n".encode())
        except BrokenPipeError as error:
            raise SandboxFailed("the parked shim has died") from error
        finally:
            self._close_writers()
        said = await self._listen()
        if said.endswith(b"r\n"):
            return
        if not said:
            raise SandboxFailed("the shim could not join its cgroups")
        await process_ended(self.pidfd)
        if _exit_status(self.pidfd) == EXIT_ALREADY_STARTED:
            raise AlreadyStarted(f"{directory.name} was started before")
        raise SandboxFailed("")

    async def _listen(self) -> bytes:
        """What the shim's halves say until the last of them has closed the pipe, which the running command has."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        said = b""
        loop.add_reader(self.ready, readable.set)
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                while not said.endswith(b"r\n"):
                    await readable.wait()
                    readable.clear()
                    try:
                        chunk = os.read(self.ready, 64)
                    except BlockingIOError:
                        continue
                    if not chunk:
                        break
                    said += chunk
        except TimeoutError as error:
            raise SandboxFailed(f"it did not start within {START_TIMEOUT_SECONDS:.0f} s") from error
        finally:
            loop.remove_reader(self.ready)
        return said

    def _close_writers(self) -> None:
        for name in ("go", "script", "arguments", "inner_arguments"):
            descriptor: int = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)

    def close(self) -> None:
        """Let go of it: a shim that was never started leaves by itself, a running one goes on."""
        self._close_writers()
        for name in ("ready", "pidfd"):
            descriptor: int = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)
        reap(self.pid)


def _exit_status(pidfd: int) -> int | None:
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    return None if ended is None else ended.si_status


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    return _above(reading), _above(writing)


def _above(descriptor: int) -> int:
    """The same, numbered so that putting others onto 0..9 in the child cannot overwrite it."""
    if descriptor >= _FIRST_FREE_DESCRIPTOR:
        return descriptor
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR)
    os.close(descriptor)
    return copy


def _inheritable() -> list[int]:
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) >= _FIRST_FREE_DESCRIPTOR and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the one that listed the folder
    return found


def _send(descriptor: int, payload: bytes) -> None:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise AttemptRefused(f"command and environment need {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} fit")
    if len(payload) > _SMALL_PIPE_BYTES:
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, len(payload))
    os.set_blocking(descriptor, False)
    if payload and os.write(descriptor, payload) != len(payload):
        raise SandboxFailed("the pipe to the shim is too small")
