"""Settings of billing."""

from typing import ClassVar

from pydantic import Field

from dantegpu.domain.pricing import BASIS_POINTS, DEFAULT_PLATFORM_FEE_BASIS_POINTS
from dantegpu.domain.units import MAX_AMOUNT_UDGPU
from dantegpu.kit.settings import ServiceSettings


class BillingSettings(ServiceSettings):
    service_name: ClassVar[str] = "billing-payment-service"

    platform_fee_basis_points: int = Field(
        default=DEFAULT_PLATFORM_FEE_BASIS_POINTS,
        ge=0,
        le=BASIS_POINTS,
        description="the platform's part of each charge in 1/100 percent; locked when a hold is opened",
    )
    holds_wait_for_disk: bool = Field(
        default=True,
        description="false only where billing and scheduler share one PostgreSQL server: the scheduler's commit that "
        "follows each of its calls makes both durable, so one wait for the disk is enough",
    )
    max_credit_udgpu: int = Field(
        default=10**12, ge=1, le=MAX_AMOUNT_UDGPU, description="most that one credit may add, in micro-$dGPU"
    )
