"""The port every way of running an attempt implements: a sandboxed process now; containers and clusters fit behind it.

An executor is asked by the daemon's reconcile loop and outlives nothing: whatever it starts keeps running when the
daemon dies, and a new daemon finds it again by its `Handle`.
"""

import enum
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from signal import Signals

from dantegpu.daemon.executors.gang import Gang
from dantegpu.domain.ids import AttemptId
from dantegpu.domain.images import ImageReference
from dantegpu.domain.ports import Port

MAX_ENV_ENTRIES = 512
MAX_ENV_BYTES = 256 << 10
MAX_ARGUMENT_BYTES = 256 << 10


class ExecutorError(Exception):
    """Base of what goes wrong while an attempt is prepared or started; the provider's fault unless said otherwise."""


class AttemptRefused(ExecutorError):
    """This executor cannot run the attempt as specified (a limit, network or device it does not offer)."""


class SandboxFailed(ExecutorError):
    """The sandbox could not be built. `detail` is what its tool said."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the sandbox could not be started: {detail.strip() or 'no message'}")
        self.detail = detail


class JobAtFault(ExecutorError):
    """The job asks for what no machine could give it: it ends as the job's own failure."""


class AlreadyStarted(ExecutorError):
    """The attempt was started before, by this daemon or by one that died: adopt it instead."""


class NoRoom(ExecutorError):
    """The place that the platform gave it is taken by work that is none of the platform's: it gave way, unstarted."""


class UnknownHandle(ExecutorError):
    """The handle is of another executor or version."""


class SandboxKind(enum.StrEnum):
    BUBBLEWRAP = "bubblewrap"
    DOCKER = "docker"
    PODMAN = "podman"
    NONE = "none"


class StopReason(enum.StrEnum):
    REQUESTED = "requested"
    TIMED_OUT = "timed_out"
    LEASE_LOST = "lease_lost"
    DISK_LIMIT = "disk_limit"


@dataclass(frozen=True, slots=True)
class DeviceGrant:
    """One leased device. `paths` are device nodes of the host; a simulated device has none."""

    uuid: str
    model: str
    index: int
    paths: tuple[str, ...] = ()
    simulated: bool = False
    vendor: str = ""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """The image that a job names, and what its registry may ask for. The password is never written anywhere."""

    reference: ImageReference
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class AttemptSpec:
    """What to run and within which limits. Zero means "no limit" for cpu, memory, pids and disk.

    With an image the command may be empty: then the image's own program runs. `working_dir` is inside the job.
    """

    attempt_id: AttemptId
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    cpu_milli: int = 0
    memory_bytes: int = 0
    pids_max: int = 4096
    tmp_bytes: int = 1 << 30
    network: bool = False
    devices: tuple[DeviceGrant, ...] = ()
    image: ImageRequest | None = None
    entrypoint: tuple[str, ...] = ()
    working_dir: str = ""
    shm_bytes: int = 0
    checkpoint: str = ""
    """Below the work folder: where the job saves its progress."""
    ports: tuple[Port, ...] = ()
    """To be published on the machine; only with an image."""
    gang: Gang | None = None
    """The network that it shares with the job's other nodes; only with an image."""
    max_seconds: int = 0
    """The daemon ends it then. A cluster is told too, for the time in which no daemon runs."""

    def __post_init__(self) -> None:
        if self.image is None and (not self.command or not self.command[0]):
            raise AttemptRefused("the command is empty")
        if sum(len(part) for part in (*self.entrypoint, *self.command)) > MAX_ARGUMENT_BYTES:
            raise AttemptRefused(f"the command is longer than {MAX_ARGUMENT_BYTES} bytes")
        if len(self.env) > MAX_ENV_ENTRIES or sum(len(k) + len(v) for k, v in self.env.items()) > MAX_ENV_BYTES:
            raise AttemptRefused(f"more than {MAX_ENV_ENTRIES} variables or {MAX_ENV_BYTES} bytes of environment")
        for text in (*self.entrypoint, *self.command, self.working_dir, *self.env, *self.env.values()):
            if "\0" in text:
                raise AttemptRefused("a NUL character in the command or the environment")
        for name in self.env:
            if not name.isascii() or not name.replace("_", "a").isalnum() or name[0].isdigit():
                raise AttemptRefused(f"{name!r} is not the name of an environment variable")


@dataclass(frozen=True, slots=True)
class Handle:
    """What a later daemon needs to find the attempt again. Opaque outside its executor; kept in the journal."""

    executor: str
    attempt_id: AttemptId
    data: str

    def dumps(self) -> str:
        return json.dumps({"executor": self.executor, "attempt_id": str(self.attempt_id), "data": self.data})

    @classmethod
    def loads(cls, text: str) -> "Handle":
        raw = json.loads(text)
        return cls(raw["executor"], AttemptId.parse(raw["attempt_id"]), raw["data"])


