"""Settings: defaults < TOML file < `DANTE_*` environment < flags, one typed class per service.

The file has a table `[platform]` with what all services share and one table per service under its public name:

    [platform]
    database_url = "postgresql://..."
    nats_url = "nats://127.0.0.1:4222"

    [scheduler-orchestrator-service]
    listen = "127.0.0.1:7001"
"""

import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict


class SettingsError(ValueError):
    """The configuration is unusable; the message names the file or variable, the field and what was expected."""


class ServiceSettings(BaseSettings):
    """What every service needs. A service's own settings derive from this."""

    model_config = SettingsConfigDict(env_prefix="DANTE_", env_nested_delimiter="__", extra="forbid")

    service_name: ClassVar[str] = ""

    database_url: SecretStr = Field(default=SecretStr(""), description="libpq URL or DSN of the platform's database")
    database_pool_max_size: int = Field(default=4, ge=1, le=100)
    nats_url: str = "nats://127.0.0.1:4222"
    nats_creds: Path | None = Field(default=None, description="credentials file of the `services` user")
    addresses: dict[str, str] = Field(
        default_factory=dict, description="static discovery: public service name -> unix:/path or host:port"
    )
    listen: str = Field(default="127.0.0.1:0", description="gRPC: host:port or unix:/path")
    ops_listen: str = Field(default="127.0.0.1:0", description="HTTP host:port of /healthz, /readyz, /metrics")
    log_level: str = "info"
    otlp_endpoint: str = Field(default="", description="OTLP/HTTP collector; empty = no tracing")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The environment beats the file, whose values arrive as init arguments; flags are merged in by `load`.
        return (env_settings, init_settings)

    @classmethod
    def load(cls, config_file: Path | None = None, flags: dict[str, Any] | None = None) -> Self:
        """Read the file's `[platform]` and own table, then the environment, then `flags`. Raises SettingsError."""
        values = _read_tables(config_file, cls.service_name) if config_file else {}
        try:
            return _with_flags(cls, flags or {})(**values)
        except ValidationError as error:
            where = str(config_file) if config_file else "the environment (DANTE_*)"
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise SettingsError(f"{cls.service_name}: settings from {where} are wrong: " + "; ".join(lines)) from error


def _with_flags[S: ServiceSettings](settings_class: type[S], flags: dict[str, Any]) -> type[S]:
    """The same class, where `flags` beat everything else."""

    class Flagged(settings_class):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (InitSettingsSource(settings_cls, flags), env_settings, init_settings)

    return cast(type[S], Flagged)


def _read_tables(config_file: Path, service_name: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(config_file.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {config_file}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{config_file} is not valid TOML: {error}") from error
    values: dict[str, Any] = {}
    for name in ("platform", service_name):
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise SettingsError(f"{config_file}: `{name}` must be a table: [{name}]")
        values |= cast(dict[str, Any], table)
    return values
