"""A network of its own for each attempt that asks for one: out to the internet, and to nothing that is near.

The engine makes a bridge per attempt. What comes from it is judged by one table of nftables, which is put in place
again before each such network is made; the kernel keeps it, so it holds while no daemon runs. It decides before and
besides the engine's own rules: a packet that one table drops is gone, whatever another one says. No job can change it,
for none has a capability.

Sources: the registries iana-ipv4-special-registry and iana-ipv6-special-registry; nft(8); wiki.nftables.org, "Netfilter
hooks" and "Atomic rule replacement"; Azure's address by learn.microsoft.com, "What is IP address 168.63.129.16".
"""

import asyncio
import ipaddress
import os
import shutil
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dantegpu.daemon.executors.base import AttemptRefused
from dantegpu.daemon.executors.container.engine import Engine, EngineError, EngineFacts
from dantegpu.daemon.executors.container.overlay import MTU, Overlay
from dantegpu.daemon.executors.container.ports import PublishPolicy
from dantegpu.daemon.executors.gang import Gang

type Range = ipaddress.IPv4Network | ipaddress.IPv6Network
type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NEAR4 = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3",
    "168.63.129.16/32",  # of Azure's machines: metadata behind an address that looks public
)  # fmt: skip
FAR6 = "2000::/3"
NEAR6 = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
"""Parts of FAR6 that lead into tunnels or nowhere."""
JOBS = ipaddress.IPv4Network("198.18.0.0/16")
"""Where jobs' own networks are cut from: set aside for tests of equipment, so nobody's network uses it (RFC 2544). The
other half of that range is the gangs'."""
_PREFIX = 28
SUBNETS = 1 << (_PREFIX - JOBS.prefixlen)
_OTHER_TRIES = 8
_NEXT_TRY = 997
"""Another daemon of this machine begins elsewhere in JOBS; where both meet all the same, the engine refuses."""
PUBLIC_RESOLVERS = ("9.9.9.9", "1.1.1.1")
RESOLV_CONF = Path("/etc/resolv.conf")
MAX_RESOLVERS = 3
_TOOL_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"
_TOOL_SECONDS = 10
_TAKEN = ("overlap", "already used", "already exists", "conflicts")


class FilterFailed(AttemptRefused):
    """The rules are not in place, so no job may have a network."""


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """`open`: near ranges that the machine's owner opens to jobs. `resolvers`: asked for names; empty: the machine's
    own where they are public, else public ones. `publish`: where jobs' ports may be published; None: nowhere.
    `site_port`: of the tunnels between machines of the owner's site (UDP); 0: it belongs to none."""

    open: Sequence[Range] = ()
    resolvers: Sequence[Address] = ()
    publish: PublishPolicy | None = None
    site_port: int = 0


