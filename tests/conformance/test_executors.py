"""What every executor owes, run against each of them, and what the sandbox shows to a job."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptRefused,
    AttemptSpec,
    ExitStatus,
    Handle,
    SandboxKind,
    StopReason,
)
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.executors.sandbox import Bubblewrap
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.ids import AttemptId

TIMEOUT_SECONDS = 20.0
REQUIRE_ALL = os.environ.get("DANTE_TEST_REQUIRE_ALL") == "1"


class Bench:
    """An executor with its folder, and the two steps that nearly every test makes."""

    def __init__(self, executor: ProcessExecutor, workspace: Workspace, kind: SandboxKind) -> None:
        self.executor = executor
        self.kind = kind
        self.workspace = workspace

    async def start(self, spec: AttemptSpec) -> Handle:
        handle = await self.executor.prepare(spec)
        await self.executor.start(handle, spec)
        return handle

    async def run(self, spec: AttemptSpec) -> tuple[ExitStatus, str]:
        handle = await self.start(spec)
        status = await asyncio.wait_for(self.executor.wait(handle), TIMEOUT_SECONDS)
        text = self.log(handle)
        await self.executor.destroy(handle)
        return status, text

    def log(self, handle: Handle) -> str:
        return self.workspace.attempt(handle.attempt_id).log.read_text()

    async def until_logged(self, handle: Handle, text: str) -> str:
        return await until(lambda: self.log(handle) if text in self.log(handle) else None)


async def until[T](condition: Callable[[], T | None]) -> T:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not (result := condition()):
            await asyncio.sleep(0.005)
    return result


def a_job(*command: str, **fields: object) -> AttemptSpec:
    return AttemptSpec(AttemptId.new(), command, **fields)  # pyright: ignore[reportArgumentType]


def a_shell_job(script: str, **fields: object) -> AttemptSpec:
    return a_job("sh", "-c", textwrap.dedent(script), **fields)


def a_python_job(script: str, **fields: object) -> AttemptSpec:
    return a_job("python3", "-c", textwrap.dedent(script), **fields)


def make_executor(folder: Path, kind: SandboxKind) -> ProcessExecutor:
    return ProcessExecutor(Workspace(folder), sandbox=kind)


async def a_bench(folder: Path, kind: SandboxKind) -> AsyncIterator[Bench]:
    executor = make_executor(folder, kind)
    capabilities = await executor.probe()
    if capabilities.sandbox is not kind:
        if REQUIRE_ALL:
            pytest.fail(f"no bubblewrap sandbox here: {capabilities.missing}")
        pytest.skip(f"left out, no bubblewrap sandbox here: {capabilities.missing['sandbox']}")
    yield Bench(executor, Workspace(folder), kind)
    await executor.sweep(set())
    await executor.close()
    assert not Workspace(folder).attempts()


@pytest.fixture(params=[SandboxKind.BUBBLEWRAP, SandboxKind.NONE], ids=["process-bubblewrap", "process-none"])
def kind(request: pytest.FixtureRequest) -> SandboxKind:
    return request.param


@pytest.fixture
async def bench(tmp_path: Path, kind: SandboxKind) -> AsyncIterator[Bench]:
    async for bench in a_bench(tmp_path / "data", kind):
        yield bench


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Bench]:
    async for bench in a_bench(tmp_path / "data", SandboxKind.BUBBLEWRAP):
        yield bench


async def test_output_and_exit_code_are_those_of_the_command(bench: Bench):
    status, text = await bench.run(a_shell_job("echo out; echo err >&2; exit 3"))
    assert status == ExitStatus(3)
    assert text == "out\nerr\n"


async def test_the_job_sees_its_variables_and_none_of_the_daemon(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAEMON_SECRET", "hunter2")
    quoted = 'it\'s $HOME `x` "y" \\ \n end'
    _, text = await bench.run(
        a_python_job("import os, json; print(json.dumps(dict(os.environ)))", env={"WORD": quoted, "HOME": "/tmp/h"})
    )
    seen = json.loads(text)
    assert seen["WORD"] == quoted
    assert seen["HOME"] == "/tmp/h"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    allowed = {"PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "PYTHONUNBUFFERED", "WORD", "DANTE_OUTPUT"}
    devices = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}
    assert set(seen) - allowed - devices <= {"DANTE_ATTEMPT_ID", "PWD", "OLDPWD", "LC_CTYPE"}


async def test_only_the_three_standard_descriptors_are_open(bench: Bench):
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        _, text = await bench.run(a_python_job("import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"))
    finally:
        os.close(inherited)
    assert text == "[0, 1, 2]\n"


async def test_numpy_can_be_imported(bench: Bench):
    status, text = await bench.run(a_job("python", "-c", "import numpy; print(numpy.arange(3).sum())"))
    assert (status.exit_code, text) == (0, "3\n")


async def test_files_are_read_from_work_and_left_in_output(bench: Bench):
    spec = a_shell_job('cp input.txt "$DANTE_OUTPUT/copy.txt"')
    folder = bench.workspace.attempt(spec.attempt_id)
    folder.create()
    (folder.work / "input.txt").write_text("data")
    handle = await bench.start(spec)
    assert (await bench.executor.wait(handle)).exit_code == 0
    assert (folder.output / "copy.txt").read_text() == "data"


async def test_a_missing_command_ends_with_127(bench: Bench):
    status, text = await bench.run(a_job("no-such-command"))
    assert status.exit_code == 127
    assert "not found" in text


async def test_a_signal_is_told_apart(bench: Bench):
    status, _ = await bench.run(a_shell_job("kill -SEGV $$"))
    assert status.signal == signal.SIGSEGV


async def test_a_large_environment_and_command_arrive_whole(bench: Bench):
    spec = a_python_job("import os, sys; print(len(os.environ['BIG']), len(sys.argv[-1]))", env={"BIG": "'" * 100_000})
    spec = AttemptSpec(spec.attempt_id, (*spec.command, "x" * 100_000), spec.env)
    assert (await bench.run(spec))[1] == "100000 100000\n"


async def test_a_job_over_its_memory_limit_is_killed_alone_and_said_so(bench: Bench):
    await needs(bench, "memory")
    bystander = await bench.start(a_shell_job("sleep 60"))
    status, _ = await bench.run(a_python_job("x = bytearray(400 << 20)", memory_bytes=64 << 20))
    assert status.oom_killed
    assert status.exit_code == 137
    assert await bench.executor.adopt(bystander) is Adoption.RUNNING
    await bench.executor.stop(bystander, grace_seconds=0, reason=StopReason.REQUESTED)


async def test_a_fork_bomb_stops_at_the_pids_limit_and_nothing_stays(bench: Bench):
    await needs(bench, "pids")
    script = """
        import os, time
        children = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                children += 1
        except BlockingIOError:
            print("refused after", children, flush=True)
            time.sleep(60)
    """
    handle = await bench.start(a_python_job(script, pids_max=30))
    text = await bench.until_logged(handle, "refused after")
    assert 20 <= int(text.split()[-1]) <= 40
    await bench.executor.stop(handle, grace_seconds=0, reason=StopReason.REQUESTED)
    assert (await bench.executor.stats(handle)).pids == 0


async def test_a_job_gets_no_more_than_its_share_of_a_processor(bench: Bench):
    await needs(bench, "cpu")
    script = """
        import time
        end = time.monotonic() + 1
        while time.monotonic() < end: pass
        print(time.process_time())
    """
    _, text = await bench.run(a_python_job(script, cpu_milli=300))
    assert float(text) < 0.5


async def test_sigterm_reaches_the_job_which_may_end_by_itself(bench: Bench):
    handle = await bench.start(a_shell_job("trap 'echo saved; exit 7' TERM; echo ready; while :; do sleep 0.01; done"))
    await bench.until_logged(handle, "ready")
    await bench.executor.stop(handle, grace_seconds=TIMEOUT_SECONDS, reason=StopReason.TIMED_OUT)
    status = await bench.executor.wait(handle)
    assert "saved" in bench.log(handle)
    assert status.exit_code == 7
    assert status.timed_out


async def test_a_job_that_ignores_sigterm_is_killed_after_the_grace(bench: Bench):
    handle = await bench.start(a_shell_job("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
    await bench.until_logged(handle, "ready")
    await bench.executor.stop(handle, grace_seconds=0.1, reason=StopReason.REQUESTED)
    status = await bench.executor.wait(handle)
    assert (status.exit_code, status.stop_reason) == (137, StopReason.REQUESTED)
    assert (await bench.executor.stats(handle)).pids == 0


async def test_a_child_that_was_forked_twice_dies_with_the_job(bench: Bench):
    script = """
        import os, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
    """
    spec = a_python_job(script)
    status, _ = await bench.run(spec)
    assert status.exit_code == 0
    mark = str(spec.attempt_id).encode()
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if mark in _read(path)]


async def test_an_attempt_starts_once_however_often_it_is_asked_to(bench: Bench, kind: SandboxKind):
    spec = a_shell_job("echo started; sleep 60")
    handle = await bench.start(spec)
    other = make_executor(bench.workspace.root, kind)
    assert await other.prepare(spec) == handle
    with pytest.raises(AlreadyStarted):
        await other.start(handle, spec)
    with pytest.raises(AlreadyStarted):
        await bench.executor.start(handle, spec)
    await bench.until_logged(handle, "started")
    await other.close()
    await bench.executor.stop(handle, grace_seconds=0, reason=StopReason.REQUESTED)
    assert bench.log(handle) == "started\n"


async def test_two_daemons_that_start_it_at_the_same_moment_start_it_once(bench: Bench, kind: SandboxKind):
    spec = a_shell_job("echo started; sleep 60")
    handle = await bench.executor.prepare(spec)
    other = make_executor(bench.workspace.root, kind)
    await other.probe()
    results = await asyncio.gather(
        bench.executor.start(handle, spec), other.start(handle, spec), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["AlreadyStarted", "NoneType"]
    await bench.until_logged(handle, "started")
    await other.close()
    await bench.executor.adopt(handle)
    await bench.executor.stop(handle, grace_seconds=0, reason=StopReason.REQUESTED)
    assert bench.log(handle) == "started\n"


DAEMON = """
import asyncio, sys
from pathlib import Path
from dantegpu.daemon.executors.base import AttemptSpec, SandboxKind
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.ids import AttemptId

