"""Event streams over real HTTP, NATS and gRPC, in front of services that say what the test tells them."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, override

import grpc
import httpx
import pytest
from grpc import aio

from dantegpu.contracts import subjects
from dantegpu.contracts.envelope import wrap
from dantegpu.contracts.gen.dante.v1 import (
    auth_pb2,
    auth_pb2_grpc,
    events_pb2,
    jobs_pb2,
    jobs_pb2_grpc,
    monitoring_pb2,
    monitoring_pb2_grpc,
)
from dantegpu.domain.clock import SystemClock
from dantegpu.domain.ids import AttemptId, EventId, JobId, MachineId, TeamId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.deps import Deps
from dantegpu.kit.errors import NotFound
from dantegpu.kit.http import HttpServer
from dantegpu.kit.rpc import Channels, Server
from dantegpu.kit.telemetry import current_request_id, current_traceparent
from dantegpu.services.gateway import streams
from dantegpu.services.gateway.clients import SERVICES
from dantegpu.services.gateway.module import build
from dantegpu.services.gateway.settings import GatewaySettings
from tests.fixtures.actors import a_member
from tests.fixtures.servers import NatsForTests

TIMEOUT_SECONDS = 20


class Behind(
    jobs_pb2_grpc.JobServiceServicer, monitoring_pb2_grpc.MonitoringServiceServicer, auth_pb2_grpc.AuthServiceServicer
):
    """One job, its events and its logs. `away`: answers UNAVAILABLE."""

    def __init__(self, bus: Bus) -> None:
        self.team_id = TeamId.new()
        self.job = jobs_pb2.Job(
            id=str(JobId.new()),
            team_id=str(self.team_id),
            state=jobs_pb2.QUEUED,
            spec=jobs_pb2.JobSpec(commands=["true"]),
        )
        self.events: list[jobs_pb2.JobEvent] = []
        self.logs: dict[int, bytes] = {}
        self.closed_logs: set[int] = set()
        self.away = False
        self.seen_traceparent = ""
        self.seen_request_id = ""
        self.was_away = asyncio.Event()
        self.keys_asked: list[list[str]] = []
        self._bus = bus

    # --- what happens -------------------------------------------------------------------------------------------------

    async def event(self, state: "jobs_pb2.JobState.ValueType", type_: str, wake: bool = True) -> None:
        self.job.state = state
        self.events.append(jobs_pb2.JobEvent(job_id=self.job.id, seq=len(self.events) + 1, state=state, type=type_))
        if wake:
            job_ids = [str(JobId.new()), self.job.id]
            event = wrap(events_pb2.JobsChanged(job_ids=job_ids), event_id=EventId.new(), occurred_at=datetime.now(UTC))
            await self._bus.publish(subjects.JOBS_CHANGED, event)

    def attempt(self, state: "jobs_pb2.JobState.ValueType") -> jobs_pb2.Attempt:
        self.job.epoch += 1
        attempt = jobs_pb2.Attempt(
            id=str(AttemptId.new()),
            job_id=self.job.id,
            epoch=self.job.epoch,
            machine_id=str(MachineId.new()),
            state=state,
        )
        attempt.started_at.FromDatetime(datetime.now(UTC))
        self.job.attempts.append(attempt)
        return self.job.attempts[-1]

    async def write(self, epoch: int, data: bytes, last: bool = False) -> None:
        self.logs[epoch] = self.logs.get(epoch, b"") + data
        if last:
            self.closed_logs.add(epoch)
        await self._bus.publish(subjects.LOGS_APPENDED, events_pb2.LogsAppended(job_ids=[self.job.id]))

    # --- the services -------------------------------------------------------------------------------------------------

    @override
    async def VerifyApiKeys(self, request: auth_pb2.VerifyApiKeysRequest, context: Any) -> Any:
        self.keys_asked.append(list(request.keys))
        teams = {"dante_owner": self.team_id, "dante_stranger": TeamId.new()}
        found = [
            auth_pb2.VerifiedApiKey(valid=key in teams, actor=a_member(teams[key]).to_proto() if key in teams else None)
            for key in request.keys
        ]
        return auth_pb2.VerifyApiKeysResponse(results=found)

    async def _refuse(self, context: Any) -> None:
        if self.away:
            self.was_away.set()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        if current_actor().team_id != self.team_id:
            raise NotFound("there is no such job")

    @override
    async def GetJobs(self, request: jobs_pb2.GetJobsRequest, context: Any) -> Any:
        await self._refuse(context)
        self.seen_traceparent, self.seen_request_id = current_traceparent(), current_request_id()
        return jobs_pb2.GetJobsResponse(jobs=[self.job])

    @override
    async def ListJobEvents(self, request: jobs_pb2.ListJobEventsRequest, context: Any) -> Any:
        await self._refuse(context)
        found = [event for event in self.events if event.seq > request.after_seq]
        return jobs_pb2.ListJobEventsResponse(events=found[: request.limit])

    @override
    async def ReadLogs(self, request: monitoring_pb2.ReadLogsRequest, context: Any) -> Any:
        await self._refuse(context)
        epoch = request.epoch or max(self.logs, default=0)
        log = self.logs.get(epoch, b"")
        data = log[request.offset : request.offset + request.limit_bytes]
        complete = epoch in self.closed_logs and request.offset + len(data) >= len(log)
        return monitoring_pb2.ReadLogsResponse(
            epoch=epoch, offset=request.offset, data=data, size_bytes=len(log), complete=complete
        )


@dataclass
class World:
    behind: Behind
    client: httpx.AsyncClient
    open_streams: streams.Streams
    headers: dict[str, str] = field(default_factory=lambda: {"authorization": "Bearer dante_owner"})

    @property
    def path(self) -> str:
        return f"/v1/jobs/{self.behind.job.id}"

    @asynccontextmanager
    async def follow(self, what: str, **headers: str) -> AsyncGenerator["Stream"]:
        asked = self.headers | {"accept": "text/event-stream"} | headers
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async with self.client.stream("GET", f"{self.path}/{what}", headers=asked) as response:
                if response.status_code != 200:
                    await response.aread()
                yield Stream(response)


class Stream:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._events = self._parse()

    async def _parse(self) -> AsyncIterator[tuple[str, str, Any]]:
        current: dict[str, str] = {}
        async for line in self.response.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                current[name] = value
            elif "event" in current:
                yield current["event"], current.get("id", ""), json.loads(current["data"])
                current = {}

    async def next(self) -> tuple[str, str, Any]:
        return await anext(self._events)

    async def rest(self) -> list[tuple[str, str, Any]]:
        return [event async for event in self._events]


@asynccontextmanager
async def a_world(nats: NatsForTests, folder: Path, **settings: Any) -> AsyncGenerator[World]:
    async with AsyncExitStack() as stack:

        async def start[C: Bus | Channels | Server | HttpServer](component: C) -> C:
            await component.start()
            stack.push_async_callback(component.stop)
            return component

        bus = await start(Bus(nats.url, nats.services_creds, name="test"))
        behind = Behind(bus)  # pyright: ignore[reportAbstractUsage] - answers what the streams ask, nothing else
        channels = await start(Channels(dict.fromkeys(SERVICES, f"unix:{folder}/services.sock")))

        def register(server: aio.Server) -> None:
            jobs_pb2_grpc.add_JobServiceServicer_to_server(behind, server)
            monitoring_pb2_grpc.add_MonitoringServiceServicer_to_server(behind, server)
            auth_pb2_grpc.add_AuthServiceServicer_to_server(behind, server)

        await start(Server(f"unix:{folder}/services.sock", [register]))
        service = build(Deps(SystemClock(), bus, channels), GatewaySettings(public_listen="127.0.0.1:0", **settings))
        for component in service.components:
            await component.start()
            stack.push_async_callback(component.stop)
        assert service.http is not None
        server = await start(HttpServer(service.http, "gateway"))
        client = await stack.enter_async_context(
            httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{server.port}", timeout=TIMEOUT_SECONDS)
        )
        found = next(component for component in service.components if isinstance(component, streams.Streams))
        yield World(behind, client, found)


@pytest.fixture
async def world(nats_server: NatsForTests, short_dir: Path) -> AsyncGenerator[World]:
    async with a_world(nats_server, short_dir) as world:
        yield world


async def nobody_follows(world: World) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while world.open_streams.open_count:
            await asyncio.sleep(0.005)


def log_of(events: list[tuple[str, str, Any]]) -> bytes:
    return b"".join(base64.b64decode(data["data_base64"]) for name, _, data in events if name == "log")


# --- a job's history --------------------------------------------------------------------------------------------------


async def test_a_follower_sees_what_was_and_what_comes_and_the_end(world: World):
    await world.behind.event(jobs_pb2.QUEUED, "submitted")
    async with world.follow("events") as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert (await stream.next())[2]["type"] == "submitted"
        await world.behind.event(jobs_pb2.RUNNING, "running")
        name, id_, data = await stream.next()
        assert (name, id_, data["state"]) == ("job", "2", "RUNNING")
        await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
        assert [(name, data["state"]) for name, _, data in await stream.rest()] == [
            ("job", "SUCCEEDED"),
            ("end", "SUCCEEDED"),
        ]
    await nobody_follows(world)


async def test_the_history_of_a_job_that_has_ended_is_sent_whole_and_ends_at_once(world: World):
    for _ in range(1200):
        await world.behind.event(jobs_pb2.QUEUED, "waiting", wake=False)
    await world.behind.event(jobs_pb2.CANCELLED, "ended", wake=False)
    async with world.follow("events") as stream:
        events = await stream.rest()
    assert [int(id_) for name, id_, _ in events if name == "job"] == list(range(1, 1202))
    assert events[-1][0] == "end"


async def test_a_follower_that_comes_back_gets_only_what_it_has_not_seen(world: World):
    for type_ in ("submitted", "waiting", "placed"):
        await world.behind.event(jobs_pb2.QUEUED, type_)
    await world.behind.event(jobs_pb2.FAILED, "ended")
    async with world.follow("events", **{"last-event-id": "3"}) as stream:
        assert [id_ for name, id_, _ in await stream.rest() if name == "job"] == ["4"]


async def test_a_follower_that_comes_back_after_the_last_event_is_told_that_it_is_over(world: World):
    await world.behind.event(jobs_pb2.FAILED, "ended")
    async with world.follow("events", **{"last-event-id": "1"}) as stream:
        assert [name for name, _, _ in await stream.rest()] == ["end"]


async def test_a_follower_until_settled_stays_until_the_job_is_paid_for(world: World):
    await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
    async with world.follow("events?until=settled") as stream:
        assert (await stream.next())[2]["type"] == "ended"
        world.behind.job.settled = True
        world.behind.job.cost_udgpu = 77
        await world.behind.event(jobs_pb2.SUCCEEDED, "settled")
        assert (await stream.next())[2]["type"] == "settled"
        assert (await stream.next())[2]["cost_udgpu"] == 77


async def test_a_lost_wakeup_is_repaired_by_the_next_look(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    async with world.follow("events") as stream:
        await world.behind.event(jobs_pb2.SUCCEEDED, "ended", wake=False)
        assert [name for name, _, _ in await stream.rest()] == ["job", "end"]


async def test_a_follower_outlives_the_services_being_away(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "POLL_SECONDS", 0.05)
    await world.behind.event(jobs_pb2.QUEUED, "submitted")
    async with world.follow("events") as stream:
        await stream.next()
        world.behind.away = True
        await world.behind.event(jobs_pb2.RUNNING, "running")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await world.behind.was_away.wait()
        world.behind.away = False
        assert (await stream.next())[2]["type"] == "running"


async def test_another_teams_job_cannot_be_followed(world: World):
    for what in ("events", "logs"):
        async with world.follow(what, authorization="Bearer dante_stranger") as stream:
            assert stream.response.status_code == 404
            assert stream.response.json()["code"] == "not-found"
    await nobody_follows(world)


async def test_a_client_that_leaves_takes_its_subscriptions_along(world: World):
    async with world.follow("logs"), world.follow("events"):
        assert world.open_streams.open_count == 2
    await nobody_follows(world)


async def test_a_team_may_not_open_any_number_of_streams(nats_server: NatsForTests, short_dir: Path):
    async with (
        a_world(nats_server, short_dir, max_streams_per_team=1) as world,
        world.follow("events"),
        world.follow("events") as second,
    ):
        assert second.response.status_code == 429
        assert second.response.json()["code"] == "too-many-streams"


async def test_a_stream_is_cut_after_a_while_without_a_last_word(nats_server: NatsForTests, short_dir: Path):
    async with a_world(nats_server, short_dir, stream_max_seconds=0.1) as world:
        await world.behind.event(jobs_pb2.QUEUED, "submitted")
        async with world.follow("events") as stream:
            assert [name for name, _, _ in await stream.rest()] == ["job"]


async def test_a_last_event_id_of_nonsense_is_refused(world: World):
    async with world.follow("events", **{"last-event-id": "x"}) as stream:
        assert stream.response.status_code == 422


# --- logs -------------------------------------------------------------------------------------------------------------


async def test_a_log_is_followed_byte_by_byte_until_the_job_has_ended(world: World):
    attempt = world.behind.attempt(jobs_pb2.RUNNING)
    await world.behind.write(1, b"one\n\xff")
    async with world.follow("logs") as stream:
        first = await stream.next()
        assert first[1] == "1:5"
        await world.behind.write(1, b"two\n", last=True)
        attempt.state = jobs_pb2.SUCCEEDED
        await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
        events = [first, *await stream.rest()]
    assert log_of(events) == b"one\n\xfftwo\n"
    assert events[-1][0] == "end"


async def test_a_follower_of_a_log_comes_back_where_it_was(world: World):
    world.behind.attempt(jobs_pb2.SUCCEEDED)
    await world.behind.write(1, b"0123456789", last=True)
    await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
    async with world.follow("logs", **{"last-event-id": "1:7"}) as stream:
        assert log_of(await stream.rest()) == b"789"


async def test_a_long_log_comes_whole(world: World):
    written = bytes(range(256)) * 4096
    world.behind.attempt(jobs_pb2.SUCCEEDED)
    await world.behind.write(1, written, last=True)
    await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
    async with world.follow("logs") as stream:
        assert log_of(await stream.rest()) == written
    response = await world.client.get(f"{world.path}/logs", headers=world.headers)
    assert response.content == written


async def test_the_log_of_a_lost_attempt_is_followed_by_the_next_attempts(world: World):
    lost = world.behind.attempt(jobs_pb2.RUNNING)
    await world.behind.write(1, b"first ")
    async with world.follow("logs") as stream:
        seen = [await stream.next()]
        lost.state, lost.outcome = jobs_pb2.FAILED, jobs_pb2.OUTCOME_LOST
        second = world.behind.attempt(jobs_pb2.RUNNING)
        await world.behind.event(jobs_pb2.PLACED, "placed")
        await world.behind.write(2, b"second", last=True)
        second.state = jobs_pb2.SUCCEEDED
        await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
        seen += await stream.rest()
    assert log_of(seen) == b"first second"
    assert [data["epoch"] for name, _, data in seen if name == "log"] == [1, 2]


async def test_following_a_job_that_never_started_ends_with_the_job(world: World):
    async with world.follow("logs") as stream:
        await world.behind.event(jobs_pb2.CANCELLED, "ended")
        assert [name for name, _, _ in await stream.rest()] == ["end"]


async def test_a_log_whose_end_never_came_is_not_followed_for_ever(world: World):
    attempt = world.behind.attempt(jobs_pb2.FAILED)
    attempt.ended_at.FromDatetime(datetime.now(UTC) - timedelta(minutes=1))
    await world.behind.write(1, b"half")
    await world.behind.event(jobs_pb2.FAILED, "ended")
    async with world.follow("logs") as stream:
        assert [name for name, _, _ in await stream.rest()] == ["log", "end"]


async def test_following_a_job_whose_machine_has_no_log_of_it_ends_with_the_job(world: World):
    attempt = world.behind.attempt(jobs_pb2.SUCCEEDED)
    attempt.started_at.GetCurrentTime()
    attempt.ended_at.GetCurrentTime()
    attempt.silent = True
    await world.behind.event(jobs_pb2.SUCCEEDED, "ended")
    async with world.follow("logs") as stream:
        assert [name for name, _, _ in await stream.rest()] == ["end"]


async def test_a_part_of_a_stored_log_can_be_asked_for(world: World):
    world.behind.attempt(jobs_pb2.RUNNING)
    await world.behind.write(1, b"0123456789")
    response = await world.client.get(f"{world.path}/logs?offset=2&limit_bytes=3", headers=world.headers)
    assert response.content == b"234"
    assert (response.headers["x-log-epoch"], response.headers["x-log-size"]) == ("1", "10")


async def test_a_job_without_a_log_answers_nothing(world: World):
    response = await world.client.get(f"{world.path}/logs", headers=world.headers)
    assert (response.status_code, response.content) == (200, b"")


async def test_the_callers_trace_and_request_id_reach_the_services(world: World):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = world.headers | {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "x-request-id": "mine"}
    assert (await world.client.get(world.path, headers=headers)).status_code == 200
    assert trace_id in world.behind.seen_traceparent
    assert world.behind.seen_request_id == "mine"


# --- API keys ---------------------------------------------------------------------------------------------------------


async def test_many_requests_with_one_key_ask_auth_once(world: World):
    answers = await asyncio.gather(*(world.client.get(world.path, headers=world.headers) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(map(len, world.behind.keys_asked)) == 1


async def test_keys_that_arrive_together_share_a_call(world: World):
    await asyncio.gather(*(world.client.get("/v1/me", headers={"x-api-key": f"dante_{n}"}) for n in range(40)))
    assert sum(map(len, world.behind.keys_asked)) == 40
    assert len(world.behind.keys_asked) < 40


async def test_a_wrong_key_is_refused(world: World):
    response = await world.client.get(world.path, headers={"x-api-key": "dante_nonsense"})
    assert (response.status_code, response.json()["code"]) == (401, "invalid-credential")
