"""The one composition root: builds services, starts them in order of need, stops them in reverse."""

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, cast

import structlog

from dantegpu.apps.targets import ALL, TARGETS, expand
from dantegpu.domain.clock import SystemClock
from dantegpu.kit.bus import Bus
from dantegpu.kit.deps import Deps
from dantegpu.kit.http import HttpServer, ops_app
from dantegpu.kit.lifecycle import Component, HttpApp, Service
from dantegpu.kit.local_rpc import LocalServices
from dantegpu.kit.rpc import Channels, Server
from dantegpu.kit.settings import ServiceSettings
from dantegpu.kit.telemetry import configure_tracing

log = structlog.get_logger(__name__)

GC_ALLOCATIONS = 20_000
"""Objects made before the collector looks at the young ones: a batch of jobs makes some thousands."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a started process is reached. Ports are the real ones, also when 0 was asked for."""

    grpc: str
    ops_url: str
    http_urls: Mapping[str, str]
    """Service name -> URL, of those with an HTTP application of their own."""


class Root:
    """Every service of this process. start() leaves nothing behind when it raises."""

    def __init__(self, target: str, settings_of: Callable[[type[ServiceSettings]], ServiceSettings]) -> None:
        """`settings_of` loads a service's settings; the shared part is taken from the first one's."""
        names = expand(target)
        self._settings = {name: settings_of(TARGETS[name].settings_class()) for name in names}
        shared = next(iter(self._settings.values()))
        self.otlp_endpoint = shared.otlp_endpoint
        """Where spans go; empty: nowhere."""
        configure_tracing("dantegpu" if target == ALL else target, shared.otlp_endpoint)
        bus = Bus(shared.nats_url, shared.nats_creds, name=f"dante {target}")
        local = cast(Any, LocalServices())
        channels = Channels(shared.addresses, dict.fromkeys(names, local))
        deps = Deps(SystemClock(), bus, channels)
        services = [TARGETS[name].build(deps, self._settings[name]) for name in names]
        registrations = [service.register_rpc for service in services if service.register_rpc]
        for register in registrations:
            register(local)
        self._grpc_listen = shared.listen
        self._grpc = Server(shared.listen, registrations)
        self._http = {
            service.name: HttpServer(service.http, service.name) for service in services if service.http is not None
        }
        checks = {service.name: service.checks for service in services}
        self._ops = HttpServer(HttpApp(ops_app(checks), shared.ops_listen), "ops")
        self._steps: Sequence[tuple[str, Component]] = [
            ("bus", bus),
            ("channels", channels),
            # First the inner door: services that come up call one another while the rest still starts, and get
            # "unavailable, try again" until the one they call is ready.
            ("grpc", self._grpc),
            *_components(services),
            *((f"{name} http", server) for name, server in self._http.items()),
            ("ops", self._ops),
        ]
        self._started = contextlib.AsyncExitStack()

    async def start(self) -> Listening:
        """Raises what a part raises that cannot start (Unavailable, PortTaken, NewerData, ...)."""
        try:
            for name, component in self._steps:
                began = monotonic()
                await component.start()
                self._started.push_async_callback(component.stop)
                log.debug("started", part=name, milliseconds=round((monotonic() - began) * 1000))
        except BaseException:
            await self._started.aclose()
            raise
        # What is there now stays: the collector need not walk through it again and again while jobs are served.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS, *gc.get_threshold()[1:])
        return self._listening()

    async def stop(self) -> None:
        await self._started.aclose()

    def _listening(self) -> Listening:
        host = self._grpc_listen.rpartition(":")[0]
        grpc = self._grpc_listen if self._grpc_listen.startswith("unix:") else f"{host}:{self._grpc.port}"
        return Listening(grpc, self._ops.url, {name: server.url for name, server in self._http.items()})


def _components(services: Sequence[Service]) -> list[tuple[str, Component]]:
    return [
        (f"{service.name} {type(component).__name__}", component)
        for service in services
        for component in service.components
    ]


def load_with(
    config_file: Path | None, flags: Mapping[str, Mapping[str, Any]]
) -> Callable[[type[ServiceSettings]], ServiceSettings]:
    """Settings from the file and the environment, with `flags[""]` for all services and `flags[NAME]` for one."""

    def load(settings_class: type[ServiceSettings]) -> ServiceSettings:
        own = {**flags.get("", {}), **flags.get(settings_class.service_name, {})}
        return settings_class.load(config_file, own)

    return load
