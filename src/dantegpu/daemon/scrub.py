"""GPUs whose memory may still hold what a job left there, and what clears it. Remembered across crashes of the daemon.

A GPU is written down before a job starts on it, with the attempts that hold it, and crossed out when its memory has
been overwritten. So a daemon that dies in between, or with the machine, leaves no GPU that the next job could read.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

SCRUB_SECONDS = 120.0
VENDORS = frozenset({"nvidia"})
"""AMD's kernel driver wipes the memory of computing processes when they give it back
(AMDGPU_GEM_CREATE_VRAM_WIPE_ON_RELEASE in drivers/gpu/drm/amd/amdgpu/amdgpu_amdkfd_gpuvm.c)."""


class HeldFile:
    """UUID of a GPU -> attempts that are or were on it since it was clean, and their teams."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, dict[str, str]]:
        """Empty where there is none; what cannot be read counts as written by nobody."""
        try:
            raw = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            log.error("held_gpus_unreadable", path=str(self._path))
            return {}
        return {str(uuid): dict(holders) for uuid, holders in raw.items()}

    def write(self, held: Mapping[str, Mapping[str, str]]) -> None:
        """On the disk when it returns."""
        fresh = self._path.with_suffix(".new")
        with fresh.open("w") as file:
            json.dump(held, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._path)


class Scrubber:
    """Overwrites the memory of one GPU after the other, each in a process of its own."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._processes: set[int] = set()

    @property
    def pids(self) -> set[int]:
        """Of what clears memory now, which is no stranger on a GPU."""
        return set(self._processes)

    async def scrub(self, uuid: str, vendor: str) -> str:
        """Empty when its memory is clean; else why it may not be."""
        if not self._enabled or vendor not in VENDORS:
            return ""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": uuid}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "dantegpu.daemon.probe.scrub", env=environment, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        self._processes.add(process.pid)
        try:
            async with asyncio.timeout(SCRUB_SECONDS):
                said, _ = await process.communicate()
        except TimeoutError:
            return f"its driver did not clear it within {SCRUB_SECONDS:.0f} s"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            self._processes.discard(process.pid)
        text = said.decode(errors="replace").strip()
        if process.returncode == 0:
            log.debug("gpu_memory_cleared", uuid=uuid, bytes=text)
            return ""
        return text or f"clearing it ended with exit code {process.returncode}"
