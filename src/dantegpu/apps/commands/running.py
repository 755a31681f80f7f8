"""Shared by the platform commands: where the platform's folder is, and running something until a signal."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from dantegpu.cli import credentials


def default_data_dir() -> Path:
    """DANTE_HOME/platform."""
    return credentials.home() / "platform"


def run_loop[T](main: Callable[[asyncio.Event], Awaitable[T]]) -> T:
    """Run `main(stop)`; `stop` is set by SIGINT or SIGTERM. A second signal ends the process at once."""
    import uvloop

    async def body() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(130)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        return await main(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(body())


async def unless_stopped[T](work: Awaitable[T], stop: asyncio.Event) -> T | None:
    """What `work` returns, or None when `stop` is set before; then `work` is cancelled and cleaned up."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        stopping.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
