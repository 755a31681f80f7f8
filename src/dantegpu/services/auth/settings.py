"""Settings of auth."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from dantegpu.kit.settings import ServiceSettings
from dantegpu.kit.tokens import DEFAULT_AUDIENCE, DEFAULT_ISSUER, MAX_LIFETIME_SECONDS

_DAY_SECONDS = 86_400


class AuthSettings(ServiceSettings):
    """Lives, limits and files of auth-service."""

    service_name: ClassVar[str] = "auth-service"

    secrets_dir: Path = Field(description="folder with the platform's keys; keys that are missing are made in it")
    key_encryption_key_file: Path | None = Field(
        default=None, description="key that encrypts secrets in the database; default: auth.kek in `secrets_dir`"
    )
    nats_account_seed_file: Path | None = Field(
        default=None, description="seed (SA...) of the NATS account of the machines; default: the one in `secrets_dir`"
    )

    token_issuer: str = DEFAULT_ISSUER
    token_audience: str = DEFAULT_AUDIENCE
    access_token_seconds: int = Field(default=MAX_LIFETIME_SECONDS, ge=10, le=MAX_LIFETIME_SECONDS)
    refresh_token_seconds: int = Field(
        default=14 * _DAY_SECONDS, ge=60, description="a session ends when it is not used for so long"
    )
    session_seconds: int = Field(default=60 * _DAY_SECONDS, ge=60, description="a session never lives longer")
    refresh_retry_seconds: int = Field(
        default=10, ge=0, le=60, description="how long the answer to a refresh may be asked for again"
    )
    signing_key_period_seconds: int = Field(default=30 * _DAY_SECONDS, ge=60, description="a key signs for so long")
    signing_key_notice_seconds: int = Field(
        default=_DAY_SECONDS, ge=30, description="a new key is published at least so long before it signs"
    )
    upkeep_interval_seconds: float = Field(default=60.0, ge=0.05, description="rotation of keys, removal of old rows")

    machine_credential_seconds: int = Field(default=3600, ge=30, le=_DAY_SECONDS, description="life of a NATS user JWT")

    login_limit_per_account_and_address: str = Field(default="10/minute", description="attempts, as `limits` writes it")
    login_limit_per_address: str = "60/minute"
    login_limit_per_account: str = Field(
        default="100/hour", description="from addresses that the account never logged in from; others are not affected"
    )
    max_api_keys_per_user: int = Field(default=200, ge=1)
    max_teams_per_user: int = Field(default=100, ge=1)
    max_members_per_team: int = Field(default=1000, ge=1)
