"""What happens to every request: ids, trace, caller, limits, headers, one log line and the metrics. Pure ASGI."""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import structlog
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram
from starlette.exceptions import HTTPException

from dantegpu.kit.actor import ANONYMOUS, Actor, set_current_actor
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import ASGIApp
from dantegpu.kit.telemetry import set_request_id, span
from dantegpu.services.gateway.errors import BodyTooLarge, TooManyRequests
from dantegpu.services.gateway.limiter import RateLimiter, whole_seconds
from dantegpu.services.gateway.principals import credential_of
from dantegpu.services.gateway.problems import INTERNAL_TEXT, Answer, of_service_error, problem

log = structlog.get_logger(__name__)

type Authenticate = Callable[[str], Awaitable[Actor]]
type Send = Callable[[Any], Awaitable[None]]
type Receive = Callable[[], Awaitable[Any]]

PRINCIPAL_ERROR: Final = "dante.principal_error"
"""Key of the scope: why the credential that came is not valid. Public routes do not mind."""

_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_REQUESTS = Counter("dante_http_requests_total", "Requests to the public API", ["method", "route", "status"])
_SECONDS = Histogram(
    "dante_http_seconds",
    "Time to answer a request, event streams left out",
    ["route"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
_DEFAULT_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_USED_HEADERS: Final = frozenset(
    {b"authorization", b"x-api-key", b"x-request-id", b"traceparent", b"content-length", b"x-forwarded-for"}
)


class BodyTooLargeHttp(HTTPException):
    """Raised while the body is read; an HTTPException, because FastAPI turns anything else into a 400."""

    def __init__(self, max_bytes: int) -> None:
        self.refusal = BodyTooLarge(max_bytes)
        super().__init__(413, self.refusal.message)


class Edge:
    """The outermost layer of the gateway."""

    def __init__(
        self,
        app: ASGIApp,
        authenticate: Authenticate,
        *,
        principals: RateLimiter,
        addresses: RateLimiter,
        max_body_bytes: int,
        trusted_proxies: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._authenticate = authenticate
        self._principals = principals
        self._addresses = addresses
        self._max_body_bytes = max_body_bytes
        self._trusted_proxies = frozenset(trusted_proxies)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value for name, value in scope["headers"] if name in _USED_HEADERS}
        request_id = set_request_id(_text(headers, b"x-request-id"))
        scope["client"] = (self._address(scope, headers), 0)
        exchange = _Exchange(send, request_id)
        started = time.monotonic()
        set_current_actor(ANONYMOUS)
        with span(f"http {_method(scope)}", _text(headers, b"traceparent"), SpanKind.SERVER) as current:
            try:
                await self._admit(scope, headers)
                await self._app(scope, _Body(receive, self._max_body_bytes).receive, exchange.send)
            except ServiceError as error:
                await exchange.answer(of_service_error(error, scope["path"]))
            except Exception:
                # Outermost frame of a request: the caller gets a problem, the operator the whole story.
                log.exception("request_crashed", method=scope["method"], path=scope["path"])
                await exchange.answer(problem(500, "internal", INTERNAL_TEXT, path=scope["path"]))
            finally:
                current.set_attribute("http.route", _route(scope))
                current.set_attribute("http.response.status_code", exchange.status)
                _record(scope, exchange, time.monotonic() - started)

    async def _admit(self, scope: Any, headers: Mapping[bytes, bytes]) -> None:
        """Find out who calls, and count the request. Raises TooManyRequests, BodyTooLarge."""
        actor = ANONYMOUS
        try:
            credential = credential_of(_text(headers, b"authorization"), _text(headers, b"x-api-key"))
            if credential:
                actor = await self._authenticate(credential)
                set_current_actor(actor)
        except ServiceError as error:
            scope[PRINCIPAL_ERROR] = error
        caller = str(actor.user_id or actor.machine_id or "")
        limiter = self._principals if caller else self._addresses
        if wait := limiter.take(caller or scope["client"][0]):
            raise TooManyRequests(whole_seconds(wait))
        length = _text(headers, b"content-length")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise BodyTooLarge(self._max_body_bytes)

    def _address(self, scope: Any, headers: Mapping[bytes, bytes]) -> str:
        client = scope.get("client")
        address = str(client[0]) if client else ""
        forwarded = _text(headers, b"x-forwarded-for")
        if forwarded and address in self._trusted_proxies:
            # The last entry is the one that our own proxy wrote; those before it are the client's words.
            return forwarded.rpartition(",")[2].strip()[:64]
        return address


class _Body:
    """Counts what arrives, so that a chunked body is bounded too."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._seen_bytes = 0

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen_bytes += len(message.get("body", b""))
            if self._seen_bytes > self._max_bytes:
                raise BodyTooLargeHttp(self._max_bytes)
        return message


class _Exchange:
    """The answer as it goes out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0
        self.sent_bytes = 0
        self.streamed = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            self.streamed = any(value.startswith(b"text/event-stream") for _, value in headers)
            headers += [header for header in _DEFAULT_HEADERS if header[0] not in present]
            headers.append((b"x-request-id", self._request_id.encode()))
            message = message | {"headers": headers}
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    async def answer(self, answer: Answer) -> None:
        """Send a whole answer, unless another one has begun already."""
        if self.status:
            return
        status, headers, body = answer
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


def _method(scope: Any) -> str:
    return scope["method"] if scope["method"] in _METHODS else "OTHER"


def _route(scope: Any) -> str:
    """The route's template, so that label values stay few."""
    return getattr(scope.get("route"), "path", "") or "unmatched"


def _record(scope: Any, exchange: _Exchange, seconds: float) -> None:
    route = _route(scope)
    _REQUESTS.labels(_method(scope), route, str(exchange.status or 499)).inc()
    if not exchange.streamed:
        _SECONDS.labels(route).observe(seconds)
    log.info(
        "http",
        method=_method(scope),
        path=scope["path"][:500],
        route=route,
        status=exchange.status or 499,
        milliseconds=round(seconds * 1000, 1),
        bytes=exchange.sent_bytes,
        client=scope["client"][0],
    )
