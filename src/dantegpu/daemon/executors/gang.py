"""The network that the nodes of a gang share inside one site: who has which address in it, known to all without asking.

Everything follows from the gang's number, which the platform chooses anew for each attempt, and from a node's rank.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

RANKS_BITS = 6
MAX_NODES = 1 << RANKS_BITS
GANGS = ipaddress.IPv4Network("198.19.0.0/16")
"""Where gangs' networks are cut from: the half of RFC 2544's range that jobs' own networks leave free."""


@dataclass(frozen=True, slots=True)
class Gang:
    """One node's view. `number` has 24 bits, the last six zero; `machines` are the machines' addresses by rank."""

    number: int
    rank: int
    machines: tuple[str, ...]

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        """A node's address and its machine's for each rank, from both ends. Two gangs of a machine hardly share one."""
        bits = max(4, (2 * len(self.machines) + 1).bit_length())
        count = 1 << (GANGS.max_prefixlen - GANGS.prefixlen - bits)
        first = int(GANGS.network_address) + ((self.number >> RANKS_BITS) % count << bits)
        return ipaddress.IPv4Network((first, 32 - bits))

    def address(self, rank: int) -> str:
        """Of a node in the network."""
        return str(self.subnet[1 + rank])

    @property
    def gateway(self) -> str:
        """Of this node's machine in the network: each has its own, so none answers for another."""
        return str(self.subnet[-2 - self.rank])

    @staticmethod
    def mac(rank: int) -> str:
        """Of a node: locally administered."""
        return f"02:d9:00:00:00:{rank:02x}"

    def vni(self, rank: int) -> int:
        """Of a node's end of the tunnels: another one for each, so two nodes may share a machine's address."""
        return self.number | rank

    @property
    def addresses(self) -> list[str]:
        return [self.address(rank) for rank in range(len(self.machines))]

    @property
    def others(self) -> Sequence[int]:
        """Ranks of the other nodes."""
        return [rank for rank in range(len(self.machines)) if rank != self.rank]
