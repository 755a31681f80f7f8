"""What a job asks for and what a machine has. GPUs in 1/1000 GPU, CPUs in 1/1000 core, sizes in bytes.

The GPU spec is `NAME[,NAME...][:MEMORY][:COUNT]`, in any order, each part optional: `H100:8`, `24GB`, `2`,
`A100:40GB..80GB:2`, `RTX4090:1..2`, `0.5` (a fraction of one device), `cc8.0..` (compute capability), or the same as a
mapping `{name: [A100, H100], count: 1..2, memory: 24GB.., compute_capability: 8.0..}`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self, cast

from dantegpu.domain.gpus import find_known_gpu, matches_model, model_key, nearest_gpu_name
from dantegpu.domain.ids import DeviceId, MachineId, TeamId
from dantegpu.domain.units import (
    GIB,
    MIB,
    MILLI_PER_UNIT,
    IntRange,
    InvalidQuantity,
    MemoryRange,
    format_bytes,
    parse_memory,
)

MAX_GPUS_PER_JOB = 64
MAX_GPU_NAMES = 16
MAX_SPEC_LENGTH = 500
MAX_CPU_MILLI = 4096 * MILLI_PER_UNIT
DEFAULT_CPU_MILLI = 1 * MILLI_PER_UNIT
DEFAULT_MEMORY_BYTES = 1 * GIB
DEFAULT_DISK_BYTES = 1 * GIB

# A "24GB" card reports 22.5 to 24 GB: ECC and the driver keep up to 1/15. The next smaller size on sale, 22 GB, is
# 1/12 below. A request's lower bound is met from this part of it on, in 1/1000.
VRAM_TOLERANCE_MILLI = 920

_FRACTION = re.compile(r"0\.\d{1,3}", re.ASCII)
_CAPABILITY = re.compile(r"(\d{1,2})(?:\.(\d))?", re.ASCII)
_COUNT = re.compile(r"\d+|\d*\.\.\d*", re.ASCII)
_MEMORY = re.compile(r"[\d.\s]*\d\s*[KMGTP]?i?B?\s*(\.\..*)?|\.\..*", re.ASCII | re.IGNORECASE)
_CPU = re.compile(r"(\d{1,5})(?:\.(\d{1,3}))?", re.ASCII)
_MAPPING_KEYS = ("name", "count", "memory", "compute_capability")


class InvalidGpuSpec(ValueError):
    """The GPU spec cannot be read. `position` counts characters from 0, `nearest` is a known name close to it."""

    def __init__(self, spec: object, position: int, expected: str, nearest: str | None = None) -> None:
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        super().__init__(f"GPU spec {str(spec)[:80]!r}, character {position + 1}: expected {expected}{hint}")
        self.spec = spec
        self.position = position
        self.expected = expected
        self.nearest = nearest


@dataclass(frozen=True, slots=True)
class CapabilityRange:
    """CUDA compute capabilities, major * 10 + minor, both ends included."""

    minimum: int
    maximum: int | None

    def __contains__(self, capability: int) -> bool:
        return self.minimum <= capability and (self.maximum is None or capability <= self.maximum)

    def __str__(self) -> str:
        low = format_capability(self.minimum)
        if self.minimum == self.maximum:
            return low
        return f"{low if self.minimum else ''}..{'' if self.maximum is None else format_capability(self.maximum)}"


def format_capability(capability: int) -> str:
    """89 -> `"8.9"`; 0 (does not apply) -> `""`."""
    return f"{capability // 10}.{capability % 10}" if capability else ""


def parse_capability(text: str) -> int:
    """`"8.9"` -> 89, `"8"` -> 80, `""` -> 0. Raises `InvalidQuantity`."""
    if not text:
        return 0
    match = _CAPABILITY.fullmatch(text.strip())
    if match is None:
        raise InvalidQuantity("compute capability", text, "a number such as 8.9")
    return int(match.group(1)) * 10 + int(match.group(2) or 0)


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """GPUs on one machine, all of one model.

    `names` empty: any model. `milli` is the share of each device: 1000, or less for a fraction of a single one.
    A job gets `count_min` devices; `count_max` is what it could use.
    """

    names: tuple[str, ...] = ()
    count_min: int = 1
    count_max: int | None = 1
    milli: int = MILLI_PER_UNIT
    vram: MemoryRange | None = None
    compute_capability: CapabilityRange | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.count_min <= MAX_GPUS_PER_JOB:
            raise ValueError(f"a job has 1 to {MAX_GPUS_PER_JOB} GPUs, not {self.count_min}")
        if self.count_max is not None and self.count_max < self.count_min:
            raise ValueError("count_max is below count_min")
        if not 1 <= self.milli <= MILLI_PER_UNIT or (self.milli < MILLI_PER_UNIT and self.count_min != 1):
            raise ValueError("a fraction is a part of one GPU")

    @property
    def total_milli(self) -> int:
        """milli-GPUs that the job holds and pays for."""
        return self.count_min * self.milli

    def accepts_model(self, model: str) -> bool:
        return not self.names or any(matches_model(name, model) for name in self.names)

    def accepts_vram(self, vram_bytes: int) -> bool:
        """Nominal sizes: the lower bound allows for what ECC and the driver keep (VRAM_TOLERANCE_MILLI)."""
        if self.vram is None:
            return True
        enough = vram_bytes * 1000 >= self.vram.minimum_bytes * VRAM_TOLERANCE_MILLI
        return enough and (self.vram.maximum_bytes is None or vram_bytes <= self.vram.maximum_bytes)

    def accepts_capability(self, capability: int) -> bool:
        return self.compute_capability is None or capability in self.compute_capability

    def __str__(self) -> str:
        """The canonical spec; `parse_gpu_spec` reads it back as the same request."""
        parts = [",".join(self.names)] if self.names else []
        if self.vram is not None:
            parts.append(_exact_memory_range(self.vram))
        if self.compute_capability is not None:
            parts.append(f"cc{self.compute_capability}")
        if self.milli < MILLI_PER_UNIT:
            parts.append(f"0.{self.milli:03d}".rstrip("0"))
        elif self.count_min != 1 or self.count_max != 1 or not parts:
            parts.append(str(IntRange(self.count_min, self.count_max)))
        return ":".join(parts)


def _exact_memory_range(sizes: MemoryRange) -> str:
    def exact(size_bytes: int) -> str:
        text = format_bytes(size_bytes)
        return text if parse_memory(text) == size_bytes else f"{size_bytes}B"

    low = exact(sizes.minimum_bytes) if sizes.minimum_bytes else ""
    return f"{low}..{'' if sizes.maximum_bytes is None else exact(sizes.maximum_bytes)}"


def parse_gpu_spec(spec: str | int | float | Mapping[str, object], also_known: Iterable[str] = ()) -> GpuRequest:
    """Read a GPU spec (see the module's head). `also_known` are model names beside KNOWN_GPUS, such as the fleet's.

    Raises `InvalidGpuSpec` with the position, what was expected there, and the nearest known name.
    """
    if isinstance(spec, Mapping):
        return _from_mapping(spec, also_known)
    text = str(spec)
    if isinstance(spec, bool) or len(text) > MAX_SPEC_LENGTH or not text.strip():
        raise InvalidGpuSpec(text, 0, "a spec such as RTX4090:2, 24GB or A100:40GB..80GB:2")
    parts = _SpecParts(text, tuple(also_known))
    position = 0
    for token in text.split(":"):
        parts.add(token.strip(), position + len(token) - len(token.lstrip()))
        position += len(token) + 1
    return parts.request()


class _SpecParts:
    """The parts of one spec as they are read; each may come once."""

    def __init__(self, spec: object, also_known: tuple[str, ...]) -> None:
        self._spec = spec
        self._also_known = also_known
        self._names: tuple[str, ...] = ()
        self._count: IntRange | None = None
        self._milli = MILLI_PER_UNIT
        self._vram: MemoryRange | None = None
        self._capability: CapabilityRange | None = None

    def add(self, token: str, position: int) -> None:
        lowered = token.lower()
        if not token:
            raise InvalidGpuSpec(self._spec, position, "a name, a memory size or a count between the colons")
        if lowered.startswith("cc") and re.fullmatch(r"[\d.]+", token[2:]):
            self.add_capability(token[2:], position)
        elif _FRACTION.fullmatch(token) or _COUNT.fullmatch(token):
            self.add_count(token, position)
        elif _MEMORY.fullmatch(token):
            self.add_memory(token, position)
        else:
            self.add_names(token.split(","), position)

    def add_names(self, names: Iterable[str], position: int) -> None:
        if self._names:
            raise InvalidGpuSpec(self._spec, position, "a memory size or a count (names are separated by commas)")
        canonical: list[str] = []
        for raw in names:
            name = raw.strip()
            offset = position + len(raw) - len(raw.lstrip())
            canonical.append(self._canonical(name, offset))
            position += len(raw) + 1
        if len(canonical) > MAX_GPU_NAMES:
            raise InvalidGpuSpec(self._spec, position, f"at most {MAX_GPU_NAMES} names")
        self._names = tuple(dict.fromkeys(canonical))

    def _canonical(self, name: str, position: int) -> str:
        known = find_known_gpu(name) if name else None
        if known is not None:
            # "A100-80GB" stays narrower than "A100".
            return known.name if model_key(name) == model_key(known.name) else name
        if name and any(matches_model(name, model) for model in self._also_known):
            return name
        nearest = nearest_gpu_name(name, self._also_known) if name else None
        raise InvalidGpuSpec(self._spec, position, "a known GPU name such as RTX4090 or H100", nearest)

    def add_count(self, token: str, position: int) -> None:
        if self._count is not None or self._milli < MILLI_PER_UNIT:
            raise InvalidGpuSpec(self._spec, position, "only one count")
        if _FRACTION.fullmatch(token):
            self._milli = int(token[2:].ljust(3, "0"))
            if not self._milli:
                raise InvalidGpuSpec(self._spec, position, "a fraction from 0.001 to 0.999")
            return
        try:
            count = IntRange.parse(token)
        except InvalidQuantity as error:
            raise InvalidGpuSpec(self._spec, position, f"a count: {error.expected}") from error
        count = IntRange(max(count.minimum, 1), count.maximum) if ".." in token and count.maximum != 0 else count
        if not 1 <= count.minimum <= MAX_GPUS_PER_JOB:
            nearest = nearest_gpu_name(token) if token.isdigit() else None
            raise InvalidGpuSpec(self._spec, position, f"a count from 1 to {MAX_GPUS_PER_JOB}", nearest)
        self._count = count

    def add_memory(self, token: str, position: int) -> None:
        if self._vram is not None:
            raise InvalidGpuSpec(self._spec, position, "only one memory size")
        try:
            vram = MemoryRange.parse(token)
        except InvalidQuantity as error:
            raise InvalidGpuSpec(self._spec, position, "a memory size such as 24GB or 40GB..80GB") from error
        if max(vram.minimum_bytes, vram.maximum_bytes or 0) < MIB:
            raise InvalidGpuSpec(self._spec, position, "a memory size with its unit, such as 24GB")
        self._vram = vram

    def add_capability(self, token: str, position: int) -> None:
        low, dots, high = token.partition("..")
        try:
            minimum, maximum = parse_capability(low), parse_capability(high)
        except InvalidQuantity as error:
            raise InvalidGpuSpec(self._spec, position, "a compute capability such as 8.0 or 8.0..") from error
        top = (maximum or None) if dots else minimum
        if (not minimum and not maximum) or (top is not None and top < minimum):
            raise InvalidGpuSpec(self._spec, position, "a compute capability such as 8.0 or 8.0..")
        self._capability = CapabilityRange(minimum, top)

    def request(self) -> GpuRequest:
        count = self._count or IntRange(1, 1)
        return GpuRequest(self._names, count.minimum, count.maximum, self._milli, self._vram, self._capability)


def _from_mapping(spec: Mapping[str, object], also_known: Iterable[str]) -> GpuRequest:
    parts = _SpecParts(dict(spec), tuple(also_known))
    for key, value in spec.items():
        text = str(value)
        match key:
            case "name":
                names = cast("list[object]", value) if isinstance(value, list) else text.split(",")
                parts.add_names([str(name) for name in names], 0)
            case "count":
                if not (_FRACTION.fullmatch(text) or _COUNT.fullmatch(text)):
                    raise InvalidGpuSpec(dict(spec), 0, f"a count such as 2, 1..2 or 0.5 in 'count', not {text!r}")
                parts.add_count(text, 0)
            case "memory":
                parts.add_memory(text, 0)
            case "compute_capability":
                parts.add_capability(text, 0)
            case _:
                close = difflib.get_close_matches(str(key), _MAPPING_KEYS, n=1)
                expected = f"one of {', '.join(_MAPPING_KEYS)}, not {str(key)!r}"
                raise InvalidGpuSpec(dict(spec), 0, expected, close[0] if close else None)
    return parts.request()


def parse_cpu_milli(value: str | int | float) -> int:
    """`4`, `"0.5"`, `"16.."` -> milli-CPUs; of a range the lower end. Raises `InvalidQuantity`."""
    text = str(value).strip().removesuffix("..") if not isinstance(value, bool) else ""
    low, _, high = text.partition("..")
    match = _CPU.fullmatch(low)
    if match is None or (high and _CPU.fullmatch(high) is None):
        raise InvalidQuantity("cpu", value, "a number of cores such as 4, 0.5 or 16..")
    milli = int(match.group(1)) * MILLI_PER_UNIT + int((match.group(2) or "").ljust(3, "0"))
    if not 1 <= milli <= MAX_CPU_MILLI:
        raise InvalidQuantity("cpu", value, f"0.001 to {MAX_CPU_MILLI // MILLI_PER_UNIT} cores")
    return milli


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """What one attempt holds on its machine."""

    gpu: GpuRequest | None = None
    cpu_milli: int = DEFAULT_CPU_MILLI
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    disk_bytes: int = DEFAULT_DISK_BYTES

    def __post_init__(self) -> None:
        if self.cpu_milli < 1 or self.memory_bytes < 0 or self.disk_bytes < 0:
            raise ValueError("an attempt holds at least 1 milli-CPU and no negative sizes")

    @classmethod
    def parse(
        cls,
        gpu: str | int | float | Mapping[str, object] | None = None,
        cpu: str | int | float | None = None,
        memory: str | int | None = None,
        disk: str | int | None = None,
    ) -> Self:
        """From a job file's words; of ranges the lower end. Raises `InvalidGpuSpec` and `InvalidQuantity`."""
        return cls(
            gpu=None if gpu is None or str(gpu).strip() in ("", "0") else parse_gpu_spec(gpu),
            cpu_milli=DEFAULT_CPU_MILLI if cpu is None else parse_cpu_milli(cpu),
            memory_bytes=DEFAULT_MEMORY_BYTES if memory is None else MemoryRange.parse(memory, "memory").minimum_bytes,
            disk_bytes=DEFAULT_DISK_BYTES if disk is None else MemoryRange.parse(disk, "disk").minimum_bytes,
        )


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU of a machine. `index` is its place on the machine; `compute_capability` is 89 for 8.9, 0 for none.

    `withheld`: it is there, but nothing may be placed on it now (a fault, or somebody else uses it).
    """

    id: DeviceId
    index: int
    model: str
    vram_bytes: int
    compute_capability: int = 0
    simulated: bool = False
    withheld: bool = False


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """One machine as placement sees it: totals that may be leased, prices, and who may use it.

    `schedulable`: alive and taking new work. `sandboxed` False or any simulated device: only its own team's jobs.
    `allowed_images`: patterns; empty: all. `networks`: jobs that may have one: plain (without an image), image;
    ports: those with an image may publish some; gang: their nodes reach one another within `site`, a name that means
    something within the team only. `address`: where others reach it.
    """

    id: MachineId
    team_id: TeamId
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    devices: tuple[DeviceInfo, ...] = ()
    price_udgpu_per_gpu_hour: int = 0
    price_udgpu_per_cpu_hour: int = 0
    region: str = ""
    schedulable: bool = True
    sandboxed: bool = True
    runs_images: bool = False
    allowed_images: tuple[str, ...] = ()
    networks: frozenset[str] = frozenset()
    site: str = ""
    address: str = ""
    allows_fractions: bool = True

    @property
    def simulated(self) -> bool:
        return any(device.simulated for device in self.devices)
