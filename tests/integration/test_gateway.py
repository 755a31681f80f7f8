"""The REST API in front of every real service: who may do what, with which answers."""

import base64
import hashlib
import shutil
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest
import pytest_asyncio

from dantegpu.apps.embedded.nats import EmbeddedNats
from dantegpu.apps.root import Root, load_with
from dantegpu.apps.targets import TARGETS
from dantegpu.contracts.gen.dante.v1 import auth_pb2, auth_pb2_grpc
from dantegpu.contracts.rest.jobs import Job
from dantegpu.domain.ids import ApiKeyId, JobId, MachineId, TeamId
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.nats_jwt import (
    create_user_key,
    creds_file_text,
    load_or_create_trust,
    services_permissions,
    sign_user_jwt,
    sign_with_seed,
)
from dantegpu.kit.rpc import Channels
from tests.fixtures.cluster import free_ports
from tests.fixtures.folders import quick_folder
from tests.fixtures.servers import PostgresForTests

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASSWORD = "correct-horse-7-battery"
OPERATOR = "operator@example.org"


@dataclass(frozen=True, slots=True)
class Platform:
    url: str
    operator: httpx.AsyncClient

    def client(self, token: str = "") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(verify=False, base_url=self.url, headers=headers, timeout=20)

    async def log_in(self, email: str) -> dict[str, Any]:
        async with self.client() as anonymous:
            response = await anonymous.post("/v1/auth/login", json={"email": email, "password": PASSWORD})
            assert response.status_code == 200, response.text
            return response.json()


@dataclass(frozen=True, slots=True)
class Person:
    http: httpx.AsyncClient
    email: str
    user_id: str
    team_id: str
    refresh_token: str

    async def submit(self, **fields: Any) -> dict[str, Any]:
        response = await self.http.post("/v1/jobs", json={"commands": ["true"]} | fields)
        assert response.status_code == 201, response.text
        return response.json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(postgres_server: PostgresForTests) -> AsyncGenerator[Platform]:
    folder = quick_folder("dante-")
    database = postgres_server.create_database()
    secrets = folder / "secrets"
    secrets.mkdir(mode=0o700)
    trust = load_or_create_trust(secrets)
    nats = EmbeddedNats(folder / "nats", None, trust)
    await nats.start()
    key = create_user_key()
    jwt = sign_user_jwt(trust.account.seed, trust.account.public, key.public, "services", services_permissions(), None)
    creds = folder / "services.creds"
    creds.touch(mode=0o600)
    creds.write_text(creds_file_text(jwt, key.seed))
    grpc = f"unix:{folder}/services.sock"
    flags: dict[str, dict[str, Any]] = {
        "": {
            "database_url": postgres_server.address.dsn(database),
            "nats_url": nats.address.url,
            "nats_creds": creds,
            "addresses": dict.fromkeys(TARGETS, grpc),
            "listen": grpc,
        },
        "auth-service": {"secrets_dir": secrets, "login_limit_per_address": "1000/minute"},
        "storage-service": {
            "secrets_dir": secrets,
            "data_dir": folder / "objects",
            "public_listen": f"127.0.0.1:{free_ports(1)[0]}",
        },
        "siger-api-gateway": {
            "public_listen": "127.0.0.1:0",
            "public_nats_url": "nats://public.example:4222",
            "anonymous_rate_limit_burst": 10_000,
        },
    }
    root = Root("all", load_with(None, flags))
    listening = await root.start()
    channels = Channels(dict.fromkeys(TARGETS, grpc))
    ensure = auth_pb2.EnsureOperatorRequest(email=OPERATOR, password=PASSWORD)
    auth = auth_pb2_grpc.AuthServiceStub(channels.to("auth-service"))
    await rpc.call(auth.EnsureOperator, ensure, actor=SERVICE)
    await channels.stop()
    found = Platform(listening.http_urls["siger-api-gateway"], httpx.AsyncClient(verify=False))
    token = (await found.log_in(OPERATOR))["access_token"]
    async with found.client(token) as operator:
        yield Platform(found.url, operator)
    await root.stop()
    await nats.stop()
    postgres_server.drop_database(database)
    shutil.rmtree(folder, ignore_errors=True)


