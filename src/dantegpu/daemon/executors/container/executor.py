"""The executor: containers named after their attempts, found again by name after any crash.

The engine keeps a container running without the daemon, and its exit code until it is removed, so nothing of ours has
to outlive the daemon. See `plan` for what isolates a job, `images` for where images come from, `escapes` for which
engines are refused.
"""

import asyncio
import json
import os
import signal
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    JobAtFault,
    Published,
    SandboxFailed,
    SandboxKind,
    Stats,
    StopReason,
    UnknownHandle,
    untold,
)
from dantegpu.daemon.executors.container import escapes, gpus
from dantegpu.daemon.executors.container.engine import (
    CONFLICT,
    Engine,
    EngineError,
    EngineFacts,
    EngineUnreachable,
    Json,
)
from dantegpu.daemon.executors.container.images import Images
from dantegpu.daemon.executors.container.network import FilterFailed, NetworkPolicy, Networks
from dantegpu.daemon.executors.container.plan import (
    MAPPED_UIDS,
    Plan,
    User,
    docker_body,
    podman_body,
)
from dantegpu.daemon.executors.container.ports import HostPorts, Pair
from dantegpu.daemon.executors.container.profile import write_hardened
from dantegpu.daemon.executors.gang import Gang
from dantegpu.daemon.executors.processes import (
    descendants,
    handlers,
    open_process,
    process_ended,
    process_info,
    signal_processes,
)
from dantegpu.daemon.workspace import AttemptFolder, Workspace
from dantegpu.domain.ids import AttemptId

log = structlog.get_logger(__name__)

# Above the users of the executor `process`; a range per state folder, so two daemons on a machine share none.
FIRST_UID = 1_900_000_000
UID_BLOCKS = 3000
FIRST_SLOT_UID = 1000
MAX_SLOTS = 4096
LABEL_WORKSPACE = "dev.dantegpu.workspace"
LABEL_ATTEMPT = "dev.dantegpu.attempt"
RETRY_SECONDS = 1.0
TERM_POLL_SECONDS = 0.05
_RUNNING = ("running", "paused", "restarting", "stopping", "removing")
_NEVER_STARTED = ("created", "configured", "initialized")


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """What the machine's owner allows. `network`: None: jobs get none. `local_images`: patterns of names that are used
    without asking a registry. `allowed_images`: patterns of names that may run; empty: all."""

    network: NetworkPolicy | None = None
    image_cache_bytes: int = 100 << 30
    local_images: Sequence[str] = ()
    allowed_images: Sequence[str] = ()
    accepted_escapes: frozenset[str] = frozenset()
    cdi_folders: Sequence[Path] = gpus.SPEC_FOLDERS


@dataclass(frozen=True, slots=True)
class _Place:
    """What a handle of this executor holds."""

    container: str
    slot: int
    user: User
    network: str = ""
    """Of its own, called like the container; empty: none."""
    ports: tuple[Pair, ...] = ()
    gang: Gang | None = None

    def dumps(self) -> str:
        user = [self.user.inside, self.user.host, self.user.mapped_from]
        gang = [self.gang.number, self.gang.rank, self.gang.machines] if self.gang is not None else None
        where = {"network": self.network, "ports": self.ports, "gang": gang}
        return json.dumps({"version": 1, "container": self.container, "slot": self.slot, "user": user, **where})

    @classmethod
    def loads(cls, text: str) -> "_Place":
        raw = json.loads(text)
        if raw.get("version") != 1:
            raise UnknownHandle(f"handle version {raw.get('version')!r} is not of this daemon's version")
        ports = tuple((number, machine_port) for number, machine_port in raw.get("ports", ()))
        node = raw.get("gang")
        gang = Gang(node[0], node[1], tuple(node[2])) if node is not None else None
        return cls(raw["container"], raw["slot"], User(*raw["user"]), raw.get("network", ""), ports, gang)


