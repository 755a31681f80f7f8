"""Two teams on one platform: neither sees, finds, guesses or reads anything of the other."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import uuid4

import pytest

from dantegpu.contracts.rest.jobs import Job
from dantegpu.sdk.errors import ApiError
from tests.fixtures.cluster import wait_until
from tests.fixtures.people import Person, new_machine, new_person
from tests.fixtures.platform import UpPlatform
from tests.fixtures.web import http

pytestmark = pytest.mark.needs("bubblewrap")

SMALL = {"cpu": 0.1, "memory": "64MB"}


def get(person: Person, path: str) -> Any:
    answer = http().get(person.client.url + path, headers={"authorization": f"Bearer {person.secret}"})
    return answer.raise_for_status().json()


@pytest.fixture(scope="module")
def ada(platform: UpPlatform) -> Iterator[Person]:
    person = new_person(platform)
    yield person
    person.client.close()


@pytest.fixture(scope="module")
def bob(platform: UpPlatform) -> Iterator[Person]:
    person = new_person(platform)
    yield person
    person.client.close()


@pytest.fixture(scope="module")
def done(ada: Person) -> Job:
    """Ada's job, which left a log and a result."""
    script = "echo the log; echo the result > $DANTE_OUTPUT/result.txt"
    job = ada.client.jobs.submit({"commands": [script], "resources": SMALL, "name": "adas job"})
    return ada.client.jobs.wait(job.id, settled=True, timeout_seconds=60)


LISTS = ("/v1/jobs", "/v1/teams", "/v1/api-keys", "/v1/machines", "/v1/wallet", "/v1/wallet/entries", "/v1/me")


def test_no_list_of_one_team_holds_anything_of_the_other(ada: Person, bob: Person, done: Job):
    machine = new_machine(ada)
    assert str(machine.id) in json.dumps(get(ada, "/v1/machines"))
    adas = {
        ada.team_id,
        ada.user_id,
        ada.email,
        done.id,
        str(machine.id),
        done.attempts[0].id if done.attempts else done.id,
    }
    adas |= {key["id"] for key in get(ada, "/v1/api-keys")["keys"]}
    adas |= {entry["transfer_id"] for entry in get(ada, "/v1/wallet/entries")["entries"]}
    for path in LISTS:
        seen = json.dumps(get(bob, path))
        assert [each for each in adas if each in seen] == [], path
    # What is for rent is public, whose computer it is not.
    assert machine.hostname in json.dumps(get(ada, "/v1/offers"))
    assert machine.hostname not in json.dumps(get(bob, "/v1/offers"))


def test_a_cursor_of_one_team_opens_nothing_to_the_other(ada: Person, bob: Person, done: Job):
    cursor = get(ada, "/v1/wallet/entries?limit=1")["next_cursor"]
    assert cursor
    assert ada.team_id not in json.dumps(get(bob, f"/v1/wallet/entries?limit=100&cursor={cursor}"))
    assert done.id not in json.dumps(get(bob, f"/v1/jobs?cursor={done.id}"))


def test_the_same_idempotency_key_of_two_teams_names_two_jobs(ada: Person, bob: Person):
    spec = {"command": ["true"], "resources": {"gpu": "H100:8"}}
    first, second = (person.client.jobs.submit(spec, idempotency_key="the same") for person in (ada, bob))
    assert first.id != second.id
    assert second.team_id == bob.team_id
    for person, job in ((ada, first), (bob, second)):
        person.client.jobs.stop(job.id)


def test_a_blob_of_one_team_is_unknown_to_the_other(ada: Person, bob: Person):
    content = uuid4().bytes
    uploaded = ada.client.uploads.put(content)
    blob = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    headers = {"authorization": f"Bearer {bob.secret}"}
    answer = http().post(bob.client.url + "/v1/uploads", json={"blobs": [blob]}, headers=headers)
    [upload] = answer.raise_for_status().json()["uploads"]
    assert (upload["exists"], bob.team_id in upload["url"]) == (False, True)
    spec = {"command": ["true"], "resources": SMALL}
    refused: list[ApiError] = []
    for name in (uploaded.sha256, hashlib.sha256(b"nobody's").hexdigest()):
        with pytest.raises(ApiError) as error:
            bob.client.jobs.submit({**spec, "input": {"sha256": name, "size_bytes": len(content)}})
        refused.append(error.value)
    assert {error.problem.code for error in refused} == {"input-not-uploaded"}
    assert len({re.sub("[0-9a-f]{12}", "", error.problem.detail) for error in refused}) == 1


def with_changes(url: str, *, path: tuple[str, str] = ("", ""), **query: str) -> str:
    parts = urlsplit(url)
    changed = urlencode(dict(parse_qsl(parts.query)) | query)
    return urlunsplit(parts._replace(path=parts.path.replace(*path) if path[0] else parts.path, query=changed))


