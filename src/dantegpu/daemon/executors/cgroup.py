"""Control groups, version 1, version 2 or both at once: limits, counting, and killing a job as a whole.

Source: the kernel's Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

import asyncio
import errno
import os
import signal
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from dantegpu.daemon.executors.base import Stats
from dantegpu.daemon.executors.processes import signal_processes

CPU_PERIOD_US = 100_000
V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids")
V2_CONTROLLERS = ("memory", "cpu", "pids")
UNIFIED = "unified"
REMOVE_TIMEOUT_SECONDS = 5.0
_CHUNK_BYTES = 64 << 10
_LIMITS = ("cpu", "memory", "pids")
_MISSING_HINT = "run the daemon as root, or by systemd with Delegate=yes"


@dataclass(frozen=True, slots=True)
class _Mount:
    point: Path
    root: str
    controllers: frozenset[str]
    version: int


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, super_options = right.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        _, _, _, root, point, *_ = left.split(" ")
        controllers = frozenset(super_options.split(",")) if kind == "cgroup" else frozenset[str]()
        yield _Mount(Path(point), root, controllers, 1 if kind == "cgroup" else 2)


def _own_paths(text: str) -> dict[str, str]:
    """Controller -> this process's group, from /proc/self/cgroup; the version 2 group has the name `unified`."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if number != "0" else (UNIFIED,):
            paths[controller] = path
    return paths


