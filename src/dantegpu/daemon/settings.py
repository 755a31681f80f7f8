"""What the daemon is told: a TOML file, `DANTE_DAEMON_*` in the environment, flags."""

import difflib
import ipaddress
import os
import shlex
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, IPvAnyAddress, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dantegpu.daemon.executors.container.escapes import ALL_NAMES
from dantegpu.daemon.executors.container.ports import PublishPolicy
from dantegpu.daemon.owner import Hours
from dantegpu.domain.gpus import find_known_gpu, nearest_gpu_name
from dantegpu.domain.units import MemoryRange
from dantegpu.kit.settings import SettingsError

CONFIG_VARIABLE = "DANTE_DAEMON_CONFIG"


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class DaemonSettings(BaseSettings):
    """One provider machine."""

    model_config = SettingsConfigDict(env_prefix="DANTE_DAEMON_", extra="forbid")

    state: Path = Field(default=Path("~/.dante/machine"), description="key, journal and the attempts' folders")
    gateway_url: str = Field(default="", description="https://... of the platform; remembered after the enrolment")
    join_token: SecretStr = Field(default=SecretStr(""), description="needed once, to enrol")
    nats_url: str = Field(default="", description="only to override what the platform says")
    simulate_gpus: str = Field(default="", description='"RTX 4090:2": pretend to have these, for development')
    gpus: Literal["auto", "nvidia", "amd", "none"] = Field(
        default="auto",
        description="auto: where a driver shows; nvidia: ask its library anyway; none: rent none",
    )
    benchmark_every_hours: float = Field(
        default=24.0, ge=0, description="how often, on average, the idle machine measures itself; 0: never"
    )
    share_gpus: bool = Field(
        default=False, description="jobs of one team may share a GPU by time-slicing; nothing limits their GPU memory"
    )
    scrub_gpus: bool = Field(
        default=True,
        description="overwrite a GPU's memory after each job on it; false: rely on what its driver does by itself",
    )
    hours: str = Field(default="", description='local time at which jobs may run here, "22:00-06:30"; empty: always')
    max_gpu_celsius: float = Field(default=0.0, ge=0, description="a hotter GPU takes no new job; 0: no limit")
    reserve_cpus: float = Field(default=0.0, ge=0, description="cores that are never rented out")
    reserve_memory: str = Field(default="", description='memory that is never rented out, such as "4GB"')
    idle_command: str = Field(default="", description="your own command, run while nothing is rented; unsandboxed")
    executor: Literal["process", "slurm"] = Field(
        default="process", description="slurm: each node of the cluster behind Slurm's commands is a machine for rent"
    )
    slurm_conf: Path | None = Field(default=None, description="Slurm's own settings; default: where Slurm looks")
    slurm_partition: str = Field(default="", description="where jobs are submitted; only its nodes are rented out")
    slurm_nodes: str = Field(
        default="", description='names of the nodes to rent out, by commas, with patterns ("gpu*"); empty: all'
    )
    slurm_options: str = Field(default="", description='more options of sbatch, such as "--account=dante --qos=low"')
    slurm_gpus: str = Field(
        default="",
        description='which GPUs the cluster\'s own types are: "big=A100, small=T4"; known names need no entry',
    )
    slurm_simulated_gpus: bool = Field(
        default=False, description="the cluster's GPUs are only names (for development): marked as simulated"
    )
    slurm_poll_seconds: float = Field(default=2.0, ge=0.1, le=60, description="how often Slurm's queue is looked at")
    slurm_start_seconds: float = Field(
        default=60.0, gt=0, description="a job that Slurm has not started by then is handed back to the platform"
    )
    sandbox: Literal["auto", "bubblewrap", "none"] = "auto"
    allow_network: bool = Field(default=False, description="jobs that ask for it may use this machine's network")
    network_open: str = Field(
        default="", description="private ranges, by commas, that jobs with an image may reach, such as 10.1.0.0/16"
    )
    resolvers: str = Field(
        default="",
        description="addresses, by commas, that jobs with an image ask for names; empty: the machine's own public ones",
    )
    publish: str = Field(
        default="",
        description="where jobs with an image may publish ports, ADDRESS:FIRST-LAST; needs allow_network",
    )
    publish_host: str = Field(
        default="", max_length=253, description="the name or address told to people for these ports; default: its own"
    )
    site: str = Field(
        default="", max_length=63, pattern=r"^[A-Za-z0-9._-]*$",
        description="name of a trusted network that some of your machines form: gangs with an image run within it",
    )  # fmt: skip
    site_port: int = Field(
        default=47_890, ge=1024, le=65_535, description="UDP port of the tunnels within the site; the same on all of it"
    )
    containers: str = Field(
        default="auto", description="for jobs with an image: auto (the first engine found), none, or a socket's path"
    )
    local_images: str = Field(
        default="", description="patterns of image names, by commas, that jobs may use without asking a registry"
    )
    allowed_images: str = Field(
        default="",
        description="patterns of image names, by commas, that may run here, such as docker.io/acme/*; empty: all",
    )
    image_cache_gb: int = Field(
        default=100, ge=0, description="images that jobs brought are kept up to it; 0 = no bound"
    )
    accept_escapes: str = Field(
        default="", description="CVE numbers, by commas: run containers although runc or NVIDIA's toolkit has them"
    )
    region: str = ""
    address: IPvAnyAddress | None = Field(
        default=None, description="where the other nodes of a gang reach this machine; default: its way to the platform"
    )
    sync_interval_seconds: float = Field(default=5.0, ge=0.2, le=60)
    heartbeat_interval_seconds: float = Field(default=5.0, ge=0.2, le=60)
    keep_attempts_on_stop: bool = Field(
        default=False, description="leave jobs running when the daemon is told to stop: the next one takes them over"
    )
    ops_listen: str = Field(default="", description="HTTP host:port of /healthz, /readyz, /metrics; empty = none")
    log_level: str = "info"
    otlp_endpoint: str = ""

    @field_validator("hours")
    @classmethod
    def _hours_are_readable(cls, text: str) -> str:
        Hours.parse(text)
        return text

    @field_validator("reserve_memory")
    @classmethod
    def _memory_is_readable(cls, text: str) -> str:
        _reserved_bytes(text)
        return text

    @field_validator("slurm_gpus")
    @classmethod
    def _gpus_are_known(cls, text: str) -> str:
        _gpu_types(text)
        return text

    @field_validator("slurm_options")
    @classmethod
    def _options_are_readable(cls, text: str) -> str:
        shlex.split(text)
        return text

    @model_validator(mode="after")
    def _fits_a_cluster(self) -> Self:
        """What would be done on the daemon's own machine says nothing about a cluster's nodes."""
        useless = ("simulate_gpus", "share_gpus", "idle_command", "ops_listen", "max_gpu_celsius", "address")
        useless += ("publish", "site")
        if self.executor == "slurm" and (given := [name for name in useless if getattr(self, name)]):
            raise ValueError(f"{given[0]} has no meaning with executor = slurm; leave it out")
        return self

    @model_validator(mode="after")
    def _publishing_is_readable(self) -> Self:
        if self.publish:
            PublishPolicy.parse(self.publish)
            if not self.allow_network:
                raise ValueError("publish needs allow_network = true: a published port is part of a job's network")
        if self.site and not self.allow_network:
            raise ValueError("site needs allow_network = true: it is about the network of jobs with an image")
        return self

    @property
    def publish_policy(self) -> PublishPolicy | None:
        return PublishPolicy.parse(self.publish, self.publish_host) if self.publish else None

    @property
    def slurm_gpu_types(self) -> dict[str, str]:
        """Type in the cluster -> model."""
        return _gpu_types(self.slurm_gpus)

    @property
    def slurm_node_patterns(self) -> list[str]:
        return _listed(self.slurm_nodes)

    @property
    def reserved_memory_bytes(self) -> int:
        return _reserved_bytes(self.reserve_memory)

    @field_validator("accept_escapes")
    @classmethod
    def _known_escapes(cls, value: str) -> str:
        if unknown := sorted(set(_listed(value)) - ALL_NAMES):
            raise ValueError(f"{unknown[0]} is none of those that are looked for: {', '.join(sorted(ALL_NAMES))}")
        return value

    @property
    def accepted_escapes(self) -> list[str]:
        return _listed(self.accept_escapes)

    @field_validator("network_open")
    @classmethod
    def _ranges_are_readable(cls, text: str) -> str:
        _ranges(text)
        return text

    @field_validator("resolvers")
    @classmethod
    def _addresses_are_readable(cls, text: str) -> str:
        _addresses(text)
        return text

    @property
    def network_open_ranges(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        return _ranges(self.network_open)

    @property
    def resolver_addresses(self) -> list[ipaddress.IPv4Address]:
        return _addresses(self.resolvers)

    @property
    def allowed_images_list(self) -> list[str]:
        return _listed(self.allowed_images)

    @property
    def local_images_list(self) -> list[str]:
        return _listed(self.local_images)

    @classmethod
    def load(cls, flags: dict[str, Any] | None = None) -> Self:
        """Defaults < the TOML file that `config` or DANTE_DAEMON_CONFIG names < environment < flags.

        Raises SettingsError.
        """
        given = dict(flags or {})
        config = given.pop("config", None) or os.environ.get(CONFIG_VARIABLE, "")
        known = _read_file(Path(config), cls) if config else {}
        prefix = cls.model_config.get("env_prefix", "")
        from_file = {name: value for name, value in known.items() if f"{prefix}{name}".upper() not in os.environ}
        where = f"{config} or DANTE_DAEMON_*" if config else "DANTE_DAEMON_*"
        try:
            settings = cls(**(from_file | given))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise SettingsError(f"the daemon's settings ({where}) are wrong: " + "; ".join(lines)) from error
        return settings.model_copy(update={"state": settings.state.expanduser().absolute()})


def _gpu_types(text: str) -> dict[str, str]:
    """Raises ValueError."""
    found: dict[str, str] = {}
    for part in _listed(text):
        kind, equals, model = (word.strip() for word in part.partition("="))
        if not equals or not kind:
            raise ValueError(f"{part!r} is not TYPE=MODEL")
        if find_known_gpu(model) is None:
            nearest = nearest_gpu_name(model)
            raise ValueError(f"unknown GPU {model!r}" + (f"; did you mean {nearest!r}?" if nearest else ""))
        found[kind] = model
    return found


def _ranges(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Raises ValueError, which says what is wrong with which of them."""
    return [ipaddress.ip_network(part) for part in _listed(text)]


def _addresses(text: str) -> list[ipaddress.IPv4Address]:
    """Raises ValueError. IPv4 alone: a job's network has nothing else."""
    return [ipaddress.IPv4Address(part) for part in _listed(text)]


def _reserved_bytes(text: str) -> int:
    return MemoryRange.parse(text, "reserve_memory").minimum_bytes if text.strip() else 0


def _read_file(path: Path, settings: type[DaemonSettings]) -> dict[str, Any]:
    """The file's settings, each under its own name. Raises SettingsError."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    for name in values:
        if name not in settings.model_fields:
            near = difflib.get_close_matches(name, settings.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/settings.md lists them"
            raise SettingsError(f"{path}: there is no setting {name!r}; {hint}")
    return values
