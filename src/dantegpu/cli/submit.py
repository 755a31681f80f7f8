"""`dante submit`: the jobs of a YAML file."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dantegpu.cli import output, refs
from dantegpu.cli.errors import CliError, UsageProblem
from dantegpu.cli.jobfile import MAX_FILE_BYTES, FileProblem, JobFileInvalid, parse
from dantegpu.cli.run import send_folder
from dantegpu.cli.session import Cli, command

if TYPE_CHECKING:
    from dantegpu.contracts.rest.spec import JobSpec
    from dantegpu.sdk import Dante


@command("submit")
@click.argument("file", metavar="FILE")
@click.option("--no-wait", is_flag=True, help="Refuse them when no machine can take them now, instead of queueing.")
@click.option("-f", "--follow", is_flag=True, help="Follow the job as `dante run` does (for a file with one job).")
def submit(cli: Cli, file: str, no_wait: bool, follow: bool) -> int:
    """Submit the jobs of a YAML file, one per document; `-` reads standard input.

    All are accepted or none; one with a `schedule` is submitted at each due time from now on. `files: [.]` sends the
    file's folder. A bare name under `env` takes your shell's value.
    """
    name, text = _read(file)
    specs = parse(text, name, os.environ)
    repeated = [spec for spec in specs if spec.schedule is not None]
    if repeated and (follow or no_wait or len(repeated) < len(specs)):
        what = "--follow and --no-wait are for jobs" if follow or no_wait else "put jobs without one into another file"
        raise UsageProblem(f"{name} holds a schedule; {what}")
    if follow and len(specs) > 1:
        raise UsageProblem(f"{name} holds {len(specs)} jobs; --follow is for one")
    with cli.client() as client:
        if any(spec.files for spec in specs):
            folder = Path.cwd() if file == "-" else Path(file).resolve().parent
            sent = send_folder(cli, client, folder)
            specs = [_with_input(spec, sent) for spec in specs]
        if repeated:
            _make_schedules(cli, client, specs)
            return 0
        jobs = client.jobs.submit_many(specs, wait=not no_wait)
        refs.remember_last(client.url, jobs[-1].id)
    if follow:
        from dantegpu.cli.follow import follow as follow_job

        return follow_job(cli, jobs[0].id)

    def human() -> None:
        for job in jobs:
            output.say(job.id)

    cli.answer({"jobs": jobs}, human)
    return 0


def _make_schedules(cli: Cli, client: "Dante", specs: "list[JobSpec]") -> None:
    made = [client.schedules.create(spec) for spec in specs]

    def human() -> None:
        for each in made:
            output.say(each.id)
            output.note(f"· first due {output.local_time(each.next_at)}; `dante schedules stop {each.id}` ends it")

    cli.answer({"schedules": made}, human)


def _with_input(spec: "JobSpec", sent: object) -> "JobSpec":
    return spec.model_copy(update={"input": sent}) if spec.files else spec


def _read(file: str) -> tuple[str, str]:
    """What errors call it, and its text."""
    name = "<stdin>" if file == "-" else file
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with open(file, "rb") as opened:
                data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CliError(f"cannot read {file}: {error.strerror}", code="cannot-read", exit_code=2) from error
    try:
        return name, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise JobFileInvalid(name, [FileProblem(name, line, 1, "", "this line is not UTF-8")]) from error
