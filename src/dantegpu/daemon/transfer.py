"""A job's input comes and its results go by presigned URLs; every byte is checked against its hash."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.daemon.workspace import OutputFile, open_output

CHUNK_BYTES = 1 << 20
PARALLEL_UPLOADS = 4
TRIES = 5
FIRST_PAUSE_SECONDS = 0.2
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)


class TransferFailed(Exception):
    """A transfer did not work after several tries: the network's or the store's fault, not the job's."""


class TransferRefused(TransferFailed):
    """The store says no for good: trying again would not help."""


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A result, with what it contains."""

    file: OutputFile
    sha256: str

    def to_proto(self) -> jobs_pb2.ResultFile:
        return jobs_pb2.ResultFile(path=self.file.path, size_bytes=self.file.size_bytes, sha256=self.sha256)


class Transfers:
    """HTTP clients for all attempts, one per scheme, made when first needed: an idle daemon has none."""

    def __init__(self) -> None:
        self._clients: dict[bool, httpx.AsyncClient] = {}
        self._uploads = asyncio.Semaphore(PARALLEL_UPLOADS)

    def _http(self, url: str) -> httpx.AsyncClient:
        # Without TLS there is nothing to verify; reading all authorities' certificates would cost 10 MB.
        verify = not url.startswith("http://")
        client = self._clients.get(verify)
        if client is None:
            limits = httpx.Limits(max_connections=2 * PARALLEL_UPLOADS, keepalive_expiry=30)
            client = httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, follow_redirects=False, verify=verify)
            self._clients[verify] = client
        return client

    async def close(self) -> None:
        while self._clients:
            await self._clients.popitem()[1].aclose()

    async def fetch(self, url: str, target: Path, *, sha256: str, size_bytes: int, what: str = "input") -> None:
        """Download to `target`. Raises TransferFailed when the content is not what `sha256` says."""
        for number in range(TRIES):
            try:
                await self._fetch_once(url, target, sha256=sha256, size_bytes=size_bytes)
            except TransferRefused:
                raise
            except (httpx.HTTPError, TransferFailed) as error:
                if number == TRIES - 1:
                    raise TransferFailed(f"the job's {what} could not be fetched: {_said(error)}") from error
                await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**number)
            else:
                return

    async def _fetch_once(self, url: str, target: Path, *, sha256: str, size_bytes: int) -> None:
        digest = hashlib.sha256()
        got_bytes = 0
        async with self._http(url).stream("GET", url) as response:
            _check(response)
            with target.open("wb") as file:
                async for chunk in response.aiter_raw(CHUNK_BYTES):
                    got_bytes += len(chunk)
                    if size_bytes and got_bytes > size_bytes:
                        raise TransferFailed(f"the store sends more than the {size_bytes} bytes that were promised")
                    digest.update(chunk)
                    file.write(chunk)
        if digest.hexdigest() != sha256:
            raise TransferFailed(f"the content has the hash {digest.hexdigest()}, expected {sha256}")

    async def send(self, output: Path, files: Sequence[HashedFile], urls: Sequence[str]) -> None:
        """Upload all `files`, a few at a time, each to its URL. Raises TransferFailed."""
        try:
            async with asyncio.TaskGroup() as group:
                for file, url in zip(files, urls, strict=True):
                    group.create_task(self._send(output, file, url))
        except* TransferFailed as errors:
            raise TransferFailed(str(errors.exceptions[0])) from errors

    async def _send(self, output: Path, file: HashedFile, url: str) -> None:
        async with self._uploads:
            for number in range(TRIES):
                try:
                    headers = {"content-length": str(file.file.size_bytes)}
                    response = await self._http(url).put(url, content=_read(output, file.file), headers=headers)
                    _check(response)
                except TransferRefused:
                    raise
                except (httpx.HTTPError, TransferFailed) as error:
                    if number == TRIES - 1:
                        raise TransferFailed(f"{file.file.path} could not be uploaded: {_said(error)}") from error
                    await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**number)
                else:
                    return


def _said(error: Exception) -> str:
    """Some of httpx's errors have no text."""
    return str(error) or type(error).__name__


def _check(response: httpx.Response) -> None:
    if response.status_code in (408, 425, 429) or response.status_code >= 500:
        raise TransferFailed(f"the store answered {response.status_code}")
    if response.status_code >= 300:
        raise TransferRefused(f"the store answered {response.status_code}")


async def _read(output: Path, file: OutputFile) -> AsyncIterator[bytes]:
    descriptor = open_output(output, file.path)
    try:
        while chunk := await asyncio.to_thread(os.read, descriptor, CHUNK_BYTES):
            yield chunk
    finally:
        os.close(descriptor)


def hash_files(output: Path, files: Sequence[OutputFile]) -> list[HashedFile]:
    """Blocking: call it in a thread."""
    return [HashedFile(file, _hash(output, file)) for file in files]


def _hash(output: Path, file: OutputFile) -> str:
    with os.fdopen(open_output(output, file.path), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
