"""`dante serve NAME`: one service (or all) against a given PostgreSQL and NATS."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import click

from dantegpu.apps.commands.running import run_loop, unless_stopped
from dantegpu.apps.root import Root, load_with
from dantegpu.apps.targets import ALL, TARGETS, expand
from dantegpu.kit.settings import ServiceSettings
from dantegpu.kit.telemetry import configure_logging


@click.command("serve")
@click.argument("target", type=click.Choice([*TARGETS, ALL]))
@click.option("--config", type=click.Path(path_type=Path), help="TOML: [platform] for all, [NAME] for one service.")
@click.option("--listen", help="gRPC address: host:port or unix:/path.")
@click.option("--ops-listen", help="HTTP address of /healthz, /readyz and /metrics.")
@click.option("--database-url", help="PostgreSQL; better in the file or in DANTE_DATABASE_URL.")
@click.option("--nats-url")
def serve(
    target: str,
    config: Path | None,
    listen: str | None,
    ops_listen: str | None,
    database_url: str | None,
    nats_url: str | None,
) -> None:
    """Run one service of the platform in this process until it is told to stop. Logs go to stderr as JSON lines."""
    given = {"listen": listen, "ops_listen": ops_listen, "database_url": database_url, "nats_url": nats_url}
    load = load_with(config, {"": {name: value for name, value in given.items() if value is not None}})
    first: ServiceSettings = load(TARGETS[expand(target)[0]].settings_class())
    configure_logging(target, first.log_level)
    run_loop(lambda stop: _run(target, load, stop))


async def _run(target: str, load: Callable[[type[ServiceSettings]], ServiceSettings], stop: asyncio.Event) -> None:
    root = Root(target, load)  # inside the loop: gRPC's channels belong to the loop they are made in
    listening = await unless_stopped(root.start(), stop)
    try:
        if listening is not None:
            more = "".join(f", http {url}" for url in listening.http_urls.values())
            click.echo(f"{target}: grpc {listening.grpc}, ops {listening.ops_url}{more}", err=True)
            await stop.wait()
    finally:
        await root.stop()
