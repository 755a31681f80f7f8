"""Operating errors that cross a service's door.

    ServiceError
    |- (each service's own errors.py)
    |- Unavailable          a server that we need does not answer: try again
    |- InvalidArgument, NotFound, Forbidden, Unauthenticated   for the edges' own checks
    `- RemoteError          another service's ServiceError, as it came over gRPC

`status` is one of a few transport-neutral kinds; rpc.py maps it to gRPC, the gateway to HTTP, each in one table.
"""

from enum import StrEnum
from typing import ClassVar


class ErrorStatus(StrEnum):
    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    PRECONDITION = "precondition"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class ServiceError(Exception):
    """What went wrong, for people (`message`) and for programs (`type`, stable and kebab-case, and `params`)."""

    type: ClassVar[str] = "internal"
    status: ClassVar[ErrorStatus] = ErrorStatus.INTERNAL

    def __init__(self, message: str, **params: str) -> None:
        super().__init__(message)
        self.message = message
        self.params = params


class InvalidArgument(ServiceError):
    type = "invalid-argument"
    status = ErrorStatus.INVALID


class NotFound(ServiceError):
    type = "not-found"
    status = ErrorStatus.NOT_FOUND


class Forbidden(ServiceError):
    type = "forbidden"
    status = ErrorStatus.FORBIDDEN


class Unauthenticated(ServiceError):
    type = "unauthenticated"
    status = ErrorStatus.UNAUTHENTICATED


class Unavailable(ServiceError):
    """A server or service that the call needs does not answer. Nothing was lost; the same call may be made again."""

    type = "unavailable"
    status = ErrorStatus.UNAVAILABLE

    def __init__(self, what: str, detail: str = "", retry_after_seconds: int = 2) -> None:
        text = f"{what} does not answer at the moment; nothing was lost, try again in a few seconds"
        super().__init__(f"{text} ({detail})" if detail else text, what=what, retry_after=str(retry_after_seconds))


class RemoteError(ServiceError):
    """A ServiceError of another service. `type` and `status` are those of the original."""

    def __init__(self, type_: str, status: ErrorStatus, message: str, params: dict[str, str]) -> None:
        super().__init__(message, **params)
        self.remote_type = type_
        self.remote_status = status


def type_of(error: ServiceError) -> str:
    return error.remote_type if isinstance(error, RemoteError) else error.type


def status_of(error: ServiceError) -> ErrorStatus:
    return error.remote_status if isinstance(error, RemoteError) else error.status
