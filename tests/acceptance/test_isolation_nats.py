"""A hostile machine on the real platform's NATS: what its credential, and its messages, cannot do."""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.contracts.rest.jobs import Job
from dantegpu.domain.ids import AttemptId, MachineId
from dantegpu.kit.bus import flush
from dantegpu.kit.nats_jwt import (
    create_user_key,
    creds_file_text,
    load_or_create_trust,
    services_permissions,
    sign_user_jwt,
)
from tests.fixtures.cluster import wait_until
from tests.fixtures.people import PATIENCE_SECONDS, Person, StrangeMachine, new_machine, new_person
from tests.fixtures.platform import UpPlatform

pytestmark = pytest.mark.needs("bubblewrap")

WAITS = ["sh", "-c", "echo started; until [ -e stop ]; do sleep 0.05; done"]


@pytest.fixture(scope="module")
def provider(platform: UpPlatform) -> Person:
    return new_person(platform, credit_udgpu=0)


@pytest.fixture(scope="module")
def stranger(provider: Person) -> Iterator[StrangeMachine]:
    machine = new_machine(provider)
    yield machine
    shutil.rmtree(machine.identity.folder)


@pytest.fixture
def consumer(platform: UpPlatform) -> Iterator[Person]:
    person = new_person(platform)
    yield person
    person.client.close()


@pytest.fixture
def running(consumer: Person) -> Iterator[Job]:
    """A job of somebody else that runs on the platform's own machine, and whose only line has arrived."""
    job = consumer.client.jobs.submit({"command": WAITS, "resources": {"cpu": 0.1, "memory": "64MB"}})
    wait_until(lambda: b"".join(chunk.data for chunk in consumer.client.jobs.logs(job.id)), "its line arrives")
    yield wait_until(
        lambda: found if (found := consumer.client.jobs.get(job.id)).state == "RUNNING" else None, "the job runs"
    )
    consumer.client.jobs.stop(job.id)
    consumer.client.jobs.wait(job.id, timeout_seconds=30)


def own_machine(platform: UpPlatform) -> MachineId:
    """The one whose daemon `dante up` started."""
    with platform.operator as operator:
        [machine] = operator.machines.list().machines
    return MachineId.parse(machine.id)


FORBIDDEN_PUBLISH = [
    "dante.machine.{other}.heartbeat",
    "dante.machine.{other}.sync",
    "dante.machine.{other}.report",
    "dante.machine.{other}.logs",
    "dante.machine.{other}.urls",
    "dante.machine.{other}.desired",
    "_INBOX_{other}.x",
    "_INBOX.x",
    "dante.queue.submitted",
    "dante.jobs.job_x",
    "dante.gpus.{other}",
    "dante.billing.team_x",
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.DELETE.JOBS",
    "$JS.API.STREAM.PURGE.REPORTS",
    "$JS.API.STREAM.MSG.GET.EVENTS",
    "$JS.API.DIRECT.GET.EVENTS",
    "$JS.API.CONSUMER.CREATE.EVENTS",
    "$JS.API.CONSUMER.MSG.NEXT.JOBS.placement",
    "$JS.ACK.REPORTS.reports.1.1.1.1.1",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.ACCOUNT.PING",
]
FORBIDDEN_SUBSCRIBE = [
    ">",
    "*.>",
    "dante.>",
    "dante.machine.*.desired",
    "dante.machine.{other}.>",
    "dante.machine.{other}.desired",
    "dante.machine.{own}.sync",
    "dante.jobs.*",
    "dante.logs.*",
    "dante.queue.*",
    "_INBOX.>",
    "_INBOX_{other}.>",
    "$JS.>",
    "$JS.EVENT.>",
    "$SYS.>",
]


async def test_a_machine_is_refused_every_subject_that_is_not_its_own(platform: UpPlatform, stranger: StrangeMachine):
    names = {"own": stranger.id, "other": own_machine(platform)}
    async with stranger.connected() as (client, errors):
        for action, forbidden in (("Publish", FORBIDDEN_PUBLISH), ("Subscription", FORBIDDEN_SUBSCRIBE)):
            for subject in (pattern.format(**names) for pattern in forbidden):
                if action == "Publish":
                    await client.publish(subject, b"")
                else:
                    await client.subscribe(subject)
                await flush(client)
                error = str(await asyncio.wait_for(errors.get(), PATIENCE_SECONDS)).lower()
                assert f'permissions violation for {action} to "{subject}'.lower() in error


async def ask(client: Client, subject: str, request: bytes) -> bytes:
    return (await client.request(subject, request, timeout=PATIENCE_SECONDS)).data