def test_a_presigned_url_is_good_for_one_object_one_method_and_some_minutes(ada: Person, bob: Person, done: Job):
    [file] = ada.client.jobs.results(done.id).files
    url = file.url
    assert url
    assert http().get(url).text == "the result\n"
    expires_at = int(dict(parse_qsl(urlsplit(url).query))["e"])
    assert 0 < expires_at - time.time() <= 15 * 60
    other = bob.client.jobs.submit({"command": ["true"], "resources": SMALL})
    bob.client.jobs.wait(other.id, timeout_seconds=60)
    altered = [
        with_changes(url, path=(done.id, other.id)),
        with_changes(url, path=("result.txt", "other.txt")),
        with_changes(url, path=("result.txt", "%2e%2e/1/result.txt")),
        with_changes(url, path=("/1/", "/2/")),
        with_changes(url, e=str(expires_at + 1)),
        with_changes(url, e="0"),
        with_changes(url, m="PUT", l="1", h="0" * 64),
        with_changes(url, n="other.html"),
        with_changes(url, s="0" * 64),
        with_changes(url, s=""),
        url.partition("?")[0],
    ]
    for each in altered:
        answer = http().get(each)
        assert (answer.status_code, "the result" in answer.text) == (403, False), each
    for method in ("PUT", "DELETE", "POST"):
        assert http().request(method, url, content=b"x").status_code in (403, 405)
    assert http().get(url).text == "the result\n"


def test_an_upload_url_takes_only_what_was_announced_and_only_where(ada: Person, bob: Person):
    content = uuid4().bytes
    blob = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    headers = {"authorization": f"Bearer {ada.secret}"}
    answer = http().post(ada.client.url + "/v1/uploads", json={"blobs": [blob]}, headers=headers)
    url = answer.raise_for_status().json()["uploads"][0]["url"]
    assert http().put(with_changes(url, path=(ada.team_id, bob.team_id)), content=content).status_code == 403
    assert http().get(url).status_code == 403
    assert http().put(url, content=bytes(len(content))).status_code == 422
    assert http().put(url, content=content + b"x").status_code == 413
    assert http().put(url, content=content).status_code in (200, 201, 204)


PROBE = r"""
import json, os, pathlib, socket, sys
secret = (sys.argv[1] + sys.argv[3]).encode()
control = pathlib.Path(os.getcwd(), "control.txt")
control.write_bytes(secret)
found = []
for pid in (name for name in os.listdir("/proc") if name.isdigit()):
    for what in ("environ", "cmdline", "root/tmp", "cwd"):
        path = f"/proc/{pid}/{what}"
        try:
            if what in ("environ", "cmdline"):
                if int(pid) != os.getpid() and secret in pathlib.Path(path).read_bytes():
                    found.append(path)
        except OSError:
            pass
for top in ("/tmp", "/work", "/root", "/home", "/var", "/run", "/dev/shm", "/mnt", "/opt", "/srv", os.getcwd()):
    for folder, folders, files in os.walk(top):
        for name in files:
            path = os.path.join(folder, name)
            try:
                small = os.path.isfile(path) and os.path.getsize(path) < 1 << 20
                if small and secret in pathlib.Path(path).read_bytes():
                    found.append(path)
            except OSError:
                pass
sockets = []
for line in open("/proc/net/unix"):
    name = line.split()[-1]
    if name.startswith("/") or name.startswith("@"):
        sockets.append(name)
reached = []
for port in json.loads(sys.argv[2]):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        reached.append(port)
    except OSError:
        pass
processes = [name for name in os.listdir("/proc") if name.isdigit()]
environ = sorted(name for name in os.environ if name.startswith("DANTE_"))
found = sorted(set(found))
seen = {"sockets": sockets, "reached": reached, "processes": len(processes), "environ": environ}
print(json.dumps({"found": found, "control": str(control)} | seen))
"""


def test_a_job_finds_nothing_of_another_job_that_runs_beside_it(platform: UpPlatform, ada: Person, bob: Person):
    """Its environment, command line, files, processes; nor the platform's own ports and sockets."""
    secret = f"adas-secret-{uuid4().hex}"
    held = ada.client.jobs.submit({
        "commands": ['echo "$PASSWORD" > held.txt; echo "$PASSWORD" > /tmp/held.txt; echo ready; exec sleep 120'],
        "env": {"PASSWORD": secret}, "resources": SMALL,
    })  # fmt: skip
    wait_until(
        lambda: b"ready" in b"".join(chunk.data for chunk in ada.client.jobs.logs(held.id)),
        "ada's job holds its secret",
    )
    running = platform.running
    ports = [urlsplit(url).port for url in (running.url, running.storage_url, running.nats_url, running.ops_url)]
    # The secret comes in two halves, so that the probe finds only what it wrote itself, to show that it can find.
    command = ["python3", "-c", PROBE, secret[:20], json.dumps(ports), secret[20:]]
    job = bob.client.jobs.submit({"command": command, "resources": {"cpu": 0.5, "memory": "256MB"}})
    ended = bob.client.jobs.wait(job.id, timeout_seconds=60)
    assert ada.client.jobs.get(held.id).state == "RUNNING"
    log = b"".join(chunk.data for chunk in bob.client.jobs.logs(job.id)).decode()
    assert ended.exit_code == 0, log
    seen = json.loads(log)
    assert (seen["found"], seen["sockets"], seen["reached"]) == ([seen["control"]], [], [])
    assert seen["processes"] <= 4
    assert set(seen["environ"]) <= {
        "DANTE_JOB_ID", "DANTE_OUTPUT", "DANTE_ATTEMPT_ID", "DANTE_NODE_RANK", "DANTE_NODES_NUM", "DANTE_NODES_IPS",
        "DANTE_GPUS_PER_NODE",
    }  # fmt: skip
    ada.client.jobs.stop(held.id)
