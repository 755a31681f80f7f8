"""HTTP edge of the storage service: presigned PUT, GET and HEAD of the embedded store, as a plain ASGI application."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import IO, Any, Final
from urllib.parse import parse_qsl

import structlog
from prometheus_client import Counter
from pydantic import SecretBytes

from dantegpu.domain.clock import Clock
from dantegpu.kit.errors import ErrorStatus, ServiceError
from dantegpu.services.storage.errors import DigestMismatch, DiskFull, ObjectNotFound, TooBusy, TooLarge, UploadIdle
from dantegpu.services.storage.signing import disposition, verify
from dantegpu.services.storage.store.base import Grant
from dantegpu.services.storage.store.embedded import EmbeddedStore

log = structlog.get_logger(__name__)

READ_BYTES: Final = 256 << 10
PATH_PREFIX: Final = "/o/"
_DRAIN_BYTES: Final = 1 << 20
"""A refused request's body up to this size is read away, so that the client sees the answer and keeps its
connection; a larger one is cut off."""
_STATUS: Mapping[ErrorStatus, int] = {
    ErrorStatus.INVALID: 422,
    ErrorStatus.FORBIDDEN: 403,
    ErrorStatus.NOT_FOUND: 404,
    ErrorStatus.TOO_LARGE: 413,
    ErrorStatus.RATE_LIMITED: 503,
    ErrorStatus.UNAVAILABLE: 507,  # the only server we need here is the disk
}
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_REQUESTS = Counter("dante_storage_requests_total", "Requests by presigned URL", ["method", "status"])
_BYTES = Counter("dante_storage_bytes_total", "Bytes of objects moved by presigned URL", ["direction"])

type _Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client hung up in the middle of its upload."""


