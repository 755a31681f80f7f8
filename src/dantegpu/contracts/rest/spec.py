"""The job file: what to run. One model for `dante submit FILE.yaml`, `POST /v1/jobs` and the `spec` of an answer.

A spec that was read is canonical: GPU names as the platform knows them, sizes with units, `env` as a mapping. It can be
sent again as it is.
"""

import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import BeforeValidator, Field, field_validator, model_validator

from dantegpu.contracts.rest.base import Request, field_error, id_field
from dantegpu.domain.arrays import MAX_ARRAY_TASKS, Array, Axis
from dantegpu.domain.ids import JobId
from dantegpu.domain.images import EXPECTED as EXPECTED_IMAGE
from dantegpu.domain.images import ImageReference, InvalidImage
from dantegpu.domain.ports import MAX_PORTS, parse_ports
from dantegpu.domain.resources import (
    DEFAULT_CPU_MILLI,
    DEFAULT_DISK_BYTES,
    DEFAULT_MEMORY_BYTES,
    parse_cpu_milli,
    parse_gpu_spec,
)
from dantegpu.domain.units import (
    KIB,
    MIB,
    MILLI_PER_UNIT,
    MemoryRange,
    format_bytes,
    format_dgpu,
    format_duration,
    parse_dgpu,
    parse_duration,
    parse_memory,
)

MAX_ARGUMENTS = 1000
MAX_ARGUMENT_LENGTH = 128 * KIB
MAX_SPEC_TEXT_LENGTH = 512 * KIB
MAX_ENV = 1000
MAX_PASSWORD_LENGTH = 16 * KIB
"""Some registries' passwords are signed tokens."""
MAX_LABELS = 64
MAX_NODES = 64
MAX_JOBS_PER_CALL = 10_000
DEFAULT_PRIORITY = 50
MAX_AFTER = 100
CHECKPOINT_GRACE_MAX_SECONDS = 300
CHECKPOINT_INTERVAL_MIN_SECONDS = 10
CHECKPOINT_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
MAX_CHECKPOINT_PATH_BYTES = 1024
_CRON_FIELDS = 5
WORK_FILES = (".:/work", ".")

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,98}[A-Za-z0-9])?", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", re.ASCII)

_ALIASES: Mapping[str, str] = {
    "run": "commands",
    "envs": "env",
    "workdir": "working_dir",
    "num_nodes": "nodes",
}
"""SkyPilot's words."""
_RESOURCE_ALIASES: Mapping[str, str] = {"accelerators": "gpu", "gpus": "gpu", "cpus": "cpu", "mem": "memory"}


def _rename(data: Any, aliases: Mapping[str, str]) -> Any:
    if not isinstance(data, Mapping):
        return data
    document = dict(cast("Mapping[str, object]", data))
    for alias, name in aliases.items():
        if alias in document:
            if name in document:
                raise field_error("doubled", f"{alias!r} and {name!r} mean the same; give one of them")
            document[name] = document.pop(alias)
    return document


def exact_bytes(size_bytes: int) -> str:
    """`"16GB"`, or the bytes (`"1234567890B"`) where a unit would round."""
    text = format_bytes(size_bytes)
    return text if parse_memory(text) == size_bytes else f"{size_bytes}B"


def _gpu(value: object) -> str | None:
    if value is None or (isinstance(value, str | int) and str(value).strip() in ("", "0", "none")):
        return None
    if not isinstance(value, str | int | float | Mapping):
        raise field_error("gpu_spec", "expected a GPU spec such as RTX4090:2, 24GB or A100:40GB..80GB:2")
    return str(parse_gpu_spec(cast("str | int | float | Mapping[str, object]", value)))


def _cpu(value: object) -> str:
    if not isinstance(value, str | int | float):
        raise field_error("cpu", "expected a number of cores such as 4, 0.5 or 16..")
    milli = parse_cpu_milli(value.replace("+", "..") if isinstance(value, str) else value)
    whole, rest = divmod(milli, MILLI_PER_UNIT)
    return f"{whole}.{rest:03d}".rstrip("0") if rest else str(whole)


