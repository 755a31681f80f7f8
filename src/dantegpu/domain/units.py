"""Money, memory, durations and ranges: integers inside, one parser and one printer for each.

Money is integer micro-$dGPU. Memory is bytes; `GB` means 2**30 bytes, the same as `GiB`, as GPU vendors, Docker and the
peers' job files mean it (an "80GB" card has 80 * 2**30 bytes). Durations are whole seconds.
"""

import re
from dataclasses import dataclass
from typing import NewType, Self

MicroDgpu = NewType("MicroDgpu", int)
"""An amount of money in 1/1,000,000 $dGPU."""

UDGPU_PER_DGPU = 1_000_000
MILLI_PER_UNIT = 1000
"""milli-GPUs per GPU and milli-CPUs per CPU core."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

# Sums of amounts stay far inside PostgreSQL's bigint.
MAX_AMOUNT_UDGPU = 10**15
MAX_MEMORY_BYTES = 1 << 50
MAX_DURATION_SECONDS = 10 * 366 * 86_400

_AMOUNT = re.compile(r"(\d{1,12})(?:\.(\d{1,6}))?", re.ASCII)
_MEMORY = re.compile(r"(\d{1,16})(?:\.(\d{1,6}))?\s*([KMGTP]?)(i?B)?", re.ASCII | re.IGNORECASE)
_MEMORY_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_DURATION = re.compile(r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", re.ASCII | re.IGNORECASE)
_DURATION_SECONDS = (7 * 86_400, 86_400, 3600, 60, 1)


class InvalidQuantity(ValueError):
    """A text is not an amount, a size, a duration or a range. `expected` shows what would be right."""

    def __init__(self, what: str, text: object, expected: str) -> None:
        super().__init__(f"{what}: expected {expected}, got {text!r}")
        self.what = what
        self.text = text
        self.expected = expected


def parse_dgpu(text: str) -> MicroDgpu:
    """`"2.50"` -> 2_500_000. At most 6 decimals and no sign, so nothing is ever rounded. Raises `InvalidQuantity`."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise InvalidQuantity("amount", text, "$dGPU such as 2.50 (at most 6 decimals)")
    whole, decimals = match.group(1), match.group(2) or ""
    amount = int(whole) * UDGPU_PER_DGPU + int(decimals.ljust(6, "0"))
    if amount > MAX_AMOUNT_UDGPU:
        raise InvalidQuantity("amount", text, f"at most {format_dgpu(MicroDgpu(MAX_AMOUNT_UDGPU))} $dGPU")
    return MicroDgpu(amount)


def format_dgpu(amount: MicroDgpu | int) -> str:
    """2_500_000 -> `"2.50"`: exact, at least two decimals. `parse_dgpu` reads it back."""
    whole, rest = divmod(abs(amount), UDGPU_PER_DGPU)
    decimals = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount < 0 else ''}{whole}.{decimals}"


