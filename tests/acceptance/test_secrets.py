"""I8: no secret in a log, trace, error, event or database dump, with every log at debug and every span collected.

A job's environment is the team's own: it lies in the scheduler's `jobs` table, `GET /v1/jobs` shows it to the team, and
the machine that runs the job gets it. It is nowhere else: not in events, logs or traces, nor in other tables.
"""

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from dantegpu.sdk import Dante
from dantegpu.sdk.protocol import MemorySession
from tests.fixtures.cluster import wait_until
from tests.fixtures.people import Person, StrangeMachine, new_machine, new_person
from tests.fixtures.traced import Traced
from tests.fixtures.web import http

pytestmark = pytest.mark.needs("bubblewrap")


@dataclass(slots=True)
class Told:
    """Every secret that went over the wires in one busy minute, by what it is, and the errors that came back."""

    secrets: dict[str, str]
    env_value: str
    job_id: str
    person: Person
    errors: str


@pytest.fixture(scope="module")
def told(traced: Traced) -> Iterator[Told]:
    url = traced.platform.running.url
    person = new_person(traced.platform)
    tokens = MemorySession()
    with Dante(url, session=tokens) as session:
        session.auth.login(person.email, person.password)
    first = tokens.load()
    assert first is not None
    refreshed = http().post(url + "/v1/auth/refresh", json={"refresh_token": first.refresh_token}).json()
    scoped = person.client.keys.create("another").secret
    join_token = person.client.machines.create_join_token(max_uses=5).token
    machine = new_machine(person)
    env_value = f"env-{uuid4().hex}"
    job = person.client.jobs.submit({
        "command": ["sh", "-c", "test -n \"$PASSWORD\" && echo fine"], "env": {"PASSWORD": env_value},
        "resources": {"cpu": 0.1, "memory": "64MB"},
    })  # fmt: skip
    done = person.client.jobs.wait(job.id, settled=True, timeout_seconds=60)
    assert done.exit_code == 0
    data = traced.platform.home / "platform"
    secrets = {
        "password": person.password,
        "access token": first.access_token,
        "next access token": refreshed["access_token"],
        "refresh token": first.refresh_token,
        "next refresh token": refreshed["refresh_token"],
        "API key": person.secret,
        "other API key": scoped,
        "join token": join_token,
        "seed of a machine's key": machine.identity.key.seed.get_secret_value(),
        "NATS token of a machine": machine.identity.credentials()[0],
        "operator's password": (data / "secrets" / "operator.password").read_text().strip(),
        "operator's API key": (data / "secrets" / "operator.key").read_text().strip(),
        "key of the presigned URLs": (data / "secrets" / "storage-url.key").read_bytes().hex(),
        "key that encrypts keys": (data / "secrets" / "auth.kek").read_text().strip(),
    } | {f"NATS {name}": seed for name, seed in json.loads((data / "secrets" / "trust.json").read_text()).items()}
    errors = provoke(url, person, secrets, env_value, machine)
    yield Told(secrets, env_value, job.id, person, errors)
    person.client.close()
    shutil.rmtree(machine.identity.folder)


def provoke(url: str, person: Person, secrets: dict[str, str], env_value: str, machine: StrangeMachine) -> str:
    """Errors of all kinds on requests that carry secrets; everything that was answered."""
    bearer = {"authorization": f"Bearer {person.secret}"}
    wrong = [
        ("/v1/auth/login", {"email": person.email, "password": [person.password]}),
        ("/v1/auth/login", {"email": person.email, "passwort": person.password, "password": 7}),
        ("/v1/auth/login", {"email": "nobody@example.org", "password": person.password}),
        ("/v1/auth/register", {"email": person.email, "password": person.password}),
        ("/v1/auth/register", {"email": "x", "password": person.password, "password2": person.password}),
        ("/v1/auth/refresh", {"refresh_token": secrets["refresh token"], "team_id": "x"}),
        ("/v1/auth/refresh", {"refresh_token": {"a": secrets["refresh token"]}}),
        ("/v1/machines", {"join_token": secrets["join token"], "public_key": 1}),
        ("/v1/machines", {"join_token": [secrets["join token"]], "public_key": machine.identity.key.public}),
        ("/v1/jobs", {"command": ["true"], "env": {"PASSWORD": [env_value]}}),
        ("/v1/jobs", {"command": ["true"], "env": {"A=B": env_value}}),
        ("/v1/jobs", {"command": ["true"], "envv": {"PASSWORD": env_value}}),
        ("/v1/jobs", {"command": ["true"], "env": {"PASSWORD": env_value}, "resources": {"gpu": "no such"}}),
    ]
    answers = [http().post(url + path, json=body, headers=bearer) for path, body in wrong]
    answers += [http().post(url + path, content=json.dumps(body)[:-1], headers=bearer) for path, body in wrong]
    altered = {"authorization": f"Bearer {secrets['access token'][:-3]}AAA"}
    answers += [
        http().get(url + "/v1/me", headers=altered),
        http().get(url + "/v1/me", headers={"x-api-key": "dante_x"}),
    ]
    answers += [http().get(f"{url}/v1/jobs?cursor={person.secret[:-1]}", headers=bearer)]
    assert all(answer.status_code >= 400 for answer in answers), [answer.status_code for answer in answers]
    return "\n".join(f"{answer.headers} {answer.text}" for answer in answers)


