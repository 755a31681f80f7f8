"""What the scheduler refuses, and why."""

from dantegpu.domain.ids import JobId, ScheduleId
from dantegpu.kit.errors import ErrorStatus, ServiceError


class JobNotFound(ServiceError):
    """No such job, or it is another team's: the answer is the same."""

    type = "job-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, job_id: JobId) -> None:
        super().__init__(f"no job {job_id} in your team; `dante ps --all` lists what there is", job_id=str(job_id))


class TaskNotFound(ServiceError):
    """The array has no such task, or has not created it yet, or is another team's."""

    type = "job-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, array_id: JobId, index: int) -> None:
        super().__init__(
            f"no task {array_id}:{index} in your team; an array creates its tasks as their turn comes, "
            f"`dante show {array_id} --tasks` lists them",
            job_id=str(array_id),
        )


class ScheduleNotFound(ServiceError):
    """No such schedule, or it is another team's: the answer is the same."""

    type = "schedule-not-found"
    status = ErrorStatus.NOT_FOUND

    def __init__(self, schedule_id: ScheduleId) -> None:
        super().__init__(
            f"no schedule {schedule_id} in your team; `dante schedules` lists what there is",
            schedule_id=str(schedule_id),
        )


class TooManySchedules(ServiceError):
    """The team has as many schedules as it may have."""

    type = "too-many-schedules"
    status = ErrorStatus.PRECONDITION

    def __init__(self, limit: int) -> None:
        super().__init__(f"your team has {limit} schedules, the most (MAX_SCHEDULES_PER_TEAM); stop one first")


class InvalidJob(ServiceError):
    type = "invalid-job"
    status = ErrorStatus.INVALID


class InputNotUploaded(ServiceError):
    """The job names an input that the team has not uploaded."""

    type = "input-not-uploaded"
    status = ErrorStatus.PRECONDITION


class PlanConflict(Exception):
    """A plan was made from what is no longer true; the schema refused it and nothing of it happened."""


class NoOfferFits(ServiceError):
    """`no_wait` was asked for and no machine could take the job now."""

    type = "no-offer-fits"
    status = ErrorStatus.PRECONDITION
