"""gRPC edge of the monitoring service."""

from typing import TYPE_CHECKING, Any, override

from dantegpu.contracts.gen.dante.v1 import monitoring_pb2, monitoring_pb2_grpc
from dantegpu.domain.ids import JobId
from dantegpu.kit.actor import current_actor
from dantegpu.services.monitoring.series import INTERVAL_SECONDS, SeriesService
from dantegpu.services.monitoring.service import LogService

if TYPE_CHECKING:
    from grpc import aio

    type Context = aio.ServicerContext[Any, Any]


class MonitoringRpc(monitoring_pb2_grpc.MonitoringServiceServicer):
    def __init__(self, service: LogService, series: SeriesService) -> None:
        self._service = service
        self._series = series

    @override
    async def ReadLogs(
        self, request: monitoring_pb2.ReadLogsRequest, context: "Context"
    ) -> monitoring_pb2.ReadLogsResponse:
        read = await self._service.read(
            current_actor(),
            JobId.parse(request.job_id),
            request.epoch,
            request.offset,
            request.limit_bytes,
            request.node_rank,
        )
        return monitoring_pb2.ReadLogsResponse(
            epoch=read.epoch,
            offset=read.offset,
            data=read.data,
            size_bytes=read.size_bytes,
            complete=read.complete,
            truncated=read.truncated,
        )

    @override
    async def ReadMetrics(
        self, request: monitoring_pb2.ReadMetricsRequest, context: "Context"
    ) -> monitoring_pb2.ReadMetricsResponse:
        found = await self._series.read(
            current_actor(), JobId.parse(request.job_id), request.epoch, request.after_number, request.node_rank
        )
        return monitoring_pb2.ReadMetricsResponse(
            epoch=found.epoch, interval_seconds=INTERVAL_SECONDS, step=found.step, points=found.points
        )
