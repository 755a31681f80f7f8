"""The machine itself: processors, memory, disk, system, and how busy they are."""

import os
import platform
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

import psutil

from dantegpu.daemon.probe.amd import AmdGpus
from dantegpu.daemon.probe.devices import Gpu, GpuDriver, Gpus, GpuSample, simulated_gpus
from dantegpu.daemon.probe.nvml import Nvml

type GpuChoice = Literal["auto", "nvidia", "amd", "none"]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What may be leased. 1000 cpu_milli are one core."""

    hostname: str
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    os: str
    kernel: str
    gpus: Gpus = field(default_factory=Gpus)

    @property
    def simulated(self) -> bool:
        return any(device.simulated for device in self.gpus.devices)


@dataclass(frozen=True, slots=True)
class Utilisation:
    """A sample. `cpu` is 0..1 over the time since the sample before."""

    cpu: float
    memory_used_bytes: int
    gpus: Sequence[GpuSample]


class Watched(Protocol):
    """What the daemon asks again and again of what it rents out: its own machine, or a cluster's node."""

    def utilisation(self) -> Utilisation: ...

    def sample_gpus(self) -> Sequence[GpuSample]: ...

    def closed(self) -> str:
        """Why nothing new may be placed on it now; empty when it may."""
        ...

    def close(self) -> None: ...


class Probe:
    """Looks at this machine. `simulate` replaces its real GPUs by simulated ones (`--simulate-gpus`)."""

    def __init__(self, data: Path, *, simulate: str = "", gpus: GpuChoice = "auto") -> None:
        self._data = data
        self._simulated: tuple[Gpu, ...] = simulated_gpus(simulate)
        self._drivers: list[GpuDriver] = []
        self._sampling = threading.Lock()
        if not self._simulated and gpus in ("auto", "nvidia"):
            self._drivers.append(Nvml(required=gpus == "nvidia"))
        if not self._simulated and gpus in ("auto", "amd"):
            self._drivers.append(AmdGpus())

    def probe_machine(self) -> Inventory:
        """Everything that placement wants to know."""
        gpus = Gpus(self._simulated) if self._simulated else self._open_gpus()
        psutil.cpu_percent()  # the first sample begins here
        return Inventory(
            hostname=socket.gethostname(),
            cpu_milli=len(os.sched_getaffinity(0)) * 1000,
            memory_bytes=min(psutil.virtual_memory().total, _own_memory_limit()),
            disk_bytes=psutil.disk_usage(str(self._data)).free,
            os=_system_name(),
            kernel=platform.release(),
            gpus=gpus,
        )

    def utilisation(self) -> Utilisation:
        memory = psutil.virtual_memory()
        return Utilisation(psutil.cpu_percent() / 100, memory.total - memory.available, self.sample_gpus())

    def _open_gpus(self) -> Gpus:
        """The cards of all makers, numbered through."""
        found = Gpus()
        for driver in self._drivers:
            more = driver.open(len(found.devices))
            found = Gpus(
                found.devices + more.devices,
                found.driver_version or more.driver_version,
                found.cuda_version or more.cuda_version,
                "; ".join(filter(None, (found.problem, more.problem))),
            )
        return found

    def sample_gpus(self) -> Sequence[GpuSample]:
        """Every real GPU, as it is right now."""
        with self._sampling:
            return [sample for driver in self._drivers for sample in driver.sample()]

    def closed(self) -> str:
        return ""

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()


def address_towards(url: str) -> str:
    """This machine's address on its way to `url`, for others of the same network; empty when there is no way."""
    parts = urlsplit(url)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            parts.hostname, parts.port or 443, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as route:
            route.connect(target)  # of a datagram socket: the route is looked up, nothing is sent
            return str(route.getsockname()[0])
    except OSError:
        return ""


def _own_memory_limit() -> int:
    """What a container or unit around the daemon leaves it; jobs live below the daemon's cgroup."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) > 0:
            return int(text)
    return 1 << 62


def _system_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()
