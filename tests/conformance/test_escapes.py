"""Jobs that try to get out, or to take the machine down with them: nothing outside changes.

In the sandbox of processes and in containers.
"""

import json
import os
from pathlib import Path
from typing import Any

from dantegpu.daemon.containers import choose_containers
from dantegpu.daemon.executors.base import StopReason
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.workspace import Workspace, output_files
from tests.fixtures.containers import REMAPPED_UID
from tests.fixtures.executors import ACCEPTED_ESCAPES, Bench, ContainerKind, a_python_job, a_shell_job

PROBE = """
import ctypes, json, os, socket
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
    "uid": os.getuid(), "maps": Path("/proc/self/uid_map").read_text().split(),
    "namespaces": {n: os.readlink("/proc/self/ns/" + n) for n in ("user", "pid", "net", "ipc", "uts", "mnt")},
    "capabilities": [status[k] for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "routes": len(Path("/proc/net/route").read_text().splitlines()) - 1,
    "metadata": attempt(lambda: socket.create_connection(("169.254.169.254", 80), 1)),
    "private": attempt(lambda: socket.create_connection(("10.0.0.1", 80), 1)),
    "write": {p: attempt(lambda p=p: open(p, "a")) for p in (
        "/new", "/etc/passwd", "/usr/new", "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern",
        "/proc/sys/vm/overcommit_memory", "/sys/kernel/uevent_helper", "/proc/1/oom_score_adj_")},
    "read": {p: attempt(lambda p=p: open(p, "rb").read(1)) for p in (
        "/proc/kcore", "/dev/mem", "/dev/vda", "/etc/shadow")},
    "writable": {p: attempt(lambda p=p: open(p, "w")) for p in ("/work/f", "/output/f", "/tmp/f", "/dev/shm/f")},
    "devices": sorted(os.listdir("/dev")),
    "unshare": call(272, 0x10000000), "mount": call(165, 0, 0, 0, 0, 0), "keyctl": call(250, 0, 0),
    "setuid": attempt(lambda: os.setuid(0)) if os.getuid() else "Error",
    "mknod": attempt(lambda: os.mknod("/work/sda", 0o60600, os.makedev(8, 0))),
    "chown": attempt(lambda: os.chown("/work/f", 0, 0)),
}))
"""
DEVICES = {
    "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
    "tty", "urandom", "zero",
}  # fmt: skip


async def test_every_line_of_the_sandboxs_list_holds(sandbox: Bench):
    await list_holds(sandbox)


async def test_the_list_holds_where_docker_maps_users_whose_root_is_nobody_here(remapped: Bench, tmp_path: Path):
    seen, owner = await list_holds(remapped)
    assert seen["maps"] == ["0", str(REMAPPED_UID), "65536"]
    assert owner == REMAPPED_UID + seen["uid"]
    assert isinstance(remapped.kind, ContainerKind)
    settings = DaemonSettings.load(
        {"containers": str(remapped.kind.socket), "accept_escapes": ",".join(ACCEPTED_ESCAPES)}
    )
    found = await choose_containers(settings, Workspace(tmp_path))
    assert found.engine == "docker"
    assert f"user namespace from uid {REMAPPED_UID} (userns-remap)" in found.about
    assert found.executor is not None
    await found.executor.close()


async def list_holds(sandbox: Bench) -> tuple[dict[str, Any], int]:
    """What the probe has seen, and who its files belong to on the machine."""
    handle = await sandbox.start(a_python_job(PROBE))
    status = await sandbox.executor.wait(handle)
    text = sandbox.log(handle)
    assert status.exit_code == 0, text
    seen = json.loads(text.splitlines()[-1])
    owner = (sandbox.workspace.attempt(handle.attempt_id).work / "f").stat().st_uid
    assert owner == os.geteuid() if os.geteuid() else owner > 0
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in seen["namespaces"]}
    same = {name for name, own in ours.items() if seen["namespaces"][name] == own}
    # Docker without userns-remap makes no user namespace: its jobs are an unprivileged user of the machine instead.
    assert same <= {"user"}
    assert "user" not in same or seen["uid"] == owner
    assert set(seen["capabilities"]) == {"0000000000000000"}
    assert (seen["no_new_privs"], seen["seccomp"]) == ("1", "2")
    assert seen["routes"] == 0
    assert "Error" in seen["metadata"]
    assert "Error" in seen["private"]
    assert [path for path, result in seen["write"].items() if "Error" not in result] == []
    assert [path for path, result in seen["read"].items() if "Error" not in result] == []
    assert [path for path, result in seen["writable"].items() if "Error" in result] == []
    assert set(seen["devices"]) <= DEVICES
    assert (seen["unshare"], seen["mount"], seen["keyctl"]) == (-1, -1, -1)
    assert [name for name in ("setuid", "mknod", "chown") if "Error" not in seen[name]] == []
    return seen, owner


async def test_links_that_a_job_leaves_lead_nobody_outside(sandbox: Bench, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    script = f"""
        ln -s {secret} "$DANTE_OUTPUT/secret"; ln -s /dev/zero "$DANTE_OUTPUT/device"; ln -s / "$DANTE_OUTPUT/root"
        ln -s {secret} /work/secret; mkdir /work/a; chmod 000 /work/a; echo fine >"$DANTE_OUTPUT/real"
    """
    handle = await sandbox.start(a_shell_job(script))
    assert (await sandbox.executor.wait(handle)).exit_code == 0
    output = sandbox.workspace.attempt(handle.attempt_id).output
    assert [file.path for file in output_files(output, max_files=10, max_bytes=100)] == ["real"]
    await sandbox.executor.destroy(handle)
    assert secret.read_text() == "hunter2"


async def test_a_job_that_fills_its_temporary_folders_and_memory_ends_alone(sandbox: Bench):
    script = "cat /dev/zero >/tmp/fill; cat /dev/zero >/dev/shm/fill; wc -c /tmp/fill /dev/shm/fill | tail -n 1"
    status, text = await sandbox.run(a_shell_job(script, tmp_bytes=4 << 20, memory_bytes=256 << 20))
    assert status.exit_code == 0
    assert int(text.split()[-2]) == 8 << 20


async def test_a_flood_of_output_and_deaf_ears_end_with_the_first_kill(sandbox: Bench):
    handle = await sandbox.start(a_shell_job("trap '' TERM; echo ready; while :; do echo flood; done"))
    await sandbox.until_logged(handle, "ready")
    await sandbox.executor.stop(handle, grace_seconds=0, reason=StopReason.DISK_LIMIT)
    status = await sandbox.executor.wait(handle)
    assert (status.exit_code, status.stop_reason) == (137, StopReason.DISK_LIMIT)
    assert (await sandbox.executor.stats(handle)).pids == 0
