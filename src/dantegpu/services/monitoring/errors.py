"""What the monitoring service refuses."""

from dantegpu.kit.errors import ErrorStatus, ServiceError


class InvalidRange(ServiceError):
    """The offset lies outside of what a log can have."""

    type = "invalid-range"
    status = ErrorStatus.INVALID
