"""What the monitoring service refuses."""

from dantegpu.domain.ids import JobId
from dantegpu.kit.errors import ErrorStatus, ServiceError


class InvalidRange(ServiceError):
    """The offset lies outside of what a log can have."""

    type = "invalid-range"
    status = ErrorStatus.INVALID


class LogNotFound(ServiceError):
    """The job is another team's, or there is no such job: the answer is the same."""

    type = "log-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, job_id: JobId) -> None:
        super().__init__(f"there is no log of {job_id} in your team", job_id=str(job_id))


class LogLost(ServiceError):
    """The log was archived, but storage does not have it any more."""

    type = "log-lost"
    status = ErrorStatus.INTERNAL

    def __init__(self, job_id: JobId, key: str) -> None:
        super().__init__(f"the log of {job_id} was archived, but storage has no object {key}", job_id=str(job_id))
