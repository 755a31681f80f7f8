"""/healthz, /readyz and /metrics: of each service alone, and of each in `dante up`."""

import re
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dantegpu.apps.targets import TARGETS
from tests.fixtures.cluster import Cluster
from tests.fixtures.people import new_person
from tests.fixtures.platform import UpPlatform

pytestmark = pytest.mark.needs("bubblewrap")

JOB = {"command": ["true"], "resources": {"cpu": 0.1, "memory": "64MB"}}
LABEL_VALUES_MAX = 200
"""Of one label of one metric: routes and methods are some dozens, ids would be without end."""
AN_ID = re.compile(r"[a-z]{2,8}_[0-9a-hjkmnp-tv-z]{26}|[0-9a-f]{16,}|@|dante_[0-9A-Za-z]{20,}")


def fetch(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read().decode()


def check_pages(prefix: str) -> None:
    assert fetch(f"{prefix}/healthz")[0] == 200
    status, kind, body = fetch(f"{prefix}/readyz")
    assert (status, kind) == (200, "application/json"), body
    status, kind, body = fetch(f"{prefix}/metrics")
    assert (status, kind.startswith("text/plain")) == (200, True)
    check_metrics(body)


def check_metrics(text: str) -> None:
    """Prometheus can read it, and no label grows with what people do.

    A machine's attempts have series of their own, but only while they run.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("dante_attempt_"):
            continue
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault((family.name, label), set()).add(value)
                assert not AN_ID.search(value), (sample.name, label, value)
    assert {name: len(found) for name, found in values.items() if len(found) > LABEL_VALUES_MAX} == {}


@pytest.fixture(scope="module", autouse=True)
def used(platform: UpPlatform) -> None:
    """Something has happened on the platform: routes with ids, ones that do not exist, a job from start to end."""
    person = new_person(platform)
    job = person.client.jobs.submit(JOB)
    person.client.jobs.wait(job.id, settled=True, timeout_seconds=60)
    for path in (f"/v1/jobs/{job.id}", f"/v1/teams/{person.team_id}/members", f"/v1/nothing/{job.id}"):
        fetch(platform.running.url + path)
    person.client.close()


@pytest.mark.parametrize("name", ["", *TARGETS])
def test_each_service_of_dante_up_has_its_pages(platform: UpPlatform, name: str):
    check_pages(platform.running.ops_url + (f"/{name}" if name else ""))


def test_a_service_that_is_not_there_has_none(platform: UpPlatform):
    for page in ("healthz", "readyz", "metrics"):
        assert fetch(f"{platform.running.ops_url}/nobody/{page}")[0] == 404


def test_the_daemon_of_dante_up_has_its_pages(platform: UpPlatform):
    assert platform.running.provider_ops_url
    check_pages(platform.running.provider_ops_url)


@pytest.mark.parametrize("name", TARGETS)
def test_each_service_alone_has_its_pages(cluster: Cluster, name: str):
    check_pages(f"http://127.0.0.1:{cluster.ops_ports[name]}")
