"""Calls between services of one process: the same handlers, errors, actors and deadlines as by gRPC, and no socket."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Never

import grpc
from grpc import aio

from dantegpu.kit.rpc import served

type Metadata = Sequence[tuple[str, str | bytes]]
type Handler = Callable[[bytes, "_Context"], Awaitable[bytes]]


class LocalServices:
    """A gRPC server to the generated `add_..._to_server` functions, a channel to the generated stubs.

    Messages are copied on their way: neither side sees what the other does to its own.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._running: set[asyncio.Future[bytes]] = set()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """The same handlers as add_registered_method_handlers gets."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = _bytes_handler(name, handler)

    async def channel_ready(self) -> None:
        """At once: who asks runs in the same process."""

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_options: Any,
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, *, timeout: float, metadata: Metadata) -> Any:
            # A task of its own: actor and request id of the callee are not those of the caller.
            handling = asyncio.ensure_future(self._handlers[path](request_serializer(request), _Context(metadata)))
            self._running.add(handling)
            handling.add_done_callback(self._ended)
            try:
                await asyncio.wait({handling}, timeout=timeout)
            finally:
                # A caller that gives up does not wait until the callee has cleaned up.
                in_time = handling.done() or not handling.cancel()
            if not in_time:
                raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded")
            return response_deserializer(handling.result())

        return call

    def _ended(self, handling: "asyncio.Future[bytes]") -> None:
        self._running.discard(handling)
        if not handling.cancelled():
            handling.exception()  # of a call that nobody waits for any more: served() has logged it


class _Context:
    """What handlers use of a gRPC context."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata = ()) -> Never:
        raise _error(code, details, trailing_metadata)


def _bytes_handler(name: str, handler: Any) -> Handler:
    serve = served(name, handler.unary_unary)

    async def handle(request: bytes, context: _Context) -> bytes:
        try:
            response = await serve(handler.request_deserializer(request), context)
        except aio.AioRpcError:
            raise
        except Exception as error:
            # As by gRPC: the caller hears that it went wrong, served() has told the operator how.
            raise _error(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}") from error
        return handler.response_serializer(response)

    return handle


def _error(code: grpc.StatusCode, details: str, trailing_metadata: Metadata = ()) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(*trailing_metadata), details=details)
