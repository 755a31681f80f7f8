"""A provider's machine: what really runs on it, its disk, its boot clock; and the executor that the daemon drives.

The machine outlives its daemon. What really runs is known here whatever the daemon or the platform believe, so two runs
of one job, or a device that is given away while a process still uses it, can be seen.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from signal import Signals
from typing import Any, override

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptSpec,
    Capabilities,
    Executor,
    ExitStatus,
    Handle,
    SandboxKind,
    Stats,
    StopReason,
    untold,
)
from dantegpu.daemon.journal import AttemptRow, Journal
from dantegpu.daemon.probe.devices import GpuSample
from dantegpu.daemon.probe.machine import Utilisation
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.ids import AttemptId, DeviceId, MachineId, TeamId
from tests.simulation.loop import SimLoop, current_process

SIGKILL_EXIT = 137
CHECKPOINT = "ckpt/state"
"""Below the work folder: what a job saves at notice is who it is."""
SIGTERM_EXIT = 143


@dataclass(slots=True, eq=False)
class JobProcess:
    """A job's process, as the kernel knows it."""

    attempt_id: AttemptId
    planned_exit: int
    ignores_term: bool
    started_at_seconds: float
    ended_at_seconds: float | None = None
    exit_code: int | None = None
    """None while it runs, and for ever when the machine lost power: nobody saw the end."""
    stop_reason: StopReason | None = None
    restored: str = ""
    """The attempt whose checkpoint lay there when it started."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return self.ended_at_seconds is None


def _nothing(machine: "Hardware", process: JobProcess) -> None:
    return


class Hardware:
    """One machine. `boot_offset_seconds` and `clock_rate` make its boot clock another one than everybody's."""

    def __init__(self, loop: SimLoop, random: Random, name: str, disk: Path, gpus: int, team_id: TeamId) -> None:
        self.loop = loop
        self.random = random
        self.name = name
        self.id = MachineId.new()
        self.team_id = team_id
        self.disk = disk
        self.gpus = gpus
        self.device_ids = [DeviceId.new() for _ in range(gpus)]
        self.boot = 1
        self.boot_offset_seconds = random.uniform(10, 1000)
        self.clock_rate = 1 + random.uniform(-1e-4, 1e-4)
        self.processes: dict[AttemptId, JobProcess] = {}
        self.all_processes: list[JobProcess] = []
        self.journal_file = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.on_start: Callable[[Hardware, JobProcess], None] = _nothing
        self.on_end: Callable[[Hardware, JobProcess], None] = _nothing
        self.powered = True

    def boot_time(self) -> float:
        return self.boot_offset_seconds + self.loop.time() * self.clock_rate

    def boot_id(self) -> str:
        return f"{self.name} boot {self.boot}"

    def inventory(self) -> machine_pb2.Inventory:
        return machine_pb2.Inventory(
            hostname=self.name,
            cpu_milli=4000,
            memory_bytes=8 << 30,
            disk_bytes=100 << 30,
            sandbox="bubblewrap",
            executors=["process"],
            devices=[
                machine_pb2.Device(
                    id=str(device), index=index, model="NVIDIA GeForce RTX 4090", uuid=f"GPU-{self.name}-{index}",
                    vram_bytes=24 << 30, compute_capability="8.9",
                )
                for index, device in enumerate(self.device_ids)
            ],
        )  # fmt: skip

    # --- processes ----------------------------------------------------------------------------------------------------

    def launch(self, spec: AttemptSpec, restored: str) -> JobProcess:
        """The command runs from now on. Its arguments say for how long: `sim SECONDS EXIT_CODE [stubborn]`."""
        seconds, exit_code = float(spec.command[1]), int(spec.command[2])
        process = JobProcess(spec.attempt_id, exit_code, "stubborn" in spec.command, self.loop.time())
        process.restored = restored
        self.processes[spec.attempt_id] = process
        self.all_processes.append(process)
        self.loop.later(seconds, self._exit, process, exit_code)
        self.on_start(self, process)
        return process

    def _exit(self, process: JobProcess, exit_code: int | None) -> None:
        if process.alive:
            process.ended_at_seconds = self.loop.time()
            process.exit_code = exit_code
            process.ended.set()
            self.on_end(self, process)

    def terminate(self, process: JobProcess) -> None:
        """SIGTERM: a decent job ends after a moment."""
        if process.alive and not process.ignores_term:
            self.loop.later(self.random.uniform(0.01, 0.5), self._exit, process, SIGTERM_EXIT)

    def kill(self, process: JobProcess) -> None:
        self._exit(process, SIGKILL_EXIT)

    def lose_power(self) -> None:
        """Everything on it ends at once; what was in memory is gone, the disk stays."""
        self.powered = False
        for process in self.processes.values():
            self._exit(process, None)

    def start_again(self) -> None:
        self.powered = True
        self.boot += 1
        self.boot_offset_seconds = -self.loop.time() * self.clock_rate


