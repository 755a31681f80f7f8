"""One leader among the replicas of a service, by a lease in PostgreSQL with a fencing epoch."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import structlog

from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import Unavailable
from dantegpu.kit.lifecycle import Tasks

log = structlog.get_logger(__name__)

LEASE_SECONDS = 5.0
RENEW_SECONDS = 1.5


class LostLeadership(Exception):
    """Another replica holds the lease now; whatever this one was about to commit must not be."""


class Leadership:
    """Campaigns for the lease `name`; while it holds it, `lead(epoch)` runs.

    `lead` is cancelled when the lease is lost. What it commits must call `assert_held(tx)` first: that is the fence,
    cancellation alone would come too late for a process that was stopped in mid-transaction.
    """

    def __init__(self, db: Database, name: str, lead: Callable[[int], Awaitable[None]]) -> None:
        self._db = db
        self._name = name
        self._lead = lead
        self._holder = uuid.uuid4()
        self._epoch = 0
        self._tasks = Tasks(f"leader {name}")

    @property
    def epoch(self) -> int:
        return self._epoch

    async def start(self) -> None:
        self._tasks.loop(self._campaign, "campaign")

    async def stop(self) -> None:
        await self._tasks.stop()
        try:
            async with self._db.transaction() as tx:
                await tx.run(
                    "UPDATE leader SET expires_at = now() WHERE name = %(name)s AND holder = %(holder)s",
                    name=self._name, holder=self._holder,
                )  # fmt: skip
        except Unavailable as error:
            log.warning("leadership_not_released", lease=self._name, error=error.message)  # it runs out by itself

    async def assert_held(self, tx: Tx) -> None:
        """Raises LostLeadership unless this epoch is the current one. Keeps a successor out until `tx` ends."""
        epoch = await tx.value(
            "SELECT epoch FROM leader WHERE name = %(name)s AND holder = %(holder)s FOR SHARE",
            name=self._name, holder=self._holder,
        )  # fmt: skip
        if epoch is None or epoch != self._epoch:
            raise LostLeadership(self._name)

    async def _acquire(self) -> bool:
        async with self._db.transaction() as tx:
            epoch = await tx.value(
                "INSERT INTO leader AS l (name, holder, epoch, expires_at)"
                " VALUES (%(name)s, %(holder)s, 1, now() + make_interval(secs => %(lease)s))"
                " ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at,"
                "   epoch = l.epoch + CASE WHEN l.holder = excluded.holder THEN 0 ELSE 1 END"
                " WHERE l.holder = excluded.holder OR l.expires_at <= now() RETURNING epoch",
                name=self._name, holder=self._holder, lease=LEASE_SECONDS,
            )  # fmt: skip
        if epoch is None:
            return False
        self._epoch = epoch
        return True

    async def _campaign(self) -> None:
        if not await self._acquire():
            await asyncio.sleep(RENEW_SECONDS)
            return
        epoch = self._epoch
        log.info("leadership_won", lease=self._name, epoch=epoch)
        leading = asyncio.ensure_future(self._lead(epoch))
        try:
            while not leading.done():
                await asyncio.wait([leading], timeout=RENEW_SECONDS)
                if not leading.done() and (not await self._acquire() or self._epoch != epoch):
                    log.warning("leadership_lost", lease=self._name, epoch=epoch)
                    return
            await leading
        finally:
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
