"""What commands print: one JSON document for programs; tables and sentences for people."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, cast

from dantegpu.domain.units import format_dgpu, format_duration

type Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


def to_plain(value: object) -> Any:
    """Models, dates and enums as what JSON has."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in cast("Sequence[object]", value)]
    return value


def print_json(document: Mapping[str, object]) -> None:
    """One document on one line of stdout."""
    sys.stdout.write(json.dumps(to_plain(document), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str = "") -> None:
    """A line of the answer."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """A line about the answer or the work: on stderr, so that pipes see the answer only."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def counted(number: float | str, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}{'' if str(number) == '1' else 's'}"


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Aligned columns. `right` names the columns of numbers.

    On a terminal that is too narrow, free text is cut; ids never are: they are there to be copied.
    """
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    on_terminal = sys.stdout.isatty()
    if on_terminal:
        _fit(headers, widths, shutil.get_terminal_size().columns)
    coloured = on_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for number, row in enumerate([headers, *rows]):
        cells: list[str] = []
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            shown = text if len(text) <= width else text[: width - 1] + "…"
            padded = shown.rjust(width) if column in right else shown.ljust(width)
            style = "1" if number == 0 else _STYLES.get(text)
            cells.append(f"\x1b[{style}m{padded}\x1b[0m" if coloured and style else padded)
        say("  ".join(cells).rstrip())


def _fit(headers: Sequence[str], widths: list[int], columns: int) -> None:
    """Narrow the free-text columns, the last one first."""
    for column in reversed(range(len(headers))):
        too_wide = sum(widths) + 2 * (len(widths) - 1) - columns
        if too_wide > 0 and headers[column] in _FREE_TEXT:
            widths[column] = min(widths[column], max(len(headers[column]), _MIN_TEXT_WIDTH, widths[column] - too_wide))


_FREE_TEXT = frozenset({"NAME", "REASON", "REMARK", "TEXT"})
_MIN_TEXT_WIDTH = 12
_GREEN, _RED, _YELLOW, _CYAN = "32", "31", "33", "36"
_STYLES = {
    "RUNNING": _GREEN, "SUCCEEDED": _GREEN, "FAILED": _RED, "CANCELLED": _YELLOW, "STOPPING": _YELLOW, "QUEUED": _CYAN,
    "idle": _GREEN, "busy": _GREEN, "offline": _RED, "unknown": _YELLOW,
}  # fmt: skip


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """`name  value` lines; those without a value are left out."""
    shown = [(name, str(value)) for name, value in fields if value not in (None, "", [])]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        first, *more = value.split("\n")
        say(f"{name.ljust(width)}  {first}")
        for line in more:
            say(" " * (width + 2) + line)


@contextmanager
def progress(what: str, *, quiet: bool = False) -> Generator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda done_bytes, total_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)


def money(amount_udgpu: int) -> str:
    """`"2.50"`"""
    return format_dgpu(amount_udgpu)


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """`"3m ago"`: one unit, for tables."""
    if moment is None:
        return ""
    seconds = int(((now or datetime.now(UTC)) - moment).total_seconds())
    return f"{short_duration(max(seconds, 0))} ago"


def short_duration(seconds: int) -> str:
    """3725 -> `"1h2m"`: the two largest units."""
    for unit in (86_400, 3600, 60):
        if seconds >= unit:
            smaller = {86_400: 3600, 3600: 60, 60: 1}[unit]
            return format_duration(seconds - seconds % smaller)
    return format_duration(seconds)


def local_time(moment: datetime | None) -> str:
    """`"2026-11-23 20:15:01"` in the user's own zone."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""
