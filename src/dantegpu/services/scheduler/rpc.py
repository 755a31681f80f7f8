"""gRPC edge of the scheduler: one transaction per call, rows to protobuf."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, jobs_pb2_grpc, machine_pb2
from dantegpu.domain.ids import AttemptId, DeviceId, JobId, MachineId, ScheduleId, TeamId, UserId
from dantegpu.domain.job import JobState, QueueReason
from dantegpu.kit.actor import Actor, current_actor
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import InvalidArgument, ServiceError, status_of
from dantegpu.kit.idempotency import once, recall
from dantegpu.kit.rpc import error_detail
from dantegpu.services.scheduler import store
from dantegpu.services.scheduler.service.intake import (
    Intake,
    JobDetails,
    JobExplanation,
    JobRef,
    progress_of,
    reason_text,
)
from dantegpu.services.scheduler.service.quarantines import Quarantines
from dantegpu.services.scheduler.service.schedules import Schedules
from dantegpu.services.scheduler.service.submissions import (
    Answer,
    Submission,
    check_each,
    needs_more_than_a_look,
    submit_each,
    submit_scope,
)
from dantegpu.services.scheduler.service.transitions import event_message
from dantegpu.services.scheduler.store import AttemptRow, JobRow, LeaseRow
from dantegpu.services.scheduler.store_arrays import ProgressRow
from dantegpu.services.scheduler.store_quarantines import QuarantineRow
from dantegpu.services.scheduler.store_schedules import ScheduleRow

LIVE_ARRAY = "ARRAY"
"""The state of the row of an array that has not ended; what is shown is `shown_state`."""

type Context = Any  # grpc.aio.ServicerContext; not used: actor and ids are in context variables


class JobRpc(jobs_pb2_grpc.JobServiceServicer):
    def __init__(self, db: Database, intake: Intake, schedules: Schedules, quarantines: Quarantines) -> None:
        self._db = db
        self._intake = intake
        self._schedules = schedules
        self._quarantines = quarantines

    async def SubmitJobs(self, request: jobs_pb2.SubmitJobsRequest, context: Context) -> jobs_pb2.SubmitJobsResponse:
        actor = current_actor()
        try:
            await self._intake.check(actor, request.specs, no_wait=request.no_wait)
        except ServiceError:
            # What is refused today may have been accepted before (`no_wait` took the last machine): same key, same
            # answer.
            if answer := await self._answered(actor, request):
                return answer
            raise
        async with self._db.transaction() as tx:

            async def submit() -> jobs_pb2.SubmitJobsResponse:
                rows = await self._intake.submit(tx, actor, request.specs)
                return jobs_pb2.SubmitJobsResponse(jobs=_new_jobs(rows))

            response = await once(
                tx,
                scope=submit_scope(actor),
                key=request.idempotency_key,
                request=request,
                response_type=jobs_pb2.SubmitJobsResponse,
                do=submit,
            )
        return _with_specs(response, request)

    async def SubmitMany(self, request: jobs_pb2.SubmitManyRequest, context: Context) -> jobs_pb2.SubmitManyResponse:
        current_actor().require_service()
        asked = [
            Submission(Actor.from_proto(each.actor), each.request, each.traceparent, each.request_id)
            for each in request.submissions
        ]
        if any(needs_more_than_a_look(each.request) for each in asked):
            raise InvalidArgument("submissions with inputs or no_wait go by SubmitJobs")
        refused = await check_each(self._intake, asked)
        accepted = [place for place in range(len(asked)) if place not in refused]
        chosen = [asked[place] for place in accepted]
        async with self._db.transaction() as tx:
            answers = await submit_each(tx, self._intake, chosen, _new_jobs)
        by_place: dict[int, Answer] = {**refused, **dict(zip(accepted, answers, strict=True))}
        return jobs_pb2.SubmitManyResponse(
            results=[_result(by_place[place], each.request) for place, each in enumerate(asked)]
        )

    async def _answered(self, actor: Actor, request: jobs_pb2.SubmitJobsRequest) -> jobs_pb2.SubmitJobsResponse | None:
        actor.require_writer()
        async with self._db.transaction() as tx:
            found = await recall(
                tx,
                scope=submit_scope(actor),
                key=request.idempotency_key,
                request=request,
                response_type=jobs_pb2.SubmitJobsResponse,
            )
        return _with_specs(found, request) if found else None

    async def GetJobs(self, request: jobs_pb2.GetJobsRequest, context: Context) -> jobs_pb2.GetJobsResponse:
        async with self._db.transaction() as tx:
            refs = [JobRef.parse(text) for text in request.job_ids]
            details = await self._intake.get(tx, current_actor(), refs)
        return jobs_pb2.GetJobsResponse(jobs=[_detailed(detail, request.node_rank) for detail in details])

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        async with self._db.transaction() as tx:
            actor, page = current_actor(), request.page
            states = [_state(state) for state in request.states]
            if request.array_id:
                array_id = JobId.parse(request.array_id)
                rows, next_cursor = await self._intake.list_tasks(
                    tx, actor, array_id, states=states, cursor=page.cursor, limit=page.limit
                )
            else:
                rows, next_cursor = await self._intake.list_jobs(
                    tx, actor, states=states, cursor=page.cursor, limit=page.limit, all_teams=request.all_teams
                )
            jobs = await _messages(tx, rows)
        return jobs_pb2.ListJobsResponse(jobs=jobs, next_cursor=next_cursor)

    async def StopJobs(self, request: jobs_pb2.StopJobsRequest, context: Context) -> jobs_pb2.StopJobsResponse:
        async with self._db.transaction() as tx:
            rows = await self._intake.stop(tx, current_actor(), _job_ids(request.job_ids))
            jobs = await _messages(tx, rows)
        return jobs_pb2.StopJobsResponse(jobs=jobs)

    async def ListJobEvents(
        self, request: jobs_pb2.ListJobEventsRequest, context: Context
    ) -> jobs_pb2.ListJobEventsResponse:
        async with self._db.transaction() as tx:
            rows = await self._intake.events(
                tx, current_actor(), JobId.parse(request.job_id), request.after_seq, request.limit
            )
        return jobs_pb2.ListJobEventsResponse(events=[event_message(row) for row in rows])

    async def CreateSchedule(
        self, request: jobs_pb2.CreateScheduleRequest, context: Context
    ) -> jobs_pb2.CreateScheduleResponse:
        actor = current_actor()
        await self._schedules.check(actor, request.spec)
        async with self._db.transaction() as tx:

            async def create() -> jobs_pb2.CreateScheduleResponse:
                row = await self._schedules.create(tx, actor, request.spec)
                return jobs_pb2.CreateScheduleResponse(schedule=_schedule_message(row, spec=False))

            response = await once(
                tx,
                scope=f"{actor.team_id}:CreateSchedule",
                key=request.idempotency_key,
                request=request,
                response_type=jobs_pb2.CreateScheduleResponse,
                do=create,
            )
        # As with jobs: what may hold secrets is not remembered with the answer.
        response.schedule.spec.CopyFrom(request.spec)
        return response

    async def ListSchedules(
        self, request: jobs_pb2.ListSchedulesRequest, context: Context
    ) -> jobs_pb2.ListSchedulesResponse:
        async with self._db.transaction() as tx:
            rows, next_cursor = await self._schedules.list_schedules(
                tx, current_actor(), cursor=request.page.cursor, limit=request.page.limit
            )
        return jobs_pb2.ListSchedulesResponse(
            schedules=[_schedule_message(row) for row in rows], next_cursor=next_cursor
        )

    async def StopSchedules(
        self, request: jobs_pb2.StopSchedulesRequest, context: Context
    ) -> jobs_pb2.StopSchedulesResponse:
        ids = [ScheduleId.parse(text) for text in request.schedule_ids]
        async with self._db.transaction() as tx:
            rows = await self._schedules.stop(tx, current_actor(), ids)
        return jobs_pb2.StopSchedulesResponse(schedules=[_schedule_message(row) for row in rows])

    async def ListQuarantines(
        self, request: jobs_pb2.ListQuarantinesRequest, context: Context
    ) -> jobs_pb2.ListQuarantinesResponse:
        ids = [MachineId.parse(text) for text in request.machine_ids]
        async with self._db.transaction() as tx:
            rows = await self._quarantines.list_quarantines(tx, current_actor(), ids)
        return jobs_pb2.ListQuarantinesResponse(quarantines=map(_quarantine, rows))

    async def ReleaseMachines(
        self, request: jobs_pb2.ReleaseMachinesRequest, context: Context
    ) -> jobs_pb2.ReleaseMachinesResponse:
        ids = [MachineId.parse(text) for text in request.machine_ids]
        async with self._db.transaction() as tx:
            rows = await self._quarantines.release(tx, current_actor(), ids)
        return jobs_pb2.ReleaseMachinesResponse(released=map(_quarantine, rows))

    async def ExplainJobs(self, request: jobs_pb2.ExplainJobsRequest, context: Context) -> jobs_pb2.ExplainJobsResponse:
        async with self._db.transaction() as tx:
            found = await self._intake.explain(tx, current_actor(), _job_ids(request.job_ids))
        return jobs_pb2.ExplainJobsResponse(explanations=[_explanation(explanation) for explanation in found])

    async def ResolveAttempts(
        self, request: jobs_pb2.ResolveAttemptsRequest, context: Context
    ) -> jobs_pb2.ResolveAttemptsResponse:
        current_actor().require_service()
        ids = [AttemptId.parse(attempt_id).uuid for attempt_id in request.attempt_ids]
        async with self._db.transaction() as tx:
            rows = await store.resolve_attempts(tx, ids)
        return jobs_pb2.ResolveAttemptsResponse(
            attempts=[
                jobs_pb2.ResolvedAttempt(
                    attempt_id=str(AttemptId(row.id)),
                    job_id=str(JobId(row.job_id)),
                    team_id=str(TeamId(row.team_id)),
                    machine_id=str(MachineId(row.machine_id)),
                    epoch=row.epoch,
                    live=row.live,
                    node_rank=row.node_rank,
                )
                for row in rows
            ]
        )


def _schedule_message(row: ScheduleRow, *, spec: bool = True) -> jobs_pb2.Schedule:
    return jobs_pb2.Schedule(
        id=str(ScheduleId(row.id)),
        team_id=str(TeamId(row.team_id)),
        user_id=str(UserId(row.user_id)) if row.user_id else "",
        spec=jobs_pb2.JobSpec.FromString(row.spec) if spec else None,
        next_at=None if row.stopped_at else _timestamp(row.next_at),
        last_job_id=str(JobId(row.last_job_id)) if row.last_job_id else "",
        runs=row.runs,
        created_at=_timestamp(row.created_at),
        stopped_at=_timestamp(row.stopped_at),
    )


def _quarantine(row: QuarantineRow) -> jobs_pb2.Quarantine:
    return jobs_pb2.Quarantine(
        machine_id=str(MachineId(row.machine_id)),
        reason=row.reason,
        since=_timestamp(row.since),
        until=_timestamp(row.until),
    )


def _new_jobs(rows: Sequence[JobRow]) -> list[jobs_pb2.Job]:
    """As they are remembered for a repeated request: environments may hold secrets and lie in the jobs table alone."""
    messages: list[jobs_pb2.Job] = []
    like: dict[tuple[object, ...], jobs_pb2.Job] = {}
    for row in rows:
        # Jobs of one call differ in little else than their id.
        kind = (row.state, row.reason, row.reason_detail, row.submitted_at, row.array_size)
        if kind not in like:
            like[kind] = _job_message(row, with_spec=False)
            if row.array_size:
                like[kind].array.size = row.array_size
        message = jobs_pb2.Job()
        message.CopyFrom(like[kind])
        message.id = str(JobId(row.id))
        messages.append(message)
    return messages


def _with_specs(
    response: jobs_pb2.SubmitJobsResponse, request: jobs_pb2.SubmitJobsRequest
) -> jobs_pb2.SubmitJobsResponse:
    """The request that an answer is given to again is the same, or it would be refused."""
    for job, spec in zip(response.jobs, request.specs, strict=True):
        job.spec.CopyFrom(spec)
    return response


def _result(answer: Answer, request: jobs_pb2.SubmitJobsRequest) -> jobs_pb2.SubmissionResult:
    if isinstance(answer, ServiceError):
        return jobs_pb2.SubmissionResult(error=error_detail(answer), error_status=status_of(answer).value)
    return jobs_pb2.SubmissionResult(response=_with_specs(answer, request))


def _state(value: "jobs_pb2.JobState.ValueType") -> JobState:
    if value not in jobs_pb2.JobState.values() or value == jobs_pb2.JOB_STATE_UNSPECIFIED:
        raise InvalidArgument(f"states: {value} is no state of a job")
    return JobState(jobs_pb2.JobState.Name(value))


def _job_ids(texts: Sequence[str]) -> list[JobId]:
    return [JobId.parse(text) for text in texts]


async def _messages(tx: Tx, rows: Sequence[JobRow]) -> list[jobs_pb2.Job]:
    progress = await progress_of(tx, rows)
    return [job_message(row, progress.get(row.id)) for row in rows]


def job_message(row: JobRow, progress: ProgressRow | None = None) -> jobs_pb2.Job:
    """`progress` is needed of an array that has not ended, whose state and cost are those of its tasks."""
    message = _job_message(row)
    if progress is None:
        return message
    message.array.CopyFrom(_progress_message(row, progress))
    if row.state == LIVE_ARRAY:
        message.state = jobs_pb2.JobState.Value(progress.shown_state)
        if message.state == jobs_pb2.QUEUED:
            held = QueueReason.WAITING_FOR_JOBS.value if row.held else ""
            message.reason = held or progress.reason or QueueReason.NEW.value
            message.reason_text = QueueReason(message.reason).text
    if not row.settled:
        message.cost_udgpu = progress.cost_udgpu
    return message


def _progress_message(row: JobRow, progress: ProgressRow) -> jobs_pb2.ArrayProgress:
    missing = progress.size - progress.created
    never = missing if row.ended_at is not None and not row.settled else 0
    return jobs_pb2.ArrayProgress(
        size=progress.size,
        created=progress.created,
        queued=progress.queued,
        placed=progress.placed,
        starting=progress.starting,
        running=progress.running,
        stopping=progress.stopping,
        succeeded=progress.succeeded,
        failed=progress.failed,
        cancelled=progress.cancelled + never,
        max_parallel=progress.max_parallel,
    )


def _job_message(row: JobRow, *, with_spec: bool = True) -> jobs_pb2.Job:
    live_array = row.state == LIVE_ARRAY
    return jobs_pb2.Job(
        id=str(JobId(row.id)),
        team_id=str(TeamId(row.team_id)),
        user_id=str(UserId(row.user_id)) if row.user_id else "",
        spec=jobs_pb2.JobSpec.FromString(row.spec) if with_spec else None,
        state=jobs_pb2.QUEUED if live_array else jobs_pb2.JobState.Value(row.state),
        reason=row.reason or "",
        reason_text=reason_text(row),
        epoch=row.epoch,
        outcome=_outcome(row.outcome),
        exit_code=row.exit_code,
        message=row.message,
        cost_udgpu=row.cost_udgpu,
        results_epoch=row.results_epoch,
        created_at=_timestamp(row.submitted_at),
        started_at=_timestamp(row.first_running_at),
        ended_at=_timestamp(row.ended_at),
        settled=row.settled,
        array_id=str(JobId(row.array_id)) if row.array_id else "",
        array_index=row.array_index or 0,
        schedule_id=str(ScheduleId(row.schedule_id)) if row.schedule_id else "",
    )


def _detailed(details: JobDetails, node_rank: int) -> jobs_pb2.Job:
    message = job_message(details.job, details.progress)
    resumed = _resumed_epochs(details.attempts)
    for attempt in details.attempts:
        leases = details.leases.get(attempt.id, [])
        message.attempts.append(_attempt_message(attempt, leases, resumed[attempt.epoch]))
        if attempt.epoch == details.job.results_epoch and attempt.node_rank == node_rank:
            message.results.extend(machine_pb2.AttemptStatus.FromString(attempt.results).results)
    return message


def _attempt_message(row: AttemptRow, leases: Sequence[LeaseRow], resumed_epoch: int) -> jobs_pb2.Attempt:
    return jobs_pb2.Attempt(
        id=str(AttemptId(row.id)),
        job_id=str(JobId(row.job_id)),
        epoch=row.epoch,
        machine_id=str(MachineId(row.machine_id)),
        state=jobs_pb2.JobState.Value(row.state),
        outcome=_outcome(row.outcome),
        exit_code=row.exit_code,
        message=row.message,
        rate_udgpu_per_hour=row.rate_udgpu_per_hour,
        billed_seconds=row.billed_seconds,
        cost_udgpu=row.cost_udgpu,
        device_ids=[str(DeviceId(lease.device_id)) for lease in leases],
        created_at=_timestamp(row.created_at),
        started_at=_timestamp(row.running_at),
        ended_at=_timestamp(row.ended_at),
        simulated=row.simulated,
        sandbox=row.sandbox,
        node_rank=row.node_rank,
        spot=row.spot,
        checkpointed_at=_timestamp(row.checkpointed_at if row.checkpoint_sha256 else None),
        resumed_epoch=resumed_epoch,
        ports=machine_pb2.AttemptStatus.FromString(row.ports).ports,
        silent=row.silent,
    )


def _resumed_epochs(attempts: Sequence[AttemptRow]) -> dict[int, int]:
    """Epoch -> the one whose checkpoint it began with: the last before it of which every node told what it saved."""
    by_epoch: dict[int, list[AttemptRow]] = {}
    for attempt in attempts:
        by_epoch.setdefault(attempt.epoch, []).append(attempt)
    found: dict[int, int] = {}
    last = 0
    for epoch, nodes in sorted(by_epoch.items()):
        found[epoch] = last
        if all(node.checkpoint_number for node in nodes) and any(node.checkpoint_sha256 for node in nodes):
            last = epoch
    return found


def _explanation(found: JobExplanation) -> jobs_pb2.Explanation:
    message = jobs_pb2.Explanation(job_id=str(found.asked))
    if found.why is None:
        return message
    message.reason = found.job.reason or ""
    message.reason_text = reason_text(found.job)
    message.machines_total = found.why.machines_total
    message.machines_fitting = found.why.machines_fitting
    message.machines_free = found.why.machines_free
    for count in found.why.constraints:
        message.constraints.add(
            constraint=count.constraint.value, machines_excluded=count.machines_excluded, text=count.text
        )
    for relaxation in found.why.relaxations:
        added = message.relaxations.add(
            field=relaxation.field,
            to=relaxation.after,
            machines=relaxation.machines,
            available_now=relaxation.available_now,
            machines_free=relaxation.machines_free,
        )
        setattr(added, "from", relaxation.before)  # a Python keyword
    return message


def _outcome(value: str | None) -> "jobs_pb2.Outcome.ValueType":
    return jobs_pb2.Outcome.Value(f"OUTCOME_{value.upper()}") if value else jobs_pb2.OUTCOME_UNSPECIFIED


def _timestamp(value: datetime | None) -> Timestamp | None:
    if value is None:
        return None
    message = Timestamp()
    message.FromDatetime(value)
    return message
