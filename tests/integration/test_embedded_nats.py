"""The embedded nats-server, for real: start, stop, crash, and what a machine may do."""

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StreamConfig

from dantegpu.apps.embedded.errors import DiskFull, FolderInUse, PortTaken
from dantegpu.apps.embedded.nats import EmbeddedNats
from dantegpu.contracts import subjects
from dantegpu.domain.ids import MachineId
from dantegpu.kit.bus import flush
from dantegpu.kit.nats_jwt import NatsTrust, create_trust
from tests.fixtures.servers import NatsForTests

# Fixed, because they show in the names of tests, which every xdist worker has to find alike.
_OWN = MachineId.parse("mach_01h455vb4pex5vsknk084sn02q")
_OTHER = MachineId.parse("mach_01h455vb4pex5vsknk084sn02r")
_PATIENCE_SECONDS = 20.0


@asynccontextmanager
async def _connected(
    url: str, creds: Path, inbox_prefix: str = "_INBOX"
) -> AsyncGenerator[tuple[Client, asyncio.Queue[Exception]]]:
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def on_error(error: Exception) -> None:
        errors.put_nowait(error)

    client = await nats.connect(
        url, user_credentials=str(creds), inbox_prefix=inbox_prefix.encode(), error_cb=on_error, allow_reconnect=False
    )
    try:
        yield client, errors
    finally:
        await client.close()


def _as_machine(server: NatsForTests):
    return _connected(server.url, server.machine_creds(_OWN), subjects.machine_inbox_prefix(_OWN))


@pytest.fixture
async def nats_server(nats_trust: NatsTrust, tmp_path: Path) -> AsyncGenerator[NatsForTests]:
    """One of its own for each test: here the server itself is at stake."""
    server = EmbeddedNats(tmp_path / "nats" / "data", None, nats_trust)
    await server.start()
    yield NatsForTests(server, nats_trust, tmp_path / "nats")
    await server.stop()


async def _add_reports_stream(client: Client) -> None:
    await client.jetstream().add_stream(StreamConfig(name="REPORTS", subjects=[subjects.ALL_REPORTS]))


async def test_two_servers_run_side_by_side_on_free_ports(tmp_path: Path, nats_trust: NatsTrust):
    first, second = (EmbeddedNats(tmp_path / name, None, nats_trust) for name in ("a", "b"))
    try:
        addresses = await asyncio.gather(first.start(), second.start())
        assert addresses[0].port != addresses[1].port
        assert first.pid != second.pid
    finally:
        await asyncio.gather(first.stop(), second.stop())
    assert first.pid is None


async def test_a_stream_survives_restart_and_kill_on_the_same_port(nats_server: NatsForTests):
    server, creds = nats_server.server, nats_server.services_creds
    async with _connected(nats_server.url, creds) as (client, _):
        await _add_reports_stream(client)
        await client.jetstream().publish(subjects.machine_report(_OWN), b"1")
    port = server.address.port
    await server.stop()
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert await server.wait_stopped() == -signal.SIGKILL
    assert (await server.start()).port == port
    async with _connected(nats_server.url, creds) as (client, _):
        assert (await client.jetstream().stream_info("REPORTS")).state.messages == 1


async def test_it_starts_again_after_its_store_was_deleted(nats_server: NatsForTests):
    await nats_server.server.stop()
    shutil.rmtree(nats_server.server.store_path)
    await nats_server.server.start()
    async with _connected(nats_server.url, nats_server.services_creds) as (client, _):
        await _add_reports_stream(client)


async def test_ctrl_c_in_the_terminal_does_not_reach_it(nats_server: NatsForTests):
    assert nats_server.server.pid is not None
    assert os.getsid(nats_server.server.pid) != os.getsid(0)


async def test_a_taken_port_is_named(tmp_path: Path, nats_trust: NatsTrust):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} is taken"):
            await EmbeddedNats(tmp_path / "nats", port, nats_trust).start()


async def test_a_second_platform_on_the_folder_is_refused(nats_server: NatsForTests, nats_trust: NatsTrust):
    intruder = EmbeddedNats(nats_server.server.log_path.parent, None, nats_trust)
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        await intruder.start()
    assert nats_server.server.pid is not None


async def test_too_little_room_is_said_before_starting(tmp_path: Path, nats_trust: NatsTrust):
    with pytest.raises(DiskFull, match="MiB free"):
        await EmbeddedNats(tmp_path / "nats", None, nats_trust, free_bytes_min=1 << 62).start()


