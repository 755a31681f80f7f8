"""The embedded PostgreSQL, for real: start, stop, crash, leftovers, and folders that cannot be used."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from dantegpu.apps.embedded.errors import (
    DiskFull,
    EmbeddedServerError,
    FolderInUse,
    NewerDataFolder,
    OlderDataFolder,
    ServerStartFailed,
    SocketPathTooLong,
    UnusableFolder,
)
from dantegpu.apps.embedded.postgres import EmbeddedPostgres

# Runs a platform in a process of its own: start, print the postmaster's pid, wait to be killed.
_PLATFORM = """
import asyncio, sys
from pathlib import Path
from dantegpu.apps.embedded.postgres import EmbeddedPostgres

async def main():
    server = EmbeddedPostgres(Path(sys.argv[1]), Path(sys.argv[2]), dies_with_parent=sys.argv[3] == "yes")
    await server.start()
    print(server.pid, flush=True)
    await server.wait_stopped()

asyncio.run(main())
"""


@asynccontextmanager
async def _running(server: EmbeddedPostgres) -> AsyncGenerator[EmbeddedPostgres]:
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def _server(folder: Path, name: str = "a") -> EmbeddedPostgres:
    return EmbeddedPostgres(folder / name / "data", folder / name / "run")


def _run(server: EmbeddedPostgres, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(server.address.dsn()) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def _value(server: EmbeddedPostgres, statement: str) -> object:
    return _run(server, statement)[0][0]


async def test_it_runs_durably_on_a_private_socket_without_tcp(short_dir: Path):
    async with _running(_server(short_dir)) as server:
        names = (
            "fsync",
            "synchronous_commit",
            "full_page_writes",
            "data_checksums",
            "server_encoding",
            "listen_addresses",
        )
        assert [_value(server, f"SHOW {name}") for name in names] == ["on", "on", "on", "on", "UTF8", ""]
        assert _value(server, "SELECT current_user || ' ' || rolsuper FROM pg_roles WHERE rolname = current_user") == (
            "dante false"
        )
        folder = server.address.socket_dir
        modes = [
            stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / ".s.PGSQL.5432", server.log_path.parent)
        ]
        assert modes == [0o700] * 3


async def test_two_servers_run_side_by_side(short_dir: Path):
    first, second = _server(short_dir, "a"), _server(short_dir, "b")
    try:
        await asyncio.gather(first.start(), second.start())
        _run(first, "CREATE TABLE only_here ()")
        assert _value(second, "SELECT to_regclass('only_here')") is None
    finally:
        await asyncio.gather(first.stop(), second.stop())


async def test_data_survive_a_restart_and_a_killed_postmaster(short_dir: Path):
    server = _server(short_dir)
    async with _running(server):
        _run(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert server.pid is None
    async with _running(server):
        assert _value(server, "SELECT answer FROM kept") == 42
        _run(server, "UPDATE kept SET answer = 43")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert await server.wait_stopped() == -signal.SIGKILL
        await server.start()
        assert _value(server, "SELECT answer FROM kept") == 43


async def test_ctrl_c_in_the_terminal_does_not_reach_it(short_dir: Path):
    async with _running(_server(short_dir)) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) != os.getsid(0)


def _start_platform(folder: Path, *, dies_with_parent: bool) -> tuple[subprocess.Popen[str], psutil.Process]:
    arguments = [str(folder / "a" / "data"), str(folder / "a" / "run"), "yes" if dies_with_parent else "no"]
    platform = subprocess.Popen([sys.executable, "-c", _PLATFORM, *arguments], stdout=subprocess.PIPE, text=True)
    assert platform.stdout is not None
    return platform, psutil.Process(int(platform.stdout.readline()))


def _a_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


async def test_the_server_of_a_killed_platform_ends_with_it(short_dir: Path):
    platform, postmaster = _start_platform(short_dir, dies_with_parent=True)
    platform.kill()
    platform.wait()
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [postmaster], 20)
    assert gone


async def test_the_next_start_takes_over_what_a_killed_platform_left_running(short_dir: Path):
    platform, postmaster = _start_platform(short_dir, dies_with_parent=False)
    with pytest.raises(FolderInUse, match=f"process {platform.pid}"):
        await _server(short_dir).start()
    platform.kill()
    platform.wait()
    assert postmaster.is_running()
    async with _running(_server(short_dir)) as server:
        assert server.pid != postmaster.pid
        assert not postmaster.is_running()
        assert _value(server, "SELECT 1") == 1


async def test_a_pid_file_that_names_a_strangers_process_is_no_obstacle(short_dir: Path):
    server = _server(short_dir)
    async with _running(server):
        pass
    # As after a reboot, when the old postmaster's number went to another program. Not to this one: PostgreSQL knows
    # that its own parent cannot be the old postmaster.
    with _a_process() as stranger:
        cluster = server.log_path.parent / "cluster"
        content = f"{stranger.pid}\n{cluster}\n1\n5432\n{server.address.socket_dir}\n\n0 0\nready\n"
        (cluster / "postmaster.pid").write_text(content)
        (server.address.socket_dir / ".s.PGSQL.5432.lock").write_text(content)
        async with _running(server):
            assert _value(server, "SELECT 1") == 1
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize(("version", "error"), [("19", NewerDataFolder), ("16", OlderDataFolder)])
async def test_data_of_another_major_version_are_left_alone(
    short_dir: Path, version: str, error: type[EmbeddedServerError]
):
    server = _server(short_dir)
    version_path = server.log_path.parent / "cluster" / "PG_VERSION"
    version_path.parent.mkdir(parents=True)
    version_path.write_text(f"{version}\n")
    with pytest.raises(error, match=f"PostgreSQL {version}") as caught:
        await server.start()
    assert str(version_path.parent) in str(caught.value)
    assert [path.name for path in version_path.parent.iterdir()] == ["PG_VERSION"]


async def test_a_folder_with_something_else_in_it_is_refused(short_dir: Path):
    server = _server(short_dir)
    (server.log_path.parent / "cluster").mkdir(parents=True)
    with pytest.raises(UnusableFolder, match="PG_VERSION"):
        await server.start()


async def test_a_file_in_place_of_the_folder_is_named(short_dir: Path):
    (short_dir / "a").write_text("")
    with pytest.raises(UnusableFolder, match=str(short_dir / "a")):
        await _server(short_dir).start()


async def test_a_socket_path_that_is_too_long_is_refused_by_name(short_dir: Path):
    long_dir = short_dir / ("x" * 100)
    with pytest.raises(SocketPathTooLong, match="XDG_RUNTIME_DIR"):
        await EmbeddedPostgres(short_dir / "data", long_dir).start()


async def test_too_little_room_is_said_before_starting(short_dir: Path):
    server = EmbeddedPostgres(short_dir / "data", short_dir / "run", free_bytes_min=1 << 62)
    with pytest.raises(DiskFull, match="MiB free"):
        await server.start()


async def test_a_server_that_cannot_start_shows_the_end_of_its_log_and_frees_the_folder(short_dir: Path):
    folders = (short_dir / "data", short_dir / "run")
    with pytest.raises(ServerStartFailed, match="shared_buffers"):
        await EmbeddedPostgres(*folders, settings={"shared_buffers": "nonsense"}).start()
    async with _running(EmbeddedPostgres(*folders)) as server:
        assert _value(server, "SELECT 1") == 1


async def test_an_initdb_that_was_killed_leaves_nothing_half_made(short_dir: Path):
    unfinished = short_dir / "a" / "data" / "cluster.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    async with _running(_server(short_dir)):
        assert not unfinished.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_root_without_user_namespaces_runs_it_as_an_unprivileged_account(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    async with _running(_server(short_dir)) as server:
        _run(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    monkeypatch.setattr("dantegpu.apps.embedded.postgres._NAMESPACE_ACCOUNTS", ())
    async with _running(server):
        assert psutil.Process(server.pid).uids().effective != 0
        # The parent folder is root's alone, mode 0700, and the data of the first start still get there.
        assert _value(server, "SELECT answer FROM kept") == 42
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await server.wait_stopped()
        await server.start()
    monkeypatch.undo()
    async with _running(server):
        assert _value(server, "SELECT answer FROM kept") == 42
