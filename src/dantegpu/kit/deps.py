"""What the composition root hands to each service's `build(deps, settings)`."""

from dataclasses import dataclass

from dantegpu.domain.clock import Clock
from dantegpu.kit.bus import Bus
from dantegpu.kit.rpc import Channels


@dataclass(frozen=True, slots=True)
class Deps:
    """The clock, the bus and the channels of this process, shared by its services."""

    clock: Clock
    bus: Bus
    channels: Channels
