"""A provider's machine belongs to its jobs: the daemon keeps out of their memory."""

import ctypes
import gc
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any, Final, cast

_UNUSED: Final = ("rich", "aiohttp", "click", "pygments")
"""Taken along by structlog and httpx (pretty tracebacks, a command line) and by nats-py (WebSockets) when installed:
17 MB, and half of the time that the imports take."""
_DROPPED: Final = ("nvml", "_nvml", "c_nvml", "NVML_")
_M_ARENA_MAX: Final = -8
GC_ALLOCATIONS: Final = 10_000
"""Objects made before the collector looks at the young ones: as many as some dozens of attempts make."""


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


def load_nvml_lean() -> None:
    """Import NVIDIA's binding and drop what is never called: 19 MB of it, mostly classes of structures.

    Before the other imports, which then fill the room that becomes free. `give_back_memory` could not: it is in pieces.
    """
    try:
        import pynvml
    except ImportError:
        return
    names = vars(pynvml)
    source = Path(__file__).with_name("probe") / "nvml.py"
    spelled = set(re.findall(r"\b(?:nvml|NVML)\w+", source.read_text()))
    kept = _reachable(names, {"NVMLError", "_nvmlGetFunctionPointer", "_nvmlCheckReturn", *spelled})
    for name in [name for name in names if name.startswith(_DROPPED) and name not in kept]:
        delattr(pynvml, name)
    gc.collect()


def _reachable(names: Mapping[str, object], wanted: set[str]) -> set[str]:
    """`wanted`, and what their code mentions, and theirs."""
    found: set[str] = set()
    waiting = [name for name in wanted if name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        thing = names[name]
        members = list(vars(thing).values()) if isinstance(thing, type) else [inspect.unwrap(thing)]  # pyright: ignore[reportArgumentType]
        codes = [code for member in members if isinstance(code := getattr(member, "__code__", None), CodeType)]
        while codes:
            code = codes.pop()
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            waiting += [each for each in code.co_names if each in names]
    return found


def give_back_memory() -> None:
    """After the start: what only the start needed goes back to the system."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, *gc.get_threshold()[1:])
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