async def main(folder, kind, attempt_id, start, *command):
    executor = ProcessExecutor(Workspace(Path(folder)), sandbox=SandboxKind(kind))
    spec = AttemptSpec(AttemptId.parse(attempt_id), command)
    handle = await executor.prepare(spec)
    if start == "start":
        await executor.start(handle, spec)
    print(handle.dumps(), flush=True)
    await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


def a_daemon_that_is_killed(bench: Bench, kind: SandboxKind, spec: AttemptSpec, *, start: bool) -> Handle:
    """Prepare, and start if asked to, in a process of its own, which then gets SIGKILL."""
    arguments = [str(bench.workspace.root), kind.value, str(spec.attempt_id), "start" if start else "-", *spec.command]
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, *arguments], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    handle = Handle.loads(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    return handle


async def test_a_job_outlives_its_daemon_and_the_next_one_gets_its_exit_code(bench: Bench, kind: SandboxKind):
    spec = a_shell_job("echo one; until [ -e go ]; do sleep 0.01; done; echo two; exit 5")
    handle = a_daemon_that_is_killed(bench, kind, spec, start=True)
    assert await bench.executor.adopt(handle) is Adoption.RUNNING
    await bench.until_logged(handle, "one")
    (bench.workspace.attempt(spec.attempt_id).work / "go").touch()
    assert await bench.executor.wait(handle) == ExitStatus(5)
    assert bench.log(handle) == "one\ntwo\n"


async def test_a_job_that_ended_while_no_daemon_ran_keeps_its_exit_code(bench: Bench, kind: SandboxKind):
    spec = a_shell_job("exit 6")
    handle = a_daemon_that_is_killed(bench, kind, spec, start=True)
    await until(bench.workspace.attempt(spec.attempt_id).exit.exists)
    assert await bench.executor.adopt(handle) in (Adoption.ENDED, Adoption.RUNNING)
    assert await bench.executor.wait(handle) == ExitStatus(6)


async def test_an_adopted_job_can_be_stopped(bench: Bench, kind: SandboxKind):
    spec = a_shell_job("trap 'exit 8' TERM; echo ready; while :; do sleep 0.01; done")
    handle = a_daemon_that_is_killed(bench, kind, spec, start=True)
    await bench.executor.adopt(handle)
    await bench.until_logged(handle, "ready")
    await bench.executor.stop(handle, grace_seconds=TIMEOUT_SECONDS, reason=StopReason.REQUESTED)
    assert (await bench.executor.wait(handle)).exit_code == 8


async def test_what_was_only_prepared_is_started_by_the_next_daemon(bench: Bench, kind: SandboxKind):
    spec = a_shell_job("echo hello")
    handle = a_daemon_that_is_killed(bench, kind, spec, start=False)
    assert await bench.executor.adopt(handle) is Adoption.NOT_STARTED
    await bench.executor.start(handle, spec)
    assert (await bench.executor.wait(handle)).exit_code == 0
    assert bench.log(handle) == "hello\n"


async def test_a_job_dies_with_its_shim_and_counts_as_lost(bench: Bench):
    handle = await bench.start(a_shell_job("echo ready; sleep 600"))
    await bench.until_logged(handle, "ready")
    started = bench.workspace.attempt(handle.attempt_id).started
    os.kill(int(started.read_text().split()[0]), signal.SIGKILL)
    status = await asyncio.wait_for(bench.executor.wait(handle), TIMEOUT_SECONDS)
    assert status.lost
    assert (await bench.executor.stats(handle)).pids == 0


async def test_the_sweep_leaves_known_attempts_and_removes_the_rest(bench: Bench):
    kept = await bench.start(a_shell_job("sleep 600"))
    unknown = await bench.start(a_shell_job("sleep 600"))
    await bench.executor.sweep({kept.attempt_id})
    assert [folder.root.name for folder in bench.workspace.attempts()] == [str(kept.attempt_id)]
    assert await bench.executor.adopt(kept) is Adoption.RUNNING
    assert not bench.workspace.attempt(unknown.attempt_id).root.exists()


async def test_destroying_twice_is_harmless_and_leaves_no_folder(bench: Bench):
    spec = a_shell_job("mkdir a; touch a/b; chmod 000 a; sleep 600")
    handle = await bench.start(spec)
    await bench.executor.destroy(handle)
    await bench.executor.destroy(handle)
    assert not bench.workspace.attempt(spec.attempt_id).root.exists()


async def test_a_running_job_is_measured(bench: Bench):
    await needs(bench, "memory")
    handle = await bench.start(a_python_job("x = bytearray(50 << 20); print('ready'); import time; time.sleep(600)"))
    await bench.until_logged(handle, "ready")
    stats = await bench.executor.stats(handle)
    assert (stats.memory_bytes or 0) > 50 << 20
    assert stats.pids >= 1
    assert stats.cpu_seconds is not None


async def test_network_is_refused_where_the_provider_gives_none(bench: Bench):
    with pytest.raises(AttemptRefused, match="no network"):
        await bench.executor.prepare(a_job("true", network=True))


async def test_without_bubblewrap_the_machine_says_so_and_refuses(tmp_path: Path):
    empty = tmp_path / "bin"
    empty.mkdir()
    found = Bubblewrap.find(str(empty))
    assert isinstance(found, str)
    executor = ProcessExecutor(Workspace(tmp_path / "data"), sandbox=SandboxKind.BUBBLEWRAP, search_path=str(empty))
    capabilities = await executor.probe()
    assert capabilities.sandbox is SandboxKind.NONE
    assert "apt-get install bubblewrap" in capabilities.missing["sandbox"]
    with pytest.raises(AttemptRefused, match="no sandbox"):
        await executor.prepare(a_job("true"))
    await executor.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def needs(bench: Bench, limit: str) -> None:
    capabilities = await bench.executor.probe()
    if limit not in capabilities.limits:
        if REQUIRE_ALL:
            pytest.fail(f"no {limit} limit here: {capabilities.missing[limit]}")
        pytest.skip(f"left out: {capabilities.missing[limit]}")


SHOWN_IN_ROOT = {
    "bin", "dev", "etc", "home", "lib", "lib32", "lib64", "opt", "output", "proc", "root", "run", "sbin", "sys", "tmp",
    "usr", "var", "work",
}  # fmt: skip
SHOWN_IN_DEV = {
    "console", "core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
    "urandom", "zero",
}  # fmt: skip
PROBE = """
import ctypes, json, os, socket, subprocess, sys
from pathlib import Path

def attempt(action):
    try:
        return repr(action())
    except OSError as error:
        return type(error).__name__ + " " + str(error.errno)

def call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    return result if result >= 0 else -ctypes.get_errno()

status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\\t" in line)
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "cwd": os.getcwd(),
    "uid_map": Path("/proc/self/uid_map").read_text().split(),
    "namespaces": {n: os.readlink("/proc/self/ns/" + n) for n in ("user", "pid", "net", "ipc", "uts", "mnt", "cgroup")},
    "capabilities": [status[k] for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "hostname": socket.gethostname(),
    "interfaces": sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else [],
    "routes": len(Path("/proc/net/route").read_text().splitlines()) - 1,
    "connect": attempt(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1)),
    "processes": sorted(int(n) for n in os.listdir("/proc") if n.isdigit()),
    "commands": [Path("/proc/" + n + "/cmdline").read_bytes().decode() for n in os.listdir("/proc") if n.isdigit()],
    "write": {p: attempt(lambda p=p: open(p, "a")) for p in (
        "/new", "/etc/new", "/etc/passwd", "/usr/new", "/dev/new", "/var/new", "/home/new", "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", sys.prefix + "/new")},
    "writable": {p: attempt(lambda p=p: open(p, "w")) for p in ("/work/f", "/output/f", "/tmp/f", "/dev/shm/f")},
    "root": sorted(os.listdir("/")), "dev": sorted(os.listdir("/dev")),
    "homes": {p: attempt(lambda p=p: sorted(os.listdir(p))) for p in ("/root", "/home")},
    "hidden": {p: attempt(lambda p=p: open(p).read()) for p in json.loads(os.environ["HIDDEN"])},
    "shadow": attempt(lambda: open("/etc/shadow").read()),
    "environ_of_init": attempt(lambda: open("/proc/1/environ").read()),
    "unshare": call(272, 0x10000000), "mount": call(165, 0, 0, 0, 0, 0), "keyctl": call(250, 0, 0),
    "setuid": attempt(lambda: os.setuid(0)),
    "su": subprocess.run(["su", "-c", "id -u"], capture_output=True, stdin=subprocess.DEVNULL).returncode,
    "mknod": attempt(lambda: os.mknod("/work/sda", 0o60600, os.makedev(8, 0))),
    "chown": attempt(lambda: os.chown("/work/f", 0, 0)),
}))
"""


async def test_a_job_in_the_sandbox_sees_nothing_of_the_machine(sandbox: Bench, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    seed = sandbox.workspace.root / "machine.nk"
    seed.write_text("seed")
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    home = str(Path("~/.profile").expanduser())
    hidden = [str(secret), str(seed), home, "/etc/hostname.host", "/var/lib/dpkg/status", "/run/utmp"]
    handle = await sandbox.start(a_job("python3", "-c", PROBE, str(port), env={"HIDDEN": json.dumps(hidden)}))
    status = await sandbox.executor.wait(handle)
    server.close()
    text = sandbox.log(handle)
    assert status.exit_code == 0, text
    # Never the host's root: it would own /proc/sys and root's files.
    owner = (sandbox.workspace.attempt(handle.attempt_id).work / "f").stat().st_uid
    assert owner == os.geteuid() if os.geteuid() else owner > 0
    seen = json.loads(text.splitlines()[-1])
    assert (seen["uid"], seen["gid"], seen["cwd"]) == (1000, 1000, "/work")
    assert seen["uid_map"][0] == "1000"
    assert seen["uid_map"][2] == "1"
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in seen["namespaces"]}
    assert [name for name, own in ours.items() if seen["namespaces"][name] == own] == []
    assert set(seen["capabilities"]) == {"0000000000000000"}
    assert (seen["no_new_privs"], seen["seccomp"]) == ("1", "2")
    assert seen["hostname"] == "dante"
    assert seen["interfaces"] == []
    assert seen["routes"] == 0
    assert seen["connect"] == "ConnectionRefusedError 111"
    assert max(seen["processes"]) < 100
    assert not [command for command in seen["commands"] if str(tmp_path) in command]
    assert [path for path, result in seen["write"].items() if "Error" not in result] == []
    assert [path for path, result in seen["writable"].items() if "Error" in result] == []
    # The daemon's own Python is shown where it lies, wherever that is.
    shown = [Path(prefix).parts for prefix in (sys.prefix, sys.base_prefix)]
    assert set(seen["root"]) <= SHOWN_IN_ROOT | {parts[1] for parts in shown}
    assert set(seen["dev"]) <= SHOWN_IN_DEV
    assert seen["homes"]["/home"] == repr(sorted({parts[2] for parts in shown if parts[1] == "home"}))
    assert {path: result.split()[0] for path, result in seen["hidden"].items()} == dict.fromkeys(
        hidden, "FileNotFoundError"
    )
    for name in ("shadow", "environ_of_init", "setuid", "mknod", "chown"):
        assert "Error" in seen[name], name
    assert (seen["unshare"], seen["mount"], seen["keyctl"]) == (-1, -1, -1)
    assert seen["su"] != 0


async def test_variables_of_a_job_never_act_on_the_sandbox_itself(sandbox: Bench):
    """LD_PRELOAD would run the job's code as root if it reached the tools that build the sandbox."""
    script = "cat $(ls -d /proc/[0-9]*/environ) 2>/dev/null | tr '\\0' '\\n' | grep -c LD_LIBRARY_PATH=/work/evil"
    status, text = await sandbox.run(a_shell_job(script, env={"LD_LIBRARY_PATH": "/work/evil"}))
    assert status.exit_code == 0
    assert int(text) >= 1


async def test_secrets_in_variables_stand_on_no_command_line(sandbox: Bench):
    handle = await sandbox.start(a_shell_job("echo ready; sleep 600", env={"TOKEN": "hunter2-is-secret"}))
    await sandbox.until_logged(handle, "ready")
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"hunter2-is-secret" in _read(path)]


