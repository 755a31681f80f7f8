"""Places for attempts: numbered control groups with a cell in them, made ahead, used again, given back when idle."""

import asyncio
from collections import deque
from dataclasses import dataclass

from dantegpu.daemon.executors import cgroup
from dantegpu.daemon.executors.base import AttemptRefused
from dantegpu.daemon.executors.cells import Cell, Keeper
from dantegpu.kit.lifecycle import Tasks

SLOTS_MAX = 4096
SPARE_CELLS = 2
"""Kept ready when nothing runs."""
SPARE_AFTER_SECONDS = 0.2
"""Not at once: the attempt that has just started needs the processor more."""
IDLE_CELL_SECONDS = 30.0
"""Cells that a busy time has left are kept this long for the next one."""


@dataclass(slots=True)
class Slot:
    """Groups and a user, and the cell that lives there: for one attempt after the other."""

    number: int
    groups: cgroup.Cgroup
    cell: Cell
    limits: cgroup.Limits | None = None
    oom_kills: int = 0
    idle_since: float = 0.0


class Slots:
    """The places of one executor. `taken`: their numbers, also of what an earlier daemon has left running."""

    def __init__(self) -> None:
        self.taken: set[int] = set()
        self._tree = cgroup.CgroupTree()
        self._keeper = Keeper()
        self._idle: deque[Slot] = deque()
        self._trimming: asyncio.TimerHandle | None = None
        self._sparing: asyncio.TimerHandle | None = None
        self._tasks = Tasks("cells")
        self._open = False

    def open(self, tree: cgroup.CgroupTree) -> None:
        self._tree = tree
        self._open = True

    async def cell(self, groups: cgroup.Cgroup) -> Cell:
        """One more in those groups, for what an earlier daemon had prepared there. Raises SandboxFailed."""
        return await self._keeper.cell(groups.procs_files)

    async def _new(self) -> Slot:
        for number in range(SLOTS_MAX):
            if number in self.taken:
                continue
            groups = self._tree.group(f"slot-{number}")
            # A group that is there may still hold what a daemon before this one started.
            if groups.exists():
                continue
            self.taken.add(number)
            try:
                groups.create()
                return Slot(number, groups, await self.cell(groups))
            except BaseException:
                self.taken.discard(number)
                raise
        raise AttemptRefused(f"all {SLOTS_MAX} places for attempts are taken")

    async def take(self) -> Slot:
        """The one that was used last: its pages are the warmest."""
        while self._idle:
            slot = self._idle.pop()
            if slot.cell.alive:
                return slot
            await self._remove(slot)
        return await self._new()

    def release(self, slot: Slot) -> None:
        """Nothing of the attempt runs any more: its cell is free for the next one."""
        slot.idle_since = asyncio.get_running_loop().time()
        self._idle.append(slot)
        if self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(IDLE_CELL_SECONDS, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        loop = asyncio.get_running_loop()
        while len(self._idle) > SPARE_CELLS and self._idle[0].idle_since + IDLE_CELL_SECONDS <= loop.time():
            self._tasks.spawn(self._remove(self._idle.popleft()), "trim")
        if len(self._idle) > SPARE_CELLS:
            self._trimming = loop.call_at(self._idle[0].idle_since + IDLE_CELL_SECONDS, self._trim)

    async def _remove(self, slot: Slot) -> None:
        slot.cell.close()
        await slot.groups.remove()
        self.taken.discard(slot.number)

    def spare_soon(self) -> None:
        if self._sparing is None and len(self._idle) < SPARE_CELLS:
            self._sparing = asyncio.get_running_loop().call_later(SPARE_AFTER_SECONDS, self._spare)

    def _spare(self) -> None:
        self._sparing = None
        if len(self._idle) < SPARE_CELLS:
            self._tasks.spawn(self._make_spares(), "spare")

    async def _make_spares(self) -> None:
        while self._open and len(self._idle) < SPARE_CELLS:
            slot = await self._new()
            slot.idle_since = asyncio.get_running_loop().time()
            self._idle.appendleft(slot)

    async def close(self) -> None:
        """Idempotent. Cells in which something runs stay."""
        self._open = False
        for timer in (self._trimming, self._sparing):
            if timer is not None:
                timer.cancel()
        self._trimming = self._sparing = None
        await self._tasks.stop()
        while self._idle:
            await self._remove(self._idle.pop())
        self._keeper.close()
