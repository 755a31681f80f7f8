"""The embedded platform: PostgreSQL, NATS, every service and a provider daemon, started for you on one machine.

Same services, same gRPC, same real servers as a platform over many hosts; only started from here. Layout of its folder:

    format          version of this layout
    secrets/        keys and seeds, mode 0600
    postgres/ nats/ objects/ provider/    data
    run             link to the sockets and the services' credentials in the temporary folder, while it runs
    runtime.json    where the running platform is reached, and its process id
    provider.log    log of the provider daemon
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil
import structlog

from dantegpu.apps.bootstrap import Login, set_up_operator, write_services_creds
from dantegpu.apps.embedded.errors import EmbeddedServerError, PortTaken
from dantegpu.apps.embedded.nats import EmbeddedNats
from dantegpu.apps.embedded.postgres import EmbeddedPostgres
from dantegpu.apps.embedded.process import FolderLock, make_private_folder
from dantegpu.apps.embedded.provider import ProviderDaemon, end_leftover
from dantegpu.apps.root import Root, load_with
from dantegpu.apps.targets import ALL, TARGETS
from dantegpu.kit.lifecycle import Tasks
from dantegpu.kit.nats_jwt import load_or_create_trust

log = structlog.get_logger(__name__)

FORMAT: Final = 1
DEFAULT_PORT: Final = 8400
"""The gateway's; storage, ops, NATS and the daemon's ops pages follow with the next four."""
RESTART_DELAY_SECONDS: Final = 0.5
RESTART_DELAY_SECONDS_MAX: Final = 10.0
_RUN_DIR_PREFIX: Final = "dante-"


class NewerPlatformFolder(EmbeddedServerError):
    def __init__(self, folder: Path, found: str) -> None:
        super().__init__(
            f"the platform's folder has format {found}, this version of DanteGPU knows formats up to {FORMAT}",
            folder,
            "start the newer version that made it, or choose another folder with --data",
        )


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports on 127.0.0.1."""

    gateway: int
    storage: int
    ops: int
    nats: int
    provider_ops: int

    @staticmethod
    def from_first(first: int) -> "Ports":
        return Ports(*range(first, first + 5))

    @staticmethod
    def free() -> "Ports":
        """Five ports that nobody uses at this moment."""
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.socket()) for _ in range(5)]
            for listener in listeners:
                listener.bind(("127.0.0.1", 0))
            return Ports(*(listener.getsockname()[1] for listener in listeners))

    def require_free(self) -> None:
        """Told before anything has been started. Raises PortTaken."""
        # Not NATS's: its own start ends what a killed platform left listening there, and tells the same.
        users = {"the API": self.gateway, "the object store": self.storage, "the health pages": self.ops,
                 "the provider daemon's health pages": self.provider_ops}  # fmt: skip
        for user, port in users.items():
            with socket.socket() as probe:
                # As servers do: what a closed connection has left behind is no taken port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                    probe.listen(1)
                except OSError as error:
                    raise PortTaken(user, "127.0.0.1", port) from error


