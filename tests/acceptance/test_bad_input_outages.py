"""PostgreSQL or NATS away: what a user is told meanwhile, and that nothing accepted is lost."""

import asyncio
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from dantegpu.sdk import Dante
from tests.fixtures.cluster import Cluster, wait_until
from tests.fixtures.platform import DANTE

pytestmark = pytest.mark.needs("bubblewrap")

SPEC = {"command": ["true"], "resources": {"cpu": 0.1, "memory": "64MB"}}


@pytest.fixture
def database_away(cluster: Cluster) -> Generator[None]:
    asyncio.run(cluster.postgres.stop())
    yield
    asyncio.run(cluster.postgres.start())


def ask(cluster: Cluster, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    assert cluster.login
    sent = {"authorization": f"Bearer {cluster.login.api_key.get_secret_value()}", "content-type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(cluster.url + path, data, sent), timeout=30) as answer:
            return answer.status, {}, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}, json.loads(error.read())


def problems(cluster: Cluster, name: str) -> str:
    """What a service's /readyz complains about; "" when it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{cluster.ops_ports[name]}/readyz", timeout=10):
            return ""
    except urllib.error.HTTPError as error:
        return json.dumps(json.loads(error.read())["problems"])


def all_ready(cluster: Cluster) -> bool:
    return all(problems(cluster, name) == "" for name in cluster.ops_ports)


def test_without_postgresql_requests_get_503_and_when_to_come_back(cluster: Cluster, database_away: None):
    key = uuid4().hex
    for path, body in (("/v1/jobs", None), ("/v1/jobs", {"jobs": [SPEC]})):
        status, headers, problem = ask(cluster, path, body, idempotency_key=key)
        assert status == problem["status"] == 503
        assert int(headers["retry-after"]) >= 1
        assert headers["content-type"] == "application/problem+json"
        assert "nothing was lost" in problem["detail"]


def test_without_postgresql_readyz_names_the_database(cluster: Cluster, database_away: None):
    assert "database" in problems(cluster, "scheduler-orchestrator-service")
    with urllib.request.urlopen(
        f"http://127.0.0.1:{cluster.ops_ports['scheduler-orchestrator-service']}/healthz", timeout=10
    ) as answer:
        assert answer.status == 200  # alive: a restart would not help


def test_the_command_line_says_what_it_waits_for_and_goes_on_by_itself(cluster: Cluster, tmp_path: Path):
    wait_until(lambda: all_ready(cluster), "every service is ready")
    assert cluster.login
    asyncio.run(cluster.postgres.stop())
    log = tmp_path / "ps.log"
    with log.open("wb") as file:
        waiting = subprocess.Popen(
            [*DANTE, "ps", "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file,
            env={"PATH": "/usr/bin:/bin", "DANTE_HOME": str(tmp_path), "DANTE_URL": cluster.url,
                 "DANTE_API_KEY": cluster.login.api_key.get_secret_value()},
        )  # fmt: skip
    try:
        wait_until(lambda: b"does not answer" in log.read_bytes(), "it says what it waits for")
    finally:
        asyncio.run(cluster.postgres.start())
    answer, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "jobs" in json.loads(answer)


def test_without_nats_jobs_are_accepted_and_run_when_it_is_back(cluster: Cluster):
    wait_until(lambda: all_ready(cluster), "every service is ready")
    with cluster.new_consumer() as client:
        asyncio.run(cluster.nats.stop())
        try:
            key = uuid4().hex
            job = client.jobs.submit(SPEC, idempotency_key=key)
            assert client.jobs.get(job.id).state == "QUEUED"
            assert "NATS" in wait_until(
                lambda: problems(cluster, "scheduler-orchestrator-service"), "readyz names what is away"
            )
        finally:
            asyncio.run(cluster.nats.start())
        assert client.jobs.wait(job.id, timeout_seconds=60).state == "SUCCEEDED"
        assert client.jobs.submit(SPEC, idempotency_key=key).id == job.id


def test_everything_recovers_by_itself_and_the_ledger_is_balanced(cluster: Cluster):
    wait_until(lambda: all_ready(cluster), "every service is ready")
    with cluster.new_consumer() as client, Dante(cluster.url):
        job = client.jobs.submit(SPEC)
        assert client.jobs.wait(job.id, settled=True, timeout_seconds=60).state == "SUCCEEDED"
    assert cluster.operator.admin.ledger().balanced
