"""Sources of the event streams: a job's history, and its log."""

import base64
from datetime import timedelta

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, monitoring_pb2
from dantegpu.contracts.rest import jobs
from dantegpu.domain.clock import Clock
from dantegpu.kit import rpc
from dantegpu.kit.actor import Actor
from dantegpu.kit.errors import ErrorStatus, InvalidArgument, RemoteError
from dantegpu.services.gateway import convert
from dantegpu.services.gateway.clients import Clients
from dantegpu.services.gateway.streams import Event, Source

EVENTS_PER_READ = 500
LOG_BYTES_PER_READ = 256 << 10
LOG_GRACE = timedelta(seconds=10)
"""How long after an attempt's end the rest of its log may still arrive."""


async def get_job(clients: Clients, job_id: str, actor: Actor | None = None, node_rank: int = 0) -> jobs_pb2.Job:
    """A job of the actor's with the results of one node. Raises RemoteError (not found) for anybody else's."""
    request = jobs_pb2.GetJobsRequest(job_ids=[job_id], node_rank=node_rank)
    response = await rpc.call(clients.jobs.GetJobs, request, actor=actor)
    return response.jobs[0]


def check_node(job: jobs_pb2.Job, node_rank: int) -> None:
    """Raises InvalidArgument for a node that the job does not have."""
    nodes = max(job.spec.nodes, 1)
    if node_rank >= nodes:
        what = "one node, which is node 0" if nodes == 1 else f"{nodes} nodes, 0 to {nodes - 1}"
        raise InvalidArgument(f"{job.id} has {what}; there is no node {node_rank}")


def is_terminal(job: jobs_pb2.Job | jobs_pb2.Attempt) -> bool:
    return convert.job_state(job.state).terminal


def stream_end(job: jobs_pb2.Job) -> jobs.StreamEnd:
    shown = convert.job(job)
    return jobs.StreamEnd(
        job_id=shown.id,
        state=shown.state,
        outcome=shown.outcome,
        exit_code=shown.exit_code,
        message=shown.message,
        cost_udgpu=shown.cost_udgpu,
        settled=shown.settled,
    )


class JobEventSource(Source):
    """A job's history after `after_seq`, until the job has ended (or, `until_settled`, has been paid for)."""

    def __init__(self, clients: Clients, actor: Actor, job: jobs_pb2.Job, after_seq: int, until_settled: bool) -> None:
        self._clients = clients
        self._actor = actor
        self._job_id = job.id
        self._after_seq = after_seq
        self._until_settled = until_settled
        # A job that had ended before the first read has no event that the first read would not show.
        self._ended = is_terminal(job)

    async def read(self) -> list[Event]:
        request = jobs_pb2.ListJobEventsRequest(job_id=self._job_id, after_seq=self._after_seq, limit=EVENTS_PER_READ)
        response = await rpc.call(self._clients.jobs.ListJobEvents, request, actor=self._actor)
        events = [convert.job_event(event) for event in response.events]
        if events:
            self._after_seq = events[-1].seq
            self._ended = self._ended or events[-1].state.terminal
        return [Event("job", str(event.seq), event) for event in events]

    async def finished(self) -> jobs.StreamEnd | None:
        if not self._ended:
            return None
        job = await get_job(self._clients, self._job_id, self._actor)
        return None if self._until_settled and not job.settled else stream_end(job)


class LogSource(Source):
    """A job's log from a place on. With `epoch` 0 it begins at the latest attempt; the ones after it follow."""

    def __init__(
        self,
        clients: Clients,
        actor: Actor,
        clock: Clock,
        job: jobs_pb2.Job,
        epoch: int,
        offset: int,
        one_attempt: bool,
        node_rank: int,
    ) -> None:
        self._clients = clients
        self._actor = actor
        self._clock = clock
        self._job = job
        self._epoch = epoch
        self._offset = offset
        self._one_attempt = one_attempt
        self._node_rank = node_rank
        self._complete = False

    async def read(self) -> list[Event]:
        events = await self._read_here()
        if not events:
            # Asked only after the log gave nothing: what was written before the job's end has been read then.
            job = await get_job(self._clients, self._job.id, self._actor)
            events = await self._read_here()
            if not events and self._moves_on(job):
                events = await self._read_here()
            self._job = job
        return events

    async def _read_here(self) -> list[Event]:
        request = monitoring_pb2.ReadLogsRequest(
            job_id=self._job.id,
            epoch=self._epoch,
            offset=self._offset,
            limit_bytes=LOG_BYTES_PER_READ,
            node_rank=self._node_rank,
        )
        found = await read_logs(self._clients, request, self._actor)
        self._epoch = self._epoch or found.epoch
        self._complete = found.complete
        if not found.data:
            return []
        self._offset = found.offset + len(found.data)
        chunk = jobs.LogChunk(
            epoch=found.epoch,
            offset=found.offset,
            data_base64=base64.b64encode(found.data).decode(),
            next_offset=self._offset,
            complete=found.complete,
        )
        return [Event("log", f"{found.epoch}:{self._offset}", chunk)]

    def _moves_on(self, job: jobs_pb2.Job) -> bool:
        """Whether a later attempt has taken over; then its log is read next."""
        if self._one_attempt or not self._epoch or job.epoch <= self._epoch:
            return False
        if not (self._complete or self._nothing_more(job)):
            return False
        self._epoch += 1
        self._offset = 0
        return True

    def _nothing_more(self, job: jobs_pb2.Job) -> bool:
        """Whether the current attempt's log cannot grow any more although its end never arrived."""
        epoch = self._epoch or job.epoch
        attempt = next((a for a in job.attempts if (a.epoch, a.node_rank) == (epoch, self._node_rank)), None)
        if attempt is None:
            return is_terminal(job) or epoch < job.epoch
        if not is_terminal(attempt):
            return False
        lost = attempt.outcome == jobs_pb2.OUTCOME_LOST or not attempt.HasField("started_at")
        return lost or attempt.silent or self._clock.now() - convert.when(attempt.ended_at) > LOG_GRACE

    async def finished(self) -> jobs.StreamEnd | None:
        over = is_terminal(self._job) or (self._one_attempt and self._epoch > 0)
        if over and (self._complete or self._nothing_more(self._job)):
            return stream_end(self._job)
        return None


async def read_logs(
    clients: Clients, request: monitoring_pb2.ReadLogsRequest, actor: Actor | None = None
) -> monitoring_pb2.ReadLogsResponse:
    """A piece of a log; an attempt that has none yet answers an empty piece."""
    try:
        return await rpc.call(clients.monitoring.ReadLogs, request, actor=actor)
    except RemoteError as error:
        if error.remote_status is not ErrorStatus.NOT_FOUND:
            raise
        return monitoring_pb2.ReadLogsResponse(epoch=request.epoch, offset=request.offset)
