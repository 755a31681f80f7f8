"""Following a job: its states on stderr, its log on stdout, its end as the exit code."""

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from dantegpu.cli import output
from dantegpu.cli.errors import EXIT_ERROR, EXIT_INTERRUPTED, CliError
from dantegpu.cli.jobs import array_counts
from dantegpu.cli.logs import write_raw
from dantegpu.cli.session import Cli

if TYPE_CHECKING:
    from dantegpu.contracts.rest.jobs import Job, JobEvent
    from dantegpu.sdk import AsyncDante

SETTLE_SECONDS = 15.0
"""How long the end is held back for the final cost."""
ARRAY_POLL_SECONDS = 0.5
_MAX_EXIT_CODE = 255


def follow(cli: Cli, job_id: str) -> int:
    """Follow a job to its end; returns what `dante run` ends with.

    Ctrl-C never stops the job by itself: on a terminal the user is asked, elsewhere they are told how to.
    """
    progress = _Progress(cli)
    while True:
        try:
            job = asyncio.run(_follow(cli, job_id, progress))
        except KeyboardInterrupt:
            if not _wants_stop(job_id):
                _say_it_goes_on(cli, job_id)
                return EXIT_INTERRUPTED
            with cli.client() as client:
                client.jobs.stop(job_id)
            output.note("stopping ...")
            continue
        return _tell_end(cli, job)


class _Progress:
    """How far we have shown the job, across restarts of the following."""

    def __init__(self, cli: Cli) -> None:
        self.seen_seq = 0
        self.log_epoch = 0
        self.log_offset = 0
        self.counts = ""
        self.write: Callable[[bytes], None] = _write_to_stderr if cli.as_json else write_raw


async def _follow(cli: Cli, job_id: str, progress: _Progress) -> "Job":
    from dantegpu.sdk import DanteError

    async with cli.async_client() as client:
        job = await client.jobs.get(job_id)
        if job.array is not None:
            return await _follow_array(client, job, progress)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_show_events(client, job_id, progress))
                tasks.create_task(_show_log(client, job_id, progress))
        except* (DanteError, OSError) as errors:
            # One of the two tasks: what it met is told, the other was cancelled for it.
            raise errors.exceptions[0] from None
        try:
            return await client.jobs.wait(job_id, timeout_seconds=SETTLE_SECONDS, settled=True)
        except TimeoutError:
            return await client.jobs.get(job_id)


async def _follow_array(client: "AsyncDante", job: "Job", progress: "_Progress") -> "Job":
    """Counts instead of logs, until every task has ended and is paid for."""
    output.note(f"· {job.id} has {job.array.size if job.array else 0} tasks")
    while not (job.state.terminal and job.settled):
        if job.array is not None and (counts := array_counts(job.array)) != progress.counts:
            progress.counts = counts
            output.note(f"· {counts}")
        await asyncio.sleep(ARRAY_POLL_SECONDS)
        job = await client.jobs.get(job.id)
    return job


async def _show_events(client: "AsyncDante", job_id: str, progress: _Progress) -> None:
    async for event in client.jobs.events(job_id, follow=True, after_seq=progress.seen_seq):
        progress.seen_seq = event.seq
        line = _event_line(event)
        if line:
            output.note(line)


def _event_line(event: "JobEvent") -> str:
    if event.type in ("ended", "settled"):
        return ""
    text = {
        "submitted": f"submitted {event.job_id}",
        "waiting": "waits",
        "placed": "placed",
        "starting": "starting",
        "running": "running",
        "stop_requested": "stopping",
        "requeued": "queued again",
    }.get(event.type, event.type)
    return f"· {text}{f': {event.message}' if event.message else ''}"


async def _show_log(client: "AsyncDante", job_id: str, progress: _Progress) -> None:
    stream = client.jobs.logs(job_id, follow=True, offset=0)
    async for piece in stream:
        if piece.epoch < progress.log_epoch:
            continue
        if piece.epoch > progress.log_epoch:
            progress.log_epoch, progress.log_offset = piece.epoch, 0
        # What was shown before an interruption is not shown twice.
        fresh = piece.data[max(0, progress.log_offset - piece.offset) :]
        if fresh:
            progress.write(fresh)
        progress.log_offset = max(progress.log_offset, piece.next_offset)


def _write_to_stderr(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def _wants_stop(job_id: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        sys.stderr.write(f"\nStop {job_id}? It goes on otherwise. [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def _say_it_goes_on(cli: Cli, job_id: str) -> None:
    output.note(f"\n{job_id} goes on. `dante logs -f {job_id}` shows it, `dante stop {job_id}` stops it and its costs.")
    if cli.as_json:
        raise CliError(f"{job_id} goes on", code="interrupted", exit_code=EXIT_INTERRUPTED)


def _tell_end(cli: Cli, job: "Job") -> int:
    exit_code = exit_code_of(job)

    def human() -> None:
        outcome = f" ({job.outcome})" if job.outcome and job.outcome.upper() != job.state else ""
        # A machine that says so too says it in the message.
        code = f", exit code {job.exit_code}" if job.exit_code and "exit code" not in job.message else ""
        output.note(f"· {job.state}{outcome}{code}{f': {job.message}' if job.message else ''}")
        seconds = sum(attempt.billed_seconds for attempt in job.attempts)
        final = "" if job.settled else " so far (not settled yet)"
        duration = "" if job.array else f" for {output.short_duration(seconds)}"
        output.note(f"· cost {output.money(job.cost_udgpu)} $dGPU{duration}{final}")
        if job.array and job.array.failed:
            output.note(
                f"· `dante show {job.id} --tasks --state FAILED` lists what failed, `dante logs {job.id}:N` says why"
            )
        if job.results:
            output.note(f"· {output.counted(len(job.results), 'result')}: `dante results {job.id} -o DIR`")

    cli.answer({"job": job, "exit_code": exit_code}, human)
    return exit_code


def exit_code_of(job: "Job") -> int:
    """The job's own exit code; 128 + n for signal n; 1 when it ended badly without one."""
    if job.state == "SUCCEEDED":
        return 0
    code = job.exit_code or 0
    if code < 0:
        code = 128 - code
    return code if 0 < code <= _MAX_EXIT_CODE else EXIT_ERROR
