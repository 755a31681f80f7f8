"""HTTP listeners: uvicorn for a service's own application, and the process's small ops server."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Generator, Mapping
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import ASGIApp, Check, HttpApp

CHECK_TIMEOUT_SECONDS = 3.0
SHUTDOWN_SECONDS = 2


class PortTaken(OSError):
    """Something else listens there already."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is taken by another program; stop that one or choose another port")


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # signals belong to the composition root


class HttpServer:
    """One ASGI application on one TCP address. The socket is bound in start(), so a taken port is an error at once."""

    def __init__(self, http: HttpApp, name: str) -> None:
        self._http = http
        self._name = name
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """http://host:port, once started."""
        return f"http://{self._http.listen.rpartition(':')[0]}:{self.port}"

    async def start(self) -> None:
        """Raises PortTaken."""
        host, _, port = self._http.listen.rpartition(":")
        listener = _bind(host, int(port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._http.app,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # else anybody on this machine could claim any address
            server_header=False,
            date_header=True,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=75,
            ws="none",
            http="httptools",
            loop="none",
        )
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name=f"http {self._name}")
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        if self._server and self._serving:
            self._server.should_exit = True
            await self._serving
            self._server = None


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that say they are TCP; without it each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise PortTaken(host, port) from error
    listener.setblocking(False)
    return listener


def ops_app(services: Mapping[str, Mapping[str, Check]]) -> ASGIApp:
    """/healthz (this process runs), /readyz (what it needs answers), /metrics (Prometheus), for the whole process and,
    under `/<service>/...`, for each of its services."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, content_type, body = await _answer(scope["path"], services)
        headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


async def _answer(path: str, services: Mapping[str, Mapping[str, Check]]) -> tuple[int, str, bytes]:
    parts = [part for part in path.split("/") if part]
    chosen = dict(services)
    if len(parts) == 2:
        chosen = {parts[0]: services[parts[0]]} if parts[0] in services else {}
    endpoint = parts[-1] if parts else ""
    if chosen and endpoint == "healthz":
        return 200, "application/json", b'{"status":"ok"}'
    if chosen and endpoint == "metrics":
        return 200, CONTENT_TYPE_LATEST, generate_latest()
    if chosen and endpoint == "readyz":
        problems = await _problems(chosen)
        body = {"status": "unavailable" if problems else "ok", "services": sorted(chosen), "problems": problems}
        return (503 if problems else 200), "application/json", json.dumps(body).encode()
    return 404, "application/json", b'{"status":"not found: /healthz, /readyz or /metrics"}'


async def _problems(services: Mapping[str, Mapping[str, Check]]) -> dict[str, str]:
    problems: dict[str, str] = {}

    async def run(name: str, check: Check) -> None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                await check()
        except TimeoutError:
            problems[name] = f"no answer within {CHECK_TIMEOUT_SECONDS:.0f} s"
        except ServiceError as error:
            problems[name] = error.message

    checks = [(f"{service}: {name}", check) for service, found in services.items() for name, check in found.items()]
    await asyncio.gather(*(run(name, check) for name, check in checks))
    return problems