class DiskJournal(Journal):
    """The real journal on the machine's disk: one SQLite database that outlives its daemons. Each write is a step."""

    def __init__(self, machine: Hardware) -> None:
        super().__init__(machine.disk / "journal.db")
        self._machine = machine

    @override
    def _connect(self) -> sqlite3.Connection:
        return self._machine.journal_file

    @override
    def close(self) -> None:
        self._database = None

    @override
    def add(self, row: AttemptRow) -> None:
        _step()
        super().add(row)
        _step()

    @override
    def save(self, row: AttemptRow) -> None:
        _step()
        super().save(row)
        _step()

    @override
    async def committed(self) -> None:
        await super().committed()
        _step()


def _step() -> None:
    """A moment at which the daemon may die."""
    process = current_process()
    if process is not None:
        process.failpoint()


class SimExecutor(Executor):
    """Drives the machine's processes as executors/process.py drives real ones: markers on disk, adopted by anybody."""

    name = "process"

    def __init__(self, machine: Hardware, workspace: Workspace) -> None:
        self._machine = machine
        self._workspace = workspace

    @override
    async def probe(self) -> Capabilities:
        return Capabilities(SandboxKind.BUBBLEWRAP, frozenset(), {}, network=False)

    @override
    async def prepare(self, spec: AttemptSpec, progress: Callable[[str], None] = untold) -> Handle:
        _step()
        handle = Handle(self.name, spec.attempt_id, "{}")
        folder = self._workspace.attempt(spec.attempt_id)
        folder.create()
        folder.write_handle(handle.dumps())
        return handle

    @override
    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        _step()
        folder = self._workspace.attempt(handle.attempt_id)
        if folder.started.exists():
            raise AlreadyStarted
        await asyncio.sleep(self._machine.random.uniform(0.001, 0.02))
        _step()
        if folder.started.exists():
            raise AlreadyStarted
        folder.started.write_text("1 1")
        began = self._machine.loop.time()
        os.utime(folder.started, (began, began))
        state = folder.work / CHECKPOINT
        self._machine.launch(spec, state.read_text() if state.exists() else "")
        _step()

    @override
    async def adopt(self, handle: Handle) -> Adoption:
        _step()
        if not self._workspace.attempt(handle.attempt_id).started.exists():
            return Adoption.NOT_STARTED
        process = self._machine.processes.get(handle.attempt_id)
        return Adoption.RUNNING if process is not None and process.alive else Adoption.ENDED

    @override
    async def wait(self, handle: Handle) -> ExitStatus:
        process = self._machine.processes.get(handle.attempt_id)
        if process is None:
            return ExitStatus(None)
        await process.ended.wait()
        return ExitStatus(process.exit_code, stop_reason=process.stop_reason)

    @override
    async def stop(
        self, handle: Handle, *, grace_seconds: float, reason: StopReason, notice: Signals | None = None
    ) -> None:
        _step()
        process = self._machine.processes.get(handle.attempt_id)
        if process is None or not process.alive:
            return
        process.stop_reason = process.stop_reason or reason
        if grace_seconds > 0:
            if notice is not None and not process.ignores_term:
                state = self._workspace.attempt(handle.attempt_id).work / CHECKPOINT
                state.parent.mkdir(exist_ok=True)
                state.write_text(str(handle.attempt_id))
            self._machine.terminate(process)
            try:
                async with asyncio.timeout(grace_seconds):
                    await process.ended.wait()
            except TimeoutError:
                _step()
        self._machine.kill(process)

    @override
    async def destroy(self, handle: Handle) -> None:
        _step()
        process = self._machine.processes.pop(handle.attempt_id, None)
        if process is not None:
            self._machine.kill(process)
        self._workspace.attempt(handle.attempt_id).remove()

    @override
    async def stats(self, handle: Handle) -> Stats:
        return Stats(None, None, None, 1)

    @override
    async def close(self) -> None:
        return

    @override
    async def sweep(self, known: set[AttemptId]) -> None:
        """As ProcessExecutor.sweep."""
        names = {str(attempt_id) for attempt_id in known}
        for folder in self._workspace.attempts():
            if folder.root.name not in names:
                await self.destroy(Handle(self.name, AttemptId.parse(folder.root.name), "{}"))


class SimProbe:
    """What the daemon measures."""

    def utilisation(self) -> Utilisation:
        return Utilisation(0.0, 0, [])

    def sample_gpus(self) -> list[GpuSample]:
        return []

    def closed(self) -> str:
        return ""


class SimShipper:
    """Logs are stored at once: how they travel is no part of this simulation."""

    def add(self, tail: Any) -> None:
        return

    def remove(self, attempt_id: AttemptId) -> None:
        return

    def ended(self, tail: Any) -> None:
        tail.ended = True
        tail.complete.set()
