"""What the routes work with, and the parameters that many of them share."""

from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Query, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from dantegpu.contracts.gen.dante.v1 import common_pb2, jobs_pb2
from dantegpu.contracts.rest.base import DEFAULT_PAGE_LIMIT, MAX_PAGE_LIMIT
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import Id, InvalidId, JobId, MachineId
from dantegpu.kit import rpc
from dantegpu.kit.actor import Actor, current_actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import InvalidArgument, NotFound, Unauthenticated
from dantegpu.kit.idempotency import MAX_KEY_LENGTH
from dantegpu.kit.rpc import Channels
from dantegpu.services.gateway.clients import Clients
from dantegpu.services.gateway.errors import ScopeMissing
from dantegpu.services.gateway.middleware import PRINCIPAL_ERROR
from dantegpu.services.gateway.settings import GatewaySettings
from dantegpu.services.gateway.streams import Streams
from dantegpu.services.gateway.submissions import Submissions


@dataclass(frozen=True, slots=True)
class Gateway:
    """Everything that a route may need."""

    clients: Clients
    channels: Channels
    bus: Bus
    clock: Clock
    streams: Streams
    submissions: Submissions
    settings: GatewaySettings


def gateway_of(request: Request) -> Gateway:
    return cast(Gateway, request.app.state.gateway)


async def _gateway(request: Request) -> Gateway:
    return gateway_of(request)


# All dependencies are `async`: FastAPI sends others through a thread, which costs more than most of them do.
type Platform = Annotated[Gateway, Depends(_gateway)]

_bearer = HTTPBearer(auto_error=False, description="An access token of `POST /v1/auth/login`, or an API key")
_api_key = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key, for tools that know only this")


class _Principal:
    """The caller, who must be logged in. An API key with scopes must have the one that the route needs."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    async def __call__(self, request: Request, _bearer: Any = Depends(_bearer), _key: Any = Depends(_api_key)) -> Actor:
        return self.of(request)

    def of(self, request: Request) -> Actor:
        """Raises Unauthenticated or one of its kin, ScopeMissing."""
        if error := request.scope.get(PRINCIPAL_ERROR):
            raise error
        actor = current_actor()
        if actor.team_id is None:
            raise Unauthenticated("log in first: `dante login`, or send an API key")
        kind, _, right = self._scope.partition(":")
        wanted = {self._scope, f"{kind}:write"} if right == "read" else {self._scope}
        if actor.scopes and not wanted & actor.scopes:
            raise ScopeMissing(self._scope)
        return actor


type Account = Annotated[Actor, Depends(_Principal("account:read"))]
type AccountWriter = Annotated[Actor, Depends(_Principal("account:write"))]
type JobReader = Annotated[Actor, Depends(_Principal("jobs:read"))]
JOB_WRITER = _Principal("jobs:write")
type JobWriter = Annotated[Actor, Depends(JOB_WRITER)]
type MachineReader = Annotated[Actor, Depends(_Principal("machines:read"))]
type MachineWriter = Annotated[Actor, Depends(_Principal("machines:write"))]
type WalletReader = Annotated[Actor, Depends(_Principal("wallet:read"))]


async def _operator(actor: Annotated[Actor, Depends(_Principal("admin:write"))]) -> Actor:
    actor.require_operator()
    return actor


type Operator = Annotated[Actor, Depends(_operator)]


async def _idempotency_key(
    idempotency_key: Annotated[
        str,
        Header(
            alias="Idempotency-Key",
            max_length=MAX_KEY_LENGTH,
            description="Your own name for this request: sent again, it is done only once",
        ),
    ] = "",
) -> str:
    return idempotency_key


type IdempotencyKey = Annotated[str, Depends(_idempotency_key)]


async def _page(
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_LIMIT)] = DEFAULT_PAGE_LIMIT,
    cursor: Annotated[str, Query(max_length=500, description="`next_cursor` of the page before")] = "",
) -> common_pb2.PageRequest:
    return common_pb2.PageRequest(limit=limit, cursor=cursor)


type Paging = Annotated[common_pb2.PageRequest, Depends(_page)]


def checked_id(kind: type[Id], text: str) -> str:
    """An id of a path. What is no id at all cannot name anything: 404, like an id of nothing."""
    try:
        kind.parse(text)
    except InvalidId as error:
        raise NotFound(str(error)) from error
    return text


async def _job_id(job_id: str, platform: Platform) -> str:
    """The id in a path; `job_...:17`, a task of an array, is looked up and becomes the task's own id."""
    array_id, colon, _ = job_id.partition(":")
    checked_id(JobId, array_id)
    if not colon:
        return job_id
    found = await rpc.call(platform.clients.jobs.GetJobs, jobs_pb2.GetJobsRequest(job_ids=[job_id]))
    return found.jobs[0].id


async def _machine_id(machine_id: str) -> str:
    return checked_id(MachineId, machine_id)


type JobIdPath = Annotated[str, Depends(_job_id)]
type MachineIdPath = Annotated[str, Depends(_machine_id)]


def number_after(text: str, what: str) -> int:
    """A whole number >= 0 that a client sends back, such as Last-Event-ID. Raises InvalidArgument."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidArgument(f"{what}: expected the id of an event that came before, got {text[:80]!r}")
    return int(text)