def _own_folder(mount: _Mount, own_path: str) -> Path:
    """Where this process's group lies below the mount point; the mount may show only a part of the hierarchy."""
    inside = os.path.relpath(own_path, mount.root) if own_path.startswith(mount.root) else "."
    return mount.point / inside if inside != "." else mount.point


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one attempt; 0 is no limit."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    pids_max: int = 0


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One attempt's groups: controller -> folder. With version 2, several controllers share a folder."""

    version: Mapping[str, int]
    folders: Mapping[str, Path]

    @property
    def distinct(self) -> list[Path]:
        return sorted(set(self.folders.values()))

    @property
    def procs_files(self) -> list[Path]:
        """Whoever writes 0 into each of these joins."""
        return [folder / "cgroup.procs" for folder in self.distinct]

    def exists(self) -> bool:
        return any(folder.exists() for folder in self.distinct)

    def create(self) -> None:
        for folder in self.distinct:
            folder.mkdir(mode=0o755, exist_ok=True)

    def set_limits(self, limits: Limits) -> None:
        """Zero leaves a resource without a limit. Limits that are not available here are skipped."""
        if "memory" in self.folders:
            self._limit_memory(self.folders["memory"], limits.memory_bytes)
        if "cpu" in self.folders:
            quota_us = max(1000, limits.cpu_milli * CPU_PERIOD_US // 1000) if limits.cpu_milli else 0
            folder = self.folders["cpu"]
            # What an idle group saves up, a start of the sandbox may spend at once; on average the quota holds.
            burst = folder / ("cpu.max.burst" if self.version["cpu"] == 2 else "cpu.cfs_burst_us")
            _write_optional(burst, "0")  # a burst above its quota is refused, so the old one goes first
            if self.version["cpu"] == 2:
                _write(folder / "cpu.max", f"{quota_us or 'max'} {CPU_PERIOD_US}")
            else:
                _write(folder / "cpu.cfs_period_us", str(CPU_PERIOD_US))
                _write(folder / "cpu.cfs_quota_us", str(quota_us or -1))
            _write_optional(burst, str(quota_us))
        if "pids" in self.folders:
            _write(self.folders["pids"] / "pids.max", str(limits.pids_max or "max"))

    def _limit_memory(self, folder: Path, memory_bytes: int) -> None:
        if self.version["memory"] == 2:
            _write(folder / "memory.max", str(memory_bytes or "max"))
            _write_optional(folder / "memory.swap.max", "0" if memory_bytes else "max")
        else:
            # Memory with swap may never have the lower limit of the two: first it gets none, at last its own. Without
            # it a job over its limit would swap the provider's machine to a standstill instead of ending.
            _write_optional(folder / "memory.memsw.limit_in_bytes", "-1")
            _write(folder / "memory.limit_in_bytes", str(memory_bytes or -1))
            _write_optional(folder / "memory.memsw.limit_in_bytes", str(memory_bytes or -1))

    def oom_kills(self) -> int:
        """How many of the attempt's processes the kernel killed for memory."""
        folder = self.folders.get("memory")
        if folder is None:
            return 0
        name = "memory.events" if self.version["memory"] == 2 else "memory.oom_control"
        return _read_fields(folder / name).get("oom_kill", 0)

    def members(self) -> set[int]:
        """Pids of the attempt, the sandbox's own included."""
        for name in (UNIFIED, "pids", "memory", "cpu"):
            folder = self.folders.get(name)
            if folder is not None:
                text = _read(folder / "cgroup.procs")
                return {int(line) for line in text.split() if line != "0"}
        return set()

    async def kill(self, spare: Set[int] = frozenset()) -> None:
        """SIGKILL everything but `spare` and return when nothing else is left."""
        deadline = asyncio.get_running_loop().time() + REMOVE_TIMEOUT_SECONDS
        pause_seconds = 0.001
        while True:
            members = self.members() - spare
            if not members:
                return
            if spare or not any(_kill_group(folder) for folder in self.distinct):
                signal_processes(members, self.members(), signal.SIGKILL)
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"processes {sorted(members)[:5]} do not die")
            # Nothing in the kernel tells when a version 1 group is empty.
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(0.05, pause_seconds * 2)

    async def remove(self) -> None:
        """Kill and remove. Idempotent."""
        await self.kill()
        for folder in self.distinct:
            await _remove_folder(folder)

    def count_anew(self) -> float:
        """For the next attempt in the same groups: the highest use of memory counts from now; CPU seconds until now."""
        memory = self.folders.get("memory")
        if memory is not None:
            _write_optional(memory / self._memory_file("peak", "max_usage_in_bytes"), "0")
        return self._cpu_seconds() or 0.0

    def _memory_file(self, name: str, older_name: str) -> str:
        return f"memory.{name if self.version['memory'] == 2 else older_name}"

    def stats(self, cpu_seconds_before: float = 0.0) -> Stats:
        memory = self.folders.get("memory")
        current, peak = None, None
        if memory is not None:
            current = _read_number(memory / self._memory_file("current", "usage_in_bytes"))
            peak = _read_number(memory / self._memory_file("peak", "max_usage_in_bytes"))
        used = self._cpu_seconds()
        return Stats(None if used is None else used - cpu_seconds_before, current, peak, len(self.members()))

    def _cpu_seconds(self) -> float | None:
        if "cpuacct" in self.folders:
            nanoseconds = _read_number(self.folders["cpuacct"] / "cpuacct.usage")
            return None if nanoseconds is None else nanoseconds / 1e9
        if self.version.get("cpu") == 2:
            microseconds = _read_fields(self.folders["cpu"] / "cpu.stat").get("usage_usec")
            return None if microseconds is None else microseconds / 1e6
        return None

    def to_json(self) -> dict[str, list[str | int]]:
        return {name: [str(folder), self.version[name]] for name, folder in self.folders.items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, list[str | int]]) -> "Cgroup":
        return cls(
            {name: int(entry[1]) for name, entry in raw.items()},
            {name: Path(str(entry[0])) for name, entry in raw.items()},
        )


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """The daemon's groups, below its own, under which each attempt gets one. `missing`: limit -> why not."""

    version: Mapping[str, int] = field(default_factory=dict[str, int])
    parents: Mapping[str, Path] = field(default_factory=dict[str, Path])
    missing: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def limits(self) -> frozenset[str]:
        return frozenset(name for name in _LIMITS if name in self.parents)

    def group(self, name: str) -> Cgroup:
        return Cgroup(self.version, {controller: parent / name for controller, parent in self.parents.items()})

    def groups(self) -> set[str]:
        """Names of the groups that exist, also those which a daemon that died left."""
        found: set[str] = set()
        for parent in set(self.parents.values()):
            found.update(entry.name for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False))
        return found

    def remove_if_empty(self) -> None:
        """Remove the daemon's own groups unless an attempt still runs in them."""
        for parent in set(self.parents.values()):
            try:
                parent.rmdir()
            except OSError:
                continue


