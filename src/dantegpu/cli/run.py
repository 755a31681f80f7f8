"""`dante run`: pack, upload, submit, follow."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dantegpu.cli import output, refs
from dantegpu.cli.errors import UsageProblem
from dantegpu.cli.session import Cli, command
from dantegpu.domain.units import format_bytes

if TYPE_CHECKING:
    from dantegpu.contracts.rest.spec import JobInput
    from dantegpu.sdk import Dante


@command("run", options_anywhere=False)
@click.option("--gpu", metavar="SPEC", help="GPUs, such as RTX4090:2, 24GB or A100:40GB..80GB. Default: none.")
@click.option("--cpu", metavar="N", help="Cores, such as 4 or 0.5.")
@click.option("--memory", metavar="SIZE", help="Memory, such as 16GB.")
@click.option("--disk", metavar="SIZE", help="Disk, such as 100GB.")
@click.option("--nodes", type=click.IntRange(1), metavar="N", help="Run it on N machines at once, all or none.")
@click.option("--image", metavar="IMAGE", help="Container image; default: the machine's own sandbox.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]",
              help="Environment; a bare NAME takes your shell's value.")  # fmt: skip
@click.option("--max-price", metavar="P", help="At most so many $dGPU per GPU-hour.")
@click.option("--max-duration", metavar="D", help="Stop the job after this time, such as 90s or 8h.")
@click.option("--spot", is_flag=True, help="Cheaper, but stopped when others need the machine; it goes on later.")
@click.option("--checkpoint", metavar="PATH", help="Below /work: kept when the job is stopped, there when it goes on.")
@click.option("--priority", type=click.IntRange(0, 100), metavar="N", help="0 to 100, which goes first; default: 50.")
@click.option("-n", "--name", metavar="NAME", help="A name to know it by.")
@click.option("--array", multiple=True, metavar="N|NAME=V,V|NAME=A..B",
              help="Many tasks: N of them, or one for each combination of the values given.")  # fmt: skip
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="At most N tasks of the array at once.")
@click.option(
    "--after", multiple=True, metavar="JOB", help="Begin when this job has succeeded; may come several times."
)
@click.option("--deadline", metavar="D|TIME", help="Never begin after it, stop at it: 8h, or 2026-12-01T18:00:00Z.")
@click.option("--network", is_flag=True, help="Allow outbound network.")
@click.option("-p", "--port", "ports", multiple=True, metavar="PORT|MACHINE:PORT",
              help="Publish a port of an image's container on the machine; with --network.")  # fmt: skip
@click.option("--workdir", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
              help="The folder to send; default: this one.")  # fmt: skip
@click.option("--no-files", is_flag=True, help="Send no files.")
@click.option("--no-wait", is_flag=True, help="Refuse it when no machine can take it now, instead of queueing.")
@click.option("-d", "--detach", is_flag=True, help="Print the id and do not follow.")
@click.argument("words", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
def run(
    cli: Cli, workdir: Path | None, no_files: bool, no_wait: bool, detach: bool, words: tuple[str, ...], **fields: Any
) -> int:
    """Run a command on a rented machine: send this folder, follow the output, end with its exit code.

    Files that .gitignore or .danteignore name are left out. What the command writes into $DANTE_OUTPUT can be fetched
    with `dante results`. Ctrl-C asks whether to stop the job; with --detach it runs on its own from the start.
    """
    from dantegpu.contracts.rest.spec import JobSpec

    if no_files and workdir is not None:
        raise UsageProblem("--no-files and --workdir exclude each other")
    spec = JobSpec.model_validate(_document(words, fields))
    with cli.client() as client:
        if fields["after"]:
            spec = spec.model_copy(update={"after": [refs.job_id(client, job) for job in fields["after"]]})
        if not no_files:
            spec = spec.model_copy(update={"input": send_folder(cli, client, workdir or Path.cwd())})
        try:
            job = client.jobs.submit(spec, wait=not no_wait)
        except KeyboardInterrupt:
            output.note("\ninterrupted while submitting: the job may be queued all the same; `dante ps` shows it")
            raise
        refs.remember_last(client.url, job.id)
    if detach:
        cli.answer({"job": job}, lambda: output.say(job.id))
        return 0
    from dantegpu.cli.follow import follow

    return follow(cli, job.id)


def _document(words: tuple[str, ...], fields: dict[str, Any]) -> dict[str, Any]:
    """The words of the command line as a job file's."""
    if not words and not fields["image"]:
        raise UsageProblem("there is nothing to run: dante run [OPTIONS] -- COMMAND...")
    document: dict[str, Any] = {"command": list(words)}
    resources = {name: fields[name] for name in ("gpu", "cpu", "memory", "disk") if fields[name] is not None}
    if resources:
        document["resources"] = resources
    for name in ("nodes", "image", "max_price", "max_duration", "name", "deadline", "priority"):
        if fields[name] is not None:
            document[name] = fields[name]
    env = [_env_item(item) for item in fields["env"]]
    if env:
        document["env"] = env
    if fields["spot"]:
        document["spot_policy"] = "spot"
    if fields["checkpoint"]:
        document["checkpoint"] = {"path": fields["checkpoint"]}
    if fields["network"]:
        document["network"] = True
    if fields["ports"]:
        document["ports"] = list(fields["ports"])
    if fields["array"]:
        document["array"] = _array(fields["array"])
    if fields["max_parallel"] is not None:
        document["max_parallel"] = fields["max_parallel"]
    return document


def _array(words: tuple[str, ...]) -> int | dict[str, object]:
    """`("100",)` or `("lr=0.1,0.01", "seed=0..9")`."""
    if len(words) == 1 and words[0].isdecimal():
        return int(words[0])
    axes: dict[str, object] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or name in axes:
            problem = "comes twice" if equals else "expected a number of tasks, NAME=VALUE,VALUE or NAME=FIRST..LAST"
            raise UsageProblem(f"--array {word}: {problem}")
        axes[name] = values if ".." in values and "," not in values else values.split(",")
    return axes


def _env_item(item: str) -> str:
    if "=" in item:
        return item
    if item not in os.environ:
        raise UsageProblem(f"--env {item}: {item!r} is not set in your environment; set it, or write {item}=VALUE")
    return f"{item}={os.environ[item]}"


def send_folder(cli: Cli, client: "Dante", folder: Path) -> "JobInput | None":
    """Pack and upload a folder; None: there is nothing in it."""
    from dantegpu.cli.packing import pack

    with tempfile.NamedTemporaryFile(prefix="dante-", suffix=".tar.gz") as file:
        with output.progress("packing", quiet=cli.as_json) as on_progress:
            packed = pack(folder, file, on_progress)
        if not packed.files:
            return None
        with output.progress("uploading", quiet=cli.as_json) as on_progress:
            sent = client.uploads.put(packed.archive, on_progress=on_progress)
    if not cli.as_json:
        noun = "file" if packed.files == 1 else "files"
        output.note(f"· sent {packed.files} {noun}, {format_bytes(packed.size_bytes)} packed")
    return sent
