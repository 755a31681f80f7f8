"""The application: routes, errors, OpenAPI."""

import json
import sys
from typing import Any, Final, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import dantegpu
from dantegpu.contracts.rest.base import Problem, field_problems
from dantegpu.contracts.rest.jobs import LogChunk, StreamEnd
from dantegpu.contracts.rest.spec import JobList, JobSpec
from dantegpu.kit.errors import ServiceError
from dantegpu.services.gateway import pages
from dantegpu.services.gateway.context import Gateway
from dantegpu.services.gateway.middleware import BodyTooLargeHttp
from dantegpu.services.gateway.problems import CONTENT_TYPE, Answer, of_service_error, problem
from dantegpu.services.gateway.rest import accounts, jobs, machines, money, platform, schedules

_DESCRIPTION: Final = """The public API of a DanteGPU platform: rent GPUs by the second, or rent out your own.

* **Money** is an integer in micro-$dGPU: fields end in `_udgpu`, 1,000,000 are one $dGPU.
* **Errors** are `application/problem+json` (RFC 9457); programs compare `code`.
* **Creating** twice by accident: send an `Idempotency-Key`; the same key and body are answered the same.
* **Lists** come in pages: send `next_cursor` back as `?cursor=`.
* **Live data** comes as server-sent events; a stream that was cut goes on with `Last-Event-ID`.
* `X-Request-ID` goes in and out, `traceparent` (W3C) is honoured.
"""
_NO_TELEMETRY: Final[TelemetryConfig] = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False,
}  # fmt: skip
"""FastAPI's own: it would begin a second trace beside ours, and record what people sent that was not valid."""
_CODES: Final = {404: "not-found", 405: "method-not-allowed", 400: "bad-request"}


def create_app(gateway: Gateway | None) -> FastAPI:
    """`gateway` None: only good for the OpenAPI document."""
    app = FastAPI(
        title="DanteGPU",
        version=dantegpu.__version__,
        summary="GPU jobs on other people's machines",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        separate_input_output_schemas=False,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        responses={"default": {"model": Problem, "description": "A problem", "content": {CONTENT_TYPE: {}}}},
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        telemetry=_NO_TELEMETRY,
    )
    app.state.gateway = gateway
    app.router.routes.insert(0, jobs.SubmitRoute())
    for module in (accounts, machines, jobs, schedules, money, platform):
        app.include_router(module.router)
    app.include_router(pages.router)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.openapi = lambda: _openapi(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=app.description,
            routes=app.routes,
            license_info=app.license_info,
        )
        schemas = document["components"]["schemas"]
        for model in (JobSpec, JobList, LogChunk, StreamEnd):
            described = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, schema in described.pop("$defs", {}).items():
                schemas.setdefault(name, schema)
            schemas.setdefault(model.__name__, described)
        # FastAPI's own form of a 422 never goes out.
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                content = operation["responses"]["default"]["content"]
                content[CONTENT_TYPE] = content.pop("application/json")
        document["components"]["schemas"] = dict(sorted(schemas.items()))
        app.openapi_schema = document
    return app.openapi_schema


def openapi_json() -> str:
    """The document as it lies in docs/api/openapi.json; `python -m dantegpu.services.gateway.app` prints it."""
    return json.dumps(create_app(None).openapi(), indent=1, ensure_ascii=False) + "\n"


def _response(answer: Answer) -> Response:
    status, headers, body = answer
    response = Response(body, status_code=status)
    response.raw_headers = headers
    return response


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _response(of_service_error(error, request.url.path))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    lines = error.errors()
    path = request.url.path
    if any(line["type"] == "json_invalid" for line in lines):
        reason = cast(str, (lines[0].get("ctx") or {}).get("error") or lines[0]["msg"])
        where = lines[0]["loc"][1:]
        place = f" at character {where[0] + 1}" if where and isinstance(where[0], int) else ""
        detail = f"the body is not valid JSON{place}: {reason}"
        return _response(problem(400, "invalid-json", detail, path=path))
    errors = field_problems(lines, skip=1)
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    detail = f"{first.field}: {first.message}{more}" if first.field else first.message + more
    return _response(problem(422, "invalid-request", detail, path=path, errors=errors))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if isinstance(error, BodyTooLargeHttp):
        return _response(of_service_error(error.refusal, path))
    code = _CODES.get(error.status_code, "http-error")
    details = {
        404: f"there is nothing at {path[:200]}; the routes are listed at /docs",
        405: f"{request.method} is not allowed here; see /docs",
    }
    detail = details.get(error.status_code, str(error.detail))
    return _response(problem(error.status_code, code, detail, path=path, headers=error.headers))


if __name__ == "__main__":
    sys.stdout.write(openapi_json())
