"""Attempts' logs on their way to the platform: tails of files, many of them in one request.

The first bytes go at once; what is written while a request is under way is the next one. The platform's answer says
how much it has stored, so nothing is lost or doubled whatever happens in between. Only logs that have changed are
looked at: a thousand quiet jobs cost nothing.
"""

import asyncio
import ctypes
import os
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import AttemptId
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Tasks, Wakeup

log = structlog.get_logger(__name__)

MAX_CHUNK_BYTES = 256 << 10
MAX_REQUEST_BYTES = 700 << 10
"""Below NATS's default limit of 1 MiB for a message."""
MIN_PAUSE_SECONDS = 0.03
"""Between two requests: a job that prints in a tight loop costs one request per pause, not one per line."""
WATCH_AFTER_SECONDS = 0.1
"""The log of a job shorter than this goes in one piece, when it has ended. The kernel is slow to end a watch."""
CHUNK_OVERHEAD_BYTES = 64
SAFETY_POLL_SECONDS = 1.0
RETRY_SECONDS = 1.0
_IN_MODIFY = 0x2
_EVENT = struct.Struct("iIII")

type SendLogs = Callable[[machine_pb2.LogAppend], Awaitable[machine_pb2.LogAppended]]


class FileWatcher:
    """Tells when a file grows, by inotify (Linux has it everywhere). Source: inotify(7)."""

    def __init__(self, changed: Callable[[int], None]) -> None:
        """`changed` gets the number that `add` gave."""
        self._changed = changed
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = -1

    def start(self) -> None:
        descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._descriptor = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._readable)

    def _readable(self) -> None:
        try:
            events = os.read(self._descriptor, 64 << 10)
        except BlockingIOError:
            return
        position = 0
        while position < len(events):
            watch, _, _, name_bytes = _EVENT.unpack_from(events, position)
            position += _EVENT.size + name_bytes
            self._changed(watch)

    def add(self, path: Path) -> int:
        """A number to give back to `remove`; -1 when the limit of watches is reached (the safety poll serves it)."""
        return self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_MODIFY)

    def remove(self, watch: int) -> None:
        if watch >= 0:
            self._libc.inotify_rm_watch(self._descriptor, watch)

    def stop(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(slots=True)
class Tail:
    """One attempt's log. `acked` is how much the platform has."""

    attempt_id: AttemptId
    path: Path
    limit_bytes: int
    acked: int = 0
    ended: bool = False
    """The file will not grow any more."""
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    """All of it, and that it ended, is stored; or the platform does not want more."""
    watch: int = -1
    sent: bool = False
    """The platform may know of it."""

    def silent(self) -> None:
        """It has ended, is empty, and was never sent."""
        self.ended = True
        self.complete.set()

    @property
    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except FileNotFoundError:
            return self.acked

    @property
    def end(self) -> int:
        """How much of the file is to be sent."""
        return min(self.size, self.limit_bytes) if self.limit_bytes else self.size

    @property
    def pending(self) -> bool:
        return not self.complete.is_set() and (self.ended or self.acked < self.end)

    def chunk(self, room_bytes: int) -> machine_pb2.LogChunk:
        end = self.end
        # A job may truncate its own log: there is nothing to send before it grows past what was sent.
        count = max(0, min(end - self.acked, room_bytes, MAX_CHUNK_BYTES))
        data = b""
        if count:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), count, self.acked)
        last = self.ended and self.acked + len(data) >= end
        self.sent = True
        return machine_pb2.LogChunk(attempt_id=str(self.attempt_id), offset=self.acked, data=data, last=last)


