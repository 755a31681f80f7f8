"""`dante ps`, `show`, `stop`, `why`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from dantegpu.cli import output, refs
from dantegpu.cli.session import Cli, command

if TYPE_CHECKING:
    from dantegpu.contracts.rest.jobs import ArrayProgress, Attempt, Explanation, Job, JobPage
    from dantegpu.contracts.rest.spec import Checkpoint

JOB = click.argument("job", metavar="JOB")
_LIMIT = click.option("-n", "--limit", type=click.IntRange(1, 500), default=20, show_default=True, help="How many.")
_CURSOR = click.option("--cursor", help="Go on where the last page ended.")
_REASON_WIDTH = 60
_STATES = ("QUEUED", "PLACED", "STARTING", "RUNNING", "STOPPING", "SUCCEEDED", "FAILED", "CANCELLED")


@command("ps")
@click.option("-a", "--all", "every", is_flag=True, help="Also jobs that have ended (the newest first).")
@_LIMIT
@_CURSOR
def ps(cli: Cli, every: bool, limit: int, cursor: str | None) -> None:
    """List your team's jobs that have not ended; with --all, all of them."""
    from dantegpu.domain.job import JobState

    states = () if every else [state for state in JobState if not state.terminal]
    with cli.client() as client:
        page = client.jobs.list(states=states, cursor=cursor, limit=limit)

    def human() -> None:
        _print_jobs(page.jobs)
        if not page.jobs:
            output.note("no jobs" if every else "no jobs are waiting or running; `dante ps --all` lists the ended ones")
        if page.next_cursor:
            output.note(f"more with --cursor {page.next_cursor}")

    cli.answer({"jobs": page.jobs, "next_cursor": page.next_cursor}, human)


@command("jobs")
@_LIMIT
@_CURSOR
def admin_jobs(cli: Cli, limit: int, cursor: str | None) -> None:
    """List the jobs of all teams, the newest first."""
    with cli.client() as client:
        page = client.admin.jobs(cursor=cursor, limit=limit)

    def human() -> None:
        _print_jobs(page.jobs)
        if page.next_cursor:
            output.note(f"more with --cursor {page.next_cursor}")

    cli.answer({"jobs": page.jobs, "next_cursor": page.next_cursor}, human)


def _print_jobs(jobs: "Sequence[Job]") -> None:
    if not jobs:
        return
    rows = [
        [job.id, job.name, job.state, job.spec.resources.gpu or "cpu", output.money(job.cost_udgpu),
         output.ago(job.created_at), _remark(job)]
        for job in jobs
    ]  # fmt: skip
    output.print_table(["ID", "NAME", "STATE", "GPU", "$dGPU", "SUBMITTED", "REASON"], rows, right=[4])


def _remark(job: "Job") -> str:
    if job.array is not None:
        return array_counts(job.array)
    if job.state == "QUEUED":
        return shorten(job.reason_text or job.reason or "")
    if job.exit_code:
        return f"exit code {job.exit_code}"
    return shorten(job.message)


def array_counts(array: "ArrayProgress") -> str:
    """`"812/10000 ended, 3 failed, 8 running"`"""
    at_work = array.placed + array.starting + array.running + array.stopping
    parts = [
        f"{array.ended}/{array.size} ended",
        f"{array.failed} failed" if array.failed else "",
        f"{array.cancelled} cancelled" if array.cancelled else "",
        f"{at_work} running" if at_work else "",
    ]
    return ", ".join(part for part in parts if part)


def shorten(text: str) -> str:
    """The first line, bounded."""
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= _REASON_WIDTH else line[: _REASON_WIDTH - 1] + "…"


@command("show")
@JOB
@click.option("--tasks", "with_tasks", is_flag=True, help="List the tasks of an array.")
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES, case_sensitive=False),
              help="Only tasks in this state; may come several times.")  # fmt: skip
