"""Which machine is the best one for a shape: a table of scores, shapes against machines, kept between placements.

A *line* of the table is what machines can tell apart of a shape: shapes of several teams share one. A job for a part
of a GPU has two lines, one over free devices and one over devices that its team has parts of, as no other team may join
those. A score says how bad a place is; NEVER means that the job does not fit there at this moment. A line knows up to
which change of the board it is true. Only machines that changed since are looked at again, many lines in one go.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
_FEW_LINES, _FEW_CHANGES = 2, 48
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


class Pairs(NamedTuple):
    """Lines and machines that are to be scored, as columns of one length K; each machine can take its line's job.

    `gpus` and `milli` are the devices that the job asks for; both are 0 for a job without GPUs. The first of the pairs
    take devices that nobody uses, on machines whose devices are alike: any of them. For the last L of them, `usable`
    (L, G) marks the devices that the job could have, and `free` is what each device has left.
    """

    row: Ints
    cpu_milli: Ints
    memory_bytes: Ints
    gpus: Ints
    milli: Ints
    usable: Bools
    free: Ints


class Scorer(Protocol):
    """An objective. The lowest score wins, of equal scores the machine with the lower number."""

    extra: Floats
    """(M,): what is added to a machine's scores whatever its state."""

    def score(self, pairs: Pairs) -> tuple[Floats, Columns]:
        """(K,): the score but for `extra`; (L,): the device to take for a part of one (else -1)."""
        ...

    def states(self) -> Ints | None:
        """(M,): machines with equal numbers have equal scores. None: each is to be looked at."""
        ...

    @property
    def score_one(self) -> "Callable[[int, int, Sequence[int] | None], float] | None":
        """Scores one machine for a job with so many devices, `usable` when they are not alike. None: only score()."""
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
        self._nothing: Floats = np.zeros(self._machines)
        no_devices = (0, board.snapshot.device_free.shape[1])
        self._none_closer = (
            np.zeros(0, dtype=np.int64),
            np.zeros(no_devices, dtype=np.bool_),
            np.zeros(no_devices, dtype=np.int64),
        )
        self._any_unlike = bool(((board.alike < 0) & (board.snapshot.device_total > 0).any(axis=1)).any())
        self._limit = max(MAX_CELLS // max(self._machines, 1), 256)
        self._places: dict[Shape, Place] = {}
        self._closed: set[int] = set()
        self._closed_at = 0
        self._numbers: dict[tuple[object, ...], int] = {}
        self._conditions: dict[tuple[object, ...], _Conditions] = {}
        self._lines_of_team: dict[int, Ints] = {}
        """Of each team: lines over devices that it has parts of, and those over free devices that they go with."""
        self._shown: dict[int, Floats] = {}
        self._several: Floats | None = None
        self._rows_of_team: dict[int, set[int]] = {}
        """Machines on which those lines have been told that the team has something there."""
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
        closed = self._closed
        if not closed:
            return False
        if self._closed_at < self._board.given_back:
            closed.clear()
        place = self._places.get(shape)
        return place is not None and place.lines[0] in closed and place.lines[-1] in closed

    def close(self, shape: Shape) -> None:
        """`best` found nothing after `refresh`. Shapes of other teams that share its lines are closed with it."""
        if self._closed_at < self._board.given_back:
            self._closed.clear()
            self._closed_at = self._board.given_back
        self._closed.update(self._place(shape).lines)

    def refusal(self, shape: Shape) -> Refusal:
        return self._place(shape).refusal

    def prepare(self, shapes: Sequence[Shape]) -> None:
        """Bring the lines of these shapes up to date; hide() works on them from now on."""
        if self._size + 2 * WINDOW > self._limit or len(self._places) > MAX_PLACES:
            self._forget_lines()
        if len(shapes) == 1:
            lines = self._place(shapes[0]).lines
            self._update(lines)
            self._several, self._shown = None, {line: self._scores[line] for line in lines}
            return
        lines = list({line: None for shape in shapes for line in self._place(shape).lines})
        self._update(lines)
        # A copy, in which one machine is one step through memory: hide() is called for each placement.
        self._several = self._scores[np.array(lines, dtype=np.int64)]
        self._shown = dict(zip(lines, self._several, strict=True))

    def refresh(self, shape: Shape) -> None:
        """Bring one more shape up to date, and show it what hide() took from it."""
        lines = self._place(shape).lines
        self._update(lines)
        for line in lines:
            self._shown[line][:] = self._scores[line]

    def hide(self, row: int) -> None:
        """The machine has changed: nobody takes it by its old score."""
        if self._several is not None:
            self._several[:, row] = NEVER

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
            scores = self._shown[line]
            if closed:
                scores = scores.copy()
                scores[closed] = NEVER
            if place.avoided is not None:
                scores = _without(scores, place.avoided)
            best = int(scores.argmin())
            score = scores.item(best)
            if score < lowest:
                found, lowest, row = line, score, best
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
        rows = self._rows_of_team.get(team)
        if rows is not None and row not in rows:
            rows.add(row)
            lines = self._lines_of_team[team]
            self._possible[lines[0], row] = self._possible[lines[1], row]

    def rescore(self) -> None:
        """Scores mean something else now."""
        self._seen[:] = 0

    def _beside(self, shape: Shape, place: Place, row: int, held: frozenset[int] | None) -> list[int] | None:
        """Devices for a job of the shape that are not held; None: it has no place there."""
        board, gpu = self._board, shape.request.gpu
        if held is None or gpu is None:
            return None if held is None else []
        whole = gpu.milli == MILLI_PER_UNIT
        teams = (NOBODY,) if whole else (NOBODY, board.team_number(shape.team_id))
        usable = [column for column in self._usable(row, place.eligible, gpu.milli, teams) if column not in held]
        if not self._are_enough(row, usable, gpu.count_min):
            return None
        models = board.snapshot.device_model[row].tolist()
        return tightest_group(models, usable, gpu.count_min) if whole else [self._fullest(row, usable)]

    def _whole_devices(self, row: int, eligible: Sequence[bool], count: int) -> list[int]:
        """Of those that nobody uses."""
        if self._board.alike_rows[row] >= 0:
            return [column for column, free in enumerate(self._board.device[row]) if free == MILLI_PER_UNIT][:count]
        usable = self._usable(row, eligible, MILLI_PER_UNIT, (NOBODY,))
        if len(usable) == count or not self._board.mixed[row]:
            return usable[:count]
        return tightest_group(self._board.snapshot.device_model[row].tolist(), usable, count)

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
        self._eligible[line] = conditions.eligible | (gpu is None)
        self._possible[line] = conditions.possible
        if base is not None:
            self._possible[line] &= (self._board.capacity.tenant == tenant).any(axis=1)
            lines = self._lines_of_team.get(tenant, np.zeros((2, 0), dtype=np.int64))
            self._lines_of_team[tenant] = np.column_stack((lines, (line, base)))
            self._rows_of_team[tenant] = set()
        return line

    def _forget_lines(self) -> None:
        for known in (self._places, self._numbers, self._lines_of_team, self._rows_of_team, self._conditions):
            known.clear()
        self._closed.clear()
        self._size = 0
        self._scores.fill(NEVER)
        self._seen.fill(0)

    # --- scores -------------------------------------------------------------------------------------------------------

    def _update(self, asked: Sequence[int]) -> None:
        board, seen = self._board, self._seen
        if len(asked) <= _FEW_LINES and self._score_one is not None:
            asked = [line for line in asked if not self._update_few(line, self._score_one)]
            if not asked:
                return
            # Much was given back. Whatever line was asked since the time before will be asked again: all in one go.
            known = seen[: self._size]
            behind = (known >= board.given_back_before) & (known < board.given_back)
            behind[asked] = True
            lines = np.flatnonzero(behind)
        else:
            lines = np.array(asked, dtype=np.int64)
        lines = lines[seen[lines] < board.clock]
        if not len(lines):
            return
        new = seen[lines] == 0
        states = self._scorer.states() if self._machines > _FEW_CHANGES and new.any() else None
        if states is not None:
            self._score_all(lines[new], states)
            lines = lines[~new]
        step = max(_SCAN // max(self._machines, 1), 1)
        for first in range(0, len(lines), step):
            self._score_changed(lines[first : first + step])

    def _score_all(self, lines: Ints, states: Ints) -> None:
        """These know nothing yet, or by weights that were others: machines in the same state are scored once."""
        _, rows, state = np.unique(states, return_index=True, return_inverse=True)
        step = max(_CHUNK // len(rows), 1)
        for first in range(0, len(lines), step):
            some = lines[first : first + step]
            self._scores[some] = NEVER
            self._score(some.repeat(len(rows)), np.tile(rows, len(some)), self._nothing)
            scores = self._scores[some][:, rows[state]]
            scores[~self._possible[some]] = NEVER
            scores += self._scorer.extra
            self._scores[some] = scores
            self._columns[some] = self._columns[some][:, rows[state]]
        self._seen[lines] = self._board.clock

    def _score_changed(self, lines: Ints) -> None:
        """These know all but what changed since they were asked last."""
        last_change, seen = self._board.last_change, self._seen[lines]
        rows = np.flatnonzero(last_change > seen.min())
        stale = last_change.take(rows) > seen[:, None]
        stale &= self._possible[lines].take(rows, axis=1)
        which, at = stale.nonzero()
        line, row = lines.take(which), rows.take(at)
        self._scores[line, row] = NEVER
        for first in range(0, len(line), _CHUNK):
            self._score(line[first : first + _CHUNK], row[first : first + _CHUNK], self._scorer.extra)
        self._seen[lines] = self._board.clock

    def _score(self, line: Ints, row: Ints, extra: Floats) -> None:
        """Score those of these pairs where the job fits."""
        board, capacity = self._board, self._board.capacity
        cpu, memory, disk, count, milli, tenant = self._asked.take(line, axis=1)
        alike, shared = board.alike.take(row), tenant != NOBODY
        # What needs no look at each device first: most machines lack cores or have no device that is free.
        fits = capacity.cpu.take(row) >= cpu
        fits &= capacity.memory.take(row) >= memory
        fits &= capacity.disk.take(row) >= disk
        fits &= (board.untouched.take(row) >= count) | shared
        closer = shared | ((alike < 0) & (count > 0)) if self._any_unlike else shared
        quick = np.flatnonzero(fits & ~closer & self._eligible[line, alike])
        close = np.flatnonzero(fits & closer)
        # Calls are what is dear where few pairs are asked for: none for what is not there.
        kept, usable, free = self._look_closer(line.take(close), row.take(close)) if len(close) else self._none_closer
        both = np.concatenate((quick, close.take(kept))) if len(kept) else quick
        if not len(both):
            return
        line, row = line.take(both), row.take(both)
        asked = (cpu.take(both), memory.take(both), count.take(both), milli.take(both))
        scores, columns = self._scorer.score(Pairs(row, *asked, usable, free))
        self._scores[line, row] = scores + extra.take(row)
        self._columns[line, row] = -1
        if len(columns):
            self._columns[line[len(quick) :], row[len(quick) :]] = columns

    def _look_closer(self, line: Ints, row: Ints) -> tuple[Ints, Bools, Ints]:
        """Which of the pairs have machines with devices for their jobs, which ones, and what each has free."""
        board, capacity = self._board, self._board.capacity
        free = capacity.device.take(row, axis=0)
        _, _, _, count, milli, tenant = self._asked.take(line, axis=1)
        usable = free >= milli[:, None]
        usable &= capacity.tenant.take(row, axis=0) == tenant[:, None]
        usable &= self._eligible[line[:, None], board.classes.take(row, axis=0)]
        fits = usable.sum(axis=1) >= count
        for place in np.flatnonzero(fits & board.mixed.take(row) & (count > 1)) if self._any_unlike else ():
            models = board.snapshot.device_model[row[place]]
            fits[place] = has_count_of_one_model(usable[place][None], models[None], int(count[place]))[0]
        kept = np.flatnonzero(fits)
        return kept, usable.take(kept, axis=0), free.take(kept, axis=0)

    def _update_few(self, line: int, score_one: "Callable[[int, int, Sequence[int] | None], float]") -> bool:
        """The same for one line, one machine at a time. False: too many changed, or nobody knows which."""
        board = self._board
        rows = board.changed_since(int(self._seen[line]))
        if rows is None:
            return False
        if len(rows):
            rows = rows[self._possible[line].take(rows)]
        some = set(rows.tolist())
        if len(some) > _FEW_CHANGES:
            return False
        scores, all_columns = self._scores[line], self._columns[line]
        cpu, memory, disk, count, milli, tenant = self._asked[:, line].tolist()
        eligible = self._eligible[line].tolist()
        for row in some:
            score, column = NEVER, -1
            if (
                board.cores[row] >= cpu
                and board.memory[row] >= memory
                and board.disk[row] >= disk
                and (tenant != NOBODY or board.untouched_rows[row] >= count)
            ):
                if tenant == NOBODY and (not count or board.alike_rows[row] >= 0):
                    if not count or eligible[board.alike_rows[row]]:
                        score = score_one(row, count, None)
                else:
                    usable = self._usable(row, eligible, milli, (tenant,))
                    if self._are_enough(row, usable, count):
                        score = score_one(row, count, usable)
                        column = self._fullest(row, usable) if milli < MILLI_PER_UNIT else -1
            scores[row], all_columns[row] = score, column
        self._seen[line] = board.clock
        return True

    # --- devices of one machine ---------------------------------------------------------------------------------------

    def _usable(self, row: int, eligible: Sequence[bool], milli: int, tenants: Sequence[int]) -> list[int]:
        board = self._board
        devices = zip(board.device[row], board.tenant[row], board.class_rows[row], strict=True)
        return [
            column
            for column, (free, tenant, number) in enumerate(devices)
            if free >= milli and tenant in tenants and eligible[number]
        ]

    def _are_enough(self, row: int, usable: Sequence[int], count: int) -> bool:
        if count > 1 and self._board.mixed[row]:
            models = self._board.snapshot.device_model[row].tolist()
            return max(Counter(models[column] for column in usable).values(), default=0) >= count
        return len(usable) >= count

    def _fullest(self, row: int, usable: Sequence[int]) -> int:
        free = self._board.device[row]
        return min(usable, key=lambda column: (free[column], column))


def _without(scores: Floats, rows: Ints) -> Floats:
    """The scores without those rows, unless nothing would be left."""
    others = scores.copy()
    others[rows] = NEVER
    return others if (others < NEVER).any() else scores


def tightest_group(models: Sequence[int], usable: Sequence[int], count: int) -> list[int]:
    """`count` of the `usable` columns, of one model: of the smallest such set, as a larger one may stay whole."""
    by_model: dict[int, list[int]] = {}
    for column in usable:
        by_model.setdefault(models[column], []).append(column)
    enough = [group for group in by_model.values() if len(group) >= count]
    return min(enough, key=lambda group: (len(group), group))[:count]
