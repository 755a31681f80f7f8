"""Who may do what to whose things: every route of the OpenAPI document, as every kind of caller.

A route that TABLE does not list fails the test, so nobody adds one without saying who may call it.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import pytest

from dantegpu.domain.ids import ApiKeyId, JobId, MachineId, ScheduleId, TeamId
from dantegpu.sdk import Dante
from dantegpu.services.gateway.app import create_app
from tests.fixtures.people import Person, new_machine, new_person
from tests.fixtures.platform import UpPlatform
from tests.fixtures.web import http

pytestmark = pytest.mark.needs("bubblewrap")

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
KINDS = ("account", "admin", "jobs", "machines", "wallet")
SCOPES = tuple(f"{kind}:{right}" for kind in KINDS for right in ("read", "write"))
REFUSED_ROLES = {"viewer": 403}
SPEC = {"command": ["true"], "resources": {"gpu": "H100:8"}, "name": "never placed"}
A_BLOB = {"sha256": "0" * 64, "size_bytes": 1}
LOOKS = {"role": "viewer"}
PRICE = {"price_udgpu_per_gpu_hour": 1}

type Body = Callable[["World"], Any] | None


@dataclass(slots=True)
class World:
    """One team with a job and a key, one with machines, and strangers to both."""

    url: str
    owner: Person
    provider: Person
    stranger: Person
    viewer_email: str
    credentials: dict[str, str]
    """Of each kind of caller; "viewer" is one of the owner's team."""
    viewer_of_provider: str
    job: str
    key: str
    schedule: str
    machine: str
    leaving_machine: str
    http: httpx.Client = field(default_factory=httpx.Client)

    def call(self, method: str, path: str, caller: str, body: Any = None, **headers: str) -> httpx.Response:
        secret = self.credentials.get(caller, caller)
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        if body is None or method in ("GET", "DELETE"):
            return self.http.request(method, self.url + path, headers=headers)
        return self.http.request(method, self.url + path, json=body, headers=headers)


@dataclass(frozen=True, slots=True)
class Rule:
    """What each caller is answered. `whose`: the team that the path's object belongs to; empty: none is named."""

    status: int
    scope: str = ""
    whose: str = ""
    body: Body = None
    refused: Mapping[str, int] = field(default_factory=dict[str, int])
    """Callers that are told so although the object is theirs to see."""
    operator_only: bool = False

    @property
    def public(self) -> bool:
        return not self.scope


def public(status: int, body: Body = None) -> Rule:
    return Rule(status, body=body)


def own(status: int, scope: str, body: Body = None) -> Rule:
    """Acts on the caller's own team."""
    return Rule(status, scope, body=body)


def own_writing(status: int, scope: str, body: Body = None) -> Rule:
    return Rule(status, scope, body=body, refused=REFUSED_ROLES)


def of(whose: str, status: int, scope: str, body: Body = None) -> Rule:
    """Acts on the object that the path names."""
    return Rule(status, scope, whose, body)


def of_writing(whose: str, status: int, scope: str, body: Body = None) -> Rule:
    return Rule(status, scope, whose, body, REFUSED_ROLES)


def operators(status: int, body: Body = None) -> Rule:
    return Rule(status, "admin:write", body=body, operator_only=True)


def registration(_world: World) -> Any:
    return {"email": f"{uuid4().hex}@example.org", "password": uuid4().hex}


def a_proof(_world: World) -> dict[str, Any]:
    return {"signed_at": int(time.time()), "signature": "A" * 86}


def an_enrolment(world: World) -> Any:
    inventory = {"hostname": "x", "cpu_milli": 1000, "memory_bytes": 1, "disk_bytes": 1}
    return a_proof(world) | {"join_token": "dante_join_x", "public_key": "U", "inventory": inventory}


