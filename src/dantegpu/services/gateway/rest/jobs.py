"""/v1/uploads and /v1/jobs."""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, override

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import StreamingResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from dantegpu.contracts import objects
from dantegpu.contracts.gen.dante.v1 import billing_pb2, jobs_pb2, monitoring_pb2, storage_pb2
from dantegpu.contracts.rest import billing, jobs, storage
from dantegpu.contracts.rest.convert import SpecReader
from dantegpu.contracts.rest.spec import MAX_NODES
from dantegpu.domain.job import JobState
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.idempotency import MAX_KEY_LENGTH
from dantegpu.services.gateway import convert
from dantegpu.services.gateway.context import (
    JOB_WRITER,
    Gateway,
    IdempotencyKey,
    JobIdPath,
    JobReader,
    JobWriter,
    Paging,
    Platform,
    WalletReader,
    gateway_of,
    number_after,
)
from dantegpu.services.gateway.errors import ArrayOfTasks
from dantegpu.services.gateway.rest.follow import (
    LOG_BYTES_PER_READ,
    JobEventSource,
    LogSource,
    check_node,
    get_job,
    is_terminal,
    read_logs,
)
from dantegpu.services.gateway.streams import EventStream

MAX_LOG_EPOCH = 1_000_000

router = APIRouter(tags=["jobs"])


@router.post("/v1/uploads", status_code=201, tags=["uploads"], summary="Where to send packed working directories")
async def prepare_uploads(body: storage.PrepareUploads, _actor: JobWriter, platform: Platform) -> storage.Uploads:
    """Content-addressed within your team: what the platform has already need not be sent again."""
    wants = [storage_pb2.BlobWant(sha256=blob.sha256, size_bytes=blob.size_bytes) for blob in body.blobs]
    request = storage_pb2.PrepareUploadsRequest(blobs=wants)
    response = await rpc.call(platform.clients.storage.PrepareUploads, request)
    return storage.Uploads(
        uploads=[
            storage.BlobUpload(sha256=each.sha256, exists=each.exists, url=each.url or None)
            for each in response.uploads
        ]
    )


@dataclass(frozen=True, slots=True)
class _Submitted:
    """One spec, or those of `{"jobs": [...]}`: told apart by hand, so that an error names the field."""

    specs: list[jobs_pb2.JobSpec]
    many: bool


_reader = SpecReader()
_bodies = convert.NewJobsJson()


async def _submitted(request: Request) -> _Submitted:
    try:
        document: object = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        message = str(error) or type(error).__name__
        line = {"type": "json_invalid", "loc": ("body",), "msg": message, "input": None, "ctx": {"error": message}}
        raise RequestValidationError([line]) from error
    try:
        if isinstance(document, dict) and "jobs" in document:
            return _Submitted(_reader.read_many(cast("dict[str, object]", document)), many=True)
        return _Submitted([_reader.read(cast(object, document))], many=False)
    except ValidationError as error:
        lines = cast("list[dict[str, Any]]", error.errors(include_url=False, include_input=False))
        raise RequestValidationError([line | {"loc": ("body", *line["loc"])} for line in lines]) from error


class SubmitRoute(Route):
    """POST /v1/jobs as it mostly comes: every job's way, and FastAPI's is longer than what is done at its end.

    What has a query, or a key that is refused, goes on to submit(), which also describes the route.
    """

    def __init__(self) -> None:
        super().__init__("/v1/jobs", _submit_plain, methods=["POST"])

    @override
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != self.path or scope["query_string"]:
            return Match.NONE, {}
        if any(name == b"idempotency-key" and len(value) > MAX_KEY_LENGTH for name, value in scope["headers"]):
            return Match.NONE, {}
        return Match.FULL, {"endpoint": self.endpoint, "path_params": {}, "route": self}


async def _submit_plain(request: Request) -> Response:
    JOB_WRITER.of(request)
    key = request.headers.get("idempotency-key", "")
    return await _accept(gateway_of(request), await _submitted(request), key, no_wait=False)


_SUBMIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [{"$ref": "#/components/schemas/JobSpec"}, {"$ref": "#/components/schemas/JobList"}]
                },
                "example": {"name": "train", "commands": ["python train.py"], "resources": {"gpu": "RTX4090"}},
            }
        },
    }
}


@router.post(
    "/v1/jobs", status_code=201, summary="Submit one job, or many at once", openapi_extra=_SUBMIT_BODY,
    response_model=jobs.Job | jobs.Jobs,
)  # fmt: skip
async def submit(
    # First: a body is looked at only when somebody known has sent it.
    _actor: JobWriter,
    submitted: Annotated[_Submitted, Depends(_submitted)],
    key: IdempotencyKey,
    platform: Platform,
    wait: Annotated[bool, Query(description="false: refuse a job that no machine fits right now")] = True,
) -> Response:
    """A single spec answers the job; `{"jobs": [...]}` answers `{"jobs": [...]}`: all are accepted or none."""
    return await _accept(platform, submitted, key, no_wait=not wait)


async def _accept(platform: Gateway, submitted: _Submitted, key: str, *, no_wait: bool) -> Response:
    request = jobs_pb2.SubmitJobsRequest(specs=submitted.specs, idempotency_key=key, no_wait=no_wait)
    accepted = await platform.submissions.submit(request)
    # Written out here: the models were just made, and FastAPI would validate them once more.
    if submitted.many:
        return Response(_bodies.many(accepted.jobs), status_code=201, media_type="application/json")
    (made,) = accepted.jobs
    headers = {"location": f"/v1/jobs/{made.id}"}
    return Response(_bodies.one(made), status_code=201, headers=headers, media_type="application/json")


@router.get("/v1/jobs", summary="Your team's jobs, newest first")
async def list_jobs(
    _actor: JobReader,
    page: Paging,
    platform: Platform,
    state: Annotated[list[JobState] | None, Query(description="Only these; may come several times")] = None,
) -> jobs.JobPage:
    states = [jobs_pb2.JobState.Value(each.value) for each in state or ()]
    response = await rpc.call(platform.clients.jobs.ListJobs, jobs_pb2.ListJobsRequest(page=page, states=states))
    found = [convert.job(job) for job in response.jobs]
    return jobs.JobPage(jobs=found, next_cursor=response.next_cursor or None)


@router.get("/v1/jobs/{job_id}", summary="One job with its attempts and results")
async def show_job(job_id: JobIdPath, _actor: JobReader, platform: Platform) -> jobs.Job:
    return convert.job(await get_job(platform.clients, job_id))


@router.get("/v1/jobs/{job_id}/tasks", summary="The tasks of an array, by index")
async def list_tasks(
    job_id: JobIdPath,
    _actor: JobReader,
    page: Paging,
    platform: Platform,
    state: Annotated[list[JobState] | None, Query(description="Only these; may come several times")] = None,
) -> jobs.JobPage:
    """Tasks are created as their turn comes: what is not listed yet waits. `job_...:17` names one everywhere."""
    states = [jobs_pb2.JobState.Value(each.value) for each in state or ()]
    request = jobs_pb2.ListJobsRequest(page=page, states=states, array_id=job_id)
    response = await rpc.call(platform.clients.jobs.ListJobs, request)
    return jobs.JobPage(jobs=[convert.job(job) for job in response.jobs], next_cursor=response.next_cursor or None)


@router.post("/v1/jobs/{job_id}/stop", summary="Stop a job")
async def stop_job(job_id: JobIdPath, _actor: JobWriter, platform: Platform) -> jobs.Job:
    """Stopping twice changes nothing; a job that has ended stays as it is."""
    response = await rpc.call(platform.clients.jobs.StopJobs, jobs_pb2.StopJobsRequest(job_ids=[job_id]))
    return convert.job(response.jobs[0])


@router.get("/v1/jobs/{job_id}/why", summary="Why does it wait, and what would help?")
async def explain_job(job_id: JobIdPath, _actor: JobReader, platform: Platform) -> jobs.Explanation:
    response = await rpc.call(platform.clients.jobs.ExplainJobs, jobs_pb2.ExplainJobsRequest(job_ids=[job_id]))
    return convert.explanation(response.explanations[0])


