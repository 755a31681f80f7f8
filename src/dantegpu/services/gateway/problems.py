"""Errors as problem+json (RFC 9457): one table from ErrorStatus to HTTP."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

from dantegpu.contracts.rest.base import FieldProblem, Problem
from dantegpu.kit.errors import ErrorStatus, ServiceError, status_of, type_of
from dantegpu.kit.telemetry import current_request_id

PROBLEM_TYPE_PREFIX: Final = "https://dantegpu.dev/problems/"
CONTENT_TYPE: Final = "application/problem+json"

HTTP_STATUS: Final[Mapping[ErrorStatus, int]] = {
    ErrorStatus.INVALID: 422,
    ErrorStatus.UNAUTHENTICATED: 401,
    ErrorStatus.FORBIDDEN: 403,
    ErrorStatus.NOT_FOUND: 404,
    ErrorStatus.CONFLICT: 409,
    ErrorStatus.PRECONDITION: 409,
    ErrorStatus.TOO_LARGE: 413,
    ErrorStatus.RATE_LIMITED: 429,
    ErrorStatus.UNAVAILABLE: 503,
    ErrorStatus.INTERNAL: 500,
}

INTERNAL_TEXT: Final = "something went wrong on our side; the request id tells the operator what"

type Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""HTTP status, headers, body."""


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    path: str = "",
    errors: Sequence[FieldProblem] = (),
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    body = Problem(
        type=PROBLEM_TYPE_PREFIX + code,
        code=code,
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=path,
        request_id=current_request_id(),
        errors=list(errors),
        params=dict(params or {}),
    )
    encoded = body.model_dump_json(exclude_none=True).encode()
    given = {"content-type": CONTENT_TYPE, "content-length": str(len(encoded)), "cache-control": "no-store"}
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in (given | dict(headers or {})).items()]
    return status, raw, encoded


def of_service_error(error: ServiceError, path: str) -> Answer:
    """The answer to a refusal. What went wrong inside is told to the operator's log, not to the caller."""
    status = status_of(error)
    code = HTTP_STATUS[status]
    if status is ErrorStatus.INTERNAL:
        return problem(code, "internal", INTERNAL_TEXT, path=path)
    headers: dict[str, str] = {}
    if status in (ErrorStatus.UNAVAILABLE, ErrorStatus.RATE_LIMITED):
        headers["retry-after"] = error.params.get("retry_after", "2")
    if status is ErrorStatus.UNAUTHENTICATED:
        headers["www-authenticate"] = 'Bearer realm="dantegpu"'
    return problem(code, type_of(error), error.message, path=path, params=error.params, headers=headers)
