"""What several callers submit at about the same time: one transaction, each answered on its own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.idempotency import Keyed, once_each
from dantegpu.kit.rpc import serving
from dantegpu.services.scheduler.service.intake import Intake
from dantegpu.services.scheduler.store import JobRow

type Answer = jobs_pb2.SubmitJobsResponse | ServiceError


@dataclass(frozen=True, slots=True)
class Submission:
    """One caller's call, as it would have come alone."""

    actor: Actor
    request: jobs_pb2.SubmitJobsRequest
    traceparent: str
    request_id: str

    @property
    def scope(self) -> str:
        """Of its idempotency key."""
        return submit_scope(self.actor)

    @property
    def same_call(self) -> tuple[Actor, str, str]:
        """Submissions that are equal in this are written as one: without tracing, those of one caller."""
        return self.actor, self.traceparent, self.request_id if self.traceparent else ""


def submit_scope(actor: Actor) -> str:
    """Of the idempotency keys of one team's submissions."""
    return f"{actor.team_id}:SubmitJobs"


def needs_more_than_a_look(request: jobs_pb2.SubmitJobsRequest) -> bool:
    """Whether other services or the state of the machines decide if it is accepted: nobody shall wait for that."""
    return request.no_wait or any(spec.input_sha256 for spec in request.specs)


async def check_each(intake: Intake, submissions: Sequence[Submission]) -> dict[int, ServiceError]:
    """The refusals, by place."""
    refused: dict[int, ServiceError] = {}
    for place, submission in enumerate(submissions):
        try:
            await intake.check(submission.actor, submission.request.specs, no_wait=submission.request.no_wait)
        except ServiceError as error:
            refused[place] = error
    return refused


async def submit_each(
    tx: Tx,
    intake: Intake,
    submissions: Sequence[Submission],
    messages: Callable[[Sequence[JobRow]], list[jobs_pb2.Job]],
) -> list[Answer]:
    """Write what is new. The answers have no specs: they are remembered, and environments may hold secrets."""

    async def do(places: Sequence[int]) -> Sequence[jobs_pb2.SubmitJobsResponse]:
        rows: dict[int, list[JobRow]] = {}
        for group in _groups(submissions, places):
            one = submissions[group[0]]
            with serving("SubmitJobs", actor=one.actor, request_id=one.request_id, traceparent=one.traceparent):
                specs = [spec for place in group for spec in submissions[place].request.specs]
                written = iter(await intake.submit(tx, one.actor, specs))
            for place in group:
                rows[place] = [next(written) for _ in submissions[place].request.specs]
        return [jobs_pb2.SubmitJobsResponse(jobs=messages(rows[place])) for place in places]

    asked = [Keyed(each.scope, each.request.idempotency_key, each.request) for each in submissions]
    return await once_each(tx, asked, jobs_pb2.SubmitJobsResponse, do)


def _groups(submissions: Sequence[Submission], places: Sequence[int]) -> Iterator[list[int]]:
    for _, group in groupby(places, key=lambda place: submissions[place].same_call):
        yield list(group)
