"""`dante logs` and `dante results`."""

import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from dantegpu.cli import output, refs
from dantegpu.cli.jobs import JOB
from dantegpu.cli.session import FOLLOW_RETRY_SECONDS, Cli, command
from dantegpu.domain.units import format_bytes

if TYPE_CHECKING:
    from dantegpu.sdk import Dante, LogBytes

_TASKS_PER_PAGE = 200


_TASK = click.option("--task", type=click.IntRange(0), metavar="N", help="Task N of an array; the same as JOB:N.")


def _with_task(job: str, task: int | None) -> str:
    return job if task is None else f"{job}:{task}"


_NODE = click.option("--node", type=click.IntRange(0), default=0, metavar="N",
                     help="Which node of a job with several; default: node 0.")  # fmt: skip


@command("logs")
@JOB
@click.option("-f", "--follow", is_flag=True, help="Go on live until the job has ended.")
@click.option("--attempt", type=click.IntRange(0), default=0, help="Which attempt (1, 2, ...); default: the latest.")
@_NODE
@_TASK
def logs(cli: Cli, job: str, follow: bool, attempt: int, node: int, task: int | None) -> None:
    """Print what a job, or a task of an array, wrote to stdout and stderr, byte by byte as it came.

    With --json: one object per piece, `{"log": {...}}`, a line each.
    """
    written = False
    with cli.client(retry_seconds=FOLLOW_RETRY_SECONDS if follow else 60.0) as client:
        job_id = refs.job_id(client, _with_task(job, task))
        for piece in client.jobs.logs(job_id, follow=follow, epoch=attempt, node=node):
            written = True
            if cli.as_json:
                output.print_json({"log": piece_as_plain(job_id, piece)})
            else:
                write_raw(piece.data)
        if not written and not cli.as_json:
            found = client.jobs.get(job_id)
            output.note(f"{job_id} has written nothing ({found.state})")


def piece_as_plain(job_id: str, piece: "LogBytes") -> dict[str, object]:
    """A piece of a log for `--json`."""
    return {
        "job_id": job_id,
        "epoch": piece.epoch,
        "offset": piece.offset,
        "next_offset": piece.next_offset,
        "text": piece.data.decode(errors="replace"),
        "data_base64": base64.b64encode(piece.data).decode(),
    }


def write_raw(data: bytes) -> None:
    """Bytes to stdout at once."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@command("results")
@JOB
@click.option("-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Fetch them into this folder.")  # fmt: skip
@_NODE
@_TASK
def results(cli: Cli, job: str, folder: Path | None, node: int, task: int | None) -> None:
    """List the files that a job left in $DANTE_OUTPUT, or fetch them with -o DIR.

    Those of an array come into DIR/0, DIR/1, ..., a folder for each task. Each file's SHA-256 is checked; a file
    appears under its name only when it is whole.
    """
    with cli.client() as client:
        job_id = refs.job_id(client, _with_task(job, task))
        if client.jobs.get(job_id).array is not None:
            _results_of_tasks(cli, client, job_id, folder)
            return
        listing = client.jobs.results(job_id, node=node)
        if folder is not None and listing.files:
            with output.progress("fetching", quiet=cli.as_json) as on_progress:
                client.jobs.download(job_id, folder, node=node, on_progress=on_progress)
    files = [{"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in listing.files]
    document: dict[str, object] = {
        "job_id": job_id, "epoch": listing.epoch, "node_rank": node, "complete": listing.complete, "files": files,
        "folder": str(folder) if folder is not None else None,
    }  # fmt: skip

    def human() -> None:
        if not listing.files:
            output.note(f"{job_id} has left no results" + ("" if listing.complete else " yet"))
        elif folder is not None:
            total_bytes = sum(file.size_bytes for file in listing.files)
            output.say(f"{output.counted(len(files), 'file')}, {format_bytes(total_bytes)}, in {folder}")
        else:
            rows = [[file.path, format_bytes(file.size_bytes), file.sha256[:16]] for file in listing.files]
            output.print_table(["PATH", "SIZE", "SHA-256"], rows, right=[1])

    cli.answer(document, human)


def _results_of_tasks(cli: Cli, client: "Dante", array_id: str, folder: Path | None) -> None:
    tasks: list[dict[str, object]] = []
    cursor: str | None = None
    while True:
        page = client.jobs.tasks(array_id, cursor=cursor, limit=_TASKS_PER_PAGE)
        for task in page.jobs:
            if task.results_epoch is None:
                continue
            found = client.jobs.results(task.id)
            if folder is not None:
                client.jobs.download(task.id, folder / str(task.array_index))
            files = [{"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in found.files]
            tasks.append({"job_id": task.id, "task": task.array_index, "complete": found.complete, "files": files})
        cursor = page.next_cursor
        if not cursor:
            break

    def human() -> None:
        rows = [
            [str(task["task"]), str(task["job_id"]), str(len(cast("list[object]", task["files"])))] for task in tasks
        ]
        if rows:
            output.print_table(["TASK", "ID", "FILES"], rows, right=[0, 2])
        else:
            output.note(f"the tasks of {array_id} have left no results so far")

    answer: dict[str, object] = {
        "job_id": array_id,
        "tasks": tasks,
        "folder": str(folder) if folder is not None else None,
    }
    cli.answer(answer, human)