@dataclass(frozen=True, slots=True)
class _State:
    """A container at one moment."""

    status: str
    pid: int
    exit_code: int
    oom_killed: bool
    id: str

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> "_State":
        state: Mapping[str, Any] = found["State"]
        return cls(
            str(state["Status"]), int(state.get("Pid") or 0), int(state.get("ExitCode") or 0),
            bool(state.get("OOMKilled")), str(found["Id"]),
        )  # fmt: skip

    @property
    def running(self) -> bool:
        return self.status in _RUNNING

    @property
    def never_started(self) -> bool:
        return self.status in _NEVER_STARTED


@dataclass(slots=True)
class _Known:
    """What `probe` found."""

    facts: EngineFacts | None
    capabilities: Capabilities
    accepted: Mapping[str, str] = field(default_factory=dict[str, str])


class ContainerExecutor(Executor):
    """Runs attempts as containers of the engine behind `socket`, with their folders below `workspace`."""

    name = "container"

    def __init__(self, workspace: Workspace, socket: Path, limits: ContainerLimits | None = None) -> None:
        self._workspace = workspace
        self._limits = limits or ContainerLimits()
        self._engine = Engine(socket)
        record = workspace.root / "images.json"
        self._images = Images(
            self._engine, record, cache_bytes=self._limits.image_cache_bytes, local=self._limits.local_images
        )
        self._known: _Known | None = None
        self._slots: set[int] = set()
        checksum = zlib.crc32(os.fsencode(workspace.root.absolute()))
        self._label = f"{checksum:08x}"
        allowed = self._limits.network
        self._networks = Networks(self._engine, self._label, allowed or NetworkPolicy())
        self._publish = allowed.publish if allowed is not None else None
        self._ports = HostPorts(self._publish)
        self._uid_base = FIRST_UID + checksum % UID_BLOCKS * MAPPED_UIDS

    # --- what works here ----------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        if self._known is None:
            self._workspace.create()
            self._take_slots()
            self._known = await self._look()
        return self._known.capabilities

    async def has_image(self, name: str) -> bool:
        """Whether it lies on this machine already."""
        return await self._engine.image(name) is not None

    @property
    def _profile(self) -> Path:
        return self._workspace.root / "seccomp.json"

    @property
    def accepted_escapes(self) -> Mapping[str, str]:
        """Known ways out of a container that the owner has accepted: name -> what has it."""
        return self._known.accepted if self._known is not None else {}

    @property
    def facts(self) -> EngineFacts | None:
        return self._known.facts if self._known is not None else None

    async def _look(self) -> _Known:
        try:
            facts = await self._engine.facts()
        except (EngineUnreachable, EngineError) as error:
            return _Known(None, Capabilities(SandboxKind.NONE, frozenset(), {"container": str(error)}, False))
        toolkit = await asyncio.to_thread(escapes.installed_toolkit)
        findings = escapes.look(facts.runtime, facts.runtime_version, toolkit, self._limits.accepted_escapes)
        problem = findings.problem or self._problem_with_users(facts)
        if not facts.seccomp:
            problem = problem or f"{facts.name} runs containers without seccomp"
        if facts.seccomp_profile is not None and not problem:
            try:
                await asyncio.to_thread(write_hardened, facts.seccomp_profile, self._profile)
            except (OSError, ValueError, KeyError) as error:
                problem = f"the seccomp profile {facts.seccomp_profile} of {facts.name} is not readable: {error}"
        missing = {"container": problem} if problem else {}
        kind = SandboxKind.NONE if problem else SandboxKind(facts.name)
        limits = frozenset({"cpu", "memory", "pids"})
        network = self._limits.network is not None and not problem
        if network and (lacking := await self._networks.problem(facts)):
            network = False
            missing["network"] = lacking
        ports = network and self._publish is not None
        gangs = network and self._limits.network is not None and self._limits.network.site_port > 0
        if gangs and (lacking := await self._networks.gang_problem()):
            gangs = False
            missing["site"] = lacking
        return _Known(facts, Capabilities(kind, limits, missing, network, ports, gangs), findings.accepted)

    @staticmethod
    def _problem_with_users(facts: EngineFacts) -> str:
        if facts.rootless and os.geteuid() == 0:
            return f"{facts.name} is another user's (rootless), whose containers cannot read root's folders"
        if facts.remapped_uid is not None and os.geteuid() != 0:
            return f"{facts.name} maps users (userns-remap), so only a daemon that is root can give jobs their files"
        return ""

    def _take_slots(self) -> None:
        for folder in self._workspace.attempts():
            handle = folder.read_handle()
            if handle is not None and Handle.loads(handle).executor == self.name:
                self._hold(_Place.loads(Handle.loads(handle).data))

    def _hold(self, place: _Place) -> None:
        self._slots.add(place.slot)
        self._ports.hold(place.ports)
        if place.gang is not None:
            self._networks.know(place.slot, place.gang)

    def _user(self, slot: int, facts: EngineFacts) -> User:
        """A job never runs as the host's root, whatever the image says."""
        if os.geteuid() != 0:
            # Root of a rootless engine's containers is the daemon's own unprivileged user.
            return User(0 if facts.rootless else os.geteuid(), os.geteuid())
        uid = FIRST_SLOT_UID + slot
        if facts.remapped_uid is not None:
            return User(uid, facts.remapped_uid + uid)
        if facts.podman:
            return User(uid, self._uid_base + uid, mapped_from=self._uid_base)
        return User(self._uid_base + uid, self._uid_base + uid)

    def _new_slot(self) -> int:
        slot = next((slot for slot in range(MAX_SLOTS) if slot not in self._slots), None)
        if slot is None:
            raise AttemptRefused(f"all {MAX_SLOTS} places for containers are taken")
        self._slots.add(slot)
        return slot

    def _new_place(self, spec: AttemptSpec, facts: EngineFacts) -> _Place:
        ports = self._ports.take(spec.ports)
        slot = self._new_slot()
        name = f"dante-{self._label}-{spec.attempt_id}"
        return _Place(name, slot, self._user(slot, facts), name if spec.network else "", ports, spec.gang)

    # --- Executor -----------------------------------------------------------------------------------------------------

    async def prepare(self, spec: AttemptSpec, progress: Callable[[str], None] = untold) -> Handle:
        folder = self._workspace.attempt(spec.attempt_id)
        capabilities = await self.probe()
        facts = self.facts
        if facts is None or capabilities.sandbox is SandboxKind.NONE:
            raise AttemptRefused(f"this machine runs no containers: {capabilities.missing['container']}")
        if spec.image is None:
            raise AttemptRefused("a container needs an image")
        if self._limits.allowed_images and not spec.image.reference.matches(self._limits.allowed_images):
            raise AttemptRefused(f"this machine's owner does not allow the image {spec.image.reference}")
        if spec.network and not capabilities.network:
            why = capabilities.missing.get("network", "its owner allows none")
            raise AttemptRefused(f"this machine gives jobs with an image no network: {why}")
        if spec.ports and not capabilities.ports:
            raise AttemptRefused("this machine's owner lets jobs publish no ports")
        if spec.gang is not None and not capabilities.gangs:
            raise AttemptRefused("from this machine a job's nodes with an image do not reach one another")
        known = folder.read_handle()
        if known is not None:
            prepared = self._open(Handle.loads(known))[0]
            if folder.started.exists() or await self._engine.inspect(prepared.container) is not None:
                return Handle.loads(known)
        devices = gpus.choose(spec.devices, facts, self._limits.cdi_folders)
        async with self._images.ready(spec.image, progress) as image:
            if not image.command_of(spec):
                raise JobAtFault(f"the job names no command and the image {spec.image.reference} has none of its own")
            place = self._open(Handle.loads(known))[0] if known is not None else self._new_place(spec, facts)
            handle = Handle(self.name, spec.attempt_id, place.dumps())
            await self._make_folder(folder, place.user)
            # Before the container: what a crash leaves behind must be findable.
            folder.write_handle(handle.dumps())
            labels = {LABEL_WORKSPACE: self._label, LABEL_ATTEMPT: str(spec.attempt_id)}
            plan = Plan(
                place.container, image, spec, folder, place.user, labels, place.network,
                self._networks.resolvers if place.network else (), place.ports,
                str(self._publish.address) if self._publish is not None else "", devices,
                self._profile if facts.seccomp_profile is not None else None,
            )  # fmt: skip
            if place.gang is not None:
                await self._networks.make_shared(place.network, place.slot, labels, place.gang)
            elif place.network:
                await self._networks.make(place.network, place.slot, labels)
            await self._create(plan, facts)
        return handle

    @staticmethod
    async def _make_folder(folder: AttemptFolder, user: User) -> None:
        folder.create()
        folder.once.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            await folder.give_to(user.host)
            for path in (folder.log, folder.once):
                os.chown(path, user.host, user.host, follow_symlinks=False)

    async def _create(self, plan: Plan, facts: EngineFacts) -> None:
        body: Json = podman_body(plan) if facts.podman else docker_body(plan)
        try:
            await self._engine.create(plan.name, body)
        except EngineError as error:
            if error.status != CONFLICT and "already in use" not in error.message:
                raise SandboxFailed(error.message) from error
            # Made by a daemon that died before it had started it: only a prepared attempt comes here.
            await self._engine.remove(plan.name)
            await self._engine.create(plan.name, body)

    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        place, folder = self._open(handle)
        try:
            os.close(os.open(folder.started, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            raise AlreadyStarted(f"{handle.attempt_id} was started before") from None
        try:
            await self._engine.start(place.container)
        except EngineError as error:
            if "/bin/sh" in error.message and "no such file" in error.message:
                raise JobAtFault("the image has no /bin/sh, which starts the command in it") from error
            raise SandboxFailed(error.message) from error

    async def adopt(self, handle: Handle) -> Adoption:
        place, folder = self._open(handle)
        self._hold(place)
        if place.network:
            await self._filter_again(handle)
        state = await self._state(place)
        if state is None:
            return Adoption.ENDED if folder.started.exists() else Adoption.NOT_STARTED
        if state.never_started:
            # The daemon before this one died between its mark and the call. Should the call be on its way all the same,
            # the container's own exclusive mark lets only one of both starts through.
            folder.started.unlink(missing_ok=True)
            return Adoption.NOT_STARTED
        return Adoption.RUNNING if state.running else Adoption.ENDED

    async def _filter_again(self, handle: Handle) -> None:
        """A machine's administrator may have flushed all rules while no daemon ran."""
        await self.probe()
        try:
            await self._networks.hold()
        except FilterFailed as error:
            log.error("job_without_network_filter_ended", attempt_id=str(handle.attempt_id), error=str(error))
            await self.stop(handle, grace_seconds=0, reason=StopReason.REQUESTED)

    async def wait(self, handle: Handle) -> ExitStatus:
        place, folder = self._open(handle)
        while True:
            try:
                await self._until_ended(place)
                state = await self._state(place)
            except EngineUnreachable as error:
                # An engine that is being restarted; the attempt's lease bounds how long anybody waits.
                log.warning("engine_unreachable", attempt_id=str(handle.attempt_id), error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if state is None or not state.running:
                break
        reason = StopReason(folder.stop.read_text()) if folder.stop.is_file() else None
        if state is None or state.never_started:
            return ExitStatus(None if reason is None else 128 + signal.SIGKILL, stop_reason=reason)
        # A job may write this mark itself: it would only blame itself.
        out_of_memory = state.oom_killed or os.path.lexists(folder.once / "oom")
        return ExitStatus(state.exit_code, out_of_memory and state.exit_code != 0, reason)

    async def stop(
        self, handle: Handle, *, grace_seconds: float, reason: StopReason, notice: signal.Signals | None = None
    ) -> None:
        place, folder = self._open(handle)
        state = await self._state(place)
        if state is None or not state.running:
            return
        if not folder.stop.exists():
            folder.stop.write_text(reason.value)
        if grace_seconds > 0:
            await self._terminate(place, state, notice)
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._until_ended(place)
            except TimeoutError:
                log.info("attempt_killed_after_grace", attempt_id=str(handle.attempt_id), grace_seconds=grace_seconds)
        await self._engine.kill(place.container)
        await self._engine.wait(place.container)

    async def _until_ended(self, place: _Place) -> None:
        """Told by the kernel where that is possible: Podman only looks now and then."""
        state = await self._state(place)
        if state is not None and state.running and self._is_here(state):
            info = process_info(state.pid)
            pidfd = open_process(state.pid, info.start_ticks) if info is not None else None
            if pidfd is not None:
                try:
                    await process_ended(pidfd)
                finally:
                    os.close(pidfd)
        await self._engine.wait(place.container)

    async def _terminate(self, place: _Place, state: _State, notice: signal.Signals | None) -> None:
        """SIGTERM to all of the job's processes, as in every executor; the engine would tell only the first one."""
        number = notice or signal.SIGTERM
        if self._is_here(state):
            job = descendants(state.pid)
            told = handlers(job, notice) or job if notice is not None else job
            signal_processes(told, descendants(state.pid), number)
        else:
            await self._engine.kill(place.container, number.name)

    @staticmethod
    def _is_here(state: _State) -> bool:
        """Whether the engine's process ids are ours: they are not where the daemon itself is in a container."""
        if not state.pid or process_info(state.pid) is None:
            return False
        try:
            return state.id in Path(f"/proc/{state.pid}/cgroup").read_text()
        except OSError:
            return False

    async def destroy(self, handle: Handle) -> None:
        place, folder = self._open(handle)
        await self._engine.remove(place.container)
        await self._networks.leave(place.slot)
        if place.network:
            await self._networks.remove(place.network)
        await asyncio.to_thread(folder.remove)
        self._slots.discard(place.slot)
        self._ports.give_back(place.ports)

    def published(self, handle: Handle) -> Sequence[Published]:
        place, _ = self._open(handle)
        told = self._publish.told if self._publish is not None else ""
        return [Published(number, told, machine_port) for number, machine_port in place.ports]

    async def stats(self, handle: Handle) -> Stats:
        place, _ = self._open(handle)
        state = await self._state(place)
        if state is None or not state.running:
            return Stats(None, None, None, 0)
        raw = await self._engine.stats(place.container)
        memory: Json = raw.get("memory_stats") or {}
        cpu: Json = raw.get("cpu_stats") or {}
        usage: Json = cpu.get("cpu_usage") or {}
        pids: Json = raw.get("pids_stats") or {}
        return Stats(
            float(usage.get("total_usage") or 0) / 1e9,
            memory.get("usage"),
            memory.get("max_usage"),
            int(pids.get("current") or 0),
        )

    async def sweep(self, known: set[AttemptId]) -> None:
        wanted = {str(attempt_id) for attempt_id in known}
        await self.probe()
        if self.facts is not None:
            for found in await self._engine.containers(f"{LABEL_WORKSPACE}={self._label}"):
                if (found.get("Labels") or {}).get(LABEL_ATTEMPT) not in wanted:
                    await self._engine.remove(str(found["Id"]))
            for network, labels in await self._engine.networks(f"{LABEL_WORKSPACE}={self._label}"):
                if labels.get(LABEL_ATTEMPT) not in wanted:
                    await self._networks.remove(network)
        for folder in self._workspace.attempts():
            text = folder.read_handle()
            if folder.root.name in wanted or text is None:
                continue
            handle = Handle.loads(text)
            if handle.executor == self.name:
                await self.destroy(handle)
        await self._networks.sweep(self._slots)

    async def close(self) -> None:
        self._known = None
        await self._engine.close()

    # --- small things -------------------------------------------------------------------------------------------------

    def _open(self, handle: Handle) -> tuple[_Place, AttemptFolder]:
        if handle.executor != self.name:
            raise UnknownHandle(f"a handle of the executor {handle.executor!r}")
        return _Place.loads(handle.data), self._workspace.attempt(handle.attempt_id)

    async def _state(self, place: _Place) -> _State | None:
        found = await self._engine.inspect(place.container)
        return None if found is None else _State.read(found)
