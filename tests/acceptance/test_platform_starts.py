"""Why `dante up` and `dante serve` do not start: what they say, and that they leave nothing behind."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from dantegpu.apps.embedded.postgres import EmbeddedPostgres
from dantegpu.kit.migrate import migrate
from tests.fixtures.cluster import free_port_block, free_ports
from tests.fixtures.platform import UpPlatform, run_dante


def refusal(home: Path, *arguments: str) -> str:
    """What `dante up` says as it ends with an error; one problem, no traceback."""
    done = run_dante("up", *(arguments or ("--port", "0")), home=home)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (home / "platform" / "runtime.json").exists()
    assert not (home / "platform" / "run").is_symlink()
    return done.stderr[done.stderr.index("dante: ") :]


def test_a_port_that_is_taken_is_named_before_anything_starts(dante_home: Path):
    port = free_port_block(7) + 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        said = refusal(dante_home, "--port", str(port))
        assert f"port {port} is taken by another program, so the API cannot listen" in said
        said = refusal(dante_home, "--port", str(port - 2))
        assert f"port {port} is taken by another program, so the health pages cannot listen" in said
    assert not (dante_home / "platform" / "postgres").exists()


@pytest.mark.needs("bubblewrap")
def test_a_second_up_on_the_same_folder_is_refused_and_the_first_goes_on(platform: UpPlatform):
    done = run_dante("up", "--port", "0", home=platform.home)
    assert done.returncode == 1
    assert f"another platform (process {platform.process.pid}) is running on this data folder" in done.stderr
    assert platform.dante("status").returncode == 0
    reset = run_dante("reset", "--yes", home=platform.home)
    assert (reset.returncode, "stop it first" in reset.stderr) == (1, True)


def test_a_folder_of_a_newer_format_is_left_alone(dante_home: Path):
    folder = dante_home / "platform"
    folder.mkdir()
    (folder / "format").write_text("99\n")
    said = refusal(dante_home)
    assert "has format 99, this version of DanteGPU knows formats up to 1" in said
    assert {path.name for path in folder.iterdir()} <= {"format", "owner.lock", "platform.log"}


def test_data_of_a_newer_postgresql_are_left_alone(dante_home: Path):
    cluster = dante_home / "platform" / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("19\n")
    assert "the data were written by PostgreSQL 19, newer than this program's 18" in refusal(dante_home)
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


def test_a_schema_with_a_migration_that_this_version_does_not_know_is_left_alone(dante_home: Path, tmp_path: Path):
    newer = tmp_path / "migrations"
    newer.mkdir()
    (newer / "9999.from_tomorrow.sql").write_text("CREATE TABLE tomorrow (id int);")

    async def written_by_a_newer_version() -> None:
        folder = dante_home / "platform"
        folder.mkdir()
        postgres = EmbeddedPostgres(folder / "postgres", dante_home / "run")
        await postgres.start()
        try:
            await migrate(postgres.address.dsn(), "billing", newer)
        finally:
            await postgres.stop()

    asyncio.run(written_by_a_newer_version())
    said = refusal(dante_home)
    assert "the data (schema billing) comes from a newer version of DanteGPU" in said
    assert "9999.from_tomorrow" in said


@contextlib.contextmanager
def a_disk(size_mib: int, folder: Path) -> Generator[Path]:
    """A file system of its own size. Needs root and the right to mount."""
    folder.mkdir()
    options = f"size={size_mib}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small disk, which only root may")
def test_a_full_disk_is_told_before_anything_is_written_to_it(dante_home: Path, tmp_path: Path):
    with a_disk(48, tmp_path / "disk") as disk:
        said = refusal(dante_home, "--port", "0", "--data", str(disk / "platform"))
        assert "no room on the disk for" in said
        assert "MiB free, at least" in said
        assert "Free some space and start again" in said
        assert not (disk / "platform" / "postgres" / "cluster").exists()


def test_wrong_settings_are_told_with_file_service_and_field(dante_home: Path, tmp_path: Path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[provider-registry-service]\nlisten_on = "127.0.0.1:1"\n')
    for command in (["serve", "provider-registry-service"], ["up", "--port", "0"]):
        done = run_dante(*command, "--config", str(wrong), home=dante_home)
        assert done.returncode == 1
        assert f"provider-registry-service: settings from {wrong} are wrong: listen_on" in done.stderr
        assert "Traceback" not in done.stderr
    wrong.write_text("[platform\n")
    done = run_dante("serve", "provider-registry-service", "--config", str(wrong), home=dante_home)
    assert (done.returncode, f"{wrong} is not valid TOML" in done.stderr) == (1, True)


def test_a_service_alone_gives_up_with_the_address_of_the_server_that_does_not_answer(dante_home: Path, tmp_path: Path):
    url = f"nats://127.0.0.1:{free_ports(1)[0]}"
    config = tmp_path / "alone.toml"
    config.write_text(f'[platform]\ndatabase_url = "postgresql://dante@127.0.0.1/dante"\nnats_url = "{url}"\n')
    done = run_dante("serve", "provider-registry-service", "--config", str(config), home=dante_home)
    assert done.returncode == 1
    assert f"dante: NATS at {url} does not answer" in done.stderr
    assert "Traceback" not in done.stderr
