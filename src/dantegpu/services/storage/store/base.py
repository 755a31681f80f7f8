"""What every object store can do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dantegpu.services.storage.errors import InvalidKey

KEY_BYTES_MAX = 1024
"""S3's own limit."""
PART_BYTES_MAX = 255
"""A file name's limit."""
PREFIXES = ("blobs", "results", "logs", "checkpoints", "benchmarks")

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Grant:
    """What one URL allows: one key, one method, until a time. `size_bytes` and `sha256` bind a PUT; `name` is a GET's
    download name."""

    method: str
    key: str
    expires_at_unix_s: int
    size_bytes: int = 0
    sha256: str = ""
    name: str = ""


class ObjectStore(Protocol):
    """Component. Keys are checked by `check_key`; an object is there whole or not at all.

    Everything may raise InvalidKey, DiskFull and Unavailable.
    """

    async def start(self) -> None: ...
    async def stop(self) -> None: ...

    async def ready(self) -> None:
        """Raises a ServiceError when objects cannot be stored at the moment."""
        ...

    async def sizes_bytes(self, keys: Sequence[str]) -> list[int | None]:
        """None for objects that are not there."""
        ...

    async def write(self, key: str, data: bytes) -> None:
        """Durable when it returns; replaces what was there."""
        ...

    async def read(self, key: str, offset: int, length: int) -> tuple[bytes, int] | None:
        """(at most `length` bytes from `offset`, size of the whole object); None when there is no such object."""
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Those that are not there are no error."""
        ...

    def url(self, grant: Grant) -> str:
        """A URL that allows what `grant` says to whoever has it."""
        ...


def check_key(key: str) -> str:
    """The key itself. Raises InvalidKey for anything that could leave its prefix."""
    parts = key.split("/")
    usable = (
        len(key.encode("utf-8", "replace")) <= KEY_BYTES_MAX
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
