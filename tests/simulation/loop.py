"""An event loop on virtual time, and the processes that live in it.

Nothing waits: when no callback is ready, time jumps to the next timer. Each callback belongs to the process whose
context it was made in, so that a process can be killed (its callbacks never run again) or stopped for a while (they
wait), as SIGKILL and SIGSTOP do, while everything else goes on.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
from typing import Any, override

MAX_STEPS = 150_000
"""Far more than any seed needs: a run that never ends is a finding too, and must not hang the tests."""


LEAST_TASKS_KEPT = 100
UNWIND_ROUNDS = 30
UNWIND_STEPS = 20_000


class ProcessKilled(BaseException):
    """Raised inside a process that dies at this very step. Not an Exception: nobody may handle it."""


class Stuck(Exception):
    """The run cannot end: nothing will ever happen again, or too much happens."""


class Process:
    """One simulated operating-system process. `context` is what everything of it runs in."""

    def __init__(self, name: str, loop: "SimLoop") -> None:
        self.name = name
        self.loop = loop
        self.alive = True
        self.frozen = False
        self.held: deque[Handle] = deque()
        self.steps_to_fault: int | None = None
        """After so many failpoints `at_fault` happens to it; None: nothing does."""
        self.at_fault: Callable[[], None] = self.kill
        self.on_kill: list[Callable[[], None]] = []
        self.context = copy_context()
        self.context.run(PROCESS.set, self)

    @property
    def running(self) -> bool:
        return self.alive and not self.frozen

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return self.loop.create_task(work, context=self.context.copy())

    def call(self, callback: Callable[..., Any], *args: Any) -> None:
        """Run `callback` in this process, soon."""
        self.loop.call_soon(callback, *args, context=self.context.copy())

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self.alive:
            self.alive = False
            self.held.clear()
            for callback in self.on_kill:
                callback()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        self.frozen = False
        while self.held:
            self.loop.ready(self.held.popleft())

    def failpoint(self) -> None:
        """A moment between two effects: where a crash is most interesting. Raises ProcessKilled."""
        if self.steps_to_fault is not None:
            self.steps_to_fault -= 1
            if self.steps_to_fault <= 0:
                self.steps_to_fault = None
                self.loop.outside.run(self.at_fault)
        if not self.alive or self.loop.ending:
            raise ProcessKilled(self.name)


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def current_process() -> Process | None:
    """The process whose code runs now; None for the world itself."""
    return PROCESS.get()


class Handle:
    """A callback that is due, or will be."""

    __slots__ = ("args", "callback", "context", "gone", "process", "when_seconds")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context, when: float) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = context.get(PROCESS)
        self.gone = False
        self.when_seconds = when

    def cancel(self) -> None:
        self.gone = True

    def cancelled(self) -> bool:
        return self.gone

    def when(self) -> float:
        return self.when_seconds


class Nap:
    """A sleep in one step where asyncio.sleep takes two. Await it once, in the task that made it."""

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_handle", "_loop", "_seconds")

    def __init__(self, loop: "SimLoop", seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._cancelled = False

    def __await__(self) -> Generator["Nap"]:
        self._asyncio_future_blocking = True
        yield self

    # --- what a task asks of a future ---------------------------------------------------------------------------------

    def get_loop(self) -> "SimLoop":
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], Any], *, context: Context) -> None:
        self._handle = self._loop.call_later(self._seconds, callback, self, context=context)

    def cancel(self, msg: object = None) -> bool:
        if self._cancelled:
            return False
        self._cancelled = True
        self._handle.cancel()
        self._loop.call_soon(self._handle.callback, self, context=self._handle.context)
        return True

    def result(self) -> None:
        if self._cancelled:
            raise asyncio.CancelledError


class SimTask(asyncio.Task[Any]):
    """Hashes by its number: sets of tasks are iterated in the same order in every run."""

    numbers = itertools.count(1)
    number: int

    def __new__(cls, *arguments: Any, **options: Any) -> "SimTask":
        task = super().__new__(cls)
        task.number = next(cls.numbers)  # before __init__, which puts it into sets
        return task

    @override
    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.AbstractEventLoop):
    """Time is a number that only this loop changes."""

    def __init__(self) -> None:
        self._now_seconds = 0.0
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._numbers = 0
        self._running = False
        self._closed = False
        self.steps = 0
        self.ending = False
        self.tasks: list[SimTask] = []
        """Those that are not done, and some that are: kept so long, they would only cost memory."""
        self._tasks_kept = LEAST_TASKS_KEPT
        self.crashes: list[dict[str, Any]] = []
        self.outside = copy_context()
        """The context of what belongs to no process: the network, the hardware, the faults."""
        SimTask.numbers = itertools.count(1)

    # --- driving ------------------------------------------------------------------------------------------------------

    @override
    def run_until_complete(self, future: Any) -> Any:
        task = asyncio.ensure_future(future, loop=self)
        with self._as_running():
            self._run(task.done)
        return task.result()

    @contextmanager
    def _as_running(self) -> Generator[None]:
        self._running = True
        asyncio.events._set_running_loop(self)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        try:
            yield
        finally:
            asyncio.events._set_running_loop(None)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            self._running = False

    def unwind(self) -> None:
        """End every task that is left, of dead processes too. Nothing that they do on their way out has an effect."""
        self.ending = True
        with self._as_running():
            for _ in range(UNWIND_ROUNDS):
                left = [task for task in self.tasks if not task.done()]
                if not left:
                    break
                for task in left:
                    task.cancel()
                self._run_for(UNWIND_STEPS)
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        self.tasks.clear()

    def _run_for(self, most_steps: int) -> None:
        """What is ready now; no timer."""
        last = self.steps + most_steps
        self._run(lambda: not self._ready or self.steps >= last)

    def _run(self, over: Callable[[], bool]) -> None:
        """Callback after callback until it is over. All that happens in a run happens here, so it is made fast."""
        ready, ending = self._ready, self.ending
        while not over():
            if not ready:
                self._jump()
            handle = ready.popleft()
            if handle.gone:
                continue
            process = handle.process
            if process is not None and not ending:
                if not process.alive:
                    continue
                if process.frozen:
                    process.held.append(handle)
                    continue
            self.steps += 1
            if self.steps > MAX_STEPS and not ending:
                raise Stuck(f"more than {MAX_STEPS} steps")
            try:
                handle.context.run(handle.callback, *handle.args)
            except ProcessKilled:
                continue
            except Exception as error:  # noqa: BLE001 - the loop itself
                self.call_exception_handler({"message": f"callback {handle.callback!r} raised", "exception": error})

    def _jump(self) -> None:
        timers = self._timers
        while timers:
            when, _, handle = heappop(timers)
            if handle.gone or (handle.process is not None and not handle.process.alive):
                continue
            if when > self._now_seconds:
                self._now_seconds = when
            self._ready.append(handle)
            while timers and timers[0][0] <= when:
                self._ready.append(heappop(timers)[2])
            return
        raise Stuck("nothing is left to happen")

    def later(self, seconds: float, callback: Callable[..., Any], *args: Any) -> Any:
        """Like call_later, for what goes on whatever happens to the process that asks for it."""
        return self._push(self._now_seconds + seconds, callback, args, self.outside)

    def ready(self, handle: Handle) -> None:
        """Take back what a stopped process could not run."""
        self._ready.append(handle)

    # --- what asyncio asks of a loop ----------------------------------------------------------------------------------

    @override
    def time(self) -> float:
        return self._now_seconds

    @override
    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        handle = Handle(callback, args, context if context is not None else copy_context(), self._now_seconds)
        if not self._closed:
            self._ready.append(handle)
        return handle

    @override
    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        return self._push(self._now_seconds + delay, callback, args, context)

    @override
    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        return self._push(when, callback, args, context)

    def _push(self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: Context | None) -> Any:
        handle = Handle(callback, args, context if context is not None else copy_context(), when)
        if not self._closed:
            self._numbers += 1
            heappush(self._timers, (when, self._numbers, handle))
        return handle

    @override
    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    @override
    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None, **rest: Any
    ) -> "asyncio.Task[Any]":
        task = SimTask(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # pyright: ignore[reportAttributeAccessIssue]
        self.tasks.append(task)
        if len(self.tasks) > 2 * self._tasks_kept:
            self.tasks = [each for each in self.tasks if not each.done()]
            self._tasks_kept = max(LEAST_TASKS_KEPT, len(self.tasks))
        return task

    @override
    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        """At once: there are no threads here."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever awaits it gets it, as from a thread
            done.set_exception(error)
        return done

    @override
    def get_debug(self) -> bool:
        return False

    @override
    def is_running(self) -> bool:
        return self._running

    @override
    def is_closed(self) -> bool:
        return self._closed

    @override
    def close(self) -> None:
        self.unwind()

    @override
    def call_exception_handler(self, context: dict[str, Any]) -> None:
        process = current_process()
        if isinstance(context.get("exception"), ProcessKilled):
            return  # of a task that nobody waits for any more
        if not self.ending and (process is None or process.alive):
            self.crashes.append(context)

    def _timer_handle_cancelled(self, handle: Any) -> None:
        return
