"""HTTP edge of the storage service: presigned PUT, GET and HEAD of the embedded store, as a plain ASGI application."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, quote

import structlog
from pydantic import SecretBytes

from dantegpu.domain.clock import Clock
from dantegpu.kit.errors import ErrorStatus, ServiceError
from dantegpu.services.storage.errors import DigestMismatch, DiskFull, ObjectNotFound, TooLarge
from dantegpu.services.storage.signing import Grant, verify
from dantegpu.services.storage.store import READ_CHUNK_BYTES, EmbeddedStore

log = structlog.get_logger(__name__)

_STATUS: Mapping[ErrorStatus, int] = {
    ErrorStatus.INVALID: 422,
    ErrorStatus.FORBIDDEN: 403,
    ErrorStatus.NOT_FOUND: 404,
    ErrorStatus.TOO_LARGE: 413,
    ErrorStatus.UNAVAILABLE: 507,  # the only server we need here is the disk
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")

type _Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client hung up in the middle of its upload."""


class StorageHttp:
    """The ASGI application behind presigned URLs."""

    def __init__(self, store: EmbeddedStore, key: SecretBytes, clock: Clock) -> None:
        self._store = store
        self._key = key
        self._clock = clock

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        try:
            await self._serve(scope, receive, send)
        except ClientGone:
            log.info("upload_cut_off", path=scope["path"][:200])
        except ServiceError as error:
            await _problem(send, error)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        path, method = scope["path"], scope["method"]
        if not path.startswith("/o/") or method not in ("GET", "HEAD", "PUT"):
            raise ObjectNotFound("only presigned URLs are served here")
        query = dict(parse_qsl(scope["query_string"].decode("ascii", "replace"), keep_blank_values=True))
        grant = verify(method, path[3:], query, self._clock.now().timestamp(), self._key)
        headers = dict(scope["headers"])
        if method == "PUT":
            await self._put(grant, headers, receive, send)
        else:
            await self._get(grant, headers, method, send)

    async def _put(self, grant: Grant, headers: Mapping[bytes, bytes], receive: Any, send: Any) -> None:
        declared = headers.get(b"content-length")
        if declared is not None and int(declared) != grant.size_bytes:
            error = TooLarge if int(declared) > grant.size_bytes else DigestMismatch
            raise error(f"the URL is for exactly {grant.size_bytes} bytes, {int(declared)} were announced")
        await self._store.receive(grant.key, _body(receive), grant.size_bytes, grant.sha256)
        await _answer(send, 200, [(b"etag", f'"{grant.sha256}"'.encode())], b"")

    async def _get(self, grant: Grant, headers: Mapping[bytes, bytes], method: str, send: Any) -> None:
        size_bytes = self._store.size_bytes(grant.key)
        if size_bytes is None:
            raise ObjectNotFound("this object is not there: it was never uploaded, or was removed")
        span = _range(headers.get(b"range", b"").decode("ascii", "replace"), size_bytes)
        if span is None:
            await _answer(send, 416, [(b"content-range", f"bytes */{size_bytes}".encode())], b"")
            return
        start, stop = span
        answer: _Headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(stop - start).encode()),
            (b"accept-ranges", b"bytes"),
            (b"x-content-type-options", b"nosniff"),
            (b"content-disposition", _disposition(grant)),
        ]
        partial = (start, stop) != (0, size_bytes)
        if partial:
            answer.append((b"content-range", f"bytes {start}-{stop - 1}/{size_bytes}".encode()))
        await send({"type": "http.response.start", "status": 206 if partial else 200, "headers": answer})
        if method == "GET":
            await self._send_file(grant.key, start, stop, send)
        await send({"type": "http.response.body", "body": b""})

    async def _send_file(self, key: str, start: int, stop: int, send: Any) -> None:
        with self._store.path(key).open("rb") as file:
            file.seek(start)
            while start < stop:
                data = await asyncio.to_thread(file.read, min(READ_CHUNK_BYTES, stop - start))
                if not data:
                    return
                start += len(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})


async def _body(receive: Any) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


def _range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """[start, stop) of a single range; the whole object without one; None when it cannot be satisfied (RFC 9110)."""
    match = _RANGE.fullmatch(header)
    if match is None or match.group(0) == "bytes=-":
        return 0, size_bytes
    first, last = match.groups()
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    else:
        start, stop = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
    return (start, stop) if start < stop else None


def _disposition(grant: Grant) -> bytes:
    # `attachment`: a job's HTML must never run as a page of the platform.
    name = grant.name or PurePosixPath(grant.key).name
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}".encode()


async def _problem(send: Any, error: ServiceError) -> None:
    status = _STATUS.get(error.status, 500)
    body = {
        "type": f"https://dantegpu.dev/problems/{error.type}",
        "code": error.type,
        "title": error.type.replace("-", " "),
        "status": status,
        "detail": error.message,
    }
    headers: _Headers = [(b"content-type", b"application/problem+json"), (b"connection", b"close")]
    if isinstance(error, DiskFull):
        headers.append((b"retry-after", error.params["retry_after"].encode()))
    await _answer(send, status, headers, json.dumps(body).encode())


async def _answer(send: Any, status: int, headers: _Headers, body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
