"""From the POST of a job on an idle platform to the first instruction of its process, which writes its own clock."""

import asyncio
import json
import time
import uuid
from dataclasses import dataclass

from bench.http import Connection
from dantegpu.apps.bootstrap import Login
from dantegpu.sdk import AsyncDante

# One shell builtin away from the first instruction; `date` itself starts within about a millisecond.
JOB = {"command": ["sh", "-c", "date +%s%N"], "resources": {"cpu": 0.1, "memory": "64MB"}}
JOB_TIMEOUT_SECONDS = 30.0
IDLE_SECONDS = 0.3
"""Between two jobs: what the last one left (its folder, its bill, the next parked sandbox) is done by then."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds over `n` jobs, one after the other. `done`: until the client saw the terminal state."""

    n: int
    p50_ms: float
    p95_ms: float
    max_ms: float
    done_p50_ms: float
    sandbox: str


def percentile(values: list[float], part: float) -> float:
    """Nearest-rank percentile, `part` in 0..1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def measure(login: Login, jobs: int, warm_up: int = 5) -> Latency:
    """Run `jobs` jobs after `warm_up` that do not count."""
    started: list[float] = []
    ended: list[float] = []
    key = login.api_key.get_secret_value()
    connection = await Connection.open(login.url, key)
    async with AsyncDante(login.url, api_key=key) as client:
        machine = await _machine(client)
        for number in range(warm_up + jobs):
            await asyncio.sleep(IDLE_SECONDS)
            sent_ns = time.time_ns()
            job_id = await _submit(connection)
            await client.jobs.wait(job_id, timeout_seconds=JOB_TIMEOUT_SECONDS)
            ended_ns = time.time_ns()
            written = b"".join([chunk.data async for chunk in client.jobs.logs(job_id, follow=True)])
            if number >= warm_up:
                started.append((int(written) - sent_ns) / 1e6)
                ended.append((ended_ns - sent_ns) / 1e6)
            await client.jobs.wait(job_id, timeout_seconds=JOB_TIMEOUT_SECONDS, settled=True)
    connection.close()
    return Latency(
        n=jobs,
        p50_ms=round(percentile(started, 0.5), 1),
        p95_ms=round(percentile(started, 0.95), 1),
        max_ms=round(max(started), 1),
        done_p50_ms=round(percentile(ended, 0.5), 1),
        sandbox=machine,
    )


async def _submit(connection: Connection) -> str:
    """Not by the SDK, whose HTTP client takes some milliseconds of the same two cores for itself."""
    body = json.dumps(JOB).encode()
    job = await connection.call("POST", "/v1/jobs", body, f"Idempotency-Key: {uuid.uuid4().hex}\r\n")
    return job["id"]


async def _machine(client: AsyncDante) -> str:
    async with asyncio.timeout(60):
        while True:
            for machine in (await client.machines.list()).machines:
                if machine.status == "idle":
                    return machine.sandbox
            await asyncio.sleep(0.1)
