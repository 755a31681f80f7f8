"""Jobs: submit, look, follow, stop, and fetch what they left."""

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from dantegpu.contracts.rest.billing import Receipt
from dantegpu.contracts.rest.jobs import (
    Explanation,
    Job,
    JobEvent,
    JobEvents,
    JobPage,
    Jobs,
    LogChunk,
    Metrics,
    ResultDownload,
    Results,
)
from dantegpu.contracts.rest.spec import JobList, JobSpec
from dantegpu.domain.job import JobState
from dantegpu.sdk._async.transport import AsyncTransport, Params
from dantegpu.sdk.errors import InvalidAnswer, TransferProblem
from dantegpu.sdk.protocol import (
    LOG_BYTES_PER_READ,
    LogBytes,
    OnProgress,
    log_size_bytes,
    new_idempotency_key,
    no_progress,
)
from dantegpu.sdk.results import safe_target

type SpecLike = JobSpec | Mapping[str, Any]

_POLL_FIRST_SECONDS = 0.05
_POLL_MAX_SECONDS = 1.0
_EVENTS_PER_PAGE = 500


class AsyncJobsApi:
    """`client.jobs`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def submit(self, spec: SpecLike, *, wait: bool = True, idempotency_key: str | None = None) -> Job:
        """Queue one job. With `wait=False` it is refused (Conflict) when nothing can take it now.

        Raises pydantic.ValidationError for a spec that is wrong, before anything is sent.
        """
        return await self._transport.call(
            Job,
            "POST",
            "/v1/jobs",
            body=_spec(spec),
            params={"wait": None if wait else "false"},
            idempotency_key=idempotency_key or new_idempotency_key(),
        )

    async def submit_many(
        self, specs: Iterable[SpecLike], *, wait: bool = True, idempotency_key: str | None = None
    ) -> "list[Job]":
        """Queue many jobs in one call: all or none. Answered in the order given."""
        answer = await self._transport.call(
            Jobs,
            "POST",
            "/v1/jobs",
            body=JobList(jobs=[_spec(spec) for spec in specs]),
            params={"wait": None if wait else "false"},
            idempotency_key=idempotency_key or new_idempotency_key(),
        )
        return answer.jobs

    async def get(self, job_id: str) -> Job:
        """One job with its attempts and results."""
        return await self._transport.call(Job, "GET", f"/v1/jobs/{job_id}")

    async def list(self, *, states: Sequence[JobState] = (), cursor: str | None = None, limit: int = 50) -> JobPage:
        """One page of your team's jobs, newest first; no `states` means all."""
        params = {"state": [state.value for state in states], "cursor": cursor, "limit": limit}
        return await self._transport.call(JobPage, "GET", "/v1/jobs", params=params)

    async def tasks(
        self, job_id: str, *, states: Sequence[JobState] = (), cursor: str | None = None, limit: int = 50
    ) -> JobPage:
        """One page of an array's tasks, by index. Those not created yet wait, and are not listed.

        A task has a job's id of its own, and is also `job_...:17`: wherever an id is asked for, either will do.
        """
        params = {"state": [state.value for state in states], "cursor": cursor, "limit": limit}
        return await self._transport.call(JobPage, "GET", f"/v1/jobs/{job_id}/tasks", params=params)

    async def stop(self, job_id: str) -> Job:
        """Ask for the job's end, of an array for that of all its tasks; one that has ended stays as it is."""
        return await self._transport.call(Job, "POST", f"/v1/jobs/{job_id}/stop")

    async def why(self, job_id: str) -> Explanation:
        """Why it waits, and the smallest changes that would help."""
        return await self._transport.call(Explanation, "GET", f"/v1/jobs/{job_id}/why")

    async def receipt(self, job_id: str) -> Receipt:
        """What it cost, window by window."""
        return await self._transport.call(Receipt, "GET", f"/v1/jobs/{job_id}/receipt")

    async def events(
        self, job_id: str, *, follow: bool = False, after_seq: int = 0, until_settled: bool = False
    ) -> AsyncGenerator[JobEvent]:
        """The job's history from after `after_seq`.

        With `follow` it goes on live until the job has ended; with `until_settled`, until its cost is final too.
        """
        path = f"/v1/jobs/{job_id}/events"
        if follow:
            params: Params = {"after_seq": after_seq, "until": "settled" if until_settled else "ended"}
            async with aclosing(self._transport.stream(path, params=params)) as stream:
                async for message in stream:
                    event = _parsed(JobEvent, message.data)
                    # A stream that was opened anew may begin with what we have seen.
                    if event.seq > after_seq:
                        after_seq = event.seq
                        yield event
            return
        while True:
            params = {"after_seq": after_seq, "limit": _EVENTS_PER_PAGE}
            page = await self._transport.call(JobEvents, "GET", path, params=params)
            for event in page.events:
                after_seq = event.seq
                yield event
            if len(page.events) < _EVENTS_PER_PAGE:
                return

    async def logs(
        self, job_id: str, *, follow: bool = False, epoch: int = 0, offset: int = 0, node: int = 0
    ) -> AsyncGenerator[LogBytes]:
        """The log of one attempt (0: the latest that has one), as bytes; with `follow`, live until the job has ended.

        Each `node` of a job with several has a log of its own.
        A followed job that is tried again goes on with the next attempt's log, from offset 0, unless `epoch` was given.
        """
        path = f"/v1/jobs/{job_id}/logs"
        if follow:
            params: Params = {"epoch": epoch, "offset": offset, "node": node or None}
            async with aclosing(self._transport.stream(path, params=params)) as stream:
                async for message in stream:
                    yield LogBytes.of(_parsed(LogChunk, message.data))
            return
        while True:
            params = {"epoch": epoch, "offset": offset, "limit_bytes": LOG_BYTES_PER_READ, "node": node or None}
            headers, data = await self._transport.fetch(path, params=params)
            piece = LogBytes.of_answer(headers, data)
            if data:
                yield piece
            if not data or piece.next_offset >= log_size_bytes(headers):
                return
            epoch, offset = piece.epoch, piece.next_offset

    async def metrics(self, job_id: str, *, epoch: int = 0, after: int = 0, node: int = 0) -> Metrics:
        """What one attempt (0: the latest that has any) used, a point every few seconds; those behind `after` only."""
        params: Params = {"epoch": epoch, "after": after, "node": node}
        return await self._transport.call(Metrics, "GET", f"/v1/jobs/{job_id}/metrics", params=params)

    async def results(self, job_id: str, *, node: int = 0) -> Results:
        """The published result files of a node, each with a URL that is valid for a few minutes."""
        params: Params = {"node": node or None}
        return await self._transport.call(Results, "GET", f"/v1/jobs/{job_id}/results", params=params)

    async def download(
        self, job_id: str, folder: Path, *, node: int = 0, on_progress: OnProgress = no_progress
    ) -> "list[Path]":
        """Fetch all results of a node into `folder`. A file appears under its name only when its digest is right.

        Raises TransferProblem, also for a path that would leave `folder`.
        """
        listing = await self.results(job_id, node=node)
        targets = [safe_target(folder, file.path) for file in listing.files]
        total_bytes = sum(file.size_bytes for file in listing.files)
        done_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for file, target in zip(listing.files, targets, strict=True):
            if not await self._download_one(file, target, done_bytes, total_bytes, on_progress):
                # The URL of a file that comes late has ended: ask for new ones.
                again = {fresh.path: fresh for fresh in (await self.results(job_id, node=node)).files}
                fresh = again.get(file.path)
                if fresh is None or not await self._download_one(fresh, target, done_bytes, total_bytes, on_progress):
                    raise TransferProblem(f"storage does not hand out {file.path}")
            done_bytes += file.size_bytes
            on_progress(done_bytes, total_bytes)
        return targets

    async def _download_one(
        self, file: ResultDownload, target: Path, before_bytes: int, total_bytes: int, on_progress: OnProgress
    ) -> bool:
        """False: the URL is not valid (any more)."""
        retries = self._transport.new_retries()
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
            part = Path(name)
            digest = hashlib.sha256()
            got_bytes = 0
            try:
                with os.fdopen(descriptor, "wb") as output:
                    async with aclosing(self._transport.get_bytes(file.url)) as chunks:
                        async for data in chunks:
                            got_bytes += len(data)
                            if got_bytes > file.size_bytes:
                                break
                            output.write(data)
                            digest.update(data)
                            on_progress(before_bytes + got_bytes, total_bytes)
                if got_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
                    raise TransferProblem(
                        f"{file.path} is damaged: its bytes are not those that the job left (SHA-256 differs)"
                    )
                part.chmod(0o666 & ~_umask())
                os.replace(part, target)
                return True
            except httpx.TransportError as error:
                await self._transport.pause_or_raise(retries, error)
            except TransferProblem as problem:
                if problem.refused:
                    return False
                raise
            finally:
                part.unlink(missing_ok=True)

    async def wait(self, job_id: str, *, timeout_seconds: float | None = None, settled: bool = False) -> Job:
        """The job once it has ended; with `settled`, once its cost is final too. Raises TimeoutError."""
        started = time.monotonic()
        pause_seconds = _POLL_FIRST_SECONDS
        while True:
            job = await self.get(job_id)
            if job.state.terminal and (job.settled or not settled):
                return job
            if timeout_seconds is not None and time.monotonic() - started >= timeout_seconds:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_seconds:g} s")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 1.5, _POLL_MAX_SECONDS)


def _spec(spec: SpecLike) -> JobSpec:
    return spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _parsed[T: (JobEvent, LogChunk)](kind: type[T], data: str) -> T:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise InvalidAnswer(f"the stream holds something else than a {kind.__name__}: {data[:200]}") from error
