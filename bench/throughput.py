"""Many small jobs, one POST each, from the first POST until the last job has ended in the database."""

import asyncio
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from bench.http import Connection
from bench.processes import cpu_seconds, rss_mb
from dantegpu.apps.bootstrap import Login
from dantegpu.apps.platform import Running
from dantegpu.domain.ids import JobId

JOB: dict[str, Any] = {"command": ["true"], "resources": {"cpu": "0.1", "memory": "16MB", "disk": "1MB"}}
"""Small, so that two cores run 20 at once. With less, the CPU limit slows the start of the sandbox itself."""
LIGHT_CPU = "0.03"
"""Of jobs without a sandbox, and of those that only sleep: two cores run 64 of them at once."""
QUEUED_GPUS = "RTX 4090:1"
QUEUED_GPU = "RTX4090"
"""What `--queued` jobs wait for: the machine has one (simulated), and a job that does not end holds it."""
BLOCKER = {"command": ["sleep", "86400"], "resources": {"gpu": QUEUED_GPU, "cpu": "0.01", "memory": "16MB"}}
WAITING = {"command": ["true"], "resources": {"gpu": QUEUED_GPU, "cpu": "0.01", "memory": "16MB"}}
JOBS_PER_BULK_CALL = 10_000
WARM_UP_JOBS = 100
BULK_WARM_UP_JOBS = 100
WATCH_SECONDS = 0.02
WATCHED_CLOSELY = 50
TIMEOUT_SECONDS = 600.0
CREDIT_UDGPU = 10**12
# Ids rise with time, so these jobs are those from their first id on.
_LIVE = (
    "SELECT count(*), count(*) FILTER (WHERE state = 'RUNNING') FROM scheduler.jobs WHERE id >= %s AND ended_at IS NULL"
)
_NONE_UNSETTLED = "SELECT NOT EXISTS (SELECT 1 FROM scheduler.jobs WHERE id >= %s AND NOT settled)"


@dataclass(frozen=True, slots=True)
class Throughput:
    """`seconds`: first POST until all jobs have ended; `ack_per_s`: until all are answered; `lost`: not SUCCEEDED.
    `at_once`: the most jobs that were seen running at the same time.

    `client_cpu_ms_per_job` is what this process, which only submits and counts, took of the same cores.
    """

    jobs: int
    seconds: float
    jobs_per_s: float
    ack_per_s: float
    lost: int
    at_once: int
    sandbox: str
    client_cpu_ms_per_job: float
    cpu_ms_per_job: dict[str, float]
    """CPU milliseconds per job by group of processes, the bill and its settlement included."""
    rss_mb: float


@dataclass(frozen=True, slots=True)
class Intake:
    """`posts` calls with one job each, then one call with `bulk_jobs`; `bulk_seconds`: sent until answered 201."""

    posts: int
    ack_per_s: float
    bulk_jobs: int
    bulk_seconds: float
    cpu_ms_per_job: dict[str, float]
    """Of those that came one by one."""
    bulk_cpu_ms_per_job: dict[str, float]
    rss_mb: float


async def measure(
    running: Running,
    login: Login,
    *,
    jobs: int,
    submitters: int,
    queued: int = 0,
    array: int = 0,
    sleep_seconds: float = 0.0,
) -> Throughput:
    """Submit `jobs` jobs over `submitters` connections, or one array of `array` tasks in one POST.

    Behind `queued` jobs that wait for a GPU that is taken. Each job is `true`, or sleeps.
    """
    key = login.api_key.get_secret_value()
    connections = [await Connection.open(running.url, key) for _ in range(submitters)]
    async with await psycopg.AsyncConnection.connect(running.database, autocommit=True) as database:
        sandbox = await _machine(connections[0])
        small = _light("true") if sandbox == "none" else JOB
        job = _light("sleep", str(sleep_seconds)) if sleep_seconds else small
        await _credit(connections[0])
        warm_up = await _submit(connections, min(jobs, WARM_UP_JOBS), small)
        await _until(database, _NONE_UNSETTLED, JobId.parse(min(warm_up)).uuid)
        if queued:
            await _fill_queue(connections[0], database, queued)
        before = cpu_seconds(running)
        began = time.monotonic()
        ids = await _submit_array(connections[0], job, array) if array else await _submit(connections, jobs, job)
        answered = time.monotonic()
        first = JobId.parse(min(ids)).uuid
        at_once = await _until_ended(database, first)
        ended = time.monotonic()
        memory = rss_mb(running)
        # What a job costs includes its bill.
        await _until(database, _NONE_UNSETTLED, first)
        after = cpu_seconds(running)
        done = await _tasks_done(connections[0], ids[0]) if array else await _done(connections[0], ids)
    for connection in connections:
        connection.close()
    jobs = array or jobs
    per_job = _per_job(before, after, jobs)
    return Throughput(
        jobs=jobs,
        seconds=round(ended - began, 3),
        jobs_per_s=round(jobs / (ended - began), 1),
        ack_per_s=round(jobs / (answered - began), 1),
        lost=jobs - done,
        at_once=at_once,
        sandbox=sandbox,
        client_cpu_ms_per_job=per_job["client"],
        cpu_ms_per_job=per_job,
        rss_mb=memory,
    )


