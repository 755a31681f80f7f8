"""Arrays: tasks become jobs as their turn comes, the whole ends with its last task. Runs on the leader.

Level-triggered: each pass looks at what there is and does what is missing, so a pass that is cut off anywhere is simply
done again. A task's (array, index) is unique, and only the next tasks of an array that is not stopped can be created.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import UUID

import structlog

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.contracts.rest.convert import array_of
from dantegpu.domain import job as lifecycle
from dantegpu.domain.arrays import ending
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.domain.job import JobSnapshot, JobState, StopReason
from dantegpu.domain.units import format_dgpu
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership
from dantegpu.kit.lifecycle import Wakeup
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store, store_arrays
from dantegpu.services.scheduler.service.transitions import Wakeups, changed_messages
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store import EventRow, JobRow
from dantegpu.services.scheduler.store_arrays import OpenArrayRow

log = structlog.get_logger(__name__)

CHUNK_TASKS = 1000
"""Tasks created in one transaction."""
MAX_WAITING_TASKS = 2000
"""Created tasks of one array that may wait at once: a large array must not flood the queue."""
MAX_OPEN_ARRAYS = 1000
"""Arrays looked at in one pass, the oldest first."""
PASS_PAUSE_SECONDS = 0.05
"""From one pass to the next at least: what ends meanwhile is looked at in one go. Longer (`array_seconds`) while all
arrays have tasks enough for a while: their tasks are counted in each pass."""
IDLE_PASS_SECONDS = 5.0
"""While there is no array: a submission wakes the passes, this finds one whose message got lost."""


def split(spec: jobs_pb2.JobSpec) -> jobs_pb2.JobSpec:
    """What the tasks of an array have in common."""
    common = jobs_pb2.JobSpec()
    common.CopyFrom(spec)
    for name in ("array", "after", "schedule"):
        common.ClearField(name)
    return common


class Arrays:
    """Creates tasks, and ends and settles arrays."""

    def __init__(
        self,
        db: Database,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
        queue: Callable[[Sequence[JobRow]], None],
    ) -> None:
        """`queue` takes new tasks into placement's queue, which would find them by itself, but later."""
        self._db = db
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings
        self._queue = queue
        self._again = Wakeup()
        self._rest_seconds = PASS_PAUSE_SECONDS
        self.leadership: Leadership | None = None

    def notify(self) -> None:
        self._again.notify()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            began_seconds = self._clock.monotonic()
            pause_seconds = IDLE_PASS_SECONDS
            try:
                pause_seconds = await self.look()
            except ServiceError as error:
                log.warning("arrays_failed", error=error.message)
            if pause_seconds:
                await self._again.wait(pause_seconds)
                await asyncio.sleep(self._rest_seconds - (self._clock.monotonic() - began_seconds))

    async def look(self) -> float:
        """Do for each array what is due; after how many seconds to look again."""
        async with self._db.transaction() as tx:
            rows = await store_arrays.open_arrays(tx, MAX_OPEN_ARRAYS)
        if not rows:
            return IDLE_PASS_SECONDS
        quiet = all(row.waiting > CHUNK_TASKS and not row.ended for row in rows)
        self._rest_seconds = self._settings.array_seconds if quiet else PASS_PAUSE_SECONDS
        busy = False
        for row in rows:
            if row.ended:
                await self._settle(row)
            elif row.stop_reason is not None:
                await self._go_on_stopping(row)
            else:
                busy |= await self._go_on(row)
        return 0.0 if busy else self._settings.array_seconds

    async def _go_on(self, row: OpenArrayRow) -> bool:
        if row.shown_state == JobState.QUEUED.value and row.waiting < row.created:
            await self._begin(row)
        if row.created == row.size:
            if not row.waiting + row.live:
                await self._end(row)
            return False
        room = MAX_WAITING_TASKS - row.waiting
        if row.max_parallel:
            room = min(room, row.max_parallel - row.waiting - row.live)
        whole = min(CHUNK_TASKS, row.size - row.created)
        count = min(room, whole)
        if count <= 0 or (count < whole and row.waiting >= CHUNK_TASKS):
            return False  # where many wait, the next ones come in whole chunks
        await self._create(row, count)
        return room > count

    async def _create(self, row: OpenArrayRow, count: int) -> None:
        array = array_of(jobs_pb2.JobSpec.FromString(row.spec).array)
        environments = [
            jobs_pb2.JobSpec(env=array.environment(index)).SerializeToString()
            for index in range(row.created, row.created + count)
        ]
        ids = JobId.new_uuids(len(environments))
        async with self._db.transaction() as tx:
            await self._assert_held(tx)
            tasks = await store_arrays.create_tasks(
                tx, row.id, first=row.created, ids=ids, environments=environments, now=self._clock.now()
            )
        self._queue(tasks)

    async def _begin(self, row: OpenArrayRow) -> None:
        async with self._db.transaction() as tx:
            await self._tell(tx, row.id, await store_arrays.begin_array(tx, row.id, self._clock.now()))

    async def _go_on_stopping(self, row: OpenArrayRow) -> None:
        if not row.waiting + row.live:
            await self._end(row)
        elif row.waiting:
            # A task came back to the queue after the stop, from a preemption or a lost machine.
            async with self._db.transaction() as tx:
                why = StopReason(row.stop_reason or StopReason.USER)
                await stop_tasks(tx, row.id, why, row.stop_by, self._clock.now(), self._wakeups)

    async def _end(self, row: OpenArrayRow) -> None:
        async with self._db.transaction() as tx:
            await self._assert_held(tx)
            tasks = await store_arrays.tasks_settled(tx, row.id)
            counts = {JobState.SUCCEEDED: tasks.succeeded, JobState.FAILED: tasks.failed}
            why = StopReason(row.stop_reason) if row.stop_reason else None
            now = self._clock.now()
            end = ending(row.size, counts, _stopped(row.id, why, row.stop_by, now).outcome if why else None)
            # A user knows of a stop of his own; these came from elsewhere.
            of_others = row.stop_reason in (StopReason.DEADLINE, StopReason.DEPENDENCY)
            because = f"; stopped: {row.stop_reason} ({row.stop_by})" if of_others else ""
            event = await store_arrays.end_array(
                tx, row.id, state=end.state.value, outcome=end.outcome.value, message=end.message + because,
                stop_reason=row.stop_reason, stop_by=row.stop_by, now=now,
            )  # fmt: skip
            await self._tell(tx, row.id, event)
        self._again.notify()

    async def _settle(self, row: OpenArrayRow) -> None:
        async with self._db.transaction() as tx:
            await self._assert_held(tx)
            tasks = await store_arrays.tasks_settled(tx, row.id)
            if not tasks.settled:
                return
            event = await store_arrays.settle_array(
                tx, row.id, succeeded=tasks.succeeded, failed=tasks.failed,
                cancelled=row.size - tasks.succeeded - tasks.failed, cost_udgpu=tasks.cost_udgpu,
                message=f"{format_dgpu(tasks.cost_udgpu)} $dGPU", now=self._clock.now(),
            )  # fmt: skip
            await self._tell(tx, row.id, event)

    async def _tell(self, tx: Tx, array_id: UUID, event: EventRow | None) -> None:
        """Wake those who follow the array, if anything has happened to it."""
        if event is not None:
            await self._outbox.add(tx, changed_messages([array_id]))

    async def _assert_held(self, tx: Tx) -> None:
        assert self.leadership is not None, "passes run under a lease"
        await self.leadership.assert_held(tx)


