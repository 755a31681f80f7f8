"""Sending packed working directories, content-addressed: what the platform has is not sent again."""

import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx

from dantegpu.contracts.rest.spec import JobInput
from dantegpu.contracts.rest.storage import BlobWant, PrepareUploads, Uploads
from dantegpu.sdk._async.transport import AsyncTransport
from dantegpu.sdk.errors import TransferProblem
from dantegpu.sdk.protocol import CHUNK_SIZE_BYTES, OnProgress, no_progress


class AsyncUploadsApi:
    """`client.uploads`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def put(self, source: Path | bytes, *, on_progress: OnProgress = no_progress) -> JobInput:
        """Make the platform have these bytes; the answer is what a job's `input` says.

        Raises TransferProblem when storage refuses them.
        """
        digest, size_bytes = _digest(source)
        wanted = PrepareUploads(blobs=[BlobWant(sha256=digest, size_bytes=size_bytes)])
        retries = self._transport.new_retries()
        while True:
            answer = await self._transport.call(Uploads, "POST", "/v1/uploads", body=wanted)
            upload = answer.uploads[0]
            if upload.exists:
                on_progress(size_bytes, size_bytes)
                return JobInput(sha256=digest, size_bytes=size_bytes)
            if not upload.url:
                raise TransferProblem("the platform wants the upload, but says no address for it")
            try:
                await self._transport.put_bytes(upload.url, _chunks(source, size_bytes, on_progress), size_bytes)
            except httpx.TransportError as error:
                # It may have arrived all the same: the next answer says `exists` then.
                await self._transport.pause_or_raise(retries, error)
                continue
            return JobInput(sha256=digest, size_bytes=size_bytes)


def _digest(source: Path | bytes) -> tuple[str, int]:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest(), len(source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


async def _chunks(source: Path | bytes, size_bytes: int, on_progress: OnProgress) -> AsyncGenerator[bytes]:
    done_bytes = 0
    if isinstance(source, bytes):
        for start in range(0, size_bytes, CHUNK_SIZE_BYTES):
            yield source[start : start + CHUNK_SIZE_BYTES]
            on_progress(min(start + CHUNK_SIZE_BYTES, size_bytes), size_bytes)
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_SIZE_BYTES):
            yield chunk
            done_bytes += len(chunk)
            on_progress(done_bytes, size_bytes)
