"""Rate limits: the generic cell rate algorithm, one number per caller. Bounded, and without any timer."""

import math
from collections import OrderedDict
from collections.abc import Callable

MAX_CALLERS = 50_000


class RateLimiter:
    """`burst` requests at once, `per_second` in the long run. `now` is a monotonic clock in seconds.

    Source: ITU-T I.371, "virtual scheduling algorithm".
    """

    def __init__(self, per_second: float, burst: int, now: Callable[[], float]) -> None:
        self._interval = 1.0 / per_second
        self._tolerance = self._interval * (burst - 1)
        self._now = now
        # When the next request of each caller is due; in the order of last use.
        self._due: OrderedDict[str, float] = OrderedDict()

    def take(self, caller: str) -> float:
        """Count one request. Returns 0, or the seconds after which the next one is accepted."""
        now = self._now()
        due = max(self._due.pop(caller, now), now)
        wait = due - now - self._tolerance
        if wait > 1e-9:
            self._due[caller] = due
            return wait
        self._due[caller] = due + self._interval
        while len(self._due) > MAX_CALLERS:
            self._due.popitem(last=False)
        return 0.0


def whole_seconds(wait_seconds: float) -> int:
    """For Retry-After."""
    return max(1, math.ceil(wait_seconds))