async def a_person(platform: Platform) -> Person:
    email = f"{uuid4().hex[:12]}@example.org"
    async with platform.client() as anonymous:
        response = await anonymous.post("/v1/auth/register", json={"email": email, "password": PASSWORD})
        assert response.status_code == 201, response.text
    login = await platform.log_in(email)
    team_id = response.json()["team"]["id"]
    client = platform.client(login["access_token"])
    return Person(client, email, login["user"]["id"], team_id, login["refresh_token"])


@pytest_asyncio.fixture(loop_scope="module")
async def ada(platform: Platform) -> AsyncGenerator[Person]:
    person = await a_person(platform)
    yield person
    await person.http.aclose()


@pytest_asyncio.fixture(loop_scope="module")
async def bob(platform: Platform) -> AsyncGenerator[Person]:
    person = await a_person(platform)
    yield person
    await person.http.aclose()


def code_of(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.status_code, response.json()["code"]


# --- accounts ---------------------------------------------------------------------------------------------------------


async def test_who_registers_and_logs_in_acts_for_a_team_of_their_own(ada: Person):
    me = (await ada.http.get("/v1/me")).json()
    assert (me["user"]["email"], me["team_id"]) == (ada.email, ada.team_id)
    assert me["teams"][0]["role"] == "owner"


async def test_a_wrong_password_is_refused(platform: Platform, ada: Person):
    async with platform.client() as anonymous:
        response = await anonymous.post("/v1/auth/login", json={"email": ada.email, "password": "wrong-wrong-1"})
    assert code_of(response) == (401, "wrong-credentials")


async def test_a_token_that_was_tampered_with_is_refused(platform: Platform, ada: Person):
    token = ada.http.headers["authorization"].removeprefix("Bearer ")
    head, payload, signature = token.split(".")
    for forged in (f"{head}.{payload}.AAAA{signature[4:]}", f"{head}.{payload}.", "abc"):
        async with platform.client(forged) as client:
            assert code_of(await client.get("/v1/me")) == (401, "invalid-token")


async def test_a_refresh_token_gives_new_tokens(platform: Platform, ada: Person):
    async with platform.client() as anonymous:
        response = await anonymous.post("/v1/auth/refresh", json={"refresh_token": ada.refresh_token})
    async with platform.client(response.json()["access_token"]) as refreshed:
        assert (await refreshed.get("/v1/me")).json()["user"]["id"] == ada.user_id


async def test_after_logging_out_the_refresh_token_is_worth_nothing(platform: Platform, ada: Person):
    async with platform.client() as anonymous:
        body = {"refresh_token": ada.refresh_token}
        assert (await anonymous.post("/v1/auth/logout", json=body)).status_code == 204
        assert code_of(await anonymous.post("/v1/auth/refresh", json=body)) == (401, "invalid-refresh-token")


async def test_registering_twice_with_one_idempotency_key_makes_one_account(platform: Platform):
    body = {"email": f"{uuid4().hex[:12]}@example.org", "password": PASSWORD}
    async with platform.client() as anonymous:
        headers = {"idempotency-key": uuid4().hex}
        first = await anonymous.post("/v1/auth/register", json=body, headers=headers)
        again = await anonymous.post("/v1/auth/register", json=body, headers=headers)
        without = await anonymous.post("/v1/auth/register", json=body)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert code_of(without) == (409, "email-taken")


async def test_the_public_keys_of_the_tokens_can_be_fetched(platform: Platform):
    async with platform.client() as anonymous:
        keys = (await anonymous.get("/v1/.well-known/jwks.json")).json()["keys"]
    assert keys
    assert all("d" not in key for key in keys)


async def test_an_api_key_acts_for_its_owner_until_it_is_revoked(platform: Platform, ada: Person):
    made = (await ada.http.post("/v1/api-keys", json={"name": "ci"})).json()
    assert made["secret"].startswith(made["key"]["prefix"])
    async with platform.client(made["secret"]) as client:
        assert (await client.get("/v1/me")).json()["user"]["id"] == ada.user_id
        assert (await ada.http.delete(f"/v1/api-keys/{made['key']['id']}")).status_code == 204
        deadline = time.monotonic() + 5
        while (await client.get("/v1/me")).status_code == 200:
            assert time.monotonic() < deadline, "a revoked key works for more than 5 s"


async def test_an_api_key_with_scopes_can_do_only_that(platform: Platform, ada: Person):
    body = {"name": "reader", "scopes": ["jobs:read"]}
    secret = (await ada.http.post("/v1/api-keys", json=body)).json()["secret"]
    async with platform.client(secret) as client:
        assert (await client.get("/v1/jobs")).status_code == 200
        assert code_of(await client.post("/v1/jobs", json={"commands": ["true"]})) == (403, "scope-missing")
        assert code_of(await client.get("/v1/wallet")) == (403, "scope-missing")


async def test_an_owner_adds_and_removes_members(ada: Person, bob: Person):
    path = f"/v1/teams/{ada.team_id}/members"
    assert code_of(await bob.http.get(path)) == (404, "team-not-found")
    assert (await ada.http.put(f"{path}/{bob.email}", json={"role": "viewer"})).status_code == 204
    members = (await bob.http.get(path)).json()["members"]
    assert {member["email"]: member["role"] for member in members} == {ada.email: "owner", bob.email: "viewer"}
    assert (await ada.http.delete(f"{path}/{bob.email}")).status_code == 204
    assert code_of(await bob.http.get(path)) == (404, "team-not-found")


# --- jobs -------------------------------------------------------------------------------------------------------------


async def test_a_submitted_job_is_answered_queued_and_found_again(ada: Person):
    response = await ada.http.post(
        "/v1/jobs", json={"name": "train", "commands": ["python t.py"], "resources": {"gpu": "rtx4090:2"}}
    )
    job = Job.model_validate(response.json())
    assert response.headers["location"] == f"/v1/jobs/{job.id}"
    assert (job.state, job.team_id, job.spec.resources.gpu) == ("QUEUED", ada.team_id, "RTX 4090:2")
    found = Job.model_validate((await ada.http.get(f"/v1/jobs/{job.id}")).json())
    assert (found.id, found.spec) == (job.id, job.spec)
    listed = (await ada.http.get("/v1/jobs", params={"state": "QUEUED"})).json()["jobs"]
    assert job.id in [each["id"] for each in listed]


async def test_the_same_submission_with_one_idempotency_key_is_one_job(ada: Person):
    headers = {"idempotency-key": "mine"}
    body = {"commands": ["true"]}
    answers = [await ada.http.post("/v1/jobs", json=body, headers=headers) for _ in range(2)]
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = await ada.http.post("/v1/jobs", json={"commands": ["false"]}, headers=headers)
    assert code_of(other) == (409, "idempotency-key-reused")


async def test_many_jobs_in_one_call_are_answered_in_order_and_paged(ada: Person):
    body = {"jobs": [{"name": f"n{number}", "commands": ["true"]} for number in range(25)]}
    made = (await ada.http.post("/v1/jobs", json=body)).json()["jobs"]
    assert [job["name"] for job in made] == [f"n{number}" for number in range(25)]
    names: list[str] = []
    cursor = ""
    while cursor is not None:
        page = (await ada.http.get("/v1/jobs", params={"limit": 10, "cursor": cursor})).json()
        names += [job["name"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert sorted(names) == sorted(job["name"] for job in made)


async def test_one_wrong_job_of_many_refuses_all_and_says_which(ada: Person):
    response = await ada.http.post(
        "/v1/jobs", json={"jobs": [{"commands": ["true"]}, {"commands": ["true"], "volumes": []}]}
    )
    assert code_of(response) == (422, "invalid-request")
    assert response.json()["errors"][0]["field"] == "jobs.1.volumes"
    assert "not supported yet" in response.json()["errors"][0]["message"]
    assert (await ada.http.get("/v1/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b'"x"', b"\xff", b"null", b"[" * 100_000])
async def test_a_submission_that_is_no_job_is_a_problem(ada: Person, content: bytes):
    response = await ada.http.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
    assert code_of(response)[0] in (400, 422)


async def test_a_job_that_nothing_fits_now_can_be_refused_instead_of_queued(ada: Person):
    response = await ada.http.post("/v1/jobs?wait=false", json={"commands": ["true"], "resources": {"gpu": "H100"}})
    assert code_of(response) == (409, "no-offer-fits")


async def test_a_waiting_job_says_why(ada: Person):
    job = await ada.submit(resources={"gpu": "H100:8"})
    why = (await ada.http.get(f"/v1/jobs/{job['id']}/why")).json()
    assert why["machines_fitting"] == 0
    assert why["reason_text"]


async def test_a_stopped_job_is_cancelled_and_its_followers_are_told(ada: Person):
    job = await ada.submit()
    stopped = (await ada.http.post(f"/v1/jobs/{job['id']}/stop")).json()
    assert stopped["state"] == "CANCELLED"
    assert (await ada.http.post(f"/v1/jobs/{job['id']}/stop")).json()["state"] == "CANCELLED"
    events = (await ada.http.get(f"/v1/jobs/{job['id']}/events")).json()["events"]
    assert events[-1]["state"] == "CANCELLED"
    response = await ada.http.get(f"/v1/jobs/{job['id']}/events", headers={"accept": "text/event-stream"})
    assert response.text.count("event: job") == len(events)
    assert "event: end" in response.text
    logs = await ada.http.get(f"/v1/jobs/{job['id']}/logs", headers={"accept": "text/event-stream"})
    assert "event: end" in logs.text
    results = (await ada.http.get(f"/v1/jobs/{job['id']}/results")).json()
    assert (results["files"], results["complete"]) == ([], True)


JOB_ROUTES = [
    ("GET", ""), ("POST", "/stop"), ("GET", "/why"), ("GET", "/events"), ("GET", "/logs"), ("GET", "/results"),
    ("GET", "/receipt"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), JOB_ROUTES)
async def test_another_teams_job_does_not_exist(ada: Person, bob: Person, method: str, path: str):
    job = await ada.submit()
    foreign = await bob.http.request(method, f"/v1/jobs/{job['id']}{path}")
    absent = await bob.http.request(method, f"/v1/jobs/{JobId.new()}{path}")
    assert code_of(foreign) == code_of(absent) == (404, "job-not-found")
    assert (await ada.http.get(f"/v1/jobs/{job['id']}")).json()["state"] == "QUEUED"


@pytest.mark.parametrize(("method", "path"), JOB_ROUTES)
async def test_what_is_no_job_id_names_nothing(ada: Person, method: str, path: str):
    for wrong in ("job_1", str(MachineId.new()), "x" * 300):
        assert code_of(await ada.http.request(method, f"/v1/jobs/{wrong}{path}"))[0] == 404


async def test_another_teams_jobs_are_not_in_my_list(ada: Person, bob: Person):
    await ada.submit()
    assert (await bob.http.get("/v1/jobs")).json()["jobs"] == []


async def test_a_viewer_may_look_but_not_submit(platform: Platform, ada: Person, bob: Person):
    await ada.http.put(f"/v1/teams/{ada.team_id}/members/{bob.email}", json={"role": "viewer"})
    body = {"refresh_token": bob.refresh_token, "team_id": ada.team_id}
    async with platform.client() as anonymous:
        token = (await anonymous.post("/v1/auth/refresh", json=body)).json()["access_token"]
    async with platform.client(token) as viewer:
        assert (await viewer.get("/v1/jobs")).status_code == 200
        assert code_of(await viewer.post("/v1/jobs", json={"commands": ["true"]}))[0] == 403


async def test_a_packed_directory_is_uploaded_once_and_used_by_a_job(ada: Person):
    data = b"not really a tar" + uuid4().bytes
    sha256 = hashlib.sha256(data).hexdigest()
    want = {"blobs": [{"sha256": sha256, "size_bytes": len(data)}]}
    upload = (await ada.http.post("/v1/uploads", json=want)).json()["uploads"][0]
    async with httpx.AsyncClient(verify=False) as storage:
        assert (await storage.put(upload["url"], content=data)).status_code in (200, 201, 204)
    assert (await ada.http.post("/v1/uploads", json=want)).json()["uploads"][0]["exists"]
    job = await ada.submit(input={"sha256": sha256, "size_bytes": len(data)})
    assert job["spec"]["input"]["sha256"] == sha256


async def test_a_job_whose_input_was_not_uploaded_is_refused(ada: Person):
    response = await ada.http.post(
        "/v1/jobs", json={"commands": ["true"], "input": {"sha256": "0" * 64, "size_bytes": 5}}
    )
    assert 400 <= code_of(response)[0] < 500


# --- machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JoinedMachine:
    id: str
    key: Any
    answer: dict[str, Any]


def signed(key: Any, text: str) -> str:
    return base64.urlsafe_b64encode(sign_with_seed(key.seed, text.encode())).decode().rstrip("=")


async def enrol(platform: Platform, token: str, key: Any, signed_at: int | None = None) -> httpx.Response:
    at = signed_at or int(time.time())
    body = {
        "join_token": token,
        "public_key": key.public,
        "signed_at": at,
        "signature": signed(key, f"dante-enrol\n{key.public}\n{at}"),
        "inventory": {
            "hostname": "box",
            "cpu_milli": 8000,
            "memory_bytes": 32 << 30,
            "disk_bytes": 1 << 40,
            "sandbox": "bubblewrap",
            "devices": [{"index": 0, "model": "NVIDIA GeForce RTX 4090", "vram_bytes": 24 << 30, "uuid": "GPU-1"}],
        },
    }
    async with platform.client() as anonymous:
        return await anonymous.post("/v1/machines", json=body)


async def a_machine(platform: Platform, owner: Person) -> JoinedMachine:
    token = (await owner.http.post("/v1/join-tokens", json={})).json()["token"]
    key = create_user_key()
    response = await enrol(platform, token, key)
    assert response.status_code == 201, response.text
    return JoinedMachine(response.json()["machine_id"], key, response.json())


async def test_a_machine_joins_with_a_token_and_is_its_owners(platform: Platform, ada: Person, bob: Person):
    machine = await a_machine(platform, ada)
    assert machine.answer["team_id"] == ada.team_id
    assert machine.answer["nats_url"] == "nats://public.example:4222"
    assert machine.answer["nats_user_jwt"].count(".") == 2
    shown = (await ada.http.get(f"/v1/machines/{machine.id}")).json()
    assert (shown["hostname"], shown["devices"][0]["model"]) == ("box", "NVIDIA GeForce RTX 4090")
    assert [each["id"] for each in (await ada.http.get("/v1/machines")).json()["machines"]] == [machine.id]
    assert (await bob.http.get("/v1/machines")).json()["machines"] == []


async def test_a_join_token_is_good_for_one_machine(platform: Platform, ada: Person):
    token = (await ada.http.post("/v1/join-tokens", json={})).json()["token"]
    key = create_user_key()
    first = await enrol(platform, token, key)
    assert (await enrol(platform, token, key)).json()["machine_id"] == first.json()["machine_id"]
    assert code_of(await enrol(platform, token, create_user_key())) == (403, "invalid-join-token")


async def test_a_machine_must_prove_its_key_now(platform: Platform, ada: Person):
    token = (await ada.http.post("/v1/join-tokens", json={})).json()["token"]
    response = await enrol(platform, token, create_user_key(), signed_at=int(time.time()) - 3600)
    assert code_of(response) == (401, "invalid-machine-proof")


async def test_a_machine_renews_its_credential_with_its_key(platform: Platform, ada: Person):
    machine = await a_machine(platform, ada)
    at = int(time.time())
    path = f"/v1/machines/{machine.id}/credentials"
    async with platform.client() as anonymous:
        body = {"signed_at": at, "signature": signed(machine.key, f"dante-renew\n{machine.id}\n{at}")}
        renewed = await anonymous.post(path, json=body)
        assert renewed.json()["machine_id"] == machine.id
        other = create_user_key()
        body = {"signed_at": at, "signature": signed(other, f"dante-renew\n{machine.id}\n{at}")}
        assert code_of(await anonymous.post(path, json=body)) == (401, "invalid-machine-proof")


@pytest.mark.parametrize(
    ("verb", "intent"), [("pause", "paused"), ("drain", "draining"), ("resume", "active"), ("leave", "left")]
)
async def test_an_owner_says_what_a_machine_shall_do_and_nobody_else(
    platform: Platform, ada: Person, bob: Person, verb: str, intent: str
):
    machine = await a_machine(platform, ada)
    path = f"/v1/machines/{machine.id}/{verb}"
    assert code_of(await bob.http.post(path)) == (404, "machine-not-found")
    response = await ada.http.post(path)
    assert response.status_code == 200, response.text
    assert response.json()["intent"] == intent


async def test_a_price_is_set_by_the_owner_and_seen_in_the_offers(platform: Platform, ada: Person, bob: Person):
    machine = await a_machine(platform, ada)
    path = f"/v1/machines/{machine.id}/ask"
    assert (await ada.http.get(path)).json()["machine_id"] == machine.id
    set_ = await ada.http.put(path, json={"price_udgpu_per_gpu_hour": 123_456})
    assert set_.json()["price_udgpu_per_gpu_hour"] == 123_456
    assert (await ada.http.get(path)).json()["price_udgpu_per_gpu_hour"] == 123_456
    assert code_of(await bob.http.put(path, json={"price_udgpu_per_gpu_hour": 1}))[0] == 404
    assert code_of(await bob.http.get(path))[0] == 404


async def test_offers_can_be_asked_for_by_gpu(platform: Platform, ada: Person, bob: Person):
    machine = await a_machine(platform, ada)
    seen = {"limit": 500}
    found = (await bob.http.get("/v1/offers", params=seen | {"gpu": "RTX4090"})).json()["offers"]
    assert machine.id in [offer["machine"]["id"] for offer in found]
    others = (await bob.http.get("/v1/offers", params=seen | {"gpu": "H100"})).json()["offers"]
    assert machine.id not in [offer["machine"]["id"] for offer in others]
    response = await ada.http.get("/v1/offers", params={"gpu": "RTX4900"})
    assert code_of(response) == (422, "invalid-argument")
    assert "did you mean" in response.json()["detail"]


# --- money and the operator -------------------------------------------------------------------------------------------


async def test_the_operator_credits_a_wallet_once_per_idempotency_key(platform: Platform, ada: Person):
    body = {"team_id": ada.team_id, "amount_udgpu": 5_000_000, "text": "welcome"}
    for _ in range(2):
        response = await platform.operator.post(
            "/v1/admin/credits", json=body, headers={"idempotency-key": ada.team_id}
        )
        assert response.status_code == 201, response.text
    wallet = (await ada.http.get("/v1/wallet")).json()
    assert (wallet["balance_udgpu"], wallet["available_udgpu"]) == (5_000_000, 5_000_000)
    entries = (await ada.http.get("/v1/wallet/entries")).json()["entries"]
    assert [(entry["amount_udgpu"], entry["text"]) for entry in entries] == [(5_000_000, "welcome")]
    assert (await platform.operator.get("/v1/admin/ledger")).json()["balanced"]


@pytest.mark.parametrize("amount", [0, -1, 1.5, "1", 10**16, None])
async def test_a_credit_of_no_amount_is_refused(platform: Platform, ada: Person, amount: Any):
    body = {"team_id": ada.team_id, "amount_udgpu": amount}
    response = await platform.operator.post("/v1/admin/credits", json=body)
    assert code_of(response) == (422, "invalid-request")
    assert response.json()["errors"][0]["field"] == "amount_udgpu"


@pytest.mark.parametrize("path", ["ledger", "teams", "jobs"])
async def test_only_the_operator_sees_everything(platform: Platform, ada: Person, path: str):
    assert code_of(await ada.http.get(f"/v1/admin/{path}")) == (403, "forbidden")
    assert (await platform.operator.get(f"/v1/admin/{path}")).status_code == 200


async def test_the_operator_sees_every_teams_jobs(platform: Platform, ada: Person):
    job = await ada.submit()
    listed = (await platform.operator.get("/v1/admin/jobs")).json()["jobs"]
    assert job["id"] in [each["id"] for each in listed]
    credit = await ada.http.post("/v1/admin/credits", json={"team_id": ada.team_id, "amount_udgpu": 1})
    assert code_of(credit) == (403, "forbidden")


async def test_a_cursor_of_nonsense_is_refused(ada: Person):
    for path in ("/v1/jobs", "/v1/machines", "/v1/wallet/entries", "/v1/api-keys", "/v1/offers"):
        response = await ada.http.get(path, params={"cursor": "nonsense"})
        assert code_of(response)[0] == 422, path


async def test_ids_of_nothing_are_not_found(ada: Person):
    paths = [
        ("DELETE", f"/v1/api-keys/{ApiKeyId.new()}"),
        ("GET", f"/v1/teams/{TeamId.new()}/members"),
        ("GET", f"/v1/machines/{MachineId.new()}"),
    ]
    for method, path in paths:
        assert code_of(await ada.http.request(method, path))[0] == 404, path


async def test_status_says_that_everything_answers(platform: Platform):
    async with platform.client() as anonymous:
        status = (await anonymous.get("/v1/status")).json()
    assert status["status"] == "ok", status
    assert len(status["services"]) == len(TARGETS)
