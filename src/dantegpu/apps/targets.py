"""Which public name is which module, and who has to be there first. `dante serve NAME` and `dante up` build from it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib import import_module
from typing import Any, Final, cast

from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.settings import ServiceSettings

ALL: Final = "all"
"""The target that is every service in one process."""


class UnknownTarget(ValueError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no service is called {name!r}; there are: {', '.join([*TARGETS, ALL])}")


@dataclass(frozen=True, slots=True)
class Target:
    """A service: the package below dantegpu.services, its settings class, and the services that it calls."""

    package: str
    settings_name: str
    needs: tuple[str, ...] = ()

    def settings_class(self) -> type[ServiceSettings]:
        """Imported only now: a process pays for the services that it runs."""
        module = import_module(f"dantegpu.services.{self.package}.settings")
        return cast(type[ServiceSettings], getattr(module, self.settings_name))

    def build(self, deps: Deps, settings: ServiceSettings) -> Service:
        module = import_module(f"dantegpu.services.{self.package}.module")
        return cast(Callable[[Deps, Any], Service], module.build)(deps, settings)


TARGETS: Final[Mapping[str, Target]] = {
    "auth-service": Target("auth", "AuthSettings"),
    "provider-registry-service": Target("registry", "RegistrySettings"),
    "storage-service": Target("storage", "StorageSettings"),
    "billing-payment-service": Target("billing", "BillingSettings"),
    "agora-marketplace": Target("marketplace", "MarketplaceSettings", needs=("provider-registry-service",)),
    "scheduler-orchestrator-service": Target(
        "scheduler",
        "SchedulerSettings",
        needs=("provider-registry-service", "agora-marketplace", "billing-payment-service", "storage-service"),
    ),
    "monitoring-logging-service": Target(
        "monitoring", "MonitoringSettings", needs=("scheduler-orchestrator-service", "storage-service")
    ),
    "siger-api-gateway": Target(
        "gateway",
        "GatewaySettings",
        needs=("auth-service", "scheduler-orchestrator-service", "monitoring-logging-service"),
    ),
}


def in_start_order(names: Iterable[str]) -> list[str]:
    """The given services, each behind those it needs. Raises UnknownTarget."""
    wanted = list(names)
    for name in wanted:
        if name not in TARGETS:
            raise UnknownTarget(name)
    order = TopologicalSorter({name: TARGETS[name].needs for name in TARGETS}).static_order()
    return [name for name in order if name in wanted]


def expand(target: str) -> list[str]:
    """The services behind a target's name. Raises UnknownTarget."""
    return in_start_order(TARGETS) if target == ALL else in_start_order([target])
