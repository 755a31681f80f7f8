"""What goes wrong at a user's end: each refusal says what happened, what it means and what to do next."""

import http.client
import json
import re
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

import pytest

from dantegpu.contracts.rest.jobs import Job
from dantegpu.sdk import ApiError, Dante
from tests.fixtures.cluster import wait_until
from tests.fixtures.people import Person, new_person
from tests.fixtures.platform import UpPlatform

pytestmark = pytest.mark.needs("bubblewrap")

REVOKED_SECONDS = 5.0
TOO_LARGE_BYTES = (16 << 20) + 1


@pytest.fixture
def person(platform: UpPlatform) -> Generator[Person]:
    person = new_person(platform)
    yield person
    person.client.close()


@pytest.fixture
def poor(platform: UpPlatform) -> Generator[Person]:
    person = new_person(platform, credit_udgpu=0)
    yield person
    person.client.close()


def ask(
    platform: UpPlatform, method: str, path: str, token: str = "", body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """(status, headers, problem) as they came, without any library of ours between."""
    address = urlsplit(platform.running.url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["authorization"] = f"Bearer {token}"
        connection.request(method, path, body or None, sent)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, json.loads(answer.read() or b"{}")
    finally:
        connection.close()


def assert_problem(answer: tuple[int, dict[str, str], Any], status: int, code: str, *words: str) -> None:
    found, headers, problem = answer
    assert (found, problem["status"], problem["code"]) == (status, status, code)
    assert headers["content-type"] == "application/problem+json"
    assert problem["type"].endswith(f"/{code}")
    assert problem["request_id"] == headers["x-request-id"]
    for word in words:
        assert word in problem["detail"]


def queued(client: Dante, job: Job, reason: str) -> Job:
    """The job once it waits for `reason`."""
    return wait_until(
        lambda: found if (found := client.jobs.get(job.id)).reason == reason else None,
        f"{job.id} waits for {reason}, now: {client.jobs.get(job.id).reason}",
    )


# --- requests that make no sense --------------------------------------------------------------------------------------


def test_a_body_that_is_no_json_is_told_where(platform: UpPlatform, person: Person):
    answer = ask(platform, "POST", "/v1/jobs", person.secret, b'{"jobs": [', content_type="application/json")
    assert_problem(answer, 400, "invalid-json", "not valid JSON", "line 1")


def test_a_form_is_no_json(platform: UpPlatform, person: Person):
    kind = "application/x-www-form-urlencoded"
    answer = ask(platform, "POST", "/v1/jobs", person.secret, b"command=true", content_type=kind)
    assert_problem(answer, 400, "invalid-json", "not valid JSON")


def test_a_body_over_the_limit_is_refused_before_it_is_read(platform: UpPlatform, person: Person):
    address = urlsplit(platform.running.url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    connection.putrequest("POST", "/v1/jobs")
    for name, value in {"authorization": f"Bearer {person.secret}", "content-type": "application/json",
                        "content-length": str(TOO_LARGE_BYTES)}.items():  # fmt: skip
        connection.putheader(name, value)
    connection.endheaders(b"{")
    answer = connection.getresponse()
    found = {name.lower(): value for name, value in answer.getheaders()}
    assert_problem((answer.status, found, json.loads(answer.read())), 413, "body-too-large", "larger than")
    connection.close()


def test_an_unknown_route_and_a_wrong_method_are_told_apart(platform: UpPlatform, person: Person):
    assert_problem(ask(platform, "GET", "/v1/nothing", person.secret), 404, "not-found", "/v1/nothing", "/docs")
    answer = ask(platform, "DELETE", "/v1/jobs", person.secret)
    assert_problem(answer, 405, "method-not-allowed", "DELETE")
    assert answer[1]["allow"]


def test_an_unknown_field_is_named(platform: UpPlatform, person: Person):
    body = json.dumps({"jobs": [{"command": ["true"], "gpus": 2}]}).encode()
    status, _, problem = ask(platform, "POST", "/v1/jobs", person.secret, body, content_type="application/json")
    assert status == 422
    assert any("gpus" in error["field"] for error in problem["errors"])
    assert person.client.jobs.list().jobs == []


# --- who are you ------------------------------------------------------------------------------------------------------


def test_a_wrong_password_is_refused_and_nothing_says_whether_the_account_exists(platform: UpPlatform, person: Person):
    wrong = platform.dante("login", person.email, "--password-stdin", stdin="not-it-12345\n")
    nobody = platform.dante("login", "nobody@example.org", "--password-stdin", stdin="not-it-12345\n")
    assert wrong.returncode == nobody.returncode == 4
    assert wrong.stderr.replace(person.email, "") == nobody.stderr.replace("nobody@example.org", "")
    assert "password" in wrong.stderr
    assert platform.dante("whoami").returncode == 0  # the login that was there is still there


@pytest.mark.parametrize("token", ["garbage", "a.b.c", "dk_nothing", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."])
def test_a_garbled_token_is_refused(platform: UpPlatform, token: str):
    status, headers, problem = ask(platform, "GET", "/v1/jobs", token)
    assert (status, headers["content-type"]) == (401, "application/problem+json")
    assert "dante login" in problem["detail"] or "key" in problem["detail"]


def test_a_revoked_api_key_is_refused_within_5_seconds(platform: UpPlatform, person: Person):
    with Dante(platform.running.url) as session:
        session.auth.login(person.email, person.password)
        key = session.keys.create("soon gone")
        assert ask(platform, "GET", "/v1/jobs", key.secret)[0] == 200
        session.keys.revoke(key.key.id)
    wait_until(
        lambda: ask(platform, "GET", "/v1/jobs", key.secret)[0] == 401, "the key is refused", seconds=REVOKED_SECONDS
    )


# --- jobs that cannot run now -----------------------------------------------------------------------------------------


def test_an_impossible_request_waits_with_the_reason_and_why_explains_it(platform: UpPlatform, person: Person):
    job = person.client.jobs.submit({"command": ["true"], "resources": {"gpu": "H100:8"}})
    assert queued(person.client, job, "no_matching_gpu").state == "QUEUED"
    environment = {"DANTE_API_KEY": person.secret}
    said = platform.dante("why", job.id, env=environment)
    assert said.returncode == 0
    assert "No machine online has the requested GPUs" in said.stdout
    assert re.search(r"^0 of \d+ machines fit", said.stdout, re.MULTILINE)  # other tests may have brought machines
    person.client.jobs.stop(job.id)


def test_an_impossible_request_with_no_wait_is_refused_and_leaves_no_job(platform: UpPlatform, person: Person):
    environment = {"DANTE_API_KEY": person.secret}
    done = platform.dante("run", "--no-files", "--gpu", "H100:8", "--no-wait", "--", "true", env=environment)
    assert done.returncode == 1
    assert "no machine can take this job now" in done.stderr
    assert "Without --no-wait it would be queued" in done.stderr
    assert person.client.jobs.list().jobs == []


def test_a_job_without_funds_waits_for_them_and_starts_when_the_operator_credits(platform: UpPlatform, poor: Person):
    job = poor.client.jobs.submit({"command": ["true"], "resources": {"cpu": 0.1, "memory": "64MB"}})
    queued(poor.client, job, "no_funds")
    said = platform.dante("why", job.id, env={"DANTE_API_KEY": poor.secret})
    assert "wallet cannot cover the hold" in said.stdout
    assert platform.dante("admin", "credit", poor.team_id, "5").returncode == 0
    assert poor.client.jobs.wait(job.id, timeout_seconds=60).state == "SUCCEEDED"


def test_a_job_with_an_image_waits_because_no_machine_runs_images_yet(platform: UpPlatform, person: Person):
    job = person.client.jobs.submit({"command": ["true"], "image": "python:3.13"})
    wait_until(lambda: person.client.jobs.get(job.id).reason not in (None, "new"), "the job has a reason")
    said = platform.dante("why", job.id, env={"DANTE_API_KEY": person.secret})
    assert "does not run container images" in said.stdout
    person.client.jobs.stop(job.id)


def test_somebody_elses_job_is_not_there(platform: UpPlatform, person: Person, poor: Person):
    job = person.client.jobs.submit({"command": ["true"], "resources": {"gpu": "H100:8"}})
    with pytest.raises(ApiError) as refused:
        poor.client.jobs.get(job.id)
    assert refused.value.status == 404
    done = platform.dante("show", job.id, env={"DANTE_API_KEY": poor.secret})
    assert done.returncode == 3
    person.client.jobs.stop(job.id)
