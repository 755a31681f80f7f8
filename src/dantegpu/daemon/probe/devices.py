"""GPUs of this machine: NVIDIA's through NVML, and simulated ones for development."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from dantegpu.domain.gpus import KNOWN_GPUS, find_known_gpu, nearest_gpu_name

log = structlog.get_logger(__name__)

MAX_SIMULATED_DEVICES = 64
DRIVER_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")
"""What an NVIDIA driver shows of itself, on Linux and in WSL. Without it, its library is not even looked for."""
_SHARED_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `paths` are the device nodes that a job on it needs; none when simulated."""

    index: int
    model: str
    uuid: str
    vram_bytes: int
    compute_capability: str
    pcie_bus_id: str = ""
    paths: tuple[str, ...] = ()
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class GpuSample:
    """How busy one GPU is right now."""

    index: int
    utilisation: float
    vram_used_bytes: int
    temperature_celsius: float
    power_watts: float


@dataclass(frozen=True, slots=True)
class Gpus:
    """What was found, and `problem`: why a card that seems to be there cannot be used."""

    devices: tuple[Gpu, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    problem: str = ""


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


class Nvml:
    """NVIDIA's management library, when this machine has it. All calls are quick; none needs root."""

    def __init__(self) -> None:
        self._library: Any = None
        self._handles: list[Any] = []

    def open(self) -> Gpus:
        """Find the cards. A machine without NVIDIA's driver simply has none."""
        if not any(os.path.exists(path) for path in DRIVER_SIGNS):
            return Gpus()
        try:
            import pynvml
        except ImportError:
            return Gpus(problem="nvidia-ml-py is not installed")
        try:
            pynvml.nvmlInit()
            self._library = pynvml
            count = int(pynvml.nvmlDeviceGetCount())
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            devices = tuple(self._device(index, handle) for index, handle in enumerate(self._handles))
            cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            return Gpus(devices, driver, f"{cuda // 1000}.{cuda % 1000 // 10}")
        except pynvml.NVMLError as error:
            self.close()
            return Gpus(problem=f"NVIDIA's driver does not answer: {error}")

    def _device(self, index: int, handle: Any) -> Gpu:
        nvml = self._library
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        number = int(nvml.nvmlDeviceGetMinorNumber(handle))
        paths = (f"/dev/nvidia{number}", *_SHARED_NODES)
        return Gpu(
            index=index,
            model=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            vram_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            compute_capability=f"{major}.{minor}",
            pcie_bus_id=_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
            paths=tuple(path for path in paths if os.path.exists(path)),
        )

    def sample(self) -> Sequence[GpuSample]:
        """Utilisation of all cards; one that does not answer is left out."""
        samples: list[GpuSample] = []
        for index, handle in enumerate(self._handles):
            try:
                samples.append(self._sample(index, handle))
            except self._library.NVMLError as error:
                log.warning("gpu_not_measured", index=index, error=str(error))
        return samples

    def _sample(self, index: int, handle: Any) -> GpuSample:
        nvml = self._library
        return GpuSample(
            index=index,
            utilisation=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            vram_used_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
            temperature_celsius=float(self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)),
            power_watts=self._optional(nvml.nvmlDeviceGetPowerUsage, handle) / 1000,
        )

    def _optional(self, function: Any, *arguments: Any) -> float:
        """Not every card and driver measures everything."""
        try:
            return function(*arguments)
        except self._library.NVMLError_NotSupported:
            return 0

    def close(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None
            self._handles = []


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
