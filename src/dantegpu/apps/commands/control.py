"""`dante status`, `dante down`, `dante reset`: the embedded platform from outside."""

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import click

from dantegpu.apps.commands.running import default_data_dir
from dantegpu.apps.platform import Running

STOP_TIMEOUT_SECONDS = 60.0

_data = click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of the platform (default: DANTE_HOME/platform)."
)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


@click.command("status")
@_data
@_json
def status(data: Path | None, as_json: bool) -> None:
    """Say whether the platform of this machine runs, where it is reached, and what is wrong with it."""
    data_dir = data or default_data_dir()
    running = Running.read(data_dir)
    problems = _problems(running) if running else {}
    if as_json:
        details = asdict(running) if running else None
        click.echo(json.dumps({"running": running is not None, "platform": details, "problems": problems}))
    elif running is None:
        click.echo(f"not running (folder {data_dir}); start it with `dante up`")
    else:
        click.echo(f"running, process {running.pid}")
        for name in ("url", "storage_url", "ops_url", "nats_url"):
            click.echo(f"  {name.removesuffix('_url') if name != 'url' else 'API':<10}{getattr(running, name)}")
        click.echo(f"  {'provider':<10}{f'process {running.provider_pid}' if running.provider_pid else 'none'}")
        click.echo("  " + ("every part answers" if not problems else "PROBLEMS"))
        for name, problem in problems.items():
            click.echo(f"    {name}: {problem}")
    if running is None or problems:
        raise SystemExit(1)


def _problems(running: Running) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"{running.ops_url}/readyz", timeout=5) as answer:
            return json.loads(answer.read())["problems"]
    except urllib.error.HTTPError as error:
        return json.loads(error.read()).get("problems", {})
    except (OSError, ValueError) as error:
        return {"platform": f"does not answer: {error}"}


@click.command("down")
@_data
def down(data: Path | None) -> None:
    """Stop the platform of this machine, in order; jobs that run are handed back and start again with the next `up`."""
    running = Running.read(data or default_data_dir())
    if running is None:
        click.echo("not running")
        return
    os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(running.pid, 0)
        except ProcessLookupError:
            click.echo("stopped")
            return
        time.sleep(0.05)
    raise click.ClickException(
        f"process {running.pid} still runs after {STOP_TIMEOUT_SECONDS:.0f} s; see platform.log, or end it with kill -9"
    )


@click.command("reset")
@_data
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(data: Path | None, yes: bool) -> None:
    """Delete the platform of this machine with all its jobs, wallets and files."""
    data_dir = data or default_data_dir()
    if Running.read(data_dir) is not None:
        raise click.ClickException("the platform is running; stop it first: `dante down`")
    if not (data_dir / "format").exists():
        click.echo(f"nothing to delete: {data_dir} holds no platform")
        return
    if not yes:
        click.confirm(f"Delete {data_dir} with every job, wallet and file in it?", abort=True)
    shutil.rmtree(data_dir)
    click.echo(f"deleted {data_dir}")
