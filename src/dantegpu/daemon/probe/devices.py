"""What a GPU is to the daemon, whoever made it, and simulated ones for development."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from dantegpu.domain.gpus import KNOWN_GPUS, find_known_gpu, nearest_gpu_name

MAX_SIMULATED_DEVICES = 64


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or a part of one that is leased as a whole (`mig_profile`, of the card `parent_uuid`).

    `paths` are the device nodes that a job on it needs; none when simulated.
    """

    index: int
    model: str
    uuid: str
    vram_bytes: int
    compute_capability: str
    pcie_bus_id: str = ""
    paths: tuple[str, ...] = ()
    simulated: bool = False
    vendor: str = ""
    mig_profile: str = ""
    parent_uuid: str = ""
    pcie_generation: int = 0
    pcie_width: int = 0
    power_limit_watts: float = 0.0
    ecc: bool = False


@dataclass(frozen=True, slots=True)
class GpuSample:
    """How busy one GPU is right now, and `problem`: why its driver says that it cannot be relied on.

    `throttled`: what slows it down. `pids`: processes that compute on it, also those that are no job's.
    """

    index: int
    utilisation: float = 0.0
    vram_used_bytes: int = 0
    temperature_celsius: float = 0.0
    power_watts: float = 0.0
    memory_utilisation: float = 0.0
    throttled: tuple[str, ...] = ()
    pids: frozenset[int] = frozenset()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Gpus:
    """What was found, and `problem`: why a card that seems to be there cannot be used."""

    devices: tuple[Gpu, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    problem: str = ""


class GpuDriver(ABC):
    """The way to one maker's cards. All calls are quick; none needs root."""

    @abstractmethod
    def open(self, first_index: int) -> Gpus:
        """Find the cards and number them from `first_index` on. A machine without any simply has none."""

    @abstractmethod
    def sample(self) -> Sequence[GpuSample]:
        """Every card found by `open`; one that does not answer has a `problem` that says so."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the driver. Idempotent."""


class InvalidSimulation(ValueError):
    """`--simulate-gpus` was not understood."""


def simulated_gpus(text: str) -> tuple[Gpu, ...]:
    """`"RTX 4090:2, A100"` -> three devices that look like those models and compute nothing.

    Raises InvalidSimulation.
    """
    devices: list[Gpu] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(.+?)(?::(\d{1,3}))?", part)
        name, count = (match.group(1), int(match.group(2) or 1)) if match else (part, 1)
        known = find_known_gpu(name)
        if known is None:
            nearest = nearest_gpu_name(name)
            hint = f"; did you mean {nearest!r}?" if nearest else f"; known: {', '.join(list(KNOWN_GPUS)[:8])}, ..."
            raise InvalidSimulation(f"unknown GPU {name!r}{hint}")
        if not 1 <= count <= MAX_SIMULATED_DEVICES - len(devices):
            raise InvalidSimulation(f"{part!r}: at most {MAX_SIMULATED_DEVICES} simulated GPUs")
        capability = f"{known.compute_capability // 10}.{known.compute_capability % 10}"
        devices += [
            Gpu(len(devices) + number, known.model, "", known.vram_bytes, capability, simulated=True)
            for number in range(count)
        ]
    return tuple(devices)
