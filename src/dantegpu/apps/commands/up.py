"""`dante up`: the whole platform on this machine."""

import asyncio
import sys
from pathlib import Path

import click

from dantegpu.apps.commands import machine
from dantegpu.apps.commands.running import default_data_dir, run_loop, unless_stopped
from dantegpu.apps.platform import DEFAULT_PORT, Options, Platform, Ports, Running
from dantegpu.cli import credentials
from dantegpu.contracts.rest.machines import Machine
from dantegpu.kit.telemetry import configure_logging


@click.command("up")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the platform (default: DANTE_HOME/platform).")
@click.option("--port", type=click.IntRange(0, 65531), default=DEFAULT_PORT, show_default=True,
              help="Port of the API; the next four are used too. 0: free ones.")  # fmt: skip
@click.option("--no-provider", is_flag=True, help="Do not offer this machine's own resources.")
@click.option("--simulate-gpus", default="", metavar="SPEC", help='Pretend to have GPUs, e.g. "RTX 4090:2" (marked).')
@click.option("--config", type=click.Path(path_type=Path, exists=True), help="Settings of the services (TOML).")
@click.option("--log-level", default="warning", show_default=True)
def up(
    data: Path | None, port: int, no_provider: bool, simulate_gpus: str, config: Path | None, log_level: str
) -> None:
    """Start the whole platform on this machine; Ctrl-C stops it, the next start finds everything again."""
    options = Options(
        data_dir=data or default_data_dir(),
        ports=Ports.from_first(port) if port else Ports.free(),
        provider=not no_provider,
        simulate_gpus=simulate_gpus,
        config_file=config,
    )
    options.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (options.data_dir / "platform.log").open("a", buffering=1) as log_file:
        configure_logging("dante up", log_level, log_file)
        run_loop(lambda stop: _run(options, stop))


async def _run(options: Options, stop: asyncio.Event) -> None:
    platform = Platform(options, tell=lambda what: _say(f"starting {what} ..."))
    running = await unless_stopped(platform.start(), stop)
    try:
        if running is not None and platform.login is not None:
            login = platform.login
            credentials.save(
                login.url, api_key=login.api_key.get_secret_value(), team_id=login.team_id, email=login.email
            )
            if options.provider:
                found = await unless_stopped(machine.joined(login.url, options.data_dir), stop)
            else:
                found = "none: started with --no-provider"
            if found is not None:
                _tell(running, options, found)
                await stop.wait()
            _say("stopping ...")
    finally:
        await platform.stop()
    _say("stopped; everything is kept for the next `dante up`")


def _tell(running: Running, options: Options, found: Machine | str) -> None:
    lines = {
        "API": f"{running.url}/v1   docs: {running.url}/docs",
        "storage": running.storage_url,
        "health": f"{running.ops_url}/readyz   metrics: {running.ops_url}/metrics",
        "NATS": running.nats_url,
        "provider": machine.describe(found) if isinstance(found, Machine) else found,
        "data": str(options.data_dir),
        "log": str(options.data_dir / "platform.log"),
    }
    click.echo("\nDanteGPU is up.\n")
    for name, value in lines.items():
        click.echo(f"  {name:<10}{value}")
    if isinstance(found, Machine) and not machine.isolates(found):
        click.echo("\nThis machine cannot isolate jobs, so it runs only your own team's, unsandboxed: `dante doctor`.")
    click.echo("\nThis machine's `dante` is logged in as the operator. In another terminal:")
    click.echo("  dante run -- python3 -c 'print(6 * 7)'")
    click.echo("Ctrl-C stops everything in order.")
    sys.stdout.flush()


def _say(text: str) -> None:
    click.echo(text, err=True)
