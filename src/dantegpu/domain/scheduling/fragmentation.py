r"""How much useful room a placement costs: the objective `fragmentation`.

For a machine in state s = (free CPU c, free memory d, free milli-GPUs of its devices r_1..r_G) and a request shape m
of the mix (CPU c_m, memory d_m, k_m devices of g_m milli-GPUs each), over the devices that m accepts:

    slots_m(s)  = floor( sum_i floor(r_i / g_m) / k_m )                 copies that fit by devices alone
    ratio_m(s)  = min( c / c_m, d / d_m )                               copies that fit by CPU and memory
    reach_m(s)  = sum of r_i >= g_m  if slots_m >= 1 and ratio_m >= 1, else 0
    copies_m(s) = k_m g_m min( slots_m, ratio_m )
    V(s)        = sum_m w_m ( ALPHA reach_m(s) + (1 - ALPHA) copies_m(s) )

`reach` is what is left of the free GPUs once the fragments of Weng et al. are taken off: V with ALPHA = 1 gives their
fragmentation gradient descent. It asks whether one m fits and not how many, so it does not see that a machine runs out
of CPU long before it runs out of GPUs. `copies` does, and continuously: each core taken from a machine whose cores are
scarce costs, long before the last one. A placement goes where V falls least. Its own size is part of every fall, so
the order is that of usable milli-GPUs lost beyond those it needs. A job without GPUs goes where `copies` falls least.

The weights w_m come from the requests that have arrived so far (`RequestMix`), never from a file.

Approximations, in the value only and never in what may be placed: devices of several models count together, disk does
not count, and a device that one team shares counts for all.

Source: Weng et al., "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent",
USENIX ATC 2023, section 4 (F_n(m), fragmentation gradient descent); `copies` is ours.
"""

from collections.abc import Sequence

import numpy as np

from dantegpu.domain.resources import GpuRequest
from dantegpu.domain.scheduling.board import Board
from dantegpu.domain.scheduling.constraints import eligible_devices
from dantegpu.domain.scheduling.mix import MixShape
from dantegpu.domain.scheduling.ranking import Columns, Floats, Pairs, tightest_group
from dantegpu.domain.scheduling.snapshot import Bools, Ints, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT

ALPHA = 0.75
"""Between asking whether a request fits (1) and how many of it fit (0). The result is flat from 0.5 to 0.8."""

# Equal losses: fewer free GPUs, then fewer free cores, then the lower price. Each step is below what the one before
# can tell apart, and all of them far above the rounding of a sum of 256 terms (1e-14).
_TIE_PER_FREE_GPU = 1e-6
_TIE_PER_FREE_CORE = 1e-9
_TIE_PRICE = 1e-12

_LEVELS = MILLI_PER_UNIT + 1
_DEDUPE_PAIRS = 1024
_BLOCK_ROWS = 256


