"""Wiring of monitoring-logging-service."""

from pathlib import Path

from dantegpu.contracts.gen.dante.v1 import jobs_pb2_grpc, monitoring_pb2_grpc, storage_pb2_grpc
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.migrate import Migrations
from dantegpu.services.monitoring.consumers import LogConsumers, MetricConsumers
from dantegpu.services.monitoring.rpc import MonitoringRpc
from dantegpu.services.monitoring.series import SeriesService
from dantegpu.services.monitoring.service import LogService
from dantegpu.services.monitoring.settings import MonitoringSettings

SCHEMA = "monitoring"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


def build(deps: Deps, settings: MonitoringSettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    jobs = jobs_pb2_grpc.JobServiceStub(deps.channels.to("scheduler-orchestrator-service"))
    storage = storage_pb2_grpc.StorageServiceStub(deps.channels.to("storage-service"))
    service = LogService(db, jobs, storage, deps.clock, settings)
    series = SeriesService(db, service.resolve, deps.clock, settings)
    return Service(
        name=settings.service_name,
        components=[
            Migrations(dsn, SCHEMA, MIGRATIONS),
            db,
            LogConsumers(deps.bus, service, settings.archive_interval_seconds),
            MetricConsumers(deps.bus, series),
        ],
        register_rpc=lambda server: monitoring_pb2_grpc.add_MonitoringServiceServicer_to_server(
            MonitoringRpc(service, series), server
        ),
        checks={"database": db.ready, "nats": deps.bus.ready},
    )