async def stop_array(
    tx: Tx, row: JobRow, why: StopReason, by: str, now: datetime, outbox: Outbox, wakeups: Wakeups
) -> None:
    """End what waits, ask what runs to end, and let no task begin any more. An array that is over stays as it is."""
    message = f"{why.value} (by {by})"
    event = await store_arrays.stop_array(
        tx, row.id, stop_reason=why.value, stop_by=by, message=message, now=now
    )  # fmt: skip
    if event is None:
        return
    await outbox.add(tx, changed_messages([row.id]))
    # A statement of its own, after the array is locked: it sees every task that was ever created.
    await stop_tasks(tx, row.id, why, by, now, wakeups)
    tx.after_commit.append(wakeups.arrays)


async def stop_tasks(tx: Tx, array_id: UUID, why: StopReason, by: str, now: datetime, wakeups: Wakeups) -> None:
    """What StopRequested makes of each task, in one statement."""
    ended = _stopped(array_id, why, by, now)
    assert ended.outcome is not None, "a stop of a whole array ends what waits"
    stopped = await store_arrays.stop_tasks(
        tx, array_id, stop_reason=why.value, stop_by=by, ending_reasons=[reason.value for reason in lifecycle.ENDS_JOB],
        end_state=ended.state.value, outcome=ended.outcome.value, message=f"{why.value} (by {by})", now=now,
    )  # fmt: skip
    machines = set(stopped.machine_ids)
    if machines:
        await store.bump_machines(tx, machines)
        tx.after_commit.append(lambda: wakeups.machines(machines))
    if stopped.tasks:
        tx.after_commit.append(wakeups.dropped)


def _stopped(array_id: UUID, why: StopReason, by: str, now: datetime) -> JobSnapshot:
    """What a stop makes of a task that waits, by the one table that says so."""
    example = JobSnapshot(JobId(array_id), TeamId(array_id), submitted_at=now)
    return lifecycle.transition(example, lifecycle.StopRequested(by, why), now)[0]