@_LIMIT
@_CURSOR
def show(cli: Cli, job: str, with_tasks: bool, states: tuple[str, ...], limit: int, cursor: str | None) -> None:
    """Show a job with its attempts and results. JOB is an id, `last`, a job's name or enough of an id.

    `JOB:17` is task 17 of an array, here and wherever a JOB is asked for. `--tasks` lists an array's tasks.
    """
    from dantegpu.domain.job import JobState

    with cli.client() as client:
        job_id = refs.job_id(client, job)
        if with_tasks or states:
            wanted = [JobState(state.upper()) for state in states]
            page = client.jobs.tasks(job_id, states=wanted, cursor=cursor, limit=limit)
            cli.answer({"tasks": page.jobs, "next_cursor": page.next_cursor}, lambda: _print_tasks(job_id, page))
            return
        found = client.jobs.get(job_id)
    cli.answer({"job": found}, lambda: _print_job(found))


def _print_tasks(job_id: str, page: "JobPage") -> None:
    rows = [
        [str(task.array_index), task.id, task.state, "" if task.exit_code is None else str(task.exit_code),
         output.money(task.cost_udgpu), _remark(task)]
        for task in page.jobs
    ]  # fmt: skip
    if rows:
        output.print_table(["TASK", "ID", "STATE", "EXIT", "$dGPU", "REASON"], rows, right=[0, 3, 4])
    else:
        output.note(f"{job_id} has no such tasks; an array creates its tasks as their turn comes")
    if page.next_cursor:
        output.note(f"more with --cursor {page.next_cursor}")


def _print_job(job: "Job") -> None:
    spec = job.spec
    resources = spec.resources
    cores = output.counted(resources.cpu, "core")
    wants = f"{resources.gpu or 'no GPU'}, {cores}, {resources.memory} memory, {resources.disk} disk"
    output.print_fields([
        ("id", job.id),
        ("name", job.name),
        ("state", f"{job.state}{f' ({job.outcome})' if job.outcome else ''}"),
        ("waits because", f"{job.reason_text or job.reason}" if job.reason else ""),
        ("exit code", job.exit_code),
        ("message", job.message),
        ("tasks", f"{array_counts(job.array)}; `dante show {job.id} --tasks` lists them" if job.array else ""),
        ("array", "" if isinstance(spec.array, int) or not spec.array else _sweep(spec.array)),
        ("max parallel", spec.max_parallel),
        ("task", f"{job.array_index} of {job.array_id}" if job.array_id else ""),
        ("command", " ".join(spec.command) or "\n".join(spec.commands)),
        ("image", spec.image),
        ("wants", wants),
        ("nodes", spec.nodes if spec.nodes > 1 else ""),
        ("max price", f"{spec.max_price} $dGPU per GPU-hour" if spec.max_price else ""),
        ("max duration", spec.max_duration),
        ("priority", spec.priority),
        ("after", "\n".join(spec.after)),
        ("deadline", _deadline(spec.deadline)),
        ("spot policy", spec.spot_policy if spec.spot_policy != "on-demand" else ""),
        ("checkpoint", _checkpoint(spec.checkpoint) if spec.checkpoint else ""),
        ("network", "yes" if spec.network else "no"),
        ("ports", _ports(job)),
        ("submitted", output.local_time(job.created_at)),
        ("started", output.local_time(job.started_at)),
        ("ended", output.local_time(job.ended_at)),
        ("cost", f"{output.money(job.cost_udgpu)} $dGPU{'' if job.settled else ' so far'}"),
        ("results", f"{len(job.results)} files; `dante results {job.id} -o DIR`" if job.results else ""),
    ])  # fmt: skip
    if job.attempts:
        output.say()
        rows = [_attempt_row(attempt, job.spec.nodes) for attempt in job.attempts]
        headers = ["ATTEMPT", "MACHINE", "STATE", "OUTCOME", "$dGPU/h", "BILLED", "$dGPU", "REMARK"]
        output.print_table(headers, rows, right=[0, 4, 5, 6])


