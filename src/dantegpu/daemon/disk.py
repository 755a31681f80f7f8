"""How much of the machine's disk an attempt fills: its log, and what it leaves in its folders.

No limit of the kernel holds for a folder on every file system, so the daemon looks, the more often the faster it fills,
and ends a job that goes too far.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dantegpu.domain.units import format_bytes

FIRST_LOOK_SECONDS = 1.0
"""After its start."""
MAX_PAUSE_SECONDS = 1.0
MIN_PAUSE_SECONDS = 0.05
SCAN_SHARE = 0.02
"""At most this part of the time goes into looking through a job's files."""
MIN_SCAN_PAUSE_SECONDS = 2.0
FAST_BYTES = 8 << 20
"""What a log may grow between two looks before they come sooner."""
_BLOCK_BYTES = 512  # of st_blocks, see stat(2)


def used_bytes(folders: Sequence[Path]) -> int:
    """Bytes that the files below really take: sparse files little, and a file with two names twice at most."""
    total = 0
    for top in folders:
        for _, folders_here, names, descriptor in os.fwalk(top, follow_symlinks=False, onerror=None):
            for name in (*names, *folders_here):
                try:
                    total += os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_blocks * _BLOCK_BYTES
                except OSError:
                    continue
    return total


@dataclass(slots=True)
class DiskWatch:
    """Runs beside one attempt, from FIRST_LOOK_SECONDS on. `full` is set, to a text for people, when a limit is passed;
    then `notify` is called.

    A limit of zero is none. The one of the folders is asked for each time: a daemon that was restarted learns it late.
    """

    folders: Sequence[Path]
    folders_limit: Callable[[], int]
    log: Path
    log_limit: int
    notify: Callable[[], None]
    full: str = field(default="", init=False)

    async def run(self) -> None:
        """Until it is full, or for ever."""
        size, pause, next_scan = 0, MAX_PAUSE_SECONDS, 0.0
        while not self.full:
            before, size = size, _size(self.log)
            pause = MIN_PAUSE_SECONDS if size - before > FAST_BYTES else min(MAX_PAUSE_SECONDS, pause * 2)
            limit = self.folders_limit()
            if self.log_limit and size > self.log_limit:
                self.full = f"ended: it printed more than {format_bytes(self.log_limit)}; write files instead"
            elif limit and time.monotonic() >= next_scan:
                began = time.monotonic()
                if await asyncio.to_thread(used_bytes, self.folders) > limit:
                    self.full = f"ended: it filled more than the {format_bytes(limit)} of disk that it asked for"
                took = time.monotonic() - began
                next_scan = time.monotonic() + max(MIN_SCAN_PAUSE_SECONDS, took / SCAN_SHARE)
            if not self.full:
                await asyncio.sleep(pause)
        self.notify()


def _size(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0
