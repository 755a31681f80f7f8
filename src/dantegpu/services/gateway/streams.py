"""Server-sent events: a stream reads on from its cursor when woken; a lost or doubled wake-up changes nothing."""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from prometheus_client import Gauge
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dantegpu.contracts.envelope import unwrap
from dantegpu.contracts.gen.dante.v1 import events_pb2
from dantegpu.contracts.subjects import JOBS_CHANGED, LOGS_APPENDED
from dantegpu.domain.clock import Clock
from dantegpu.kit.bus import Bus, unsubscribe
from dantegpu.kit.errors import RemoteError, Unavailable
from dantegpu.kit.lifecycle import Wakeup
from dantegpu.services.gateway.errors import TooManyStreams

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 15.0
"""A comment goes out so often, so that proxies keep the connection; the cursor is read again then, too."""
POLL_SECONDS = 1.0
"""Without NATS nobody wakes the stream up."""
HEARTBEAT = b": still here\n\n"

_OPEN = Gauge("dante_http_streams", "Open event streams")


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. `id` is the cursor with which a client comes back."""

    name: str
    id: str
    data: BaseModel

    def encode(self) -> bytes:
        return f"id: {self.id}\nevent: {self.name}\ndata: {self.data.model_dump_json()}\n\n".encode()


class Source(ABC):
    """Where a stream's events come from."""

    @abstractmethod
    async def read(self) -> list[Event]:
        """What is there after the cursor, which moves on; empty: nothing more for now."""

    @abstractmethod
    async def finished(self) -> BaseModel | None:
        """Asked when read() gave nothing: the last word of the stream when nothing can come any more."""


class Streams:
    """The open streams: how many there may be, and what wakes them."""

    def __init__(self, bus: Bus, clock: Clock, *, max_per_team: int, max_total: int, max_seconds: float) -> None:
        self._bus = bus
        self._clock = clock
        self._max_per_team = max_per_team
        self._max_total = max_total
        self._max_seconds = max_seconds
        self._open: Counter[str] = Counter()
        self._wakeups: set[Wakeup] = set()
        self._following: dict[str, set[Wakeup]] = {}
        """By job id: who follows it."""
        self._following_logs: dict[str, set[Wakeup]] = {}
        self._subscriptions: list[Subscription] = []
        self._closing = False

    async def start(self) -> None:
        self._closing = False
        # One subscription for all streams: with one per stream, each change of each job would be a message of its own.
        self._subscriptions = [
            await self._bus.subscribe(JOBS_CHANGED, self._jobs_changed),
            await self._bus.subscribe(LOGS_APPENDED, self._logs_appended),
        ]

    async def stop(self) -> None:
        """Ends all streams; their clients come back with Last-Event-ID."""
        self._closing = True
        for subscription in self._subscriptions:
            await unsubscribe(subscription)
        self._subscriptions.clear()
        for wakeup in self._wakeups:
            wakeup.notify()

    async def _jobs_changed(self, message: Msg) -> None:
        if self._following:
            _, event = unwrap(message.data, events_pb2.JobsChanged)
            _wake(self._following, event.job_ids)

    async def _logs_appended(self, message: Msg) -> None:
        if self._following_logs:
            _wake(self._following_logs, events_pb2.LogsAppended.FromString(message.data).job_ids)

    @property
    def open_count(self) -> int:
        return self._open.total()

    def check_room(self, team: str) -> None:
        """Raises TooManyStreams, before the answer has begun."""
        if self._open[team] >= self._max_per_team:
            raise TooManyStreams(self._max_per_team)
        if self._open.total() >= self._max_total:
            raise TooManyStreams(self._max_total)

    async def follow(self, team: str, job_id: str, source: Source, *, logs: bool = False) -> AsyncGenerator[bytes]:
        """The body of a stream on what happens to the job and, with `logs`, on what it writes."""
        async with self._woken_by(team, job_id, logs) as wakeup:
            now = self._clock.monotonic
            ends_at_seconds = now() + self._max_seconds
            beat_at_seconds = now() + HEARTBEAT_SECONDS
            yield b"retry: 1000\n\n"
            while not self._closing and now() < ends_at_seconds:
                quiet_seconds = HEARTBEAT_SECONDS if self._bus.connected else POLL_SECONDS
                last = None
                try:
                    while events := await source.read():
                        yield b"".join([event.encode() for event in events])
                    last = await source.finished()
                except (Unavailable, RemoteError) as error:
                    log.warning("stream_waits", error=error.message)
                    quiet_seconds = POLL_SECONDS
                if last is not None:
                    yield b"event: end\ndata: " + last.model_dump_json().encode() + b"\n\n"
                    return
                await wakeup.wait(max(0.0, min(quiet_seconds, beat_at_seconds - now(), ends_at_seconds - now())))
                if now() >= beat_at_seconds:
                    beat_at_seconds = now() + HEARTBEAT_SECONDS
                    yield HEARTBEAT

    @asynccontextmanager
    async def _woken_by(self, team: str, job_id: str, logs: bool) -> AsyncGenerator[Wakeup]:
        wakeup = Wakeup()
        following = [self._following, self._following_logs] if logs else [self._following]
        self._open[team] += 1
        self._wakeups.add(wakeup)
        _OPEN.inc()
        # Before the first read: what happens in between wakes the stream once more.
        for followers in following:
            followers.setdefault(job_id, set()).add(wakeup)
        try:
            yield wakeup
        finally:
            _OPEN.dec()
            self._wakeups.discard(wakeup)
            self._open[team] -= 1
            if not self._open[team]:
                del self._open[team]
            for followers in following:
                followers[job_id].discard(wakeup)
                if not followers[job_id]:
                    del followers[job_id]


def _wake(following: Mapping[str, set[Wakeup]], job_ids: Iterable[str]) -> None:
    for job_id in job_ids:
        for wakeup in following.get(job_id, ()):
            wakeup.notify()


class EventStream(Response):
    """A response that goes on until its body ends or the client leaves; the body is closed in either case.

    Starlette's StreamingResponse cancels its body again and again, which would cut the clean-up of the subscriptions.
    """

    media_type = "text/event-stream"

    def __init__(self, body: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"x-accel-buffering": "no", "cache-control": "no-store"})
        del self.headers["content-length"]
        self._stream = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with asyncio.TaskGroup() as tasks:
            producing = tasks.create_task(self._produce(send))
            leaving = tasks.create_task(_until_disconnect(receive))
            await asyncio.wait((producing, leaving), return_when=asyncio.FIRST_COMPLETED)
            producing.cancel()
            leaving.cancel()

    async def _produce(self, send: Send) -> None:
        async with aclosing(self._stream) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
