"""The embedded object store: a folder. An object is there whole or not at all."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Generator, Sequence
from pathlib import Path
from typing import IO

import structlog
from pydantic import SecretBytes

from dantegpu.services.storage.errors import DigestMismatch, DiskFull, InvalidKey, TooLarge
from dantegpu.services.storage.signing import signed_url
from dantegpu.services.storage.store.base import Grant, check_key

WRITE_BYTES = 1 << 20
"""Collected before a thread hashes and writes them, so that the event loop never does."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)

log = structlog.get_logger(__name__)


class EmbeddedStore:
    """Component. Objects are files below `root/objects`; what is being written lies in `root/incoming`."""

    def __init__(self, root: Path, free_bytes_min: int, public_url: str, url_key: SecretBytes) -> None:
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        self._free_bytes_min = free_bytes_min
        self._public_url = public_url
        self._url_key = url_key

    async def start(self) -> None:
        await asyncio.to_thread(self._prepare)

    def _prepare(self) -> None:
        for folder in (self._objects, self._incoming):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            _remove_unless_locked(leftover)

    async def stop(self) -> None:
        pass

    async def ready(self) -> None:
        await asyncio.to_thread(self._require_room, 0)

    def url(self, grant: Grant) -> str:
        return signed_url(self._public_url, grant, self._url_key)

    def path(self, key: str) -> Path:
        """Where the object lies, if it is there. Raises InvalidKey."""
        return self._objects / check_key(key)

    def open(self, key: str) -> tuple[IO[bytes], int] | None:
        """The object as it is now (another upload replaces it without touching this file), and its size."""
        try:
            file = self.path(key).open("rb")
        except _ABSENT:
            return None
        return file, os.fstat(file.fileno()).st_size

    async def sizes_bytes(self, keys: Sequence[str]) -> list[int | None]:
        return await asyncio.to_thread(lambda: [self._size_bytes(key) for key in keys])

    def _size_bytes(self, key: str) -> int | None:
        path = self.path(key)
        try:
            return path.stat().st_size if path.is_file() else None
        except _ABSENT:
            return None

    async def read(self, key: str, offset: int, length: int) -> tuple[bytes, int] | None:
        return await asyncio.to_thread(self._read, key, offset, length)

    def _read(self, key: str, offset: int, length: int) -> tuple[bytes, int] | None:
        opened = self.open(key)
        if opened is None:
            return None
        file, size_bytes = opened
        with file:
            file.seek(min(offset, size_bytes))
            return file.read(length), size_bytes

    async def delete(self, keys: Sequence[str]) -> None:
        await asyncio.to_thread(self._delete, keys)

    def _delete(self, keys: Sequence[str]) -> None:
        folders: set[Path] = set()
        for key in keys:
            path = self.path(key)
            with contextlib.suppress(*_ABSENT):
                path.unlink()
            folders |= {folder for folder in path.parents if self._objects in folder.parents}
        # The deepest first; one that holds something else stays.
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()

    async def write(self, key: str, data: bytes) -> None:
        async def once() -> AsyncIterator[bytes]:
            yield data

        await self.receive(key, once(), len(data), hashlib.sha256(data).hexdigest())

    async def receive(self, key: str, chunks: AsyncIterator[bytes], size_bytes: int, sha256: str) -> None:
        """Store a stream under `key` once all of it has arrived and is what was announced.

        Raises DigestMismatch (cut off, or other content), TooLarge, DiskFull, InvalidKey. Then nothing is visible.
        """
        target = self.path(key)
        self._require_room(size_bytes)
        incoming = self._incoming / secrets.token_hex(16)
        with _disk_errors(), incoming.open("xb", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.chmod(file.fileno(), 0o600)
                await self._receive(file, chunks, size_bytes, sha256)
                await asyncio.to_thread(_publish, incoming, target)
            finally:
                incoming.unlink(missing_ok=True)

    async def _receive(self, file: IO[bytes], chunks: AsyncIterator[bytes], size_bytes: int, sha256: str) -> None:
        digest = hashlib.sha256()
        received = 0
        buffer = bytearray()

        def write_out() -> None:
            digest.update(buffer)
            with memoryview(buffer) as whole:
                done = 0
                while done < len(whole):
                    done += file.write(whole[done:])
            buffer.clear()

        async for chunk in chunks:
            received += len(chunk)
            if received > size_bytes:
                raise TooLarge(f"more than the announced {size_bytes} bytes arrived; nothing was stored")
            buffer += chunk
            if len(buffer) >= WRITE_BYTES:
                await asyncio.to_thread(write_out)
        await asyncio.to_thread(write_out)
        if received != size_bytes:
            raise DigestMismatch(f"the upload was cut off: {received} of {size_bytes} bytes; send it again")
        if digest.hexdigest() != sha256:
            raise DigestMismatch(f"the content's SHA-256 is {digest.hexdigest()}, announced was {sha256}")
        await asyncio.to_thread(os.fsync, file.fileno())

    def _require_room(self, size_bytes: int) -> None:
        free = shutil.disk_usage(self._incoming).free
        if free - size_bytes < self._free_bytes_min:
            raise DiskFull(
                f"the platform's disk is full: {free} bytes free, {size_bytes} asked for; nothing was stored. "
                "The operator has to free space",
                retry_after="60",
            )


def _remove_unless_locked(leftover: Path) -> None:
    """Remove what a crash left of an upload. An upload that still goes on, in another process, holds its lock."""
    try:
        with leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return
    log.info("upload_leftover_removed", name=leftover.name)


def _publish(incoming: Path, target: Path) -> None:
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.replace(incoming, target)
    # Else a power cut could forget the name, or a folder, of what we are about to acknowledge.
    for folder in {target.parent, *(folder.parent for folder in missing)}:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _disk_errors() -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull("the platform's disk is full; nothing was stored", retry_after="60") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise InvalidKey("a file and a folder cannot have the same name") from error
        raise
