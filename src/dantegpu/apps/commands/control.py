"""`dante status`, `dante down`, `dante reset`: the embedded platform from outside."""

import contextlib
import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import click

from dantegpu.apps.commands import machine
from dantegpu.apps.commands.running import default_data_dir
from dantegpu.apps.embedded.errors import FolderInUse
from dantegpu.apps.embedded.process import FolderLock
from dantegpu.apps.embedded.provider import end_leftover
from dantegpu.apps.platform import Running
from dantegpu.contracts.rest.machines import Machine

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
    found = machine.look(running.url, data_dir) if running and running.provider_pid else None
    if isinstance(found, str):
        problems["provider"] = found
    if as_json:
        provider = found.model_dump(mode="json") if isinstance(found, Machine) else None
        document = {"running": running is not None, "platform": asdict(running) if running else None}
        click.echo(json.dumps({**document, "provider": provider, "problems": problems}))
    elif running is None:
        click.echo(f"not running (folder {data_dir}); start it with `dante up`")
    else:
        _print_status(running, data_dir, found, problems)
    if running is None or problems:
        raise SystemExit(1)


def _print_status(running: Running, data_dir: Path, found: Machine | str | None, problems: dict[str, str]) -> None:
    lines = {
        "API": f"{running.url}/v1   docs: {running.url}/docs",
        "storage": running.storage_url,
        "health": f"{running.ops_url}/readyz   metrics: {running.ops_url}/metrics",
        "NATS": running.nats_url,
        "provider": machine.describe(found) if isinstance(found, Machine) else "see below" if found else "none",
        "data": str(data_dir),
    }
    click.echo(f"running, process {running.pid}")
    for name, value in lines.items():
        click.echo(f"  {name:<10}{value}")
    click.echo("  " + ("PROBLEMS" if problems else "every part answers"))
    for name, problem in problems.items():
        click.echo(f"    {name}: {problem}")


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
    data_dir = data or default_data_dir()
    running = Running.read(data_dir)
    if running is None:
        with _nobody_on(data_dir):
            left_behind = end_leftover(data_dir.resolve() / "provider", signal.SIGTERM)
        ended = "; ended the provider daemon that a killed platform had left behind" if left_behind else ""
        click.echo(f"not running{ended}")
        return
    os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if not running.alive:
            click.echo("stopped")
            return
        time.sleep(0.05)
    raise click.ClickException(
        f"process {running.pid} still runs after {STOP_TIMEOUT_SECONDS:.0f} s; see {data_dir / 'platform.log'}, or end "
        "it with kill -9: the next `dante up` finds everything again"
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
    with _nobody_on(data_dir):
        end_leftover(data_dir.resolve() / "provider", signal.SIGTERM)
        shutil.rmtree(data_dir)
    click.echo(f"deleted {data_dir}")


@contextlib.contextmanager
def _nobody_on(data_dir: Path) -> Generator[None]:
    """Hold the folder, so that no platform starts on it meanwhile. Raises ClickException when one has it."""
    if not data_dir.is_dir():
        yield
        return
    lock = FolderLock(data_dir)
    try:
        lock.acquire()
    except FolderInUse as error:
        raise click.ClickException(
            f"the platform on {data_dir} is just starting or stopping (process {error.holder_pid}); try again"
        ) from error
    try:
        yield
    finally:
        lock.release()
