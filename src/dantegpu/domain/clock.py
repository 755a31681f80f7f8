"""Time as an argument: wall time is aware UTC, durations come from a monotonic clock."""

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """What everything outside the pure core asks for the time."""

    def now(self) -> datetime:
        """The wall time, aware, UTC. It may step; never subtract two of these to fence something."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...


class SystemClock:
    """The machine's clocks."""

    __slots__ = ()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told. `step` moves the wall time alone, as NTP or an operator does."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        if start.tzinfo is None:
            raise ValueError("a clock starts at an aware datetime")
        self._now = start.astimezone(UTC)
        self._monotonic_seconds = 0.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic_seconds

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks. Raises ValueError for a negative number."""
        if seconds < 0:
            raise ValueError("time passes forwards; use step() for a clock that was set back")
        self._now += timedelta(seconds=seconds)
        self._monotonic_seconds += seconds

    def step(self, seconds: float) -> None:
        """Set the wall clock forwards or back without time passing."""
        self._now += timedelta(seconds=seconds)
