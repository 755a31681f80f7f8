"""The one place where the simulation takes something out of production code and puts something else in.

Time, chance, ids, logs, the NATS client, the database and the constants that make a run short. Everything else that the
services and the daemon do is theirs.
"""

import random as real_random
import sys
import time as real_time
import uuid as real_uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from random import Random
from types import ModuleType
from typing import Any, Protocol
from uuid import UUID

from structlog._config import BoundLoggerLazyProxy

from dantegpu.daemon import leases
from dantegpu.domain import ids
from dantegpu.domain.job import model
from dantegpu.kit import bus, telemetry
from dantegpu.services.billing import module as billing_module
from dantegpu.services.scheduler import module as scheduler_module
from dantegpu.services.scheduler.service import settlement, waiting
from tests.simulation.hardware import Hardware
from tests.simulation.loop import Process, SimLoop, current_process
from tests.simulation.memory.engine import MemoryDatabase, MemoryServer
from tests.simulation.nats import SimClient, SimNats

START_SECONDS = 1_767_225_600.0
"""The wall time at which every run begins: 2026-01-01, UTC."""
WINDOW_SECONDS = 5
OPEN_AHEAD_SECONDS = 3.5
STREAM_CHECK_SECONDS = 6.0
NO_FUNDS_RETRY_SECONDS = 3.0
RETRY_BACKOFF_MAX_SECONDS = 2
_PACKAGES = ("dantegpu.kit", "dantegpu.services", "dantegpu.daemon", "dantegpu.domain")


class Surroundings(Protocol):
    """What the patches need of a world."""

    loop: SimLoop
    random: Random
    broker: SimNats
    database: MemoryServer

    def hardware_of(self, process: Process | None) -> Hardware: ...
    def logged(self, level: str, module: str, event: str, fields: dict[str, Any]) -> None: ...


_world: Surroundings | None = None


def enter(world: Surroundings | None) -> None:
    """From now on production code lives in `world`."""
    global _world
    _world = world


def _current() -> Surroundings:
    assert _world is not None, "production code runs outside of a simulated world"
    return _world


class _Module:
    """Stands for a module of the standard library; what it does not replace is the real one's."""

    def __init__(self, real: ModuleType) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Time(_Module):
    def monotonic(self) -> float:
        return _current().loop.time()

    perf_counter = monotonic

    def time(self) -> float:
        # Files of the simulated machines carry virtual times.
        return _current().loop.time()

    def sleep(self, seconds: float) -> None:
        raise AssertionError("a blocking sleep in simulated code")


class _Random(_Module):
    def __getattr__(self, name: str) -> Any:
        return getattr(_current().random, name)


class _Uuid(_Module):
    def uuid4(self) -> UUID:
        return UUID(int=_current().random.getrandbits(128), version=4)


class _Uuid7:
    """Rising ids without the wall clock and os.urandom."""

    def next(self, count: int) -> list[UUID]:
        return [self._next() for _ in range(count)]

    def _next(self) -> UUID:
        world = _current()
        milliseconds = int((START_SECONDS + world.loop.time()) * 1000)
        self._last = max(getattr(self, "_last", 0) + 1, (milliseconds << 16) | world.random.getrandbits(8))
        value = (self._last >> 16 & 0xFFFF_FFFF_FFFF) << 80 | 0x7 << 76 | 0b10 << 62
        return UUID(int=value | (self._last & 0xFFFF) << 40 | world.random.getrandbits(40))


class _Logger:
    def __init__(self, module: str) -> None:
        self._module = module.rpartition(".")[2]

    def __getattr__(self, level: str) -> Callable[..., None]:
        def say(event: str, **fields: Any) -> None:
            _current().logged(level, self._module, event, fields)

        return say


def _no_span(name: str, *arguments: Any, **attributes: Any) -> Any:
    return nullcontext()


def _no_trace() -> str:
    return ""


def _boottime() -> float:
    return _current().hardware_of(current_process()).boot_time()


def _boot_id() -> str:
    return _current().hardware_of(current_process()).boot_id()


def _client() -> SimClient:
    return SimClient(_current().broker)


def _database(dsn: str, schema: str, **options: Any) -> MemoryDatabase:
    return MemoryDatabase(_current().database, schema)


class _NoMigrations:
    def __init__(self, *arguments: Any) -> None:
        return

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        return


@contextmanager
def installed() -> Generator[None]:
    """While this is open, production code sees simulated time, chance, network and storage; afterwards real ones."""
    undo: list[tuple[object, str, Any]] = []

    def put(owner: object, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    everywhere: dict[int, Any] = {
        id(real_time): _Time(real_time),
        id(real_random): _Random(real_random),
        id(real_uuid): _Uuid(real_uuid),
        id(telemetry.span): _no_span,
        id(telemetry.current_traceparent): _no_trace,
        id(leases.boottime): _boottime,
        id(leases.boot_id): _boot_id,
    }
    try:
        for name, module in list(sys.modules.items()):
            if name.startswith(_PACKAGES):
                _patch_module(module, everywhere, put)
        put(ids, "_uuid7", _Uuid7())
        put(ids, "_encode", lru_cache(maxsize=10_000)(vars(ids)["_encode"]))  # the same few ids, again and again
        put(bus, "Client", _client)
        put(bus, "STREAM_CHECK_SECONDS", STREAM_CHECK_SECONDS)
        for built in (scheduler_module, billing_module):
            put(built, "Database", _database)
            put(built, "Migrations", _NoMigrations)
        put(settlement, "OPEN_AHEAD_SECONDS", OPEN_AHEAD_SECONDS)
        put(waiting, "NO_FUNDS_RETRY_SECONDS", NO_FUNDS_RETRY_SECONDS)
        put(model, "RETRY_BACKOFF_BASE_SECONDS", 1)
        put(model, "RETRY_BACKOFF_MAX_SECONDS", RETRY_BACKOFF_MAX_SECONDS)
        yield
    finally:
        enter(None)
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def _patch_module(module: ModuleType, everywhere: dict[int, Any], put: Callable[[object, str, Any], None]) -> None:
    for name, value in list(vars(module).items()):
        if (replacement := everywhere.get(id(value))) is not None:
            put(module, name, replacement)
        elif type(value) is BoundLoggerLazyProxy:
            put(module, name, _Logger(module.__name__))
        elif name == "WINDOW_SECONDS" and isinstance(value, int):
            put(module, name, WINDOW_SECONDS)
