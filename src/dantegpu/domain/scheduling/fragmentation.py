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
from numpy.typing import NDArray

from dantegpu.domain.resources import GpuRequest, ResourceRequest
from dantegpu.domain.scheduling.constraints import Capacity, eligible_devices
from dantegpu.domain.scheduling.mix import MixShape
from dantegpu.domain.scheduling.snapshot import Bools, Ints, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT

type Floats = NDArray[np.float64]

ALPHA = 0.75
"""Between asking whether a request fits (1) and how many of it fit (0). The result is flat from 0.5 to 0.8."""

# Equal losses: fewer free GPUs, then fewer free cores, then the lower price. Each step is below what the one before
# can tell apart, and all of them far above the rounding of a sum of 256 terms (1e-14).
_TIE_PER_FREE_GPU = 1e-6
_TIE_PER_FREE_CORE = 1e-9
_TIE_PRICE = 1e-12

_LEVELS = MILLI_PER_UNIT + 1
_DEDUPE_ROWS = 32
_MAX_STATES = 200_000


class FragmentationValue:
    """V(s) for one mix, over rows of one snapshot. Immutable; made anew when the mix has moved on."""

    def __init__(self, snapshot: Snapshot, classes: Ints, class_count: int, shapes: Sequence[MixShape]) -> None:
        self._offsets = classes * _LEVELS
        lanes: dict[tuple[GpuRequest, int], int] = {}
        for shape in shapes:
            lanes.setdefault(_lane(shape.gpu), len(lanes))
        # Table row (device class, free milli-GPUs): copies that fit a device, then its free GPUs when one fits.
        table = np.zeros((class_count, _LEVELS, 2 * len(lanes)), dtype=np.float32)
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
        devices = self._table[self._offsets[rows] + free].sum(axis=1, dtype=np.float32)
        slots = devices[:, self._lane_of]
        if len(self._counts):
            tail = slots[:, self._single :]
            np.floor(tail / self._counts, out=tail, casting="unsafe")
        ratio = np.multiply.outer(cpu, self._per_cpu)
        np.minimum(ratio, np.multiply.outer(memory, self._per_byte), out=ratio)
        reach = devices[:, self._reach_of]
        # A hair below 1: cpu * (1 / cpu) may round down.
        reach *= (ratio > 1 - 1e-9) & (slots >= 1)
        np.minimum(ratio, slots, out=ratio)
        values = np.empty((len(rows), 2))
        copies = ratio @ self._copies_weight
        values[:, 0] = reach @ self._reach_weight + (1 - ALPHA) * copies
        values[:, 1] = copies
        return values


def _lane(gpu: GpuRequest) -> tuple[GpuRequest, int]:
    """What devices are accepted, and how much of one."""
    names = tuple(sorted(gpu.names))
    return GpuRequest(names, 1, 1, MILLI_PER_UNIT, gpu.vram, gpu.compute_capability), gpu.milli


class ShapeScores:
    """The score of each machine for one job shape (infinite: does not fit), and up to which change it is true."""

    __slots__ = ("columns", "scores", "seen", "value")

    def __init__(self, machines: int) -> None:
        self.scores: Floats = np.full(machines, np.inf)
        self.columns: NDArray[np.int16] = np.full(machines, -1, dtype=np.int16)
        self.seen = 0
        self.value: FragmentationValue | None = None


