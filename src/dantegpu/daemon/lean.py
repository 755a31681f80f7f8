"""A provider's machine belongs to its jobs: the daemon keeps out of their memory."""

import ctypes
import gc
import sys
from typing import Any, Final, cast

_UNUSED: Final = ("rich", "aiohttp")
"""Taken along by structlog and httpx (pretty tracebacks) and by nats-py (WebSockets) when installed: 15 MB, and half of
the time that the imports take."""
_M_ARENA_MAX: Final = -8


def keep_lean() -> None:
    """Call before the first import of those libraries, in a process that is the daemon and nothing else."""
    for name in _UNUSED:
        if name not in sys.modules:
            # None makes `import rich` raise ImportError, which its users take for "not installed".
            cast("dict[str, Any]", sys.modules)[name] = None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # Else glibc keeps an arena per thread, each as large as the largest file it ever hashed.
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """After the start: what only the start needed goes back to the system."""
    gc.collect()
    gc.freeze()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