class Networks:
    """The networks of one daemon's attempts. `label` is its own among the daemons of the machine."""

    def __init__(self, engine: Engine, label: str, policy: NetworkPolicy) -> None:
        self._engine = engine
        self._policy = policy
        self._label = label
        self._first = int(label, 16)
        self._overlay = Overlay(f"dv{label}", policy.site_port)
        self._gangs: dict[int, Gang] = {}
        """Slot -> the gang whose node is there."""
        self._tool = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:{_TOOL_FOLDERS}") or ""

    @property
    def resolvers(self) -> list[str]:
        """Whom a job's container asks for names."""
        return [str(address) for address in self._policy.resolvers] or public_resolvers(RESOLV_CONF)

    def bridge(self, slot: int) -> str:
        """Of at most 15 characters, and found again by the table's rules."""
        return f"{self._bridges}{slot:03x}"

    @property
    def _bridges(self) -> str:
        return f"dn{self._label}"

    async def problem(self, facts: EngineFacts) -> str:
        """Why jobs can have no network here; empty: they can."""
        if facts.rootless:
            return f"{facts.name} is rootless, and its network cannot be filtered from outside"
        if not self._tool:
            return "nftables is missing, which keeps jobs off private networks: apt-get install nftables"
        if not await asyncio.to_thread(same_network, self._engine.socket):
            return f"{facts.name} is in another network than the daemon, which could not filter it"
        try:
            await self._nft("--check")
        except FilterFailed as error:
            return str(error)
        return ""

    async def gang_problem(self) -> str:
        """Why the nodes of a gang cannot reach one another from here, where jobs have a network; empty: they can."""
        return await self._overlay.problem() if self._policy.site_port else "its owner names no site"

    def know(self, slot: int, gang: Gang) -> None:
        """An attempt that was found again is a node of this gang."""
        self._gangs[slot] = gang

    async def make_shared(self, name: str, slot: int, labels: Mapping[str, str], gang: Gang) -> None:
        """The network of one node of a gang, connected with the others'. Raises AttemptRefused."""
        for address in gang.machines:
            try:
                ipaddress.IPv4Address(address)
            except ValueError:
                raise AttemptRefused(f"{address!r} is no IPv4 address of a machine, which a site needs") from None
        self._gangs[slot] = gang
        await self._nft()
        if not await self._engine.network(name):
            try:
                await self._engine.create_network(
                    name, self.bridge(slot), str(gang.subnet), labels, gateway=gang.gateway, mtu=MTU
                )
            except EngineError as error:
                raise AttemptRefused(f"no network could be made for the job's nodes: {error.message}") from error
        await self._overlay.make(slot, self.bridge(slot), gang)

    async def make(self, name: str, slot: int, labels: Mapping[str, str]) -> str:
        """A network called `name` behind the filter; one that is there already is used again. Raises AttemptRefused."""
        await self._nft()
        for number in range(_OTHER_TRIES):
            index = (self._first + slot + number * _NEXT_TRY) % SUBNETS
            subnet = ipaddress.IPv4Network((int(JOBS.network_address) + (index << (32 - _PREFIX)), _PREFIX))
            if await self._engine.network(name):
                return name
            try:
                await self._engine.create_network(name, self.bridge(slot), str(subnet), labels)
            except EngineError as error:
                if not any(word in error.message.lower() for word in _TAKEN):
                    raise AttemptRefused(f"no network could be made for the job: {error.message}") from error
            else:
                return name
        raise AttemptRefused(f"no network could be made for the job: all of {_OTHER_TRIES} parts of {JOBS} are in use")

    async def hold(self) -> None:
        """Put the rules back, should somebody have flushed them while no daemon looked. Raises FilterFailed."""
        await self._nft()

    async def remove(self, name: str) -> None:
        """Idempotent. The table stays: another attempt may need it, and without bridges it judges nothing."""
        await self._engine.remove_network(name)

    async def leave(self, slot: int) -> None:
        """Nothing of the gang's node that was there is left. Idempotent."""
        if self._gangs.pop(slot, None) is not None:
            await self._overlay.remove(slot, self.bridge(slot))

    async def sweep(self, slots: Iterable[int]) -> None:
        """Remove the tunnels of all slots but these."""
        await self._overlay.sweep(slots)

    async def _nft(self, *options: str) -> None:
        process = await asyncio.create_subprocess_exec(
            self._tool, *options, "-f", "-",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(_TOOL_SECONDS):
            said, _ = await process.communicate(self.rules().encode())
        if process.returncode != 0:
            first = said.decode(errors="replace").strip().partition("\n")[0] or f"exit code {process.returncode}"
            raise FilterFailed(f"the rules that keep jobs off private networks cannot be set: nft says {first[:120]!r}")

    def rules(self) -> str:
        """The whole table, exchanged in one step: there is no moment without it."""
        table = f"inet dante_{self._label}"
        opened = {version: [str(it) for it in self._policy.open if it.version == version] for version in (4, 6)}
        near = {4: NEAR4, 6: NEAR6}
        sets = [_set(f"near{version}", f"ipv{version}_addr", near[version]) for version in (4, 6)]
        sets += [_set(f"open{version}", f"ipv{version}_addr", opened[version]) for version in (4, 6)]
        separator = "\n    "
        # Only where bridges are filtered too (br_netfilter) does what stays on one come here.
        inside = separator.join(
            f'    iifname "{self.bridge(slot)}" oifname "{self.bridge(slot)}" accept' for slot in sorted(self._gangs)
        )
        port = self._policy.site_port
        no_tunnel = f"udp dport {port} reject with icmpx type admin-prohibited" if port else ""
        bridges = f'"{self._bridges}*"'
        # Only the engine sends packets for its own address elsewhere: to the ports that it publishes.
        published = f"oifname {bridges} ct status dnat accept" if self._policy.publish is not None else ""
        return f"""
table {table}
delete table {table}
table {table} {{
    {separator.join(sets)}
    chain out {{
        {no_tunnel}
        ct state established accept
        ip daddr @open4 accept
        ip6 daddr @open6 accept
        ip daddr @near4 reject with icmpx type admin-prohibited
        ip6 daddr @near6 reject with icmpx type admin-prohibited
        ip6 daddr != {FAR6} reject with icmpx type admin-prohibited
    }}
    chain forward {{
        type filter hook forward priority -10; policy accept;
    {inside}
        iifname {bridges} jump out
        oifname {bridges} ct state established,related accept
        {published}
        oifname {bridges} drop
    }}
    chain input {{
        type filter hook input priority -10; policy accept;
        iifname {bridges} ct state established accept
        iifname {bridges} ip daddr @open4 accept
        iifname {bridges} reject with icmpx type admin-prohibited
    }}
}}
{self._tunnel_rules()}"""

    def _tunnel_rules(self) -> str:
        """Tunnels are heard only from the gangs' machines. One table for all daemons of the machine, as one that knew
        only its own would drop the others'. It forgets no machine: all are of sites that an owner trusts."""
        machines = sorted({address for gang in self._gangs.values() for address in gang.machines})
        if not machines:
            return ""
        port = self._policy.site_port
        table = f"inet dante_site_{port}"
        return f"""
add table {table}
add set {table} machines {{ type ipv4_addr; }}
add chain {table} input {{ type filter hook input priority -10; policy accept; }}
flush chain {table} input
add rule {table} input udp dport {port} ip saddr != @machines drop
add element {table} machines {{ {", ".join(machines)} }}
"""


def _set(name: str, kind: str, ranges: Sequence[str]) -> str:
    elements = f" elements = {{ {', '.join(ranges)} }};" if ranges else ""
    return f"set {name} {{ type {kind}; flags interval; auto-merge;{elements} }}"


def same_network(engine_socket: Path) -> bool:
    """Whether who listens there is in the daemon's own network namespace: only there do our rules see its bridges."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
            client.connect(str(engine_socket))
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        theirs, ours = os.stat(f"/proc/{pid}/ns/net"), os.stat("/proc/thread-self/ns/net")
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def public_resolvers(path: Path) -> list[str]:
    """The machine's own resolvers as far as jobs reach them; public ones where that is none of them."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        lines = []
    found: list[str] = []
    for words in lines:
        if words[:1] != ["nameserver"] or len(words) < 2:
            continue
        try:
            address = ipaddress.IPv4Address(words[1])
        except ValueError:
            continue  # a job's network has no IPv6
        if not any(address in ipaddress.IPv4Network(near) for near in NEAR4):
            found.append(str(address))
    return found[:MAX_RESOLVERS] or list(PUBLIC_RESOLVERS)
