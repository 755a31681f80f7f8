"""The network of a job with an image: a small internet in network namespaces, and what a job reaches of it."""

import asyncio
import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import AttemptRefused, AttemptSpec, Handle, Published
from dantegpu.daemon.executors.container import ContainerExecutor
from dantegpu.daemon.executors.container.network import NetworkPolicy, public_resolvers
from dantegpu.daemon.executors.container.ports import PublishPolicy
from dantegpu.daemon.executors.gang import Gang
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.ports import Port
from tests.fixtures.containers import ContainerServer, start_docker
from tests.fixtures.executors import Bench, ContainerKind, a_job, a_python_job, container_limits
from tests.fixtures.namespaces import a_namespace, ip, listen, run_in

PORT = 8080
MACHINE, ROUTER, INTERNET, OPENED = "5.5.5.2", "5.5.5.1", "9.9.9.9", "10.200.0.1"
NEAR = ("10.9.0.1", "172.20.0.1", "192.168.7.1", "100.100.0.1", "169.254.169.254", "168.63.129.16", "198.51.100.7")

PROBE = """
import json, socket, sys

def reach(address, port="8080"):
    try:
        socket.create_connection((address, int(port)), 2).close()
    except OSError as error:
        return type(error).__name__
    return "reached"

print(json.dumps({to: reach(*to.split(":")) for to in sys.argv[1:]}))
"""
LISTENER = """
import socket, time
server = socket.create_server(("0.0.0.0", 8080))
way = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
way.connect(("9.9.9.9", 9))
print("address", way.getsockname()[0], "listens", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Around:
    """The engines' namespace, which is the machine, and a router behind which everything else is."""

    machine: str
    listening: list[socket.socket]

    def reached_from_the_machine(self) -> set[str]:
        addresses = (INTERNET, OPENED, *NEAR, MACHINE)
        return {address for address in addresses if run_in(self.machine, lambda a=address: _connects(a))}


def _connects(address: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, PORT), 2):
        return True
    return False


@pytest.fixture
def router() -> Iterator[str]:
    yield from a_namespace(f"dante-router-{os.getpid()}")


@pytest.fixture
def around(engine_namespace: str, router: str) -> Iterator[Around]:
    ip("link", "add", "up0", "netns", engine_namespace, "type", "veth", "peer", "name", "down0", "netns", router)
    for name, link, address in ((engine_namespace, "up0", MACHINE), (router, "down0", ROUTER)):
        ip("-n", name, "address", "add", f"{address}/24", "dev", link)
        ip("-n", name, "link", "set", link, "up")
    for address in (INTERNET, OPENED, *NEAR):
        ip("-n", router, "address", "add", f"{address}/32", "dev", "lo")
    ip("-n", engine_namespace, "route", "add", "default", "via", ROUTER)
    servers = [run_in(name, lambda: listen(PORT)) for name in (engine_namespace, router)]
    yield Around(engine_namespace, servers)
    for server in servers:
        server.close()
    ip("-n", engine_namespace, "link", "del", "up0")


class Networked(ContainerKind):
    """The owner lets jobs out, and opens one private address to them."""

    def make(self, folder: Path) -> ContainerExecutor:
        policy = NetworkPolicy((ipaddress.ip_network(f"{OPENED}/32"),))
        return ContainerExecutor(Workspace(folder), self.socket, container_limits(network=policy))


PUBLISHED = (30_000, 30_001)
SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 8080))
print("listens", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"here I am")
    connection.close()
"""


class Publishing(ContainerKind):
    """The owner lets jobs publish at one address of the machine, between two ports."""

    def make(self, folder: Path) -> ContainerExecutor:
        publish = PublishPolicy.parse(f"{MACHINE}:{PUBLISHED[0]}-{PUBLISHED[1]}")
        return ContainerExecutor(
            Workspace(folder), self.socket, container_limits(network=NetworkPolicy(publish=publish))
        )


def heard(address: str, port: int) -> bytes:
    """What whoever answers there says; nothing, if nobody does."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 2) as connection:
        return connection.recv(100)
    return b""


def bridges() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith("dn")]


