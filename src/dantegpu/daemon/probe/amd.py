"""AMD's cards through the files of their kernel driver, which is where AMD's own library (amdsmi) reads, too.

Source: the kernel's Documentation/gpu/amdgpu (thermal.rst, ras.rst, driver-misc.rst) and drm/amd/amdkfd/kfd_topology.c.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dantegpu.daemon.probe.devices import Gpu, GpuDriver, Gpus, GpuSample

SYSTEM_FOLDER = Path("/sys")
DEVICE_FOLDER = Path("/dev")
VENDOR_ID = "0x1002"
_GENERATION_OF_SPEED = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


@dataclass(frozen=True, slots=True)
class _Card:
    index: int
    folder: Path
    kfd_id: str


class AmdGpus(GpuDriver):
    """Cards with a compute node (kfd): one that only draws pictures cannot be rented out."""

    def __init__(self) -> None:
        self._cards: list[_Card] = []

    def open(self, first_index: int) -> Gpus:
        devices: list[Gpu] = []
        self._cards = []
        nodes = _compute_nodes()
        for folder in sorted((SYSTEM_FOLDER / "class/drm").glob("card*/device")):
            if not re.fullmatch(r"card\d+", folder.parent.name) or _read(folder / "vendor") != VENDOR_ID:
                continue
            render = next((path.name for path in (folder / "drm").glob("renderD*")), "")
            node = nodes.get(render.removeprefix("renderD"))
            if node is None:
                continue
            gpu = _device(first_index + len(devices), folder, render)
            devices.append(gpu)
            self._cards.append(_Card(gpu.index, folder, _read(node / "gpu_id")))
        return Gpus(tuple(devices), _read(SYSTEM_FOLDER / "module/amdgpu/version") if devices else "")

    def sample(self) -> Sequence[GpuSample]:
        users = _users()
        return [_sample(card, users.get(card.kfd_id, frozenset())) for card in self._cards]

    def close(self) -> None:
        self._cards = []


def _device(index: int, folder: Path, render: str) -> Gpu:
    unique = _read(folder / "unique_id")
    nodes = (DEVICE_FOLDER / "kfd", DEVICE_FOLDER / "dri" / render)
    speed = _read(folder / "max_link_speed").partition(" ")[0]
    return Gpu(
        index=index,
        model=_read(folder / "product_name") or f"AMD GPU {_read(folder / 'device')}",
        uuid=f"GPU-{unique}" if unique else "",
        vram_bytes=_number(folder / "mem_info_vram_total"),
        compute_capability="",
        pcie_bus_id=os.path.basename(os.path.realpath(folder)),
        paths=tuple(str(node) for node in nodes if node.exists()),
        vendor="amd",
        pcie_generation=_GENERATION_OF_SPEED.get(speed, 0),
        pcie_width=_number(folder / "max_link_width"),
        power_limit_watts=_sensor(folder, "power1_cap") / 1e6,
        ecc=(folder / "ras/umc_err_count").exists(),
    )


def _sample(card: _Card, pids: frozenset[int]) -> GpuSample:
    folder = card.folder
    if not (folder / "mem_info_vram_used").exists():
        return GpuSample(card.index, problem="does not answer: its driver is gone")
    lost = re.search(r"^ue:\s*(\d+)", _read(folder / "ras/umc_err_count"), re.MULTILINE)
    problem = f"{lost.group(1)} uncorrectable memory errors (ECC)" if lost and lost.group(1) != "0" else ""
    return GpuSample(
        index=card.index,
        utilisation=_number(folder / "gpu_busy_percent") / 100,
        memory_utilisation=_number(folder / "mem_busy_percent") / 100,
        vram_used_bytes=_number(folder / "mem_info_vram_used"),
        temperature_celsius=_sensor(folder, "temp1_input") / 1000,
        power_watts=(_sensor(folder, "power1_average") or _sensor(folder, "power1_input")) / 1e6,
        pids=pids,
        problem=problem,
    )


def _compute_nodes() -> dict[str, Path]:
    """Number of the render node -> folder of the compute node."""
    found: dict[str, Path] = {}
    for folder in (SYSTEM_FOLDER / "class/kfd/kfd/topology/nodes").glob("*"):
        minor = re.search(r"^drm_render_minor (\d+)$", _read(folder / "properties"), re.MULTILINE)
        if minor and minor.group(1) not in ("0", "-1"):
            found[minor.group(1)] = folder
    return found


def _users() -> dict[str, frozenset[int]]:
    """Compute node's gpu_id -> processes that hold memory of it."""
    users: dict[str, set[int]] = {}
    for file in (SYSTEM_FOLDER / "class/kfd/kfd/proc").glob("*/vram_*"):
        if file.parent.name.isdigit() and _number(file):
            users.setdefault(file.name.removeprefix("vram_"), set()).add(int(file.parent.name))
    return {gpu_id: frozenset(pids) for gpu_id, pids in users.items()}


def _sensor(folder: Path, name: str) -> int:
    return next((_number(path) for path in sorted((folder / "hwmon").glob(f"*/{name}"))), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _read(path)
    return int(text) if text.isdigit() else 0
