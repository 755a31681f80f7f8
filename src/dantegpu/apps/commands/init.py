"""`dante init`: the files of a platform whose PostgreSQL and NATS are given, and its operator."""

import asyncio
import json
import os
import tomllib
from pathlib import Path

import click

from dantegpu.apps.bootstrap import set_up_operator, write_services_creds
from dantegpu.apps.targets import TARGETS
from dantegpu.cli import credentials
from dantegpu.kit.nats_jwt import NatsTrust, load_or_create_trust

NATS_PAYLOAD_BYTES_MAX = 1 << 20


@click.command("init")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--database-url", default="postgresql://dante@127.0.0.1/dante", show_default=True)
@click.option("--nats-url", default="nats://127.0.0.1:4222", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the services listen.")
@click.option("--port", default=8400, show_default=True, type=click.IntRange(1, 65_500),
              help="Port of the API; 20 more from there are used too.")  # fmt: skip
@click.option("--operator", is_flag=True, help="The services run: make the operator and log this `dante` in.")
def init(folder: Path, database_url: str, nats_url: str, host: str, port: int, operator: bool) -> None:
    """Write keys, nats.conf and platform.toml into FOLDER; then, with --operator, make the first account."""
    config = folder / "platform.toml"
    if operator:
        _make_operator(folder, config)
        return
    if config.exists():
        raise click.ClickException(f"{config} exists; nothing was changed")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    trust = load_or_create_trust(folder / "secrets")
    write_services_creds(folder / "services.creds", trust)
    _write_private(folder / "nats.conf", _nats_config(trust, nats_url, folder / "nats"))
    _write_private(config, _platform_config(folder, database_url, nats_url, host, port))
    click.echo(f"wrote {folder}: secrets/, services.creds, nats.conf, platform.toml\nnext:")
    click.echo(f"  nats-server --config {folder / 'nats.conf'}")
    for name in TARGETS:
        click.echo(f"  dante serve {name} --config {folder / 'platform.toml'}")
    click.echo(f"  dante init {folder} --operator")


def _make_operator(folder: Path, config: Path) -> None:
    tables = tomllib.loads(config.read_text())
    addresses: dict[str, str] = tables["platform"]["addresses"]
    url = f"http://{tables['siger-api-gateway']['public_listen']}"
    login, token = asyncio.run(set_up_operator(addresses, url, folder))
    key = login.api_key.get_secret_value()
    credentials.save(url, api_key=key, team_id=login.team_id, email=login.email)
    click.echo(f"this `dante` is logged in to {url} as the operator; a machine joins with")
    click.echo(f"  dante provider join {url} --token {token}")


def _nats_config(trust: NatsTrust, nats_url: str, store: Path) -> str:
    """nats-server reads JSON as a configuration file."""
    return json.dumps(
        {
            "listen": nats_url.removeprefix("nats://"),
            "max_payload": NATS_PAYLOAD_BYTES_MAX,
            "operator": trust.operator_jwt,
            "system_account": trust.system_account_public,
            "resolver": "MEMORY",
            "resolver_preload": {
                trust.account_public: trust.account_jwt,
                trust.system_account_public: trust.system_account_jwt,
            },
            "jetstream": {"store_dir": str(store)},
        },
        indent=2,
    )


def _platform_config(folder: Path, database_url: str, nats_url: str, host: str, port: int) -> str:
    quoted = json.dumps  # a TOML string, too
    grpc = {name: f"{host}:{port + 2 + number}" for number, name in enumerate(TARGETS)}
    ops = {name: f"{host}:{port + 2 + len(TARGETS) + number}" for number, name in enumerate(TARGETS)}
    own = {
        "auth-service": [f"secrets_dir = {quoted(str(folder / 'secrets'))}"],
        "storage-service": [
            f"secrets_dir = {quoted(str(folder / 'secrets'))}",
            f"data_dir = {quoted(str(folder / 'objects'))}",
            f"public_listen = {quoted(f'{host}:{port + 1}')}",
            f"public_url = {quoted(f'http://{host}:{port + 1}')}",
        ],
        "siger-api-gateway": [f"public_listen = {quoted(f'{host}:{port}')}"],
    }
    lines = [
        "[platform]",
        f"database_url = {quoted(database_url)}",
        f"nats_url = {quoted(nats_url)}",
        f"nats_creds = {quoted(str(folder / 'services.creds'))}",
        "",
        "[platform.addresses]",
        *(f"{name} = {quoted(address)}" for name, address in grpc.items()),
    ]
    for name in TARGETS:
        lines += ["", f"[{name}]", f"listen = {quoted(grpc[name])}", f"ops_listen = {quoted(ops[name])}"]
        lines += own.get(name, [])
    return "\n".join(lines) + "\n"


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
