"""How long each attempt may still run, on a file that a daemon killed a moment ago has left for the next one.

Rule I6: a machine ends its attempt at (renewal sent + lease - margin), by a clock that also runs while the machine
sleeps. The file needs no fsync: after a reboot nothing runs any more.

The nodes of a cluster read it too (`executors.slurm.fence`): by other clocks, so they compare and never convert.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dantegpu.daemon.executors.processes import boot_id

LEASES = "leases.json"
"""In the daemon's state folder."""
MARGIN_FRACTION = 0.2
MAX_MARGIN_SECONDS = 5.0


def boottime() -> float:
    """Seconds since boot, time asleep included: a suspended laptop must not think that its leases still run."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def lease_until(sent_at: float, lease_ms: int) -> float:
    """When the attempt must be dead. `sent_at`: boot clock when the renewal was asked for, not when it was answered."""
    lease_seconds = lease_ms / 1000
    return sent_at + lease_seconds - min(MAX_MARGIN_SECONDS, lease_seconds * MARGIN_FRACTION)


class ServerClock:
    """Relates the server's clock to this machine's boot clock, by the last sync.

    The server stamped its answer at some moment after the sync was sent, so counting from the sending can only make a
    push look older than it is, never younger.
    """

    def __init__(self) -> None:
        self._reference: tuple[float, int] | None = None

    def synced(self, sent_at: float, server_time_us: int) -> None:
        """Note the answer to a sync that was sent at `sent_at` (boot clock)."""
        if server_time_us:
            self._reference = (sent_at, server_time_us)

    def boot_time_of(self, server_time_us: int, now: float) -> float | None:
        """The earliest boot-clock second at which the server's clock can have shown this, at most `now`.

        None: nobody can know, before the first sync.
        """
        if self._reference is None or not server_time_us:
            return None
        sent_at, known_us = self._reference
        return min(now, sent_at + (server_time_us - known_us) / 1_000_000)


class LeaseFile:
    """Attempt id -> boot-clock second. Unreadable, or of another boot: every lease is over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot = boot_id()
        self._written: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        try:
            raw = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return raw["leases"] if raw.get("boot") == self._boot else {}

    def write(self, leases: Mapping[str, float], now: float) -> None:
        """`now`: boot clock. Raises OSError."""
        if leases == self._written:
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.write_text(json.dumps({"boot": self._boot, "at": now, "wall": time.time(), "leases": dict(leases)}))
        fresh.rename(self._path)
        self._written = dict(leases)


@dataclass(frozen=True, slots=True)
class Renewal:
    """A lease as another machine finds it in the file."""

    mark: str
    """Of this renewal and no other; what it says is the clock of the daemon's machine."""
    rest_seconds: float
    """How long the lease ran on when it was written down."""
    age_seconds: float
    """Since then by the clock on the wall: wrong by as much as the clocks of both machines differ."""


def read_renewal(path: Path, attempt_id: str) -> Renewal | None:
    """None when the file does not name it. Raises OSError."""
    # Opened anew each time: then a network file system asks its server whether what it remembers still holds.
    raw = json.loads(path.read_text())
    until = raw["leases"].get(attempt_id)
    if until is None:
        return None
    return Renewal(f"{until} of boot {raw['boot']}", until - raw["at"], time.time() - raw["wall"])
