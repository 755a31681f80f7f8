"""`dante schedules`: jobs that are submitted again and again."""

import click

from dantegpu.cli import output
from dantegpu.cli.session import Cli, command

_LIMIT = click.option("-n", "--limit", type=click.IntRange(1, 500), default=20, show_default=True, help="How many.")
_CURSOR = click.option("--cursor", help="Go on where the last page ended.")


@command("list")
@_LIMIT
@_CURSOR
def schedules_list(cli: Cli, limit: int, cursor: str | None) -> None:
    """List your team's schedules, the newest first. `dante submit` makes one of a job file with a `schedule`."""
    with cli.client() as client:
        page = client.schedules.list(cursor=cursor, limit=limit)

    def human() -> None:
        rows = [
            [each.id, each.name, each.spec.schedule.cron if each.spec.schedule else "",
             each.spec.schedule.timezone if each.spec.schedule else "", output.local_time(each.next_at) or "stopped",
             str(each.runs), each.last_job_id or ""]
            for each in page.schedules
        ]  # fmt: skip
        if rows:
            output.print_table(["ID", "NAME", "CRON", "ZONE", "NEXT", "RUNS", "LAST JOB"], rows, right=[5])
        else:
            output.note("no schedules; `dante submit` makes one of a job file with `schedule: {cron: '15 23 * * *'}`")
        if page.next_cursor:
            output.note(f"more with --cursor {page.next_cursor}")

    cli.answer({"schedules": page.schedules, "next_cursor": page.next_cursor}, human)


@command("stop")
@click.argument("schedules", metavar="SCHEDULE...", nargs=-1, required=True)
def schedules_stop(cli: Cli, schedules: tuple[str, ...]) -> None:
    """Submit nothing more. Jobs that were submitted go on; `dante stop` stops those."""
    with cli.client() as client:
        stopped = [client.schedules.stop(each) for each in schedules]

    def human() -> None:
        for each in stopped:
            output.say(f"{each.id} stopped after {each.runs} runs")

    cli.answer({"schedules": stopped}, human)
