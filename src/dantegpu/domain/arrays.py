"""Arrays: one submission, many tasks that differ in their environment. Also what the end of an array means."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from dantegpu.domain.job import JobState, Outcome

MAX_ARRAY_TASKS = 100_000
MAX_AXES = 16
MAX_AXIS_VALUES = 10_000
"""Of values that are listed; a range may be as long as an array."""
MAX_VALUE_LENGTH = 1000
INDEX_VARIABLE = "DANTE_ARRAY_INDEX"
SIZE_VARIABLE = "DANTE_ARRAY_SIZE"
_RANGE = re.compile(r"(-?\d{1,12})\.\.(-?\d{1,12})", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}", re.ASCII)


class InvalidArray(ValueError):
    """What was given is no array that can be run; the text says why."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One variable of a sweep and what it takes in turn: listed values, or `count` whole numbers from `first` on."""

    name: str
    values: tuple[str, ...] = ()
    first: int = 0
    count: int = 0

    @classmethod
    def parse(cls, name: str, value: object) -> "Axis":
        """`[0.1, 0.01]`, one value, or a range such as `0..9` (both ends included). Raises InvalidArray."""
        if not _NAME.fullmatch(name) or name.upper().startswith("DANTE_"):
            raise InvalidArray(
                f"{name[:80]!r} cannot be a task's variable: letters, digits and _, not beginning with DANTE_"
            )
        match = _RANGE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None:
            first, last = int(match[1]), int(match[2])
            if last < first:
                raise InvalidArray(f"{name}: {value}: the smaller number comes first")
            return cls(name, first=first, count=last - first + 1)
        items = cast("Sequence[object]", value) if isinstance(value, list | tuple) else [value]
        if not 1 <= len(items) <= MAX_AXIS_VALUES:
            raise InvalidArray(
                f"{name}: {len(items)} values; 1 to {MAX_AXIS_VALUES} may be listed; a range such as 0..9 may be longer"
            )
        return cls(name, tuple(_text(name, item) for item in items))

    def __len__(self) -> int:
        return self.count or len(self.values)

    def __getitem__(self, index: int) -> str:
        return str(self.first + index) if self.count else self.values[index]


def _text(name: str, item: object) -> str:
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise InvalidArray(f"{name}: the values must be texts or numbers, such as [0.1, 0.01], [a, b] or 0..9")
    text = str(item)
    if len(text) > MAX_VALUE_LENGTH or "\0" in text:
        raise InvalidArray(f"{name}: a value is longer than {MAX_VALUE_LENGTH} characters or holds a NUL character")
    return text


@dataclass(frozen=True, slots=True)
class Array:
    """`size` tasks; with axes one for each combination of their values, the last axis varying fastest."""

    size: int
    axes: tuple[Axis, ...] = ()

    @classmethod
    def of(cls, axes: Sequence[Axis]) -> "Array":
        """The cartesian product. Raises InvalidArray."""
        if not 1 <= len(axes) <= MAX_AXES:
            raise InvalidArray(f"{len(axes)} variables; a sweep has 1 to {MAX_AXES}")
        size = 1
        for axis in axes:
            size *= len(axis)
        return cls.plain(size, tuple(axes))

    @classmethod
    def plain(cls, size: int, axes: tuple[Axis, ...] = ()) -> "Array":
        """Raises InvalidArray when there would be no task, or more than MAX_ARRAY_TASKS."""
        if not 1 <= size <= MAX_ARRAY_TASKS:
            raise InvalidArray(f"the array has {size} tasks; 1 to {MAX_ARRAY_TASKS} are accepted (MAX_ARRAY_TASKS)")
        return cls(size, axes)

    def environment(self, index: int) -> dict[str, str]:
        """What task `index` finds in its environment beyond the job's own variables."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        found = {INDEX_VARIABLE: str(index), SIZE_VARIABLE: str(self.size)}
        rest = index
        for axis in reversed(self.axes):
            rest, place = divmod(rest, len(axis))
            found[axis.name] = axis[place]
        return found


@dataclass(frozen=True, slots=True)
class Ending:
    """How an array ended."""

    state: JobState
    outcome: Outcome
    message: str


def ending(size: int, counts: Mapping[JobState, int], stopped: Outcome | None) -> Ending:
    """What the end of the last task means for the array. Tasks that were never created count as cancelled.

    `stopped` is what a stop of the whole made of tasks that waited.
    """
    succeeded, failed = counts.get(JobState.SUCCEEDED, 0), counts.get(JobState.FAILED, 0)
    cancelled = size - succeeded - failed
    message = f"{succeeded} of {size} tasks succeeded"
    if succeeded == size:
        return Ending(JobState.SUCCEEDED, Outcome.SUCCEEDED, message)
    rest = [f"{failed} failed" if failed else "", f"{cancelled} were cancelled" if cancelled else ""]
    message = ", ".join([message, *filter(None, rest)])
    if stopped is Outcome.CANCELLED:
        return Ending(JobState.CANCELLED, stopped, message)
    return Ending(JobState.FAILED, stopped or Outcome.FAILED, message)
