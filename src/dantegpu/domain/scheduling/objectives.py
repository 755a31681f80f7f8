"""The objectives that rank by a few numbers in turn: `cheapest`, `fastest`, `spread`. A score is those numbers in one.

A float holds 53 bits without rounding: 20 for the price's rank among all prices, 17 for free milli-GPUs, and 16 for
free cores in sixteenths or 12 for the speed. What is larger counts as the largest; it only settles ties.
"""

from collections.abc import Callable, Sequence
from typing import assert_never

import numpy as np

from dantegpu.domain.scheduling.board import Board
from dantegpu.domain.scheduling.fragmentation import FragmentationScorer
from dantegpu.domain.scheduling.mix import RequestMix
from dantegpu.domain.scheduling.policy import Objective
from dantegpu.domain.scheduling.ranking import Columns, Floats, Pairs, Scorer
from dantegpu.domain.scheduling.snapshot import Ints
from dantegpu.domain.scheduling.speeds import speed_of
from dantegpu.domain.units import MILLI_PER_UNIT

_GPU_BITS, _CORE_BITS, _PRICE_BITS, _SPEED_BITS = 17, 16, 20, 12
_CORE_PARTS = 16


class KeyScorer:
    """Ranks by price, then free GPUs, then free cores (`cheapest`), or by the most free GPUs and cores (`spread`).

    `fastest` looks at the speed first; of a machine with several models the fastest one that the job could have counts.
    """

    def __init__(self, board: Board, objective: Objective) -> None:
        self._objective = objective
        snapshot = board.snapshot
        self.extra: Floats = np.zeros(len(snapshot.machines))
        speeds = np.array([min(speed_of(model), (1 << _SPEED_BITS) - 1) for model in snapshot.models], dtype=np.int64)
        known = snapshot.device_model >= 0
        self._speeds: Ints = np.zeros(snapshot.device_model.shape, dtype=np.int64)
        self._speeds[known] = speeds[snapshot.device_model[known]]
        self._ranks = np.stack((_rank(snapshot.price_cpu), _rank(snapshot.price_gpu)))
        self._rank_rows: list[list[int]] = self._ranks.tolist()
        self._first_speeds: Ints = self._speeds.max(axis=1, initial=0)
        self._board = board

    def score(self, pairs: Pairs) -> tuple[Floats, Columns]:
        capacity, quick = self._board.capacity, len(pairs.row) - len(pairs.usable)
        cores = np.minimum(capacity.cpu.take(pairs.row) * _CORE_PARTS // MILLI_PER_UNIT, (1 << _CORE_BITS) - 1)
        gpus = np.minimum(capacity.device.take(pairs.row, axis=0).sum(axis=1), (1 << _GPU_BITS) - 1)
        rank = self._ranks[(pairs.gpus > 0).astype(np.int64), pairs.row]
        match self._objective:
            case Objective.SPREAD:
                gpus, cores = (1 << _GPU_BITS) - 1 - gpus, (1 << _CORE_BITS) - 1 - cores
                key = ((gpus << _CORE_BITS | cores) << _PRICE_BITS) | rank
            case Objective.FASTEST:
                speed = np.where(pairs.gpus > 0, self._first_speeds.take(pairs.row), 0)
                speeds = self._speeds.take(pairs.row[quick:], axis=0)
                speed[quick:] = np.where(pairs.usable, speeds, 0).max(axis=1, initial=0)
                key = (((1 << _SPEED_BITS) - 1 - speed) << _PRICE_BITS | rank) << _GPU_BITS | gpus
            case _:
                key = ((rank << _GPU_BITS | gpus) << _CORE_BITS) | cores
        return key.astype(np.float64), _fullest(pairs)

    def states(self) -> None:
        """Prices are part of the score, and nearly every machine has its own."""
        return

    @property
    def score_one(self) -> Callable[[int, int, Sequence[int] | None], float]:
        return self._score_one

    def _score_one(self, row: int, count: int, usable: Sequence[int] | None) -> float:
        """The same as score(), one at a time."""
        board, rank = self._board, self._rank_rows[count > 0][row]
        gpus = min(board.gpu_milli[row], (1 << _GPU_BITS) - 1)
        cores = min(board.cores[row] * _CORE_PARTS // MILLI_PER_UNIT, (1 << _CORE_BITS) - 1)
        match self._objective:
            case Objective.SPREAD:
                gpus, cores = (1 << _GPU_BITS) - 1 - gpus, (1 << _CORE_BITS) - 1 - cores
                return float(((gpus << _CORE_BITS | cores) << _PRICE_BITS) | rank)
            case Objective.FASTEST:
                speed = int(self._first_speeds[row]) if count else 0
                if usable is not None:
                    speed = max(self._speeds[row, usable].tolist(), default=0)
                return float((((1 << _SPEED_BITS) - 1 - speed) << _PRICE_BITS | rank) << _GPU_BITS | gpus)
            case _:
                return float(((rank << _GPU_BITS | gpus) << _CORE_BITS) | cores)


def scorer_of(objective: Objective, board: Board, mix: RequestMix) -> Scorer:
    match objective:
        case Objective.FRAGMENTATION:
            return FragmentationScorer(board, mix.shapes())
        case Objective.CHEAPEST | Objective.FASTEST | Objective.SPREAD:
            return KeyScorer(board, objective)
        case _:
            assert_never(objective)


def _fullest(pairs: Pairs) -> Columns:
    """Of a fraction's candidates the device with the least free, else -1."""
    part = pairs.milli[len(pairs.row) - len(pairs.usable) :] < MILLI_PER_UNIT
    if not part.any():
        return np.full(len(part), -1, dtype=np.int16)
    fullest = np.where(pairs.usable, pairs.free, np.iinfo(np.int64).max).argmin(axis=1)
    return np.where(part, fullest, -1).astype(np.int16)


def _rank(prices: Ints) -> Ints:
    """0 for the lowest price, equal for equal ones."""
    _, ranks = np.unique(prices, return_inverse=True)
    return np.minimum(ranks, (1 << _PRICE_BITS) - 1)
