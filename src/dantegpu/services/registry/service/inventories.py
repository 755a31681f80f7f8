"""What machines say about themselves, checked: they are not ours, and what they say is shown to people."""

import math
from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address

from dantegpu.contracts.gen.dante.v1 import machine_pb2, registry_pb2
from dantegpu.domain.benchmark import cpu_score, gpu_score, implausible
from dantegpu.domain.ids import DeviceId, MachineId
from dantegpu.domain.resources import parse_capability
from dantegpu.domain.units import InvalidQuantity
from dantegpu.services.registry.errors import InvalidInventory

MAX_DEVICES = 64
MAX_DEVICE_INDEX = 1023
MAX_TEXT_LENGTH = 255
MAX_LIST_LENGTH = 64
MAX_CPU_MILLI = 10**7
MAX_BYTES = 1 << 60
MAX_RUNNING_ATTEMPTS = 1_000_000
MAX_TEMPERATURE_CELSIUS = 1000.0
MAX_POWER_WATTS = 100_000.0

_TEXTS = (
    "hostname", "os", "kernel", "driver_version", "cuda_version", "sandbox", "daemon_version", "region", "closed",
    "container_engine", "site",
)  # fmt: skip
_AMOUNTS = {"cpu_milli": MAX_CPU_MILLI, "memory_bytes": MAX_BYTES, "disk_bytes": MAX_BYTES}
_DEVICE_TEXTS = (
    "model", "uuid", "compute_capability", "pcie_bus_id", "problem", "vendor", "mig_profile", "parent_uuid",
)  # fmt: skip
_DEVICE_AMOUNTS = {
    "index": MAX_DEVICE_INDEX, "vram_bytes": MAX_BYTES, "pcie_generation": 100, "pcie_width": 1024,
    "power_limit_watts": MAX_POWER_WATTS,
}  # fmt: skip
MAX_FIGURE = 1e12
MAX_THROTTLE_REASONS = 8
MAX_PROCESSES = 1_000_000


def checked(machine_id: MachineId, inventory: machine_pb2.Inventory) -> bytes:
    """The inventory with this machine's device ids, serialised so that equal ones are equal bytes.

    Raises InvalidInventory.
    """
    for field in _TEXTS:
        _check_text(field, getattr(inventory, field))
    for field, maximum in _AMOUNTS.items():
        _check_amount(field, getattr(inventory, field), maximum)
    for field in ("executors", "limits_missing", "allowed_images", "networks"):
        texts: list[str] = list(getattr(inventory, field))
        if len(texts) > MAX_LIST_LENGTH:
            raise InvalidInventory(field, f"{len(texts)} entries, at most {MAX_LIST_LENGTH}")
        for text in texts:
            _check_text(field, text)
    if len(inventory.devices) > MAX_DEVICES:
        raise InvalidInventory("devices", f"{len(inventory.devices)} devices, at most {MAX_DEVICES} per machine")
    _check_unique("devices.index", [str(device.index) for device in inventory.devices])
    _check_unique("devices.uuid", [device.uuid for device in inventory.devices if device.uuid])
    if inventory.address:
        _check_address(inventory.address)
    result = machine_pb2.Inventory()
    result.CopyFrom(inventory)
    _check_benchmark(result)
    for device in result.devices:
        _check_device(device)
        _judge(device)
        device.id = str(device_id(machine_id, device))
    result.simulated = inventory.simulated or any(device.simulated for device in inventory.devices)
    return result.SerializeToString(deterministic=True)


def device_id(machine_id: MachineId, device: machine_pb2.Device) -> DeviceId:
    """The same device keeps its id: by the driver's uuid where there is one (it may move to another index), else by
    its index."""
    if device.uuid:
        return DeviceId.derived(machine_id, "uuid", device.uuid)
    return DeviceId.derived(machine_id, "index", device.index)


