"""The Python SDK: `Dante` (sync) and `AsyncDante`, two clients of one platform's REST API.

    from dantegpu.sdk import Dante

    with Dante("http://127.0.0.1:8400", api_key="dante_...") as client:
        job = client.jobs.submit({"commands": ["python train.py"], "resources": {"gpu": "RTX4090"}})
        for chunk in client.jobs.logs(job.id, follow=True):
            print(chunk.data.decode(errors="replace"), end="")
        print(client.jobs.wait(job.id).state, client.jobs.receipt(job.id).total_udgpu)

Answers are the models of `dantegpu.contracts.rest`; errors are drawn in `dantegpu.sdk.errors`. Importing this package
loads nothing else: each name comes from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dantegpu.sdk._async.client import AsyncDante
    from dantegpu.sdk._sync.client import Dante
    from dantegpu.sdk.errors import (
        ApiError,
        BadRequest,
        Conflict,
        ConnectionProblem,
        DanteError,
        Forbidden,
        InvalidAnswer,
        NotFound,
        RateLimited,
        TransferProblem,
        Unauthenticated,
        Unavailable,
    )
    from dantegpu.sdk.protocol import LogBytes, Session, Tokens

__all__ = [
    "ApiError",
    "AsyncDante",
    "BadRequest",
    "Conflict",
    "ConnectionProblem",
    "Dante",
    "DanteError",
    "Forbidden",
    "InvalidAnswer",
    "LogBytes",
    "NotFound",
    "RateLimited",
    "Session",
    "Tokens",
    "TransferProblem",
    "Unauthenticated",
    "Unavailable",
]

_ELSEWHERE = {
    "AsyncDante": "dantegpu.sdk._async.client",
    "Dante": "dantegpu.sdk._sync.client",
    "LogBytes": "dantegpu.sdk.protocol",
    "Session": "dantegpu.sdk.protocol",
    "Tokens": "dantegpu.sdk.protocol",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "dantegpu.sdk.errors")), name)
