"""When this machine measures itself: soon after it has joined, then at random times, only while it is idle."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.attempt import Platform
from dantegpu.daemon.probe.devices import Gpu
from dantegpu.daemon.transfer import TransferFailed, Transfers, hash_files
from dantegpu.daemon.workspace import OutputFile
from dantegpu.kit.errors import ServiceError

log = structlog.get_logger(__name__)

FIRST_AFTER_SECONDS = 60.0
"""A machine that has just joined may be given work at once; the work is more important than its figures."""
TIMEOUT_SECONDS = 300.0
BUSY_PAUSE_SECONDS = 60.0
NICENESS = 19
NETWORK_BYTES = 16 << 20
"""Small enough for a machine at home, large enough to outlast the start of a connection."""
_CHUNK_BYTES = 1 << 20
_FIGURES = (
    "cpu_gflops", "memory_gbps", "disk_write_mbps", "disk_read_mbps", "network_up_mbps", "network_down_mbps",
)  # fmt: skip
_GPU_FIGURES = ("fp32_tflops", "bf16_tflops", "memory_gbps", "pcie_gbps", "vram_checked_bytes")


class Benchmarks:
    """The last figures, kept in `path`. `every_hours`: on average; 0: never."""

    def __init__(self, path: Path, gpus: Sequence[Gpu], every_hours: float) -> None:
        self._path = path
        self._gpus = gpus
        self._every_hours = every_hours
        self._process: asyncio.subprocess.Process | None = None
        self._network: asyncio.Task[dict[str, float]] | None = None
        self._last: dict[str, Any] = _read(path, [gpu.uuid for gpu in gpus])

    @property
    def pids(self) -> set[int]:
        """The processes that measure, while they do."""
        return {self._process.pid} if self._process is not None else set()

    def pause_seconds(self) -> float | None:
        """Until the next one; None: never. Drawn at random, so that nobody can be at his best for it."""
        if not self._every_hours:
            return None
        if not self._last:
            return FIRST_AFTER_SECONDS
        return FIRST_AFTER_SECONDS + random.expovariate(1 / (self._every_hours * 3600))

    async def run(self) -> bool:
        """Measure now; True when there are new figures. `stop` ends it at once."""
        seed = random.getrandbits(32)
        folder = str(self._path.parent)
        command = ["nice", "-n", str(NICENESS), sys.executable, "-P", "-m", "dantegpu.daemon.probe.challenge"]
        process = self._process = await asyncio.create_subprocess_exec(
            *command, folder, str(seed), stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                answer, _ = await process.communicate()
        except TimeoutError:
            log.warning("benchmark_too_slow", seconds=TIMEOUT_SECONDS)
            return False
        finally:
            self.stop()
            await process.wait()
            self._process = None
        if process.returncode != 0:
            log.info("benchmark_ended", returncode=process.returncode)
            return False
        found: dict[str, Any] = json.loads(answer)
        found |= {"at": int(time.time()), "devices": [gpu.uuid for gpu in self._gpus]}
        # The network is measured next; until then its old figures are the best there are.
        self._keep({**{name: self._last.get(name, 0) for name in _FIGURES}, **found})
        return True

    async def run_network(self, platform: Platform, transfers: Transfers) -> bool:
        """Send a file to the platform's storage and fetch it back; True when there are new figures."""
        task = self._network = asyncio.create_task(_measure_network(self._path.parent, platform, transfers))
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            self._network = None
        if task.cancelled():
            return False
        if (error := task.exception()) is not None:
            if not isinstance(error, ServiceError | TransferFailed):
                raise error
            log.info("network_not_measured", error=str(error))
            return False
        self._keep({**self._last, **task.result()})
        return True

    def _keep(self, found: dict[str, Any]) -> None:
        self._last = found
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self._last))
        fresh.rename(self._path)

    def stop(self) -> None:
        """Idempotent: the machine has something better to do."""
        if self._network is not None:
            self._network.cancel()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def tell(self, inventory: machine_pb2.Inventory) -> None:
        """Put the last figures into what the platform is told."""
        if not self._last:
            return
        inventory.benchmark.measured_at_unix_s = self._last.get("at", 0)
        inventory.benchmark.problem = str(self._last.get("problem", ""))[:200]
        for name in _FIGURES:
            setattr(inventory.benchmark, name, self._last.get(name, 0))
        by_uuid: dict[str, Mapping[str, Any]] = {gpu["uuid"]: gpu for gpu in self._last.get("gpus", ())}
        for device in inventory.devices:
            figures = by_uuid.get(device.uuid, {})
            for name in _GPU_FIGURES:
                setattr(device.benchmark, name, figures.get(name, 0))
            device.benchmark.problem = str(figures.get("problem", ""))[:200]


async def _measure_network(folder: Path, platform: Platform, transfers: Transfers) -> dict[str, float]:
    """MB/s up and down, connecting included. Raises ServiceError, TransferFailed."""
    name = "benchmark.net"
    path = folder / name
    try:
        await asyncio.to_thread(_write_noise, path)
        (file,) = await asyncio.to_thread(hash_files, folder, [OutputFile(name, NETWORK_BYTES)])
        reply = await platform.urls(machine_pb2.UrlsRequest(benchmark=file.to_proto()))
        if reply.error:
            raise TransferFailed(reply.error)
        began = time.perf_counter()
        await transfers.send(folder, [file], reply.result_urls)
        sent = time.perf_counter()
        await transfers.fetch(reply.input_url, path, sha256=file.sha256, size_bytes=NETWORK_BYTES)
        fetched = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    return {
        "network_up_mbps": NETWORK_BYTES / 1e6 / (sent - began),
        "network_down_mbps": NETWORK_BYTES / 1e6 / (fetched - sent),
    }


def _write_noise(path: Path) -> None:
    """What no line on the way can make smaller."""
    with path.open("wb") as file:
        for _ in range(NETWORK_BYTES // _CHUNK_BYTES):
            file.write(os.urandom(_CHUNK_BYTES))


def _read(path: Path, uuids: Sequence[str]) -> dict[str, Any]:
    """The figures of before, unless they are of other devices or of nothing."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if known.get("devices") == list(uuids) else {}