def detect(name: str, *, proc: Path = Path("/proc/self")) -> CgroupTree:
    """Make the daemon's groups, called `name`, with whatever this machine offers."""
    mounts = list(_mounts((proc / "mountinfo").read_text()))
    own = _own_paths((proc / "cgroup").read_text())
    version: dict[str, int] = {}
    parents: dict[str, Path] = {}
    missing: dict[str, str] = {}
    unified = next((mount for mount in mounts if mount.version == 2), None)
    if unified is not None:
        found, problem = _detect_v2(unified, own.get(UNIFIED, "/"), name)
        parents |= found
        version |= dict.fromkeys(found, 2)
        missing |= {limit: problem for limit in _LIMITS if limit not in found and problem}
    for controller in V1_CONTROLLERS:
        mount = next((mount for mount in mounts if mount.version == 1 and controller in mount.controllers), None)
        if mount is None or controller in parents:
            continue
        parent = _own_folder(mount, own.get(controller, "/")) / name
        try:
            parent.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            missing[controller] = f"cgroup version 1 {parent.parent}: {error.strerror}; {_MISSING_HINT}"
            continue
        parents[controller] = parent
        version[controller] = 1
    for limit in _LIMITS:
        if limit in parents:
            missing.pop(limit, None)
        else:
            missing.setdefault(limit, f"no cgroup hierarchy with the {limit} controller is mounted; {_MISSING_HINT}")
    return CgroupTree(version, parents, {limit: missing[limit] for limit in _LIMITS if limit in missing})


def _detect_v2(mount: _Mount, own_path: str, name: str) -> tuple[dict[str, Path], str]:
    """Controller -> parent folder of version 2, and why controllers are missing."""
    own = _own_folder(mount, own_path)
    candidates = [own] if own == mount.point or os.geteuid() != 0 else [own, mount.point]
    problem = ""
    for base in candidates:
        try:
            wanted = [c for c in V2_CONTROLLERS if c in _read(base / "cgroup.controllers").split()]
            parent = base / name
            if wanted:
                _delegate(base, wanted)
            parent.mkdir(mode=0o755, exist_ok=True)
            if wanted:
                _write(parent / "cgroup.subtree_control", " ".join(f"+{c}" for c in wanted))
        except OSError as error:
            problem = f"cgroup version 2 {base}: {error.strerror}; {_MISSING_HINT}"
            continue
        lacking = [c for c in V2_CONTROLLERS if c not in wanted]
        problem = f"cgroup version 2 {base} does not have the controllers {', '.join(lacking)}" if lacking else ""
        return {UNIFIED: parent, **dict.fromkeys(wanted, parent)}, problem
    return {}, problem


def _delegate(base: Path, controllers: list[str]) -> None:
    """Hand `controllers` down to the groups below `base`."""
    if set(controllers) <= set(_read(base / "cgroup.subtree_control").split()):
        return
    # A group with processes of its own may not have controllers below it, the root group excepted.
    if (base / "cgroup.type").exists():
        leaf = base / "daemon"
        leaf.mkdir(mode=0o755, exist_ok=True)
        _write(leaf / "cgroup.procs", str(os.getpid()))
    _write(base / "cgroup.subtree_control", " ".join(f"+{controller}" for controller in controllers))


def _kill_group(folder: Path) -> bool:
    """True when the kernel killed the whole group by itself (version 2, Linux 5.14 and later)."""
    try:
        _write(folder / "cgroup.kill", "1")
    except OSError:
        return False
    return True


async def _remove_folder(folder: Path) -> None:
    deadline = asyncio.get_running_loop().time() + REMOVE_TIMEOUT_SECONDS
    pause_seconds = 0.001
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            # Busy for a moment longer while its last process is being reaped.
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(0.05, pause_seconds * 2)


def _write(path: Path, text: str) -> None:
    # No O_CREAT: a file that is not there must fail, not appear.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _write_optional(path: Path, text: str) -> None:
    try:
        _write(path, text)
    except OSError:
        return


def _read(path: Path) -> str:
    # Not read_text(): three of these per short job, and its layers cost more than the kernel does.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return ""
    content = b""
    try:
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            content += chunk
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ENODEV):
            raise
        return ""
    finally:
        os.close(descriptor)
    return content.decode()


def _read_number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read_fields(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
