"""Submissions on their way to the scheduler: the first goes at once, what arrives meanwhile shares the next call."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, jobs_pb2_grpc
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, current_actor
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Tasks, Wakeup
from dantegpu.kit.telemetry import current_request_id, current_traceparent

log = structlog.get_logger(__name__)

TIMEOUT_SECONDS = 30.0
SHARED_JOBS_MAX = 32
"""A submission of more jobs than these has a call of its own: the others do not wait for it."""
JOBS_PER_CALL_MAX = 512
BYTES_PER_CALL_MAX = 8 << 20


@dataclass(slots=True)
class _Waiting:
    submission: jobs_pb2.Submission
    answer: "asyncio.Future[jobs_pb2.SubmitJobsResponse]"


GATHER_SECONDS = 0.002
"""Right after a call the next one waits so long: those who were just answered are about to send again."""


class Submissions:
    """Component. Owns one task, which has at most one call under way."""

    def __init__(self, jobs: jobs_pb2_grpc.JobServiceStub) -> None:
        self._jobs = jobs
        self._waiting: list[_Waiting] = []
        self._wakeup = Wakeup()
        self._answered_seconds = -GATHER_SECONDS
        self._tasks = Tasks("submissions")

    async def start(self) -> None:
        self._tasks.loop(self._send, "send")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def submit(self, request: jobs_pb2.SubmitJobsRequest) -> jobs_pb2.SubmitJobsResponse:
        """As the actor being served. Raises what SubmitJobs raises."""
        if _is_slow(request):
            return await rpc.call(self._jobs.SubmitJobs, request, timeout_seconds=TIMEOUT_SECONDS)
        submission = jobs_pb2.Submission(
            actor=current_actor().to_proto(),
            request=request,
            traceparent=current_traceparent(),
            request_id=current_request_id(),
        )
        waiting = _Waiting(submission, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wakeup.notify()
        return await waiting.answer

    async def _send(self) -> None:
        await self._wakeup.wait()
        while self._waiting:
            if time.monotonic() - self._answered_seconds < GATHER_SECONDS:
                await asyncio.sleep(GATHER_SECONDS)
            batch = self._take()
            try:
                request = jobs_pb2.SubmitManyRequest(submissions=[waiting.submission for waiting in batch])
                response = await rpc.call(
                    self._jobs.SubmitMany, request, actor=SERVICE, timeout_seconds=TIMEOUT_SECONDS
                )
            except ServiceError as error:
                _fail(batch, error)
                continue
            except BaseException:
                for waiting in batch:
                    waiting.answer.cancel()
                raise
            for waiting, result in zip(batch, response.results, strict=True):
                _answer(waiting, result)
            self._answered_seconds = time.monotonic()

    def _take(self) -> list[_Waiting]:
        jobs, size_bytes, count = 0, 0, 0
        for waiting in self._waiting:
            jobs += len(waiting.submission.request.specs)
            size_bytes += waiting.submission.ByteSize()
            if count and (jobs > JOBS_PER_CALL_MAX or size_bytes > BYTES_PER_CALL_MAX):
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch


def _is_slow(request: jobs_pb2.SubmitJobsRequest) -> bool:
    """Whether other services are asked before it is accepted, or it is long."""
    return request.no_wait or len(request.specs) > SHARED_JOBS_MAX or any(spec.input_sha256 for spec in request.specs)


def _answer(waiting: _Waiting, result: jobs_pb2.SubmissionResult) -> None:
    if waiting.answer.done():
        return  # who asked has left; the job is there all the same
    if result.HasField("error"):
        waiting.answer.set_exception(rpc.remote_error(result.error, result.error_status))
    else:
        waiting.answer.set_result(result.response)


def _fail(batch: Sequence[_Waiting], error: ServiceError) -> None:
    log.warning("submissions_failed", submissions=len(batch), error=error.message)
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
