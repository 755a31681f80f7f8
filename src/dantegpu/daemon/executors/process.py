"""Executor `process`: an attempt is a process tree on this machine, in a bubblewrap sandbox or without one.

An attempt lives in its own session under a small shell script (`shim.sh`) that outlives the daemon and writes down how
the attempt ended. See `sandbox` for what a job sees, `cgroup` for its limits, `cells` for how it is started quickly.
"""

import asyncio
import json
import os
import signal
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from dantegpu.daemon.executors import cgroup, seccomp
from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptRefused,
    AttemptSpec,
    Capabilities,
    Executor,
    ExitStatus,
    Handle,
    SandboxFailed,
    SandboxKind,
    Stats,
    StopReason,
    UnknownHandle,
)
from dantegpu.daemon.executors.cells import ParkedShim
from dantegpu.daemon.executors.processes import (
    boot_id,
    descendants,
    disk_bytes,
    open_process,
    process_ended,
    process_info,
    processes_with_env,
    reap,
    signal_processes,
)
from dantegpu.daemon.executors.sandbox import (
    Bubblewrap,
    Launch,
    Layout,
    PythonRuntime,
    sandboxed,
    unsandboxed,
    write_etc,
)
from dantegpu.daemon.workspace import AttemptFolder, Workspace
from dantegpu.domain.ids import AttemptId

log = structlog.get_logger(__name__)

# Between the ranges that systemd and shadow-utils hand out (systemd.io/UIDS-GIDS), so nobody's files are in reach.
FIRST_UID = 1_879_100_000
UID_BLOCKS = 4096
UIDS_PER_BLOCK = 4096
SANDBOX_PIDS = 8
"""Processes of the sandbox itself, on top of what the job may have."""
KILL_TIMEOUT_SECONDS = 5.0
STARTED_TIMEOUT_SECONDS = 1.0
SELF_TEST_BYTES = 64 << 20
ATTEMPT_VARIABLE = "DANTE_ATTEMPT_ID"


@dataclass(frozen=True, slots=True)
class _Place:
    """What a handle of this executor holds."""

    slot: int
    uid: int
    boot: str
    sandbox: SandboxKind
    groups: cgroup.Cgroup

    def dumps(self) -> str:
        return json.dumps(
            {
                "version": 1,
                "slot": self.slot,
                "uid": self.uid,
                "boot": self.boot,
                "sandbox": self.sandbox.value,
                "groups": self.groups.to_json(),
            }
        )

    @classmethod
    def loads(cls, text: str) -> "_Place":
        raw = json.loads(text)
        if raw.get("version") != 1:
            raise UnknownHandle(f"handle version {raw.get('version')!r} is not of this daemon's version")
        groups = cgroup.Cgroup.from_json(raw["groups"])
        return cls(raw["slot"], raw["uid"], raw["boot"], SandboxKind(raw["sandbox"]), groups)


@dataclass(slots=True)
class _Cell:
    slot: int
    groups: cgroup.Cgroup
    shim: ParkedShim


