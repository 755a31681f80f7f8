"""`dante provider join` and `dante provider run`: the daemon on any machine."""

from pathlib import Path
from typing import Any

import click

_config = click.option("--config", type=click.Path(path_type=Path), help="Settings of the daemon (TOML).")
_state = click.option("--state", type=click.Path(path_type=Path), help="Folder for key, journal and jobs.")
_simulate = click.option("--simulate-gpus", metavar="SPEC", help='Pretend to have GPUs, e.g. "RTX 4090:2" (marked).')
_region = click.option("--region", help="Where the machine stands, e.g. eu-west.")
_network = click.option("--allow-network", is_flag=True, help="Jobs that ask for it may use this machine's network.")
_share = click.option("--share-gpus", is_flag=True, help="Jobs of one team may share a GPU by time-slicing.")
_sandbox = click.option(
    "--sandbox", type=click.Choice(["auto", "bubblewrap", "none"]), help="none: only your own team's jobs come here."
)
_executor = click.option(
    "--executor",
    type=click.Choice(["process", "slurm"]),
    help="slurm: rent out the nodes of the cluster that this machine submits to, each as a machine.",
)


@click.command("join")
@click.argument("url")
@click.option("--token", envvar="DANTE_DAEMON_JOIN_TOKEN", required=True, help="From `dante provider token`.")
@_config
@_state
@_simulate
@_region
@_network
@_share
@_sandbox
@_executor
def join(url: str, token: str, **options: Any) -> None:
    """Make this machine a provider of the platform at URL and run its daemon until it is told to stop."""
    _run({"gateway_url": url, "join_token": token, **options})


@click.command("run")
@_config
@_state
@_simulate
@_region
@_network
@_share
@_sandbox
@_executor
def run(**options: Any) -> None:
    """Run the daemon of a machine that has joined before."""
    _run(options)


def _run(flags: dict[str, Any]) -> None:
    from dantegpu.daemon.enrol import EnrolmentRefused
    from dantegpu.daemon.executors.base import ExecutorError
    from dantegpu.daemon.journal import JournalError
    from dantegpu.daemon.module import AlreadyRunning
    from dantegpu.daemon.probe.devices import InvalidSimulation
    from dantegpu.daemon.running import run_daemon
    from dantegpu.daemon.settings import DaemonSettings
    from dantegpu.kit.settings import SettingsError

    try:
        settings = DaemonSettings.load({name: value for name, value in flags.items() if value not in (None, False)})
        run_daemon(
            settings, lambda machine_id: click.echo(f"joined as {machine_id}; Ctrl-C stops the daemon", err=True)
        )
    except (SettingsError, EnrolmentRefused, AlreadyRunning, JournalError, InvalidSimulation, ExecutorError) as error:
        raise click.ClickException(str(error)) from error
