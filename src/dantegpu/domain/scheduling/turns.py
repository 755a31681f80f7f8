"""One call of `schedule`: jobs are drawn in their order and placed one after the other, until nobody fits any more."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dantegpu.domain.job import QueueReason
from dantegpu.domain.scheduling.backfill import Backfill, Holds, without
from dantegpu.domain.scheduling.board import Board, Placement
from dantegpu.domain.scheduling.gangs import Waits, find_gang
from dantegpu.domain.scheduling.ordering import Draw, Order
from dantegpu.domain.scheduling.policy import Policy
from dantegpu.domain.scheduling.queue import JobGroup, JobQueue, QueuedJob, Shape
from dantegpu.domain.scheduling.ranking import Refusal, ScoreTable
from dantegpu.domain.scheduling.shares import Shares
from dantegpu.domain.units import MILLI_PER_UNIT

type Place = tuple[int, list[int]]
"""A machine row and its device columns."""


class Blocked(NamedTuple):
    """Jobs of one group that go on waiting for one reason: those from the place `first` on."""

    group: JobGroup
    first: int
    refusal: Refusal

    def jobs(self) -> Iterable[QueuedJob]:
        return self.group.from_index(self.first)


class Decided(NamedTuple):
    """What a Plan is made of."""

    placements: tuple[Placement, ...]
    blocked: tuple[Blocked, ...]
    told: tuple[Waits, ...]


class Turns:
    """Draws up to `window` jobs at a time; `backfill` is there when those that cannot start get reservations."""

    def __init__(
        self,
        queue: JobQueue,
        policy: Policy,
        board: Board,
        table: ScoreTable,
        shares: Shares,
        window: int,
        backfill: Backfill | None,
    ) -> None:
        self._queue = queue
        self._board = board
        self._table = table
        self._window = window
        self._backfill = backfill
        self._order = Order(queue, policy, shares, self._closed, pauses=backfill is not None)
        self._placements: list[Placement] = []
        self._no_gang: dict[Shape, Refusal] = {}
        self._behind: dict[Shape, str] = {}
        """Shapes that have room only where something is reserved, and what would help them."""
        self._seen = 0
        """Of the order's refused groups."""

    def run(self, limit: int | None) -> Decided:
        placements, order = self._placements, self._order
        while limit is None or len(placements) < limit:
            draws = order.draw(self._window if limit is None else min(self._window, limit - len(placements)))
            if self._backfill is not None:
                self._look_at_refused(self._backfill)
            if not draws:
                break
            self._place(draws)
        if self._backfill is not None:
            # A large job hears when it will start, also while nobody is there whom that could keep waiting.
            self._backfill.reserve(self._board.free, only_large=True)
        blocked = [Blocked(group, first, self._refusal(group.shape)) for group, first in order.refused]
        return Decided(tuple(placements), tuple(blocked), self._told())

    def _closed(self, shape: Shape) -> bool:
        if shape in self._behind:
            return True
        return self._table.closed(shape) if shape.nodes == 1 else shape in self._no_gang

    def _refusal(self, shape: Shape) -> Refusal:
        return self._no_gang.get(shape) or self._table.refusal(shape)

    def _look_at_refused(self, backfill: Backfill) -> None:
        refused = self._order.refused
        for group, first in refused[self._seen :]:
            shape = group.shape
            if shape in self._behind or not backfill.wants(shape.job):
                continue
            if self._refusal(shape).reason is QueueReason.NO_CAPACITY:
                backfill.block(self._queue.pending(group.jobs[first]))
        self._seen = len(refused)

    def _told(self) -> tuple[Waits, ...]:
        if self._backfill is None:
            return ()
        told = [Waits(it.job.id, QueueReason.RESERVED, it.detail) for it in self._backfill.reservations]
        for group, first in self._order.refused:
            hint = self._behind.get(group.shape)
            if hint is not None:
                told.append(Waits(group.jobs[first].id, QueueReason.BEHIND_RESERVATION, hint))
        return tuple(told)

    # --- placing ------------------------------------------------------------------------------------------------------

    def _place(self, draws: Sequence[Draw]) -> None:
        self._table.prepare([draw.shape for draw in draws if draw.shape.nodes == 1])
        for number, draw in enumerate(draws):
            nodes = self._gang(draw.shape) if draw.shape.nodes > 1 else self._one(draw.shape, hidden=number > 0)
            if nodes is None:
                # Capacity only shrinks within a round: no other job of this shape can fit either.
                self._order.put_back(draws[number:])
                return
            for row, columns in nodes:
                self._take(draw, row, columns)

    def _one(self, shape: Shape, *, hidden: bool) -> list[Place] | None:
        """Where a job of the shape goes. None: nowhere, and the shape is closed."""
        table = self._table
        if self._backfill is None:
            found = self._best(shape, {}, hidden)
            if found is None:
                table.close(shape)
                return None
            return [found]
        holds = self._holds(shape)
        found = self._best(shape, holds, hidden)
        if found is not None and self._reserved():
            holds = self._holds(shape)
            found = self._best(shape, holds, hidden)
        if found is not None:
            return [found]
        beside = table.best(shape) if holds else None
        if beside is None:
            table.close(shape)
        else:
            self._keep_behind(shape, [beside])
        return None

    def _best(self, shape: Shape, holds: Holds, hidden: bool) -> Place | None:
        found = self._table.best(shape, holds)
        if found is None and hidden:
            self._table.refresh(shape)
            found = self._table.best(shape, holds)
        return found

    def _gang(self, shape: Shape) -> list[Place] | None:
        """The same for all nodes of a gang."""
        found = find_gang(without(self._board.free, self._holds(shape)), shape.job)
        if not isinstance(found, Waits) and self._reserved():
            found = find_gang(without(self._board.free, self._holds(shape)), shape.job)
        if not isinstance(found, Waits):
            return found
        beside = find_gang(self._board.free, shape.job) if self._holds(shape) else found
        if isinstance(beside, Waits):
            self._no_gang[shape] = Refusal(found.reason, text=found.detail)
        else:
            self._keep_behind(shape, beside)
        return None

    def _holds(self, shape: Shape) -> Holds:
        return {} if self._backfill is None else self._backfill.holds(shape.job)

    def _reserved(self) -> bool:
        """Somebody could start: those that were refused before get their reservations now. True: there are new ones."""
        backfill = self._backfill
        return backfill is not None and backfill.pending and backfill.reserve(self._board.free)

    def _keep_behind(self, shape: Shape, places: Sequence[Place]) -> None:
        assert self._backfill is not None, "only reservations keep anybody behind"
        self._behind[shape] = self._backfill.hint([row for row, _ in places])

    def _take(self, draw: Draw, row: int, columns: Sequence[int]) -> None:
        table, board, shape = self._table, self._board, draw.shape
        price_percent = shape.job.price_percent
        placement = board.take(draw.job.id, shape.team_id, shape.request, row, columns, price_percent)
        self._placements.append(placement)
        table.hide(row)
        gpu = shape.request.gpu
        if gpu is not None and gpu.milli < MILLI_PER_UNIT:
            table.joined(board.team_number(shape.team_id), row)
        if self._backfill is not None:
            self._backfill.take(shape.job, placement, row)
