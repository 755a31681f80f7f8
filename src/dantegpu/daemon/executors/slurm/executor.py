"""The executor: attempts as jobs of one node of a Slurm cluster, found again by their numbers or their comments.

Placement is the platform's: each job names its node. Slurm keeps its own rules on top (who else uses the node, limits,
preemption), and what they do to an attempt is told apart from what the job and the daemon do. See `node` for what runs
there, `site` for what the nodes of a cluster share.
"""

import asyncio
import contextlib
import json
import os
import signal
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptRefused,
    AttemptSpec,
    Capabilities,
    Executor,
    ExitStatus,
    Handle,
    InterruptedBy,
    Interruption,
    NoRoom,
    SandboxFailed,
    SandboxKind,
    Stats,
    StopReason,
    UnknownHandle,
    untold,
)
from dantegpu.daemon.executors.process import FIRST_UID, UID_BLOCKS
from dantegpu.daemon.executors.slots import SLOTS_MAX
from dantegpu.daemon.executors.slurm.client import Batch, JobRow, SlurmUnreachable, gres_of
from dantegpu.daemon.executors.slurm.node import NOTICE, Order, write_whole
from dantegpu.daemon.executors.slurm.site import SlurmSite
from dantegpu.daemon.workspace import AttemptFolder, Workspace
from dantegpu.domain.ids import AttemptId

log = structlog.get_logger(__name__)

