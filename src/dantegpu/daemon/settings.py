"""What the daemon is told: `DANTE_DAEMON_*` in the environment, then flags."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from dantegpu.kit.settings import SettingsError


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
    sandbox: Literal["auto", "bubblewrap", "none"] = "auto"
    allow_network: bool = Field(default=False, description="jobs that ask for it may use this machine's network")
    region: str = ""
    sync_interval_seconds: float = Field(default=5.0, ge=0.2, le=60)
    heartbeat_interval_seconds: float = Field(default=5.0, ge=0.2, le=60)
    keep_attempts_on_stop: bool = Field(
        default=False, description="leave jobs running when the daemon is told to stop: the next one takes them over"
    )
    ops_listen: str = Field(default="", description="HTTP host:port of /healthz, /readyz, /metrics; empty = none")
    log_level: str = "info"
    otlp_endpoint: str = ""

    @classmethod
    def load(cls, flags: dict[str, Any] | None = None) -> Self:
        """Raises SettingsError."""
        try:
            settings = cls(**(flags or {}))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise SettingsError("the daemon's settings (DANTE_DAEMON_*) are wrong: " + "; ".join(lines)) from error
        return settings.model_copy(update={"state": settings.state.expanduser().absolute()})
