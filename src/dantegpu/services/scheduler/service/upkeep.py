"""Deletes what nobody needs any more: checkpoints that no attempt can begin with, passwords of ended jobs' registries.

Runs on the leader, now and then, a bounded part at a time. What was not done before a crash is found again.
"""

import asyncio
from datetime import timedelta
from uuid import UUID

import structlog

from dantegpu.contracts import objects
from dantegpu.contracts.gen.dante.v1 import jobs_pb2, storage_pb2, storage_pb2_grpc
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import JobId
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.db import Database
from dantegpu.kit.errors import ServiceError
from dantegpu.services.scheduler import store_upkeep
from dantegpu.services.scheduler.settings import SchedulerSettings

log = structlog.get_logger(__name__)

BATCH = 500
UPLOADS_END_SECONDS = 20 * 60.0
"""So long after an attempt's end, nothing of it is still being uploaded: URLs live for 15 minutes at most."""
CHECKPOINT_SLOTS = (0, 1)
_FIRST = UUID(int=0)


class Upkeep:
    """What `run` does until it is cancelled, `look` does once."""

    def __init__(
        self, db: Database, storage: storage_pb2_grpc.StorageServiceStub, clock: Clock, settings: SchedulerSettings
    ) -> None:
        self._db = db
        self._storage = storage
        self._clock = clock
        self._settings = settings
        self._looked_at = _FIRST

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.upkeep_seconds)
            try:
                while await self.look():
                    pass
            except ServiceError as error:
                log.warning("upkeep_failed", error=error.message)

    async def look(self) -> bool:
        """Whether there may be more to do at once."""
        checkpoints = await self._delete_checkpoints()
        specs = await self._forget_passwords()
        return checkpoints >= BATCH or specs >= BATCH

    async def _delete_checkpoints(self) -> int:
        before = self._clock.now() - timedelta(seconds=UPLOADS_END_SECONDS)
        async with self._db.transaction() as tx:
            found = await store_upkeep.stale_checkpoints(tx, before=before, limit=BATCH)
        if not found:
            return 0
        # Both slots, whatever was told: an upload of which nobody heard lies there too.
        keys = [
            f"{objects.checkpoint_prefix(str(JobId(row.job_id)), row.epoch, row.node_rank)}/{slot}"
            for row in found
            for slot in CHECKPOINT_SLOTS
        ]
        await rpc.call(self._storage.DeleteObjects, storage_pb2.DeleteObjectsRequest(keys=keys), actor=SERVICE)
        # Only now: after a crash in between they are deleted once more, which changes nothing.
        async with self._db.transaction() as tx:
            await store_upkeep.checkpoints_deleted(tx, sorted(row.id for row in found))
        log.info("checkpoints_deleted", attempts=len(found))
        return len(found)

    async def _forget_passwords(self) -> int:
        async with self._db.transaction() as tx:
            found = await store_upkeep.specs_with_auth(tx, after=self._looked_at, limit=BATCH)
            without: dict[UUID, bytes] = {}
            for row in found:
                spec = jobs_pb2.JobSpec.FromString(row.spec)
                if spec.HasField("registry_auth"):
                    spec.ClearField("registry_auth")
                    without[row.id] = spec.SerializeToString()
            if without:
                await store_upkeep.replace_specs(tx, without)
        # Specs that only look like it stay where they are: go past them, and look at them again in the next round.
        self._looked_at = found[-1].id if len(found) >= BATCH else _FIRST
        return len(found)
