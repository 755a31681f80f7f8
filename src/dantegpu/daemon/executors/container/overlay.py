"""The tunnels (VXLAN) that make one network of the bridges of a gang's nodes, on whichever machines of a site they are.

Each node's bridge gets a VXLAN device that knows where every other node is: nothing is learned and nothing is asked,
so nobody else can slip in by saying that an address is theirs. What arrives is taken only from the gangs' own machines
(see the table in `network`). The tunnels are not encrypted: a site is a network that its owner trusts.

Sources: RFC 7348; ip-link(8) and bridge(8), `vxlan` and `fdb`.
"""

import asyncio
import os
import shutil
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from dantegpu.daemon.executors.base import AttemptRefused
from dantegpu.daemon.executors.gang import Gang

MTU = 1400
"""Of a gang's network: what a packet may have so that it fits into a tunnel on any usual network."""
_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"
_SECONDS = 10
_BRIDGES_FILTERED = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


class Overlay:
    """The ends of tunnels on this machine. `prefix` is that of their names; `port` the UDP port of the whole site."""

    def __init__(self, prefix: str, port: int) -> None:
        self.port = port
        self._prefix = prefix
        path = f"{os.environ.get('PATH', '')}:{_FOLDERS}"
        self._ip, self._bridge, self._iptables = (
            shutil.which(name, path=path) or "" for name in ("ip", "bridge", "iptables")
        )

    async def problem(self) -> str:
        """Why no tunnels can be made here; empty: they can."""
        if not self._ip or not self._bridge:
            return "iproute2 is missing, which connects machines of a site: apt-get install iproute2"
        trial = f"{self._prefix}try"
        try:
            await self._run(self._ip, [f"link add {trial} type vxlan id 1 dstport {self.port}", f"link del {trial}"])
        except AttemptRefused as error:
            return f"machines of a site cannot be connected: {error}"
        return ""

    async def make(self, slot: int, bridge: str, gang: Gang) -> None:
        """Connect `bridge` with those of the other nodes. Made again from the start when there is one. Raises
        AttemptRefused."""
        device = self._device(slot)
        await self.remove(slot, bridge)
        if not _exists(bridge):
            # Podman makes it with the first container only, and takes one that is there.
            await self._run(self._ip, [f"link add {bridge} type bridge"])
        tunnel = f"vxlan id {gang.vni(gang.rank)} dstport {self.port} local {gang.machines[gang.rank]} nolearning"
        await self._run(self._ip, [
            f"link add {device} mtu {MTU} type {tunnel}",
            f"link set {device} master {bridge}",
            f"link set {bridge} mtu {MTU} up",
            f"link set {device} up",
        ])  # fmt: skip
        await self._run(self._bridge, [
            f"fdb append {mac} dev {device} dst {gang.machines[rank]} vni {gang.vni(rank)} port {self.port}"
            for rank in gang.others
            for mac in ("00:00:00:00:00:00", gang.mac(rank))
        ])  # fmt: skip
        if self._iptables and _bridges_are_filtered():
            # Docker says so of its bridges by itself. With Podman, a policy to drop would keep the others from a node.
            await self._accept("-D", bridge)
            await self._accept("-I", bridge)

    async def _accept(self, command: str, bridge: str) -> None:
        """Let pass what stays on the bridge. That a rule to delete is not there is no error."""
        process = await asyncio.create_subprocess_exec(
            self._iptables, "-w", command, "FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(_SECONDS):
            await process.wait()

    async def remove(self, slot: int, bridge: str) -> None:
        """Idempotent."""
        if _exists(device := self._device(slot)):
            await self._run(self._ip, [f"link del {device}"])
            if self._iptables and _bridges_are_filtered():
                await self._accept("-D", bridge)

    async def sweep(self, slots: Iterable[int]) -> None:
        """Remove all ends but those of these slots."""
        kept = {self._device(slot) for slot in slots}
        for _, name in socket.if_nameindex():
            if name.startswith(self._prefix) and name not in kept:
                await self._run(self._ip, [f"link del {name}"])

    def _device(self, slot: int) -> str:
        return f"{self._prefix}{slot:03x}"

    @staticmethod
    async def _run(tool: str, lines: Sequence[str]) -> None:
        process = await asyncio.create_subprocess_exec(
            tool, "-batch", "-",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(_SECONDS):
            said, _ = await process.communicate("\n".join([*lines, ""]).encode())
        if process.returncode != 0:
            first = said.decode(errors="replace").strip().partition("\n")[0]
            raise AttemptRefused(f"the tunnels between the job's nodes cannot be made: {first[:120]!r}")


def _bridges_are_filtered() -> bool:
    """Whether what stays on a bridge passes the machine's filter all the same (br_netfilter)."""
    try:
        return _BRIDGES_FILTERED.read_text().strip() == "1"
    except OSError:
        return False


def _exists(device: str) -> bool:
    return any(name == device for _, name in socket.if_nameindex())
