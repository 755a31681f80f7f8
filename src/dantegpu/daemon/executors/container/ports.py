"""Ports of the machine at which jobs' own ports are published: only where, and between which, its owner says.

The engine publishes them. Which one a job gets is decided here, so that a job's wish never leads out of the range.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dantegpu.daemon.executors.base import AttemptRefused
from dantegpu.domain.ports import FIRST_PUBLISHED_PORT, MAX_PORT, Port

EXPECTED = "ADDRESS:FIRST-LAST such as 203.0.113.5:30000-30099, or 0.0.0.0:... for all of its addresses"
_FORM = re.compile(r"([0-9.]+):(\d{1,5})-(\d{1,5})", re.ASCII)

type Pair = tuple[int, int]
"""A port of the job, and the machine's port at which it is published."""


@dataclass(frozen=True, slots=True)
class PublishPolicy:
    """Where jobs' ports may be published, both ends included. `told` is the name that people reach the machine by."""

    address: ipaddress.IPv4Address
    first: int
    last: int
    told: str = ""

    @classmethod
    def parse(cls, text: str, told: str = "") -> "PublishPolicy":
        """Raises ValueError."""
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"expected {EXPECTED}, got {text[:80]!r}")
        address, first, last = ipaddress.IPv4Address(match[1]), int(match[2]), int(match[3])
        if not FIRST_PUBLISHED_PORT <= first <= last <= MAX_PORT:
            raise ValueError(f"ports {first}-{last}: expected a range within {FIRST_PUBLISHED_PORT}-{MAX_PORT}")
        return cls(address, first, last, told or ("" if address.is_unspecified else str(address)))


class HostPorts:
    """Which ports of the range this daemon's attempts have."""

    def __init__(self, policy: PublishPolicy | None) -> None:
        self._policy = policy
        self._taken: set[int] = set()

    def take(self, ports: Sequence[Port]) -> tuple[Pair, ...]:
        """One for each: the one wished for where it may be had, else the first that is free. Raises AttemptRefused."""
        if not ports:
            return ()
        if self._policy is None:
            raise AttemptRefused("this machine's owner lets jobs publish no ports")
        pairs: list[Pair] = []
        # Wishes first: nobody else of this job may have taken the port meanwhile.
        for port in sorted(ports, key=lambda port: not port.wished):
            machine_port = self._choose(self._policy, port.wished)
            if machine_port is None:
                self.give_back(pairs)
                raise AttemptRefused(f"all ports {self._policy.first}-{self._policy.last} of this machine are in use")
            self._taken.add(machine_port)
            pairs.append((port.number, machine_port))
        return tuple(sorted(pairs))

    def _choose(self, policy: PublishPolicy, wished: int) -> int | None:
        among = range(policy.first, policy.last + 1)
        for candidate in ([wished] if wished in among else []) + list(among):
            if candidate not in self._taken and _is_free(policy.address, candidate):
                return candidate
        return None

    def hold(self, pairs: Iterable[Pair]) -> None:
        """An attempt that was found again has these."""
        self._taken |= {machine_port for _, machine_port in pairs}

    def give_back(self, pairs: Iterable[Pair]) -> None:
        """Idempotent."""
        self._taken -= {machine_port for _, machine_port in pairs}


def _is_free(address: ipaddress.IPv4Address, port: int) -> bool:
    """Whether no program of the machine listens there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(address), port))
            probe.listen(1)
        except OSError:
            return False
    return True