TABLE: Mapping[tuple[str, str], Rule] = {
    ("POST", "/v1/auth/register"): public(201, registration),
    ("POST", "/v1/auth/login"): public(200, lambda w: {"email": w.owner.email, "password": w.owner.password}),
    ("POST", "/v1/auth/refresh"): public(401, lambda _: {"refresh_token": "nobody's"}),
    ("POST", "/v1/auth/logout"): public(204, lambda _: {"refresh_token": "nobody's"}),
    ("GET", "/v1/status"): public(200),
    ("GET", "/v1/.well-known/jwks.json"): public(200),
    # A machine proves who it is by a signature, not by a credential of a user.
    ("POST", "/v1/machines"): public(401, an_enrolment),
    ("POST", "/v1/machines/{machine_id}/credentials"): public(401, a_proof),
    ("GET", "/v1/me"): own(200, "account:read"),
    ("GET", "/v1/teams"): own(200, "account:read"),
    ("POST", "/v1/teams"): own(201, "account:write", lambda _: {"name": "another"}),
    ("GET", "/v1/teams/{team_id}/members"): of("owner", 200, "account:read"),
    ("PUT", "/v1/teams/{team_id}/members/{email}"): of_writing("owner", 204, "account:write", lambda _: LOOKS),
    ("DELETE", "/v1/teams/{team_id}/members/{email}"): of_writing("owner", 204, "account:write"),
    ("GET", "/v1/api-keys"): own(200, "account:read"),
    ("POST", "/v1/api-keys"): own(201, "account:write", lambda _: {"name": "k"}),
    # Another person's key in one's own team is its owners' business.
    ("DELETE", "/v1/api-keys/{key_id}"): Rule(204, "account:write", "owner", None, {"viewer": 404}),
    ("POST", "/v1/join-tokens"): own_writing(201, "machines:write", lambda _: {}),
    ("GET", "/v1/machines"): own(200, "machines:read"),
    ("GET", "/v1/machines/{machine_id}"): of("provider", 200, "machines:read"),
    ("POST", "/v1/machines/{machine_id}/pause"): of_writing("provider", 200, "machines:write"),
    ("POST", "/v1/machines/{machine_id}/resume"): of_writing("provider", 200, "machines:write"),
    ("POST", "/v1/machines/{machine_id}/drain"): of_writing("provider", 200, "machines:write"),
    ("POST", "/v1/machines/{machine_id}/leave"): of_writing("provider", 200, "machines:write"),
    ("GET", "/v1/machines/{machine_id}/ask"): of("provider", 200, "machines:read"),
    ("PUT", "/v1/machines/{machine_id}/ask"): of_writing("provider", 200, "machines:write", lambda _: PRICE),
    ("GET", "/v1/offers"): own(200, "jobs:read"),
    ("POST", "/v1/uploads"): own_writing(201, "jobs:write", lambda _: {"blobs": [A_BLOB]}),
    ("POST", "/v1/jobs"): own_writing(201, "jobs:write", lambda _: SPEC),
    ("GET", "/v1/jobs"): own(200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}"): of("owner", 200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/tasks"): of("owner", 200, "jobs:read"),
    ("POST", "/v1/jobs/{job_id}/stop"): of_writing("owner", 200, "jobs:write"),
    ("GET", "/v1/jobs/{job_id}/why"): of("owner", 200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/events"): of("owner", 200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/logs"): of("owner", 200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/metrics"): of("owner", 200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/results"): of("owner", 200, "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/receipt"): of("owner", 200, "jobs:read wallet:read"),
    ("GET", "/v1/schedules"): own(200, "jobs:read"),
    ("POST", "/v1/schedules"): own_writing(201, "jobs:write", lambda _: SPEC | {"schedule": {"cron": "0 0 1 1 *"}}),
    ("POST", "/v1/schedules/{schedule_id}/stop"): of_writing("owner", 200, "jobs:write"),
    ("GET", "/v1/wallet"): own(200, "wallet:read"),
    ("GET", "/v1/wallet/entries"): own(200, "wallet:read"),
    ("POST", "/v1/admin/credits"): operators(201, lambda w: {"team_id": w.owner.team_id, "amount_udgpu": 1}),
    ("GET", "/v1/admin/ledger"): operators(200),
    ("GET", "/v1/admin/teams"): operators(200),
    ("GET", "/v1/admin/jobs"): operators(200),
    ("GET", "/v1/admin/quarantines"): operators(200),
    ("POST", "/v1/admin/machines/{machine_id}/release"): operators(200),
}  # fmt: skip
CALLERS = ("anonymous", "owner", "viewer", "stranger", "provider", "operator", "jobs:read", "machine", "garbage")
NOT_LOGGED_IN = ("anonymous", "machine", "garbage")
EXAMPLE_IDS = {
    "{team_id}": TeamId,
    "{key_id}": ApiKeyId,
    "{machine_id}": MachineId,
    "{job_id}": JobId,
    "{schedule_id}": ScheduleId,
}


