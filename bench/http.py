"""An HTTP client that costs next to nothing: one keep-alive connection, one request at a time, JSON in and out.

The SDK's client needs more CPU for a request than the platform for a whole job; on the same two cores it would be the
thing that is measured.
"""

import asyncio
import json
from typing import Any, cast
from urllib.parse import urlsplit

import httptools


class RequestRefused(Exception):
    """The platform answered something else than 2xx."""

    def __init__(self, method: str, path: str, status: int, body: bytes) -> None:
        super().__init__(f"{method} {path}: {status} {body[:500].decode(errors='replace')}")


class Connection(asyncio.Protocol):
    """`await Connection.open(url, key)`, then `await connection.call(...)`."""

    def __init__(self, host: str, api_key: str) -> None:
        self._head = f"Host: {host}\r\nAuthorization: Bearer {api_key}\r\n"
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[None] | None = None
        self._parser: Any = None
        self._body = bytearray()

    @staticmethod
    async def open(url: str, api_key: str) -> "Connection":
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(parts.netloc, api_key), parts.hostname or "", parts.port or 80
        )
        return connection

    async def call(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Any:
        """The answer's JSON. Raises RequestRefused, ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the platform closed the connection")
        self._answered = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._transport.write(f"{head}\r\n".encode() + body)
        await self._answered
        status = self._parser.get_status_code()
        if not 200 <= status < 300:
            raise RequestRefused(method, path, status, bytes(self._body))
        return json.loads(self._body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- asyncio's and httptools' callbacks ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("the platform closed the connection"))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)
