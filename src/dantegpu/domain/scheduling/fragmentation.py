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
from dantegpu.domain.scheduling.mix import MAX_SHAPES, MixShape
from dantegpu.domain.scheduling.ranking import Columns, Floats, Pairs, tightest_group
from dantegpu.domain.scheduling.snapshot import Ints, Snapshot
from dantegpu.domain.units import MILLI_PER_UNIT

ALPHA = 0.75
"""Between asking whether a request fits (1) and how many of it fit (0). The result is flat from 0.5 to 0.8."""

# Equal losses: fewer free GPUs, then fewer free cores, then the lower price. Each step is below what the one before
# can tell apart, and all of them far above the rounding of a sum of 256 terms (1e-14).
_TIE_PER_FREE_GPU = 1e-6
_TIE_PER_FREE_CORE = 1e-9
_TIE_PRICE = 1e-12

LEVELS = MILLI_PER_UNIT + 1
_MAX_FITTING = 4 * MAX_SHAPES
_BLOCK_ROWS = 256


class FragmentationValue:
    """V(s) for one mix, over rows of one snapshot. Immutable; made anew when the mix has moved on."""

    def __init__(
        self,
        snapshot: Snapshot,
        classes: Ints,
        class_count: int,
        shapes: Sequence[MixShape],
        fitting: dict[GpuRequest, Ints] | None = None,
    ) -> None:
        """`fitting`: the classes of devices that requests accept, kept by the caller from one mix to the next."""
        fitting = {} if fitting is None else fitting
        lanes: dict[tuple[GpuRequest, int], int] = {}
        for shape in shapes:
            lanes.setdefault(_lane(shape.gpu), len(lanes))
        # Row (device class, free milli-GPUs): copies that fit a device, then its free GPUs when one fits.
        table = np.zeros((class_count, LEVELS, 2 * len(lanes)))
        levels = np.arange(LEVELS)
        for (gpu, milli), lane in lanes.items():
            if gpu not in fitting:
                fitting[gpu] = np.unique(classes[eligible_devices(snapshot, gpu)])
            table[fitting[gpu], :, lane] = levels // milli
            table[fitting[gpu], :, len(lanes) + lane] = np.where(levels >= milli, levels, 0) / MILLI_PER_UNIT
        self.devices: Floats = table.reshape(class_count * LEVELS, 2 * len(lanes))
        """What a device adds to its machine: row `class * LEVELS + free milli-GPUs`."""
        # Sorted by device count: only the tail needs a division.
        ordered = sorted(shapes, key=lambda shape: shape.gpu.count_min)
        self._slots_of = np.array([lanes[_lane(shape.gpu)] for shape in ordered], dtype=np.int64)
        self._reach_of = self._slots_of + len(lanes)
        counts = np.array([shape.gpu.count_min for shape in ordered], dtype=np.float64)
        self._single = int((counts == 1).sum())
        self._counts = counts[self._single :, None]
        self._per_cpu = 1.0 / np.array([shape.cpu_milli for shape in ordered], dtype=np.float64)
        self._per_byte = 1.0 / np.array([max(shape.memory_bytes, 1) for shape in ordered], dtype=np.float64)
        weights = np.array([shape.weight for shape in ordered], dtype=np.float64)
        self._reach_weight = ALPHA * weights
        sizes = np.array([shape.gpu.total_milli for shape in ordered], dtype=np.float64) / MILLI_PER_UNIT
        self._copies_weight = weights * sizes

    def of(self, devices: Floats, cpu: Ints, memory: Ints) -> Floats:
        """(2, B): the whole of V, and `copies` alone, in GPUs, of machines with so much free.

        `devices` (B, ...) are sums of what each of a machine's devices adds.
        """
        values = np.empty((2, len(cpu)))
        cores, sizes = cpu.astype(np.float64), memory.astype(np.float64)
        # So many machines at a time stay in the processor's cache between the steps.
        for first in range(0, len(cpu), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            self._block(devices[block], cores[block], sizes[block], values[:, block])
        return values

    def _block(self, devices: Floats, cpu: Floats, memory: Floats, values: Floats) -> None:
        # Shapes down, machines across: what is looked up are whole rows then.
        lanes = devices.T.copy()
        slots = lanes.take(self._slots_of, axis=0)
        if len(self._counts):
            tail = slots[self._single :]
            tail /= self._counts
            np.floor(tail, out=tail)
        copies = np.multiply.outer(self._per_cpu, cpu)
        np.minimum(copies, np.multiply.outer(self._per_byte, memory), out=copies)
        np.minimum(copies, slots, out=copies)
        reach = lanes.take(self._reach_of, axis=0)
        # A hair below 1: cpu * (1 / cpu) may round down.
        reach *= copies > 1 - 1e-9
        values[1] = self._copies_weight @ copies
        values[0] = self._reach_weight @ reach
        values[0] += (1 - ALPHA) * values[1]


def _lane(gpu: GpuRequest) -> tuple[GpuRequest, int]:
    """What devices are accepted, and how much of one."""
    names = tuple(sorted(gpu.names))
    return GpuRequest(names, 1, 1, MILLI_PER_UNIT, gpu.vram, gpu.compute_capability), gpu.milli


class FragmentationScorer:
    """Scores a place by how far V falls there. What machines are worth as they are now is kept."""

    def __init__(self, board: Board, shapes: Sequence[MixShape]) -> None:
        self._board = board
        snapshot = board.snapshot
        price = snapshot.price_gpu
        self.extra: Floats = np.multiply(price, _TIE_PRICE / max(int(price.max(initial=0)), 1), dtype=np.float64)
        self._offsets = board.classes * LEVELS
        self._full: Ints = np.maximum(board.alike, 0) * LEVELS + MILLI_PER_UNIT
        # Odd random weights: two states with one sum are as good as impossible, and would only share a score.
        width = snapshot.device_free.shape[1]
        random = np.random.default_rng(1).integers(1, 1 << 62, (2, width), dtype=np.int64)
        self._weights, self._amounts = random << 1 | 1, (0x5851F42D4C957F2D, 0x14057B7EF767814F, 0x2545F4914F6CDD1D)
        self._fitting: dict[GpuRequest, Ints] = {}
        self.use(shapes)

    def use(self, shapes: Sequence[MixShape]) -> None:
        """Score by this mix from now on."""
        board, machines = self._board, len(self.extra)
        if len(self._fitting) > _MAX_FITTING:
            self._fitting.clear()
        self._value = FragmentationValue(board.snapshot, board.classes, board.class_count, shapes, self._fitting)
        self._values = np.zeros((2, machines))
        self._ties = np.zeros(machines)
        self._devices = np.zeros((machines, self._value.devices.shape[1]))
        self._seen = 0

    @property
    def score_one(self) -> None:
        """What V falls by is a sum over all of the mix: never without arrays."""
        return None

    def states(self) -> Ints:
        capacity, (free, tenant) = self._board.capacity, self._weights
        cpu, memory, disk = self._amounts
        states = capacity.cpu * cpu
        states += capacity.memory * memory
        states += capacity.disk * disk
        states += (self._offsets + capacity.device) @ free
        states += capacity.tenant @ tenant
        return states

    def score(self, pairs: Pairs) -> tuple[Floats, Columns]:
        """What V falls by, with its tie-breakers, and the device to take of a fraction's candidates (else -1)."""
        capacity, row = self._board.capacity, pairs.row
        changed = self._look_at_changed()
        quick = len(row) - len(pairs.usable)
        part = pairs.milli[quick:] < MILLI_PER_UNIT
        whole, parts = quick + np.flatnonzero(~part), quick + np.flatnonzero(part)
        # One row per place that is tried: a fraction has one for each device that is in use or unlike the others.
        place, column = pairs.usable.take(parts - quick, axis=0).nonzero()
        at = np.concatenate((np.arange(quick), whole, parts.take(place)))
        # One call for the values after and for the present values of machines that changed: calls are what is dear.
        devices = self._devices.take(np.concatenate((changed, row.take(at))), axis=0)
        tried = devices[len(changed) :]
        self._take_any(pairs, tried[:quick])
        self._take_whole(pairs, whole, tried[quick : quick + len(whole)])
        left = self._take_part(pairs, parts.take(place), column, tried[quick + len(whole) :]) if len(parts) else parts
        cpu, memory = capacity.cpu.take(row) - pairs.cpu_milli, capacity.memory.take(row) - pairs.memory_bytes
        values = self._value.of(
            devices,
            np.concatenate((capacity.cpu.take(changed), cpu.take(at))),
            np.concatenate((capacity.memory.take(changed), memory.take(at))),
        )
        self._values[:, changed] = values[:, : len(changed)]
        falls = self._values.take(row.take(at), axis=1) - values[:, len(changed) :]
        losses = self._ties.take(row)
        losses[:quick] += np.where(pairs.gpus[:quick] > 0, falls[0, :quick], falls[1, :quick])
        losses[:quick] += (pairs.milli[:quick] % MILLI_PER_UNIT > 0) * _TIE_PER_FREE_GPU
        columns: Columns = np.full(len(part), -1, dtype=np.int16)
        if len(whole):
            losses[whole] += falls[0, quick : quick + len(whole)]
        if len(parts):
            options: Floats = np.full((len(parts), pairs.free.shape[1]), np.inf)
            options[place, column] = falls[0, quick + len(whole) :] + left * (_TIE_PER_FREE_GPU / MILLI_PER_UNIT)
            best = options.argmin(axis=1)
            losses[parts] += options[np.arange(len(parts)), best]
            columns[parts - quick] = best
        return losses, columns

    def _look_at_changed(self) -> Ints:
        """Machines that changed since this was asked last; what their devices are worth is up to date after it."""
        board, capacity = self._board, self._board.capacity
        changed = np.flatnonzero(board.last_change > self._seen)
        if len(changed):
            free = capacity.device.take(changed, axis=0)
            kinds = self._offsets.take(changed, axis=0) + free
            self._devices[changed] = self._value.devices.take(kinds, axis=0).sum(axis=1)
            ties = np.multiply(free.sum(axis=1), _TIE_PER_FREE_GPU / MILLI_PER_UNIT, dtype=np.float64)
            ties += capacity.cpu.take(changed) * (_TIE_PER_FREE_CORE / MILLI_PER_UNIT)
            self._ties[changed] = ties
        self._seen = board.clock
        return changed

    def _take_any(self, pairs: Pairs, left: Floats) -> None:
        """Take off `left` what goes with devices that nobody uses, or a part of one, where all are alike."""
        quick = len(left)
        full, gpus, milli = self._full.take(pairs.row[:quick]), pairs.gpus[:quick], pairs.milli[:quick]
        taken = self._value.devices.take(full, axis=0)
        parts = np.flatnonzero(milli % MILLI_PER_UNIT)
        if len(parts):
            taken[parts] -= self._value.devices.take((full - milli).take(parts), axis=0)
        taken *= gpus[:, None]
        left -= taken

    def _take_whole(self, pairs: Pairs, whole: Ints, left: Floats) -> None:
        """The same of whole devices where they are not alike."""
        quick = len(pairs.row) - len(pairs.usable)
        for number, place in enumerate(whole.tolist()):
            row, count = int(pairs.row[place]), int(pairs.gpus[place])
            columns = np.flatnonzero(pairs.usable[place - quick]).tolist()
            if self._board.mixed[row]:
                columns = tightest_group(self._board.snapshot.device_model[row].tolist(), columns, count)
            taken = self._offsets[row, columns[:count]] + MILLI_PER_UNIT
            left[number] -= self._value.devices.take(taken, axis=0).sum(axis=0)

    def _take_part(self, pairs: Pairs, places: Ints, column: Ints, left: Floats) -> Ints:
        """The same of a part of one device each; what is free there before."""
        free = pairs.free[places - (len(pairs.row) - len(pairs.usable)), column]
        before = self._offsets[pairs.row.take(places), column] + free
        left -= self._value.devices.take(before, axis=0)
        left += self._value.devices.take(before - pairs.milli.take(places), axis=0)
        return free