type NodeRank = Annotated[int, Query(ge=0, lt=MAX_NODES, description="Which node, of a job with several")]
type LastEventId = Annotated[
    str,
    Header(
        alias="Last-Event-ID", max_length=100, description="Event streams: the id of the last event that you have seen"
    ),
]
type Accept = Annotated[str, Header(include_in_schema=False)]


def _wants_stream(accept: str) -> bool:
    return "text/event-stream" in accept.lower()


def _stream_answer(what: str, event: str) -> dict[int | str, dict[str, Any]]:
    text = f"{what}. `Accept: text/event-stream` answers a stream of `event: {event}`; it ends with `event: end`."
    return {200: {"description": text, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@router.get(
    "/v1/jobs/{job_id}/events", summary="A job's history, also live",
    response_model=jobs.JobEvents, responses=_stream_answer("The history", "job"),
)  # fmt: skip
async def job_events(
    job_id: JobIdPath,
    actor: JobReader,
    platform: Platform,
    accept: Accept = "",
    last_event_id: LastEventId = "",
    after_seq: Annotated[int, Query(ge=0, description="Only what came after this event")] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    until: Annotated[Literal["ended", "settled"], Query(description="Streams: when to end")] = "ended",
) -> Any:
    if not _wants_stream(accept):
        request = jobs_pb2.ListJobEventsRequest(job_id=job_id, after_seq=after_seq, limit=limit)
        response = await rpc.call(platform.clients.jobs.ListJobEvents, request)
        events = [convert.job_event(event) for event in response.events]
        return jobs.JobEvents(events=events, last_seq=events[-1].seq if events else after_seq)
    if last_event_id:
        after_seq = number_after(last_event_id, "Last-Event-ID")
    job = await get_job(platform.clients, job_id)
    source = JobEventSource(platform.clients, actor, job, after_seq, until == "settled")
    team = str(actor.require_team())
    platform.streams.check_room(team)
    return EventStream(platform.streams.follow(team, job_id, source))


@router.get(
    "/v1/jobs/{job_id}/logs", summary="What a job wrote, also live",
    response_class=Response, responses={
        200: {
            "description": (
                "The bytes of one attempt's log (standard output and error) from `offset` on, as they are stored now. "
                "`X-Log-Epoch`, `X-Log-Offset` and `X-Log-Size` say what they are. `Accept: text/event-stream` "
                "answers a stream of `event: log` (see LogChunk) that goes on with later attempts "
                "and ends with `event: end`."
            ),
            "content": {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "text/event-stream")},
        }
    },
)  # fmt: skip
async def job_logs(
    job_id: JobIdPath,
    actor: JobReader,
    platform: Platform,
    accept: Accept = "",
    last_event_id: LastEventId = "",
    epoch: Annotated[int, Query(ge=0, le=MAX_LOG_EPOCH, description="Which attempt; 0: the latest with a log")] = 0,
    offset: Annotated[int, Query(ge=0, le=1 << 60, description="First byte")] = 0,
    limit_bytes: Annotated[int, Query(ge=1, le=1 << 40, description="At most so much")] = 1 << 40,
    node: NodeRank = 0,
) -> Response:
    job = await get_job(platform.clients, job_id)
    check_node(job, node)
    _refuse_array(job, "logs")
    if not _wants_stream(accept):
        request = monitoring_pb2.ReadLogsRequest(job_id=job_id, epoch=epoch, offset=offset, node_rank=node)
        return await _stored_log(platform, request, limit_bytes)
    one_attempt = epoch > 0
    if last_event_id:
        seen_epoch, _, seen_offset = last_event_id.partition(":")
        epoch, offset = number_after(seen_epoch, "Last-Event-ID"), number_after(seen_offset, "Last-Event-ID")
    source = LogSource(platform.clients, actor, platform.clock, job, epoch, offset, one_attempt, node)
    team = str(actor.require_team())
    platform.streams.check_room(team)
    return EventStream(platform.streams.follow(team, job_id, source, logs=True))


async def _stored_log(platform: Platform, request: monitoring_pb2.ReadLogsRequest, limit_bytes: int) -> Response:
    request.limit_bytes = min(limit_bytes, LOG_BYTES_PER_READ)
    first = await read_logs(platform.clients, request)
    end = min(first.size_bytes, first.offset + limit_bytes)

    async def pieces() -> AsyncGenerator[bytes]:
        found, at = first, first.offset
        while found.data:
            yield found.data
            at += len(found.data)
            if at >= end:
                return
            request.epoch, request.offset, request.limit_bytes = first.epoch, at, min(end - at, LOG_BYTES_PER_READ)
            found = await read_logs(platform.clients, request)

    headers = {
        "x-log-epoch": str(first.epoch),
        "x-log-offset": str(first.offset),
        "x-log-size": str(first.size_bytes),
        "x-log-truncated": "true" if first.truncated else "false",
    }
    return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8", headers=headers)


@router.get("/v1/jobs/{job_id}/metrics", summary="What a job used over time")
async def job_metrics(
    job_id: JobIdPath,
    _actor: JobReader,
    platform: Platform,
    epoch: Annotated[int, Query(ge=0, le=MAX_LOG_EPOCH, description="Which attempt; 0: the latest with any")] = 0,
    after: Annotated[int, Query(ge=0, le=1 << 30, description="Only points behind this number")] = 0,
    node: Annotated[int, Query(ge=0, le=10_000, description="Which of the job's nodes")] = 0,
) -> jobs.Metrics:
    """CPU, memory, disks and GPUs, a point every few seconds. Ask again with `after` for what has come since."""
    await get_job(platform.clients, job_id)
    request = monitoring_pb2.ReadMetricsRequest(job_id=job_id, epoch=epoch, after_number=after, node_rank=node)
    return convert.metrics(job_id, await rpc.call(platform.clients.monitoring.ReadMetrics, request))


@router.get("/v1/jobs/{job_id}/results", summary="What a job left in $DANTE_OUTPUT, with download addresses")
async def job_results(job_id: JobIdPath, _actor: JobReader, platform: Platform, node: NodeRank = 0) -> jobs.Results:
    job = await get_job(platform.clients, job_id, node_rank=node)
    check_node(job, node)
    prefix = objects.results_prefix(job_id, job.results_epoch, node)
    _refuse_array(job, "results")
    items = [
        storage_pb2.Presign(
            method=storage_pb2.Presign.GET,
            key=f"{prefix}/{file.path}",
            download_name=file.path.rpartition("/")[2],
        )
        for file in job.results
    ]
    urls: list[str] = []
    if items:
        # Whose results these are was checked above; storage-service takes a service's word for it.
        response = await rpc.call(
            platform.clients.storage.PresignUrls, storage_pb2.PresignRequest(items=items), actor=SERVICE
        )
        urls = list(response.urls)
    files = [
        jobs.ResultDownload(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256, url=url)
        for file, url in zip(job.results, urls, strict=True)
    ]
    return jobs.Results(
        job_id=job_id, epoch=job.results_epoch or None, node_rank=node, complete=is_terminal(job), files=files
    )


@router.get("/v1/jobs/{job_id}/receipt", tags=["wallet"], summary="What a job cost, window by window")
async def job_receipt(
    job_id: JobIdPath, _actor: JobReader, _wallet: WalletReader, platform: Platform
) -> billing.Receipt:
    """Of an array: all its tasks."""
    job = await get_job(platform.clients, job_id)
    request = billing_pb2.GetReceiptRequest(job_id=job_id)
    if job.array_id and job.attempts:
        # Tasks are paid for under their array's id.
        request = billing_pb2.GetReceiptRequest(job_id=job.array_id, attempt_ids=[each.id for each in job.attempts])
    receipt = (await rpc.call(platform.clients.billing.GetReceipt, request)).receipt
    receipt.job_id = job_id
    return convert.receipt(receipt)


def _refuse_array(job: jobs_pb2.Job, what: str) -> None:
    if job.HasField("array"):
        raise ArrayOfTasks(job.id, job.array.size, what)
