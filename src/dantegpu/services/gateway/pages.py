"""/docs (Swagger UI) and /redoc, from files of this package: no page of ours loads anything from another host."""

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from dantegpu.kit.errors import NotFound

_STATIC: Final = Path(__file__).parent / "static"
_FILES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "swagger-start.js": "text/javascript",
}
_SWAGGER_START: Final = """
window.ui = SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null, persistAuthorization: false,
  defaultModelsExpandDepth: 0, docExpansion: "list", presets: [SwaggerUIBundle.presets.apis]
});
"""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_SWAGGER: Final = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DanteGPU API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/docs/files/swagger-ui.css">
</head><body><div id="ui"></div><script src="/docs/files/swagger-ui-bundle.js"></script>
<script src="/docs/files/swagger-start.js"></script></body></html>"""
_REDOC: Final = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DanteGPU API</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>body { margin: 0 }</style></head>
<body><redoc spec-url="/openapi.json" disable-search="true"></redoc>
<script src="/docs/files/redoc.standalone.js"></script></body></html>"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def swagger() -> HTMLResponse:
    return HTMLResponse(_SWAGGER, headers={"content-security-policy": _POLICY})


@router.get("/redoc")
async def redoc() -> HTMLResponse:
    return HTMLResponse(_REDOC, headers={"content-security-policy": _POLICY})


@router.get("/docs/files/{name}")
async def file(name: str) -> Response:
    if name not in _FILES:
        raise NotFound(f"there is no file {name[:80]!r}")
    headers = {"cache-control": "public, max-age=3600"}
    if name == "swagger-start.js":
        return Response(_SWAGGER_START, media_type=_FILES[name], headers=headers)
    return Response(_packed(name), media_type=_FILES[name], headers=headers | {"content-encoding": "gzip"})


def _packed(name: str) -> bytes:
    return (_STATIC / f"{name}.gz").read_bytes()