def viewer_key(platform: UpPlatform, viewer: Person, team: Person) -> str:
    """An API key with which `viewer` looks at another team's things."""
    team.client.teams.set_member(team.team_id, viewer.email, "viewer")
    with Dante(platform.running.url) as session:
        session.auth.login(viewer.email, viewer.password)
        session.auth.switch_team(team.team_id)
        return session.keys.create("looks").secret


def key_with_scope(platform: UpPlatform, secret: str, scope: str) -> str:
    answer = http().post(
        platform.running.url + "/v1/api-keys", json={"name": scope, "scopes": [scope]},
        headers={"authorization": f"Bearer {secret}"},
    )  # fmt: skip
    return answer.raise_for_status().json()["secret"]


@pytest.fixture(scope="module")
def world(platform: UpPlatform) -> Iterator[World]:
    owner, provider, stranger, viewer = (new_person(platform) for _ in range(4))
    machine, leaving = new_machine(provider), new_machine(provider)
    job = owner.client.jobs.submit({"command": ["true"], "resources": {"cpu": 0.1, "memory": "64MB"}})
    owner.client.jobs.wait(job.id, settled=True, timeout_seconds=60)
    schedule = owner.client.schedules.create(SPEC | {"schedule": {"cron": "0 0 1 1 *"}})
    with platform.operator as operator:
        operator_key = operator.keys.create("matrix").secret
    sacrificed = owner.client.keys.create("sacrificed")
    world = World(
        url=platform.running.url, owner=owner, provider=provider, stranger=stranger, viewer_email=viewer.email,
        credentials={
            "anonymous": "", "owner": owner.secret, "stranger": stranger.secret, "provider": provider.secret,
            "viewer": viewer_key(platform, viewer, owner), "operator": operator_key,
            "jobs:read": key_with_scope(platform, owner.secret, "jobs:read"),
            "machine": machine.identity.credentials()[0], "garbage": "dante_" + "x" * 43,
        },
        viewer_of_provider=viewer_key(platform, viewer, provider),
        job=job.id, schedule=schedule.id, key=sacrificed.key.id,
        machine=str(machine.id), leaving_machine=str(leaving.id),
    )  # fmt: skip
    yield world
    for person in (owner, provider, stranger, viewer):
        for waiting in person.client.jobs.list().jobs:
            person.client.jobs.stop(waiting.id)
        person.client.close()
    world.http.close()


def routes() -> list[tuple[str, str]]:
    document = create_app(None).openapi()
    return [(method.upper(), path) for path, operations in document["paths"].items() for method in operations]


def test_the_table_lists_every_route_and_no_other():
    assert {name for name in routes() if name[0] in METHODS} == set(TABLE)


def path_of(world: World, method: str, path: str, *, absent: bool = False) -> str:
    """The route's path with the ids of the owners' objects, or of nothing."""
    leaving = path.endswith("/leave")
    ids = {
        "{team_id}": world.owner.team_id,
        "{key_id}": world.key,
        "{machine_id}": world.leaving_machine if leaving else world.machine,
        "{job_id}": world.job,
        "{schedule_id}": world.schedule,
    }
    if absent:
        ids = {name: str(kind.new()) for name, kind in EXAMPLE_IDS.items()}
    for name, value in ids.items():
        path = path.replace(name, value)
    # Whoever may remove members removes somebody who is none.
    return path.replace("{email}", world.viewer_email if method == "PUT" else world.stranger.email)