class FragmentationValue:
    """V(s) for one mix, over rows of one snapshot. Immutable; made anew when the mix has moved on."""

    def __init__(self, snapshot: Snapshot, classes: Ints, class_count: int, shapes: Sequence[MixShape]) -> None:
        self._offsets = classes * _LEVELS
        lanes: dict[tuple[GpuRequest, int], int] = {}
        for shape in shapes:
            lanes.setdefault(_lane(shape.gpu), len(lanes))
        # Table row (device class, free milli-GPUs): copies that fit a device, then its free GPUs when one fits.
        table = np.zeros((class_count, _LEVELS, 2 * len(lanes)))
        levels = np.arange(_LEVELS)
        for (gpu, milli), lane in lanes.items():
            eligible = eligible_devices(snapshot, gpu)
            fitting = np.unique(classes[eligible])
            table[fitting, :, lane] = levels // milli
            table[fitting, :, len(lanes) + lane] = np.where(levels >= milli, levels, 0) / MILLI_PER_UNIT
        self._table = table.reshape(class_count * _LEVELS, 2 * len(lanes))
        self._lanes = len(lanes)
        # Sorted by device count: only the tail needs a division.
        ordered = sorted(shapes, key=lambda shape: shape.gpu.count_min)
        self._lane_of = np.array([lanes[_lane(shape.gpu)] for shape in ordered], dtype=np.int64)
        self._reach_of = self._lane_of + len(lanes)
        counts = np.array([shape.gpu.count_min for shape in ordered], dtype=np.float64)
        self._single = int((counts == 1).sum())
        self._counts = counts[self._single :]
        self._per_cpu = 1.0 / np.array([shape.cpu_milli for shape in ordered], dtype=np.float64)
        self._per_byte = 1.0 / np.array([max(shape.memory_bytes, 1) for shape in ordered], dtype=np.float64)
        weights = np.array([shape.weight for shape in ordered], dtype=np.float64)
        self._reach_weight = ALPHA * weights
        sizes = np.array([shape.gpu.total_milli for shape in ordered], dtype=np.float64) / MILLI_PER_UNIT
        self._copies_weight = weights * sizes

    def of(self, rows: Ints, cpu: Ints, memory: Ints, free: Ints) -> Floats:
        """(B, 2): the whole of V, and `copies` alone, in GPUs, of machines `rows` if they had so much free."""
        values = np.empty((len(rows), 2))
        # So many rows at a time stay in the processor's cache between the steps.
        for first in range(0, len(rows), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            self._block(rows[block], cpu[block], memory[block], free[block], values[block])
        return values

    def _block(self, rows: Ints, cpu: Ints, memory: Ints, free: Ints, values: Floats) -> None:
        devices = self._table.take(self._offsets.take(rows, axis=0) + free, axis=0).sum(axis=1)
        slots = devices.take(self._lane_of, axis=1)
        if len(self._counts):
            tail = slots[:, self._single :]
            tail /= self._counts
            np.floor(tail, out=tail)
        copies = np.multiply.outer(cpu, self._per_cpu)
        np.minimum(copies, np.multiply.outer(memory, self._per_byte), out=copies)
        np.minimum(copies, slots, out=copies)
        reach = devices.take(self._reach_of, axis=1)
        # A hair below 1: cpu * (1 / cpu) may round down.
        reach *= copies > 1 - 1e-9
        values[:, 1] = copies @ self._copies_weight
        values[:, 0] = reach @ self._reach_weight
        values[:, 0] += (1 - ALPHA) * values[:, 1]


def _lane(gpu: GpuRequest) -> tuple[GpuRequest, int]:
    """What devices are accepted, and how much of one."""
    names = tuple(sorted(gpu.names))
    return GpuRequest(names, 1, 1, MILLI_PER_UNIT, gpu.vram, gpu.compute_capability), gpu.milli


class FragmentationScorer:
    """Scores a place by how far V falls there. The values of machines as they are now are kept."""

    def __init__(self, board: Board, shapes: Sequence[MixShape]) -> None:
        self._board = board
        snapshot = board.snapshot
        price = snapshot.price_gpu
        self._prices = price * (_TIE_PRICE / max(int(price.max(initial=0)), 1))
        self._values = np.zeros((len(snapshot.machines), 2))
        # Odd random weights: two states with one sum are as good as impossible, and would only share a score.
        random = np.random.default_rng(1).integers(1, 1 << 62, 3 + 3 * snapshot.device_free.shape[1], dtype=np.int64)
        self._weights = random << 1 | 1
        self.use(shapes)

    def use(self, shapes: Sequence[MixShape]) -> None:
        """Score by this mix from now on."""
        board = self._board
        self._value = FragmentationValue(board.snapshot, board.classes, board.class_count, shapes)
        self._seen = 0

    def score(self, pairs: Pairs) -> tuple[Floats, Columns]:
        if len(pairs.row) <= _DEDUPE_PAIRS:
            losses, columns = self._loss(pairs)
        else:
            # Machines in the same state have the same score; an empty fleet has as many states as models.
            _, first, inverse = np.unique(self._states(pairs), return_index=True, return_inverse=True)
            losses, columns = self._loss(pairs.take(first))
            losses, columns = losses[inverse], columns[inverse]
        losses += self._prices.take(pairs.row)
        return losses, columns

    def _states(self, pairs: Pairs) -> Ints:
        capacity, weights, width = self._board.capacity, self._weights, pairs.free.shape[1]
        states = pairs.line * weights[0]
        states += capacity.cpu.take(pairs.row) * weights[1]
        states += capacity.memory.take(pairs.row) * weights[2]
        for column in range(width):
            states += pairs.free[:, column] * weights[3 + column]
            states += pairs.usable[:, column] * weights[3 + width + column]
            states += self._board.classes[pairs.row, column] * weights[3 + 2 * width + column]
        return states

    def _loss(self, pairs: Pairs) -> tuple[Floats, Columns]:
        """What V falls by, with its tie-breakers, and the device to take of a fraction's candidates (else -1)."""
        capacity, row, free = self._board.capacity, pairs.row, pairs.free
        cpu, memory = capacity.cpu.take(row), capacity.memory.take(row)
        losses: Floats = np.multiply(free.sum(axis=1), _TIE_PER_FREE_GPU / MILLI_PER_UNIT, dtype=np.float64)
        losses += cpu * (_TIE_PER_FREE_CORE / MILLI_PER_UNIT)
        cpu -= pairs.cpu_milli
        memory -= pairs.memory_bytes
        columns: Columns = np.full(len(row), -1, dtype=np.int16)
        part = (pairs.milli > 0) & (pairs.milli < MILLI_PER_UNIT)
        whole, parts = np.flatnonzero(~part), np.flatnonzero(part)
        # One row per place that is tried: whole devices have one each, a fraction each unlike device.
        tried = free.take(whole, axis=0) - self._taken(pairs.take(whole)) * MILLI_PER_UNIT
        place, column = _first_of_its_kind(
            pairs.usable.take(parts, axis=0),
            free.take(parts, axis=0) * self._board.class_count + self._board.classes.take(row.take(parts), axis=0),
        ).nonzero()
        split = free.take(parts.take(place), axis=0)
        every = np.arange(len(place))
        left = split[every, column]
        split[every, column] = left - pairs.milli.take(parts.take(place))
        of = np.concatenate((whole, parts.take(place)))
        after = self._values_after(row.take(of), cpu.take(of), memory.take(of), np.concatenate((tried, split)))
        falls = self._values.take(row.take(of), axis=0) - after
        count = pairs.count.take(whole)
        losses[whole] += np.where(count > 0, falls[: len(whole), 0], falls[: len(whole), 1])
        if len(parts):
            options: Floats = np.full((len(parts), free.shape[1]), np.inf)
            options[place, column] = falls[len(whole) :, 0] + left * (_TIE_PER_FREE_GPU / MILLI_PER_UNIT)
            best = options.argmin(axis=1)
            losses[parts] += options[np.arange(len(parts)), best]
            columns[parts] = best
        return losses, columns

    def _taken(self, pairs: Pairs) -> Bools:
        """(K, G): the whole devices that a job of each pair would get."""
        taken = pairs.usable & (pairs.usable.cumsum(axis=1, dtype=np.int16) <= pairs.count[:, None])
        for place in np.flatnonzero(self._board.mixed.take(pairs.row) & (pairs.count > 0)):
            models = self._board.snapshot.device_model[pairs.row[place]].tolist()
            usable = np.flatnonzero(pairs.usable[place]).tolist()
            taken[place] = False
            taken[place, tightest_group(models, usable, int(pairs.count[place]))] = True
        return taken

    def _values_after(self, rows: Ints, cpu: Ints, memory: Ints, free: Ints) -> Floats:
        board, capacity = self._board, self._board.capacity
        changed = np.flatnonzero(board.last_change > self._seen)
        self._seen = board.clock
        if not len(changed):
            return self._value.of(rows, cpu, memory, free)
        # One call for the values after and for the present values of machines that changed: calls are what is dear.
        values = self._value.of(
            np.concatenate((changed, rows)),
            np.concatenate((capacity.cpu.take(changed), cpu)),
            np.concatenate((capacity.memory.take(changed), memory)),
            np.concatenate((capacity.device.take(changed, axis=0), free)),
        )
        self._values[changed] = values[: len(changed)]
        return values[len(changed) :]


def _first_of_its_kind(usable: Bools, kinds: Ints) -> Bools:
    """(rows, G): usable devices but those that have an equal one in an earlier column."""
    first = usable.copy()
    for column in range(1, usable.shape[1]):
        same = kinds[:, :column] == kinds[:, column : column + 1]
        same &= usable[:, :column]
        first[:, column] &= ~same.any(axis=1)
    return first
