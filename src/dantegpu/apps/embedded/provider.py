"""The provider daemon of this machine: a child process that is started, watched, started again, and stopped in order.

It has its own session and no death signal: when the platform is killed, the daemon and the jobs on it live on for as
long as their leases hold. The next platform on the folder ends that daemon, not its jobs: the new one adopts them.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import psutil
import structlog

from dantegpu.apps.embedded.process import make_private_folder, rotate_log, tail
from dantegpu.kit.lifecycle import Tasks

log = structlog.get_logger(__name__)

STOP_SECONDS: Final = 15.0
RESTART_DELAY_SECONDS: Final = 0.5
RESTART_DELAY_SECONDS_MAX: Final = 30.0
_STATE_VARIABLE: Final = "DANTE_DAEMON_STATE"


class ProviderDaemon:
    """stop() is idempotent. `on_change` is told the process id, or None when the machine has left."""

    def __init__(
        self, state_dir: Path, log_path: Path, environment: Mapping[str, str], on_change: Callable[[int | None], None]
    ) -> None:
        self._state_dir = state_dir
        self._log_path = log_path
        self._environment = {**environment, _STATE_VARIABLE: str(state_dir)}
        self._on_change = on_change
        self._tasks = Tasks("provider daemon")
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        make_private_folder(self._state_dir)
        rotate_log(self._log_path)
        await self._spawn()
        self._tasks.spawn(self._keep_alive(), "keep alive")

    async def stop(self) -> None:
        """Its jobs are handed back, and start again with the next platform on the folder."""
        await self._tasks.stop()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _spawn(self) -> None:
        with self._log_path.open("ab") as log_file:
            self._process = await asyncio.create_subprocess_exec(
                # -P: a module in the user's folder must not shadow the standard library's.
                sys.executable, "-P", "-m", "dantegpu.daemon",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                # The terminal's Ctrl-C is for us; we stop the daemon in order.
                start_new_session=True,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        self._on_change(self._process.pid)

    async def _keep_alive(self) -> None:
        delay_seconds = RESTART_DELAY_SECONDS
        while self._process is not None:
            began = time.monotonic()
            status = await self._process.wait()
            if status == 0:
                log.warning("provider_left", meaning="the machine has left the platform; the next start joins it again")
                self._on_change(None)
                return
            if time.monotonic() - began > RESTART_DELAY_SECONDS_MAX:
                delay_seconds = RESTART_DELAY_SECONDS
            log.error("provider_daemon_ended", status=status, log=str(self._log_path), retry_in_seconds=delay_seconds)
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(delay_seconds * 2, RESTART_DELAY_SECONDS_MAX)
            await self._spawn()
            log.info("provider_daemon_restarted")


def end_leftover(state_dir: Path, number: signal.Signals) -> list[int]:
    """End daemons on `state_dir` that have lost their platform; their process ids. Blocks until they are gone.

    SIGKILL leaves their jobs running for the next daemon to adopt; SIGTERM hands them back.
    """
    leftovers = [process for process in psutil.process_iter(["cmdline"]) if _serves(process, state_dir)]
    for process in leftovers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    _, alive = psutil.wait_procs(leftovers, timeout=STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
    return [process.pid for process in leftovers]


def _serves(process: psutil.Process, state_dir: Path) -> bool:
    if "dantegpu.daemon" not in (process.info["cmdline"] or ()):
        return False
    try:
        return process.environ().get(_STATE_VARIABLE) == str(state_dir)
    except psutil.Error:
        return False


def last_words(log_path: Path) -> str:
    """What the daemon's log ends with, in one line for people."""
    lines = [line for line in tail(log_path).splitlines() if line.strip()]
    if not lines:
        return ""
    try:
        entry = json.loads(lines[-1])
    except ValueError:
        return lines[-1]
    return f"{entry.get('event', '')} {entry.get('error', '')}".strip() if isinstance(entry, dict) else lines[-1]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
