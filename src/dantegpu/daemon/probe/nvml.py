"""NVIDIA's cards through NVML (`nvidia-ml-py`): whole ones, and the MIG instances of cards that are cut up.

What a card cannot or its driver does not tell is left at zero: not every card measures everything, and a consumer's
card has no ECC.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from dantegpu.daemon.probe import signs
from dantegpu.daemon.probe.devices import Gpu, GpuDriver, Gpus, GpuSample

log = structlog.get_logger(__name__)

DEVICE_FOLDER = Path("/dev")
CAPABILITIES_FOLDER = Path("/proc/driver/nvidia/capabilities")
_SHARED_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
_MAX_EVENTS_PER_SAMPLE = 64

XID_HOLD_SECONDS = 600.0
"""A card is left alone for so long after its last XID error; what lasts shows in its ECC state, too."""
# Source: NVIDIA's k8s-device-plugin (internal/rm/health.go): errors that a faulty program causes on a healthy card.
XIDS_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 109})

# Source: nvml.h, nvmlClocksEventReasons, without those that are no slowdown (idle, clocks set by hand).
_THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True)
class _Card:
    """A device that is leased as one: `handle` its own, `parent` of the card that it is a part of (or is)."""

    index: int
    handle: Any
    parent: Any
    uuid: str
    parent_uuid: str = ""


class Nvml(GpuDriver):
    """`required`: look for the library even where no driver shows itself."""

    def __init__(self, *, required: bool = False) -> None:
        self._required = required
        self._library: Any = None
        self._events: Any = None
        self._cards: list[_Card] = []
        self._xids: dict[str, tuple[int, float]] = {}
        """UUID of a card -> its last XID error, and when (monotonic)."""

    # --- finding ------------------------------------------------------------------------------------------------------

    def open(self, first_index: int) -> Gpus:
        if not self._required and not signs.nvidia_shows():
            return Gpus()
        try:
            import pynvml
        except ImportError:
            return Gpus(problem="nvidia-ml-py is not installed")
        try:
            pynvml.nvmlInit()
            self._library = pynvml
            devices, problems = self._find(first_index)
            cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            self._listen()
            return Gpus(tuple(devices), driver, f"{cuda // 1000}.{cuda % 1000 // 10}", "; ".join(problems))
        except pynvml.NVMLError as error:
            self.close()
            return Gpus(problem=f"NVIDIA's driver does not answer: {error}")

    def _find(self, first_index: int) -> tuple[list[Gpu], list[str]]:
        nvml = self._library
        devices: list[Gpu] = []
        problems: list[str] = []
        for number in range(int(nvml.nvmlDeviceGetCount())):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(number)
                whole = self._device(first_index + len(devices), handle)
                parts = self._parts(handle, whole)
            except nvml.NVMLError as error:
                # One dead card must not hide the others.
                problems.append(f"GPU {number} does not answer: {error}")
                continue
            if parts is None:
                devices.append(whole)
                self._cards.append(_Card(whole.index, handle, handle, whole.uuid))
            elif not parts:
                problems.append(f"GPU {number} is in MIG mode, but has no instances: nvidia-smi mig -cgi ... -C")
            else:
                devices += parts
        return devices, problems

    def _device(self, index: int, handle: Any) -> Gpu:
        nvml = self._library
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Gpu(
            index=index,
            model=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            vram_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            compute_capability=f"{major}.{minor}",
            pcie_bus_id=_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
            paths=_existing(f"nvidia{int(nvml.nvmlDeviceGetMinorNumber(handle))}", *_SHARED_NODES),
            vendor="nvidia",
            pcie_generation=int(self._optional(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)),
            pcie_width=int(self._optional(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)),
            power_limit_watts=self._optional(nvml.nvmlDeviceGetEnforcedPowerLimit, handle) / 1000,
            ecc=self._is_on(nvml.nvmlDeviceGetEccMode, handle),
        )

    def _parts(self, handle: Any, whole: Gpu) -> list[Gpu] | None:
        """The card's MIG instances; None when it is not cut up."""
        nvml = self._library
        if not self._is_on(nvml.nvmlDeviceGetMigMode, handle):
            return None
        parts: list[Gpu] = []
        for number in range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle))):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except nvml.NVMLError_NotFound:
                continue
            name = _text(nvml.nvmlDeviceGetName(part))
            profile = re.search(r"\b\d+(?:c\.\d+)?g\.\d+gb\S*", name)
            gpu = Gpu(
                index=whole.index + len(parts),
                model=whole.model,
                uuid=_text(nvml.nvmlDeviceGetUUID(part)),
                vram_bytes=int(nvml.nvmlDeviceGetMemoryInfo(part).total),
                compute_capability=whole.compute_capability,
                pcie_bus_id=whole.pcie_bus_id,
                paths=(*whole.paths, *self._part_nodes(handle, part)),
                vendor=whole.vendor,
                mig_profile=profile.group(0) if profile else f"mig {number}",
                parent_uuid=whole.uuid,
                pcie_generation=whole.pcie_generation,
                pcie_width=whole.pcie_width,
                ecc=whole.ecc,
            )
            parts.append(gpu)
            self._cards.append(_Card(gpu.index, part, handle, gpu.uuid, whole.uuid))
        return parts

    def _part_nodes(self, handle: Any, part: Any) -> tuple[str, ...]:
        """The nodes that open an instance. Source: NVIDIA's MIG user guide, "Device nodes and capabilities"."""
        nvml = self._library
        folder = CAPABILITIES_FOLDER / f"gpu{int(nvml.nvmlDeviceGetMinorNumber(handle))}" / "mig"
        instance = folder / f"gi{int(nvml.nvmlDeviceGetGpuInstanceId(part))}"
        compute = instance / f"ci{int(nvml.nvmlDeviceGetComputeInstanceId(part))}"
        access = [folder / "access" for folder in (instance, compute)]
        texts = [path.read_text() for path in access if path.is_file()]
        minors = [found.group(1) for text in texts if (found := re.search(r"DeviceFileMinor:\s*(\d+)", text))]
        return _existing(*(f"nvidia-caps/nvidia-cap{minor}" for minor in minors))

    def _listen(self) -> None:
        """From now on the driver keeps this process's XID errors until they are asked for."""
        nvml = self._library
        try:
            self._events = nvml.nvmlEventSetCreate()
            for card in {card.parent_uuid or card.uuid: card for card in self._cards}.values():
                nvml.nvmlDeviceRegisterEvents(card.parent, nvml.nvmlEventTypeXidCriticalError, self._events)
        except nvml.NVMLError as error:
            # WSL and virtual GPUs have no events; the other signs of health are still looked at.
            log.info("no_gpu_events", error=str(error))

    # --- measuring ----------------------------------------------------------------------------------------------------

    def sample(self) -> Sequence[GpuSample]:
        if self._library is None:
            return []
        self._take_events()
        samples: list[GpuSample] = []
        for card in self._cards:
            try:
                samples.append(self._sample(card))
            except self._library.NVMLError_GpuIsLost:
                samples.append(GpuSample(card.index, problem="has fallen off the bus: the machine needs a reboot"))
            except self._library.NVMLError as error:
                samples.append(GpuSample(card.index, problem=f"does not answer: {error}"))
        return samples

    def _sample(self, card: _Card) -> GpuSample:
        nvml = self._library
        celsius = self._optional(nvml.nvmlDeviceGetTemperature, card.parent, nvml.NVML_TEMPERATURE_GPU)
        reasons = int(self._optional(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card.parent))
        rates = None
        if not card.parent_uuid:
            rates = self._optional(nvml.nvmlDeviceGetUtilizationRates, card.handle) or None
        return GpuSample(
            index=card.index,
            utilisation=rates.gpu / 100 if rates else 0.0,
            memory_utilisation=rates.memory / 100 if rates else 0.0,
            vram_used_bytes=self._used_bytes(card.handle),
            temperature_celsius=float(celsius),
            # The watts of a card cannot be told apart by its parts.
            power_watts=0.0 if card.parent_uuid else self._optional(nvml.nvmlDeviceGetPowerUsage, card.parent) / 1000,
            throttled=tuple(text for bit, text in _THROTTLE_REASONS.items() if reasons & bit),
            pids=frozenset(int(process.pid) for process in self._processes(card.handle)),
            problem=self._problem(card),
        )

    def _used_bytes(self, handle: Any) -> int:
        """Without what the driver keeps for itself, as nvidia-smi shows it; drivers before R510 count that too."""
        nvml = self._library
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2).used)
        except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotSupported):
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _processes(self, handle: Any) -> Sequence[Any]:
        return self._optional(self._library.nvmlDeviceGetComputeRunningProcesses, handle) or ()

    def _problem(self, card: _Card) -> str:
        nvml = self._library
        remapped = self._optional(nvml.nvmlDeviceGetRemappedRows, card.parent)
        if remapped and remapped[3]:
            return "its memory is worn out: a row could not be remapped"
        if remapped and remapped[2]:
            return "rows of its memory wait to be remapped: reset the GPU"
        if self._optional(nvml.nvmlDeviceGetRetiredPagesPendingStatus, card.parent):
            return "pages of its memory wait to be retired: reset the GPU"
        kind = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        lost = self._optional(nvml.nvmlDeviceGetTotalEccErrors, card.parent, *kind)
        if lost:
            return f"{int(lost)} uncorrectable memory errors (ECC) since its last reset"
        xid, at = self._xids.get(card.parent_uuid or card.uuid, (0, 0.0))
        if xid and time.monotonic() - at < XID_HOLD_SECONDS:
            return f"XID error {xid}: it is left alone for {XID_HOLD_SECONDS / 60:.0f} minutes"
        return ""

    def _take_events(self) -> None:
        if self._events is None:
            return
        nvml = self._library
        for _ in range(_MAX_EVENTS_PER_SAMPLE):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
                uuid = _text(nvml.nvmlDeviceGetUUID(event.device))
            except nvml.NVMLError:
                return  # no more, or a card that is gone: that shows by itself
            xid = int(event.eventData)
            log.warning("gpu_xid_error", uuid=uuid, xid=xid, of_program=xid in XIDS_OF_PROGRAMS)
            if xid not in XIDS_OF_PROGRAMS:
                self._xids[uuid] = (xid, time.monotonic())

    def _is_on(self, mode: Callable[..., Any], handle: Any) -> bool:
        """Of a (current, pending) pair, the current one."""
        pair = self._optional(mode, handle)
        return bool(pair and pair[0])

    def _optional(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Not every card and driver measures everything: zero then."""
        nvml = self._library
        try:
            return function(*arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
            return 0

    def close(self) -> None:
        if self._library is not None:
            if self._events is not None:
                self._library.nvmlEventSetFree(self._events)
                self._events = None
            self._library.nvmlShutdown()
            self._library = None
            self._cards = []


def _existing(*names: str) -> tuple[str, ...]:
    return tuple(str(path) for name in names if (path := DEVICE_FOLDER / name).exists())


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