async def test_configuration_and_log_are_readable_by_the_owner_only(nats_server: NatsForTests):
    folder = nats_server.server.log_path.parent
    assert [oct(path.stat().st_mode & 0o077) for path in (folder, folder / "nats.conf")] == ["0o0", "0o0"]


async def test_nobody_connects_without_a_users_token(nats_server: NatsForTests):
    with pytest.raises(nats.errors.Error):
        await nats.connect(nats_server.url, allow_reconnect=False)


async def test_a_user_of_another_platform_is_refused(nats_server: NatsForTests, tmp_path: Path):
    stranger = NatsForTests(nats_server.server, create_trust(), tmp_path)
    with pytest.raises(nats.errors.Error, match="Authorization Violation"):
        await nats.connect(nats_server.url, user_credentials=str(stranger.services_creds), allow_reconnect=False)


async def test_an_expired_machine_token_is_refused(nats_server: NatsForTests):
    creds = nats_server.machine_creds(_OWN, datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(nats.errors.Error, match=r"(?i)expired|authorization violation"):
        await nats.connect(nats_server.url, user_credentials=str(creds), allow_reconnect=False)


async def test_a_machine_reports_asks_and_hears_on_its_own_subjects(nats_server: NatsForTests):
    async with (
        _connected(nats_server.url, nats_server.services_creds) as (services, _),
        _as_machine(nats_server) as (machine, errors),
    ):
        await _add_reports_stream(services)

        async def answer(message: Msg) -> None:
            await message.respond(b"desired")

        await services.subscribe(subjects.ALL_SYNCS, cb=answer)
        await flush(services)
        desired = await machine.subscribe(subjects.machine_desired(_OWN))
        await flush(machine)
        await services.publish(subjects.machine_desired(_OWN), b"wake up")

        assert (await machine.jetstream().publish(subjects.machine_report(_OWN), b"r")).stream == "REPORTS"
        assert (await machine.request(subjects.machine_sync(_OWN), b"s", timeout=_PATIENCE_SECONDS)).data == b"desired"
        assert (await desired.next_msg(timeout=_PATIENCE_SECONDS)).data == b"wake up"
        assert errors.empty()


def _publish(subject: str) -> Callable[[Client], Awaitable[object]]:
    return lambda client: client.publish(subject, b"x")


def _subscribe(subject: str) -> Callable[[Client], Awaitable[object]]:
    return lambda client: client.subscribe(subject)


_REFUSED_PUBLISH = [
    subjects.machine_heartbeat(_OTHER),
    subjects.machine_report(_OTHER),
    subjects.machine_sync(_OTHER),
    f"{subjects.machine_inbox_prefix(_OTHER)}.x.y",
    subjects.JOB_SUBMITTED,
    "$JS.API.STREAM.CREATE.EVIL",
    "$JS.API.STREAM.DELETE.REPORTS",
    "$JS.API.STREAM.MSG.GET.REPORTS",
    "$JS.API.CONSUMER.CREATE.REPORTS",
    "$JS.ACK.REPORTS.x.1.1.1.1.1",
    "$SYS.REQ.SERVER.PING",
    "_INBOX.abc",
]
_REFUSED_SUBSCRIBE = [
    ">",
    "*",
    "dante.>",
    "dante.machine.*.desired",
    subjects.ALL_REPORTS,
    subjects.machine_desired(_OTHER),
    subjects.machine_sync(_OTHER),
    f"{subjects.machine_inbox_prefix(_OTHER)}.>",
    "_INBOX.>",
    "$JS.>",
    "$SYS.>",
]


@pytest.mark.parametrize(
    ("action", "subject"),
    [
        *(pytest.param(_publish(name), name, id=f"publish {name}") for name in _REFUSED_PUBLISH),
        *(pytest.param(_subscribe(name), name, id=f"subscribe {name}") for name in _REFUSED_SUBSCRIBE),
    ],
)
async def test_a_machine_is_refused_everything_else(
    nats_server: NatsForTests, action: Callable[[Client], Awaitable[object]], subject: str
):
    async with _as_machine(nats_server) as (machine, errors):
        await action(machine)
        await flush(machine)
        error = await asyncio.wait_for(errors.get(), _PATIENCE_SECONDS)
        assert "permissions violation" in str(error).lower()
        assert subject.lower() in str(error).lower()
