"""The throughput benchmark with a few jobs: what it says is true, whatever the figures are."""

import asyncio
from dataclasses import asdict

import pytest
from pydantic import SecretStr

from bench import throughput
from bench.http import Connection, RequestRefused
from dantegpu.apps.bootstrap import OPERATOR_EMAIL, Login
from tests.fixtures.platform import UpPlatform

pytestmark = pytest.mark.needs("bubblewrap")

JOBS = 12


def operator_of(platform: UpPlatform) -> Login:
    key = (platform.home / "platform" / "secrets" / "operator.key").read_text().strip()
    return Login(platform.running.url, SecretStr(key), "", OPERATOR_EMAIL)


def test_every_job_of_the_throughput_benchmark_is_run_and_counted(platform: UpPlatform):
    login = operator_of(platform)
    figures = asyncio.run(throughput.measure(platform.running, login, jobs=JOBS, submitters=3))
    assert figures.lost == 0
    assert figures.jobs == JOBS
    assert figures.sandbox == "bubblewrap"
    assert figures.ack_per_s >= figures.jobs_per_s > 0
    assert {"services", "daemon", "postgres", "nats", "client"} <= figures.cpu_ms_per_job.keys()
    assert asdict(figures).keys() == {
        "jobs", "seconds", "jobs_per_s", "ack_per_s", "lost", "at_once", "sandbox", "client_cpu_ms_per_job",
        "cpu_ms_per_job", "rss_mb",
    }  # fmt: skip
    with platform.operator as client:
        assert sum(job.state == "SUCCEEDED" for job in client.jobs.list(limit=2 * JOBS).jobs) >= 2 * JOBS


def test_the_light_client_tells_what_the_platform_refused(platform: UpPlatform):
    async def refused() -> None:
        connection = await Connection.open(platform.running.url, "dante_wrong")
        with pytest.raises(RequestRefused, match="401"):
            await connection.call("GET", "/v1/jobs")
        connection.close()

    asyncio.run(refused())