def expected(rule: Rule, caller: str) -> int:
    if rule.public:
        return rule.status
    if caller in NOT_LOGGED_IN:
        return 401
    if caller == "jobs:read":
        if rule.scope != "jobs:read":
            return 403
        caller = "owner"
    if rule.operator_only:
        return rule.status if caller == "operator" else 403
    if not rule.whose:
        return rule.refused.get(caller, rule.status)
    if caller == "operator" or caller == rule.whose:
        return rule.status
    return rule.refused.get(caller, rule.status) if caller == "viewer" else 404


def caller_for(world: World, rule: Rule, caller: str) -> str:
    return world.viewer_of_provider if caller == "viewer" and rule.whose == "provider" else caller


def described(response: httpx.Response) -> str:
    """Everything that an answer tells, but for ids and the id of the request."""
    problem = json.loads(response.content)
    del problem["request_id"]
    headers = {name: value for name, value in response.headers.items() if name not in ("x-request-id", "date")}
    text = json.dumps([response.status_code, problem, headers])
    return re.sub(r'"content-length": "\d+"', "", re.sub(r"(job|mach|team|key|sched)_[0-9a-z]{26}", "ID", text))


@pytest.mark.parametrize(("method", "path"), TABLE, ids=lambda text: text)
def test_each_caller_is_answered_as_the_table_says(world: World, method: str, path: str):
    rule = TABLE[method, path]
    body = rule.body(world) if rule.body else None
    answers: dict[str, int] = {}
    for caller in CALLERS:
        if rule.body is registration:
            body = registration(world)
        answers[caller] = world.call(
            method, path_of(world, method, path), caller_for(world, rule, caller), body
        ).status_code
    wanted = {caller: expected(rule, caller) for caller in CALLERS}
    assert answers == wanted


OBJECTS = [name for name in TABLE if any(placeholder in name[1] for placeholder in EXAMPLE_IDS)]


@pytest.mark.parametrize(("method", "path"), OBJECTS, ids=lambda text: text)
def test_what_is_somebody_elses_is_answered_like_what_is_not_there(world: World, method: str, path: str):
    rule = TABLE[method, path]
    body = rule.body(world) if rule.body else None
    theirs, nothing = (path_of(world, method, path, absent=absent) for absent in (False, True))
    for caller in ("stranger", "provider" if rule.whose == "owner" else "owner", "anonymous", "jobs:read"):
        if caller == rule.whose or (caller == "jobs:read" and rule.whose == "owner"):
            continue
        seen = [described(world.call(method, each, caller, body)) for each in (theirs, nothing)]
        assert seen[0] == seen[1], caller
    assert world.call(method, nothing, "operator", body).status_code in (401, 404)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_with_one_scope_does_what_the_scope_says_and_nothing_else(platform: UpPlatform, world: World, scope: str):
    key = key_with_scope(platform, world.credentials["operator"], scope)
    kind, _, right = scope.partition(":")
    has = {scope, f"{kind}:read"} if right == "write" else {scope}
    for (method, path), rule in TABLE.items():
        if rule.public:
            continue
        # The object is not there and the body is empty, so nothing happens to anybody.
        answer = world.call(method, path_of(world, method, path, absent=True), key, {})
        refused = answer.status_code == 403 and answer.json()["code"] == "scope-missing"
        assert refused == (not set(rule.scope.split()) <= has), (method, path, answer.text)


def test_a_streams_event_source_is_guarded_like_the_thing_itself(world: World):
    for what in ("events", "logs"):
        path = f"/v1/jobs/{world.job}/{what}"
        assert world.call("GET", path, "stranger", accept="text/event-stream").status_code == 404
        assert world.call("GET", path, "anonymous", accept="text/event-stream").status_code == 401
        assert "event: end" in world.call("GET", path, "owner", accept="text/event-stream").text


def test_only_the_operator_sees_everybodys_machines(world: World):
    seen = {caller: world.call("GET", "/v1/machines?all_teams=true", caller) for caller in ("owner", "operator")}
    assert seen["owner"].status_code == 403
    assert world.machine in seen["operator"].text
