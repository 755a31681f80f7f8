"""Schedules: jobs that are submitted again and again."""

from dantegpu.contracts.rest.jobs import Schedule, SchedulePage
from dantegpu.contracts.rest.spec import JobSpec
from dantegpu.sdk._async.jobs import SpecLike
from dantegpu.sdk._async.transport import AsyncTransport
from dantegpu.sdk.protocol import new_idempotency_key


class AsyncSchedulesApi:
    """`client.schedules`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, spec: SpecLike, *, idempotency_key: str | None = None) -> Schedule:
        """Submit the job at each due time of its `schedule` from now on."""
        body = spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec)
        key = idempotency_key or new_idempotency_key()
        return await self._transport.call(Schedule, "POST", "/v1/schedules", body=body, idempotency_key=key)

    async def list(self, *, cursor: str | None = None, limit: int = 50) -> SchedulePage:
        """One page of your team's schedules, newest first, stopped ones too."""
        params = {"cursor": cursor, "limit": limit}
        return await self._transport.call(SchedulePage, "GET", "/v1/schedules", params=params)

    async def stop(self, schedule_id: str) -> Schedule:
        """Submit nothing more; jobs that it has submitted go on."""
        return await self._transport.call(Schedule, "POST", f"/v1/schedules/{schedule_id}/stop")
