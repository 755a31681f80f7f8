"""Blobs of teams, results and logs of jobs: who may move which bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import TeamId
from dantegpu.kit.actor import Actor
from dantegpu.kit.errors import InvalidArgument
from dantegpu.services.storage.errors import TooLarge
from dantegpu.services.storage.settings import StorageSettings
from dantegpu.services.storage.store.base import Grant, ObjectStore, check_key, is_sha256

MAX_ITEMS = 10_000
MAX_READ_BYTES = 16 << 20
MAX_WRITE_BYTES = 16 << 20
"""Of one internal call; both stay below the largest gRPC message."""
MAX_NAME_LENGTH = 255
DELETABLE = "checkpoints/"


@dataclass(frozen=True, slots=True)
class Upload:
    """`url` is empty when the team has the blob already."""

    sha256: str
    url: str


class StorageService:
    """Who may move which bytes, and by which URL."""

    def __init__(self, store: ObjectStore, clock: Clock, settings: StorageSettings) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings

    async def prepare_uploads(self, actor: Actor, blobs: Sequence[tuple[str, int]]) -> list[Upload]:
        """For each (SHA-256, size): a URL to PUT it, or nothing to do. Raises InvalidArgument, TooLarge."""
        team_id = actor.require_writer()
        _bounded(len(blobs))
        for sha256, size_bytes in blobs:
            if not is_sha256(sha256) or size_bytes < 0:
                raise InvalidArgument("each blob needs its SHA-256 (64 hex digits, lower case) and its size in bytes")
            if size_bytes > self._settings.blob_bytes_max:
                raise TooLarge(
                    f"{size_bytes} bytes in one upload; at most {self._settings.blob_bytes_max} are accepted"
                )
        sizes = await self.stat([_blob_key(team_id, sha256) for sha256, _ in blobs])
        return [
            Upload(sha256, "" if known == size_bytes else self._put_url(_blob_key(team_id, sha256), size_bytes, sha256))
            for (sha256, size_bytes), known in zip(blobs, sizes, strict=True)
        ]

    async def stat_blobs(self, team_id: TeamId, sha256s: Sequence[str]) -> list[int | None]:
        """Sizes of the team's blobs; None for those that it does not have."""
        if not all(is_sha256(sha256) for sha256 in sha256s):
            raise InvalidArgument("a SHA-256 is 64 hex digits, lower case")
        return await self.stat([_blob_key(team_id, sha256) for sha256 in sha256s])

    async def stat(self, keys: Sequence[str]) -> list[int | None]:
        """Sizes of objects; None for those that are not there. Raises InvalidKey."""
        _bounded(len(keys))
        return await self._store.sizes_bytes(keys)

    def get_url(self, key: str, name: str) -> str:
        return self._url(Grant("GET", check_key(key), self._expiry(), name=name[:MAX_NAME_LENGTH]))

    def put_url(self, key: str, size_bytes: int, sha256: str) -> str:
        """Raises InvalidKey, InvalidArgument, TooLarge."""
        if not is_sha256(sha256) or size_bytes < 0:
            raise InvalidArgument("a PUT URL needs the content's SHA-256 and size")
        if size_bytes > self._settings.result_bytes_max:
            raise TooLarge(f"{size_bytes} bytes in one file; at most {self._settings.result_bytes_max} are accepted")
        return self._put_url(check_key(key), size_bytes, sha256)

    def _put_url(self, key: str, size_bytes: int, sha256: str) -> str:
        return self._url(Grant("PUT", key, self._expiry(), size_bytes, sha256))

    def _url(self, grant: Grant) -> str:
        return self._store.url(grant)

    def _expiry(self) -> int:
        return int(self._clock.now().timestamp()) + self._settings.url_seconds

    async def put(self, key: str, data: bytes) -> None:
        """Raises InvalidKey, TooLarge, DiskFull."""
        if len(data) > MAX_WRITE_BYTES:
            raise TooLarge(f"{len(data)} bytes in one call; at most {MAX_WRITE_BYTES}, larger objects go by URL")
        await self._store.write(key, data)

    async def get(self, key: str, offset: int, length: int) -> tuple[bytes, int | None]:
        """(bytes, size of the whole object or None). Raises InvalidKey, InvalidArgument."""
        if offset < 0 or length < 0:
            raise InvalidArgument("offset and length are not negative")
        found = await self._store.read(key, offset, min(length or MAX_READ_BYTES, MAX_READ_BYTES))
        return found or (b"", None)

    async def delete(self, keys: Sequence[str]) -> None:
        """Idempotent. Only what the platform itself made and can do without: checkpoints. Raises InvalidArgument."""
        _bounded(len(keys))
        if kept := [key for key in keys if not check_key(key).startswith(DELETABLE)]:
            raise InvalidArgument(f"{kept[0][:200]!r} is not deleted; only what lies below {DELETABLE} is")
        await self._store.delete(keys)


def _blob_key(team_id: TeamId, sha256: str) -> str:
    return f"blobs/{team_id}/{sha256}"


def _bounded(count: int) -> None:
    if count > MAX_ITEMS:
        raise InvalidArgument(f"{count} items in one call; at most {MAX_ITEMS}")
