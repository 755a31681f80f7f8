"""What a Slurm job runs on its node: one attempt, in the sandbox of the executor `process`.

`python -I -m dantegpu.daemon.executors.slurm.node SITE_FOLDER ATTEMPT_FOLDER`, with both folders, and this Python, on a
file system that the cluster's machines share. The sandbox is built here and not by the daemon, because its parts
(bubblewrap, /etc, device nodes) are the node's. The attempt's folder then holds, as it would on the daemon's machine,
`started`, `output.log` and `exit`; besides, `running` or `failed`, `oom` and `stats.json`.

SIGTERM goes on to the job (as the signal that the file `notice` names, if there is one); SIGUSR2 kills it, and so does
the end of its lease (see `fence`). Slurm's own signals reach all processes, so the sandbox ends with the first of them.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dantegpu.daemon.executors import cgroup, seccomp
from dantegpu.daemon.executors.base import AttemptRefused, AttemptSpec, DeviceGrant, SandboxKind, StopReason
from dantegpu.daemon.executors.cells import Launch
from dantegpu.daemon.executors.keeper import CellProcess, prepare_process
from dantegpu.daemon.executors.processes import descendants, disk_bytes, handlers, process_info, signal_processes
from dantegpu.daemon.executors.sandbox import Bubblewrap, Layout, PythonRuntime, sandboxed, unsandboxed, write_etc
from dantegpu.daemon.executors.slurm.fence import LeaseWatch
from dantegpu.daemon.workspace import AttemptFolder
from dantegpu.domain.ids import AttemptId

NOTICE = "notice"
SANDBOX_PIDS = 10
CELL_MEMORY_BYTES = 16 << 20
FIRST_SAMPLES_SECONDS = 0.5
SAMPLE_SECONDS = 5.0
YOUNG_SECONDS = 5.0
_SLURM_GROUP = re.compile(r"(^|/)(system\.slice/[^/]*slurm|slurm)[^/]*/")
_LIMITS = ("cpu", "memory", "pids")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Order:
    """What the daemon asks of the node; `order.json` in the attempt's folder, which the job never sees."""

    spec: AttemptSpec
    sandbox: SandboxKind
    uid: int
    gpus: int
    """How many real ones; which of them is up to Slurm."""
    leased: tuple[int, ...] = ()
    """Their indexes, as the platform numbers them."""
    trial: bool = False
    """Only to find out what works here: told in `capabilities.json`."""
    leases: str = ""
    """The file in which the daemon renews its leases; empty: it has none."""

    def dumps(self) -> str:
        spec = self.spec
        simulated = [device.model for device in spec.devices if device.simulated]
        return json.dumps({
            "attempt_id": str(spec.attempt_id), "command": spec.command, "env": dict(spec.env),
            "cpu_milli": spec.cpu_milli, "memory_bytes": spec.memory_bytes, "pids_max": spec.pids_max,
            "tmp_bytes": spec.tmp_bytes, "network": spec.network, "working_dir": spec.working_dir,
            "shm_bytes": spec.shm_bytes, "max_seconds": spec.max_seconds,
            "checkpoint": spec.checkpoint, "sandbox": self.sandbox.value,
            "uid": self.uid, "gpus": self.gpus, "leased": self.leased, "simulated": simulated, "trial": self.trial,
            "leases": self.leases,
        })  # fmt: skip

    @classmethod
    def loads(cls, text: str) -> "Order":
        raw: dict[str, Any] = json.loads(text)
        simulated = tuple(DeviceGrant("", model, index, simulated=True) for index, model in enumerate(raw["simulated"]))
        spec = AttemptSpec(
            AttemptId.parse(raw["attempt_id"]), tuple(raw["command"]), raw["env"], cpu_milli=raw["cpu_milli"],
            memory_bytes=raw["memory_bytes"], pids_max=raw["pids_max"], tmp_bytes=raw["tmp_bytes"],
            network=raw["network"], devices=simulated, working_dir=raw["working_dir"], shm_bytes=raw["shm_bytes"],
            max_seconds=raw["max_seconds"], checkpoint=raw["checkpoint"],
        )  # fmt: skip
        return cls(
            spec, SandboxKind(raw["sandbox"]), raw["uid"], raw["gpus"], tuple(raw["leased"]), raw["trial"],
            raw.get("leases", ""),
        )  # fmt: skip


