"""monitoring-logging-service: what attempts used, in a bounded series, read by their owners only."""

import asyncio
import math

import pytest

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.contracts.gen.dante.v1 import monitoring_pb2 as pb
from dantegpu.domain.ids import JobId, MachineId, TeamId
from dantegpu.kit.actor import SERVICE, Actor
from dantegpu.kit.errors import RemoteError
from dantegpu.kit.rpc import call
from tests.fixtures.actors import a_member
from tests.fixtures.monitoring import TIMEOUT_SECONDS, Attempt, MonitoringClient, MonitoringReplica


def a_point(attempt: Attempt, number: int, cores: float = 1.0) -> machine_pb2.MetricsPoint:
    use = machine_pb2.DeviceUtilisation(index=0, gpu_utilisation=0.5, vram_used_bytes=7)
    return machine_pb2.MetricsPoint(attempt_id=str(attempt.id), number=number, cpu_cores=cores, devices=[use])


async def tell(client: MonitoringClient, machine: MachineId, *points: machine_pb2.MetricsPoint) -> None:
    bus = await client.as_machine(machine)
    await bus.publish(subjects.machine_metrics(machine), machine_pb2.MetricsReport(points=points))


async def read(
    client: MonitoringClient, job: JobId, *, after: int = 0, epoch: int = 0, actor: Actor = SERVICE
) -> pb.ReadMetricsResponse:
    request = pb.ReadMetricsRequest(job_id=str(job), after_number=after, epoch=epoch)
    return await call(client.stub.ReadMetrics, request, actor=actor, timeout_seconds=TIMEOUT_SECONDS)


async def until_told(client: MonitoringClient, job: JobId, number: int) -> pb.ReadMetricsResponse:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not (found := await read(client, job)).points or found.points[-1].number < number:
            await asyncio.sleep(0.01)
    return found


async def test_what_a_machine_tells_is_read_back_in_order_once_and_from_anywhere(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place(epoch=2)
    for number in (2, 1, 2, 3):
        await tell(monitoring, attempt.machine, a_point(attempt, number, cores=number / 2))
    found = await until_told(monitoring, attempt.job, 3)
    assert [(point.number, point.cpu_cores) for point in found.points] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert (found.epoch, found.interval_seconds, found.step) == (2, 5.0, 1)
    assert not found.points[0].HasField("memory_bytes")
    assert found.points[0].devices[0].vram_used_bytes == 7
    assert [point.number for point in (await read(monitoring, attempt.job, after=2)).points] == [3]
    assert list((await read(monitoring, attempt.job, epoch=1)).points) == []


async def test_a_long_series_is_thinned_out_and_stays_even(monitoring_replica: MonitoringReplica):
    async with monitoring_replica(metrics_points_max=8) as monitoring:
        attempt = monitoring.scheduler.place()
        for number in range(1, 41):
            await tell(monitoring, attempt.machine, a_point(attempt, number))
        found = await until_told(monitoring, attempt.job, 40)
        assert found.step == 8
        assert [point.number for point in found.points] == [8, 16, 24, 32, 40]


@pytest.mark.parametrize("cores", [math.nan, math.inf, -1.0])
async def test_impossible_numbers_and_other_machines_attempts_are_not_kept(monitoring: MonitoringClient, cores: float):
    attempt, foreign = monitoring.scheduler.place(), monitoring.scheduler.place()
    await tell(monitoring, attempt.machine, a_point(attempt, 1, cores), a_point(foreign, 1), a_point(attempt, 0))
    await tell(monitoring, attempt.machine, a_point(attempt, 2))
    assert [point.number for point in (await until_told(monitoring, attempt.job, 2)).points] == [2]
    assert list((await read(monitoring, foreign.job)).points) == []


async def test_another_teams_metrics_are_answered_like_none_that_exist(monitoring: MonitoringClient):
    attempt = monitoring.scheduler.place()
    await tell(monitoring, attempt.machine, a_point(attempt, 1))
    await until_told(monitoring, attempt.job, 1)
    assert len((await read(monitoring, attempt.job, actor=a_member(attempt.team))).points) == 1
    with pytest.raises(RemoteError) as refused:
        await read(monitoring, attempt.job, actor=a_member(TeamId.new()))
    assert refused.value.remote_type == "log-not-found"


async def test_old_series_are_forgotten(monitoring_replica: MonitoringReplica):
    async with monitoring_replica() as monitoring:
        attempt = monitoring.scheduler.place()
        await tell(monitoring, attempt.machine, a_point(attempt, 1))
        await until_told(monitoring, attempt.job, 1)
    async with monitoring_replica(metrics_keep_days=1e-9) as monitoring, asyncio.timeout(TIMEOUT_SECONDS):
        while (await read(monitoring, attempt.job)).points:
            await asyncio.sleep(0.01)
