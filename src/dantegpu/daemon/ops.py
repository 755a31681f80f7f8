"""/healthz, /readyz and /metrics of a provider's machine: loopback only unless told otherwise, off by default.

A few lines of HTTP of its own: a provider has no reason to install and load a web server for three fixed pages.
"""

import asyncio
import json
from collections.abc import Callable, Mapping

REQUEST_TIMEOUT_SECONDS = 5.0
MAX_REQUEST_BYTES = 8192
_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


class OpsServer:
    """Component. `problems`: what keeps the machine from working now; `gauges`: name (and labels) -> value."""

    def __init__(
        self, listen: str, problems: Callable[[], Mapping[str, str]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        self._listen = listen
        self._problems = problems
        self._gauges = gauges
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Does nothing without an address. Raises OSError when it is taken."""
        if self._listen:
            host, _, port = self._listen.rpartition(":")
            self._server = await asyncio.start_server(self._serve, host, int(port), limit=MAX_REQUEST_BYTES)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def port(self) -> int:
        return self._server.sockets[0].getsockname()[1] if self._server is not None else 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, *_ = head.decode("latin-1").split(" ", 2)
                writer.write(self._answer(method, path.partition("?")[0]))
                await writer.drain()
        except (TimeoutError, ValueError, OSError, EOFError, asyncio.LimitOverrunError):
            return
        finally:
            writer.close()

    def _answer(self, method: str, path: str) -> bytes:
        if method != "GET":
            return _response(405, "text/plain", "only GET\n")
        if path == "/healthz":
            return _response(200, "application/json", '{"status":"ok"}')
        if path == "/readyz":
            problems = dict(self._problems())
            body = json.dumps({"status": "unavailable" if problems else "ok", "problems": problems})
            return _response(503 if problems else 200, "application/json", body)
        if path == "/metrics":
            return _response(200, "text/plain; version=0.0.4", _exposition(self._gauges()))
        return _response(404, "text/plain", "not found: /healthz, /readyz or /metrics\n")


def _exposition(gauges: Mapping[str, float]) -> str:
    """Prometheus's text format. A name may carry labels (`a{b="c"}`); those of one family stand together."""
    families: dict[str, list[str]] = {}
    for name, value in gauges.items():
        families.setdefault(name.partition("{")[0], []).append(f"{name} {value}\n")
    return "".join(f"# TYPE {family} gauge\n{''.join(lines)}" for family, lines in families.items())


def _response(status: int, content_type: str, body: str) -> bytes:
    payload = body.encode()
    head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {content_type}\r\ncontent-length: {len(payload)}\r\n"
    return f"{head}cache-control: no-store\r\nconnection: close\r\n\r\n".encode() + payload