MIB = 1 << 20
OVERHEAD_MIB = 32
"""Asked of Slurm on top of what the job may have: what the node's program around it uses."""
TRIAL_BYTES = 64 * MIB
MARGIN_SECONDS = 120
"""Slurm's own time limit is this much above the job's: the daemon's comes first, and knows of grace."""
FIRST_PAUSE_SECONDS = 0.02
FILE_SECONDS = 0.2
"""How often the marks in an attempt's folder are looked for."""
RETRY_SECONDS = 1.0
KILL_SECONDS = 3.0
"""How long the node's program has to kill a job, before Slurm is asked to."""
OVER_SECONDS = 15.0
"""Slurm may be busy with its own clean-up for so long after the end of a job; then the job's own word counts."""
FILES_SECONDS = 5.0
"""A shared file system may show a file this late to another machine."""
_FAULTS = {
    "NODE_FAIL": "the node failed",
    "BOOT_FAIL": "the node did not boot",
    "TIMEOUT": "it reached the cluster's time limit, which is below the job's own",
    "DEADLINE": "it reached the cluster's deadline",
}
_OWNER = {
    "CANCELLED": "an administrator of the cluster cancelled it",
    "PREEMPTED": "the cluster preempted it for another job",
    "REVOKED": "the cluster gave it away",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """What a handle of this executor holds. The job's number stands in the folder, as it is known only later."""

    node: str
    slot: int
    uid: int
    sandbox: SandboxKind

    def dumps(self) -> str:
        return json.dumps(
            {"version": 1, "node": self.node, "slot": self.slot, "uid": self.uid, "sandbox": self.sandbox}
        )

    @classmethod
    def loads(cls, text: str) -> "_Place":
        raw = json.loads(text)
        if raw.get("version") != 1:
            raise UnknownHandle(f"handle version {raw.get('version')!r} is not of this daemon's version")
        return cls(raw["node"], raw["slot"], raw["uid"], SandboxKind(raw["sandbox"]))


class SlurmExecutor(Executor):
    """Runs attempts on `node`. `gpu_types`: of its GPUs by index, as Slurm calls them.

    `leases`: the daemon's file of leases, which the node looks at; None: no attempt has one.
    """

    name = "slurm"
    queues = True
    reads_leases = True

    def __init__(
        self,
        workspace: Workspace,
        site: SlurmSite,
        node: str,
        *,
        sandbox: SandboxKind = SandboxKind.BUBBLEWRAP,
        allow_network: bool = False,
        gpu_types: Sequence[str] = (),
        leases: Path | None = None,
    ) -> None:
        self._workspace = workspace
        self._site = site
        self._node = node
        self._wanted = sandbox
        self._allow_network = allow_network
        self._gpu_types = tuple(gpu_types)
        self._leases = leases
        self._capabilities: Capabilities | None = None
        self._slots: set[int] = set()
        self._held: dict[AttemptId, tuple[int, ...]] = {}
        self._progress: dict[AttemptId, Callable[[str], None]] = {}
        block = zlib.crc32(os.fsencode(workspace.root.absolute())) % UID_BLOCKS
        self._uid_base = FIRST_UID + block * SLOTS_MAX

    # --- what works there ---------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        """By a trial job, whose result is kept for later daemons. Raises NoRoom while Slurm does not start it."""
        if self._capabilities is None:
            self._workspace.create()
            self._take_slots()
            known = self._site.folder / "nodes" / f"{self._node}.{self._wanted.value}.json"
            if not known.exists():
                known.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                write_whole(known, json.dumps(await self._trial()))
            raw: dict[str, Any] = json.loads(known.read_text())
            missing: Mapping[str, str] = raw["missing"]
            self._capabilities = Capabilities(
                SandboxKind(raw["sandbox"]), frozenset(raw["limits"]), missing, self._allow_network
            )
        return self._capabilities

    async def _trial(self) -> dict[str, Any]:
        """Run `true` there: whether the sandbox works, and which limits there are, shows only by trying."""
        spec = AttemptSpec(AttemptId.new(), ("true",), cpu_milli=1000, memory_bytes=TRIAL_BYTES)
        folder = self._workspace.attempt(spec.attempt_id)
        handle = self._make(spec, folder, self._wanted)
        try:
            if os.geteuid() == 0:
                await folder.give_to(_Place.loads(handle.data).uid)
            missing: dict[str, str] = {}
            try:
                await self._start(handle, spec, trial=True)
                status = await self.wait(handle)
                if status.exit_code is None:
                    why = status.interruption.message if status.interruption is not None else "Slurm lost it"
                    raise NoRoom(f"the trial job on {self._node} did not end: {why}")
                if status.exit_code != 0:
                    missing["sandbox"] = f"a trial run on the node ended with {status.exit_code}"
            except SandboxFailed as error:
                missing["sandbox"] = str(error)
            try:
                limits: dict[str, Any] = json.loads((folder.root / "limits.json").read_text())
            except FileNotFoundError:
                limits = {"limits": [], "missing": {}}
            kept = set(limits["limits"])
            missing |= {name: why for name, why in limits["missing"].items() if name not in kept}
            kind = SandboxKind.NONE if "sandbox" in missing else self._wanted
            return {"sandbox": kind.value, "limits": sorted(kept), "missing": missing}
        finally:
            await self.destroy(handle)

    def _take_slots(self) -> None:
        for folder in self._workspace.attempts():
            text = folder.read_handle()
            if text is not None and (handle := Handle.loads(text)).executor == self.name:
                self._slots.add(_Place.loads(handle.data).slot)

    def _make(self, spec: AttemptSpec, folder: AttemptFolder, sandbox: SandboxKind) -> Handle:
        slot = next((slot for slot in range(SLOTS_MAX) if slot not in self._slots), None)
        if slot is None:
            raise AttemptRefused(f"all {SLOTS_MAX} places for attempts are taken")
        self._slots.add(slot)
        folder.create()
        handle = Handle(self.name, spec.attempt_id, _Place(self._node, slot, self._uid_base + slot, sandbox).dumps())
        folder.write_handle(handle.dumps())
        return handle

    # --- Executor -----------------------------------------------------------------------------------------------------

    async def prepare(self, spec: AttemptSpec, progress: Callable[[str], None] = untold) -> Handle:
        folder = self._workspace.attempt(spec.attempt_id)
        self._progress[spec.attempt_id] = progress
        if (known := folder.read_handle()) is not None:
            return Handle.loads(known)
        capabilities = await self.probe()
        if self._wanted is SandboxKind.BUBBLEWRAP and capabilities.sandbox is SandboxKind.NONE:
            raise AttemptRefused(f"the node {self._node} has no sandbox: {capabilities.missing['sandbox']}")
        if spec.image is not None:
            raise AttemptRefused("this cluster runs no container images")
        if spec.network and not self._allow_network:
            raise AttemptRefused("this machine gives jobs no network")
        handle = self._make(spec, folder, capabilities.sandbox)
        if capabilities.sandbox is SandboxKind.BUBBLEWRAP and os.geteuid() == 0:
            await folder.give_to(_Place.loads(handle.data).uid)
        return handle

    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        await self._start(handle, spec)

    async def _start(self, handle: Handle, spec: AttemptSpec, *, trial: bool = False) -> None:
        place, folder = self._open(handle)
        try:
            os.close(os.open(folder.root / "submitted", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            raise AlreadyStarted(f"{handle.attempt_id} was started before") from None
        real = [device for device in spec.devices if not device.simulated]
        leased = self._held[handle.attempt_id] = tuple(device.index for device in spec.devices)
        leases = str(self._leases) if self._leases is not None and not trial else ""
        order = Order(spec, place.sandbox, place.uid, len(real), leased, trial, leases)
        write_whole(folder.root / "order.json", order.dumps())
        gpus = [self._gpu_types[device.index] for device in spec.devices if device.index < len(self._gpu_types)]
        batch = Batch(
            node=self._node,
            cpus=max(1, -(-spec.cpu_milli // 1000)),
            memory_mib=-(-spec.memory_bytes // MIB) + OVERHEAD_MIB if spec.memory_bytes else 0,
            gres=gres_of(gpus),
            minutes=-(-(spec.max_seconds + MARGIN_SECONDS) // 60) if spec.max_seconds else 0,
            script="",
            attempts=(str(spec.attempt_id),),
        )
        number = await self._site.submit(batch, folder.root)
        write_whole(folder.root / "number", number)
        await self._until_running(handle, number)

    async def _until_running(self, handle: Handle, number: str) -> None:
        """Until its command runs. Raises SandboxFailed, and NoRoom when Slurm does not start it."""
        _, folder = self._open(handle)
        began_at = asyncio.get_running_loop().time()
        pause_seconds, told = FIRST_PAUSE_SECONDS, ""
        while not (folder.root / "running").exists():
            if (failed := folder.root / "failed").exists():
                raise SandboxFailed(failed.read_text() or _tail(folder.log))
            row = (await self._site.jobs(self._site.poll_seconds)).get(number)
            waited_seconds = asyncio.get_running_loop().time() - began_at
            if row is not None and row.over:
                if row.node and await _appears(folder.root / "running", folder.root / "failed"):
                    continue
                raise NoRoom(f"Slurm did not start it on {self._node}: {row.state.lower()} ({row.reason})")
            if row is not None and row.waiting:
                if told != row.reason and row.reason not in ("None", "Priority"):
                    told = row.reason
                    self._progress.get(handle.attempt_id, untold)(f"waits in the cluster's queue ({told})")
                if waited_seconds > self._site.start_seconds and await self._still_waits(number):
                    await self._cancel(handle, number)
                    raise NoRoom(f"Slurm did not start it on {self._node} within {waited_seconds:.0f} s ({row.reason})")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(FILE_SECONDS, pause_seconds * 1.5)

    async def _still_waits(self, number: str) -> bool:
        row = (await self._site.jobs()).get(number)
        return row is not None and row.waiting

    async def adopt(self, handle: Handle) -> Adoption:
        place, folder = self._open(handle)
        self._slots.add(place.slot)
        if not (folder.root / "submitted").exists():
            return Adoption.NOT_STARTED
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._held[handle.attempt_id] = Order.loads((folder.root / "order.json").read_text()).leased
        row = await self._find(handle)
        if row is not None and not row.over:
            return Adoption.RUNNING
        if row is None and self._number(folder) is None and not folder.started.exists():
            # The daemon before this one died around its call. Should that be on its way all the same, the exclusive
            # mark that the node makes lets only one of both jobs run the command.
            (folder.root / "submitted").unlink(missing_ok=True)
            return Adoption.NOT_STARTED
        return Adoption.ENDED

    async def wait(self, handle: Handle) -> ExitStatus:
        _, folder = self._open(handle)
        row = await self._until_over(handle)
        if row is not None and row.state == "COMPLETED" and not folder.exit.exists():
            await _appears(folder.exit, folder.root / "requeued", folder.root / "failed")
        return status_of(folder, row)

    async def _until_over(self, handle: Handle) -> JobRow | None:
        """The job as Slurm shows it last; None when it does not know it any more."""
        _, folder = self._open(handle)
        loop = asyncio.get_running_loop()
        pause_seconds, ended_at = FIRST_PAUSE_SECONDS, None
        while True:
            if ended_at is None and folder.exit.exists():
                ended_at, pause_seconds = loop.time(), FIRST_PAUSE_SECONDS
            try:
                row = await self._find(handle, 0.0 if ended_at is not None else self._site.poll_seconds)
            except SlurmUnreachable as error:
                # A controller that is being restarted; the attempt's lease bounds how long anybody waits.
                log.warning("slurm_unreachable", attempt_id=str(handle.attempt_id), error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if row is None or row.over:
                return row
            if row.waiting and folder.started.exists():
                # A look from before its start, or has Slurm taken it back?
                row = await self._find(handle)
            if row is not None and row.waiting and folder.started.exists():
                await self._cancel(handle, row.id)
                return JobRow(row.id, "REQUEUED", row.node, row.gpus, row.reason, row.label)
            if ended_at is not None and loop.time() - ended_at > OVER_SECONDS:
                return None
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(FILE_SECONDS, pause_seconds * 1.5)

    async def stop(
        self, handle: Handle, *, grace_seconds: float, reason: StopReason, notice: signal.Signals | None = None
    ) -> None:
        _, folder = self._open(handle)
        if folder.exit.exists() or not folder.root.is_dir():
            return
        row = await self._find(handle)
        if row is None or row.over:
            return
        if not folder.stop.exists():
            folder.stop.write_text(reason.value)
        if row.live and grace_seconds > 0:
            if notice is not None:
                write_whole(folder.root / NOTICE, notice.name)
            await self._site.slurm.signal(row.id, "TERM")
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._until_over(handle)
            except TimeoutError:
                log.info("attempt_killed_after_grace", attempt_id=str(handle.attempt_id), grace_seconds=grace_seconds)
        await self._kill(handle)

    async def _kill(self, handle: Handle) -> None:
        """The node's program does it at once; Slurm itself does it in the end, whatever that program does."""
        row = await self._find(handle)
        if row is not None and row.state == "RUNNING":
            await self._site.slurm.signal(row.id, "USR2")
            try:
                async with asyncio.timeout(KILL_SECONDS):
                    await self._until_over(handle)
            except TimeoutError:
                pass
            row = await self._find(handle)
        if row is not None and not row.over:
            await self._cancel(handle, row.id)

    async def _cancel(self, handle: Handle, number: str) -> None:
        await self._site.slurm.cancel(number)
        while (row := (await self._site.jobs()).get(number)) is not None and not row.over:
            await asyncio.sleep(FILE_SECONDS)
        log.info("slurm_job_cancelled", attempt_id=str(handle.attempt_id), number=number)

    async def destroy(self, handle: Handle) -> None:
        place, folder = self._open(handle)
        if (folder.root / "submitted").exists():
            await self._kill(handle)
        self._progress.pop(handle.attempt_id, None)
        self._held.pop(handle.attempt_id, None)
        await asyncio.to_thread(folder.remove)
        self._slots.discard(place.slot)

    async def stats(self, handle: Handle) -> Stats:
        _, folder = self._open(handle)
        if folder.exit.exists() or not folder.started.exists():
            return Stats(None, None, None, 0)
        before = _sample(folder)
        raw = before
        deadline = asyncio.get_running_loop().time() + FILES_SECONDS
        # A job that has just begun is not yet what its first sample says.
        while raw.get("number", 0) < 8 and raw == before and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(FILE_SECONDS / 4)
            if folder.exit.exists():
                return Stats(None, None, None, 0)
            raw = _sample(folder)
        return Stats(
            raw.get("cpu_seconds"), raw.get("memory_bytes"), raw.get("memory_peak_bytes"), raw.get("pids", 0),
            raw.get("read_bytes"), raw.get("written_bytes"),
        )  # fmt: skip

    async def sweep(self, known: set[AttemptId]) -> None:
        self._workspace.create()
        self._take_slots()
        wanted = {str(attempt_id) for attempt_id in known}
        for folder in self._workspace.attempts():
            if folder.root.name in wanted:
                continue
            text = folder.read_handle()
            if text is None:
                await asyncio.to_thread(folder.remove)
            elif (handle := Handle.loads(text)).executor == self.name:
                await self.destroy(handle)
        rows = (await self._site.jobs()).values()
        mine = [row for row in rows if row.label.startswith(f"{self._node}/") and not row.over]
        await self._site.slurm.cancel(*(row.id for row in mine if row.label.partition("/")[2] not in wanted))

    async def close(self) -> None:
        self._capabilities = None

    def held(self) -> set[int]:
        """Indexes of the GPUs that its attempts have leased. Asked in threads, too."""
        return {index for indexes in list(self._held.values()) for index in indexes}

    # --- small things -------------------------------------------------------------------------------------------------

    def _open(self, handle: Handle) -> tuple[_Place, AttemptFolder]:
        if handle.executor != self.name:
            raise UnknownHandle(f"a handle of the executor {handle.executor!r}")
        return _Place.loads(handle.data), self._workspace.attempt(handle.attempt_id)

    @staticmethod
    def _number(folder: AttemptFolder) -> str | None:
        try:
            return (folder.root / "number").read_text()
        except FileNotFoundError:
            return None

    async def _find(self, handle: Handle, max_age_seconds: float = 0.0) -> JobRow | None:
        """Its job: the one that is not over, where a daemon that died in the middle has left two."""
        jobs = await self._site.jobs(max_age_seconds)
        number = self._number(self._workspace.attempt(handle.attempt_id))
        row = jobs.get(number) if number is not None else None
        if row is not None and not row.over:
            return row
        label = f"{self._node}/{handle.attempt_id}"
        row = next((other for other in jobs.values() if other.label == label and not other.over), row)
        if row is None and max_age_seconds:
            # That look may be from before its submission.
            return await self._find(handle)
        return row


def status_of(folder: AttemptFolder, row: JobRow | None) -> ExitStatus:
    """How it ended, by what the node wrote and by what Slurm shows last (None: nothing any more)."""
    exit_code = _read_exit(folder.exit)
    out_of_memory = (folder.root / "oom").exists() or (row is not None and row.state == "OUT_OF_MEMORY")
    if folder.stop.is_file():
        reason = StopReason(folder.stop.read_text())
        return ExitStatus(
            128 + signal.SIGKILL if exit_code is None else exit_code, out_of_memory and exit_code != 0, reason
        )
    if exit_code != 0 and out_of_memory:
        return ExitStatus(exit_code or 128 + signal.SIGKILL, oom_killed=True)
    if exit_code != 0 and (interruption := _interruption(folder, row)) is not None:
        return ExitStatus(None, interruption=interruption)
    return ExitStatus(exit_code)


def _interruption(folder: AttemptFolder, row: JobRow | None) -> Interruption | None:
    """What Slurm did to it, unless it ended by itself."""
    state = row.state if row is not None else ""
    where = f" (Slurm job {row.id} on {row.node or 'no node'})" if row is not None else ""
    if state == "REQUEUED" or (folder.root / "requeued").exists():
        return Interruption(InterruptedBy.OWNER, f"the cluster requeued it{where}")
    if state == "TIMEOUT" and _reached_its_own_limit(folder):
        return Interruption(InterruptedBy.TIME_LIMIT, f"ended after its maximum duration{where}")
    if state in _FAULTS:
        return Interruption(InterruptedBy.FAULT, _FAULTS[state] + where)
    return Interruption(InterruptedBy.OWNER, _OWNER[state] + where) if state in _OWNER else None


def _reached_its_own_limit(folder: AttemptFolder) -> bool:
    limit = Order.loads((folder.root / "order.json").read_text()).spec.max_seconds
    try:
        last = max(
            path.stat().st_mtime for path in (folder.started, folder.root / "stats.json", folder.exit) if path.exists()
        )
        return bool(limit) and last - folder.started.stat().st_mtime >= limit
    except (FileNotFoundError, ValueError):
        return False


def _read_exit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _sample(folder: AttemptFolder) -> dict[str, Any]:
    try:
        return json.loads((folder.root / "stats.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


async def _appears(*paths: Path) -> bool:
    """Whether one of these is there: written by another machine a moment ago, it may show late."""
    deadline = asyncio.get_running_loop().time() + FILES_SECONDS
    while True:
        os.listdir(paths[0].parent)  # makes a network file system ask again
        if any(path.exists() for path in paths):
            return True
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(FILE_SECONDS)


def _tail(path: Path, size_bytes: int = 2000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read().decode(errors="replace")
