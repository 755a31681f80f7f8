"""The embedded object store: a folder. An object is there whole or not at all."""

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Generator
from pathlib import Path

from dantegpu.services.storage.errors import DigestMismatch, DiskFull, InvalidKey, TooLarge

KEY_LENGTH_MAX = 1300
PART_BYTES_MAX = 250
PREFIXES = ("blobs", "results", "logs")
READ_CHUNK_BYTES = 256 << 10

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def check_key(key: str) -> str:
    """The key itself. Raises InvalidKey for anything that could leave its prefix."""
    parts = key.split("/")
    usable = (
        len(key) <= KEY_LENGTH_MAX
        and len(parts) >= 3
        and parts[0] in PREFIXES
        and key.isprintable()
        and all(part not in ("", ".", "..") and len(part.encode()) <= PART_BYTES_MAX for part in parts)
    )
    if not usable:
        raise InvalidKey(f"object key {key[:200]!r}: expected a plain path below {', '.join(PREFIXES)}")
    return key


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


class EmbeddedStore:
    """Component. Objects are files below `root/objects`; what is being written lies in `root/incoming`."""

    def __init__(self, root: Path, free_bytes_min: int) -> None:
        self._objects = root / "objects"
        self._incoming = root / "incoming"
        self._free_bytes_min = free_bytes_min

    async def start(self) -> None:
        for folder in (self._objects, self._incoming):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():  # of uploads that a crash cut off
            leftover.unlink(missing_ok=True)

    async def stop(self) -> None:
        pass

    def path(self, key: str) -> Path:
        """Where the object lies, if it is there. Raises InvalidKey."""
        return self._objects / check_key(key)

    def size_bytes(self, key: str) -> int | None:
        """None when there is no such object."""
        path = self.path(key)
        return path.stat().st_size if path.is_file() else None

    def read(self, key: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`; empty when there is no such object or no more of it."""
        try:
            with self.path(key).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return b""

    async def write(self, key: str, data: bytes) -> None:
        """Raises InvalidKey, DiskFull."""

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
        try:
            with _disk_errors():
                await self._receive(incoming, chunks, size_bytes, sha256)
                await asyncio.to_thread(_publish, incoming, target)
        finally:
            incoming.unlink(missing_ok=True)

    async def _receive(self, incoming: Path, chunks: AsyncIterator[bytes], size_bytes: int, sha256: str) -> None:
        digest = hashlib.sha256()
        received = 0
        with incoming.open("xb", buffering=0) as file:
            os.chmod(file.fileno(), 0o600)
            async for chunk in chunks:
                received += len(chunk)
                if received > size_bytes:
                    raise TooLarge(f"more than the announced {size_bytes} bytes arrived; nothing was stored")
                digest.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
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


def _publish(incoming: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.replace(incoming, target)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)  # else a power cut could forget the name of what we are about to acknowledge
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
