"""What the machine's owner wants of it besides renting it out: hours, reserves, a temperature, a job of his own."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
from dataclasses import dataclass
from datetime import datetime, time

import structlog

from dantegpu.daemon.executors.processes import descendants

log = structlog.get_logger(__name__)

IDLE_BEFORE_SECONDS = 30.0
"""The owner's idle job starts when nothing was rented for so long: jobs often come one after another."""
IDLE_RESTART_SECONDS = 60.0
IDLE_NICENESS = 19
_HOURS = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")


class InvalidHours(ValueError):
    """`hours` was not understood."""


@dataclass(frozen=True, slots=True)
class Hours:
    """When the machine is for rent, by its own local time; over midnight when it begins later than it ends."""

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> "Hours | None":
        """`"22:00-06:30"`; None for an empty text: always. Raises InvalidHours."""
        if not text.strip():
            return None
        match = _HOURS.fullmatch(text.strip())
        if match is not None:
            first_hour, first_minute, last_hour, last_minute = map(int, match.groups())
            try:
                hours = cls(time(first_hour, first_minute), time(last_hour, last_minute))
            except ValueError:
                raise InvalidHours(_expected(text)) from None
            if hours.begin != hours.end:
                return hours
        raise InvalidHours(_expected(text))

    def open_at(self, now: datetime) -> bool:
        """Whether the machine is for rent at that local time."""
        moment = now.time()
        if self.begin < self.end:
            return self.begin <= moment < self.end
        return moment >= self.begin or moment < self.end

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"


def _expected(text: str) -> str:
    return f"expected hours such as 22:00-06:30, got {text!r}"


class IdleJob:
    """The owner's own command, run while nothing is rented, as the daemon's user; it gives way at once."""

    def __init__(self, command: str) -> None:
        self._command = shlex.split(command)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pids(self) -> set[int]:
        """Its processes, which are no strangers on a GPU."""
        if self._process is None or self._process.returncode is not None:
            return set()
        return {self._process.pid, *descendants(self._process.pid)}

    async def run(self) -> None:
        """Run it once; returns when it has ended or was stopped. Does nothing without a command."""
        if not self._command:
            return
        command = ["nice", "-n", str(IDLE_NICENESS), *self._command]
        process = self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        log.info("idle_job_started", pid=process.pid)
        try:
            await process.wait()
        finally:
            self.stop()
            self._process = None
        log.info("idle_job_ended", returncode=process.returncode)

    def stop(self) -> None:
        """SIGKILL to all of it: a rented machine is rented from its first second."""
        if self._process is None:
            return
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
