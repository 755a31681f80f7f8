"""Settings of the monitoring service."""

from typing import ClassVar

from pydantic import Field

from dantegpu.kit.settings import ServiceSettings


class MonitoringSettings(ServiceSettings):
    service_name: ClassVar[str] = "monitoring-logging-service"

    log_limit_bytes: int = Field(default=64 << 20, ge=1024, description="of one attempt; what comes later is refused")
    archive_after_seconds: float = Field(
        default=60.0, ge=0, description="how long an ended log stays in PostgreSQL before it moves to storage"
    )
    abandoned_after_seconds: float = Field(
        default=600.0, gt=0, description="when a silent log is looked at: its machine may be gone"
    )
    metrics_points_max: int = Field(
        default=720, ge=2, description="of one attempt's metrics; a longer series is thinned out"
    )
    metrics_keep_days: float = Field(default=30.0, gt=0, description="how long the metrics of a job are kept")
    archive_interval_seconds: float = Field(default=15.0, gt=0, description="how often logs to archive are looked for")
