"""Ports that a job with an image publishes: `8080`, or `9000:8080` where the machine's port 9000 is wished for.

The forms are Docker's (`HOST:CONTAINER`) and dstack's (`*:8080` is `8080`). TCP only.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_PORT = 65_535
MAX_PORTS = 16
"""Of one job."""
FIRST_PUBLISHED_PORT = 1024
EXPECTED = "a port of the job such as 8080, or MACHINE:JOB such as 9000:8080"

_FORM = re.compile(r"(?:(\*|\d{1,5}):)?(\d{1,5})(?:/(\w+))?", re.ASCII)


class InvalidPort(ValueError):
    """This is no port that a job can publish. `expected` shows what would be right."""

    expected = EXPECTED


@dataclass(frozen=True, slots=True)
class Port:
    """`number` is what the job listens on; `wished` the machine's port that its submitter would like, 0: any."""

    number: int
    wished: int = 0

    @classmethod
    def parse(cls, value: object) -> "Port":
        """Raises InvalidPort."""
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        match = _FORM.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise InvalidPort(f"expected {EXPECTED}, got {str(value)[:40]!r}")
        wished, number, protocol = match.groups()
        if protocol not in (None, "tcp"):
            raise InvalidPort(f"only TCP ports can be published, not {protocol!r}; expected {EXPECTED}")
        port = cls(int(number), int(wished) if wished not in (None, "*") else 0)
        if not 1 <= port.number <= MAX_PORT or port.wished > MAX_PORT:
            raise InvalidPort(f"a port is a number from 1 to {MAX_PORT}, got {str(value)[:40]!r}")
        if 0 < port.wished < FIRST_PUBLISHED_PORT:
            raise InvalidPort(f"no machine publishes below port {FIRST_PUBLISHED_PORT}; leave {port.wished} out")
        return port

    def __str__(self) -> str:
        return f"{self.wished}:{self.number}" if self.wished else str(self.number)


def parse_ports(values: Iterable[object]) -> list[Port]:
    """Raises InvalidPort."""
    ports = [Port.parse(value) for value in values]
    if len(ports) > MAX_PORTS:
        raise InvalidPort(f"{len(ports)} ports, a job publishes at most {MAX_PORTS}")
    for numbers in ([port.number for port in ports], [port.wished for port in ports if port.wished]):
        if doubled := sorted({number for number in numbers if numbers.count(number) > 1}):
            raise InvalidPort(f"port {doubled[0]} comes twice")
    return ports
