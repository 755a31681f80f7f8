"""Settings of the scheduler."""

from typing import ClassVar

from pydantic import Field

from dantegpu.kit.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    service_name: ClassVar[str] = "scheduler-orchestrator-service"

    lease_seconds: float = Field(default=30.0, ge=1, description="how long an attempt may run without a renewal")
    lease_grace_seconds: float = Field(
        default=10.0, ge=0.5, description="how long after its lease an attempt counts as lost; covers clock rates"
    )
    stop_grace_seconds: float = Field(default=10.0, ge=0, description="between SIGTERM and SIGKILL")
    stop_timeout_seconds: float = Field(
        default=900.0, ge=1, description="a stopped attempt that has not ended by then loses its lease"
    )
    timer_seconds: float = Field(default=1.0, ge=0.01, description="how often leases and durations are looked at")
    settlement_seconds: float = Field(default=5.0, ge=0.01, description="how often windows are looked at")
    orphan_sweep_seconds: float = Field(default=60.0, ge=0.01, description="how often forgotten holds are looked for")
    orphan_age_seconds: int = Field(
        default=120, ge=30, description="a hold older than this without an attempt is voided; no plan takes that long"
    )
    quarantine_faults: int = Field(
        default=3,
        ge=1,
        description="a machine that fails so many jobs in a row (of one team: twice as many) is shut out",
    )
    quarantine_window_seconds: float = Field(default=3600.0, ge=1, description="faults older than this do not count")
    quarantine_seconds: float = Field(
        default=1800.0, ge=1, description="how long a machine is shut out; each time in a row twice as long, up to 24 h"
    )
    array_seconds: float = Field(default=0.25, ge=0.01, description="how often arrays are looked at")
    inventory_refresh_seconds: float = Field(default=10.0, ge=0.1, description="full read of machines and prices")
    max_duration_seconds: int = Field(default=7 * 24 * 3600, ge=1, description="of jobs that name none; and the most")
    log_limit_bytes: int = Field(default=64 << 20, ge=1024)
    results_limit_bytes: int = Field(default=10 << 30, ge=1024)
