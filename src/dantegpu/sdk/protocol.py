"""The parts of the SDK that do no I/O: sessions, retries, problems, server-sent events."""

import base64
import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol
from uuid import uuid4

from pydantic import ValidationError

from dantegpu.contracts.rest.base import Problem
from dantegpu.contracts.rest.jobs import LogChunk
from dantegpu.sdk.errors import BY_STATUS, ApiError

DEFAULT_URL = "http://127.0.0.1:8400"
FIRST_CONTACT_SECONDS = 2.0
"""How long a client goes on trying an address that has never answered it: long enough for a platform that is
just opening its port, short enough for a wrong address to be told at once."""
RETRY_SECONDS = 60.0
"""How long a client that has had answers waits for a platform that is down or says 503."""
BACKOFF_BASE_SECONDS = 0.2
BACKOFF_MAX_SECONDS = 5.0
STREAM_SILENCE_SECONDS = 60.0
"""A live stream that says nothing (not even a keep-alive comment) for so long is taken for dead and opened anew."""
MAX_EVENT_LENGTH = 4 << 20
LOG_BYTES_PER_READ = 1 << 20
CHUNK_SIZE_BYTES = 1 << 18
"""Of an upload: small enough for a smooth progress bar."""
RETRIED_STATUSES = frozenset({429, 502, 503, 504})

type OnWait = Callable[[str], None]
type OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def new_idempotency_key() -> str:
    """Names one creating request, so that a repeat of it creates nothing more."""
    return uuid4().hex


def no_wait_text(text: str) -> None:
    """The default `on_wait`: say nothing."""
    del text


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """The default `on_progress`: say nothing."""
    del done_bytes, total_bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """A logged-in session: a short-lived access token and the refresh token that gets the next one."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)


class Session(Protocol):
    """Where a client's tokens live. `exclusive` guards load-refresh-store against other processes."""

    def exclusive(self) -> AbstractContextManager[None]: ...

    def load(self) -> Tokens | None: ...

    def store(self, tokens: Tokens | None) -> None: ...


@dataclass(slots=True)
class MemorySession:
    """Tokens of this client alone."""

    tokens: Tokens | None = None

    def exclusive(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load(self) -> Tokens | None:
        return self.tokens

    def store(self, tokens: Tokens | None) -> None:
        self.tokens = tokens


@dataclass(slots=True)
class Retries:
    """How one request is tried again: exponential back-off with jitter, bounded by time since the first failure."""

    for_seconds: float
    first_failure: float | None = None
    count: int = 0

    def next_pause_seconds(self, now: float, asked_for_seconds: float | None = None) -> float | None:
        """How long to pause before the next try; None: it is enough. `now` is a monotonic clock's."""
        if self.first_failure is None:
            self.first_failure = now
        waited = now - self.first_failure
        if waited >= self.for_seconds:
            return None
        backoff = min(BACKOFF_BASE_SECONDS * 2.0**self.count, BACKOFF_MAX_SECONDS)
        self.count = min(self.count + 1, 16)
        pause = asked_for_seconds if asked_for_seconds is not None else backoff * random.uniform(0.5, 1.0)
        return min(pause, max(self.for_seconds - waited, 0.05))

    def succeeded(self) -> None:
        self.first_failure = None
        self.count = 0


def retry_after_seconds(header: str | None) -> float | None:
    """The number of seconds in `Retry-After`; a date or nonsense counts as absent."""
    try:
        seconds = float(header) if header else None
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds <= 3600 else None


def api_error(status: int, body: bytes, path: str, retry_after: str | None) -> ApiError:
    """The error for an answer of 400 or more. A body that is no problem+json (a proxy's page) is summed up."""
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError:
        text = body[:200].decode(errors="replace").strip()
        problem = Problem(
            type="about:blank",
            code=f"http-{status}",
            title=f"HTTP {status}",
            status=status,
            detail=f"the platform answered HTTP {status} to {path}" + (f": {text}" if text else ""),
        )
    kind = BY_STATUS.get(status, ApiError)
    return kind(problem, retry_after_seconds(retry_after))


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event."""

    event: str = "message"
    data: str = ""
    id: str | None = None


class EventDecoder:
    """Bytes of a text/event-stream -> events. Source: WHATWG HTML, section 9.2.6."""

    def __init__(self) -> None:
        self._rest = b""
        self._pending = ServerEvent()
        self._lines: list[str] = []

    def feed(self, data: bytes) -> Iterator[ServerEvent]:
        """Raises ValueError for an event that never ends."""
        self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        if len(self._rest) > MAX_EVENT_LENGTH:
            raise ValueError("a server-sent event without an end")
        for line in lines:
            event = self._line(line.rstrip(b"\r").decode(errors="replace"))
            if event is not None:
                yield event

    def _line(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._lines.append(value)
        elif name == "event":
            self._pending = replace(self._pending, event=value)
        elif name == "id":
            self._pending = replace(self._pending, id=value)
        return None

    def _dispatch(self) -> ServerEvent | None:
        event, lines = self._pending, self._lines
        self._pending, self._lines = ServerEvent(), []
        if not lines and event == ServerEvent():
            return None
        return replace(event, data="\n".join(lines))


@dataclass(frozen=True, slots=True)
class LogBytes:
    """A piece of one attempt's log. `offset` is that of its first byte."""

    epoch: int
    offset: int
    data: bytes
    next_offset: int
    complete: bool

    @staticmethod
    def of(chunk: LogChunk) -> "LogBytes":
        return LogBytes(
            epoch=chunk.epoch,
            offset=chunk.offset,
            data=base64.b64decode(chunk.data_base64),
            next_offset=chunk.next_offset,
            complete=chunk.complete,
        )

    @staticmethod
    def of_answer(headers: Mapping[str, str], data: bytes) -> "LogBytes":
        """From an answer with raw bytes; where they lie is in its headers. Whether more will come is not known."""
        offset = _number(headers, "x-log-offset")
        return LogBytes(
            epoch=_number(headers, "x-log-epoch"),
            offset=offset,
            data=data,
            next_offset=offset + len(data),
            complete=False,
        )


def log_size_bytes(headers: Mapping[str, str]) -> int:
    """How much of the log is stored."""
    return _number(headers, "x-log-size")


def _number(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    return int(text) if text.isdecimal() else 0


def event_text(data: str) -> str:
    """What an `error` event of a stream says."""
    try:
        body: object = json.loads(data)
    except ValueError:
        return data[:200]
    if isinstance(body, dict) and isinstance(detail := body.get("detail"), str):  # pyright: ignore[reportUnknownVariableType]
        return detail
    return data[:200]