class _Body:
    """A request's body as it comes in."""

    def __init__(self, receive: Any, idle_seconds: float) -> None:
        self._receive = receive
        self._idle_seconds = idle_seconds
        self._ended = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises UploadIdle, ClientGone."""
        while not self._ended:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    message = await self._receive()
            except TimeoutError:
                raise UploadIdle(
                    f"nothing came for {self._idle_seconds:g} s; nothing was stored, send it again"
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            self._ended = not message.get("more_body")
            if message.get("body"):
                yield message["body"]

    async def read_away(self, at_most_bytes: int) -> bool:
        """Whether the whole body is read."""
        async for chunk in self.chunks():
            at_most_bytes -= len(chunk)
            if at_most_bytes < 0:
                break
        return self._ended


class StorageHttp:
    """The ASGI application behind presigned URLs."""

    def __init__(
        self, store: EmbeddedStore, key: SecretBytes, clock: Clock, *, uploads_max: int, idle_seconds: float
    ) -> None:
        self._store = store
        self._key = key
        self._clock = clock
        self._uploads_max = uploads_max
        self._idle_seconds = idle_seconds
        self._uploads = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = _Body(receive, self._idle_seconds)
        try:
            try:
                status = await self._serve(scope, body, send)
            except ServiceError as error:
                keep = (_length(scope) or 0) <= _DRAIN_BYTES and not isinstance(error, UploadIdle)
                keep = keep and await body.read_away(_DRAIN_BYTES)
                status = await _problem(send, error, keep_connection=keep)
        except (ClientGone, UploadIdle):
            log.info("upload_cut_off", path=scope["path"][:200])
            status = 0
        _REQUESTS.labels(scope["method"] if scope["method"] in ("GET", "HEAD", "PUT") else "other", str(status)).inc()

    async def _serve(self, scope: Any, body: _Body, send: Any) -> int:
        path, method = scope["path"], scope["method"]
        if not path.startswith(PATH_PREFIX):
            raise ObjectNotFound("only presigned URLs are served here")
        if method not in ("GET", "HEAD", "PUT"):
            await _answer(send, 405, [(b"allow", b"GET, HEAD, PUT")], b"")
            return 405
        query = dict(parse_qsl(scope["query_string"].decode("ascii", "replace"), keep_blank_values=True))
        grant = verify(method, path[len(PATH_PREFIX) :], query, self._clock.now().timestamp(), self._key)
        if method == "PUT":
            return await self._put(grant, _length(scope), body, send)
        return await self._get(grant, dict(scope["headers"]), method, send)

    async def _put(self, grant: Grant, declared: int | None, body: _Body, send: Any) -> int:
        if declared is not None and declared != grant.size_bytes:
            error = TooLarge if declared > grant.size_bytes else DigestMismatch
            raise error(f"the URL is for exactly {grant.size_bytes} bytes, {declared} were announced")
        if self._uploads >= self._uploads_max:
            raise TooBusy("too many uploads at the moment; try again in a few seconds", retry_after="2")
        self._uploads += 1
        try:
            await self._store.receive(grant.key, body.chunks(), grant.size_bytes, grant.sha256)
        finally:
            self._uploads -= 1
        _BYTES.labels("in").inc(grant.size_bytes)
        await _answer(send, 200, [(b"etag", f'"{grant.sha256}"'.encode())], b"")
        return 200

    async def _get(self, grant: Grant, headers: Mapping[bytes, bytes], method: str, send: Any) -> int:
        opened = await asyncio.to_thread(self._store.open, grant.key)
        if opened is None:
            raise ObjectNotFound("this object is not there: it was never uploaded, or was removed")
        file, size_bytes = opened
        with file:
            # We give no validators, so a conditional range cannot be shown to fit: the whole object it is (RFC 9110).
            wanted = b"" if b"if-range" in headers else headers.get(b"range", b"")
            span = _range(wanted.decode("ascii", "replace"), size_bytes)
            if span is None:
                await _answer(send, 416, [(b"content-range", f"bytes */{size_bytes}".encode())], b"")
                return 416
            start, stop, partial = span
            answer: _Headers = [
                (b"content-type", b"application/octet-stream"),
                (b"content-length", str(stop - start).encode()),
                (b"accept-ranges", b"bytes"),
                (b"cache-control", b"private, no-store"),
                (b"x-content-type-options", b"nosniff"),
                (b"content-disposition", disposition(grant.name or PurePosixPath(grant.key).name).encode()),
            ]
            if partial:
                answer.append((b"content-range", f"bytes {start}-{stop - 1}/{size_bytes}".encode()))
            status = 206 if partial else 200
            await send({"type": "http.response.start", "status": status, "headers": answer})
            if method == "GET":
                await _send_file(file, start, stop, send)
        await send({"type": "http.response.body", "body": b""})
        return status


async def _send_file(file: IO[bytes], start: int, stop: int, send: Any) -> None:
    file.seek(start)
    while start < stop:
        data = await asyncio.to_thread(file.read, min(READ_BYTES, stop - start))
        if not data:
            return
        start += len(data)
        _BYTES.labels("out").inc(len(data))
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _length(scope: Any) -> int | None:
    declared = dict(scope["headers"]).get(b"content-length", b"")
    return int(declared) if declared.isdigit() else None


def _range(header: str, size_bytes: int) -> tuple[int, int, bool] | None:
    """[start, stop) of a single range, and whether it is one; the whole object without one or with several; None when
    it cannot be satisfied (RFC 9110)."""
    match = _RANGE.fullmatch(header)
    if match is None or match.group(0) == "bytes=-":
        return 0, size_bytes, False
    first, last = match.groups()
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    elif last and int(last) < int(first):
        return 0, size_bytes, False
    else:
        start, stop = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
    return (start, stop, True) if start < stop else None


async def _problem(send: Any, error: ServiceError, *, keep_connection: bool) -> int:
    status = 408 if isinstance(error, UploadIdle) else _STATUS.get(error.status, 500)
    body = {
        "type": f"https://dantegpu.dev/problems/{error.type}",
        "code": error.type,
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.message,
    }
    headers: _Headers = [(b"content-type", b"application/problem+json"), (b"cache-control", b"no-store")]
    if not keep_connection:
        headers.append((b"connection", b"close"))
    if isinstance(error, DiskFull | TooBusy):
        headers.append((b"retry-after", error.params["retry_after"].encode()))
    await _answer(send, status, headers, json.dumps(body).encode())
    return status


async def _answer(send: Any, status: int, headers: _Headers, body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