class NodeCell(CellProcess):
    """A cell for one attempt: what it would tell the daemon becomes a file."""

    def __init__(self, folder: AttemptFolder, groups: cgroup.Cgroup) -> None:
        super().__init__(None, [str(path) for path in groups.procs_files])
        self._folder = folder
        self._groups_here = groups
        self._session = os.getsid(0)
        self._samples = 0
        self._began = time.monotonic()
        self._killed = False
        self._fenced = False
        self._oom_kills = groups.oom_kills()

    def say(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word in ("running", "failed"):
            write_whole(self._folder.root / word, rest)

    def listen(self) -> None:
        """Signals from now on; a system call that one interrupts goes on by itself afterwards."""
        for number, handler in (
            (signal.SIGTERM, self._terminate), (signal.SIGUSR2, self._kill), (signal.SIGALRM, self._sample),
        ):  # fmt: skip
            signal.signal(number, handler)
        signal.setitimer(signal.ITIMER_REAL, FIRST_SAMPLES_SECONDS)

    @property
    def killed(self) -> bool:
        return self._killed

    def _terminate(self, *_: object) -> None:
        """As in every executor: the job's processes, not those of the sandbox around it."""
        jobs, notice = self._jobs(), self._folder.root / NOTICE
        if notice.exists():
            number = signal.Signals[notice.read_text()]
            signal_processes(handlers(jobs, number) or jobs, self._jobs(), number)
        else:
            signal_processes(jobs, self._jobs(), signal.SIGTERM)

    def _kill(self, *_: object) -> None:
        self._killed = True
        below = descendants(os.getpid())
        signal_processes(below, descendants(os.getpid()), signal.SIGKILL)

    def fence(self) -> None:
        """Its lease is over. Called in a thread, and touches no file that the cluster shares: those may hang."""
        self._fenced = True
        self._kill()

    def tell_fenced(self) -> None:
        """As a daemon that fences an attempt does, unless one was about to stop it for another reason."""
        if self._fenced and not self._folder.stop.exists():
            write_whole(self._folder.stop, StopReason.LEASE_LOST.value)

    def _empty_groups(self) -> None:
        """Afterwards `exit` is written: what belongs to it must be there by then."""
        super()._empty_groups()
        self.tell_fenced()
        if self._groups_here.oom_kills() > self._oom_kills:
            write_whole(self._folder.root / "oom", "")

    def _jobs(self) -> set[int]:
        infos = (process_info(pid) for pid in descendants(os.getpid()))
        return {info.pid for info in infos if info is not None and info.session != self._session}

    def _sample(self, *_: object) -> None:
        """What the job uses now, for `stats` of the daemon."""
        pids = descendants(os.getpid())
        known = self._groups_here.stats()
        memory = known.memory_bytes if known.memory_bytes is not None else sum(map(_resident_bytes, pids))
        cpu = known.cpu_seconds if known.cpu_seconds is not None else sum(map(_cpu_seconds, pids))
        read_bytes, written_bytes = disk_bytes(pids)
        self._samples += 1
        sample = {
            "number": self._samples, "cpu_seconds": cpu, "memory_bytes": memory,
            "memory_peak_bytes": known.memory_peak_bytes, "pids": len(pids), "read_bytes": read_bytes,
            "written_bytes": written_bytes,
        }  # fmt: skip
        # The folder may be on its way out, or its disk full.
        with contextlib.suppress(OSError):
            write_whole(self._folder.root / "stats.json", json.dumps(sample))
        young = time.monotonic() - self._began < YOUNG_SECONDS
        signal.setitimer(signal.ITIMER_REAL, FIRST_SAMPLES_SECONDS if young else SAMPLE_SECONDS)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def write_whole(path: Path, text: str) -> None:
    """The file is there with all of its text, or not at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
    os.rename(fresh, path)


# --- limits -----------------------------------------------------------------------------------------------------------


def own_groups(name: str, spec: AttemptSpec, own: str) -> tuple[cgroup.Cgroup, cgroup.CgroupTree]:
    """Control groups with the attempt's limits, where Slurm has none and the user of its jobs may make them.

    `own`: /proc/self/cgroup. Below a group of Slurm's nothing is made: a job must not leave what it is tracked by.
    """
    none = cgroup.CgroupTree(missing=dict.fromkeys(_LIMITS, "Slurm's own cgroup has no such limit"))
    tree = none if in_slurms_group(own) else cgroup.detect(name)
    groups = tree.group(str(spec.attempt_id))
    if groups.folders:
        groups.create()
        memory_bytes = spec.memory_bytes + CELL_MEMORY_BYTES if spec.memory_bytes else 0
        groups.set_limits(
            cgroup.Limits(spec.cpu_milli, memory_bytes, spec.pids_max + SANDBOX_PIDS if spec.pids_max else 0)
        )
    return groups, tree


def in_slurms_group(own: str) -> bool:
    return any(_SLURM_GROUP.search(line.split(":", 2)[2]) for line in own.splitlines())


def limits_of_slurm(spec: AttemptSpec, own: str) -> frozenset[str]:
    """Which limits Slurm keeps, found out by looking at those of this very job."""
    found: set[str] = set()
    if spec.cpu_milli and len(os.sched_getaffinity(0)) <= -(-spec.cpu_milli // 1000) < (os.cpu_count() or 1):
        found.add("cpu")
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        )
        folder = Path(base + path)
        while folder != Path(base).parent and "memory" not in found:
            text = _read(folder / name)
            if text.isdigit() and int(text) <= 4 * max(1, spec.memory_bytes):
                found.add("memory")
            folder = folder.parent
    return frozenset(found)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# --- devices ----------------------------------------------------------------------------------------------------------


def leased_devices(count: int, slurms: str, found: Sequence[DeviceGrant]) -> tuple[DeviceGrant, ...]:
    """Those of the node's devices that Slurm gave this job. `slurms`: SLURM_JOB_GPUS, the numbers of their files.

    Raises AttemptRefused: a job that gets another number than was paid for must not start.
    """
    numbers = [part for part in slurms.split(",") if part]
    given = [device for number in numbers for device in found if _is_file_number(device, number)]
    if len(given) != count:
        known = f"the node's driver knows {len(given)} of them, {count} are leased"
        raise AttemptRefused(f"Slurm gave the GPUs {slurms or 'none'}: {known}")
    return tuple(given)


def _is_file_number(device: DeviceGrant, number: str) -> bool:
    names = (f"/dev/nvidia{number}", f"/dev/dri/renderD{number}")
    return any(path in names for path in device.paths)


def devices_here() -> list[DeviceGrant]:
    """By the drivers of this node; imported late, as most jobs want no GPU."""
    from dantegpu.daemon.probe.amd import AmdGpus
    from dantegpu.daemon.probe.nvml import Nvml

    found: list[DeviceGrant] = []
    for driver in (Nvml(required=False), AmdGpus()):
        devices = driver.open(len(found)).devices
        found += [DeviceGrant(gpu.uuid, gpu.model, gpu.index, gpu.paths, vendor=gpu.vendor) for gpu in devices]
        driver.close()
    return found


# --- the sandbox ------------------------------------------------------------------------------------------------------


def sandbox_files(site: Path) -> tuple[Path, Path | None]:
    """(/etc of jobs, seccomp filter) for this node, made by the first job on it."""
    folder = site / "nodes" / node_name()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    etc, program = folder / "etc", folder / "seccomp.bpf"
    if not program.exists():
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not program.exists():
                write_etc(etc)
                fresh = folder / "seccomp.new"
                fresh.write_bytes(seccomp.program() or b"")
                fresh.rename(program)  # the last one: where it is, all is there
    return etc, program if program.stat().st_size else None


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()


def launch_of(order: Order, folder: AttemptFolder, site: Path) -> Launch:
    """Raises AttemptRefused."""
    spec = order.spec
    if order.gpus:
        devices = leased_devices(order.gpus, os.environ.get("SLURM_JOB_GPUS", ""), devices_here())
        spec = replace(spec, devices=devices)
    python = PythonRuntime.of_this_process(folder.root)
    if order.sandbox is SandboxKind.NONE:
        return unsandboxed(folder.work, folder.output, spec, python.host_search_path)
    tools = Bubblewrap.find()
    if isinstance(tools, str):
        raise AttemptRefused(tools)
    etc, program = sandbox_files(site)
    return sandboxed(tools, Layout(folder.work, folder.output, etc, python, program), spec, order.uid)


def run(site: Path, folder: AttemptFolder) -> None:
    """The attempt, from its order to its mark `exit`."""
    order = Order.loads((folder.root / "order.json").read_text())
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        # Slurm runs it once more, although it was told not to. An attempt runs once; the platform makes the next one.
        write_whole(folder.root / "requeued", "")
        return
    watch = LeaseWatch(Path(order.leases), str(order.spec.attempt_id)) if order.leases else None
    if watch is not None and not watch.may_start():
        write_whole(folder.stop, StopReason.LEASE_LOST.value)
        write_whole(folder.root / "failed", f"{node_name()} sees no renewal of its lease in {order.leases}")
        return
    own = Path("/proc/self/cgroup").read_text()
    groups, tree = own_groups(f"dante-{node_name()}", order.spec, own)
    cell = NodeCell(folder, groups)
    try:
        cell.join()
        launch = launch_of(order, folder, site)
    except (AttemptRefused, OSError) as error:
        cell.say(f"failed {error}")
        leave_groups(groups, tree)
        return
    cell.listen()
    request = json.loads(launch.payload(folder.root)[4:])
    if order.trial:
        limits = sorted(tree.limits | limits_of_slurm(order.spec, own))
        write_whole(folder.root / "limits.json", json.dumps({"limits": limits, "missing": dict(tree.missing)}))
    if watch is not None:
        watch.start(cell.fence)
    if cell.killed:
        cell.tell_fenced()
    else:
        cell.run(request)
    if watch is not None:
        watch.stop()
    signal.setitimer(signal.ITIMER_REAL, 0)
    leave_groups(groups, tree)


def leave_groups(groups: cgroup.Cgroup, tree: cgroup.CgroupTree) -> None:
    """Remove them: nothing of the job is in them any more, and this process goes back to where Slurm had put it."""
    for parent in set(tree.parents.values()):
        _move_to(parent.parent)
    asyncio.run(groups.remove())
    tree.remove_if_empty()


def _move_to(folder: Path) -> None:
    try:
        (folder / "cgroup.procs").write_text("0")
    except OSError:
        return


def main() -> None:
    """Exit status 0 also when the attempt failed: how that ended stands in its folder."""
    for name in os.listdir("/proc/self/fd"):
        try:
            os.set_inheritable(int(name), int(name) <= 2)
        except OSError:
            continue  # the one that listed the folder
    prepare_process()
    site, folder = map(Path, sys.argv[1:3])
    run(site, AttemptFolder(folder))
    # What is left of this process would only keep Slurm waiting.
    os._exit(0)


if __name__ == "__main__":
    main()
