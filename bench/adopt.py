"""kill -9 of a provider's daemon at random moments, over and over, with jobs running: what is lost, doubled, left."""

import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dantegpu.apps.bootstrap import Login
from dantegpu.sdk import AsyncDante

RUNNING = 4
JOB_SECONDS = (0.5, 4.0)
DAEMON_LIVES_SECONDS = (0.0, 1.5)
"""Every third one from its start on: it dies before it has adopted, or while it does. The others from when they are
connected: a daemon that never lives long enough to renew its leases must lose its jobs."""
UNRENEWED_SECONDS = 10.0
"""On a machine so slow that leases were renewed longer ago than this, the daemon lives until it has renewed them: what
is measured are kills, and two starts of a daemon that take longer than a lease would lose jobs without any."""
CONNECT_SECONDS = 60.0
RENEW_SECONDS = 30.0
JOB_TIMEOUT_SECONDS = 300.0
STOP_SECONDS = 30.0
LAST_WORDS_LENGTH = 4000
SYNC_SECONDS = "1"
# The shell says at once that it runs; a second start of the same attempt would say so again.
SCRIPT = "echo start; sleep {seconds:.2f}; echo end"


@dataclass(frozen=True, slots=True)
class Adopted:
    """`lost`: jobs not SUCCEEDED at their first attempt, or with a log that is not whole. `doubled`: started twice.
    `orphans`: processes, folders and control groups that are left when the daemon was told to stop at the end."""

    kills: int
    jobs: int
    lost: int
    doubled: int
    orphans: int
    seconds: float


@dataclass(slots=True)
class _Tally:
    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])


class _Daemon:
    """One provider's machine, started again after each kill."""

    def __init__(self, state: Path, environment: dict[str, str]) -> None:
        self.state = state
        self._log = (state.parent / "daemon.log").open("w+b")
        self._began = 0
        self._environment = {**os.environ, **environment, "DANTE_DAEMON_STATE": str(state)}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        # The daemon writes through the same offset.
        self._began = os.lseek(self._log.fileno(), 0, os.SEEK_END)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "dantegpu.daemon", env=self._environment, stderr=self._log,
            stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    async def connected(self) -> None:
        """Wait until this life of it has said so, in its log."""
        async with asyncio.timeout(CONNECT_SECONDS):
            while b'"event": "connected"' not in os.pread(self._log.fileno(), 1 << 20, self._began):
                await asyncio.sleep(0.01)

    async def renewed(self) -> None:
        """Wait until the leases of what runs were renewed a moment ago, or nothing runs."""
        leases = self.state / "leases.json"
        deadline = time.monotonic() + RENEW_SECONDS
        while leases.exists() and time.time() - leases.stat().st_mtime > UNRENEWED_SECONDS:
            if not json.loads(leases.read_text())["leases"] or time.monotonic() > deadline:
                return
            await asyncio.sleep(0.01)

    def last_words(self) -> str:
        """The end of what this life of it has logged."""
        return os.pread(self._log.fileno(), 1 << 20, self._began).decode(errors="replace")[-LAST_WORDS_LENGTH:]

    async def end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return await self._process.wait()

    def left(self) -> list[str]:
        """What is there of attempts: their processes, by the name of their groups and their variables, and folders."""
        workspace = self.state / "work"
        groups = f"dante-{zlib.crc32(os.fsencode(workspace.absolute())):08x}"
        found = [f"folder {path.name}" for path in (workspace / "attempts").iterdir()]
        found += [f"group {path}" for path in Path("/sys/fs/cgroup").rglob(f"{groups}/slot-*")]
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue  # Ended; init has not come to it yet.
                inside = groups in Path(f"/proc/{process.pid}/cgroup").read_text()
                inside = inside or str(workspace) in " ".join(process.environ().values())
            except (OSError, psutil.Error):
                continue
            if inside and process.pid != os.getpid():
                found.append(f"process {process.pid} {process.name()}")
        return found


async def measure(login: Login, kills: int, sandbox: str, seed: int) -> Adopted:
    """Keep RUNNING jobs running while the daemon is killed `kills` times; then let all of them end."""
    dice = random.Random(seed)
    tally = _Tally()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dante-adopt-") as folder:
        async with AsyncDante(login.url, api_key=login.api_key.get_secret_value()) as client:
            token = await client.machines.create_join_token()
            daemon = _Daemon(
                Path(folder) / "machine",
                {
                    "DANTE_DAEMON_GATEWAY_URL": login.url,
                    "DANTE_DAEMON_JOIN_TOKEN": token.token,
                    "DANTE_DAEMON_SANDBOX": sandbox,
                    "DANTE_DAEMON_SYNC_INTERVAL_SECONDS": SYNC_SECONDS,
                },
            )
            await daemon.start()
            await _first_job(client)
            for number in range(kills):
                _fill(client, tally, dice)
                if number % 3:
                    await daemon.connected()
                await daemon.renewed()
                await asyncio.sleep(dice.uniform(*DAEMON_LIVES_SECONDS))
                await daemon.end(signal.SIGKILL)
                await daemon.start()
            await asyncio.gather(*tally.tasks)
            # One that is told to stop before it listens to signals can take nothing away.
            await daemon.connected()
            await _machine_is_empty(daemon)
            status = await daemon.end(signal.SIGTERM)
            left = daemon.left()
            for text in left:
                print(f"left: {text}", file=sys.stderr)
            if left or status:
                print(f"the last daemon ended with {status} and said:\n{daemon.last_words()}", file=sys.stderr)
    return Adopted(kills, tally.jobs, tally.lost, tally.doubled, len(left), round(time.monotonic() - began, 1))


def _fill(client: AsyncDante, tally: _Tally, dice: random.Random) -> None:
    while len(tally.tasks) < RUNNING:
        task = asyncio.create_task(_job(client, tally, dice.uniform(*JOB_SECONDS)))
        tally.tasks.add(task)
        task.add_done_callback(tally.tasks.discard)


async def _first_job(client: AsyncDante) -> None:
    spec = {"command": ["true"], "resources": {"cpu": 0.1, "memory": "64MB"}}
    job = await client.jobs.submit(spec)
    await client.jobs.wait(job.id, timeout_seconds=JOB_TIMEOUT_SECONDS)


async def _job(client: AsyncDante, tally: _Tally, seconds: float) -> None:
    command = ["sh", "-c", SCRIPT.format(seconds=seconds)]
    job = await client.jobs.submit({"command": command, "resources": {"cpu": 0.1, "memory": "64MB"}})
    job = await client.jobs.wait(job.id, timeout_seconds=JOB_TIMEOUT_SECONDS)
    text = b"".join([chunk.data async for chunk in client.jobs.logs(job.id, follow=True)])
    starts = len(re.findall(rb"^start$", text, re.MULTILINE))
    tally.jobs += 1
    if job.state != "SUCCEEDED" or len(job.attempts) != 1 or text != b"start\nend\n":
        outcomes = [(attempt.outcome, attempt.message) for attempt in job.attempts]
        print(f"{job.id}: {job.state}, attempts {outcomes}, log {text!r}", file=sys.stderr)
        tally.lost += starts <= 1
        tally.doubled += starts > 1


async def _machine_is_empty(daemon: _Daemon) -> None:
    """Ended attempts are forgotten when the platform has acknowledged them: a moment after their jobs' end."""
    attempts = daemon.state / "work" / "attempts"
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and any(attempts.iterdir()):
        await asyncio.sleep(0.1)
