"""Executor `process`: an attempt is a process tree on this machine, in a bubblewrap sandbox or without one.

An attempt is a child of a cell, a small process that outlives the daemon and writes down how the attempt ended. See
`sandbox` for what a job sees, `cgroup` for its limits, `cells` and `keeper` for how it is started quickly.
"""

import asyncio
import json
import os
import signal
import zlib
from collections.abc import Callable, Set
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
    untold,
)
from dantegpu.daemon.executors.cells import Cell, Launch
from dantegpu.daemon.executors.processes import (
    boot_id,
    descendants,
    disk_bytes,
    handlers,
    open_process,
    process_ended,
    process_info,
    processes_with_env,
    signal_processes,
)
from dantegpu.daemon.executors.sandbox import (
    ATTEMPT_VARIABLE,
    Bubblewrap,
    Layout,
    PythonRuntime,
    needed_mounts,
    parked,
    sandboxed,
    unsandboxed,
    write_etc,
)
from dantegpu.daemon.executors.slots import SLOTS_MAX, Parked, Slot, Slots
from dantegpu.daemon.workspace import AttemptFolder, Workspace
from dantegpu.domain.ids import AttemptId

log = structlog.get_logger(__name__)

# Between the ranges that systemd and shadow-utils hand out (systemd.io/UIDS-GIDS), so nobody's files are in reach.
FIRST_UID = 1_879_100_000
UID_BLOCKS = 4096
SANDBOX_PIDS = 8
"""Processes of the cell and of the sandbox itself, on top of what the job may have."""
CELL_MEMORY_BYTES = 4 << 20
"""What the cell may use of its groups' memory, on top of what the job may have."""
KILL_TIMEOUT_SECONDS = 5.0
STARTED_TIMEOUT_SECONDS = 1.0
SELF_TEST_BYTES = 64 << 20
HANDLE_VERSIONS = (1, 2)
"""1: started by the shell script of a daemon before this version. Its files in the folder are the same."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What a handle of this executor holds."""

    slot: int
    uid: int
    boot: str
    sandbox: SandboxKind
    groups: cgroup.Cgroup
    oom_kills: int = 0
    cpu_seconds: float = 0.0
    """What the groups had counted before, for others."""
    version: int = HANDLE_VERSIONS[-1]

    def dumps(self) -> str:
        return json.dumps(
            {
                "version": self.version,
                "slot": self.slot,
                "uid": self.uid,
                "boot": self.boot,
                "sandbox": self.sandbox.value,
                "groups": self.groups.to_json(),
                "oom_kills": self.oom_kills,
                "cpu_seconds": self.cpu_seconds,
            }
        )

    @classmethod
    def loads(cls, text: str) -> "_Place":
        raw = json.loads(text)
        if raw.get("version") not in HANDLE_VERSIONS:
            raise UnknownHandle(f"handle version {raw.get('version')!r} is not of this daemon's version")
        groups = cgroup.Cgroup.from_json(raw["groups"])
        kind = SandboxKind(raw["sandbox"])
        counted = (raw.get("oom_kills", 0), raw.get("cpu_seconds", 0.0))
        return cls(raw["slot"], raw["uid"], raw["boot"], kind, groups, *counted, raw["version"])


