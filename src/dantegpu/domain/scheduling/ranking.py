"""Which machine is the best one for a shape: a table of scores, shapes against machines, kept between placements.

A *line* of the table is what machines can tell apart of a shape: shapes of several teams share one. A job for a part
of a GPU has two lines, one over free devices and one over devices that its team has parts of, as no other team may join
those. A score says how bad a place is; NEVER means that the job does not fit there at this moment. A line knows up to
which change of the board it is true. Only machines that changed since are looked at again, many lines in one go.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dantegpu.domain.job import QueueReason
from dantegpu.domain.scheduling.backfill import Holds
from dantegpu.domain.scheduling.board import Board
from dantegpu.domain.scheduling.constraints import (
    ConstraintCount,
    PendingJob,
    all_of,
    constraint_counts,
    constraint_masks,
    eligible_devices,
    has_count_of_one_model,
    waiting_reason,
)
from dantegpu.domain.scheduling.queue import Shape
from dantegpu.domain.scheduling.snapshot import NOBODY, Bools, Ints
from dantegpu.domain.units import MILLI_PER_UNIT

type Floats = NDArray[np.float64]
type Columns = NDArray[np.int16]

NEVER = np.inf
MAX_CELLS = 24_000_000
"""Scores that are kept, some 11 bytes each; when there are more, all are looked at again."""
WINDOW = 64
"""The most shapes that are prepared at once."""
MAX_PLACES = 100_000
"""Shapes whose lines are known, and the same holds for them."""
_FEW_LINES, _FEW_CHANGES, _MACHINES_PER_CHANGE = 2, 48, 4
_CHUNK = 1 << 14
_SCAN = 1 << 22


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why jobs of a shape wait. `machines_fitting` counts machines that fit but are busy; `text` says it otherwise."""

    reason: QueueReason
    constraints: tuple[ConstraintCount, ...] = ()
    machines_total: int = 0
    machines_fitting: int = 0
    text: str = ""

    @property
    def detail(self) -> str:
        """Numbers for people: `12 machines: 7 no such GPU model, 5 costs more than max_price`."""
        if self.text or not self.machines_total:
            return self.text
        counts = ", ".join(f"{count.machines_excluded} {count.text}" for count in self.constraints)
        head = f"{self.machines_total} machine{'' if self.machines_total == 1 else 's'}"
        fitting = f"{self.machines_fitting} that fit{'s' if self.machines_fitting == 1 else ''}, all busy"
        parts = [part for part in (counts, fitting if self.machines_fitting else "") if part]
        return f"{head}: {', '.join(parts)}" if parts else head


@dataclass(frozen=True, slots=True)
class Pairs:
    """Lines and machines that are to be scored, as columns of one length K; each machine can take its line's job.

    `usable` (K, G) marks the devices that the job could have, `free` what each device has left. `count` and `milli` are
    the devices that the job asks for; both are 0 for a job without GPUs.
    """

    row: Ints
    line: Ints
    cpu_milli: Ints
    memory_bytes: Ints
    count: Ints
    milli: Ints
    usable: Bools
    free: Ints

    def take(self, places: Ints) -> "Pairs":
        return Pairs(
            self.row.take(places),
            self.line.take(places),
            self.cpu_milli.take(places),
            self.memory_bytes.take(places),
            self.count.take(places),
            self.milli.take(places),
            self.usable.take(places, axis=0),
            self.free.take(places, axis=0),
        )


