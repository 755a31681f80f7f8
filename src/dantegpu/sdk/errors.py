"""What the SDK raises.

    DanteError
    ├── ConnectionProblem        the platform does not answer at all
    ├── TransferProblem          an upload or download broke, or its bytes are not the ones announced
    ├── InvalidAnswer            something answered, but it is not a DanteGPU platform this SDK understands
    └── ApiError                 the platform refused; `problem` says why
        ├── BadRequest           400, 413, 415, 422: the request is wrong; `problem.errors` names the fields
        ├── Unauthenticated      401: not logged in, or the key or session has ended
        ├── Forbidden            403
        ├── NotFound             404, 410: no such thing, or it belongs to somebody else
        ├── Conflict             409, 412: the state of things does not allow it
        ├── RateLimited          429; `retry_after_seconds`
        └── Unavailable          502, 503, 504: a part of the platform is down; `retry_after_seconds`

Every error's text is for people: what happened, what it means, what to do next.
"""

from dantegpu.contracts.rest.base import Problem


class DanteError(Exception):
    """Base of all errors of the SDK."""


class ConnectionProblem(DanteError):
    """The platform does not answer at `url`."""

    def __init__(self, url: str, detail: str) -> None:
        super().__init__(
            f"no platform answers at {url} ({detail}); is it running (`dante status`), and is the address right?"
        )
        self.url = url
        self.detail = detail


class TransferProblem(DanteError):
    """Bytes could not be sent or fetched, or were not the announced ones. `refused`: storage said no to the URL."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class InvalidAnswer(DanteError):
    """The answer cannot be understood."""


class ApiError(DanteError):
    """The platform refused a request. `problem` is its RFC 9457 body."""

    def __init__(self, problem: Problem, retry_after_seconds: float | None = None) -> None:
        super().__init__(problem.detail or problem.title)
        self.problem = problem
        self.retry_after_seconds = retry_after_seconds

    @property
    def code(self) -> str:
        """Stable and kebab-case, such as `job-not-found`."""
        return self.problem.code

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status


class BadRequest(ApiError):
    """The request is wrong; `problem.errors` names the fields."""


class Unauthenticated(ApiError):
    """Not logged in, or the key or session has ended."""


class Forbidden(ApiError):
    """Known, but not allowed."""


class NotFound(ApiError):
    """No such thing, or it belongs to somebody else."""


class Conflict(ApiError):
    """The state of things does not allow it."""


class RateLimited(ApiError):
    """Too many requests."""


class Unavailable(ApiError):
    """A part of the platform is down for the moment."""


BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    412: Conflict,
    413: BadRequest,
    415: BadRequest,
    422: BadRequest,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}
