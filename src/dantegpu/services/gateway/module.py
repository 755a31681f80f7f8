"""Wiring of siger-api-gateway."""

from typing import Final

from starlette.middleware.cors import CORSMiddleware

from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import ASGIApp, HttpApp, Service
from dantegpu.services.gateway.app import create_app
from dantegpu.services.gateway.clients import Clients
from dantegpu.services.gateway.context import Gateway
from dantegpu.services.gateway.limiter import RateLimiter
from dantegpu.services.gateway.middleware import Edge
from dantegpu.services.gateway.principals import AccessTokens, ApiKeys, Authenticator
from dantegpu.services.gateway.settings import GatewaySettings
from dantegpu.services.gateway.streams import Streams
from dantegpu.services.gateway.submissions import Submissions

_ACCEPTED_HEADERS: Final = [
    "Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Request-ID", "traceparent",
]  # fmt: skip
_EXPOSED_HEADERS: Final = [
    "X-Request-ID", "Retry-After", "Location", "X-Log-Epoch", "X-Log-Offset", "X-Log-Size", "X-Log-Truncated",
]  # fmt: skip


def build(deps: Deps, settings: GatewaySettings) -> Service:
    clients = Clients.of(deps.channels)
    streams = Streams(
        deps.bus,
        deps.clock,
        max_per_team=settings.max_streams_per_team,
        max_total=settings.max_streams,
        max_seconds=settings.stream_max_seconds,
    )
    keys = ApiKeys(clients.auth, deps.clock)
    tokens = AccessTokens(clients.auth, deps.clock, settings.token_issuer, settings.token_audience)
    submissions = Submissions(clients.jobs)
    gateway = Gateway(clients, deps.channels, deps.bus, deps.clock, streams, submissions, settings)
    app: ASGIApp = Edge(
        create_app(gateway),
        Authenticator(tokens, keys).actor_of,
        principals=RateLimiter(settings.rate_limit_per_second, settings.rate_limit_burst, deps.clock.monotonic),
        addresses=RateLimiter(
            settings.anonymous_rate_limit_per_second, settings.anonymous_rate_limit_burst, deps.clock.monotonic
        ),
        max_body_bytes=settings.max_body_bytes,
        trusted_proxies=settings.trusted_proxies,
    )
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=_ACCEPTED_HEADERS,
            expose_headers=_EXPOSED_HEADERS,
        )
    return Service(
        name=settings.service_name,
        components=[keys, streams, submissions],
        http=HttpApp(app, settings.public_listen),
        checks={"nats": deps.bus.ready},
    )
