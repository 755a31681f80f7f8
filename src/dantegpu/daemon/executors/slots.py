"""Places for attempts: numbered control groups with a cell in them, made ahead, used again, given back when idle."""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dantegpu.daemon.executors import cgroup
from dantegpu.daemon.executors.base import AttemptRefused
from dantegpu.daemon.executors.cells import Cell, Keeper
from dantegpu.daemon.workspace import AttemptFolder
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
    parked: "Parked | None" = None

    def claim(self, folder: AttemptFolder) -> bool:
        """It has become this folder's. Whether a sandbox waits for that in its cell."""
        parked, self.parked = self.parked, None
        if parked is None or parked.inode == inode_of(folder):
            return parked is not None
        # Its cell ends the sandbox when it gets the attempt, which has nothing to say to that.
        parked.folder.unpark()
        return False


@dataclass(frozen=True, slots=True)
class Parked:
    """A sandbox that waits in a slot's cell, and the folder that it shows, wherever that is moved to."""

    folder: AttemptFolder
    inode: int

    @classmethod
    def of(cls, folder: AttemptFolder) -> "Parked":
        return cls(folder, inode_of(folder))


def inode_of(folder: AttemptFolder) -> int:
    """What names a folder that is moved."""
    return os.stat(folder.root).st_ino


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
        self._park: Callable[[Slot], Parked | None] | None = None

    def open(self, tree: cgroup.CgroupTree) -> None:
        self._tree = tree
        self._open = True

    def need_mounts(self, paths: Sequence[str]) -> None:
        """All cells from now on are for sandboxes, which show nothing of the machine but this."""
        self._keeper.needed_mounts = paths

    def park_with(self, park: "Callable[[Slot], Parked | None]") -> None:
        """Idle slots are to have a sandbox waiting in them, which `park` makes."""
        self._park = park

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
                # Also when the daemon stops right now: nobody else would take them away.
                await groups.remove()
                self.taken.discard(number)
                raise
        raise AttemptRefused(f"all {SLOTS_MAX} places for attempts are taken")

    async def take(self, folder: AttemptFolder) -> Slot:
        """The one whose sandbox waits for this folder; else the one that was used last: its pages are the warmest."""
        slot = self._waiting_for(folder)
        while slot is None and self._idle:
            found = self._idle.pop()
            if found.cell.alive:
                slot = found
            else:
                await self._remove(found)
        return slot or await self._new()

    def _waiting_for(self, folder: AttemptFolder) -> Slot | None:
        """Takes it out of the idle ones. A slot that others were given before has its sandbox made for nothing."""
        parked = [slot for slot in self._idle if slot.parked is not None and slot.cell.alive]
        inode = inode_of(folder) if parked and folder.root.is_dir() else 0
        slot = next((slot for slot in parked if slot.parked is not None and slot.parked.inode == inode), None)
        if slot is not None:
            self._idle.remove(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Nothing of the attempt runs any more: its cell is free for the next one."""
        slot.idle_since = asyncio.get_running_loop().time()
        self._idle.append(slot)
        self.spare_soon()
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
        if slot.parked is not None:
            slot.parked.folder.unpark()
        await slot.groups.remove()
        self.taken.discard(slot.number)

    def spare_soon(self) -> None:
        """Once nothing was started or ended for a moment: what is under way needs the processor more."""
        if self._sparing is not None:
            self._sparing.cancel()
        self._sparing = asyncio.get_running_loop().call_later(SPARE_AFTER_SECONDS, self._spare)

    def _spare(self) -> None:
        self._sparing = None
        if len(self._idle) < SPARE_CELLS:
            self._tasks.spawn(self._make_spares(), "spare")
        self._make_ready()

    def _make_ready(self) -> None:
        """Have a sandbox wait in those that will be taken next."""
        park = self._park
        if park is None or not self._open:
            return
        for slot in list(self._idle)[-SPARE_CELLS:]:
            if slot.parked is None and slot.cell.alive:
                slot.parked = park(slot)

    async def _make_spares(self) -> None:
        while self._open and len(self._idle) < SPARE_CELLS:
            slot = await self._new()
            slot.idle_since = asyncio.get_running_loop().time()
            self._idle.appendleft(slot)
        self._make_ready()

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