async def test_starting_in_the_sandbox_is_fast(sandbox: Bench):
    """A bound against regressions on a busy machine; `dante bench latency` measures."""
    loop = asyncio.get_running_loop()
    samples: list[float] = []
    for _ in range(7):
        spec = a_job("true")
        handle = await sandbox.executor.prepare(spec)
        began = loop.time()
        await sandbox.executor.start(handle, spec)
        samples.append(loop.time() - began)
        await sandbox.executor.destroy(handle)
    assert sorted(samples)[3] < 0.1


async def test_attempts_one_after_the_other_share_a_cell_and_nothing_else(bench: Bench):
    """A cell with its groups is worth keeping; limits, counters and files of one attempt must not reach the next."""
    await needs(bench, "memory")
    hog = a_python_job("x = bytearray(400 << 20)", memory_bytes=64 << 20)
    first = await bench.executor.prepare(hog)
    await bench.executor.start(first, hog)
    assert (await bench.executor.wait(first)).oom_killed
    spec = a_python_job("x = bytearray(100 << 20); raise SystemExit(3)")
    second = await bench.executor.prepare(spec)
    await bench.executor.start(second, spec)
    assert json.loads(second.data)["slot"] == json.loads(first.data)["slot"]
    assert await bench.executor.wait(second) == ExitStatus(3)
    # What is over stays as it was, and its end touches nobody else.
    third = await bench.start(a_shell_job("sleep 600"))
    used = await bench.executor.stats(third)
    assert (used.cpu_seconds or 0) < 0.2
    assert (used.memory_peak_bytes or 0) < 60 << 20
    assert (await bench.executor.wait(first)).oom_killed
    assert (await bench.executor.stats(first)).pids == 0
    await bench.executor.destroy(first)
    await bench.executor.destroy(first)
    assert await bench.executor.adopt(third) is Adoption.RUNNING
    assert (await bench.executor.stats(third)).pids >= 1


async def test_a_script_without_an_interpreter_and_a_folder_as_command(bench: Bench):
    spec = a_job("/work/run.sh" if bench.kind is SandboxKind.BUBBLEWRAP else "./run.sh", "there")
    folder = bench.workspace.attempt(spec.attempt_id)
    folder.create()
    (folder.work / "run.sh").write_text("echo hello $1\n")
    (folder.work / "run.sh").chmod(0o755)
    handle = await bench.start(spec)
    assert (await bench.executor.wait(handle)).exit_code == 0
    assert bench.log(handle) == "hello there\n"
    status, _ = await bench.run(a_job("/usr"))
    assert status.exit_code == 126


async def test_signals_that_python_ignores_are_not_ignored_in_a_job(bench: Bench):
    _, text = await bench.run(a_shell_job("grep -E 'Sig(Ign|Blk)' /proc/self/status"))
    # Signals 32 and 33 are the C library's own.
    assert [int(line.split()[1], 16) & 0x7FFFFFFF for line in text.splitlines()] == [0, 0]