class FragmentationIndex:
    """Scores that are kept between placements: only machines that changed since a shape was last asked are rescored."""

    def __init__(self, snapshot: Snapshot, capacity: Capacity) -> None:
        self._snapshot = snapshot
        self._capacity = capacity
        count = len(snapshot.machines)
        self._classes, self._class_count = _device_classes(snapshot)
        models = np.where(snapshot.device_total > 0, snapshot.device_model, -1)
        top = models.max(axis=1, initial=-1)
        self._mixed = ((models != top[:, None]) & (models >= 0)).any(axis=1)
        self._layouts = [row.tobytes() for row in self._classes]
        self._prices = snapshot.price_gpu * (_TIE_PRICE / max(int(snapshot.price_gpu.max(initial=0)), 1))
        self._changes: list[int] = []
        self._dirty: set[int] = set()
        self._values = np.zeros((count, 2))
        self._state_numbers: dict[tuple[int, int, bytes, bytes, bytes], int] = {}
        self._states = np.zeros(count, dtype=np.int64)
        self._next_state = 0
        for row in range(count):
            self._number_state(row)
        self._value: FragmentationValue | None = None

    def use(self, shapes: Sequence[MixShape]) -> None:
        """Score by this mix from now on."""
        self._value = FragmentationValue(self._snapshot, self._classes, self._class_count, shapes)
        self._dirty.clear()
        capacity, every = self._capacity, np.arange(len(self._snapshot.machines))
        if len(every):
            self._values = self._value.of(every, capacity.cpu, capacity.memory, capacity.device)

    def changed(self, row: int) -> None:
        """The machine's free capacity is another one now."""
        self._changes.append(row)
        self._dirty.add(row)
        self._number_state(row)

    def stale_rows(self, scores: ShapeScores, candidates: Ints) -> Ints:
        """Those of `candidates` whose scores are not those of today, and mark them as seen."""
        pending = self._changes[scores.seen :]
        everything = scores.value is not self._value or len(pending) > len(candidates)
        scores.seen = len(self._changes)
        scores.value = self._value
        if everything:
            scores.scores.fill(np.inf)
            return candidates
        if not pending:
            return candidates[:0]
        rows = np.fromiter(set(pending), dtype=np.int64)
        scores.scores[rows] = np.inf
        places = np.searchsorted(candidates, rows)
        places[places == len(candidates)] = 0
        return rows[candidates[places] == rows]

    def rescore(self, scores: ShapeScores, request: ResourceRequest, rows: Ints, usable: Bools | None) -> None:
        """Score `rows`, all of which can take the request now, on the devices marked `usable` (rows, G)."""
        if len(rows) > _DEDUPE_ROWS:
            # Machines in the same state have the same score; an empty fleet has as many states as models.
            _, first, inverse = np.unique(self._states[rows], return_index=True, return_inverse=True)
            loss, column = self._loss(request, rows[first], None if usable is None else usable[first])
            loss, column = loss[inverse], column[inverse]
        else:
            loss, column = self._loss(request, rows, usable)
        scores.scores[rows] = loss + self._prices[rows]
        scores.columns[rows] = column

    def _loss(self, request: ResourceRequest, rows: Ints, usable: Bools | None) -> tuple[Floats, NDArray[np.int16]]:
        """What V falls by, with its tie-breakers, and the device to take of a fraction's candidates (else -1)."""
        capacity, gpu = self._capacity, request.gpu
        free = capacity.device[rows]
        ties = free.sum(axis=1) * (_TIE_PER_FREE_GPU / MILLI_PER_UNIT)
        cpu, memory = capacity.cpu[rows], capacity.memory[rows]
        ties += cpu * (_TIE_PER_FREE_CORE / MILLI_PER_UNIT)
        cpu, memory = cpu - request.cpu_milli, memory - request.memory_bytes
        none = np.full(len(rows), -1, dtype=np.int16)
        if gpu is None or usable is None:
            after = self._values_after(rows, cpu, memory, free)
            return self._values[rows, 1] - after[:, 1] + ties, none
        if gpu.milli == MILLI_PER_UNIT:
            taken = usable & (usable.cumsum(axis=1) <= gpu.count_min)
            for place in np.flatnonzero(self._mixed[rows]):
                columns = tightest_group(self._snapshot.device_model[rows[place]], usable[place], gpu.count_min)
                taken[place] = False
                taken[place, columns] = True
            after = self._values_after(rows, cpu, memory, free - taken * MILLI_PER_UNIT)
            return self._values[rows, 0] - after[:, 0] + ties, none
        place, column = np.nonzero(_first_of_its_kind(usable, free * self._class_count + self._classes[rows]))
        shared = free[place]
        left = shared[np.arange(len(place)), column]
        shared[np.arange(len(place)), column] = left - gpu.milli
        after = self._values_after(rows[place], cpu[place], memory[place], shared)
        losses: Floats = np.full(free.shape, np.inf)
        losses[place, column] = self._values[rows[place], 0] - after[:, 0] + left * (_TIE_PER_FREE_GPU / MILLI_PER_UNIT)
        best = losses.argmin(axis=1)
        return losses.min(axis=1) + ties, best.astype(np.int16)

    def _values_after(self, rows: Ints, cpu: Ints, memory: Ints, free: Ints) -> Floats:
        assert self._value is not None, "use() comes first"
        if not self._dirty:
            return self._value.of(rows, cpu, memory, free)
        # One call for the values after and for the present values of machines that changed: calls are what is dear.
        capacity, dirty = self._capacity, np.fromiter(self._dirty, dtype=np.int64)
        self._dirty.clear()
        values = self._value.of(
            np.concatenate((dirty, rows)),
            np.concatenate((capacity.cpu[dirty], cpu)),
            np.concatenate((capacity.memory[dirty], memory)),
            np.concatenate((capacity.device[dirty], free)),
        )
        self._values[dirty] = values[: len(dirty)]
        return values[len(dirty) :]

    def _number_state(self, row: int) -> None:
        capacity = self._capacity
        state = (
            int(capacity.cpu[row]),
            int(capacity.memory[row]),
            capacity.device[row].tobytes(),
            capacity.tenant[row].tobytes(),
            self._layouts[row],
        )
        number = self._state_numbers.get(state)
        if number is None:
            if len(self._state_numbers) >= _MAX_STATES:
                self._state_numbers.clear()
            number = self._state_numbers[state] = self._next_state
            self._next_state += 1
        self._states[row] = number


def tightest_group(models: Ints, usable: Bools, count: int) -> list[int]:
    """Columns of `count` usable devices of one model: of the smallest such set, as a larger one may stay whole."""
    by_model: dict[int, list[int]] = {}
    for column in np.flatnonzero(usable):
        by_model.setdefault(int(models[column]), []).append(int(column))
    enough = [group for group in by_model.values() if len(group) >= count]
    return min(enough, key=lambda group: (len(group), group))[:count]


def _first_of_its_kind(usable: Bools, kinds: Ints) -> Bools:
    """(rows, G): usable devices but those that have an equal one in an earlier column."""
    same = (kinds[:, :, None] == kinds[:, None, :]) & usable[:, None, :]
    earlier = np.tril(np.ones((kinds.shape[1], kinds.shape[1]), dtype=np.bool_), -1)
    return usable & ~(same & earlier).any(axis=2)


def _device_classes(snapshot: Snapshot) -> tuple[Ints, int]:
    """(M, G): devices with equal numbers are equal to every request."""
    if not snapshot.device_total.size:
        return np.zeros(snapshot.device_total.shape, dtype=np.int64), 1
    columns = (snapshot.device_total, snapshot.device_model, snapshot.device_vram, snapshot.device_capability)
    kinds = np.stack([column.ravel() for column in columns], axis=1)
    _, numbers = np.unique(kinds, axis=0, return_inverse=True)
    return numbers.reshape(snapshot.device_total.shape).astype(np.int64), int(numbers.max()) + 1
