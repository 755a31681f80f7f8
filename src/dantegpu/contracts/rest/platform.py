"""The platform itself."""

from typing import Literal

from pydantic import Field

from dantegpu.contracts.rest.base import Response


class ServiceStatus(Response):
    """One service, as the gateway reaches it."""

    name: str
    reachable: bool
    detail: str = ""
    milliseconds: float = Field(description="Time to answer")


class PlatformStatus(Response):
    """The whole platform."""

    status: Literal["ok", "degraded"]
    version: str
    services: list[ServiceStatus]