@pytest.mark.needs("nft")
def test_a_job_reaches_the_internet_and_nothing_near_and_leaves_no_network(
    container_kind: ContainerKind, around: Around, short_dir: Path
):
    async def scenario() -> tuple[dict[str, str], list[list[str]]]:
        bench = Bench(Networked(container_kind.socket), short_dir / "data")
        assert (await bench.executor.probe()).network
        other = await bench.start(a_python_job(LISTENER, network=True))
        beside = (await bench.until_logged(other, "listens")).split()[1]
        asked = (INTERNET, OPENED, MACHINE, beside, f"{beside.rpartition('.')[0]}.{gateway_of(beside)}", *NEAR)
        _, text = await bench.run(a_job("python3", "-c", PROBE, *asked, network=True))
        seen = [bridges()]
        # A daemon that was killed in between leaves its network behind, for the next one to sweep.
        await bench.executor.close()
        after = Networked(container_kind.socket).make(short_dir / "data")
        await after.sweep(set())
        await after.close()
        return json.loads(text), [*seen, bridges()]

    def gateway_of(address: str) -> int:
        return int(address.rpartition(".")[2]) // 16 * 16 + 1

    assert around.reached_from_the_machine() == {INTERNET, OPENED, *NEAR, MACHINE}
    reached, seen = run_in(around.machine, lambda: asyncio.run(scenario()))
    assert {address for address, result in reached.items() if result == "reached"} == {INTERNET, OPENED}
    assert [len(names) for names in seen] == [1, 0]


@pytest.mark.needs("nft")
def test_a_published_port_is_reached_where_the_owner_says_and_by_no_other_job(
    container_kind: ContainerKind, around: Around, router: str, short_dir: Path
):
    kind, folder = Publishing(container_kind.socket), short_dir / "data"

    async def scenario() -> None:
        bench = Bench(kind, folder)
        assert (await bench.executor.probe()).ports
        wishing = await bench.start(a_python_job(SERVER, network=True, ports=(Port(8080, PUBLISHED[1]),)))
        wishing_too = await bench.start(a_python_job(SERVER, network=True, ports=(Port(8080, PUBLISHED[1]),)))
        await bench.until_logged(wishing, "listens")
        assert bench.executor.published(wishing) == [Published(8080, MACHINE, PUBLISHED[1])]
        assert bench.executor.published(wishing_too) == [Published(8080, MACHINE, PUBLISHED[0])]
        with pytest.raises(AttemptRefused, match="30000-30001 of this machine are in use"):
            await bench.prepare(a_job("true", network=True, ports=(Port(8080),)))
        assert run_in(router, lambda: heard(MACHINE, PUBLISHED[1])) == b"here I am"
        assert heard("127.0.0.1", PUBLISHED[1]) == b""
        _, text = await bench.run(a_job("python3", "-c", PROBE, f"{MACHINE}:{PUBLISHED[1]}", network=True))
        assert "reached" not in json.loads(text).values()
        # The next daemon knows who has which port, and gives it to nobody else before that one has ended.
        await bench.executor.close()
        after = Bench(kind, folder)
        await after.executor.adopt(wishing)
        with pytest.raises(AttemptRefused, match="are in use"):
            await after.prepare(a_job("true", network=True, ports=(Port(8080),)))
        assert run_in(router, lambda: heard(MACHINE, PUBLISHED[1])) == b"here I am"
        await after.executor.destroy(wishing)
        again = await after.prepare(a_job("true", network=True, ports=(Port(8080),)))
        assert [it.machine_port for it in after.executor.published(again)] == [PUBLISHED[1]]
        await after.executor.sweep(set())
        await after.executor.close()

    run_in(around.machine, lambda: asyncio.run(scenario()))


@pytest.mark.needs("nft")
async def test_an_engine_in_another_network_than_the_daemon_gives_jobs_none(
    container_kind: ContainerKind, short_dir: Path
):
    executor = Networked(container_kind.socket).make(short_dir / "data")
    capabilities = await executor.probe()
    assert not capabilities.network
    assert "in another network than the daemon" in capabilities.missing["network"]
    with pytest.raises(AttemptRefused, match="in another network"):
        await executor.prepare(container_kind.fit(a_job("true", network=True)))
    await executor.close()


def test_a_job_asks_only_resolvers_that_it_can_reach(tmp_path: Path):
    path = tmp_path / "resolv.conf"
    path.write_text("search lan\nnameserver 192.168.1.1\nnameserver fe80::1\nnameserver 8.8.4.4\n")
    assert public_resolvers(path) == ["8.8.4.4"]
    path.write_text("nameserver 127.0.0.53\n")
    assert public_resolvers(path) == ["9.9.9.9", "1.1.1.1"]


