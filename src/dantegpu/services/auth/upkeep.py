"""What has to happen from time to time: rotation of signing keys, removal of rows that nobody will ask for again."""

from datetime import timedelta

from dantegpu.domain.clock import Clock
from dantegpu.kit.db import Database
from dantegpu.kit.idempotency import forget_old
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.services.auth import store
from dantegpu.services.auth.signing import SigningKeys

_KEEP_ENDED_SESSIONS = timedelta(days=30)
"""An expired session still tells the throttle from where its account used to log in."""


class Upkeep:
    """Component. Safe on every replica at once."""

    def __init__(self, db: Database, keys: SigningKeys, clock: Clock, interval_seconds: float) -> None:
        self._db = db
        self._keys = keys
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._wakeup = Wakeup()
        self._tasks = Tasks("auth upkeep")

    async def start(self) -> None:
        self._tasks.loop(self._turn, "turn")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _turn(self) -> None:
        await self._wakeup.wait(self._interval_seconds)
        async with self._db.transaction() as tx:
            await self._keys.rotate(tx)
        async with self._db.transaction() as tx:
            await store.delete_expired_sessions(tx, self._clock.now() - _KEEP_ENDED_SESSIONS)
            await forget_old(tx)
