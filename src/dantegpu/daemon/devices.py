"""Which of this machine's GPUs may be leased now, and why not the others.

A device is taken out when its driver reports a fault, when somebody who is no job uses it, when an ended attempt has
left memory behind on it, or when what was in that memory could not be overwritten. The inventory says so, the scheduler
places nothing there, and it comes back by itself.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

import structlog

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.probe.devices import Gpu, GpuSample
from dantegpu.daemon.scrub import HeldFile, Scrubber
from dantegpu.domain.units import MILLI_PER_UNIT, format_bytes

log = structlog.get_logger(__name__)

VRAM_TOLERANCE_BYTES = 128 << 20
"""What drivers take and give back by themselves."""
COOLED_DOWN_CELSIUS = 5.0
FREED_TIMEOUT_SECONDS = 5.0
FREED_POLL_SECONDS = 0.05

type Sampler = Callable[[], Awaitable[Sequence[GpuSample]]]


class DeviceWatch:
    """Samples of the machine's GPUs, folded."""

    def __init__(
        self,
        sample: Sampler,
        gpus: Iterable[Gpu],
        held: HeldFile,
        scrubber: Scrubber,
        *,
        shares: bool = False,
        max_celsius: float = 0.0,
    ) -> None:
        self.on_change: list[Callable[[], None]] = []
        """Called when a device was taken out or came back."""
        self._sample = sample
        self._gpus = {gpu.index: gpu for gpu in gpus}
        self._held = held
        self._scrubber = scrubber
        self._idle_vram_bytes: dict[int, int] = {}
        """What each device used when no attempt was on it."""
        known = held.read()
        self._holders: dict[int, dict[str, str]] = {index: known.get(gpu.uuid, {}) for index, gpu in self._gpus.items()}
        """Device -> attempts on it, and their teams."""
        self._unclean: dict[int, str] = {index: "" for index, gpu in self._gpus.items() if gpu.uuid in known}
        """Device whose memory may hold what a job left -> why it could not be cleared; empty: it was not tried yet."""
        self._shares = shares
        self._max_celsius = max_celsius
        self._left_behind: set[int] = set()
        self._strangers: dict[int, frozenset[int]] = {}
        self._problems: dict[int, str] = {}

    @property
    def pids(self) -> set[int]:
        """Processes that clear memory at this moment."""
        return self._scrubber.pids

    @property
    def problems(self) -> Mapping[int, str]:
        """Device -> why nothing may be placed on it. A device that is well is not in it."""
        return self._problems

    def refusal(self, leases: Iterable[machine_pb2.DeviceLease], team: str) -> str:
        """Why a team's attempt may not start on these devices; empty when it may.

        The scheduler keeps to all of this; a machine does not have to take its word for it.
        """
        for lease in leases:
            if problem := self._problems.get(lease.index):
                return f"GPU {lease.index} {problem}"
            if 0 < lease.milli < MILLI_PER_UNIT and not self._shares:
                return f"GPU {lease.index} is leased as a whole only"
            if any(other != team for other in self._holders.get(lease.index, {}).values()):
                return f"GPU {lease.index} is in use by another team"
        return ""

    def held(self, attempt: str, team: str, indexes: Iterable[int]) -> None:
        """An attempt is about to use these devices. Written down before it does."""
        real = False
        for index in indexes:
            self._holders.setdefault(index, {})[attempt] = team
            if index in self._gpus and self._gpus[index].uuid:
                self._unclean[index] = ""
                real = True
        if real:
            self._write()

    def only(self, live: Collection[str]) -> None:
        """After a restart: of the attempts that were on devices, these are still there."""
        for holders in self._holders.values():
            for attempt in [attempt for attempt in holders if attempt not in live]:
                del holders[attempt]

    async def released(self, attempt: str) -> None:
        """The attempt has ended: wait until its memory is free, and clear it. Else the device is withheld.

        Called before the end is reported, because the scheduler may lease the device again from then on.
        """
        indexes = [index for index, holders in self._holders.items() if attempt in holders]
        alone = [index for index in indexes if self._holders[index].keys() == {attempt}]
        try:
            if alone:
                await self._until_free(alone)
            for index in alone:
                if index in self._unclean and index not in self._left_behind:
                    await self._clear(index)
        finally:
            for index in indexes:
                self._holders[index].pop(attempt, None)
        if self._unclean.keys() & set(alone):
            await self._judge_anew()

    async def clean(self) -> None:
        """Clear what is not clean and held by nobody: what could not be cleared before, or a daemon left that died."""
        waiting = [index for index in self._unclean if not self._holders[index] and index not in self._left_behind]
        for index in waiting:
            if not self._holders[index] and not self._strangers.get(index):
                await self._clear(index)
        if waiting:
            await self._judge_anew()

    async def _clear(self, index: int) -> None:
        gpu = self._gpus[index]
        why = await self._scrubber.scrub(gpu.uuid, gpu.vendor)
        if why:
            log.warning("gpu_memory_not_cleared", index=index, why=why)
            self._unclean[index] = why
        else:
            self._unclean.pop(index, None)
            self._write()

    def _write(self) -> None:
        self._held.write({self._gpus[index].uuid: self._holders[index] for index in self._unclean})

    async def _judge_anew(self) -> None:
        self._judge({sample.index: sample for sample in await self._sample()})

    async def _until_free(self, indexes: Sequence[int]) -> None:
        deadline = asyncio.get_running_loop().time() + FREED_TIMEOUT_SECONDS
        while True:
            samples = {sample.index: sample for sample in await self._sample()}
            full = {index for index in indexes if index in samples and self._is_full(samples[index])}
            if not full or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(FREED_POLL_SECONDS)
        for index in full:
            log.warning("gpu_memory_not_freed", index=index, vram_used_bytes=samples[index].vram_used_bytes)
            self._left_behind.add(index)
        if full:
            self._judge(samples)

    def _is_full(self, sample: GpuSample) -> bool:
        idle_bytes = self._idle_vram_bytes.get(sample.index, sample.vram_used_bytes)
        return sample.vram_used_bytes > idle_bytes + VRAM_TOLERANCE_BYTES

    def look(self, samples: Sequence[GpuSample], own: Collection[int] | None) -> None:
        """Fold a sample. `own`: processes of the attempts that live; None: somebody cannot tell its own."""
        for sample in samples:
            if not sample.problem and not self._holders.get(sample.index):
                if sample.index in self._left_behind and not self._is_full(sample):
                    self._left_behind.discard(sample.index)
                if sample.index not in self._left_behind:
                    self._idle_vram_bytes[sample.index] = self._idle(sample)
            self._note_strangers(sample, own)
        self._judge({sample.index: sample for sample in samples})

    def _idle(self, sample: GpuSample) -> int:
        # A stranger's memory is not what the device uses at rest: the next look without him counts.
        known = self._idle_vram_bytes.get(sample.index)
        return known if sample.pids and known is not None else sample.vram_used_bytes

    def _note_strangers(self, sample: GpuSample, own: Collection[int] | None) -> None:
        if own is None and self._holders.get(sample.index):
            self._strangers.pop(sample.index, None)
            return
        # The driver names a process for a moment longer than it lives.
        self._strangers[sample.index] = frozenset(pid for pid in sample.pids - set(own or ()) if _lives(pid))

    def _judge(self, samples: Mapping[int, GpuSample]) -> None:
        problems = {index: problem for index in self._holders if (problem := self._problem(samples.get(index)))}
        if problems != self._problems:
            for index in problems.keys() | self._problems.keys():
                if problems.get(index) != self._problems.get(index):
                    log.warning("gpu_health_changed", index=index, problem=problems.get(index, ""))
            self._problems = problems
            for told in self.on_change:
                told()

    def _too_hot(self, sample: GpuSample) -> str:
        # Once taken out, it has to cool down by a few degrees: else it would come and go with each job.
        was_hot = "too hot" in self._problems.get(sample.index, "")
        limit = self._max_celsius - (COOLED_DOWN_CELSIUS if was_hot else 0)
        if not self._max_celsius or sample.temperature_celsius <= limit:
            return ""
        return f"is too hot: over the {self._max_celsius:.0f} °C that its owner allows"

    def _problem(self, sample: GpuSample | None) -> str:
        if sample is None:
            return ""  # simulated ones, and drivers that have nothing to say
        if sample.problem:
            return sample.problem
        if problem := self._too_hot(sample):
            return problem
        if sample.index in self._left_behind:
            left_bytes = sample.vram_used_bytes - self._idle_vram_bytes.get(sample.index, 0)
            return f"is withheld: {format_bytes(left_bytes)} of its memory were not freed by the last job"
        if sample.index in self._unclean and not self._holders.get(sample.index):
            why = self._unclean[sample.index] or "that is still to be done"
            return f"is withheld: its memory was not cleared after the last job: {why}"
        if strangers := self._strangers.get(sample.index):
            return f"is used by {len(strangers)} processes of the machine itself"
        return ""


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