OTHER = "5.5.5.3"
SITE_PORT = 47_890
NODE = """
import socket, sys, time
mine, others = sys.argv[1], sys.argv[2:]
server = socket.create_server((mine, 29500))
print("mine", mine, flush=True)
for other in others:
    while True:
        try:
            talk = socket.create_connection((other, 29500), 2)
            break
        except OSError:
            time.sleep(0.05)
    talk.sendall(bytes(200_000))
    talk.shutdown(socket.SHUT_WR)
for _ in others:
    talk, peer = server.accept()
    got = 0
    while data := talk.recv(65536):
        got += len(data)
    print("heard", peer[0], got, flush=True)
time.sleep(600)
"""


class InASite(ContainerKind):
    """The owner has put the machine into a site."""

    def make(self, folder: Path) -> ContainerExecutor:
        return ContainerExecutor(
            Workspace(folder), self.socket, container_limits(network=NetworkPolicy(site_port=SITE_PORT))
        )


@pytest.fixture
def other_machine(around: Around, router: str, image_archive: Path) -> Iterator[ContainerServer]:
    """A second machine with a Docker of its own, on the same network as the first."""
    for name in a_namespace(f"dante-other-{os.getpid()}"):
        # The router becomes the switch between them.
        ip("-n", router, "link", "add", "sw0", "type", "bridge")
        ip("link", "add", "up1", "netns", name, "type", "veth", "peer", "name", "down1", "netns", router)
        ip("-n", router, "address", "del", f"{ROUTER}/24", "dev", "down0")
        for port in ("down0", "down1"):
            ip("-n", router, "link", "set", port, "master", "sw0", "up")
        ip("-n", router, "address", "add", f"{ROUTER}/24", "dev", "sw0")
        ip("-n", router, "link", "set", "sw0", "up")
        ip("-n", name, "address", "add", f"{OTHER}/24", "dev", "up1")
        ip("-n", name, "link", "set", "up1", "up")
        ip("-n", name, "route", "add", "default", "via", ROUTER)
        server = start_docker(namespace=name)
        server.load(image_archive)
        yield server
        server.stop()


def other_namespace() -> str:
    return f"dante-other-{os.getpid()}"


@pytest.mark.needs("nft")
def test_the_nodes_of_a_gang_on_two_machines_reach_one_another_and_nobody_else_does(
    container_kind: ContainerKind, around: Around, other_machine: ContainerServer, short_dir: Path
):
    machines, number = (MACHINE, OTHER), 5 << 6
    here, there = InASite(container_kind.socket), InASite(other_machine.socket)

    def node(bench: Bench, rank: int) -> Handle:
        gang = Gang(number, rank, machines)
        command = ("python3", "-c", NODE, gang.address(rank), *(gang.address(other) for other in gang.others))
        return asyncio.run(started(bench, a_job(*command, network=True, gang=gang)))

    async def started(bench: Bench, spec: AttemptSpec) -> Handle:
        assert (await bench.executor.probe()).gangs
        handle = await bench.start(spec)
        await bench.executor.close()
        return handle

    async def heard_by(bench: Bench, handle: Handle) -> str:
        return (await bench.until_logged(handle, "heard")).splitlines()[-1]

    async def alone(bench: Bench) -> dict[str, str]:
        nodes = [f"{Gang(number, 0, machines).address(rank)}:29500" for rank in (0, 1)]
        _, text = await bench.run(a_job("python3", "-c", PROBE, *nodes, network=True))
        await bench.executor.close()
        return json.loads(text)

    async def gone(bench: Bench) -> list[str]:
        await bench.executor.sweep(set())
        await bench.executor.close()
        return [name for _, name in socket.if_nameindex() if name.startswith(("dn", "dv"))]

    first, second = Bench(here, short_dir / "a"), Bench(there, short_dir / "b")
    one = run_in(around.machine, lambda: node(first, 0))
    two = run_in(other_namespace(), lambda: node(second, 1))
    gang = Gang(number, 0, machines)
    assert asyncio.run(heard_by(first, one)) == f"heard {gang.address(1)} 200000"
    assert asyncio.run(heard_by(second, two)) == f"heard {gang.address(0)} 200000"
    stranger = Bench(here, short_dir / "c")
    reached = run_in(around.machine, lambda: asyncio.run(alone(stranger)))
    assert "reached" not in reached.values()
    assert run_in(around.machine, lambda: asyncio.run(gone(Bench(here, short_dir / "a")))) == []
    assert run_in(other_namespace(), lambda: asyncio.run(gone(Bench(there, short_dir / "b")))) == []