class Scorer(Protocol):
    """An objective. The lowest score wins, of equal scores the machine with the lower number."""

    def score(self, pairs: Pairs) -> tuple[Floats, Columns]:
        """(K,): the score, and the device to take for a part of one (else -1)."""
        ...

    @property
    def score_one(self) -> Callable[[int, int], float] | None:
        """Scores one machine with devices that are alike, for so many whole ones. None: only score() can."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """A shape's place in the table. One or two `lines` are tried in this order; equal scores go to the earlier one."""

    lines: tuple[int, ...]
    line_numbers: Ints
    eligible: tuple[bool, ...]
    refusal: Refusal
    avoided: Ints | None


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What does not change while plans are made: the machines and the classes of devices that a shape may have."""

    possible: Bools
    eligible: Bools
    refusal: Refusal


class ScoreTable:
    """The scores of one board under one objective.

    `prepare` brings the lines of some shapes up to date; `best` then answers from the table alone, so between the two
    the caller `hide`s machines that it has used. When `best` finds nothing, `refresh` shows what was hidden.
    """

    def __init__(self, board: Board, scorer: Scorer) -> None:
        self._board = board
        self._scorer = scorer
        self._score_one = scorer.score_one
        self._machines = len(board.snapshot.machines)
        self._any_mixed = bool(board.mixed.any())
        self._limit = max(MAX_CELLS // max(self._machines, 1), 256)
        self._places: dict[Shape, Place] = {}
        self._closed: set[int] = set()
        self._closed_at = 0
        self._numbers: dict[tuple[object, ...], int] = {}
        self._conditions: dict[tuple[object, ...], _Conditions] = {}
        self._lines_of_team: dict[int, Ints] = {}
        """Of each team: lines over devices that it has parts of, and those over free devices that they go with."""
        self._shown: Ints = np.zeros(0, dtype=np.int64)
        self._size = 0
        self._allocate(64)

    def _allocate(self, size: int) -> None:
        """Room for `size` lines; what is known stays."""
        machines, kept = self._machines, slice(0, self._size)
        scores: Floats = np.full((size, machines), NEVER)
        columns: Columns = np.full((size, machines), -1, dtype=np.int16)
        possible: Bools = np.zeros((size, machines), dtype=np.bool_)
        eligible: Bools = np.zeros((size, self._board.class_count), dtype=np.bool_)
        seen: Ints = np.zeros(size, dtype=np.int64)
        asked: Ints = np.zeros((6, size), dtype=np.int64)
        if self._size:
            scores[kept], columns[kept], possible[kept] = self._scores[kept], self._columns[kept], self._possible[kept]
            eligible[kept], seen[kept], asked[:, kept] = self._eligible[kept], self._seen[kept], self._asked[:, kept]
        self._scores, self._columns, self._possible, self._eligible = scores, columns, possible, eligible
        self._seen, self._asked, self._room = seen, asked, size

    # --- asking -------------------------------------------------------------------------------------------------------

    def closed(self, shape: Shape) -> bool:
        """Is it known that no job of the shape fits anywhere? Until something is given back that stays so."""
        if self._closed_at < self._board.given_back:
            self._closed.clear()
            self._closed_at = self._board.given_back
        closed = self._closed
        place = self._places.get(shape) if closed else None
        return place is not None and place.lines[0] in closed and place.lines[-1] in closed

    def close(self, shape: Shape) -> None:
        """`best` found nothing after `refresh`. Shapes of other teams that share its lines are closed with it."""
        self._closed.update(self._place(shape).lines)

    def refusal(self, shape: Shape) -> Refusal:
        return self._place(shape).refusal

    def prepare(self, shapes: Iterable[Shape]) -> None:
        """Bring the lines of these shapes up to date; hide() works on them from now on."""
        if self._size + 2 * WINDOW > self._limit or len(self._places) > MAX_PLACES:
            self._forget_lines()
        places = [self._place(shape) for shape in shapes]
        if len(places) == 1:
            self._shown = places[0].line_numbers
        else:
            lines = list(dict.fromkeys(line for place in places for line in place.lines))
            self._shown = np.array(lines, dtype=np.int64)
        self._update(self._shown)

    def refresh(self, shape: Shape) -> None:
        """Bring one more shape up to date, and show it what hide() took from it."""
        self._update(self._place(shape).line_numbers)

    def hide(self, row: int) -> None:
        """The machine has changed: nobody takes it by its old score."""
        self._scores[self._shown, row] = NEVER

    def best(self, shape: Shape, holds: Holds | None = None) -> tuple[int, list[int]] | None:
        """The machine and its devices for a job of this shape; None when no machine that is shown can take it.

        `holds`: what of machines is not for it.
        """
        place = self._places[shape]
        if not self._machines:
            return None
        beside = {row: self._beside(shape, place, row, held) for row, held in holds.items()} if holds else {}
        closed = [row for row, columns in beside.items() if columns is None]
        found, lowest, row = -1, NEVER, -1
        for line in place.lines:
            scores = self._scores[line]
            if closed:
                scores = scores.copy()
                scores[closed] = NEVER
            if place.avoided is not None:
                scores = _without(scores, place.avoided)
            best = int(scores.argmin())
            if scores[best] < lowest:
                found, lowest, row = line, scores[best], best
        if found < 0:
            return None
        gpu = shape.request.gpu
        if gpu is None:
            return row, []
        if (columns := beside.get(row)) is not None:
            return row, columns
        column = int(self._columns[found, row])
        return row, [column] if column >= 0 else self._whole_devices(row, place.eligible, gpu.count_min)

    def joined(self, team: int, row: int) -> None:
        """The team holds a part of a device there now, and may take more of it."""
        lines = self._lines_of_team.get(team)
        if lines is not None:
            self._possible[lines[0], row] = self._possible[lines[1], row]

    def rescore(self) -> None:
        """Scores mean something else now."""
        self._seen[:] = 0

    def _beside(self, shape: Shape, place: Place, row: int, held: frozenset[int] | None) -> list[int] | None:
        """Devices for a job of the shape that are not held; None: it has no place there."""
        board, gpu = self._board, shape.request.gpu
        if held is None or gpu is None:
            return None if held is None else []
        free, tenant = board.capacity.device[row].tolist(), board.capacity.tenant[row].tolist()
        teams = (NOBODY, board.team_number(shape.team_id)) if gpu.milli < MILLI_PER_UNIT else (NOBODY,)
        usable = [
            column
            for column, number in enumerate(board.class_rows[row])
            if column not in held and place.eligible[number] and free[column] >= gpu.milli and tenant[column] in teams
        ]
        if gpu.milli < MILLI_PER_UNIT:
            return [min(usable, key=lambda column: (free[column], column))] if usable else None
        models = board.snapshot.device_model[row].tolist()
        return tightest_group(models, usable, gpu.count_min) if _has_count(models, usable, gpu.count_min) else None

    def _whole_devices(self, row: int, eligible: Sequence[bool], count: int) -> list[int]:
        board = self._board
        free, classes = board.capacity.device[row].tolist(), board.class_rows[row]
        usable = [
            column
            for column, (milli, number) in enumerate(zip(free, classes, strict=True))
            if milli == MILLI_PER_UNIT and eligible[number]
        ]
        if len(usable) == count or not board.mixed[row]:
            return usable[:count]
        return tightest_group(board.snapshot.device_model[row].tolist(), usable, count)

    # --- lines --------------------------------------------------------------------------------------------------------

    def _place(self, shape: Shape) -> Place:
        place = self._places.get(shape)
        if place is None:
            place = self._places[shape] = self._enter(shape)
        return place

    def _enter(self, shape: Shape) -> Place:
        snapshot, job, gpu = self._board.snapshot, shape.job, shape.request.gpu
        number = snapshot.team_number(job.team_id)
        owns = bool((snapshot.own_team_only & (snapshot.team == number)).any())
        # Only the owner of a machine that takes nobody else's jobs sees another fleet than the other teams.
        key = (*job.shape[1:], job.team_id if owns else None)
        conditions = self._conditions.get(key)
        if conditions is None:
            conditions = self._conditions[key] = self._look_at(job)
        base = self._line(key, shape, conditions, NOBODY)
        lines = (base,)
        if gpu is not None and gpu.milli < MILLI_PER_UNIT:
            team = self._board.team_number(job.team_id)
            lines = (self._line((*key, team), shape, conditions, team, base), base)
        rows = [snapshot.index_of[machine] for machine in job.avoided_machines if machine in snapshot.index_of]
        avoided = np.array(sorted(rows), dtype=np.int64) if rows else None
        return Place(
            lines, np.array(lines, dtype=np.int64), tuple(conditions.eligible.tolist()), conditions.refusal, avoided
        )

    def _look_at(self, job: PendingJob) -> _Conditions:
        snapshot, gpu = self._board.snapshot, job.request.gpu
        masks = constraint_masks(snapshot, job)
        possible = all_of(snapshot, masks)
        refusal = Refusal(
            waiting_reason(snapshot, masks), constraint_counts(masks), len(snapshot.machines), int(possible.sum())
        )
        eligible: Bools = np.zeros(self._board.class_count, dtype=np.bool_)
        if gpu is not None:
            eligible[self._board.classes[eligible_devices(snapshot, gpu)]] = True
        return _Conditions(possible, eligible, refusal)

    def _line(
        self, key: tuple[object, ...], shape: Shape, conditions: _Conditions, tenant: int, base: int | None = None
    ) -> int:
        line = self._numbers.get(key)
        if line is not None:
            return line
        if self._size == self._room:
            self._allocate(2 * self._room)
        line = self._numbers[key] = self._size
        self._size += 1
        request, gpu = shape.request, shape.request.gpu
        self._asked[:, line] = (
            request.cpu_milli,
            request.memory_bytes,
            request.disk_bytes,
            gpu.count_min if gpu is not None else 0,
            gpu.milli if gpu is not None else 0,
            tenant,
        )
        self._eligible[line] = conditions.eligible
        self._possible[line] = conditions.possible
        if base is not None:
            self._possible[line] &= (self._board.capacity.tenant == tenant).any(axis=1)
            lines = self._lines_of_team.get(tenant, np.zeros((2, 0), dtype=np.int64))
            self._lines_of_team[tenant] = np.column_stack((lines, (line, base)))
        return line

    def _forget_lines(self) -> None:
        for known in (self._places, self._numbers, self._lines_of_team, self._conditions):
            known.clear()
        self._closed.clear()
        self._size = 0
        self._scores.fill(NEVER)
        self._seen.fill(0)

    # --- scores -------------------------------------------------------------------------------------------------------

    def _update(self, lines: Ints) -> None:
        board = self._board
        score_one = self._score_one if len(lines) <= _FEW_LINES else None
        if score_one is not None and all(self._update_changed(line, score_one) for line in lines.tolist()):
            return
        lines = lines[self._seen[lines] < board.clock]
        step = max(_SCAN // max(self._machines, 1), 1)
        for first in range(0, len(lines), step):
            some = lines[first : first + step]
            stale = board.last_change > self._seen[some][:, None]
            stale &= self._possible[some]
            which, rows = stale.nonzero()
            which = some[which]
            for start in range(0, len(rows), _CHUNK):
                self._score(which[start : start + _CHUNK], rows[start : start + _CHUNK])
        self._seen[lines] = board.clock

    def _update_changed(self, line: int, score_one: Callable[[int, int], float]) -> bool:
        """The same for one line, by a list of what changed instead of a look at all machines. False: there is none."""
        board = self._board
        rows = board.changed_since(int(self._seen[line]))
        if rows is None or len(rows) > max(_FEW_CHANGES, self._machines // _MACHINES_PER_CHANGE):
            return False
        if len(rows) > _FEW_CHANGES:
            rows = rows[self._possible[line].take(rows)]
        if len(rows) > _FEW_CHANGES:
            rows = np.unique(rows)
        else:
            rows = np.array(self._score_few(line, set(rows.tolist()), score_one), dtype=np.int64)
        if len(rows):
            self._score(np.full(len(rows), line, dtype=np.int64), rows)
        self._seen[line] = board.clock
        return True

    def _score_few(self, line: int, rows: Iterable[int], score_one: Callable[[int, int], float]) -> list[int]:
        """Score a few machines; those are left that need a look at each device."""
        board, scores, possible = self._board, self._scores[line], self._possible[line]
        cores, untouched, alike = board.cores, board.untouched, board.alike
        cpu, memory, disk, count, milli, tenant = self._asked[:, line].tolist()
        quick = tenant == NOBODY and (milli == MILLI_PER_UNIT or not count)
        eligible = self._eligible[line]
        left: list[int] = []
        for row in rows:
            if not possible[row]:
                continue
            score: float | None = NEVER
            if cores[row] >= cpu and (tenant != NOBODY or untouched[row] >= count):
                if not quick or (count and alike[row] < 0):
                    score = None
                elif (
                    board.capacity.memory[row] >= memory
                    and board.capacity.disk[row] >= disk
                    and (not count or eligible[alike[row]])
                ):
                    score = score_one(row, count)
            if score is None:
                left.append(row)
            else:
                scores[row] = score
                self._columns[line, row] = -1
        return left

    def _score(self, line: Ints, row: Ints) -> None:
        """Score these pairs anew."""
        board, capacity = self._board, self._board.capacity
        self._scores[line, row] = NEVER
        cpu, memory, disk, count, milli, tenant = self._asked.take(line, axis=1)
        # What needs no look at each device first: most machines lack cores or have no device that is free.
        fits = capacity.cpu.take(row) >= cpu
        fits &= capacity.memory.take(row) >= memory
        fits &= capacity.disk.take(row) >= disk
        fits &= (board.untouched.take(row) >= count) | (tenant != NOBODY)
        some = np.flatnonzero(fits)
        if not len(some):
            return
        row, line, cpu, memory = row.take(some), line.take(some), cpu.take(some), memory.take(some)
        count, milli, tenant = count.take(some), milli.take(some), tenant.take(some)
        free = capacity.device.take(row, axis=0)
        usable = free >= milli[:, None]
        usable &= capacity.tenant.take(row, axis=0) == tenant[:, None]
        usable &= self._eligible[line[:, None], board.classes.take(row, axis=0)]
        fits = usable.sum(axis=1) >= count
        for place in np.flatnonzero(fits & board.mixed.take(row) & (count > 1)) if self._any_mixed else ():
            models = board.snapshot.device_model[row[place]]
            fits[place] = has_count_of_one_model(usable[place][None], models[None], int(count[place]))[0]
        kept = np.flatnonzero(fits)
        if len(kept):
            pairs = Pairs(row, line, cpu, memory, count, milli, usable, free)
            if len(kept) < len(row):
                pairs = pairs.take(kept)
            self._scores[pairs.line, pairs.row], self._columns[pairs.line, pairs.row] = self._scorer.score(pairs)


def _without(scores: Floats, rows: Ints) -> Floats:
    """The scores without those rows, unless nothing would be left."""
    others = scores.copy()
    others[rows] = NEVER
    return others if (others < NEVER).any() else scores


def _has_count(models: Sequence[int], usable: Sequence[int], count: int) -> bool:
    return max(Counter(models[column] for column in usable).values(), default=0) >= count


def tightest_group(models: Sequence[int], usable: Sequence[int], count: int) -> list[int]:
    """`count` of the `usable` columns, of one model: of the smallest such set, as a larger one may stay whole."""
    by_model: dict[int, list[int]] = {}
    for column in usable:
        by_model.setdefault(models[column], []).append(column)
    enough = [group for group in by_model.values() if len(group) >= count]
    return min(enough, key=lambda group: (len(group), group))[:count]
