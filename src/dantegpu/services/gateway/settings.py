"""Settings of siger-api-gateway."""

from typing import ClassVar

from pydantic import Field

from dantegpu.kit.settings import ServiceSettings
from dantegpu.kit.tokens import DEFAULT_AUDIENCE, DEFAULT_ISSUER


class GatewaySettings(ServiceSettings):
    """Where the API listens, and its limits."""

    service_name: ClassVar[str] = "siger-api-gateway"

    public_listen: str = Field(default="127.0.0.1:8080", description="host:port of the public API")
    public_nats_url: str = Field(default="", description="NATS as machines reach it; empty = nats_url")
    token_issuer: str = DEFAULT_ISSUER
    token_audience: str = DEFAULT_AUDIENCE
    cors_origins: list[str] = Field(
        default_factory=list, description="origins whose pages may call the API; empty = none, '*' = all"
    )
    trusted_proxies: list[str] = Field(
        default_factory=list, description="addresses whose X-Forwarded-For tells the client's address"
    )
    max_body_bytes: int = Field(default=16 << 20, ge=1024, le=32 << 20)
    rate_limit_per_second: float = Field(default=500.0, gt=0, description="requests of one principal, in the long run")
    rate_limit_burst: int = Field(default=5000, ge=1)
    anonymous_rate_limit_per_second: float = Field(default=20.0, gt=0, description="requests of one address")
    anonymous_rate_limit_burst: int = Field(default=400, ge=1)
    max_streams_per_team: int = Field(default=200, ge=1, description="open event streams")
    max_streams: int = Field(default=2000, ge=1)
    stream_max_seconds: float = Field(
        default=900.0, gt=0, description="an event stream is closed after it; the client comes back with Last-Event-ID"
    )