@dataclass(slots=True)
class _Run:
    """An attempt of this daemon, or one that it took over."""

    place: _Place
    slot: Slot | None = None
    cell: Cell | None = None
    """The cell that runs it; not the slot's own when an earlier daemon had prepared it."""
    pidfd: int = -1
    """Of the cell of an earlier daemon."""
    cell_pid: int = 0
    ready: bool = False
    """A sandbox waits for it in the cell."""
    asked: bool = False
    """To start: from then on the cell may say something about it."""
    started: bool = False
    status: ExitStatus | None = None
    released: bool = False
    """Nothing of it runs, and its groups may be somebody else's."""
    alone: bool = False
    """Its control groups held all that it started, and it could hand no descriptor of its folder to anybody else."""


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
        self._slots = Slots()
        self._found: set[int] = set()
        self._taken_over: dict[AttemptId, int] = {}
        """Attempts of an earlier daemon that had not ended when this one came, and their slots."""
        self._runs: dict[AttemptId, _Run] = {}
        block = zlib.crc32(os.fsencode(workspace.root.absolute())) % UID_BLOCKS
        self._uid_base = FIRST_UID + block * SLOTS_MAX
        self._group_name = f"dante-{zlib.crc32(os.fsencode(workspace.root.absolute())):08x}"

    # --- what works here ----------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        if self._capabilities is not None:
            return self._capabilities
        self._workspace.unpark_all()
        if not self._workspace.attempts() or not self._etc.is_dir():
            # Not below the feet of jobs that run: they see this folder.
            await asyncio.to_thread(write_etc, self._etc)
        self._tree = await asyncio.to_thread(cgroup.detect, self._group_name)
        self._slots.open(self._tree)
        missing = dict(self._tree.missing)
        if self._python.problem:
            missing["python"] = self._python.problem
        code = seccomp.program()
        if code is None:
            missing["seccomp"] = f"no filter for the processor {os.uname().machine}"
        else:
            self._filter = self._workspace.root / "seccomp.bpf"
            self._filter.write_bytes(code)
        self._found = self._held()
        self._slots.taken |= self._found
        kind = SandboxKind.NONE
        if self._wanted is SandboxKind.BUBBLEWRAP:
            tools = await asyncio.to_thread(Bubblewrap.find, self._search_path)
            if isinstance(tools, Bubblewrap):
                self._tools = tools
                self._choose_uids()
                if tools.as_root:
                    kept = (self._workspace.root, *self._tree.parents.values())
                    self._slots.need_mounts(needed_mounts(tools, self._python, kept))
                kind = SandboxKind.BUBBLEWRAP
            else:
                missing["sandbox"] = tools
        self._capabilities = Capabilities(kind, self._tree.limits, missing, self._allow_network)
        if kind is SandboxKind.BUBBLEWRAP and (problem := await self._self_test()):
            missing["sandbox"] = problem
            self._capabilities = Capabilities(SandboxKind.NONE, self._tree.limits, missing, self._allow_network)
        elif kind is SandboxKind.BUBBLEWRAP:
            self._slots.park_with(self._park)
        return self._capabilities

    def _choose_uids(self) -> None:
        """A daemon that is root in a container has few users: then the highest of them are used."""
        last = 0
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, _, count = map(int, line.split())
            last = max(last, inside + count - 1)
        if last < self._uid_base + SLOTS_MAX:
            self._uid_base = max(1, min(last, 65_533) - SLOTS_MAX)

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

    def _held(self) -> set[int]:
        """Numbers of the slots in which attempts of earlier daemons may still run."""
        held: set[int] = set()
        for folder in self._workspace.attempts():
            if (known := folder.read_handle()) is not None:
                handle = Handle.loads(known)
                if handle.executor != self.name:
                    continue
                place = _Place.loads(handle.data)
                if not _over(place, folder):
                    held.add(place.slot)
        return held

    @property
    def _etc(self) -> Path:
        return self._workspace.root / "sandbox-etc"

    def _release(self, run: _Run) -> None:
        """Nothing of the attempt runs any more: its cell is free for the next one."""
        if run.slot is not None:
            slot, run.slot, run.cell, run.released = run.slot, None, None, True
            self._slots.release(slot)

    # --- Executor -----------------------------------------------------------------------------------------------------

    async def prepare(self, spec: AttemptSpec, progress: Callable[[str], None] = untold) -> Handle:
        del progress  # nothing here takes long
        folder = self._workspace.attempt(spec.attempt_id)
        if (known := folder.read_handle()) is not None:
            return Handle.loads(known)
        capabilities = await self.probe()
        if self._wanted is SandboxKind.BUBBLEWRAP and capabilities.sandbox is SandboxKind.NONE:
            raise AttemptRefused(f"this machine has no sandbox: {capabilities.missing['sandbox']}")
        if spec.network and not self._allow_network:
            raise AttemptRefused("this machine gives jobs no network")
        for path in (path for device in spec.devices for path in device.paths):
            if not Path(path).exists():
                raise AttemptRefused(f"the device node {path} is not there")
        if not folder.root.is_dir():
            folder.create()
        slot = await self._slots.take(folder)
        limits = cgroup.Limits(
            spec.cpu_milli,
            spec.memory_bytes + CELL_MEMORY_BYTES if spec.memory_bytes else 0,
            spec.pids_max + SANDBOX_PIDS if spec.pids_max else 0,
        )
        if limits != slot.limits:
            slot.groups.set_limits(limits)
            slot.limits = limits
        uid = self._uid_base + slot.number
        counted = (slot.oom_kills, slot.groups.count_anew() if slot.idle_since else 0.0)
        place = _Place(slot.number, uid, boot_id(), capabilities.sandbox, slot.groups, *counted)
        self._runs[spec.attempt_id] = _Run(place, slot, slot.cell, cell_pid=slot.cell.pid, ready=slot.claim(folder))
        if self._as_another_user(place):
            await folder.give_to(place.uid)
        handle = Handle(self.name, spec.attempt_id, place.dumps())
        folder.write_handle(handle.dumps())
        return handle

    @staticmethod
    def _as_another_user(place: _Place) -> bool:
        return place.sandbox is SandboxKind.BUBBLEWRAP and os.geteuid() == 0

    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        folder = self._workspace.attempt(handle.attempt_id)
        if folder.started.exists():
            raise AlreadyStarted(f"{handle.attempt_id} was started before")
        run = self._runs.get(handle.attempt_id)
        if run is None or run.cell is None:
            # A daemon before this one prepared it: its cell left with it.
            run = self._runs[handle.attempt_id] = _Run(self._place(handle))
            run.place.groups.create()
            run.cell = await self._slots.cell(run.place.groups)
            run.cell_pid = run.cell.pid
        run.asked = True
        try:
            launch = self._launch(run.place, folder, spec)
            await run.cell.start(folder.root, launch if run.ready else replace(launch, plain=False))
        except AlreadyStarted:
            # By a daemon before this one, in the same groups: this cell must not be given to others.
            run.cell.close()
            del self._runs[handle.attempt_id]
            raise
        except SandboxFailed as error:
            raise SandboxFailed(error.detail or _tail(folder.log)) from error
        run.started = True
        # In a sandbox with a network there are sockets that others can reach.
        run.alone = bool(run.place.groups.folders) and not (spec.network and run.place.sandbox is not SandboxKind.NONE)
        self._slots.spare_soon()

    def _launch(self, place: _Place, folder: AttemptFolder, spec: AttemptSpec) -> Launch:
        if place.sandbox is SandboxKind.NONE or self._tools is None:
            return unsandboxed(folder.work, folder.output, spec, self._python.host_search_path)
        return sandboxed(self._tools, self._layout(folder), spec, place.uid)

    def _layout(self, folder: AttemptFolder) -> Layout:
        return Layout(folder.work, folder.output, self._etc, self._python, self._filter)

    def _park(self, slot: Slot) -> Parked | None:
        """Make the sandbox of the slot's next attempt ahead: that takes longer than all else of a start."""
        if self._tools is None:
            return None
        uid = self._uid_base + slot.number
        try:
            folder = self._workspace.park()
            if os.geteuid() == 0:
                for top in (folder.work, folder.output):
                    os.chown(top, uid, uid, follow_symlinks=False)
            made = Parked.of(folder)
        except OSError as error:
            log.warning("no_sandbox_made_ahead", error=str(error))
            return None
        launch = parked(self._tools, self._layout(folder), AttemptSpec(AttemptId.new(), ("true",)), uid)
        return made if slot.cell.park(folder.root, launch) else None

    async def adopt(self, handle: Handle) -> Adoption:
        place, folder = self._open(handle)
        run = self._runs.get(handle.attempt_id)
        if run is not None and run.status is not None:
            return Adoption.ENDED
        if run is not None and (run.pidfd >= 0 or folder.started.exists()):
            return Adoption.RUNNING
        if _over(place, folder):
            return Adoption.ENDED
        self._taken_over[handle.attempt_id] = place.slot
        self._slots.taken.add(place.slot)
        if place.boot != boot_id():
            return Adoption.ENDED if folder.started.exists() else Adoption.NOT_STARTED
        if not folder.started.exists():
            return Adoption.NOT_STARTED
        started = await _read_started(folder.started)
        pidfd = open_process(*started) if started is not None else None
        if started is None or pidfd is None:
            return Adoption.ENDED
        self._runs[handle.attempt_id] = _Run(place, pidfd=pidfd, cell_pid=started[0])
        return Adoption.RUNNING

    async def wait(self, handle: Handle) -> ExitStatus:
        run = self._runs.get(handle.attempt_id)
        if run is not None and run.status is not None:
            return run.status
        if run is None:
            run = self._runs[handle.attempt_id] = _Run(self._place(handle))
        exit_code = await self._gone(run)
        folder = self._workspace.attempt(handle.attempt_id)
        if exit_code is None:
            exit_code = _read_exit(folder.exit)
        if exit_code is None or not run.place.groups.folders or run.place.version < HANDLE_VERSIONS[-1]:
            # Else the cell has seen to it.
            await self._kill_all(handle, run)
            exit_code = _read_exit(folder.exit)
        reason = StopReason(folder.stop.read_text()) if folder.stop.is_file() else None
        if exit_code is None and reason is not None and folder.started.exists():
            exit_code = 128 + signal.SIGKILL
        run.status = ExitStatus(exit_code, exit_code not in (0, None) and self._oom_killed(run), reason)
        if run.cell is not None and run.cell.alive and exit_code is not None:
            self._release(run)
        elif run.cell is None and run.pidfd < 0 and _over(run.place, folder):
            # Under a daemon before this one; unless that was at this moment.
            run.released = handle.attempt_id not in self._taken_over
        return run.status

    async def _gone(self, run: _Run) -> int | None:
        """Until its cell has noted its end, or has died. What the cell said, if it is this daemon's."""
        if run.cell is not None:
            return await asyncio.shield(run.cell.ended)
        if run.pidfd >= 0:
            await process_ended(run.pidfd)
        return None

    @staticmethod
    def _oom_killed(run: _Run) -> bool:
        counted = run.place.groups.oom_kills()
        if run.slot is not None:
            run.slot.oom_kills = counted
        return counted > run.place.oom_kills

    async def stop(
        self, handle: Handle, *, grace_seconds: float, reason: StopReason, notice: signal.Signals | None = None
    ) -> None:
        place, folder = self._open(handle)
        if folder.exit.exists() or not folder.root.is_dir():
            return
        if not folder.stop.exists():
            folder.stop.write_text(reason.value)
        run = self._runs.get(handle.attempt_id) or _Run(place)
        if run.status is not None:
            return
        if (run.cell is not None or run.pidfd >= 0) and grace_seconds > 0:
            job = self._job_processes(handle, run)
            told = handlers(job, notice) or job if notice is not None else job
            signal_processes(told, self._job_processes(handle, run), notice or signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._gone(run)
            except TimeoutError:
                log.info("attempt_killed_after_grace", attempt_id=str(handle.attempt_id), grace_seconds=grace_seconds)
        await self._kill_all(handle, run)
        # The cell still writes down the end of what was killed under it.
        await self._gone(run)

    async def destroy(self, handle: Handle) -> None:
        folder = self._workspace.attempt(handle.attempt_id)
        run = self._runs.pop(handle.attempt_id, None)
        if run is not None:
            if not run.asked and run.slot is not None and run.slot.cell.alive:
                # Prepared and never started. In this order: after a crash, its groups are not taken for its own.
                folder.forget_handle()
                self._release(run)
            elif not run.released:
                await self._destroy_running(handle, run)
        elif folder.read_handle() is not None and not _over(place := self._place(handle), folder):
            await self._destroy_running(handle, _Run(place))
        self._taken_over.pop(handle.attempt_id, None)
        await folder.removed(used_again=run is not None and run.released and run.alone)

    async def _destroy_running(self, handle: Handle, run: _Run) -> None:
        """Kill what there may be of it; also the cell, unless it says that nothing else is left."""
        if run.slot is not None and run.started and run.cell is not None and run.cell.alive:
            await self._kill_all(handle, run)
            await asyncio.wait({run.cell.ended}, timeout=KILL_TIMEOUT_SECONDS)
            if run.cell.alive and run.cell.ended.done():
                self._release(run)
                return
        if run.place.boot == boot_id():
            await self._kill_all(handle, run, with_cell=True)
            await run.place.groups.remove()
        if run.pidfd >= 0:
            os.close(run.pidfd)
        if run.cell is not None:
            run.cell.close()
        self._slots.taken.discard(run.place.slot)

    async def stats(self, handle: Handle) -> Stats:
        run = self._run(handle)
        if run.status is not None:
            return Stats(None, None, None, 0)
        pids = self._processes(handle, run)
        known = run.place.groups.stats(run.place.cpu_seconds)
        read_bytes, written_bytes = disk_bytes(pids)
        return replace(known, pids=len(pids), read_bytes=read_bytes, written_bytes=written_bytes)

    async def processes(self, handle: Handle) -> set[int]:
        run = self._run(handle)
        return set() if run.status is not None else self._processes(handle, run)

    async def sweep(self, known: set[AttemptId]) -> None:
        await self.probe()
        wanted = {str(attempt_id) for attempt_id in known}
        for folder in self._workspace.attempts():
            if folder.root.name in wanted:
                continue
            if (written := folder.read_handle()) is not None:
                handle = Handle.loads(written)
                if handle.executor == self.name:
                    await self.destroy(handle)
            else:
                await asyncio.to_thread(folder.remove)
        # What has ended since `probe` looked has left its groups to nobody.
        self._slots.taken -= self._found - self._held() - set(self._taken_over.values())
        used = {f"slot-{slot}" for slot in self._slots.taken}
        for name in self._tree.groups() - used:
            await self._tree.group(name).remove()

    async def close(self) -> None:
        self._capabilities = None
        await self._slots.close()
        self._tree.remove_if_empty()
        for run in self._runs.values():
            if run.cell is not None:
                run.cell.close()
            if run.pidfd >= 0:
                os.close(run.pidfd)
        self._runs.clear()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _open(self, handle: Handle) -> tuple[_Place, AttemptFolder]:
        return self._place(handle), self._workspace.attempt(handle.attempt_id)

    def _place(self, handle: Handle) -> _Place:
        if handle.executor != self.name:
            raise UnknownHandle(f"a handle of the executor {handle.executor!r}")
        return _Place.loads(handle.data)

    def _run(self, handle: Handle) -> _Run:
        return self._runs.get(handle.attempt_id) or _Run(self._place(handle))

    def _cell_pid(self, handle: Handle, run: _Run) -> int:
        """0: there is none. A cell is never killed with its attempt, or nobody would note the end."""
        if run.cell_pid:
            return run.cell_pid
        started = _parse_started(self._workspace.attempt(handle.attempt_id).started)
        info = process_info(started[0]) if started is not None else None
        return info.pid if started is not None and info is not None and info.start_ticks == started[1] else 0

    def _processes(self, handle: Handle, run: _Run) -> set[int]:
        """Everything of the attempt except the cell."""
        cell_pid = self._cell_pid(handle, run)
        if run.place.groups.folders:
            return run.place.groups.members() - {cell_pid}
        found = descendants(cell_pid) if cell_pid else set[int]()
        # Without cgroups, a daemonised child of an unsandboxed job is known only by the environment it began with.
        return found | processes_with_env(f"{ATTEMPT_VARIABLE}={handle.attempt_id}".encode())

    def _job_processes(self, handle: Handle, run: _Run) -> set[int]:
        """The job's own processes, without the sandbox's: those stay in the session of the cell."""
        cell_pid = self._cell_pid(handle, run)
        infos = (process_info(pid) for pid in self._processes(handle, run))
        return {info.pid for info in infos if info is not None and info.session != cell_pid}

    async def _kill_all(self, handle: Handle, run: _Run, *, with_cell: bool = False) -> None:
        if run.place.boot != boot_id():
            return
        if run.place.groups.folders:
            spare: Set[int] = frozenset() if with_cell else {self._cell_pid(handle, run)}
            await run.place.groups.kill(spare)
            return
        deadline = asyncio.get_running_loop().time() + KILL_TIMEOUT_SECONDS
        while alive := _alive(self._processes(handle, run)):
            signal_processes(alive, _alive(self._processes(handle, run)), signal.SIGKILL)
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"processes {sorted(alive)[:5]} do not die")
            await asyncio.sleep(0.002)


def _over(place: _Place, folder: AttemptFolder) -> bool:
    """Whether a cell has noted its end: nothing of it is left in its groups, which may be somebody else's by now."""
    return place.version > 1 and _read_exit(folder.exit) is not None


def _alive(pids: set[int]) -> set[int]:
    infos = (process_info(pid) for pid in pids)
    return {info.pid for info in infos if info is not None and not info.zombie}


def _parse_started(path: Path) -> tuple[int, int] | None:
    """(pid, start ticks) of the cell; None while the line is not complete."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    parts = text.split()
    return (int(parts[0]), int(parts[1])) if text.endswith("\n") and len(parts) == 2 else None


async def _read_started(path: Path) -> tuple[int, int] | None:
    """The cell creates the file and writes the line right after: between the two, its daemon may have died."""
    deadline = asyncio.get_running_loop().time() + STARTED_TIMEOUT_SECONDS
    while (started := _parse_started(path)) is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
    return started


def _read_exit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None  # Not there, or its line was cut off by a crash of the machine.


def _tail(path: Path, size_bytes: int = 2000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read().decode(errors="replace")
