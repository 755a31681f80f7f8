"""Logs (structlog JSON with request and trace id), traces (OpenTelemetry, off by default), request ids."""

import logging
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

import structlog
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind
from structlog.typing import EventDict, WrappedLogger

from dantegpu.domain.ids import RequestId

_request_id: ContextVar[str] = ContextVar("dante_request_id", default="")

MAX_REQUEST_ID_LENGTH = 128

_exporting = threading.Event()
"""Set once spans go somewhere."""


def configure_logging(service: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Log JSON lines to `stream` (default stderr). Called once per process, by its composition root."""
    numeric = logging.getLevelNamesMapping().get(level.upper())
    if numeric is None:
        raise ValueError(f"log level {level!r}: expected debug, info, warning or error")
    out = stream or sys.stderr
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_ids,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard module; only their warnings matter to an operator.
    logging.basicConfig(level=logging.WARNING, stream=out, format="%(levelname)s %(name)s: %(message)s", force=True)


def _add_ids(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if request_id := _request_id.get():
        event.setdefault("request_id", request_id)
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", f"{context.trace_id:032x}")
    return event


def configure_tracing(service: str, otlp_endpoint: str) -> None:
    """Export spans to an OTLP/HTTP collector (`http://host:4318`). An empty endpoint: spans cost next to nothing."""
    if not otlp_endpoint:
        return
    # Imported late: without tracing, no process pays for the exporter's memory.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=otlp_endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    _exporting.set()


@contextmanager
def span(name: str, traceparent: str = "", kind: SpanKind = SpanKind.INTERNAL, **attributes: str) -> Generator[Span]:
    """A span, child of `traceparent` (W3C) when given, else of the current one."""
    if not traceparent and not _exporting.is_set():
        # Nobody would see it; a context that came from outside is passed on all the same.
        yield trace.INVALID_SPAN
        return
    context = propagate.extract({"traceparent": traceparent}) if traceparent else None
    tracer = trace.get_tracer("dantegpu")
    with tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes) as current:
        yield current


def current_traceparent() -> str:
    """W3C traceparent of the current span, or empty."""
    if not trace.get_current_span().get_span_context().is_valid:
        return ""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


def incoming_traceparent(headers: Mapping[str, str]) -> str:
    return headers.get("traceparent", "")


def current_request_id() -> str:
    return _request_id.get()


def set_request_id(value: str) -> str:
    """Take over the caller's request id when it is usable, else make one. Returns the one in force."""
    usable = value.isascii() and value.isprintable() and 0 < len(value) <= MAX_REQUEST_ID_LENGTH
    request_id = value if usable else str(RequestId.new())
    _request_id.set(request_id)
    return request_id
