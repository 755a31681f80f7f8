"""Cells as the daemon sees them: parked processes in control groups of their own, each ready for one attempt at a time.

Joining control groups costs the kernel several milliseconds (it waits for an RCU grace period), and a shell around
each command costs more than most short commands. So cells are made ahead by the keeper (`keeper.py`), joined once, and
used again: to start an attempt, the daemon sends a line to one of them, which spawns the command.
"""

import asyncio
import fcntl
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dantegpu.daemon.executors.base import AlreadyStarted, AttemptRefused, SandboxFailed

KEEPER = Path(__file__).with_name("keeper.py")
START_TIMEOUT_SECONDS = 20.0
MAX_PAYLOAD_BYTES = 4 << 20
_CONTROL = 3

_LINE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Launch:
    """What a cell executes. Only `env` reaches the program: of a sandboxed job, that is nothing of its own.

    `arguments` and `files`: descriptors that the program reads from, what is put there and which file.
    `user_namespaces`: descriptors of such, and who is who in them (a line of user_namespaces(7)'s uid_map).
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    arguments: Mapping[int, Sequence[str]] = field(default_factory=dict[int, Sequence[str]])
    files: Mapping[int, str] = field(default_factory=dict[int, str])
    user_namespaces: Mapping[int, str] = field(default_factory=dict[int, str])
    sandbox: bool = False
    script: str = ""
    """For the sandbox's shell."""
    plain: bool = False
    """Whether the sandbox that waits in the cell will do, if there is one."""

    def payload(self, directory: Path, *, park: bool = False) -> bytes:
        """Raises AttemptRefused."""
        request = {
            "directory": str(directory),
            "argv": list(self.argv),
            "env": dict(self.env),
            "cwd": self.cwd,
            "arguments": {number: list(parts) for number, parts in self.arguments.items()},
            "files": dict(self.files),
            "user_namespaces": dict(self.user_namespaces),
            "sandbox": self.sandbox,
            "park": park,
            "script": self.script,
            "plain": self.plain,
        }
        text = json.dumps(request).encode()
        if len(text) > MAX_PAYLOAD_BYTES:
            raise AttemptRefused(f"command and environment need {len(text)} bytes, at most {MAX_PAYLOAD_BYTES} fit")
        return len(text).to_bytes(4, "big") + text


class Cell:
    """One end of a line to a cell. `ended` is the exit code of the attempt that runs; None: the cell has died."""

    def __init__(self, line: socket.socket) -> None:
        self.pid = 0
        self.start_ticks = 0
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int | None] = loop.create_future()
        self._parked: asyncio.Future[None] = loop.create_future()
        self._started: asyncio.Future[None] = loop.create_future()
        self._line = line
        self._said = b""
        self._open = True
        line.setblocking(False)
        loop.add_reader(line.fileno(), self._readable)

    @property
    def alive(self) -> bool:
        return self._open

    async def parked(self) -> None:
        """Return when it has joined its groups. Raises SandboxFailed."""
        async with asyncio.timeout(START_TIMEOUT_SECONDS):
            await self._parked

    async def start(self, directory: Path, launch: Launch) -> None:
        """Have it run `launch` and return when that runs.

        Raises AlreadyStarted, SandboxFailed (with nothing in `detail`: the attempt's log has it), AttemptRefused.
        """
        payload = launch.payload(directory)
        loop = asyncio.get_running_loop()
        self.ended, self._started = loop.create_future(), loop.create_future()
        if not self._open:
            raise SandboxFailed("the parked cell has died")
        try:
            sent = self._line.send(payload)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise SandboxFailed("the parked cell has died") from error
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                if sent < len(payload):
                    await loop.sock_sendall(self._line, memoryview(payload)[sent:])
                await self._started
        except TimeoutError as error:
            raise SandboxFailed(f"it did not start within {START_TIMEOUT_SECONDS:.0f} s") from error

    def park(self, directory: Path, launch: Launch) -> bool:
        """Have it make a sandbox ahead, whose log and folders are those of `directory`. False: it cannot now."""
        payload = launch.payload(directory, park=True)
        try:
            if self._open and self._line.send(payload) == len(payload):
                return True
        except OSError:
            pass
        # Half a request may have gone out.
        self.close()
        return False

    def close(self) -> None:
        """Let go of it: it leaves as soon as nothing runs in it. Idempotent."""
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._line.fileno())
            self._line.close()
            self._end("")

    def _readable(self) -> None:
        try:
            data = self._line.recv(_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            self._hear(word, rest)

    def _hear(self, word: str, rest: str) -> None:
        match word:
            case "parked":
                self.pid, self.start_ticks = map(int, rest.split())
                _resolve(self._parked, None)
            case "broken":
                self._end(rest)
            case "running":
                _resolve(self._started, None)
            case "already":
                _refuse(self._started, AlreadyStarted("it was started before"))
            case "failed":
                _refuse(self._started, SandboxFailed(rest))
            case "exit":
                _resolve(self.ended, int(rest) if int(rest) >= 0 else None)
            case _:
                raise AssertionError(f"a cell said {word!r}")

    def _end(self, why: str) -> None:
        _refuse(self._parked, SandboxFailed(why or "the cell could not join its cgroups"))
        _refuse(self._started, SandboxFailed(why or "the parked cell has died"))
        _resolve(self.ended, None)


def _resolve[T](future: "asyncio.Future[T]", value: T) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        # Nobody may be waiting for this one; that is no error of its own.
        future.exception()


class Keeper:
    """The keeper process of this daemon, started when the first cell is asked for and again if it dies."""

    def __init__(self) -> None:
        self.needed_mounts: Sequence[str] = ()
        """What its cells need of the machine's mounts, see `keeper.py`; none: they see all."""
        self._control: socket.socket | None = None
        self._pid = 0

    async def cell(self, procs_files: Sequence[Path]) -> Cell:
        """A new cell, parked in those groups. Raises SandboxFailed."""
        ours, theirs = socket.socketpair()
        try:
            self._send(json.dumps([str(path) for path in procs_files]).encode(), theirs.fileno())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        cell = Cell(ours)
        try:
            await cell.parked()
        except BaseException:
            cell.close()
            raise
        return cell

    def _send(self, packet: bytes, descriptor: int) -> None:
        if self._control is not None:
            try:
                socket.send_fds(self._control, [packet], [descriptor])
            except OSError:
                self.close()
            else:
                return
        self._control = self._spawn()
        socket.send_fds(self._control, [packet], [descriptor])

    def _spawn(self) -> socket.socket:
        """In a session of its own, with an environment that is a constant: no secret of the daemon's gets there."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # Numbered above 0..3, which the child gets: putting one there must not overwrite another, nor leave it closed.
        inherited = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _CONTROL + 1) for number in (null, theirs.fileno())]
        actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, inherited[0], number) for number in (0, 1, 2)]
        actions.append((os.POSIX_SPAWN_DUP2, inherited[1], _CONTROL))
        # What the daemon itself inherited without close-on-exec must not end up in a job.
        actions += [(os.POSIX_SPAWN_CLOSE, number) for number in _inheritable() if number > _CONTROL]
        try:
            command = [sys.executable, "-I", "-S", str(KEEPER), *self.needed_mounts]
            self._pid = os.posix_spawn(sys.executable, command, {"LANG": "C.UTF-8"}, file_actions=actions)
        finally:
            for number in (null, *inherited):
                os.close(number)
            theirs.close()
        return ours

    def close(self) -> None:
        """It leaves; its cells stay for as long as something runs in them. Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
            os.waitpid(self._pid, 0)


def _inheritable() -> list[int]:
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the one that listed the folder
    return found
