"""What the storage service refuses."""

from dantegpu.kit.errors import ErrorStatus, ServiceError


class InvalidKey(ServiceError):
    """The object key is not a plain path below one of the known prefixes."""

    type = "invalid-object-key"
    status = ErrorStatus.INVALID


class TooLarge(ServiceError):
    type = "object-too-large"
    status = ErrorStatus.TOO_LARGE


class DigestMismatch(ServiceError):
    """What arrived is not what was announced; nothing of it was kept."""

    type = "digest-mismatch"
    status = ErrorStatus.INVALID


class DiskFull(ServiceError):
    type = "disk-full"
    status = ErrorStatus.UNAVAILABLE


class UrlRefused(ServiceError):
    """The URL was altered, is incomplete, or is for another method."""

    type = "url-refused"
    status = ErrorStatus.FORBIDDEN


class UrlExpired(ServiceError):
    """The URL was good until a moment ago."""

    type = "url-expired"
    status = ErrorStatus.FORBIDDEN


class ObjectNotFound(ServiceError):
    type = "object-not-found"
    status = ErrorStatus.NOT_FOUND


class TooBusy(ServiceError):
    """All places for uploads are taken."""

    type = "too-busy"
    status = ErrorStatus.RATE_LIMITED


class UploadIdle(ServiceError):
    """The client keeps the connection but sends nothing."""

    type = "upload-idle"
    status = ErrorStatus.INVALID