class LogShipper:
    """Sends what the tails have. Owns one task."""

    def __init__(self, send: SendLogs) -> None:
        self._send = send
        self._tails: dict[str, Tail] = {}
        self._changed: dict[str, None] = {}
        """Tails that may have something to send, whoever waits longest first."""
        self._watched: dict[int, str] = {}
        self._unwatched: deque[tuple[float, Tail]] = deque()
        self._wakeup = Wakeup()
        self._watcher = FileWatcher(self._grown)
        self._tasks = Tasks("logs")

    async def start(self) -> None:
        self._watcher.start()
        self._tasks.loop(self._ship, "ship")
        self._tasks.loop(self._poll, "poll")

    async def stop(self) -> None:
        await self._tasks.stop()
        self._watcher.stop()

    def add(self, tail: Tail) -> None:
        """Follow it. Again for one that is followed: nothing changes."""
        attempt_id = str(tail.attempt_id)
        if attempt_id in self._tails:
            return
        self._tails[attempt_id] = tail
        loop = asyncio.get_running_loop()
        if not self._unwatched:
            loop.call_later(WATCH_AFTER_SECONDS, self._watch)
        self._unwatched.append((loop.time() + WATCH_AFTER_SECONDS, tail))

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unwatched and self._unwatched[0][0] <= loop.time():
            tail = self._unwatched.popleft()[1]
            attempt_id = str(tail.attempt_id)
            if tail.ended or attempt_id not in self._tails:
                continue
            tail.watch = self._watcher.add(tail.path)
            self._watched[tail.watch] = attempt_id
            # What it has written before it was watched.
            self._touch(attempt_id)
        if self._unwatched:
            loop.call_at(self._unwatched[0][0], self._watch)

    def remove(self, attempt_id: AttemptId) -> None:
        tail = self._tails.pop(str(attempt_id), None)
        self._changed.pop(str(attempt_id), None)
        if tail is not None and tail.watch >= 0:
            self._watcher.remove(tail.watch)
            self._watched.pop(tail.watch, None)

    def ended(self, tail: Tail) -> None:
        """The attempt is over: what is in the file now is all."""
        tail.ended = True
        self._touch(str(tail.attempt_id))

    def _touch(self, attempt_id: str) -> None:
        self._changed[attempt_id] = None
        self._wakeup.notify()

    def _grown(self, watch: int) -> None:
        attempt_id = self._watched.get(watch)
        if attempt_id is not None:
            self._touch(attempt_id)

    async def _poll(self) -> None:
        """For file systems whose changes inotify does not see, and machines that are out of watches."""
        await asyncio.sleep(SAFETY_POLL_SECONDS)
        for attempt_id, tail in self._tails.items():
            if tail.pending:
                self._touch(attempt_id)

    async def _ship(self) -> None:
        request = self._next_request()
        if not request.chunks:
            await self._wakeup.wait()
            return
        try:
            answer = await self._send(request)
        except ServiceError as error:
            log.info("logs_not_sent", error=str(error))
            await asyncio.sleep(RETRY_SECONDS)
            return
        if answer.error:
            log.info("logs_not_stored", error=answer.error)
            await asyncio.sleep(RETRY_SECONDS)
            return
        self._acknowledge(request, answer)
        await asyncio.sleep(MIN_PAUSE_SECONDS)

    def _next_request(self) -> machine_pb2.LogAppend:
        request = machine_pb2.LogAppend()
        room_bytes = MAX_REQUEST_BYTES
        for attempt_id in list(self._changed):
            tail = self._tails.get(attempt_id)
            if tail is None or not tail.pending:
                del self._changed[attempt_id]
                continue
            chunk = tail.chunk(room_bytes)
            room_bytes -= len(chunk.data) + CHUNK_OVERHEAD_BYTES
            request.chunks.append(chunk)
            if room_bytes <= 0:
                break
        return request

    def _acknowledge(self, request: machine_pb2.LogAppend, answer: machine_pb2.LogAppended) -> None:
        sent = {chunk.attempt_id: chunk for chunk in request.chunks}
        for ack in answer.acks:
            tail = self._tails.get(ack.attempt_id)
            chunk = sent.get(ack.attempt_id)
            if tail is None or chunk is None:
                continue
            tail.acked = ack.offset
            if ack.refused or (chunk.last and ack.offset >= chunk.offset + len(chunk.data)):
                tail.complete.set()
            # Fair between attempts: whoever was served goes to the end of the line, and leaves it with nothing to send.
            self._changed.pop(ack.attempt_id, None)
            if tail.pending:
                self._changed[ack.attempt_id] = None