def utilisation(devices: Iterable[machine_pb2.DeviceUtilisation]) -> bytes:
    """A serialised Machine with nothing but its `device_utilisation`; impossible values become possible ones."""
    message = registry_pb2.Machine()
    for device in list(devices)[:MAX_DEVICES]:
        message.device_utilisation.add(
            index=clamped_count(device.index, MAX_DEVICE_INDEX),
            gpu_utilisation=clamped(device.gpu_utilisation, 1.0),
            vram_used_bytes=clamped_count(device.vram_used_bytes, MAX_BYTES),
            temperature_celsius=clamped(device.temperature_celsius, MAX_TEMPERATURE_CELSIUS),
            power_watts=clamped(device.power_watts, MAX_POWER_WATTS),
            memory_utilisation=clamped(device.memory_utilisation, 1.0),
            throttle_reasons=[text for text in device.throttle_reasons[:MAX_THROTTLE_REASONS] if _is_shown(text)],
            processes=clamped_count(device.processes, MAX_PROCESSES),
        )
    return message.SerializeToString()


def _is_shown(text: str) -> bool:
    return len(text) <= MAX_TEXT_LENGTH and text.isprintable()


def clamped(value: float, maximum: float) -> float:
    """`value` within 0..maximum; 0 for what is no number."""
    return min(max(value, 0.0), maximum) if math.isfinite(value) else 0.0


def clamped_count(value: int, maximum: int) -> int:
    return min(max(value, 0), maximum)


def _check_benchmark(inventory: machine_pb2.Inventory) -> None:
    benchmark = inventory.benchmark
    _check_text("benchmark.problem", benchmark.problem)
    for field in (
        "measured_at_unix_s", "cpu_gflops", "memory_gbps", "disk_write_mbps", "disk_read_mbps", "network_up_mbps",
        "network_down_mbps",
    ):  # fmt: skip
        _check_amount(f"benchmark.{field}", getattr(benchmark, field), MAX_FIGURE)
    if inventory.HasField("benchmark"):
        benchmark.score = cpu_score(benchmark.cpu_gflops, benchmark.memory_gbps)


def _judge(device: machine_pb2.Device) -> None:
    """Its score, and whether it can be what it says it is: a device that cannot is taken out."""
    figures = device.benchmark
    _check_text("devices.benchmark.problem", figures.problem)
    for field in ("fp32_tflops", "bf16_tflops", "memory_gbps", "pcie_gbps", "vram_checked_bytes"):
        _check_amount(f"devices.benchmark.{field}", getattr(figures, field), MAX_BYTES)
    if device.HasField("benchmark"):
        figures.score = gpu_score(figures.fp32_tflops, figures.bf16_tflops, figures.memory_gbps)
    if device.simulated or device.problem:
        return
    device.problem = figures.problem
    if not device.problem and not device.mig_profile:
        capability = _capability(device.compute_capability)
        device.problem = implausible(device.model, device.vram_bytes, capability, figures.fp32_tflops)


def _capability(text: str) -> int:
    try:
        return parse_capability(text)
    except InvalidQuantity:
        return 0


def _check_device(device: machine_pb2.Device) -> None:
    for field in _DEVICE_TEXTS:
        _check_text(f"devices.{field}", getattr(device, field))
    for field, maximum in _DEVICE_AMOUNTS.items():
        _check_amount(f"devices.{field}", getattr(device, field), maximum)
    if not device.model:
        raise InvalidInventory("devices.model", f"device {device.index} has none")


def _check_text(field: str, text: str) -> None:
    if len(text) > MAX_TEXT_LENGTH:
        raise InvalidInventory(field, f"{len(text)} characters, at most {MAX_TEXT_LENGTH}")
    if not text.isprintable():
        raise InvalidInventory(field, "contains control characters")


def _check_address(text: str) -> None:
    """It becomes part of the environment of other machines' jobs."""
    try:
        ip_address(text)
    except ValueError:
        raise InvalidInventory("address", f"{text[:80]!r} is no IP address") from None


def _check_amount(field: str, value: float, maximum: float) -> None:
    if not 0 <= value <= maximum:
        raise InvalidInventory(field, f"{value} is outside of 0..{maximum}")


def _check_unique(field: str, values: list[str]) -> None:
    doubled = [value for value, count in Counter(values).items() if count > 1]
    if doubled:
        raise InvalidInventory(field, f"{doubled[0]} occurs twice")