def parse_memory(text: str) -> int:
    """`"16GB"`, `"512MB"`, `"1.5GiB"`, `"4096"` (bytes) -> bytes, rounded down. Raises `InvalidQuantity`."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise InvalidQuantity("memory", text, "a size such as 16GB, 512MB or 1.5GB")
    whole, decimals, unit, _ = match.groups()
    shift = _MEMORY_SHIFT[unit.upper()]
    fraction = decimals or ""
    if fraction and not shift:
        raise InvalidQuantity("memory", text, "a whole number of bytes")
    size_bytes = (int(whole + fraction) << shift) // 10 ** len(fraction)
    if size_bytes > MAX_MEMORY_BYTES:
        raise InvalidQuantity("memory", text, f"at most {format_bytes(MAX_MEMORY_BYTES)}")
    return size_bytes


def format_bytes(size_bytes: int) -> str:
    """17179869184 -> `"16GB"`, 1610612736 -> `"1.5GB"`: for people, at most one decimal."""
    for unit, name in ((TIB, "TB"), (GIB, "GB"), (MIB, "MB"), (KIB, "KB")):
        if size_bytes >= unit:
            tenths = (size_bytes * 10 + unit // 2) // unit
            whole, tenth = divmod(tenths, 10)
            return f"{whole}.{tenth}{name}" if tenth else f"{whole}{name}"
    return f"{size_bytes}B"


def parse_duration(value: str | int) -> int:
    """`"8h"`, `"90s"`, `"1h30m"`, `"2d"`, `"90"` or 90 -> whole seconds. Raises `InvalidQuantity`."""
    expected = "a duration such as 90s, 30m, 1h30m or 2d"
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise InvalidQuantity("duration", value, expected)
    if isinstance(value, int):
        seconds = value
    else:
        text = value.strip().replace(" ", "")
        match = _DURATION.fullmatch(text) if len(text) <= 40 else None
        if not text or match is None:
            raise InvalidQuantity("duration", value, expected)
        parts = zip(match.groups(), _DURATION_SECONDS, strict=True)
        seconds = sum(int(count) * unit for count, unit in parts if count)
    if seconds > MAX_DURATION_SECONDS:
        raise InvalidQuantity("duration", value, f"at most {format_duration(MAX_DURATION_SECONDS)}")
    return seconds


def format_duration(seconds: int) -> str:
    """5400 -> `"1h30m"`: exact, `parse_duration` reads it back."""
    if seconds == 0:
        return "0s"
    parts: list[str] = []
    rest = abs(seconds)
    for name, unit in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, unit)
        if count:
            parts.append(f"{count}{name}")
    return ("-" if seconds < 0 else "") + "".join(parts)


def _split_range(what: str, text: str, expected: str) -> tuple[str, str | None]:
    """`"a..b"` -> (a, b), either side may be empty; no dots -> (text, None)."""
    low, dots, high = text.strip().partition("..")
    if not low.strip() and not high.strip():
        raise InvalidQuantity(what, text, expected)
    return low.strip(), high.strip() if dots else None


@dataclass(frozen=True, slots=True)
class IntRange:
    """Whole numbers from `minimum` to `maximum`, both included; no maximum is open."""

    minimum: int
    maximum: int | None

    def __post_init__(self) -> None:
        if self.minimum < 0 or (self.maximum is not None and self.maximum < self.minimum):
            raise InvalidQuantity("range", str(self), "the smaller number first")

    @classmethod
    def parse(cls, text: str | int, what: str = "range") -> Self:
        """`"4"` is exactly 4, `"2..4"`, `"16.."` at least, `"..8"` at most. Raises `InvalidQuantity`."""
        expected = "a number or a range such as 4, 2..4, 16.. or ..8"
        low, high = _split_range(what, str(text), expected)
        sides = [side for side in (low, high) if side]
        if not sides or not all(side.isascii() and side.isdigit() and len(side) <= 12 for side in sides):
            raise InvalidQuantity(what, text, expected)
        minimum = int(low) if low else 0
        if high is None:
            return cls(minimum, minimum)
        return cls(minimum, int(high) if high else None)

    def __contains__(self, value: int) -> bool:
        return self.minimum <= value and (self.maximum is None or value <= self.maximum)

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        return f"{self.minimum or ''}..{'' if self.maximum is None else self.maximum}"


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Sizes in bytes from `minimum_bytes` to `maximum_bytes`, both included; no maximum is open."""

    minimum_bytes: int
    maximum_bytes: int | None

    def __post_init__(self) -> None:
        if self.minimum_bytes < 0 or (self.maximum_bytes is not None and self.maximum_bytes < self.minimum_bytes):
            raise InvalidQuantity("memory range", str(self), "the smaller size first")

    @classmethod
    def parse(cls, text: str | int, what: str = "memory range") -> Self:
        """`"24GB"` and `"24GB.."` are at least 24GB, `"40GB..80GB"` both ends, `"..8GB"` at most.

        Raises `InvalidQuantity`.
        """
        low, high = _split_range(what, str(text), "a size or a range such as 24GB, 24GB.., 40GB..80GB")
        if high and low.isdigit():
            low += high.lstrip("0123456789. ")  # "40..80GB": the unit is said once
        return cls(parse_memory(low) if low else 0, parse_memory(high) if high else None)

    def __contains__(self, size_bytes: int) -> bool:
        return self.minimum_bytes <= size_bytes and (self.maximum_bytes is None or size_bytes <= self.maximum_bytes)

    def __str__(self) -> str:
        low = format_bytes(self.minimum_bytes) if self.minimum_bytes else ""
        return f"{low}..{'' if self.maximum_bytes is None else format_bytes(self.maximum_bytes)}"
