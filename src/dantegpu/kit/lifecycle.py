"""Things that start and stop, and the tasks that live in them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import structlog

if TYPE_CHECKING:
    from grpc import aio

log = structlog.get_logger(__name__)

RESTART_DELAY_SECONDS = 0.2
MAX_RESTART_DELAY_SECONDS = 10.0
REST_FACTOR = 2.0


class Component(Protocol):
    """Started once, stopped once; both idempotent. stop() returns when nothing of it runs any more."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Tasks:
    """Owner of background tasks. A loop that crashes is logged and started again with a growing delay."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` once, in the background, until it ends or stop() cancels it. A crash is logged."""
        task = asyncio.create_task(self._guard(work, name), name=f"{self._name}:{name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it would never be awaited
        return task

    def loop(self, body: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[None]:
        """Run `body` over and over (it does its own waiting); when it raises, log, wait and go on."""
        return self.spawn(self._forever(body, name), name)

    async def stop(self) -> None:
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _guard(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception:
            log.exception("task_crashed", component=self._name, task=name)

    async def _forever(self, body: Callable[[], Awaitable[None]], name: str) -> None:
        delay = RESTART_DELAY_SECONDS
        while True:
            began_seconds = time.monotonic()
            try:
                await body()
                delay = RESTART_DELAY_SECONDS
            except Exception as error:  # noqa: BLE001 - outermost loop of a task: log and try again
                if time.monotonic() - began_seconds > MAX_RESTART_DELAY_SECONDS:
                    delay = RESTART_DELAY_SECONDS  # it ran well for a while: a new trouble, not the last one again
                log.warning("loop_failed", component=self._name, task=name, error=repr(error), retry_in_seconds=delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, MAX_RESTART_DELAY_SECONDS)


class Wakeup:
    """Level-triggered wake-up: `notify()` any number of times, one `wait()` returns. The timeout is the safety net."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()

    async def wait(self, timeout_seconds: float | None = None) -> bool:
        """Returns True when notified, False when only the time passed."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Pace:
    """Rests between the passes of a loop. What comes during a rest shares the next pass.

    The first pass of a quiet time goes at once; in a busy one the rests grow with what a pass takes, so a process with
    much to do does it in fewer, larger passes.
    """

    def __init__(self, least_seconds: float, most_seconds: float = 0.1) -> None:
        self._least_seconds = least_seconds
        self._most_seconds = most_seconds
        self._began_seconds = 0.0

    def begin(self) -> None:
        self._began_seconds = time.monotonic()

    async def rest(self) -> None:
        took_seconds = time.monotonic() - self._began_seconds
        await asyncio.sleep(max(self._least_seconds, min(REST_FACTOR * took_seconds, self._most_seconds)))


type Check = Callable[[], Awaitable[None]]
"""A readiness check: returns when all is well, raises a ServiceError that says what is not."""

type ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class HttpApp:
    """An HTTP application and where it wants to listen (`host:port`)."""

    app: ASGIApp
    listen: str


@dataclass(frozen=True, slots=True)
class Service:
    """What a service's `build()` returns: wiring only, nothing runs yet."""

    name: str
    components: Sequence[Component]
    """Started in this order before the doors open, stopped in reverse after they closed."""
    register_rpc: "Callable[[aio.Server], None] | None" = None
    http: HttpApp | None = None
    checks: Mapping[str, Check] = field(default_factory=dict[str, Check])
    """For /readyz."""
