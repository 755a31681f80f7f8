"""Schedules: a job that is submitted anew at each due time, exactly once. The due ones are looked for by the leader."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import structlog
from cronsim import CronSim, CronSimError

from dantegpu.contracts.gen.dante.v1 import common_pb2, jobs_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import JobId, ScheduleId, TeamId, UserId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership
from dantegpu.kit.paging import page_limit
from dantegpu.services.scheduler import store_schedules
from dantegpu.services.scheduler.errors import InvalidJob, ScheduleNotFound, TooManySchedules
from dantegpu.services.scheduler.service.intake import Intake, team_of
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store_schedules import ScheduleRow

log = structlog.get_logger(__name__)

BATCH = 100
MAX_SCHEDULES_PER_TEAM = 100
"""Of those that are not stopped."""


def next_time(cron: str, timezone: str, after: datetime) -> datetime:
    """The first due time after `after`, in UTC. Raises InvalidJob when there is none, or no such time can be.

    A time that a change to summer time leaves out comes right after the gap; one that comes twice is due once.
    """
    try:
        return next(CronSim(cron, after.astimezone(ZoneInfo(timezone or "UTC")))).astimezone(UTC)
    except (CronSimError, StopIteration) as error:
        raise InvalidJob(
            f"schedule: {cron!r} is never due: {error or 'there is no such day'}", field="schedule"
        ) from error
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidJob(f"schedule: there is no time zone {timezone!r}", field="schedule.timezone") from error


def _without_schedule(spec: jobs_pb2.JobSpec) -> jobs_pb2.JobSpec:
    each = jobs_pb2.JobSpec()
    each.CopyFrom(spec)
    each.ClearField("schedule")
    return each


class Schedules:
    """What users ask of their schedules, and the leader's passes that submit what is due."""

    def __init__(self, db: Database, intake: Intake, clock: Clock, settings: SchedulerSettings) -> None:
        self._db = db
        self._intake = intake
        self._clock = clock
        self._settings = settings
        self.leadership: Leadership | None = None

    async def check(self, actor: Actor, spec: jobs_pb2.JobSpec) -> None:
        """Everything about a schedule that needs no transaction. Raises InvalidJob, InputNotUploaded."""
        actor.require_writer()
        if not spec.HasField("schedule"):
            raise InvalidJob("schedule: when shall it be submitted? Such as {cron: '15 23 * * *'}", field="schedule")
        if spec.HasField("deadline"):
            raise InvalidJob(
                "deadline: of a schedule it is a time from each submission on, such as 8h", field="deadline"
            )
        next_time(spec.schedule.cron, spec.schedule.timezone, self._clock.now())
        await self._intake.check(actor, [_without_schedule(spec)], no_wait=False)

    async def create(self, tx: Tx, actor: Actor, spec: jobs_pb2.JobSpec) -> ScheduleRow:
        """What was checked by check() is not checked again. Raises TooManySchedules."""
        team_id = actor.require_writer()
        if await store_schedules.count_running(tx, team_id.uuid) >= MAX_SCHEDULES_PER_TEAM:
            raise TooManySchedules(MAX_SCHEDULES_PER_TEAM)
        now = self._clock.now()
        return await store_schedules.insert_schedule(
            tx,
            ScheduleId.new().uuid,
            team_id=team_id.uuid,
            user_id=actor.user_id.uuid if actor.user_id else None,
            spec=spec.SerializeToString(),
            cron=spec.schedule.cron,
            timezone=spec.schedule.timezone,
            next_at=next_time(spec.schedule.cron, spec.schedule.timezone, now),
            now=now,
        )

    async def list_schedules(self, tx: Tx, actor: Actor, *, cursor: str, limit: int) -> tuple[list[ScheduleRow], str]:
        """Newest first; the rows and the cursor of the next page."""
        size = page_limit(limit)
        before = ScheduleId.parse(cursor).uuid if cursor else None
        rows = await store_schedules.list_schedules(tx, team_of(actor).uuid, before=before, limit=size + 1)
        return rows[:size], str(ScheduleId(rows[size - 1].id)) if len(rows) > size else ""

    async def stop(self, tx: Tx, actor: Actor, ids: Sequence[ScheduleId]) -> list[ScheduleRow]:
        """Submit nothing more. Raises ScheduleNotFound for the first that does not exist or is another team's."""
        actor.require_writer()
        rows = await store_schedules.schedules_by_id(tx, [each.uuid for each in ids])
        for each in ids:
            row = rows.get(each.uuid)
            if row is None or (row.team_id != team_of(actor).uuid and not actor.operator):
                raise ScheduleNotFound(each)
        await store_schedules.stop_schedules(tx, [each.uuid for each in ids], self._clock.now())
        rows = await store_schedules.schedules_by_id(tx, [each.uuid for each in ids])
        return [rows[each.uuid] for each in ids]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._settings.timer_seconds)
            try:
                while await self.look() == BATCH:
                    pass
            except ServiceError as error:
                log.warning("schedules_failed", error=error.message)

    async def look(self) -> int:
        """Submit what is due; how many. Times that were missed come to one job, for the oldest of them."""
        assert self.leadership is not None, "passes run under a lease"
        now = self._clock.now()
        async with self._db.transaction() as tx:
            await self.leadership.assert_held(tx)
            due = await store_schedules.due_schedules(tx, now, BATCH)
            for row in due:
                spec = _without_schedule(jobs_pb2.JobSpec.FromString(row.spec))
                job = (await self._intake.submit(tx, _owner(row), [spec]))[0]
                await store_schedules.note_run(
                    tx, row.id, due_at=row.next_at, next_at=next_time(row.cron, row.timezone, now), job_id=job.id
                )
                log.info("schedule_due", schedule_id=str(ScheduleId(row.id)), job_id=str(JobId(job.id)))
        return len(due)


def _owner(row: ScheduleRow) -> Actor:
    """Whoever made the schedule: its jobs are theirs."""
    user_id = UserId(row.user_id) if row.user_id else None
    return Actor(common_pb2.Actor.USER, user_id=user_id, team_id=TeamId(row.team_id), role="member")
