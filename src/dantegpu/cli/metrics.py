"""`dante metrics`: what a job uses, as curves that fit a terminal."""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from dantegpu.cli import output, refs
from dantegpu.cli.jobs import JOB
from dantegpu.cli.session import FOLLOW_RETRY_SECONDS, Cli, command
from dantegpu.domain.units import format_bytes, format_duration

if TYPE_CHECKING:
    from dantegpu.contracts.rest.jobs import DeviceUse, Job, Metrics, MetricsPoint
    from dantegpu.sdk import Dante

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
FORGET_POINTS = 2000
"""With --watch: how many points are kept to draw from."""

type Value = Callable[["MetricsPoint"], float | None]


@command("metrics")
@JOB
@click.option("-w", "--watch", is_flag=True, help="Go on until the job has ended.")
@click.option("--attempt", type=click.IntRange(0), default=0, help="Which attempt (1, 2, ...); default: the latest.")
def metrics(cli: Cli, job: str, watch: bool, attempt: int) -> None:
    """Show what a job uses: CPU, memory, disks, and its GPUs, a point every 5 s.

    A job that runs for less than 5 s has no points. With --watch --json: one object per new point, a line each.
    """
    with cli.client(retry_seconds=FOLLOW_RETRY_SECONDS if watch else 60.0) as client:
        job_id = refs.job_id(client, job)
        if watch:
            _watch(cli, client, job_id, attempt)
            return
        found = client.jobs.metrics(job_id, epoch=attempt)
        about = client.jobs.get(job_id)
    cli.answer({"metrics": found}, lambda: _print(found, about))


def _watch(cli: Cli, client: "Dante", job_id: str, attempt: int) -> None:
    points: list[MetricsPoint] = []
    drawn_lines, epoch, ended = 0, attempt, False
    while True:
        job = client.jobs.get(job_id)
        # Asked after the job: what it used before its end is among the answer.
        ended = job.state.terminal
        found = client.jobs.metrics(job_id, epoch=attempt, after=points[-1].number if points else 0)
        if found.epoch != epoch:
            points, epoch = [], found.epoch
            found = client.jobs.metrics(job_id, epoch=attempt)
        points = [*points, *found.points][-FORGET_POINTS:]
        if cli.as_json:
            for point in found.points:
                output.print_json({"point": {"job_id": job_id, "epoch": epoch, **output.to_plain(point)}})
        else:
            lines = _lines(found.model_copy(update={"points": points}), job)
            drawn_lines = _redraw(lines, drawn_lines)
        if ended:
            return
        time.sleep(found.interval_seconds)


def _redraw(lines: Sequence[str], drawn_lines: int) -> int:
    """Over what was drawn before, on a terminal; one block after another elsewhere."""
    if drawn_lines and sys.stdout.isatty():
        output.say(f"\x1b[{drawn_lines}F\x1b[J" + "\n".join(lines))
    else:
        output.say("\n".join(lines))
    sys.stdout.flush()
    return len(lines)


def _print(found: "Metrics", job: "Job") -> None:
    for line in _lines(found, job):
        output.say(line)


def _lines(found: "Metrics", job: "Job") -> list[str]:
    if not found.points:
        why = "it has not started" if job.started_at is None else "the first point comes after 5 s of running"
        return [f"{job.id} ({job.state}): no metrics yet; {why}" if not job.state.terminal else
                f"{job.id} ({job.state}) has no metrics: it ran for less than 5 s"]  # fmt: skip
    last = found.points[-1]
    rows: list[tuple[str, Value, Callable[[float], str], float | None]] = [
        ("CPU", lambda p: p.cpu_cores, _cores, None),
        ("memory", lambda p: p.memory_bytes, _bytes, None),
        ("disk read", lambda p: p.read_bytes_per_second, _rate, None),
        ("disk write", lambda p: p.written_bytes_per_second, _rate, None),
    ]
    for device in last.devices:
        rows += [
            (f"GPU {device.index}", _of(device.index, lambda d: d.gpu_utilisation), _percent, 1.0),
            ("  memory", _of(device.index, lambda d: d.vram_used_bytes), _bytes, None),
            ("  power", _of(device.index, lambda d: d.power_watts), _watts, None),
            ("  temperature", _of(device.index, lambda d: d.temperature_celsius), _celsius, 100.0),
        ]
    lines = [f"{job.id}  {job.name}  {job.state}  attempt {found.epoch}, {format_duration(int(last.elapsed_seconds))}"]
    for name, value, show, top in rows:
        values = [number for point in found.points if (number := value(point)) is not None]
        if values:
            curve = sparkline(values, top=top)
            lines.append(f"{name:<13}  {curve:<{CURVE_WIDTH}}  {show(values[-1])}, at most {show(max(values))}")
    slow = sorted({reason for device in last.devices for reason in device.throttle_reasons})
    if slow:
        lines.append(f"slowed down by: {', '.join(slow)}")
    return lines


def _of(index: int, value: "Callable[[DeviceUse], float]") -> Value:
    return lambda point: next((value(device) for device in point.devices if device.index == index), None)


def _bytes(value: float) -> str:
    return format_bytes(int(value))


def _cores(value: float) -> str:
    return f"{value:.2f} cores"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _watts(value: float) -> str:
    return f"{value:.0f} W"


def _celsius(value: float) -> str:
    return f"{value:.0f} °C"


def _rate(value: float) -> str:
    return f"{format_bytes(int(value))}/s"


def sparkline(values: Sequence[float], *, top: float | None = None, width: int = CURVE_WIDTH) -> str:
    """A curve of bars from 0 to `top` (the largest value when None); of many values, the largest of each part."""
    if len(values) > width:
        edges = [round(part * len(values) / width) for part in range(width + 1)]
        values = [max(values[begin:end]) for begin, end in itertools.pairwise(edges)]
    highest = top if top is not None else max(values, default=0.0)
    if highest <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[min(len(BARS) - 1, int(max(0.0, value) / highest * len(BARS)))] for value in values)
