"""Throttling of log-ins: guessing is slowed down, and nobody can lock out somebody else.

Three limits, each a moving window: per account and address, per address, and per account over all addresses. The last
would let an attacker with many addresses keep the owner out, so it does not count where the account logged in before.

Counted in memory, per replica: n replicas allow up to n times as much.
"""

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from dantegpu.services.auth.errors import RateLimited
from dantegpu.services.auth.settings import AuthSettings


class LoginThrottle:
    """Counts attempts to log in; see the module for the three limits."""

    def __init__(self, settings: AuthSettings) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._pair = parse(settings.login_limit_per_account_and_address)
        self._address = parse(settings.login_limit_per_address)
        self._account = parse(settings.login_limit_per_account)

    def attempt(self, email: str, address: str, *, address_is_known: bool) -> None:
        """Count one attempt. Raises RateLimited, and then counts nothing: waiting helps."""
        wanted: list[tuple[RateLimitItem, tuple[str, ...]]] = [
            (self._pair, ("pair", email, address)),
            (self._address, ("address", address)),
        ]
        if not address_is_known:
            wanted.append((self._account, ("account", email)))
        for limit, key in wanted:
            if not self._limiter.test(limit, *key):
                reset_at = self._limiter.get_window_stats(limit, *key).reset_time
                # By the library's clock, which made reset_time.
                raise RateLimited(max(1, math.ceil(reset_at - time.time())))
        for limit, key in wanted:
            self._limiter.hit(limit, *key)

    def succeeded(self, email: str, address: str) -> None:
        """A right password: earlier mistakes from there are forgiven."""
        self._limiter.clear(self._pair, "pair", email, address)
