"""gRPC inside the platform: one way to call, one way to serve, one table of errors.

A call always has a deadline and carries actor, request id and trace. Who may call is decided by where the server
listens: a private Unix socket, loopback, or (between hosts) mutual TLS.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from grpc import aio
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram

from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.domain.ids import InvalidId
from dantegpu.kit.actor import Actor, current_actor, set_current_actor
from dantegpu.kit.errors import (
    ErrorStatus,
    InvalidArgument,
    RemoteError,
    ServiceError,
    Unavailable,
    status_of,
    type_of,
)
from dantegpu.kit.telemetry import current_request_id, current_traceparent, set_request_id, span

log = structlog.get_logger(__name__)

DEFAULT_TIMEOUT_SECONDS: Final = 5.0
MAX_MESSAGE_BYTES: Final = 32 << 20
MAX_ERROR_LENGTH: Final = 2000

_ACTOR_KEY = "dante-actor-bin"
_ERROR_KEY = "dante-error-bin"
_REQUEST_ID_KEY = "dante-request-id"

_TO_GRPC: Final[Mapping[ErrorStatus, grpc.StatusCode]] = {
    ErrorStatus.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorStatus.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    ErrorStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorStatus.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    ErrorStatus.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorStatus.TOO_LARGE: grpc.StatusCode.OUT_OF_RANGE,
    ErrorStatus.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorStatus.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorStatus.INTERNAL: grpc.StatusCode.INTERNAL,
}
_FROM_GRPC: Final = {code: status for status, code in _TO_GRPC.items()}

_CALLS = Counter("dante_rpc_calls_total", "gRPC calls served", ["method", "status"])
_SECONDS = Histogram(
    "dante_rpc_seconds", "Time to serve a gRPC call", ["method"], buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
)

_CHANNEL_OPTIONS: Final[Sequence[tuple[str, Any]]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
)


async def call[Q: Message, R: Message](
    method: "aio.UnaryUnaryMultiCallable[Q, R]",
    request: Q,
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    actor: Actor | None = None,
) -> R:
    """Call another service as `actor` (default: the actor being served). Raises RemoteError or Unavailable."""
    metadata: list[tuple[str, str | bytes]] = [
        (_ACTOR_KEY, (actor or current_actor()).to_proto().SerializeToString()),
        (_REQUEST_ID_KEY, current_request_id()),
    ]
    if traceparent := current_traceparent():
        metadata.append(("traceparent", traceparent))
    try:
        return await method(request, timeout=timeout_seconds, metadata=metadata)
    except aio.AioRpcError as error:
        raise _from_grpc(error) from error


def _from_grpc(error: aio.AioRpcError) -> ServiceError:
    trailing = cast("Sequence[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailing:
        if key == _ERROR_KEY and isinstance(value, bytes):
            detail = common_pb2.ErrorDetail.FromString(value)
            status = _FROM_GRPC.get(error.code(), ErrorStatus.INTERNAL)
            return RemoteError(detail.type, status, detail.message, dict(detail.params))
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unavailable("a part of the platform", error.details() or error.code().name)
    return RemoteError("internal", ErrorStatus.INTERNAL, f"internal error: {error.details()}", {})


class Channels:
    """gRPC channels to the other services, by public service name. Static discovery: names and addresses are given.

    Services of this process need no address: theirs are `local`.
    """

    def __init__(self, addresses: Mapping[str, str], local: Mapping[str, Any] | None = None) -> None:
        self._addresses = dict(addresses)
        self._local: dict[str, aio.Channel] = dict(local or {})
        self._channels: dict[str, aio.Channel] = {}

    def to(self, service: str) -> aio.Channel:
        """The channel to a service; connects on first use and again whenever it has to."""
        if service in self._local:
            return self._local[service]
        try:
            address = self._addresses[service]
        except KeyError:
            known = ", ".join(sorted(self._addresses)) or "none"
            raise LookupError(f"no address for {service}; set `addresses` in the settings (known: {known})") from None
        if address not in self._channels:
            self._channels[address] = aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        return self._channels[address]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        for channel in self._channels.values():
            await channel.close(grace=0.5)
        self._channels.clear()


class Server:
    """A gRPC server for one or all services of this process."""

    def __init__(self, listen: str, registrations: Sequence[Callable[[aio.Server], None]]) -> None:
        self._listen = listen
        self._registrations = registrations
        self._server: aio.Server | None = None
        self.port = 0
        """The TCP port in use (0 for a Unix socket)."""

    async def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        server = aio.server(interceptors=[_Interceptor()], options=_CHANNEL_OPTIONS)
        for register in self._registrations:
            register(server)
        try:
            self.port = server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC on {self._listen}: {error}") from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(grace=2.0)
            self._server = None


class _Interceptor(aio.ServerInterceptor):
    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        name = handler_call_details.method
        if name not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None or not handler.unary_unary:
                return handler
            self._wrapped[name] = grpc.unary_unary_rpc_method_handler(
                served(name.rpartition("/")[2], handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return self._wrapped[name]


def served(method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """`behaviour` as it is served: with actor, request id and trace of the caller, and errors by the one table."""
    seconds = _SECONDS.labels(method)
    succeeded = _CALLS.labels(method, "ok")

    async def serve(request: Any, context: "aio.ServicerContext[Any, Any]") -> Any:
        traceparent = _enter(context)
        with seconds.time(), span(f"rpc {method}", traceparent, SpanKind.SERVER):
            try:
                response = await behaviour(request, context)
            except InvalidId as error:
                await _abort(method, context, InvalidArgument(str(error)))
            except ServiceError as error:
                await _abort(method, context, error)
            except asyncio.CancelledError:
                raise
            except DecodeError as error:
                await _abort(method, context, InvalidArgument(str(error)))
            except Exception:
                # Outermost frame of a call: the caller gets "internal", the operator the whole story.
                log.exception("rpc_crashed", method=method)
                _CALLS.labels(method, "internal").inc()
                raise
            else:
                succeeded.inc()
                log.debug("rpc", method=method)
                return response

    return serve


@contextmanager
def serving(method: str, *, actor: Actor, request_id: str, traceparent: str) -> Generator[None]:
    """What a call of `method` by `actor` sees, for one of several calls that came in one message."""
    outer_actor, outer_request_id = current_actor(), current_request_id()
    set_current_actor(actor)
    set_request_id(request_id)
    try:
        with span(f"rpc {method}", traceparent, SpanKind.SERVER):
            log.debug("rpc", method=method)
            yield
    finally:
        set_current_actor(outer_actor)
        set_request_id(outer_request_id)


def error_detail(error: ServiceError) -> common_pb2.ErrorDetail:
    return common_pb2.ErrorDetail(type=type_of(error), message=error.message[:MAX_ERROR_LENGTH], params=error.params)


def remote_error(detail: common_pb2.ErrorDetail, status: str) -> RemoteError:
    """The other way round; `status` is the value of an ErrorStatus."""
    return RemoteError(detail.type, ErrorStatus(status), detail.message, dict(detail.params))


def _enter(context: "aio.ServicerContext[Any, Any]") -> str:
    """Take over actor and request id of the caller; returns its traceparent."""
    metadata = dict(cast("Sequence[tuple[str, str | bytes]]", context.invocation_metadata() or ()))
    actor = metadata.get(_ACTOR_KEY, b"")
    set_current_actor(Actor.from_proto(common_pb2.Actor.FromString(actor if isinstance(actor, bytes) else b"")))
    set_request_id(str(metadata.get(_REQUEST_ID_KEY, "")))
    return str(metadata.get("traceparent", ""))


async def _abort(method: str, context: "aio.ServicerContext[Any, Any]", error: ServiceError) -> None:
    status = status_of(error)
    _CALLS.labels(method, status.value).inc()
    # Trailing metadata is small by gRPC's defaults: an over-long message must not replace the error with another.
    detail = error_detail(error)
    await context.abort(_TO_GRPC[status], error.message[:1000], ((_ERROR_KEY, detail.SerializeToString()),))
