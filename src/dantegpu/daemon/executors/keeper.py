"""The keeper and its cells: the small processes that start attempts and outlive the daemon.

Run by the daemon as a script, alone: it imports the standard library only, so that a cell, a fork of the keeper, has
about a megabyte of its own. Each cell joins its control groups once and then runs attempts, one after the other. It is
the parent of what it starts, notes how that ended, and leaves only when its daemon is gone and nothing of it runs.

Daemon to keeper, one packet per cell: the files to join the groups by, with one end of the cell's line.
Daemon to cell: 4 bytes of length and a JSON object per attempt, see `Request`.
Cell to daemon, a line each: `parked PID TICKS` or `broken WHY`, then per attempt `running` or `failed WHY` and at its
end `exit CODE`, or only `already`.

While a cell waits, it may keep a sandbox ready (`park`), in which a shell waits for its script. It is for one attempt:
the next one, or nobody.

The keeper's arguments are what sandboxes need of the machine's mounts: a path, or a folder with all below it when a
slash ends it. Without any it leaves the mounts alone.
"""

import errno
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, TypedDict

CONTROL = 3
FIRST_FREE_DESCRIPTOR = 10
MAX_CELL_BYTES = 16 << 10
KILL_TIMEOUT_SECONDS = 5.0
READY, LOG = 9, 8
# In a folder that is used again lie the files of the last attempt under these names; each is as long as its successor.
SPARE_STARTED, SPARE_EXIT = "started.spare", "exit.spare"
MARK_BYTES, EXIT_BYTES = 40, 16
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_SHELL = "/bin/sh"
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 1 << 14, 1 << 18, 2  # mount(2), umount2(2)
# Python ignores them; a job must not.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


class Request(TypedDict):
    """One attempt: what to execute. `arguments`: descriptor -> what the program reads from it, NUL between parts.
    `user_namespaces`: descriptor -> its only line of uid_map and gid_map.

    `script`: what the sandbox's shell reads from its standard input. `park`: only make the sandbox, whose script comes
    later. `plain`: that sandbox will do; else, or when it has died, a new one is made.
    """

    directory: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    arguments: dict[str, list[str]]
    files: dict[str, str]
    user_namespaces: dict[str, str]
    sandbox: bool
    park: bool
    script: str
    plain: bool


class Sandbox(NamedTuple):
    """One that was started. `ready`: a byte comes when its command runs, nothing when it has died before."""

    pid: int
    ready: int
    script: int
    """Where its shell reads its script from; -1: it has one."""


