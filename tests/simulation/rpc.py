"""gRPC for the simulation: generated stubs and servicers, the real kit/rpc.py on both ends, a network in between."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
from grpc import aio

from dantegpu.kit import rpc
from tests.simulation.loop import Process, ProcessKilled, SimLoop, current_process
from tests.simulation.scenario import Fault

REFUSED_SECONDS = 0.01
_NO_METADATA = aio.Metadata()


@dataclass(slots=True)
class RpcWeather:
    """Chances per call."""

    lost_request_chance: float = 0.0
    lost_reply_chance: float = 0.0
    latency_seconds: tuple[float, float] = (0.0002, 0.003)


@dataclass(slots=True)
class _Door:
    process: Process
    methods: "dict[str, _Method]" = field(default_factory=dict[str, "_Method"])
    waiting: "dict[asyncio.Future[bytes], None]" = field(default_factory=dict["asyncio.Future[bytes]", None])
    """Callers whose call is being served: when the process dies, their connections break."""


class SimNetwork:
    """Who serves what, and which pairs of processes cannot reach one another."""

    def __init__(self, loop: SimLoop, random: Random, happened: Counter[str]) -> None:
        self.loop = loop
        self.random = random
        self.happened = happened
        self.weather = RpcWeather()
        self.doors: dict[str, _Door] = {}
        self.cut: set[tuple[str, str]] = set()
        """(caller, server), by process name."""

    def delay_seconds(self) -> float:
        low, high = self.weather.latency_seconds
        return low + (high - low) * self.random.random()


class SimServer:
    """Takes what the generated add_..._to_server functions register, and serves it from `process` under `name`."""

    def __init__(self, network: SimNetwork, process: Process, name: str) -> None:
        self._door = network.doors[name] = _Door(process)
        process.on_kill.append(self._reset)

    def _reset(self) -> None:
        for answer in list(self._door.waiting):
            if not answer.done():
                answer.set_exception(_error(grpc.StatusCode.UNAVAILABLE, "connection reset"))

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        return

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        for name, handler in handlers.items():
            self._door.methods[f"/{service}/{name}"] = _Method(name, handler)


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.trailing = trailing


class _Context:
    """What kit/rpc.py needs of a ServicerContext."""

    def __init__(self, metadata: Sequence[tuple[str, Any]]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Sequence[tuple[str, Any]]:
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        raise _Aborted(code, details, trailing_metadata)


class _Method:
    """One method of a server, made ready when somebody calls it: most are never called."""

    def __init__(self, name: str, handler: Any) -> None:
        self._name = name
        self._handler = handler
        self._served: Callable[[Any, Any], Awaitable[Any]] | None = None

    async def __call__(self, data: bytes, metadata: Sequence[tuple[str, Any]]) -> bytes:
        if self._served is None:
            self._served = rpc.served(self._name, self._handler.unary_unary)
        response = await self._served(self._handler.request_deserializer(data), _Context(metadata))
        return self._handler.response_serializer(response)


class SimChannels:
    """What services get as their channels: by public name."""

    def __init__(self, network: SimNetwork) -> None:
        self._network = network

    def to(self, service: str) -> "SimChannel":
        return SimChannel(self._network, service)


class SimChannel:
    """A channel to one server."""

    def __init__(self, network: SimNetwork, name: str) -> None:
        self._network = network
        self._name = name

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **options: Any,
    ) -> Callable[..., Any]:
        async def call(request: Any, *, timeout: float, metadata: Sequence[tuple[str, Any]]) -> Any:
            data = request_serializer(request)
            return response_deserializer(await self._call(path, data, timeout, metadata))

        return call

    async def _call(self, path: str, data: bytes, timeout_seconds: float, metadata: Sequence[tuple[str, Any]]) -> bytes:
        caller = current_process()
        if caller is not None:
            caller.failpoint()
        network = self._network
        answer: asyncio.Future[bytes] = network.loop.create_future()
        network.loop.later(network.delay_seconds(), self._arrive, caller, path, data, metadata, answer)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await answer
        except TimeoutError:
            raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded") from None

    def _arrive(
        self, caller: Process | None, path: str, data: bytes, metadata: Sequence[tuple[str, Any]],
        answer: "asyncio.Future[bytes]",
    ) -> None:  # fmt: skip
        network = self._network
        door = network.doors.get(self._name)
        names = (caller.name if caller else "", door.process.name if door else "")
        lost = network.weather.lost_request_chance and network.random.random() < network.weather.lost_request_chance
        network.happened[Fault.CALLS_LOST] += bool(lost)
        if door is None or not door.process.alive or names in network.cut or lost:
            self._answer(answer, _error(grpc.StatusCode.UNAVAILABLE, "connection refused"))
            return
        door.waiting[answer] = None
        answer.add_done_callback(lambda it: door.waiting.pop(it, None))
        door.process.spawn(self._serve(door, path, data, metadata, names, answer))

    async def _serve(
        self, door: _Door, path: str, data: bytes, metadata: Sequence[tuple[str, Any]], names: tuple[str, str],
        answer: "asyncio.Future[bytes]",
    ) -> None:  # fmt: skip
        result: bytes | aio.AioRpcError
        try:
            result = await door.methods[path](data, metadata)
        except _Aborted as error:
            result = _error(error.code, error.details, error.trailing)
        except ProcessKilled:
            result = _error(grpc.StatusCode.UNAVAILABLE, "connection reset")
        except Exception as error:  # noqa: BLE001 - as grpc does
            result = _error(grpc.StatusCode.INTERNAL, repr(error))
        network = self._network
        lost = network.weather.lost_reply_chance and network.random.random() < network.weather.lost_reply_chance
        network.happened[Fault.CALLS_LOST] += bool(lost)
        if lost or names in network.cut:
            result = _error(grpc.StatusCode.UNAVAILABLE, "connection reset before the answer")
        network.loop.later(network.delay_seconds(), self._answer, answer, result)

    def _answer(self, answer: "asyncio.Future[bytes]", result: "bytes | aio.AioRpcError") -> None:
        if answer.done():
            return
        if isinstance(result, bytes):
            answer.set_result(result)
        else:
            answer.set_exception(result)


def _error(code: grpc.StatusCode, details: str, trailing: Any = ()) -> aio.AioRpcError:
    return aio.AioRpcError(code, _NO_METADATA, aio.Metadata(*trailing), details)
