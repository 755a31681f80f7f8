"""Images on this machine: pulled with the job's own rights, kept up to a size; the longest unused go first.

Each job asks the registry again, also for an image that is already here: that another team could pull it yesterday does
not mean that this one may use it. Only names that the machine's owner has listed are used without a registry.
"""

import base64
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from dantegpu.daemon.executors.base import ExecutorError, ImageRequest, JobAtFault
from dantegpu.daemon.executors.container.engine import Engine, EngineError, Json
from dantegpu.daemon.executors.container.plan import ImageConfig
from dantegpu.domain.images import ImageReference
from dantegpu.domain.units import format_bytes

log = structlog.get_logger(__name__)

PROGRESS_SECONDS = 2.0
_NOT_FOUND_STATUS = 404
_REFUSALS = (
    "unauthorized", "denied", "authentication required", "no basic auth", "manifest unknown", "not found",
    "name unknown", "does not exist", "no such image", "invalid reference", "forbidden",
)  # fmt: skip
_NO_SPACE = "no space left"

type Progress = Callable[[str], None]


class ImageRefused(JobAtFault):
    """The registry does not have it, or not for this job: no other machine could pull it either."""


class PullFailed(ExecutorError):
    """The registry could not be reached, or the image not be stored: perhaps another machine can."""


@dataclass(slots=True)
class _Layers:
    """Progress of one pull. The engine tells each layer's bytes; the sum is what people want to see."""

    done: dict[str, int] = field(default_factory=dict[str, int])
    total: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, event: Json) -> None:
        detail: dict[str, Any] = event.get("progressDetail") or {}
        layer = str(event.get("id", ""))
        if event.get("status") == "Downloading" and detail.get("total"):
            self.done[layer], self.total[layer] = int(detail.get("current", 0)), int(detail["total"])
        elif event.get("status") in ("Download complete", "Pull complete") and layer in self.total:
            self.done[layer] = self.total[layer]

    def __str__(self) -> str:
        total = sum(self.total.values())
        return f"{format_bytes(sum(self.done.values()))} of {format_bytes(total)}" if total else "asking the registry"


class Images:
    """The engine's images as far as jobs use them. `record`: the file of what jobs brought, and of its last use."""

    def __init__(self, engine: Engine, record: Path, *, cache_bytes: int, local: Sequence[str] = ()) -> None:
        self._engine = engine
        self._record = record
        self._cache_bytes = cache_bytes
        self._local = tuple(local)
        self._using: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def ready(self, request: ImageRequest, progress: Progress) -> AsyncGenerator[ImageConfig]:
        """The image, kept from eviction until the end of the block. Raises ImageRefused, PullFailed."""
        reference = request.reference
        name = reference.pinned
        self._using[name] += 1
        try:
            found = await self._local_image(reference)
            if found is None:
                await self._pull(request, progress)
                found = await self._engine.image(name)
                if found is None:
                    raise PullFailed(f"the image {reference} was pulled and is not there")
                self._note(name, int(found.get("Size") or 0))
                await self.evict()
            yield ImageConfig.read(found)
        finally:
            self._using[name] -= 1

    async def _local_image(self, reference: ImageReference) -> Json | None:
        if not reference.matches(self._local):
            return None
        return await self._engine.image(reference.pinned)

    async def _pull(self, request: ImageRequest, progress: Progress) -> None:
        reference = request.reference
        layers = _Layers()
        told_at = 0.0
        try:
            async for event in self._engine.pull(reference.pinned, _auth(request)):
                if error := str(event.get("error") or ""):
                    raise _failure(reference, error)
                layers.add(event)
                if self._cache_bytes and sum(layers.total.values()) > self._cache_bytes:
                    raise PullFailed(f"the image {reference} is larger than this machine's whole cache of images")
                if time.monotonic() - told_at > PROGRESS_SECONDS:
                    told_at = time.monotonic()
                    progress(f"pulling {reference}: {layers}")
        except EngineError as error:
            raise _failure(reference, error.message, error.status) from error

    # --- the cache ----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, tuple[float, int]]:
        """Name -> (last use in wall-clock seconds, bytes)."""
        try:
            raw = json.loads(self._record.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return {name: (float(used_at), int(size)) for name, (used_at, size) in raw.items()}

    def _write(self, known: dict[str, tuple[float, int]]) -> None:
        fresh = self._record.with_name(f"{self._record.name}.new")
        fresh.write_text(json.dumps(known))
        fresh.rename(self._record)

    def _note(self, name: str, size_bytes: int) -> None:
        self._write({**self._read(), name: (time.time(), size_bytes)})

    async def evict(self) -> list[str]:
        """Remove what was unused for longest until the rest fits; what the owner pulled himself is never touched."""
        known = self._read()
        gone: list[str] = []
        for name in sorted(known, key=lambda name: known[name][0]):
            if not self._cache_bytes or sum(size for _, size in known.values()) <= self._cache_bytes:
                break
            if self._using[name] > 0 or not await self._engine.remove_image(name):
                continue
            del known[name]
            gone.append(name)
            log.info("image_evicted", image=name)
        if gone:
            self._write({name: entry for name, entry in self._read().items() if name not in gone})
        return gone


def _auth(request: ImageRequest) -> str:
    """Docker's header for one call. The engine neither logs nor stores it."""
    if not request.username and not request.password:
        return ""
    credentials = {
        "username": request.username, "password": request.password, "serveraddress": request.reference.registry
    }  # fmt: skip
    return base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()


def _failure(reference: ImageReference, said: str, status: int = 0) -> ExecutorError:
    text = said.strip().replace("\n", " ")[:500]
    if _NO_SPACE in text:
        return PullFailed(f"the machine's disk has no room for the image {reference}")
    if status == _NOT_FOUND_STATUS or any(word in text.lower() for word in _REFUSALS):
        return ImageRefused(
            f"the image {reference} could not be pulled: {text}. Is the name right, and is registry_auth given if the"
            " image is private?"
        )
    return PullFailed(f"the image {reference} could not be pulled: {text}")
