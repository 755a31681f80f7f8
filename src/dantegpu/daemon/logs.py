"""Attempts' logs on their way to the platform: tails of files, many of them in one request.

The first bytes go at once; what is written while a request is under way is the next one. The platform's answer says
how much it has stored, so nothing is lost or doubled whatever happens in between.
"""

import asyncio
import ctypes
import os
import struct
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
MIN_PAUSE_SECONDS = 0.02
"""Between two requests: a job that prints in a tight loop costs one request per pause, not one per line."""
SAFETY_POLL_SECONDS = 1.0
RETRY_SECONDS = 1.0
_IN_MODIFY = 0x2
_EVENT = struct.Struct("iIII")

type SendLogs = Callable[[machine_pb2.LogAppend], Awaitable[machine_pb2.LogAppended]]


class FileWatcher:
    """Tells when a file grows, by inotify (Linux has it everywhere). Source: inotify(7)."""

    def __init__(self, changed: Callable[[], None]) -> None:
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
            os.read(self._descriptor, 64 << 10)
        except BlockingIOError:
            return
        self._changed()

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

    @property
    def size(self) -> int:
        try:
            return self.path.stat().st_size
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
        return machine_pb2.LogChunk(attempt_id=str(self.attempt_id), offset=self.acked, data=data, last=last)


class LogShipper:
    """Sends what the tails have. Owns one task."""

    def __init__(self, send: SendLogs) -> None:
        self._send = send
        self._tails: dict[str, Tail] = {}
        self._wakeup = Wakeup()
        self._watcher = FileWatcher(self._wakeup.notify)
        self._tasks = Tasks("logs")

    async def start(self) -> None:
        self._watcher.start()
        self._tasks.loop(self._ship, "ship")

    async def stop(self) -> None:
        await self._tasks.stop()
        self._watcher.stop()

    def add(self, tail: Tail) -> None:
        tail.watch = self._watcher.add(tail.path)
        self._tails[str(tail.attempt_id)] = tail
        self._wakeup.notify()

    def remove(self, attempt_id: AttemptId) -> None:
        tail = self._tails.pop(str(attempt_id), None)
        if tail is not None:
            self._watcher.remove(tail.watch)

    def ended(self, tail: Tail) -> None:
        """The attempt is over: what is in the file now is all."""
        tail.ended = True
        self._wakeup.notify()

    async def _ship(self) -> None:
        waiting = [tail for tail in self._tails.values() if tail.pending]
        if not waiting:
            # The timeout is for file systems whose changes inotify does not see; without attempts nothing wakes us.
            await self._wakeup.wait(SAFETY_POLL_SECONDS if self._tails else None)
            return
        request = machine_pb2.LogAppend()
        room_bytes = MAX_REQUEST_BYTES
        for tail in waiting:
            chunk = tail.chunk(room_bytes)
            room_bytes -= len(chunk.data)
            request.chunks.append(chunk)
            if room_bytes <= 0:
                break
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
        # Fair between attempts: whoever was served goes to the end of the line.
        for attempt_id in sent:
            if attempt_id in self._tails:
                self._tails[attempt_id] = self._tails.pop(attempt_id)
