"""Refusals of the gateway itself."""

from dantegpu.kit.errors import ErrorStatus, ServiceError


class BodyTooLarge(ServiceError):
    """A request's body is over the limit."""

    type = "body-too-large"
    status = ErrorStatus.TOO_LARGE

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"the request's body is larger than {max_bytes} bytes; send fewer jobs per call", max_bytes=str(max_bytes)
        )


class TooManyRequests(ServiceError):
    """The caller's rate limit is used up."""

    type = "too-many-requests"
    status = ErrorStatus.RATE_LIMITED

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(
            f"too many requests; try again in {retry_after_seconds} s (many jobs fit into one call)",
            retry_after=str(retry_after_seconds),
        )


class TooManyStreams(ServiceError):
    """No further event stream may be opened now."""

    type = "too-many-streams"
    status = ErrorStatus.RATE_LIMITED

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} event streams are open already; close one of them first", retry_after="5")


class InvalidCredential(ServiceError):
    """The token or key is not valid (any more)."""

    type = "invalid-credential"
    status = ErrorStatus.UNAUTHENTICATED


class ScopeMissing(ServiceError):
    """The API key was made for other things."""

    type = "scope-missing"
    status = ErrorStatus.FORBIDDEN

    def __init__(self, scope: str) -> None:
        super().__init__(f"this API key may not do that: it lacks the scope {scope!r}", scope=scope)


class ArrayOfTasks(ServiceError):
    """Logs and results are those of tasks."""

    type = "array-of-tasks"
    status = ErrorStatus.PRECONDITION

    def __init__(self, job_id: str, size: int, what: str) -> None:
        super().__init__(
            f"{job_id} is an array of {size} tasks, each with {what} of its own: name one, such as {job_id}:0",
            job_id=job_id, size=str(size),
        )  # fmt: skip