async def test_what_a_machine_says_of_another_machines_attempt_changes_nothing(
    stranger: StrangeMachine, consumer: Person, running: Job
):
    attempt = running.attempts[0]
    events_before = list(consumer.client.jobs.events(running.id))
    lie = machine_pb2.AttemptStatus(
        attempt_id=attempt.id, job_id=running.id, epoch=attempt.epoch, seq=1_000, state=jobs_pb2.FAILED,
        outcome=jobs_pb2.OUTCOME_FAILED, exit_code=1, message="taken over", ran_ms=1,
    )  # fmt: skip
    forged = machine_pb2.LogAppend(chunks=[machine_pb2.LogChunk(attempt_id=attempt.id, offset=8, data=b"forged")])
    async with stranger.connected() as (client, _):
        report = machine_pb2.Report(machine_id=attempt.machine_id, attempts=[lie])
        await client.request(subjects.machine_report(stranger.id), report.SerializeToString(), PATIENCE_SECONDS)
        sync = machine_pb2.SyncRequest(machine_id=attempt.machine_id, attempts=[lie])
        reply = await ask(client, subjects.machine_sync(stranger.id), sync.SerializeToString())
        told = machine_pb2.DesiredState.FromString(reply)
        assert (told.machine_id, list(told.desired), told.error) == (str(stranger.id), [], "")
        reply = await ask(client, subjects.machine_logs(stranger.id), forged.SerializeToString())
        assert machine_pb2.LogAppended.FromString(reply).acks[0].refused
        results = [jobs_pb2.ResultFile(path="x", sha256="0" * 64)]
        for wanted in (machine_pb2.UrlsRequest(input=True), machine_pb2.UrlsRequest(results=results)):
            request = machine_pb2.UrlsRequest(attempt_id=attempt.id, epoch=attempt.epoch)
            request.MergeFrom(wanted)
            reply = await ask(client, subjects.machine_urls(stranger.id), request.SerializeToString())
            assert machine_pb2.UrlsReply.FromString(reply) == machine_pb2.UrlsReply(error="stale")
    now = consumer.client.jobs.get(running.id)
    assert (now.state, now.attempts) == ("RUNNING", running.attempts)
    assert list(consumer.client.jobs.events(running.id)) == events_before
    assert b"".join(chunk.data for chunk in consumer.client.jobs.logs(running.id)) == b"started\n"


@asynccontextmanager
async def as_services(platform: UpPlatform) -> AsyncGenerator[Client]:
    """A client that may do everything, to look with."""
    trust = load_or_create_trust(platform.home / "platform" / "secrets")
    key = create_user_key()
    jwt = sign_user_jwt(trust.account_seed, trust.account_public, key.public, "test", services_permissions(), None)
    creds = platform.home / "observer.creds"
    creds.touch(mode=0o600)
    creds.write_text(creds_file_text(jwt, key.seed))
    client = await nats.connect(platform.running.nats_url, user_credentials=str(creds))
    try:
        yield client
    finally:
        await client.close()


async def test_the_services_do_not_speak_for_a_machine_to_anybody_else(platform: UpPlatform, stranger: StrangeMachine):
    """NATS lets a client name any subject for the answer, and the services may publish on every subject."""
    own_machine_id = await asyncio.to_thread(own_machine, platform)
    other = subjects.machine_desired(own_machine_id)
    requests = {
        subjects.machine_sync(stranger.id): machine_pb2.SyncRequest(),
        subjects.machine_logs(stranger.id): machine_pb2.LogAppend(),
        subjects.machine_urls(stranger.id): machine_pb2.UrlsRequest(attempt_id=str(AttemptId.new())),
    }
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    def refused() -> bool:
        log = (platform.home / "platform" / "platform.log").read_text()
        lines = [line for line in log.splitlines() if '"reply_subject_refused"' in line and str(stranger.id) in line]
        return len(lines) >= 2 * len(requests) or bool(heard)

    async with as_services(platform) as services, stranger.connected() as (client, _):
        streams = services.jetstream()
        before = {stream.name: (await streams.stream_info(stream.name)).created for stream in subjects.STREAMS}
        await services.subscribe(other, cb=hear)
        await flush(services)
        for subject, request in requests.items():
            # An answer without a byte in it, such as that to an empty LogAppend, is how one asks for a deletion.
            for reply in (other, "$JS.API.STREAM.DELETE.EVENTS"):
                await client.publish(subject, request.SerializeToString(), reply=reply)
        await flush(client)
        await asyncio.to_thread(wait_until, refused, "every such request is refused")
        await flush(services)
        strange = [
            message for message in heard if machine_pb2.DesiredState.FromString(message.data).machine_id not in other
        ]
        assert strange == []
        after = {stream.name: (await streams.stream_info(stream.name)).created for stream in subjects.STREAMS}
        assert after == before
