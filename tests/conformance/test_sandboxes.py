"""What the sandbox of the executor `process` shows to a job, and how it is started."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import Adoption, AttemptRefused, ExitStatus, SandboxKind
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.executors.sandbox import Bubblewrap
from dantegpu.daemon.workspace import Workspace
from tests.fixtures.executors import (
    TIMEOUT_SECONDS,
    Bench,
    ProcessKind,
    a_job,
    a_python_job,
    a_shell_job,
    needs,
    read_bytes,
)


async def test_numpy_can_be_imported(bubblewrap: Bench):
    status, text = await bubblewrap.run(a_job("python", "-c", "import numpy; print(numpy.arange(3).sum())"))
    assert (status.exit_code, text) == (0, "3\n")


async def test_a_job_dies_with_its_shim_and_counts_as_lost(bubblewrap: Bench):
    handle = await bubblewrap.start(a_shell_job("echo ready; sleep 600"))
    await bubblewrap.until_logged(handle, "ready")
    started = bubblewrap.workspace.attempt(handle.attempt_id).started
    os.kill(int(started.read_text().split()[0]), signal.SIGKILL)
    status = await asyncio.wait_for(bubblewrap.executor.wait(handle), TIMEOUT_SECONDS)
    assert status.lost
    assert (await bubblewrap.executor.stats(handle)).pids == 0


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


async def test_a_job_in_the_sandbox_sees_nothing_of_the_machine(bubblewrap: Bench, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    seed = bubblewrap.workspace.root / "machine.nk"
    seed.write_text("seed")
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    home = str(Path("~/.profile").expanduser())
    hidden = [str(secret), str(seed), home, "/etc/hostname.host", "/var/lib/dpkg/status", "/run/utmp"]
    handle = await bubblewrap.start(a_job("python3", "-c", PROBE, str(port), env={"HIDDEN": json.dumps(hidden)}))
    status = await bubblewrap.executor.wait(handle)
    server.close()
    text = bubblewrap.log(handle)
    assert status.exit_code == 0, text
    # Never the host's root: it would own /proc/sys and root's files.
    owner = (bubblewrap.workspace.attempt(handle.attempt_id).work / "f").stat().st_uid
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


async def test_variables_of_a_job_never_act_on_the_sandbox_itself(bubblewrap: Bench):
    """LD_PRELOAD would run the job's code as root if it reached the tools that build the bubblewrap."""
    script = "cat $(ls -d /proc/[0-9]*/environ) 2>/dev/null | tr '\\0' '\\n' | grep -c LD_LIBRARY_PATH=/work/evil"
    status, text = await bubblewrap.run(a_shell_job(script, env={"LD_LIBRARY_PATH": "/work/evil"}))
    assert status.exit_code == 0
    assert int(text) >= 1


async def test_secrets_in_variables_stand_on_no_command_line(bubblewrap: Bench):
    handle = await bubblewrap.start(a_shell_job("echo ready; sleep 600", env={"TOKEN": "hunter2-is-secret"}))
    await bubblewrap.until_logged(handle, "ready")
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"hunter2-is-secret" in read_bytes(path)]


async def test_starting_in_the_sandbox_is_fast(bubblewrap: Bench):
    """A bound against regressions on a busy machine; `dante bench latency` measures."""
    loop = asyncio.get_running_loop()
    samples: list[float] = []
    for _ in range(7):
        spec = a_job("true")
        handle = await bubblewrap.executor.prepare(spec)
        began = loop.time()
        await bubblewrap.executor.start(handle, spec)
        samples.append(loop.time() - began)
        await bubblewrap.executor.destroy(handle)
    assert sorted(samples)[3] < 0.1


async def test_attempts_one_after_the_other_share_a_cell_and_nothing_else(processes: Bench):
    """A cell with its groups is worth keeping; limits, counters and files of one attempt must not reach the next."""
    await needs(processes, "memory")
    hog = a_python_job("x = bytearray(400 << 20)", memory_bytes=64 << 20)
    first = await processes.executor.prepare(hog)
    await processes.executor.start(first, hog)
    assert (await processes.executor.wait(first)).oom_killed
    slots: list[int] = []
    while json.loads(first.data)["slot"] not in slots:
        # Two are kept ready, each perhaps with a sandbox that waits: which comes next is not said.
        spec = a_python_job("x = bytearray(100 << 20); raise SystemExit(3)")
        second = await processes.executor.prepare(spec)
        await processes.executor.start(second, spec)
        slots.append(json.loads(second.data)["slot"])
        assert await processes.executor.wait(second) == ExitStatus(3)
    assert len(slots) < 10
    # What is over stays as it was, and its end touches nobody else.
    third = await processes.start(a_shell_job("sleep 600"))
    used = await processes.executor.stats(third)
    assert (used.cpu_seconds or 0) < 0.2
    assert (used.memory_peak_bytes or 0) < 60 << 20
    assert (await processes.executor.wait(first)).oom_killed
    assert (await processes.executor.stats(first)).pids == 0
    await processes.executor.destroy(first)
    await processes.executor.destroy(first)
    assert await processes.executor.adopt(third) is Adoption.RUNNING
    assert (await processes.executor.stats(third)).pids >= 1


async def test_a_script_without_an_interpreter_and_a_folder_as_command(processes: Bench):
    spec = a_job("/work/run.sh" if processes.kind.isolates else "./run.sh", "there")
    folder = processes.workspace.attempt(spec.attempt_id)
    folder.create()
    (folder.work / "run.sh").write_text("echo hello $1\n")
    (folder.work / "run.sh").chmod(0o755)
    handle = await processes.start(spec)
    assert (await processes.executor.wait(handle)).exit_code == 0
    assert processes.log(handle) == "hello there\n"
    status, _ = await processes.run(a_job("/usr"))
    assert status.exit_code == 126


@pytest.mark.parametrize("network", [False, True])
async def test_only_what_a_job_without_a_network_had_is_used_again(short_dir: Path, network: bool):
    """By a socket it could have handed a descriptor of its folder or its log to somebody who outlives it."""
    bench = Bench(ProcessKind(SandboxKind.BUBBLEWRAP), short_dir / "data")
    bench.executor = ProcessExecutor(bench.workspace, sandbox=SandboxKind.BUBBLEWRAP, allow_network=True)
    await needs(bench, "pids")
    first = await bench.start(a_shell_job("echo mine", network=network))
    await bench.executor.wait(first)
    await bench.executor.destroy(first)
    spares = [path.name for path in (short_dir / "data" / "spare").iterdir()]
    assert spares == ([] if network else [str(first.attempt_id)])
    second = await bench.start(a_shell_job("ls -lA . $DANTE_OUTPUT; touch here $DANTE_OUTPUT/there"))
    assert (await bench.executor.wait(second)).exit_code == 0
    assert bench.log(second).split() == [".:", "total", "0", "/output:", "total", "0"]
    await bench.executor.destroy(second)
    assert list((short_dir / "data" / "spare").iterdir()) == []
    await bench.executor.close()
