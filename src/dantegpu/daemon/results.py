"""What an attempt leaves goes to the platform's store, by URLs that the platform signs for it."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import structlog

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon.endings import Ended
from dantegpu.daemon.transfer import HashedFile, TransferFailed, Transfers, hash_files
from dantegpu.daemon.workspace import ResultsTooLarge, output_files
from dantegpu.kit.errors import ServiceError

log = structlog.get_logger(__name__)

MAX_RESULT_FILES = 10_000
URLS_PER_REQUEST = 500
URL_TRIES = 10

type Urls = Callable[[machine_pb2.UrlsRequest], Awaitable[machine_pb2.UrlsReply]]


class Platform(Protocol):
    """What an attempt asks of the platform while it runs."""

    async def urls(self, request: machine_pb2.UrlsRequest) -> machine_pb2.UrlsReply: ...


async def ask_urls(platform: Platform, request: machine_pb2.UrlsRequest) -> machine_pb2.UrlsReply:
    """Presigned URLs; a platform that does not answer is asked again, as long as the lease may hold. Raises Ended."""
    pause_seconds = 0.1
    for _ in range(URL_TRIES):
        try:
            reply = await platform.urls(request)
        except ServiceError as error:
            log.info("no_urls_yet", attempt_id=request.attempt_id, error=str(error))
        else:
            if reply.error == "stale":
                raise Ended(jobs_pb2.OUTCOME_LOST, "the platform says that this attempt is over")
            if reply.error.startswith("refused"):
                raise Ended(jobs_pb2.OUTCOME_FAILED, reply.error)
            if not reply.error:
                return reply
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(5.0, pause_seconds * 2)
    raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, "the platform gave no URLs for the transfer")


async def upload(output: Path, max_bytes: int, urls: Urls, transfers: Transfers) -> list[HashedFile]:
    """Send everything that the job left. Raises Ended."""
    if not any(os.scandir(output)):
        return []
    try:
        found = await asyncio.to_thread(output_files, output, max_files=MAX_RESULT_FILES, max_bytes=max_bytes)
    except ResultsTooLarge as error:
        raise Ended(jobs_pb2.OUTCOME_FAILED, f"the results were not kept: {error}") from error
    hashed = await asyncio.to_thread(hash_files, output, found)
    for first in range(0, len(hashed), URLS_PER_REQUEST):
        part = hashed[first : first + URLS_PER_REQUEST]
        reply = await urls(machine_pb2.UrlsRequest(results=[result.to_proto() for result in part]))
        try:
            await transfers.send(output, part, reply.result_urls)
        except TransferFailed as error:
            raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, str(error)) from error
    return hashed
