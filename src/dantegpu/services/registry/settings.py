"""Settings of the registry."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from dantegpu.kit.settings import ServiceSettings


class RegistrySettings(ServiceSettings):
    """Liveness timers are shorter than any lease: a machine that is late gets no new work, and loses none for it."""

    service_name: ClassVar[str] = "provider-registry-service"

    unknown_after_seconds: float = Field(
        default=15.0, gt=0, description="no heartbeat for so long: no new work. Machines send one every 5 s"
    )
    offline_after_seconds: float = Field(default=60.0, gt=0, description="no heartbeat for so long: it is gone")
    sweep_interval_seconds: float = Field(default=2.0, gt=0, description="how often liveness is looked at")

    @model_validator(mode="after")
    def _timers_in_order(self) -> Self:
        if self.offline_after_seconds <= self.unknown_after_seconds:
            raise ValueError("offline_after_seconds must be longer than unknown_after_seconds")
        return self
