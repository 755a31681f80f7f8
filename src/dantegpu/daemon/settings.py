"""What the daemon is told: `DANTE_DAEMON_*` in the environment, then flags."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, IPvAnyAddress, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dantegpu.daemon.executors.container.escapes import ALL_NAMES
from dantegpu.kit.settings import SettingsError


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
    share_gpus: bool = Field(
        default=False, description="jobs of one team may share a GPU by time-slicing; nothing limits their GPU memory"
    )
    sandbox: Literal["auto", "bubblewrap", "none"] = "auto"
    allow_network: bool = Field(default=False, description="jobs that ask for it may use this machine's network")
    containers: str = Field(
        default="auto", description="for jobs with an image: auto (the first engine found), none, or a socket's path"
    )
    local_images: str = Field(
        default="", description="patterns of image names, by commas, that jobs may use without asking a registry"
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

    @field_validator("accept_escapes")
    @classmethod
    def _known_escapes(cls, value: str) -> str:
        if unknown := sorted(set(_listed(value)) - ALL_NAMES):
            raise ValueError(f"{unknown[0]} is none of those that are looked for: {', '.join(sorted(ALL_NAMES))}")
        return value

    @property
    def accepted_escapes(self) -> list[str]:
        return _listed(self.accept_escapes)

    @property
    def local_images_list(self) -> list[str]:
        return _listed(self.local_images)

    @classmethod
    def load(cls, flags: dict[str, Any] | None = None) -> Self:
        """Raises SettingsError."""
        try:
            settings = cls(**(flags or {}))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise SettingsError("the daemon's settings (DANTE_DAEMON_*) are wrong: " + "; ".join(lines)) from error
        return settings.model_copy(update={"state": settings.state.expanduser().absolute()})