async def measure_intake(running: Running, login: Login, *, jobs: int, submitters: int, bulk: int) -> Intake:
    """Nothing runs: the platform has no machine."""
    key = login.api_key.get_secret_value()
    connections = [await Connection.open(running.url, key) for _ in range(submitters)]
    await _submit(connections, min(jobs, WARM_UP_JOBS), JOB)
    before = cpu_seconds(running)
    began = time.monotonic()
    await _submit(connections, jobs, JOB)
    ack_seconds = time.monotonic() - began
    after = cpu_seconds(running)
    await connections[0].call("POST", "/v1/jobs", _distinct(BULK_WARM_UP_JOBS))
    body = _distinct(bulk)
    bulk_before = cpu_seconds(running)
    began = time.monotonic()
    answer = await connections[0].call("POST", "/v1/jobs", body)
    bulk_seconds = time.monotonic() - began
    bulk_after = cpu_seconds(running)
    for connection in connections:
        connection.close()
    return Intake(
        posts=jobs,
        ack_per_s=round(jobs / ack_seconds, 1),
        bulk_jobs=len(answer["jobs"]),
        bulk_seconds=round(bulk_seconds, 3),
        cpu_ms_per_job=_per_job(before, after, jobs),
        bulk_cpu_ms_per_job=_per_job(bulk_before, bulk_after, bulk),
        rss_mb=rss_mb(running),
    )


def _per_job(before: Mapping[str, float], after: Mapping[str, float], jobs: int) -> dict[str, float]:
    return {group: round(1000 * (after[group] - before[group]) / jobs, 3) for group in after}


def _distinct(jobs: int) -> bytes:
    return json.dumps({"jobs": [{**JOB, "command": ["echo", str(number)]} for number in range(jobs)]}).encode()


def _light(*command: str) -> dict[str, object]:
    return {"command": command, "resources": {**JOB["resources"], "cpu": LIGHT_CPU}}


async def _submit(connections: Sequence[Connection], jobs: int, job: Mapping[str, object]) -> list[str]:
    """The jobs' ids. Each connection sends its next job when the last one was answered."""
    body = json.dumps(job).encode()
    ids: list[str] = []
    left = jobs

    async def send(connection: Connection) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            answer = await connection.call("POST", "/v1/jobs", body, f"Idempotency-Key: {uuid.uuid4().hex}\r\n")
            ids.append(answer["id"])

    async with asyncio.TaskGroup() as tasks:
        for connection in connections:
            tasks.create_task(send(connection))
    return ids


async def _submit_array(connection: Connection, job: Mapping[str, object], tasks: int) -> list[str]:
    """The array's id, alone in a list."""
    answer = await connection.call("POST", "/v1/jobs", json.dumps({**job, "array": tasks}).encode())
    return [answer["id"]]


async def _tasks_done(connection: Connection, array_id: str) -> int:
    shown = await connection.call("GET", f"/v1/jobs/{array_id}")
    return shown["array"]["succeeded"]


async def _done(connection: Connection, ids: Sequence[str]) -> int:
    return len(await _succeeded(connection, min(ids)) & set(ids))


async def _fill_queue(connection: Connection, database: psycopg.AsyncConnection, queued: int) -> None:
    await connection.call("POST", "/v1/jobs", json.dumps(BLOCKER).encode())
    await _until(database, "SELECT EXISTS (SELECT 1 FROM scheduler.jobs WHERE state = 'RUNNING')")
    left = queued
    while left > 0:
        part = min(left, JOBS_PER_BULK_CALL)
        await connection.call("POST", "/v1/jobs", json.dumps({"jobs": [WAITING] * part}).encode())
        left -= part
    # Each has been looked at: it has another reason than the one it was born with.
    await _until(database, "SELECT NOT EXISTS (SELECT 1 FROM scheduler.jobs WHERE reason = 'new')")


async def _until_ended(database: psycopg.AsyncConnection, first: uuid.UUID) -> int:
    """The most jobs that were running when it looked."""
    most = 0
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            live, running = await _one(database, _LIVE, first)
            most = max(most, running)
            if not live:
                return most
            # Counting thousands of jobs is work for the same cores.
            await asyncio.sleep(WATCH_SECONDS * max(1.0, live / WATCHED_CLOSELY))


async def _one(database: psycopg.AsyncConnection, question: str, *parameters: object) -> tuple[Any, ...]:
    row = await (await database.execute(question.encode(), parameters or None)).fetchone()
    assert row is not None
    return row


async def _until(database: psycopg.AsyncConnection, condition: str, *parameters: object) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            if (await _one(database, condition, *parameters))[0]:
                return
            await asyncio.sleep(WATCH_SECONDS)


async def _succeeded(connection: Connection, first: str) -> set[str]:
    """Ids from `first` on that the API shows as SUCCEEDED."""
    found: set[str] = set()
    cursor = ""
    while True:
        page = await connection.call("GET", f"/v1/jobs?state=SUCCEEDED&limit=500&cursor={cursor}")
        found |= {job["id"] for job in page["jobs"] if job["id"] >= first}
        cursor = page["next_cursor"]
        if not cursor or cursor < first:
            return found


async def _machine(connection: Connection) -> str:
    """What the one machine isolates jobs with, as soon as it takes jobs."""
    async with asyncio.timeout(60):
        while True:
            for machine in (await connection.call("GET", "/v1/machines"))["machines"]:
                if machine["status"] == "idle":
                    return machine["sandbox"]
            await asyncio.sleep(0.1)


async def _credit(connection: Connection) -> None:
    wallet = await connection.call("GET", "/v1/wallet")
    body = {"team_id": wallet["team_id"], "amount_udgpu": CREDIT_UDGPU, "text": "benchmark"}
    await connection.call("POST", "/v1/admin/credits", json.dumps(body).encode())