def _size(value: object) -> str:
    expected = "a size with its unit such as 16GB or 512MB"
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise field_error("memory", f"expected {expected}", expected=expected)
    size_bytes = MemoryRange.parse(value, "size").minimum_bytes
    if size_bytes < MIB:
        raise field_error("memory", f"expected {expected}, got {value!r}, which is below 1MB", expected=expected)
    return exact_bytes(size_bytes)


def _optional_size(value: object) -> str | None:
    return None if value is None else _size(value)


def _duration(value: object) -> str | None:
    if value is None:
        return None
    expected = "a duration such as 90s, 30m, 1h30m or 2d"
    if not isinstance(value, str | int):
        raise field_error("duration", f"expected {expected}", expected=expected)
    seconds = parse_duration(value)
    if seconds < 1:
        raise field_error("duration", f"expected {expected} of at least 1s", expected=expected)
    return format_duration(seconds)


def _price(value: object) -> str | None:
    if value is None:
        return None
    expected = "$dGPU per GPU-hour such as 2.50"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise field_error("amount", f"expected {expected}", expected=expected)
    return format_dgpu(parse_dgpu(str(value)))


def _array(value: object) -> int | dict[str, str | list[str]] | None:
    """A number of tasks, or variables with a range or a list of values each."""
    if value is None:
        return None
    expected = "a number of tasks such as 100, or variables with their values such as {lr: [0.1, 0.01], seed: 0..9}"
    if isinstance(value, Mapping):
        axes = [Axis.parse(str(name), item) for name, item in cast("Mapping[object, object]", value).items()]
        Array.of(axes)
        return {axis.name: axis_text(axis) for axis in axes}
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
        raise field_error("array", f"expected {expected}", expected=expected)
    return Array.plain(int(value)).size


def _ports(value: object) -> object:
    return [str(port) for port in parse_ports(cast("list[object]", value))] if isinstance(value, list) else value


