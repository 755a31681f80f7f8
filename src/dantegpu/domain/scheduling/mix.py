"""The mix of requests that has arrived so far: what free capacity will most likely be asked for next."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from dantegpu.domain.resources import CapabilityRange, GpuRequest, ResourceRequest
from dantegpu.domain.units import MemoryRange

MEMORY_ARRIVALS = 20_000
"""Counts are halved whenever they add up to so many arrivals: an old workload fades out."""
MAX_SHAPES = 256
"""Rarer shapes are forgotten. A shape takes one column of every score, so this bounds time and memory."""
MAX_KEYS = 10_000
"""Requests whose shape is remembered, only to be quick."""
REFRESH_GROWTH = 1.5
"""Scores follow the mix when it has grown by this factor. Below it the weights hardly move."""

type ShapeKey = tuple[int, int, int, int, tuple[str, ...], MemoryRange | None, CapabilityRange | None]


@dataclass(frozen=True, slots=True)
class MixShape:
    """Requests that are alike to a machine. `weight` is the share of arrivals, scaled; all weights add up to 1."""

    cpu_milli: int
    memory_bytes: int
    gpu: GpuRequest
    weight: float


class RequestMix:
    """A decayed histogram over the shapes of GPU requests. It knows nothing but what was counted into it."""

    def __init__(self) -> None:
        self._counts: dict[ShapeKey, float] = {}
        self._gpus: dict[ShapeKey, GpuRequest] = {}
        self._keys: dict[ResourceRequest, ShapeKey] = {}
        self._total = 0.0
        self._due = 0.0

    def count(self, request: ResourceRequest, times: int = 1) -> None:
        """Count arrivals. Requests without GPUs are no part of the mix: nothing of a GPU is lost to them."""
        if request.gpu is None or times <= 0:
            return
        key = self._keys.get(request)
        if key is None:
            if len(self._keys) >= MAX_KEYS:
                self._keys.clear()
            key = self._keys[request] = _key(request, request.gpu)
        self._counts[key] = self._counts.get(key, 0.0) + times
        self._gpus.setdefault(key, request.gpu)
        self._total += times
        if len(self._counts) > 2 * MAX_SHAPES:
            self._forget()

    def fade(self) -> None:
        """Once after the arrivals of a moment have been counted."""
        if self._total >= MEMORY_ARRIVALS:
            self._counts = {key: count / 2 for key, count in self._counts.items()}
            self._total /= 2
            self._due = min(self._due, self._total * REFRESH_GROWTH)

    @property
    def stale(self) -> bool:
        """Has the mix grown enough since `shapes` was read last?"""
        return self._total > 0 and self._total >= self._due

    def shapes(self) -> list[MixShape]:
        """The mix now, in an order that does not depend on the order of arrival.

        A shape's weight is its count over the square root of its GPUs. As `copies` counts GPUs, a request for 8 still
        weighs nearly three times as much as one for 1. Requests for the same GPUs whose cores round to one power of two
        and whose memory to one of four are one shape with their mean: half the shapes, placements no worse.
        Chosen by measurement: docs/performance.md.
        """
        self._due = self._total * REFRESH_GROWTH
        self._forget()
        keys = sorted(self._counts, key=repr)
        weights = [self._counts[key] / (self._gpus[key].total_milli / 1000) ** 0.5 for key in keys]
        total = sum(weights)
        alike: dict[tuple[object, ...], list[tuple[ShapeKey, float]]] = {}
        for key, weight in zip(keys, weights, strict=True):
            size = round(log2(key[0])), round(log2(max(key[1], 1)) / 2)
            alike.setdefault((*size, *key[2:]), []).append((key, weight / total))
        return [self._mean(members) for members in alike.values()]

    def _mean(self, members: Sequence[tuple[ShapeKey, float]]) -> MixShape:
        weight = sum(weight for _, weight in members)
        cpu_milli = sum(key[0] * weight for key, weight in members) / weight
        memory_bytes = sum(key[1] * weight for key, weight in members) / weight
        return MixShape(round(cpu_milli), round(memory_bytes), self._gpus[members[0][0]], weight)

    def _forget(self) -> None:
        if len(self._counts) > MAX_SHAPES:
            kept = sorted(self._counts, key=lambda key: (-self._counts[key], repr(key)))[:MAX_SHAPES]
            self._counts = {key: self._counts[key] for key in kept}
            self._gpus = {key: self._gpus[key] for key in kept}
            self._keys.clear()
            self._total = sum(self._counts.values())


def _key(request: ResourceRequest, gpu: GpuRequest) -> ShapeKey:
    names = tuple(sorted(gpu.names))
    return (
        request.cpu_milli,
        request.memory_bytes,
        gpu.count_min,
        gpu.milli,
        names,
        gpu.vram,
        gpu.compute_capability,
    )
