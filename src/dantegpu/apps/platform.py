"""The embedded platform: PostgreSQL, NATS, every service and a provider daemon, started for you on one machine.

Same services, same gRPC, same real servers as a platform over many hosts; only started from here. Layout of its folder:

    format          version of this layout
    secrets/        keys and seeds, mode 0600
    postgres/ nats/ objects/ provider/    data
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
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import structlog

from dantegpu.apps.bootstrap import Login, set_up_operator
from dantegpu.apps.embedded.errors import EmbeddedServerError
from dantegpu.apps.embedded.nats import EmbeddedNats
from dantegpu.apps.embedded.postgres import EmbeddedPostgres
from dantegpu.apps.embedded.process import FolderLock, make_private_folder
from dantegpu.apps.root import Root, load_with
from dantegpu.apps.targets import ALL, TARGETS
from dantegpu.kit.lifecycle import Tasks
from dantegpu.kit.nats_jwt import (
    create_user_key,
    creds_file_text,
    load_or_create_trust,
    services_permissions,
    sign_user_jwt,
)

log = structlog.get_logger(__name__)

FORMAT: Final = 1
DEFAULT_PORT: Final = 8400
"""The gateway's; storage, ops and NATS follow with the next three."""


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

    @staticmethod
    def from_first(first: int) -> "Ports":
        return Ports(first, first + 1, first + 2, first + 3)

    @staticmethod
    def free() -> "Ports":
        """Four ports that nobody uses at this moment."""
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.socket()) for _ in range(4)]
            for listener in listeners:
                listener.bind(("127.0.0.1", 0))
            return Ports(*(listener.getsockname()[1] for listener in listeners))


@dataclass(frozen=True, slots=True)
class Options:
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
    url: str
    ops_url: str
    nats_url: str
    storage_url: str
    grpc: str
    database: str
    provider_pid: int | None = None

    @staticmethod
    def read(data_dir: Path) -> "Running | None":
        """The platform that runs on this folder, or None."""
        try:
            running = Running(**json.loads((data_dir / "runtime.json").read_text()))
            os.kill(running.pid, 0)
        except (OSError, ValueError, TypeError):
            return None
        return running


class Platform:
    """start() brings everything up or raises and leaves nothing running; stop() ends it in order."""

    def __init__(self, options: Options, tell: Callable[[str], None] = lambda text: None) -> None:
        self._options = options
        self._tell = tell
        self._data = options.data_dir.resolve()
        self._stack = contextlib.AsyncExitStack()
        self._tasks = Tasks("embedded platform")
        self._provider: asyncio.subprocess.Process | None = None
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
        run_dir = Path(tempfile.mkdtemp(prefix="dante-"))  # short: Unix socket paths are bounded
        self._stack.callback(shutil.rmtree, run_dir, ignore_errors=True)

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
        key = create_user_key()
        jwt = sign_user_jwt(
            trust.account_seed, trust.account_public, key.public, "services", services_permissions(), None
        )
        creds.touch(mode=0o600)
        creds.write_text(creds_file_text(jwt, key.seed))
        listen = f"unix:{run_dir}/services.sock"
        flags = self._flags(postgres.address.dsn(), nats.address.url, creds, listen)
        root = Root(ALL, load_with(options.config_file, flags))
        self._stack.push_async_callback(root.stop)
        listening = await root.start()

        url = f"http://127.0.0.1:{ports.gateway}"
        running = Running(
            pid=os.getpid(),
            url=url,
            ops_url=listening.ops_url,
            nats_url=nats.address.url,
            storage_url=f"http://127.0.0.1:{ports.storage}",
            grpc=listen,
            database=postgres.address.dsn(),
        )
        self.login, join_token = await set_up_operator(dict.fromkeys(TARGETS, listen), url, self._data)
        if options.provider:
            self._tell("provider daemon")
            running = await self._start_provider(running, join_token)
        self._note(running)
        self.running = running
        return running

    def _check_format(self) -> None:
        path = self._data / "format"
        if not path.exists():
            path.write_text(f"{FORMAT}\n")
        found = path.read_text().strip()
        if not found.isdigit() or int(found) > FORMAT:
            raise NewerPlatformFolder(self._data, found[:20])

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
            await server.start()
            log.info("embedded_server_restarted", server=name)

    # --- the provider daemon ------------------------------------------------------------------------------------------

    async def _start_provider(self, running: Running, join_token: str) -> Running:
        state_dir = self._data / "provider"
        make_private_folder(state_dir)
        told = {
            "DANTE_DAEMON_STATE": str(state_dir),
            "DANTE_DAEMON_GATEWAY_URL": running.url,
            "DANTE_DAEMON_JOIN_TOKEN": join_token,
            "DANTE_DAEMON_SIMULATE_GPUS": self._options.simulate_gpus,
            **self._options.provider_environment,
        }
        with (self._data / "provider.log").open("ab") as log_file:
            self._provider = await asyncio.create_subprocess_exec(
                # -P: a module in the user's folder must not shadow the standard library's.
                sys.executable, "-P", "-m", "dantegpu.daemon",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                # The terminal's Ctrl-C is for us; we stop the daemon in order.
                start_new_session=True,
                env={**os.environ, **told},
            )  # fmt: skip
        self._stack.push_async_callback(self._stop_provider)
        return replace(running, provider_pid=self._provider.pid)

    async def _stop_provider(self) -> None:
        provider = self._provider
        if provider is None or provider.returncode is not None:
            return
        provider.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(15):
                await provider.wait()
        except TimeoutError:
            provider.kill()
            await provider.wait()

    def _note(self, running: Running) -> None:
        path = self._data / "runtime.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(running)))
        self._stack.callback(path.unlink, missing_ok=True)