def _ports(job: "Job") -> str:
    """Where each port is reached now, or that it will be."""
    several = job.spec.nodes > 1
    lines = [
        f"{port.number} at {port.address}:{port.machine_port}{f' (node {attempt.node_rank})' if several else ''}"
        for attempt in job.attempts
        if not attempt.state.terminal
        for port in attempt.ports
    ]
    return "\n".join(lines) or ", ".join(job.spec.ports)


def _deadline(given: str | None) -> str | None:
    """A moment as it is; a duration counts from the submission."""
    return given if given is None or "T" in given else f"{given} after submission"


def _checkpoint(saved: "Checkpoint") -> str:
    often = f", every {saved.interval}" if saved.interval else ""
    return f"{saved.path}, {saved.grace} after {saved.signal}{often}"


def _sweep(axes: "dict[str, str | list[str]]") -> str:
    return "\n".join(
        f"{name}: {', '.join(values) if isinstance(values, list) else values}" for name, values in axes.items()
    )


def _attempt_row(attempt: "Attempt", nodes: int) -> list[str]:
    number = f"{attempt.epoch} node {attempt.node_rank}" if nodes > 1 else str(attempt.epoch)
    resumed = f"went on from attempt {attempt.resumed_epoch}" if attempt.resumed_epoch else ""
    marks = [attempt.message, resumed, "spot" if attempt.spot else "", "simulated" if attempt.simulated else ""]
    return [
        number, attempt.machine_id, attempt.state, attempt.outcome or "",
        output.money(attempt.rate_udgpu_per_hour), f"{attempt.billed_seconds}s", output.money(attempt.cost_udgpu),
        shorten("; ".join(mark for mark in marks if mark)),
    ]  # fmt: skip


@command("stop")
@click.argument("jobs", metavar="JOB...", nargs=-1, required=True)
def stop(cli: Cli, jobs: tuple[str, ...]) -> None:
    """Stop jobs, arrays with all their tasks. One that has ended stays as it is.

    What they have left in $DANTE_OUTPUT is kept.
    """
    with cli.client() as client:
        stopped = [client.jobs.stop(refs.job_id(client, job)) for job in jobs]

    def human() -> None:
        for job in stopped:
            output.say(f"{job.id} {job.state}{f': {array_counts(job.array)}' if job.array else ''}")

    cli.answer({"jobs": stopped}, human)


@command("why")
@JOB
def why(cli: Cli, job: str) -> None:
    """Say why a job waits: what excludes how many machines, and the smallest changes that would help."""
    with cli.client() as client:
        explanation = client.jobs.why(refs.job_id(client, job))
    cli.answer({"explanation": explanation}, lambda: _print_explanation(explanation))


def _print_explanation(explanation: "Explanation") -> None:
    if not explanation.reason:
        output.say("It does not wait.")
        return
    output.say(explanation.reason_text or explanation.reason)
    busy = f"; busy: all {explanation.machines_fitting}" if not explanation.machines_free else ""
    busy = busy if explanation.machines_fitting else ""
    output.say(f"{explanation.machines_fitting} of {explanation.machines_total} machines fit{busy}.")
    for constraint in explanation.constraints:
        machines = f"{constraint.machines_excluded} {'machine' if constraint.machines_excluded == 1 else 'machines'}"
        output.say(f"  {machines} excluded by {constraint.constraint}: {constraint.text}")
    if explanation.relaxations:
        output.say("Any one of these changes would help:")
    elif not explanation.machines_fitting:
        output.say("No single change of the job would open a machine.")
    for change in explanation.relaxations:
        machines = f"{change.machines} {'machine' if change.machines == 1 else 'machines'}"
        when = "start now" if change.available_now else f"busy: all {change.machines}"
        output.say(f"  {change.field} {change.from_value} -> {change.to_value}: {machines}, {when}")