@dataclass(frozen=True, slots=True)
class Options:
    """What a platform is started with."""

    data_dir: Path
    ports: Ports
    provider: bool = True
    simulate_gpus: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """More settings per service name ("" = all), for benchmarks and tests."""
    provider_environment: dict[str, str] = field(default_factory=dict[str, str])
    """More of the daemon's `DANTE_DAEMON_*`."""
    config_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """What runtime.json says: where the platform is reached."""

    pid: int
    created_at: float
    """When the process began, by the system's clock: a number alone may by now be another process's."""
    url: str
    ops_url: str
    nats_url: str
    storage_url: str
    grpc: str
    database: str
    provider_ops_url: str | None = None
    provider_pid: int | None = None

    @staticmethod
    def read(data_dir: Path) -> "Running | None":
        """The platform that runs on this folder, or None."""
        try:
            running = Running(**json.loads((data_dir / "runtime.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return running if running.alive else None

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created_at and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Platform:
    """start() brings everything up or raises and leaves nothing running; stop() ends it in order."""

    def __init__(self, options: Options, tell: Callable[[str], None] = lambda text: None) -> None:
        self._options = options
        self._tell = tell
        self._data = options.data_dir.resolve()
        self._stack = contextlib.AsyncExitStack()
        self._tasks = Tasks("embedded platform")
        self.running: Running | None = None
        self.login: Login | None = None

    async def start(self) -> Running:
        """Raises EmbeddedServerError, PortTaken, NewerData, Unavailable, TrustFileDamaged."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """The daemon first (it leaves in order), then the doors, the services, NATS, PostgreSQL. Idempotent."""
        await self._stack.aclose()

    async def _start(self) -> Running:
        options, ports = self._options, self._options.ports
        make_private_folder(self._data)
        lock = FolderLock(self._data)
        lock.acquire()
        self._stack.callback(lock.release)
        self._check_format()
        # With a provider, the next daemon takes the jobs over; without one they are handed back.
        await asyncio.to_thread(
            end_leftover, self._data / "provider", signal.SIGKILL if options.provider else signal.SIGTERM
        )
        ports.require_free()
        run_dir = self._make_run_dir()

        secrets_dir = self._data / "secrets"
        trust = load_or_create_trust(secrets_dir)
        postgres = EmbeddedPostgres(self._data / "postgres", run_dir / "pg")
        nats = EmbeddedNats(self._data / "nats", ports.nats, trust)
        self._stack.push_async_callback(postgres.stop)
        self._stack.push_async_callback(nats.stop)
        self._tell("PostgreSQL and NATS")
        await asyncio.gather(postgres.start(), nats.start())
        self._stack.push_async_callback(self._tasks.stop)
        self._tasks.spawn(self._keep_alive(postgres, "PostgreSQL"), "postgres")
        self._tasks.spawn(self._keep_alive(nats, "NATS"), "nats")

        self._tell("services")
        creds = run_dir / "services.creds"
        write_services_creds(creds, trust)
        listen = f"unix:{run_dir}/services.sock"
        flags = self._flags(postgres.address.dsn(), nats.address.url, creds, listen)
        root = Root(ALL, load_with(options.config_file, flags))
        self._stack.push_async_callback(root.stop)
        listening = await root.start()

        url = f"http://127.0.0.1:{ports.gateway}"
        self.running = Running(
            pid=os.getpid(),
            created_at=psutil.Process().create_time(),
            url=url,
            ops_url=listening.ops_url,
            nats_url=nats.address.url,
            storage_url=f"http://127.0.0.1:{ports.storage}",
            grpc=listen,
            database=postgres.address.dsn(),
        )
        self.login, join_token = await set_up_operator(dict.fromkeys(TARGETS, listen), url, self._data)
        self._stack.callback((self._data / "runtime.json").unlink, missing_ok=True)
        if options.provider:
            self._tell("provider daemon")
            await self._start_provider(self.running, join_token, root.otlp_endpoint)
        self._note(self.running)
        return self.running

    def _check_format(self) -> None:
        path = self._data / "format"
        if not path.exists():
            _write_whole(path, f"{FORMAT}\n")
        found = path.read_text().strip()
        if not found.isdigit() or int(found) > FORMAT:
            raise NewerPlatformFolder(self._data, found[:20])

    def _make_run_dir(self) -> Path:
        """A folder with a short path, because those of Unix sockets are bounded. A killed platform's is removed."""
        link = self._data / "run"
        if link.is_symlink():
            left_behind = link.readlink()
            if left_behind.name.startswith(_RUN_DIR_PREFIX) and left_behind.parent == Path(tempfile.gettempdir()):
                shutil.rmtree(left_behind, ignore_errors=True)
            link.unlink()
        run_dir = Path(tempfile.mkdtemp(prefix=_RUN_DIR_PREFIX))
        self._stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        link.symlink_to(run_dir)
        self._stack.callback(link.unlink, missing_ok=True)
        return run_dir

    def _flags(self, database_url: str, nats_url: str, creds: Path, listen: str) -> dict[str, dict[str, Any]]:
        ports = self._options.ports
        secrets_dir = self._data / "secrets"
        flags: dict[str, dict[str, Any]] = {
            "": {
                "database_url": database_url,
                "nats_url": nats_url,
                "nats_creds": creds,
                "addresses": dict.fromkeys(TARGETS, listen),
                "listen": listen,
                "ops_listen": f"127.0.0.1:{ports.ops}",
            },
            "auth-service": {"secrets_dir": secrets_dir},
            # One PostgreSQL for all.
            "billing-payment-service": {"holds_wait_for_disk": False},
            "storage-service": {
                "data_dir": self._data / "objects",
                "secrets_dir": secrets_dir,
                "public_listen": f"127.0.0.1:{ports.storage}",
                "public_url": f"http://127.0.0.1:{ports.storage}",
            },
            "siger-api-gateway": {
                "public_listen": f"127.0.0.1:{ports.gateway}",
                "public_nats_url": nats_url,
            },
        }
        for name, more in self._options.settings.items():
            flags[name] = {**flags.get(name, {}), **more}
        return flags

    async def _keep_alive(self, server: EmbeddedPostgres | EmbeddedNats, name: str) -> None:
        """Start a server again that ended by itself; the services wait and reconnect meanwhile."""
        while True:
            status = await server.wait_stopped()
            log.error("embedded_server_ended", server=name, status=status)
            delay_seconds = RESTART_DELAY_SECONDS
            while True:
                try:
                    await server.start()
                    break
                except EmbeddedServerError as error:
                    log.error("embedded_server_not_restarted", server=name, why=str(error), retry_in=delay_seconds)
                    await asyncio.sleep(delay_seconds)
                    delay_seconds = min(delay_seconds * 2, RESTART_DELAY_SECONDS_MAX)
            log.info("embedded_server_restarted", server=name)

    async def _start_provider(self, running: Running, join_token: str, otlp_endpoint: str) -> None:
        ops_listen = f"127.0.0.1:{self._options.ports.provider_ops}"
        told = {
            # Told at each start, because the ports may be others than when the machine joined.
            "DANTE_DAEMON_GATEWAY_URL": running.url,
            "DANTE_DAEMON_NATS_URL": running.nats_url,
            "DANTE_DAEMON_JOIN_TOKEN": join_token,
            "DANTE_DAEMON_SIMULATE_GPUS": self._options.simulate_gpus,
            "DANTE_DAEMON_OTLP_ENDPOINT": otlp_endpoint,
            "DANTE_DAEMON_OPS_LISTEN": ops_listen,
            **self._options.provider_environment,
        }

        def note(pid: int | None) -> None:
            if self.running is not None:
                url = f"http://{ops_listen}" if pid else None
                self.running = replace(self.running, provider_pid=pid, provider_ops_url=url)
                self._note(self.running)

        daemon = ProviderDaemon(self._data / "provider", self._data / "provider.log", told, note)
        self._stack.push_async_callback(daemon.stop)
        await daemon.start()

    def _note(self, running: Running) -> None:
        _write_whole(self._data / "runtime.json", json.dumps(asdict(running)))


def _write_whole(path: Path, text: str) -> None:
    """Mode 0600, and never half: a full disk leaves the old file."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    fresh.replace(path)