def _after(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _deadline(value: object) -> str | None:
    """A duration, or a moment with its zone."""
    if value is None:
        return None
    expected = "a duration such as 8h, or a moment with its zone such as 2026-12-01T18:00:00Z"
    moment = value if isinstance(value, datetime) else None
    if isinstance(value, str) and "T" in value.upper():
        try:
            moment = datetime.fromisoformat(value)
        except ValueError as error:
            raise field_error("deadline", f"expected {expected}: {error}", expected=expected) from error
    if moment is None:
        return _duration(value)
    if moment.tzinfo is None:
        raise field_error("deadline", f"expected {expected}: the zone is missing", expected=expected)
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def axis_text(axis: Axis) -> str | list[str]:
    """As a job file says it."""
    return f"{axis.first}..{axis.first + axis.count - 1}" if axis.count else list(axis.values)


class Resources(Request):
    """What the job needs on its machine. Of a range the lower end is reserved."""

    not_supported_yet: ClassVar[Mapping[str, str]] = {
        "gpu_count": "write the count into gpu: 'RTX4090:2'",
        "disk_tier": "kinds of disk",
        "use_spot": "write 'spot_policy: spot' beside resources",
        "any_of": "several alternatives",
    }

    gpu: Annotated[str | None, BeforeValidator(_gpu)] = Field(
        default=None, description="GPU spec; also a mapping {name, count, memory, compute_capability}; null: no GPU",
        examples=["RTX4090:2", "A100:40GB..80GB", "24GB", "0.5"],
    )  # fmt: skip
    cpu: Annotated[str, BeforeValidator(_cpu)] = Field(
        default=str(DEFAULT_CPU_MILLI // MILLI_PER_UNIT), description="Cores", examples=["4", "0.5", "16.."]
    )
    memory: Annotated[str, BeforeValidator(_size)] = Field(
        default=exact_bytes(DEFAULT_MEMORY_BYTES), description="Memory; GB is 2**30 bytes", examples=["16GB", "64GB.."]
    )
    disk: Annotated[str, BeforeValidator(_size)] = Field(
        default=exact_bytes(DEFAULT_DISK_BYTES), description="Work folder and results", examples=["100GB"]
    )
    shm_size: Annotated[str | None, BeforeValidator(_optional_size)] = Field(
        default=None, description="Size of /dev/shm; part of the job's memory; null: the machine's", examples=["16GB"]
    )

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        return _rename(data, _RESOURCE_ALIASES)

    @classmethod
    def known_fields(cls) -> frozenset[str]:
        return super().known_fields() | _RESOURCE_ALIASES.keys()


class Retry(Request):
    """When a failed attempt is started again, on another machine where possible."""

    on_events: list[Literal["no-capacity", "interruption", "error"]] = Field(
        default_factory=lambda: ["no-capacity", "interruption", "error"], max_length=3
    )
    duration: Annotated[str | None, BeforeValidator(_duration)] = Field(
        default=None, description="How long to go on trying; null: the platform's bound", examples=["1h"]
    )


class RegistryAuth(Request):
    """Access to a private registry. No answer shows the password again."""

    username: str = Field(default="", max_length=255)
    password: str = Field(default="", max_length=MAX_PASSWORD_LENGTH, repr=False)


class Checkpoint(Request):
    """Where the job saves its progress, and how it is told that it has to stop."""

    path: str = Field(
        description="File or folder below /work: kept when the job is stopped, there again when it goes on elsewhere",
        examples=["/work/ckpt"],
    )
    interval: Annotated[str | None, BeforeValidator(_duration)] = Field(
        default=None, description="Also kept so often while it runs; null: only when it is stopped", examples=["10m"]
    )
    signal: str = Field(default="SIGTERM", description=f"The notice: {', '.join(CHECKPOINT_SIGNALS)}")
    grace: Annotated[str, BeforeValidator(_duration)] = Field(
        default="30s", description="From the notice to the end, at most 5m; less when the job ends by itself"
    )

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        parts = [part for part in value.removeprefix("/work/").split("/") if part not in ("", ".")]
        outside = (value.startswith("/") and not value.startswith("/work/")) or ".." in parts or not parts
        if outside or not value.isprintable() or len(value.encode()) > MAX_CHECKPOINT_PATH_BYTES:
            expected = "a file or folder below /work such as /work/ckpt, without '..'"
            raise field_error("checkpoint_path", f"expected {expected}", expected=expected)
        return f"/work/{'/'.join(parts)}"

    @field_validator("signal")
    @classmethod
    def _signal(cls, value: str) -> str:
        name = value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"
        if name not in CHECKPOINT_SIGNALS:
            expected = ", ".join(CHECKPOINT_SIGNALS)
            raise field_error("checkpoint_signal", f"expected one of {expected}", expected=expected)
        return name

    @field_validator("grace")
    @classmethod
    def _grace(cls, value: str) -> str:
        if parse_duration(value) > CHECKPOINT_GRACE_MAX_SECONDS:
            expected = f"at most {format_duration(CHECKPOINT_GRACE_MAX_SECONDS)}"
            raise field_error("checkpoint_grace", f"expected {expected}", expected=expected)
        return value

    @field_validator("interval")
    @classmethod
    def _interval(cls, value: str | None) -> str | None:
        if value is not None and parse_duration(value) < CHECKPOINT_INTERVAL_MIN_SECONDS:
            expected = f"at least {format_duration(CHECKPOINT_INTERVAL_MIN_SECONDS)}"
            raise field_error("checkpoint_interval", f"expected {expected}", expected=expected)
        return value


class Schedule(Request):
    """When a job is submitted again and again: five cron fields, in a time zone."""

    cron: str = Field(max_length=200, description="minute hour day month weekday", examples=["15 23 * * *"])
    timezone: str = Field(default="UTC", max_length=100, description="IANA name", examples=["Europe/Berlin"])

    @field_validator("cron")
    @classmethod
    def _cron(cls, value: str) -> str:
        expected = "five fields: minute hour day month weekday, such as '15 23 * * *'"
        if len(value.split()) != _CRON_FIELDS:
            raise field_error("cron", f"expected {expected}", expected=expected)
        try:
            CronSim(value, datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise field_error("cron", f"{error}: expected {expected}", expected=expected) from error
        return value

    @field_validator("timezone")
    @classmethod
    def _timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            expected = "a zone such as UTC or Europe/Berlin"
            raise field_error("timezone", f"there is no time zone {value!r}; expected {expected}") from error
        return value


class JobInput(Request):
    """The packed working directory (tar.gz), uploaded before by `POST /v1/uploads`."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hex digest of the archive")
    size_bytes: int = Field(ge=1, le=1 << 44)


class JobSpec(Request):
    """What to run: either `commands` (shell lines) or `command` (arguments, no shell)."""

    not_supported_yet: ClassVar[Mapping[str, str]] = {
        "budget": "a bound on the whole cost; use max_price and max_duration",
        "regions": "choice of the region",
        "setup": "a set-up step; put it into commands",
        "file_mounts": "mounts; the working directory is sent as input",
        "volumes": "volumes",
        "repos": "repositories; the working directory is sent as input",
        "python": "choice of the Python version; name an image",
        "idle_duration": "idle stop",
        "privileged": "rights beyond the container's",
        "docker": "Docker inside the job",
        "user": "another user; a job runs as an unprivileged one",
    }  # fmt: skip

    type: Literal["task"] = "task"
    name: str = Field(default="", description="For people; need not be unique")
    image: str = Field(default="", max_length=500, description="Container image; empty: the machine's own sandbox")
    registry_auth: RegistryAuth | None = Field(default=None, description="For an image of a private registry")
    entrypoint: list[str] = Field(
        default_factory=list,
        description="Put in front of `command`; without a command, in place of the image's own. Only with an image",
    )
    working_dir: str = Field(
        default="", max_length=4096, description="Where the command begins: relative to /work, or absolute"
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment; also a list of `NAME=value`")
    files: list[str] = Field(default_factory=list, description="Only the working directory: `.:/work`")
    commands: list[str] = Field(default_factory=list, description="Shell lines, run in order until one fails")
    command: list[str] = Field(
        default_factory=list, description="Program and arguments, without a shell; an image alone runs its own"
    )
    resources: Resources = Field(default_factory=Resources)
    nodes: int = Field(
        default=1, ge=1, le=MAX_NODES, description="Machines that run it at once, all or none, each with `resources`"
    )
    max_price: Annotated[str | None, BeforeValidator(_price)] = Field(
        default=None, description="$dGPU per GPU-hour; null: any price", examples=["2.50"]
    )
    max_duration: Annotated[str | None, BeforeValidator(_duration)] = Field(
        default=None, description="The job is stopped after it; null: the platform's bound", examples=["8h"]
    )
    retry: Retry | None = Field(default=None, description="Also `true`: all events; null: the platform's default")
    spot_policy: Literal["spot", "on-demand", "auto"] = Field(
        default="on-demand",
        description="`spot`: cheaper, and stopped when others need the machine; `auto`: `spot` with a checkpoint",
    )
    checkpoint: Checkpoint | None = Field(default=None, description="What is kept when the job has to stop")
    priority: int = Field(
        default=DEFAULT_PRIORITY, ge=0, le=100, description="100 goes first, before any team's jobs of a lower one"
    )
    array: Annotated[int | dict[str, str | list[str]] | None, BeforeValidator(_array)] = Field(
        default=None, description="Many tasks: how many, or variables with their values (every combination is a task)",
        examples=[100, {"lr": ["0.1", "0.01"], "seed": "0..9"}],
    )  # fmt: skip
    max_parallel: int | None = Field(
        default=None, ge=1, le=MAX_ARRAY_TASKS, description="Arrays: how many tasks may run at once; null: no bound"
    )
    after: Annotated[list[Annotated[str, id_field(JobId)]], BeforeValidator(_after)] = Field(
        default_factory=list, max_length=MAX_AFTER, description="Ids of jobs that must have succeeded before it begins"
    )
    deadline: Annotated[str | None, BeforeValidator(_deadline)] = Field(
        default=None, description="Never begins after it and is stopped at it: a moment, or a time from submission on",
        examples=["8h", "2026-12-01T18:00:00Z"],
    )  # fmt: skip
    schedule: Schedule | None = Field(default=None, description="Submit it again and again; POST /v1/schedules")
    input: JobInput | None = None
    network: bool = Field(default=False, description="Outbound network")
    ports: Annotated[list[str], BeforeValidator(_ports)] = Field(
        default_factory=list, max_length=MAX_PORTS, examples=[["8080", "9000:8080"]],
        description="TCP ports of a job with an image: `8080`, or `9000:8080` to wish for the machine's port 9000",
    )  # fmt: skip
    labels: dict[str, str] = Field(default_factory=dict, max_length=MAX_LABELS)

    @classmethod
    def known_fields(cls) -> frozenset[str]:
        return super().known_fields() | _ALIASES.keys()

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        return _rename(data, _ALIASES)

    @field_validator("type", mode="before")
    @classmethod
    def _type(cls, value: Any) -> Any:
        if value in ("dev-environment", "service", "fleet", "volume", "gateway"):
            text = f"type {value!r} is not supported yet; the only type is 'task'"
            raise field_error("not_supported_yet", text, expected="task")
        return value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value and not NAME.fullmatch(value):
            expected = "up to 100 letters, digits, spaces and . _ -, beginning and ending with a letter or digit"
            raise field_error("name", f"expected {expected}", expected=expected)
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _env(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = _env_of_list(cast("list[object]", value))
        if not isinstance(value, Mapping):
            return value
        pairs = cast("Mapping[object, object]", value)
        if len(pairs) > MAX_ENV:
            raise field_error("too_long", f"at most {MAX_ENV} variables")
        return {_env_name(name): _env_value(str(name), text) for name, text in pairs.items()}

    @field_validator("files")
    @classmethod
    def _files(cls, value: list[str]) -> list[str]:
        if any(item not in WORK_FILES for item in value):
            text = "only the working directory ('.:/work') can be sent; other files are not supported yet"
            raise field_error("not_supported_yet", text, expected=".:/work")
        return value

    @field_validator("image")
    @classmethod
    def _image(cls, value: str) -> str:
        if value:
            try:
                ImageReference.parse(value)
            except InvalidImage as error:
                raise field_error("image", str(error), expected=EXPECTED_IMAGE) from error
        return value

    @field_validator("working_dir")
    @classmethod
    def _folder(cls, value: str) -> str:
        if "\0" in value or ".." in value.split("/"):
            expected = "a folder of the job such as src or /work/src, without '..'"
            raise field_error("working_dir", f"expected {expected}", expected=expected)
        return value

    @field_validator("entrypoint", mode="before")
    @classmethod
    def _entrypoint(cls, value: Any) -> Any:
        """A text is split as a shell would."""
        if isinstance(value, str):
            try:
                return shlex.split(value)
            except ValueError as error:
                raise field_error("entrypoint", f"not readable as a command line: {error}") from error
        return value

    @field_validator("commands", "command", mode="before")
    @classmethod
    def _lines(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            if info.field_name == "command":
                expected = "a list such as [python, train.py]; shell lines go into 'commands'"
                raise field_error("list_type", f"expected {expected}", expected=expected)
            value = [value]
        if isinstance(value, list):
            # YAML reads `[sleep, 1]` as a text and a number.
            items = cast("list[object]", value)
            return [
                str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in items
            ]
        return value

    @field_validator("commands", "command", "entrypoint")
    @classmethod
    def _bounds(cls, value: list[str]) -> list[str]:
        if len(value) > MAX_ARGUMENTS or any(len(item.encode()) > MAX_ARGUMENT_LENGTH for item in value):
            raise field_error("too_long", f"at most {MAX_ARGUMENTS} items of {MAX_ARGUMENT_LENGTH >> 10} KiB each")
        if any("\0" in item for item in value):
            raise field_error("nul", "a NUL character cannot be passed to a program")
        return value

    @field_validator("retry", mode="before")
    @classmethod
    def _retry(cls, value: Any) -> Any:
        if value is True:
            return {}
        return {"on_events": []} if value is False else value

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _LABEL.fullmatch(name) or len(text) > 255:
                raise field_error("label", f"label {name[:80]!r}: a name of up to 63 characters, a value of up to 255")
        return value

    @model_validator(mode="after")
    def _runs_something(self) -> "JobSpec":
        if not self.image:
            for name in ("entrypoint", "registry_auth", "ports"):
                if getattr(self, name):
                    raise field_error("needs_image", f"{name!r} needs an 'image'", expected="an image")
        if self.ports and not self.network:
            text = "'ports' are part of a job's network: add 'network: true'"
            raise field_error("needs_network", text, expected="network: true")
        if self.entrypoint and self.commands:
            text = "'entrypoint' goes with 'command'; 'commands' are run by the image's own shell"
            raise field_error("entrypoint", text, expected="'command' instead of 'commands'")
        alone = bool(self.image) and not self.commands and not self.command
        if bool(self.commands) == bool(self.command) and not alone:
            problem = "give either, not both" if self.commands else "there is nothing to run"
            expected = "'commands' (shell lines) or 'command' (a list of arguments)"
            raise field_error("command", f"{problem}: {expected}", expected=expected)
        if self.max_parallel is not None and self.array is None:
            raise field_error("max_parallel", "max_parallel bounds the tasks of an array; there is no 'array'")
        texts = [*self.commands, *self.entrypoint, *self.command, *self.env.keys(), *self.env.values()]
        if sum(len(text.encode()) for text in texts) > MAX_SPEC_TEXT_LENGTH:
            raise field_error("too_long", f"commands and env together hold at most {MAX_SPEC_TEXT_LENGTH >> 10} KiB")
        return self


def _env_of_list(items: list[object]) -> dict[str, str]:
    env: dict[str, str] = {}
    for item in items:
        name, equals, text = str(item).partition("=")
        if not equals:
            text = f"{name[:80]!r} has no value: write {name[:80]}=VALUE (the CLI fills in bare names itself)"
            raise field_error("env", text, expected="NAME=value")
        env[name] = text
    return env


def _env_name(name: object) -> str:
    text = str(name)
    if not ENV_NAME.fullmatch(text):
        raise field_error(
            "env", f"{text[:80]!r} is no name of an environment variable", expected="letters, digits and _"
        )
    return text


def _env_value(name: str, value: object) -> str:
    if isinstance(value, bool) or value is None or not isinstance(value, str | int | float):
        raise field_error("env", f"the value of {name[:80]!r} must be a text; put it in quotes", expected="a text")
    text = str(value)
    if "\0" in text:
        raise field_error("env", f"the value of {name[:80]!r} holds a NUL character")
    return text


def fill_env(document: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Give each bare name in a job file's `env` list its value from `environ`: done by the client, before it sends.

    Raises KeyError with the name of the variable that is not set.
    """
    filled = dict(document)
    for key in ("env", "envs"):
        if isinstance(filled.get(key), list):
            items = [str(item) for item in cast("list[object]", filled[key])]
            filled[key] = [item if "=" in item else f"{item}={environ[item]}" for item in items]
    return filled


class JobList(Request):
    """Many jobs in one call: all are accepted or none."""

    jobs: list[JobSpec] = Field(min_length=1, max_length=MAX_JOBS_PER_CALL)
