"""Settings of the marketplace. Prices are micro-$dGPU per hour."""

from typing import ClassVar

from pydantic import Field

from dantegpu.domain.units import UDGPU_PER_DGPU
from dantegpu.kit.settings import ServiceSettings


class MarketplaceSettings(ServiceSettings):
    service_name: ClassVar[str] = "agora-marketplace"

    default_price_udgpu_per_gpu_hour: int = Field(
        default=400_000, ge=0, description="asked for a GPU-hour of a machine whose provider set no price"
    )
    default_price_udgpu_per_cpu_hour: int = Field(
        default=10_000, ge=0, description="asked for a core-hour, by jobs without a GPU, where no price was set"
    )
    max_price_udgpu_per_hour: int = Field(
        default=10_000 * UDGPU_PER_DGPU, ge=0, le=10**15, description="most that a provider may ask for"
    )