class Adoption(enum.StrEnum):
    """What `adopt` found."""

    NOT_STARTED = "not_started"
    RUNNING = "running"
    ENDED = "ended"


class InterruptedBy(enum.StrEnum):
    """Who ended an attempt that neither the daemon nor the job itself has ended."""

    OWNER = "owner"
    """The machine's owner, or a rule of his, took the place back: another job's turn, an administrator's command."""
    FAULT = "fault"
    """The machine failed, or does not offer what the job was promised."""
    TIME_LIMIT = "time_limit"
    """The job's own maximum duration, kept by the cluster while no daemon was there."""


@dataclass(frozen=True, slots=True)
class Interruption:
    """What a cluster did to an attempt; `message` is for people."""

    by: InterruptedBy
    message: str


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How an attempt ended. `exit_code` follows the shell (128 + signal); None: nobody saw the end (`lost`)."""

    exit_code: int | None
    oom_killed: bool = False
    stop_reason: StopReason | None = None
    interruption: Interruption | None = None
    """Only of executors behind which somebody else schedules; `exit_code` is None then."""

    @property
    def lost(self) -> bool:
        return self.exit_code is None

    @property
    def timed_out(self) -> bool:
        return self.stop_reason is StopReason.TIMED_OUT

    @property
    def signal(self) -> int | None:
        if self.exit_code is None or not 128 < self.exit_code <= 192:
            return None
        return self.exit_code - 128


@dataclass(frozen=True, slots=True)
class Stats:
    """What a running attempt uses. None: not measured here."""

    cpu_seconds: float | None
    memory_bytes: int | None
    memory_peak_bytes: int | None
    pids: int
    read_bytes: int | None = None
    written_bytes: int | None = None
    """From and to disks, so far."""


@dataclass(frozen=True, slots=True)
class Published:
    """Where a port of an attempt is reached. `address` empty: at the machine's own."""

    number: int
    address: str
    machine_port: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this executor can do on this machine. `missing` maps a lacking guarantee to why and how to get it."""

    sandbox: SandboxKind
    limits: frozenset[str]
    missing: Mapping[str, str]
    network: bool
    ports: bool = False
    """Whether jobs may publish ports."""
    gangs: bool = False
    """Whether a job's nodes on several machines may reach one another."""


def untold(text: str) -> None:
    """For whoever does not want to know."""
    del text


class Executor(ABC):
    """Every method may be called again after a crash; none blocks the event loop for long."""

    name: str
    queues = False
    """Whether `start` may wait in somebody else's queue. `stop` ends that wait, too."""
    reads_leases = False
    """Whether what it starts ends itself when its lease is not renewed: then the daemon's file of leases names the
    attempt before its start."""

    @abstractmethod
    async def probe(self) -> Capabilities:
        """Find out, by trying, what works here."""

    @abstractmethod
    async def prepare(self, spec: AttemptSpec, progress: Callable[[str], None] = untold) -> Handle:
        """Make everything ready except the start; the same attempt again gives the same handle.

        `progress` is told, in words for people, what takes long. Raises AttemptRefused, JobAtFault.
        """

    @abstractmethod
    async def start(self, handle: Handle, spec: AttemptSpec) -> None:
        """Run the command, once for ever; returns when it runs. Raises AlreadyStarted, SandboxFailed, NoRoom."""

    @abstractmethod
    async def adopt(self, handle: Handle) -> Adoption:
        """Take over what an earlier daemon prepared or started. Raises UnknownHandle."""

    @abstractmethod
    async def wait(self, handle: Handle) -> ExitStatus:
        """Wait for the end. Afterwards nothing of the attempt runs any more."""

    @abstractmethod
    async def stop(
        self, handle: Handle, *, grace_seconds: float, reason: StopReason, notice: Signals | None = None
    ) -> None:
        """SIGTERM to the job, SIGKILL to all of it after the grace. Returns when nothing of it runs any more.

        `notice`: this signal instead, and only to processes that handle it, if there are any: a shell that waits for a
        program which saves its work must not end before it.
        """

    @abstractmethod
    async def destroy(self, handle: Handle) -> None:
        """Kill what is left and remove every trace, folders included. Idempotent."""

    @abstractmethod
    async def stats(self, handle: Handle) -> Stats:
        """A sample of what the attempt uses right now."""

    async def processes(self, handle: Handle) -> "set[int] | None":
        """Pids of the attempt as this machine numbers them; None where that cannot be told."""
        del handle
        return None

    def published(self, handle: Handle) -> Sequence[Published]:
        """Where the ports that the job publishes are reached."""
        del handle
        return ()

    @abstractmethod
    async def sweep(self, known: set[AttemptId]) -> None:
        """Kill and remove what no attempt in `known` accounts for: rests of a daemon that died in between."""

    @abstractmethod
    async def close(self) -> None:
        """Release what this daemon holds; running attempts keep running."""
