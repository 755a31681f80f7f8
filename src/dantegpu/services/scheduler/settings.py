"""Settings of the scheduler."""

from typing import ClassVar

from pydantic import Field, field_validator

from dantegpu.contracts.rest.spec import DEFAULT_PRIORITY
from dantegpu.domain.ids import TeamId
from dantegpu.domain.scheduling import DEFAULT_POLICY, Objective, Policy, Quota
from dantegpu.domain.units import MILLI_PER_UNIT
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
    upkeep_seconds: float = Field(
        default=300.0, ge=0.01, description="how often checkpoints and passwords are deleted that nobody needs any more"
    )
    array_seconds: float = Field(default=0.25, ge=0.01, description="how often arrays are looked at")
    objective: Objective = Field(
        default=DEFAULT_POLICY.objective,
        description="what makes a machine the best one for a job: `cheapest`, `fastest`, `fragmentation` or `spread`",
    )
    fair_share: bool = Field(
        default=DEFAULT_POLICY.fair_share, description="teams that use less go first; else the oldest job does"
    )
    fair_share_half_life_seconds: int = Field(
        default=DEFAULT_POLICY.half_life_seconds,
        ge=0,
        description="what a team used so long ago counts half; 0: nothing",
    )
    gpu_quotas: dict[str, float] = Field(
        default={},
        description='GPUs that a team has for certain, by team id: `{"team_...": 16}`; others borrow what is idle',
    )
    priority_max: int = Field(
        default=100,
        ge=DEFAULT_PRIORITY,
        le=100,
        description="the highest `priority` that jobs may have: it goes before the fair share of other teams",
    )
    team_priorities_max: dict[str, int] = Field(
        default={}, description='the same for single teams, by team id: `{"team_...": 100}`'
    )
    spot_price_percent: int = Field(
        default=70,
        ge=1,
        le=100,
        description="what spot work pays of a machine's price; its provider earns as much less",
    )
    inventory_refresh_seconds: float = Field(default=10.0, ge=0.1, description="full read of machines and prices")
    max_duration_seconds: int = Field(default=7 * 24 * 3600, ge=1, description="of jobs that name none; and the most")
    log_limit_bytes: int = Field(default=64 << 20, ge=1024)
    results_limit_bytes: int = Field(default=10 << 30, ge=1024)

    @property
    def policy(self) -> Policy:
        """How placement ranks machines and teams."""
        quotas = {TeamId.parse(team): Quota(round(gpus * MILLI_PER_UNIT)) for team, gpus in self.gpu_quotas.items()}
        return Policy(self.objective, self.fair_share, self.fair_share_half_life_seconds, quotas)

    def priority_max_of(self, team_id: TeamId) -> int:
        return self.team_priorities_max.get(str(team_id), self.priority_max)

    @field_validator("team_priorities_max")
    @classmethod
    def _check_priorities(cls, priorities: dict[str, int]) -> dict[str, int]:
        for team, most in priorities.items():
            TeamId.parse(team)
            if not DEFAULT_PRIORITY <= most <= 100:
                raise ValueError(f"the highest priority of {team} is {most}; expected {DEFAULT_PRIORITY} to 100")
        return priorities

    @field_validator("gpu_quotas")
    @classmethod
    def _check_quotas(cls, quotas: dict[str, float]) -> dict[str, float]:
        for team, gpus in quotas.items():
            TeamId.parse(team)
            if gpus < 0:
                raise ValueError(f"the quota of {team} is negative; it is a number of GPUs, 0 or more")
        return quotas
