"""The gateway's outer layer, over real HTTP: errors, limits, headers, API pages. No service behind it answers."""

import asyncio
import gzip
import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dantegpu.domain.clock import SystemClock
from dantegpu.domain.ids import ApiKeyId, JobId, MachineId, ScheduleId, TeamId
from dantegpu.kit.bus import Bus
from dantegpu.kit.deps import Deps
from dantegpu.kit.http import HttpServer
from dantegpu.kit.rpc import Channels
from dantegpu.services.gateway.app import openapi_json
from dantegpu.services.gateway.clients import SERVICES
from dantegpu.services.gateway.module import build
from dantegpu.services.gateway.settings import GatewaySettings


@asynccontextmanager
async def a_gateway(folder: Path, **settings: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """A gateway alone: the services' sockets do not exist, NATS is not connected."""
    channels = Channels(dict.fromkeys(SERVICES, f"unix:{folder}/nobody.sock"))
    deps = Deps(SystemClock(), Bus("nats://127.0.0.1:1", None, name="test"), channels)
    service = build(deps, GatewaySettings(public_listen="127.0.0.1:0", **settings))
    assert service.http is not None
    server = HttpServer(service.http, service.name)
    await server.start()
    try:
        async with httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.stop()
        await channels.stop()


@pytest.fixture
async def client(short_dir: Path) -> AsyncGenerator[httpx.AsyncClient]:
    async with a_gateway(short_dir) as client:
        yield client


def problem_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    assert body["type"].endswith(f"/{code}")
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["detail"]
    return body


async def test_a_path_that_does_not_exist_is_a_problem(client: httpx.AsyncClient):
    problem = problem_of(await client.get("/v1/nothing"), 404, "not-found")
    assert problem["instance"] == "/v1/nothing"


async def test_a_method_that_is_not_allowed_is_a_problem_that_names_those_that_are(client: httpx.AsyncClient):
    response = await client.delete("/v1/auth/login")
    problem_of(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


async def test_a_body_that_is_no_json_says_where_it_breaks(client: httpx.AsyncClient):
    response = await client.post("/v1/auth/login", content=b'{"email": ', headers={"content-type": "application/json"})
    assert "character" in problem_of(response, 400, "invalid-json")["detail"]


async def test_json_nested_too_deeply_is_refused(client: httpx.AsyncClient):
    response = await client.post("/v1/auth/login", content=b"[" * 200_000, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_wrong_field_is_named_with_the_nearest_known_one(client: httpx.AsyncClient):
    response = await client.post("/v1/auth/login", json={"emial": "a@b.c", "password": "secret-word"})
    problem = problem_of(response, 422, "invalid-request")
    fields = {error["field"]: error for error in problem["errors"]}
    assert fields["emial"]["nearest"] == "email"
    assert fields["email"]["message"] == "this field is required"


async def test_a_password_in_a_refused_body_is_not_repeated(client: httpx.AsyncClient):
    response = await client.post("/v1/auth/register", json={"email": "nonsense", "password": "topsecret-1"})
    problem_of(response, 422, "invalid-request")
    assert "topsecret" not in response.text


@pytest.mark.parametrize("path", ["/v1/me", "/v1/jobs", "/v1/wallet", "/v1/machines", "/v1/admin/ledger", "/v1/offers"])
async def test_nobody_gets_in_without_a_credential(client: httpx.AsyncClient, path: str):
    response = await client.get(path)
    problem_of(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_a_submission_without_a_credential_is_refused(client: httpx.AsyncClient):
    problem_of(await client.post("/v1/jobs", json={"commands": ["true"]}), 401, "unauthenticated")


async def test_a_header_that_is_no_bearer_token_is_refused(client: httpx.AsyncClient):
    problem_of(await client.get("/v1/me", headers={"authorization": "Basic YTpi"}), 401, "invalid-credential")


async def test_while_auth_is_away_an_api_key_is_answered_503_with_retry_after(client: httpx.AsyncClient):
    response = await client.get("/v1/me", headers={"authorization": "Bearer dante_abc"})
    problem_of(response, 503, "unavailable")
    assert int(response.headers["retry-after"]) >= 1


async def test_while_auth_is_away_a_login_is_answered_503_with_retry_after(client: httpx.AsyncClient):
    response = await client.post("/v1/auth/login", json={"email": "a@b.c", "password": "x"})
    problem_of(response, 503, "unavailable")
    assert int(response.headers["retry-after"]) >= 1


async def test_status_names_the_services_that_do_not_answer(client: httpx.AsyncClient):
    response = await client.get("/v1/status")
    assert response.json()["status"] == "degraded"
    assert {each["name"] for each in response.json()["services"] if not each["reachable"]} == {*SERVICES, "nats"}


async def test_the_callers_request_id_comes_back(client: httpx.AsyncClient):
    response = await client.get("/v1/nothing", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"


async def test_a_request_id_with_control_characters_is_replaced(client: httpx.AsyncClient):
    response = await client.get("/v1/nothing", headers={"x-request-id": "a\tb"})
    assert re.fullmatch(r"req_[0-9a-z]{26}", response.headers["x-request-id"])


async def test_every_answer_carries_the_security_headers(client: httpx.AsyncClient):
    for path in ("/v1/nothing", "/docs", "/openapi.json", "/v1/me"):
        headers = (await client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert "default-src 'none'" in headers["content-security-policy"], path


async def test_pages_of_other_origins_may_not_call_the_api_unless_allowed(short_dir: Path):
    headers = {"origin": "https://console.example", "access-control-request-method": "POST"}
    async with a_gateway(short_dir) as closed:
        assert "access-control-allow-origin" not in (await closed.options("/v1/jobs", headers=headers)).headers
    async with a_gateway(short_dir, cors_origins=["https://console.example"]) as opened:
        response = await opened.options("/v1/jobs", headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://console.example"
        refused = await opened.get("/v1/status", headers={"origin": "https://else.example"})
        assert "access-control-allow-origin" not in refused.headers


async def test_a_body_larger_than_the_limit_is_refused(short_dir: Path):
    async with a_gateway(short_dir, max_body_bytes=2000) as client:
        response = await client.post("/v1/auth/login", json={"email": "a@b.c", "password": "x" * 3000})
        problem_of(response, 413, "body-too-large")


async def test_a_chunked_body_larger_than_the_limit_is_refused(short_dir: Path):
    async def chunks() -> AsyncGenerator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    async with a_gateway(short_dir, max_body_bytes=2000) as client:
        response = await client.post("/v1/auth/login", content=chunks(), headers={"content-type": "application/json"})
        problem_of(response, 413, "body-too-large")


async def test_an_address_that_asks_too_often_is_told_when_to_come_back(short_dir: Path):
    async with a_gateway(short_dir, anonymous_rate_limit_per_second=0.1, anonymous_rate_limit_burst=3) as client:
        answers = [await client.get("/v1/me") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
        problem_of(answers[-1], 429, "too-many-requests")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 10


async def test_only_a_trusted_proxy_may_say_for_whom_it_asks(short_dir: Path):
    limits: dict[str, Any] = {"anonymous_rate_limit_per_second": 0.1, "anonymous_rate_limit_burst": 1}

    async def statuses(client: httpx.AsyncClient) -> list[int]:
        headers = [{"x-forwarded-for": f"6.6.6.6, 10.0.0.{n}"} for n in (1, 2)]
        return [(await client.get("/v1/me", headers=each)).status_code for each in headers]

    async with a_gateway(short_dir, **limits) as client:
        assert await statuses(client) == [401, 429]
    async with a_gateway(short_dir, trusted_proxies=["127.0.0.1"], **limits) as client:
        assert await statuses(client) == [401, 401]


async def test_many_requests_at_once_share_nothing_but_the_process(client: httpx.AsyncClient):
    async def ask(n: int) -> str:
        response = await client.get("/v1/me", headers={"x-request-id": f"r{n}"})
        return str(response.json()["request_id"])

    assert await asyncio.gather(*(ask(n) for n in range(50))) == [f"r{n}" for n in range(50)]


async def test_small_answers_do_not_wait_for_a_delayed_ack(client: httpx.AsyncClient):
    seconds: list[float] = []
    for _ in range(21):
        began = time.perf_counter()
        await client.get("/v1/me")
        seconds.append(time.perf_counter() - began)
    # A delayed acknowledgement comes after 40 ms and would hold up each of them, a busy machine only some.
    assert min(seconds) < 0.03


PUBLIC = {
    ("post", "/v1/auth/register"),
    ("post", "/v1/auth/login"),
    ("post", "/v1/auth/refresh"),
    ("post", "/v1/auth/logout"),
    ("post", "/v1/machines"),
    ("post", "/v1/machines/{machine_id}/credentials"),
    ("get", "/v1/status"),
    ("get", "/v1/.well-known/jwks.json"),
}


async def test_every_route_that_is_not_listed_as_public_refuses_anonymous_callers(client: httpx.AsyncClient):
    kinds = {"job_id": JobId, "machine_id": MachineId, "team_id": TeamId, "key_id": ApiKeyId, "schedule_id": ScheduleId}
    ids = {name: kind.new() for name, kind in kinds.items()}
    refused: set[tuple[str, str]] = set()
    operations = json.loads(openapi_json())["paths"]
    for path, methods in operations.items():
        for method in methods:
            response = await client.request(method, path.format(**ids, email="a@b.c"))
            if response.status_code == 401:
                refused.add((method, path))
    assert {(method, path) for path, methods in operations.items() for method in methods} - refused == PUBLIC


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
async def test_the_api_pages_load_nothing_from_another_host(client: httpx.AsyncClient, page: str):
    html = (await client.get(page)).text
    addresses = re.findall(r'(?:src|href|spec-url)="([^"]+)"', html)
    assert addresses
    for address in addresses:
        assert address.startswith("/"), address
        found = await client.get(address)
        assert found.status_code == 200, address
        assert len(found.content) > 100


async def test_redoc_shows_no_picture_from_another_host():
    path = Path(__file__).parents[2] / "src/dantegpu/services/gateway/static/redoc.standalone.js.gz"
    assert b"cdn.redoc" not in gzip.decompress(path.read_bytes())


async def test_openapi_is_3_1_and_documents_problems_for_every_operation(client: httpx.AsyncClient):
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "application/problem+json" in operation["responses"]["default"]["content"], (method, path)


async def test_every_reference_in_openapi_resolves(client: httpx.AsyncClient):
    document = (await client.get("/openapi.json")).json()
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names
    assert names <= document["components"]["schemas"].keys()


def test_the_openapi_document_in_docs_is_the_current_one():
    path = Path(__file__).parents[2] / "docs/api/openapi.json"
    assert path.read_text() == openapi_json(), (
        f"renew it: .venv/bin/python -m dantegpu.services.gateway.app > {path.relative_to(Path(__file__).parents[2])}"
    )
