"""/v1/schedules: jobs that are submitted again and again."""

from typing import Annotated

from fastapi import APIRouter, Depends

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.contracts.rest import jobs
from dantegpu.contracts.rest.convert import spec_to_proto
from dantegpu.contracts.rest.spec import JobSpec
from dantegpu.domain.ids import ScheduleId
from dantegpu.kit import rpc
from dantegpu.services.gateway import convert
from dantegpu.services.gateway.context import IdempotencyKey, JobReader, JobWriter, Paging, Platform, checked_id

router = APIRouter(tags=["schedules"])


def _schedule_id(schedule_id: str) -> str:
    return checked_id(ScheduleId, schedule_id)


@router.post("/v1/schedules", status_code=201, summary="Submit a job at each due time from now on")
async def create_schedule(
    # First: a body is looked at only when somebody known has sent it.
    _actor: JobWriter,
    spec: JobSpec,
    key: IdempotencyKey,
    platform: Platform,
) -> jobs.Schedule:
    """A job's spec with its `schedule`. Times that are missed while the platform is down come to one job."""
    request = jobs_pb2.CreateScheduleRequest(spec=spec_to_proto(spec), idempotency_key=key)
    return convert.schedule((await rpc.call(platform.clients.jobs.CreateSchedule, request)).schedule)


@router.get("/v1/schedules", summary="Your team's schedules, newest first")
async def list_schedules(_actor: JobReader, page: Paging, platform: Platform) -> jobs.SchedulePage:
    answer = await rpc.call(platform.clients.jobs.ListSchedules, jobs_pb2.ListSchedulesRequest(page=page))
    found = [convert.schedule(each) for each in answer.schedules]
    return jobs.SchedulePage(schedules=found, next_cursor=answer.next_cursor or None)


@router.post("/v1/schedules/{schedule_id}/stop", summary="Submit nothing more")
async def stop_schedule(
    schedule_id: Annotated[str, Depends(_schedule_id)], _actor: JobWriter, platform: Platform
) -> jobs.Schedule:
    """Jobs that it has submitted go on. Stopping twice changes nothing."""
    request = jobs_pb2.StopSchedulesRequest(schedule_ids=[schedule_id])
    return convert.schedule((await rpc.call(platform.clients.jobs.StopSchedules, request)).schedules[0])