class ProcessExecutor(Executor):
    """Runs attempts below `workspace`. One instance per folder at a time; the daemon holds its lock."""

    name = "process"

    def __init__(
        self,
        workspace: Workspace,
        *,
        sandbox: SandboxKind,
        allow_network: bool = False,
        search_path: str | None = None,
    ) -> None:
        self._workspace = workspace
        self._search_path = search_path
        self._wanted = sandbox
        self._allow_network = allow_network
        self._tree = cgroup.CgroupTree()
        self._tools: Bubblewrap | None = None
        self._python = PythonRuntime.of_this_process(workspace.root)
        self._filter: Path | None = None
        self._capabilities: Capabilities | None = None
        self._spare: _Cell | None = None
        self._shims: dict[AttemptId, ParkedShim] = {}
        self._pidfds: dict[AttemptId, int] = {}
        self._slots: set[int] = set()
        block = zlib.crc32(os.fsencode(workspace.root.absolute())) % UID_BLOCKS
        self._uid_base = FIRST_UID + block * UIDS_PER_BLOCK
        self._group_name = f"dante-{zlib.crc32(os.fsencode(workspace.root.absolute())):08x}"

    # --- what works here ----------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        if self._capabilities is not None:
            return self._capabilities
        self._workspace.create()
        if not self._workspace.attempts() or not self._etc.is_dir():
            # Not below the feet of jobs that run: they see this folder.
            await asyncio.to_thread(write_etc, self._etc)
        self._tree = await asyncio.to_thread(cgroup.detect, self._group_name)
        missing = dict(self._tree.missing)
        if self._python.problem:
            missing["python"] = self._python.problem
        code = seccomp.program()
        if code is None:
            missing["seccomp"] = f"no filter for the processor {os.uname().machine}"
        else:
            self._filter = self._workspace.root / "seccomp.bpf"
            self._filter.write_bytes(code)
        self._take_slots()
        kind = SandboxKind.NONE
        if self._wanted is SandboxKind.BUBBLEWRAP:
            tools = await asyncio.to_thread(Bubblewrap.find, self._search_path)
            if isinstance(tools, Bubblewrap):
                self._tools = tools
                self._choose_uids()
                kind = SandboxKind.BUBBLEWRAP
            else:
                missing["sandbox"] = tools
        self._capabilities = Capabilities(kind, self._tree.limits, missing, self._allow_network)
        if kind is SandboxKind.BUBBLEWRAP and (problem := await self._self_test()):
            missing["sandbox"] = problem
            self._capabilities = Capabilities(SandboxKind.NONE, self._tree.limits, missing, self._allow_network)
        return self._capabilities

    def _choose_uids(self) -> None:
        """A daemon that is root in a container has few users: then the highest of them are used."""
        last = 0
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, _, count = map(int, line.split())
            last = max(last, inside + count - 1)
        if last < self._uid_base + UIDS_PER_BLOCK:
            self._uid_base = max(1, min(last, 65_533) - UIDS_PER_BLOCK)

    async def _self_test(self) -> str:
        """Run `true` in the sandbox; what went wrong, or nothing. Whether user namespaces work shows only by trying."""
        spec = AttemptSpec(AttemptId.new(), ("true",), memory_bytes=SELF_TEST_BYTES)
        handle = await self.prepare(spec)
        try:
            await self.start(handle, spec)
            status = await self.wait(handle)
            return "" if status.exit_code == 0 else f"a trial run of bubblewrap ended with {status.exit_code}"
        except SandboxFailed as error:
            return str(error)
        finally:
            await self.destroy(handle)

    def _take_slots(self) -> None:
        for folder in self._workspace.attempts():
            if folder.handle.is_file():
                handle = Handle.loads(folder.handle.read_text())
                self._slots.add(_Place.loads(handle.data).slot)

    @property
    def _etc(self) -> Path:
        return self._workspace.root / "sandbox-etc"

    # --- cells --------------------------------------------------------------------------------------------------------

    def _new_cell(self) -> _Cell:
        for slot in range(UIDS_PER_BLOCK):
            groups = self._tree.group(f"slot-{slot}")
            # A group that is there may still hold what a daemon before this one started.
            if slot in self._slots or groups.exists():
                continue
            self._slots.add(slot)
            groups.create()
            return _Cell(slot, groups, ParkedShim.spawn(groups.procs_files))
        raise AttemptRefused(f"all {UIDS_PER_BLOCK} places for attempts are taken")

    def _take_cell(self) -> _Cell:
        cell, self._spare = self._spare, None
        if cell is not None:
            return cell
        return self._new_cell()

    def _make_spare(self) -> None:
        if self._spare is None and self._capabilities is not None:
            self._spare = self._new_cell()

    # --- Executor -----------------------------------------------------------------------------------------------------

    async def prepare(self, spec: AttemptSpec) -> Handle:
        folder = self._workspace.attempt(spec.attempt_id)
        if folder.handle.is_file():
            return Handle.loads(folder.handle.read_text())
        capabilities = await self.probe()
        if self._wanted is SandboxKind.BUBBLEWRAP and capabilities.sandbox is SandboxKind.NONE:
            raise AttemptRefused(f"this machine has no sandbox: {capabilities.missing['sandbox']}")
        if spec.network and not self._allow_network:
            raise AttemptRefused("this machine gives jobs no network")
        for path in (path for device in spec.devices for path in device.paths):
            if not Path(path).exists():
                raise AttemptRefused(f"the device node {path} is not there")
        cell = self._take_cell()
        cell.groups.set_limits(
            cpu_milli=spec.cpu_milli,
            memory_bytes=spec.memory_bytes,
            pids_max=spec.pids_max + SANDBOX_PIDS if spec.pids_max else 0,
        )
        place = _Place(cell.slot, self._uid_base + cell.slot, boot_id(), capabilities.sandbox, cell.groups)
        handle = Handle(self.name, spec.attempt_id, place.dumps())
        folder.create()
        if self._as_another_user(place):
            await asyncio.to_thread(folder.give_to, place.uid)
        folder.handle.write_text(handle.dumps())
        self._shims[spec.attempt_id] = cell.shim
        return handle

    @staticmethod
    def _as_another_user(place: _Place) -> bool:
        return place.sandbox is SandboxKind.BUBBLEWRAP and os.geteuid() == 0

    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        place, folder = self._open(handle)
        if folder.started.exists():
            raise AlreadyStarted(f"{handle.attempt_id} was started before")
        shim = self._shims.get(handle.attempt_id)
        if shim is None:
            # A daemon before this one prepared it: its parked shim left with it.
            place.groups.create()
            shim = self._shims[handle.attempt_id] = ParkedShim.spawn(place.groups.procs_files)
        try:
            await shim.start(folder.root, self._launch(place, folder, spec))
        except SandboxFailed as error:
            raise SandboxFailed(error.detail or _tail(folder.log)) from error
        self._pidfds[handle.attempt_id] = shim.pidfd
        asyncio.get_running_loop().call_later(0.2, self._make_spare_quietly)

    def _make_spare_quietly(self) -> None:
        """Not at once: the attempt that has just started needs the processor more."""
        try:
            self._make_spare()
        except OSError as error:
            log.warning("no_spare_cell", error=str(error))

    def _launch(self, place: _Place, folder: AttemptFolder, spec: AttemptSpec) -> Launch:
        env: Mapping[str, str] = {**spec.env, ATTEMPT_VARIABLE: str(spec.attempt_id)}
        spec = AttemptSpec(
            spec.attempt_id, spec.command, env, spec.cpu_milli, spec.memory_bytes, spec.pids_max, spec.tmp_bytes,
            spec.network, spec.devices,
        )  # fmt: skip
        if place.sandbox is SandboxKind.NONE or self._tools is None:
            return unsandboxed(folder.work, folder.output, spec, self._python.host_search_path)
        layout = Layout(folder.work, folder.output, self._etc, self._python, self._filter)
        return sandboxed(self._tools, layout, spec, place.uid)

    async def adopt(self, handle: Handle) -> Adoption:
        place, folder = self._open(handle)
        self._slots.add(place.slot)
        if handle.attempt_id in self._pidfds:
            return Adoption.RUNNING
        if place.boot != boot_id():
            return Adoption.ENDED if folder.started.exists() else Adoption.NOT_STARTED
        if not folder.started.exists():
            return Adoption.NOT_STARTED
        started = await _read_started(folder.started)
        if started is None:
            return Adoption.ENDED
        pidfd = open_process(*started)
        if pidfd is None:
            return Adoption.ENDED
        self._pidfds[handle.attempt_id] = pidfd
        return Adoption.RUNNING

    async def wait(self, handle: Handle) -> ExitStatus:
        place, folder = self._open(handle)
        pidfd = self._pidfds.get(handle.attempt_id)
        if pidfd is not None:
            await process_ended(pidfd)
        await self._kill_all(handle, place)
        shim = self._shims.get(handle.attempt_id)
        if shim is not None:
            reap(shim.pid)
        exit_code = _read_exit(folder.exit)
        reason = StopReason(folder.stop.read_text()) if folder.stop.is_file() else None
        if exit_code is None and reason is not None and folder.started.exists():
            exit_code = 128 + signal.SIGKILL
        return ExitStatus(exit_code, exit_code not in (0, None) and place.groups.oom_kills() > 0, reason)

    async def stop(self, handle: Handle, *, grace_seconds: float, reason: StopReason) -> None:
        place, folder = self._open(handle)
        if folder.exit.exists() or not folder.root.is_dir():
            return
        if not folder.stop.exists():
            folder.stop.write_text(reason.value)
        pidfd = self._pidfds.get(handle.attempt_id)
        if pidfd is not None and grace_seconds > 0:
            job = self._job_processes(handle, place)
            signal_processes(job, self._job_processes(handle, place), signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_seconds):
                    await process_ended(pidfd)
            except TimeoutError:
                log.info("attempt_killed_after_grace", attempt_id=str(handle.attempt_id), grace_seconds=grace_seconds)
        await self._kill_all(handle, place)
        if pidfd is not None:
            # The shim still writes down the end of what was killed under it.
            await process_ended(pidfd)

    async def destroy(self, handle: Handle) -> None:
        place, folder = self._open(handle)
        shim = self._shims.pop(handle.attempt_id, None)
        pidfd = self._pidfds.pop(handle.attempt_id, None)
        if place.boot == boot_id():
            await self._kill_all(handle, place)
            if pidfd is not None:
                await process_ended(pidfd)
            elif shim is not None:
                shim.close()
            await place.groups.remove()
        if shim is not None:
            shim.close()
        elif pidfd is not None:
            os.close(pidfd)
        await asyncio.to_thread(folder.remove)
        self._slots.discard(place.slot)

    async def stats(self, handle: Handle) -> Stats:
        place, _ = self._open(handle)
        pids = self._processes(handle, place)
        known = place.groups.stats() if place.groups.folders else Stats(None, None, None, len(pids))
        read_bytes, written_bytes = disk_bytes(pids)
        return replace(known, read_bytes=read_bytes, written_bytes=written_bytes)

    async def processes(self, handle: Handle) -> set[int]:
        place, _ = self._open(handle)
        return self._processes(handle, place)

    async def sweep(self, known: set[AttemptId]) -> None:
        """Kill and remove what no attempt in `known` accounts for: rests of a daemon that died in between."""
        await self.probe()
        for folder in self._workspace.attempts():
            if folder.root.name in {str(attempt_id) for attempt_id in known}:
                continue
            if folder.handle.is_file():
                await self.destroy(Handle.loads(folder.handle.read_text()))
            else:
                await asyncio.to_thread(folder.remove)
        used = {f"slot-{slot}" for slot in self._slots}
        for name in self._tree.groups() - used:
            await self._tree.group(name).remove()

    async def close(self) -> None:
        if self._spare is not None:
            self._spare.shim.close()
            await self._spare.groups.remove()
            self._slots.discard(self._spare.slot)
            self._spare = None
        self._capabilities = None
        self._tree.remove_if_empty()
        for attempt_id, shim in list(self._shims.items()):
            self._pidfds.pop(attempt_id, None)
            shim.close()
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._shims.clear()
        self._pidfds.clear()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _open(self, handle: Handle) -> tuple[_Place, AttemptFolder]:
        if handle.executor != self.name:
            raise UnknownHandle(f"a handle of the executor {handle.executor!r}")
        return _Place.loads(handle.data), self._workspace.attempt(handle.attempt_id)

    def _shim_pid(self, handle: Handle) -> int | None:
        shim = self._shims.get(handle.attempt_id)
        if shim is not None:
            return shim.pid
        started = _parse_started(self._workspace.attempt(handle.attempt_id).started)
        if started is None:
            return None
        info = process_info(started[0])
        return started[0] if info is not None and info.start_ticks == started[1] else None

    def _processes(self, handle: Handle, place: _Place) -> set[int]:
        """Everything of the attempt except the shim."""
        if place.groups.folders:
            return place.groups.members()
        shim_pid = self._shim_pid(handle)
        found = descendants(shim_pid) if shim_pid is not None else set[int]()
        # Without cgroups, a daemonised child of an unsandboxed job is known only by the environment it began with.
        return found | processes_with_env(f"{ATTEMPT_VARIABLE}={handle.attempt_id}".encode())

    def _job_processes(self, handle: Handle, place: _Place) -> set[int]:
        """The job's own processes, without the sandbox's: those stay in the session of the shim."""
        shim_pid = self._shim_pid(handle)
        infos = (process_info(pid) for pid in self._processes(handle, place))
        return {info.pid for info in infos if info is not None and info.session != shim_pid}

    async def _kill_all(self, handle: Handle, place: _Place) -> None:
        if place.boot != boot_id():
            return
        if place.groups.folders:
            await place.groups.kill()
            return
        deadline = asyncio.get_running_loop().time() + KILL_TIMEOUT_SECONDS
        while alive := _alive(self._processes(handle, place)):
            signal_processes(alive, _alive(self._processes(handle, place)), signal.SIGKILL)
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"processes {sorted(alive)[:5]} do not die")
            await asyncio.sleep(0.002)


def _alive(pids: set[int]) -> set[int]:
    infos = (process_info(pid) for pid in pids)
    return {info.pid for info in infos if info is not None and not info.zombie}


def _parse_started(path: Path) -> tuple[int, int] | None:
    """(pid, start ticks) of the shim; None while the line is not complete."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    parts = text.split()
    return (int(parts[0]), int(parts[1])) if text.endswith("\n") and len(parts) == 2 else None


async def _read_started(path: Path) -> tuple[int, int] | None:
    """The shim creates the file and writes the line right after: between the two, its daemon may have died."""
    deadline = asyncio.get_running_loop().time() + STARTED_TIMEOUT_SECONDS
    while (started := _parse_started(path)) is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
    return started


def _read_exit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return None


def _tail(path: Path, size_bytes: int = 2000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read().decode(errors="replace")