def found_in(text: bytes, secrets: dict[str, str]) -> list[str]:
    """Names of the secrets in `text`: as they are, in hex, or in base64."""
    found: list[str] = []
    for name, secret in secrets.items():
        forms = {secret.encode(), secret.encode().hex().encode(), base64.b64encode(secret.encode()).rstrip(b"=")}
        if any(form in text for form in forms):
            found.append(name)
    return found


def test_no_log_of_any_process_holds_a_secret(traced: Traced, told: Told):
    files = traced.log_files
    assert {"platform.log", "provider.log", "nats.log"} <= {file.name for file in files}
    assert any("postgres" in str(file) for file in files)
    # They do tell what happened, at debug.
    assert "SubmitJobs" in {line.get("method") for line in traced.log_lines()}
    secrets = told.secrets | {"value of the job's environment": told.env_value}
    leaks = {file.name: leaked for file in files if (leaked := found_in(file.read_bytes(), secrets))}
    assert leaks == {}


def test_no_error_says_a_secret_back(told: Told):
    secrets = {name: secret for name, secret in told.secrets.items() if name != "API key"}
    assert found_in(told.errors.encode(), secrets | {"environment": told.env_value, "key": told.person.secret}) == []


def test_no_span_holds_a_secret(traced: Traced, told: Told):
    def attempt() -> bool:
        return any(span.name == "attempt" and span.attributes["job_id"] == told.job_id for span in collected.spans)

    collected = traced.collector
    wait_until(attempt, "the attempt's span")
    secrets = told.secrets | {"value of the job's environment": told.env_value}
    assert found_in(b"".join(traced.collector.bodies), secrets) == []


def test_no_event_holds_a_secret(traced: Traced, told: Told):
    """What subscribers get: the stream's files hold every message since the start, as it was sent."""
    events = (
        http()
        .get(
            f"{traced.platform.running.url}/v1/jobs/{told.job_id}/events",
            headers={"authorization": f"Bearer {told.person.secret}"},
        )
        .text
    )
    assert "SUCCEEDED" in events
    store = traced.platform.home / "platform" / "nats" / "jetstream"
    messages = b"".join(file.read_bytes() for file in store.rglob("*.blk"))
    assert told.job_id.encode() in messages
    secrets = told.secrets | {"value of the job's environment": told.env_value}
    assert found_in(messages + events.encode(), secrets) == []


def dump(traced: Traced) -> dict[str, bytes]:
    """Every row of every table, as text, by table."""
    tables: dict[str, bytes] = {}
    with psycopg.connect(traced.platform.running.database) as connection:
        names = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        for schema, table in names:
            statement = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(schema, table))
            with connection.cursor().copy(statement) as copy:
                tables[f"{schema}.{table}"] = b"".join(bytes(part) for part in copy)
    return tables


def test_no_table_holds_a_secret_that_can_be_used(traced: Traced, told: Told):
    tables = dump(traced)
    assert {"auth.users", "auth.api_keys", "auth.refresh_tokens", "scheduler.jobs", "billing.transfers"} <= set(tables)
    assert {name: leaked for name, rows in tables.items() if (leaked := found_in(rows, told.secrets))} == {}
    # The hash of a password has to be a slow one; a key of 256 random bits is safe behind a fast one.
    fast = hashlib.sha256(told.person.password.encode()).hexdigest().encode()
    assert [name for name, rows in tables.items() if fast in rows] == []
    assert b"$argon2id$" in tables["auth.users"]
    # Private halves of the signing keys are stored encrypted.
    assert [name for name, rows in tables.items() if b'"d":' in rows or b"PRIVATE KEY" in rows] == []


def test_a_jobs_environment_lies_in_the_jobs_table_alone(traced: Traced, told: Told):
    tables = dump(traced)
    wanted = {"environment": told.env_value}
    assert [name for name, rows in tables.items() if found_in(rows, wanted)] == ["scheduler.jobs"]
    assert told.person.client.jobs.get(told.job_id).spec.env == {"PASSWORD": told.env_value}


def test_no_process_of_the_platform_shows_a_secret_on_its_command_line(traced: Traced, told: Told):
    shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, check=True).stdout
    assert found_in(shown, told.secrets) == []


def test_files_with_secrets_are_for_their_owner_alone(traced: Traced):
    data = traced.platform.home / "platform"
    own = [data / name for name in ("runtime.json", "provider/machine.nk", "provider/machine.json")]
    files = [*data.glob("secrets/*"), *own]
    open_ones = [file for file in files if file.stat().st_mode & 0o077]
    assert (len(files) > 6, open_ones) == (True, [])
    assert traced.platform.home.joinpath("credentials.json").stat().st_mode & 0o077 == 0