class CellProcess:
    """Runs attempts in its control groups. Without a line to a daemon (in a cluster's job) it says nothing."""

    def __init__(self, line: socket.socket | None, groups: Sequence[str]) -> None:
        self._line = line
        self._groups = groups
        self._pid = os.getpid()
        self._ticks = 0
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._may_protect = os.geteuid() == 0
        self._ready_made: Sandbox | None = None
        self._user_namespaces: dict[str, int] = {}

    def live(self) -> None:
        """Park, serve, and return when the daemon is gone and nothing runs."""
        os.setsid()
        self.join()
        self.say(f"parked {self._pid} {self._ticks}")
        while (request := self._receive()) is not None:
            if request["park"]:
                self._park(request)
            else:
                self.run(request)
        self._unpark()

    def join(self) -> None:
        """Become a member of the groups. Raises OSError."""
        for procs in self._groups:
            _write(procs, "0")
        _write_optional("/proc/self/comm", "dante-cell")
        with open("/proc/self/stat", encoding="latin-1") as stat:
            self._ticks = int(stat.read().rpartition(")")[2].split()[19])
        self._protect(protected=True)

    def _protect(self, *, protected: bool) -> None:
        """A job out of memory is killed, not the cell that notes how it ended. Only root may ask for that."""
        if self._may_protect:
            _write_optional("/proc/self/oom_score_adj", "-1000" if protected else "0")

    def say(self, text: str) -> None:
        """Tell the daemon."""
        if self._line is None:
            return
        try:
            self._line.sendall(f"{text}\n".encode())
        except OSError:
            return  # The daemon has died. The files that the cell leaves tell the next one.

    def _receive(self) -> Request | None:
        size = self._read_exactly(4)
        text = self._read_exactly(int.from_bytes(size, "big")) if size else b""
        return json.loads(text) if text else None

    def _read_exactly(self, count: int) -> bytes:
        """Empty when the daemon went away first: half a request starts nothing."""
        data = b""
        while len(data) < count and self._line is not None:
            try:
                chunk = self._line.recv(count - len(data))
            except OSError:
                return b""
            if not chunk:
                return b""
            data += chunk
        return data

    # --- one attempt --------------------------------------------------------------------------------------------------

    def run(self, request: Request) -> None:
        """One attempt, from its mark `started` to its mark `exit`."""
        directory = request["directory"]
        try:
            _mark_started(directory, f"{self._pid} {self._ticks}")
            log = os.open(f"{directory}/output.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            self.say("already")
            return
        except OSError as error:
            self.say(f"failed {error.strerror}")
            return
        try:
            code = self._sandboxed(request, log) if request["sandbox"] else self._plain(request, log)
        finally:
            os.close(log)
            os.chdir("/")
        self._empty_groups()
        try:
            _mark_exit(directory, code)
        except OSError:
            code = -1  # The attempt was destroyed, or the disk is full: then nobody knows how it ended.
        self.say(f"exit {code}")

    def _plain(self, request: Request, log: int) -> int:
        command, env = request["argv"], request["env"]
        try:
            os.chdir(request["cwd"])
        except OSError as error:
            self.say(f"failed {request['cwd']}: {error.strerror}")
            return _NOT_EXECUTABLE
        try:
            path = _find(command[0], env.get("PATH", os.defpath))
            try:
                pid = self._spawn(path, command, env, log, (), setsid=True)
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                # A script without a first line that names its interpreter: the shell's, as everywhere.
                pid = self._spawn(_SHELL, [_SHELL, path, *command[1:]], env, log, (), setsid=True)
        except OSError as error:
            self.say("running")
            missing = isinstance(error, FileNotFoundError)
            os.write(log, os.fsencode(f"{command[0]}: {'not found' if missing else error.strerror}\n"))
            return _NOT_FOUND if missing else _NOT_EXECUTABLE
        self.say("running")
        return _exit_code(pid)

    def _park(self, request: Request) -> None:
        """Nobody waits for this: where it fails, the attempt gets a sandbox of its own."""
        self._unpark()
        try:
            log = os.open(f"{request['directory']}/output.log", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            return
        stdin, script = os.pipe()
        try:
            # What goes wrong while it is made is nothing for a job's log, which its script opens.
            pid, ready = self._spawn_sandbox(request, self._null, [(stdin, 0), (log, LOG)])
            self._ready_made = Sandbox(pid, ready, script)
        except OSError:
            os.close(script)
        finally:
            os.close(log)
            os.close(stdin)

    def _unpark(self) -> None:
        """By its process, not by its groups: after a restart of the daemon, another cell may have joined those."""
        made, self._ready_made = self._ready_made, None
        if made is not None:
            os.kill(made.pid, signal.SIGKILL)
            self._end(made)

    @staticmethod
    def _end(sandbox: Sandbox) -> int:
        os.close(sandbox.ready)
        if sandbox.script >= 0:
            os.close(sandbox.script)
        return _exit_code(sandbox.pid)

    def _sandboxed(self, request: Request, log: int) -> int:
        """The sandbox stays in the cell's session; the job has one of its own. It says by a pipe that it runs."""
        made, self._ready_made = (self._ready_made, None) if request["plain"] else (None, self._ready_made)
        self._unpark()
        if made is not None:
            told = _told(made.script, request["script"])
            made = made._replace(script=-1)
            if told and os.read(made.ready, 1) == b"r":
                self.say("running")
                return self._end(made)
            # It has died before its command began.
            self._end(made)
        script = _in_memory(os.fsencode(request["script"]))
        try:
            made = Sandbox(*self._spawn_sandbox(request, log, [(script, 0), (log, LOG)]), -1)
        except OSError as error:
            self.say(f"failed {request['argv'][0]}: {error.strerror}")
            return _NOT_EXECUTABLE
        finally:
            os.close(script)
        self.say("running" if os.read(made.ready, 1) == b"r" else "failed ")
        return self._end(made)

    def _spawn_sandbox(self, request: Request, log: int, more: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Its process, and where it says that its command runs. Raises OSError."""
        ready, said = os.pipe()
        opened = [*more, (said, READY)]
        mine = [said]
        try:
            for number, parts in request["arguments"].items():
                mine.append(_in_memory(b"".join(os.fsencode(part) + b"\0" for part in parts)))
                opened.append((mine[-1], int(number)))
            for number, path in request["files"].items():
                mine.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                opened.append((mine[-1], int(number)))
            opened += [
                (self._user_namespace(users), int(number)) for number, users in request["user_namespaces"].items()
            ]
            command = request["argv"]
            return self._spawn(command[0], command, request["env"], log, opened, setsid=False), ready
        except OSError:
            os.close(ready)
            raise
        finally:
            for descriptor in mine:
                os.close(descriptor)

    def _user_namespace(self, users: str) -> int:
        """One is as good as the next: it is empty again when its sandbox has ended. Raises OSError."""
        if users not in self._user_namespaces:
            self._user_namespaces[users] = _new_user_namespace(users)
        return self._user_namespaces[users]

    def _spawn(
        self,
        path: str,
        command: list[str],
        env: dict[str, str],
        log: int,
        opened: Sequence[tuple[int, int]],
        *,
        setsid: bool,
    ) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, self._null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, descriptor, number) for descriptor, number in opened]
        self._protect(protected=False)
        try:
            return os.posix_spawn(
                path, command, env, file_actions=actions, setsid=setsid, setsigmask=(), setsigdef=_DEFAULT_SIGNALS
            )
        finally:
            self._protect(protected=True)

    def _empty_groups(self) -> None:
        """Kill what the job left behind. `exit` is written afterwards: where it stands, nothing of the attempt runs."""
        if not self._groups:
            return
        deadline = time.monotonic() + KILL_TIMEOUT_SECONDS
        while members := self._members():
            opened = [(pid, descriptor) for pid in members if (descriptor := _open_process(pid)) is not None]
            # Looked at again after the descriptors were opened: a number may have gone to somebody else in between.
            still = self._members()
            for pid, descriptor in opened:
                if pid in still:
                    _kill(descriptor)
                os.close(descriptor)
            if time.monotonic() > deadline:
                os._exit(1)  # The daemon sees the line end, and does what is left to do.
            time.sleep(0.001)

    def _members(self) -> set[int]:
        with open(self._groups[0], encoding="ascii") as procs:
            return set(map(int, procs.read().split())) - {self._pid, 0}


def _find(command: str, search_path: str) -> str:
    """Where execvp would find it. Raises FileNotFoundError."""
    if "/" in command:
        return command
    for folder in search_path.split(os.pathsep):
        path = f"{folder or '.'}/{command}"
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command)


def _exit_code(pid: int) -> int:
    """As a shell counts: 128 and more for a signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def _told(script: int, text: str) -> bool:
    """Give a shell its script, and its end, so that it need not ask for more."""
    content = os.fsencode(text)
    try:
        while content:
            content = content[os.write(script, content) :]
    except BrokenPipeError:
        return False
    finally:
        os.close(script)
    return True


def _in_memory(payload: bytes) -> int:
    descriptor = os.memfd_create("dante")
    while payload:
        payload = payload[os.write(descriptor, payload) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _new_user_namespace(users: str) -> int:
    """Its descriptor. A process that lives no longer than this makes it: whoever makes one is in it."""
    made, told = os.pipe()
    held, release = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(release)
            os.unshare(os.CLONE_NEWUSER)
            os.write(told, b"m")
            os.read(held, 1)
        finally:
            os._exit(0)
    os.close(told)
    os.close(held)
    try:
        if not os.read(made, 1):
            raise OSError(errno.EPERM, "no user namespace can be made here")
        _write(f"/proc/{pid}/uid_map", users)
        _write(f"/proc/{pid}/gid_map", users)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(made)
        os.close(release)
        os.waitpid(pid, 0)


def _create(path: str, text: str) -> None:
    """The line is complete when it ends with its newline: a reader may come in between."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _mark_started(directory: str, text: str) -> None:
    """The one place where an attempt is started: only one cell gets the file, so a second one for the same leaves."""
    line = text.ljust(MARK_BYTES - 1) + "\n"
    try:
        os.rename(f"{directory}/{SPARE_STARTED}", f"{directory}/started")
    except FileNotFoundError:
        _create(f"{directory}/started", line)
    else:
        _write(f"{directory}/started", line)


def _mark_exit(directory: str, code: int) -> None:
    line = f"{code:<{EXIT_BYTES - 1}}\n"
    try:
        _write(f"{directory}/{SPARE_EXIT}", line)
        os.rename(f"{directory}/{SPARE_EXIT}", f"{directory}/exit")
    except FileNotFoundError:
        _create(f"{directory}/exit", line)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _write_optional(path: str, text: str) -> None:
    try:
        _write(path, text)
    except OSError:
        return


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _kill(descriptor: int) -> None:
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return


def _new_cell(control: socket.socket, line: socket.socket, groups: Sequence[str]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control.close()
    cell = CellProcess(line, groups)
    try:
        cell.live()
    except OSError as error:
        cell.say(f"broken {error}")
        os._exit(1)
    os._exit(0)


def prepare_process() -> None:
    """What a cell opens must not lie where its jobs get theirs; its jobs leave no core files."""
    while os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) < FIRST_FREE_DESCRIPTOR:
        pass
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _leave_mounts(needed: Sequence[str]) -> None:
    """A mount namespace of its own with no others: for each that it adds, bubblewrap reads the list of all mounts.

    Where that is not allowed, or the machine's own mounts could be touched by it, everything stays.
    """
    try:
        os.unshare(os.CLONE_NEWNS)
    except OSError:
        return
    if (pid := os.fork()) == 0:
        # A process of its own for this: ctypes would stay in the memory of every cell.
        try:
            _unmount_others(needed)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _unmount_others(needed: Sequence[str]) -> None:
    import ctypes

    mount, umount2 = (getattr(ctypes.CDLL(None), name) for name in ("mount", "umount2"))
    if mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None):
        return
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [line.split() for line in file]
    if any(field.startswith(b"shared:") for fields in mounts for field in fields[6:]):
        return  # what is unmounted here would be unmounted everywhere
    for fields in reversed(mounts):
        point = fields[4].decode("unicode_escape").encode("latin-1")
        if not _is_needed(os.fsdecode(point), needed):
            umount2(point, _MNT_DETACH)


def _is_needed(point: str, needed: Sequence[str]) -> bool:
    """Whether one of the paths lies on the mount, or above it."""
    folder = point.rstrip("/") + "/"
    return any(f"{path}/".startswith(folder) or (path.endswith("/") and folder.startswith(path)) for path in needed)


def main(needed_mounts: Sequence[str] = ()) -> None:
    """Fork a cell for each packet, until the daemon is gone."""
    os.setsid()
    prepare_process()
    if needed_mounts:
        _leave_mounts(needed_mounts)
    _write_optional("/proc/self/comm", "dante-keeper")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(CONTROL))
    os.close(CONTROL)
    os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    gc.collect()
    gc.freeze()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(control, MAX_CELL_BYTES, 1)
        if not packet:
            return
        # Else every job would have the line to its cell.
        os.set_inheritable(descriptors[0], False)
        line = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            _new_cell(control, line, json.loads(packet))
        line.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
