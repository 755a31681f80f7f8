"""One trace from the request at the gateway to the job on the machine; one request id in every service's log."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.fixtures.cluster import wait_until
from tests.fixtures.people import Person, new_person
from tests.fixtures.traced import CollectedSpan, Traced
from tests.fixtures.web import http

pytestmark = pytest.mark.needs("bubblewrap")

JOB = {"command": ["true"], "resources": {"cpu": 0.1, "memory": "64MB"}}


@pytest.fixture(scope="module")
def person(traced: Traced) -> Iterator[Person]:
    person = new_person(traced.platform)
    yield person
    person.client.close()


def submit(traced: Traced, person: Person, **headers: str) -> httpx.Response:
    headers["authorization"] = f"Bearer {person.secret}"
    return http().post(traced.platform.running.url + "/v1/jobs", json=JOB, headers=headers).raise_for_status()


def test_one_trace_leads_from_the_callers_request_to_the_attempt_on_the_machine(traced: Traced, person: Person):
    trace_id, caller = uuid4().hex, "00f067aa0ba902b7"
    job_id = submit(traced, person, traceparent=f"00-{trace_id}-{caller}-01").json()["id"]
    person.client.jobs.wait(job_id, timeout_seconds=60)

    def one(name: str) -> CollectedSpan:
        found = wait_until(lambda: traced.collector.named(name, trace_id), f"the span {name!r} of the trace")
        assert len(found) == 1
        return found[0]

    request, call, placement, attempt = one("http POST"), one("rpc SubmitJobs"), one("placement"), one("attempt")
    assert request.parent_id == caller
    assert call.parent_id == request.span_id
    assert (placement.parent_id, attempt.parent_id) == (call.span_id, call.span_id)
    assert placement.attributes["job_id"] == attempt.attributes["job_id"] == job_id
    assert placement.attributes["attempt_id"] == attempt.attributes["attempt_id"]
    assert {one(name).parent_id for name in ("attempt.prepare", "attempt.start")} == {attempt.span_id}
    assert (request.service, attempt.service) == ("dantegpu", "beatrice-core-services")


def test_a_request_without_a_trace_begins_one(traced: Traced, person: Person):
    answer = submit(traced, person)
    request_id = answer.headers["x-request-id"]
    line = wait_until(
        lambda: next((line for line in traced.log_lines() if line.get("request_id") == request_id), None),
        "the request's log line",
    )
    [request] = wait_until(lambda: traced.collector.named("http POST", line["trace_id"]), "its span")
    assert request.parent_id == ""
    person.client.jobs.stop(answer.json()["id"])


def test_the_callers_request_id_is_in_the_log_of_every_service_that_worked_for_it(traced: Traced, person: Person):
    request_id = f"test-{uuid4().hex}"
    answer = submit(traced, person, **{"x-request-id": request_id})
    assert answer.headers["x-request-id"] == request_id

    def lines() -> list[dict[str, Any]]:
        found = [line for line in traced.log_lines() if line.get("request_id") == request_id]
        return found if {"http", "rpc"} <= {line["event"] for line in found} else []

    seen = wait_until(lines, "a line of the gateway and one of a service")
    assert "SubmitJobs" in {line.get("method") for line in seen}
    assert len({line["trace_id"] for line in seen}) == 1
    person.client.jobs.stop(answer.json()["id"])


@pytest.mark.parametrize("bad", ["", "x" * 129, "é", "a\tb"])
def test_a_request_id_that_is_no_good_is_replaced(traced: Traced, bad: str):
    headers = {b"x-request-id": bad.encode("latin-1")}
    answer = http().get(traced.platform.running.url + "/v1/status", headers=headers)
    assert answer.headers["x-request-id"].startswith("req_")


def test_with_tracing_off_nothing_that_could_send_is_even_loaded():
    program = (
        "import sys\n"
        "from dantegpu.kit.telemetry import configure_tracing, current_traceparent, span\n"
        "configure_tracing('dantegpu', '')\n"
        "with span('anything'):\n"
        "    assert current_traceparent() == ''\n"
        "senders = ('opentelemetry.sdk.trace', 'opentelemetry.exporter')\n"
        "assert not [name for name in sys.modules if name.startswith(senders)]\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
