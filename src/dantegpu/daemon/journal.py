"""The daemon's journal: what it was asked to run and what it has not yet told. Survives kill -9 and a power cut.

An attempt is written down before anything of it happens. It is forgotten only when the platform has acknowledged its
end and its folder is gone. No secret is kept here: the job's environment comes again with each desired state.

Changes are noted at once and written by a thread of the journal's own: the first goes alone, what is noted while it
is on its way to the disk is the next transaction. So one sync of the disk serves however many attempts are waiting.
"""

import asyncio
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import structlog

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import AttemptId, JobId

log = structlog.get_logger(__name__)

SCHEMA_VERSION = 2
MAX_ATTEMPTS = 10_000
LAZY_SECONDS = 0.2
"""How long a change that nobody waits for may lie in memory: told again after a crash, it would change nothing."""
_SCHEMA = """
CREATE TABLE attempts (
    attempt_id     TEXT PRIMARY KEY,
    job_id         TEXT NOT NULL,
    epoch          INTEGER NOT NULL CHECK (epoch > 0),
    status         BLOB NOT NULL,             -- AttemptStatus: state, seq, outcome, results
    ended          INTEGER NOT NULL DEFAULT 0,
    handle         TEXT,                      -- set before the start
    log_limit      INTEGER NOT NULL,
    log_acked      INTEGER NOT NULL DEFAULT 0 -- bytes of the log that the platform has stored
) STRICT;
"""
_UPGRADES = {
    1: """
    ALTER TABLE attempts ADD COLUMN boot TEXT NOT NULL DEFAULT '';        -- the boot that lease_until counts from
    ALTER TABLE attempts ADD COLUMN lease_until REAL NOT NULL DEFAULT 0;  -- of the first lease; see leases.py
    """
}
_COLUMNS = "attempt_id, job_id, epoch, status, ended, handle, log_limit, log_acked, boot, lease_until"
_INSERT = f"INSERT INTO attempts ({_COLUMNS}) VALUES ({', '.join('?' * 10)})"
_UPDATE = "UPDATE attempts SET status = ?, ended = ?, handle = ?, log_acked = ? WHERE attempt_id = ?"
_DELETE = "DELETE FROM attempts WHERE attempt_id = ?"

type _Change = tuple[str, tuple[object, ...]]


class JournalError(Exception):
    """The journal cannot be used; the message says why and what to do."""


@dataclass(slots=True)
class AttemptRow:
    """One attempt as the daemon knows it. `status` is what the platform is told."""

    attempt_id: AttemptId
    job_id: JobId
    epoch: int
    status: machine_pb2.AttemptStatus
    ended: bool = False
    handle: str | None = None
    log_limit: int = 0
    log_acked: int = 0
    boot: str = ""
    lease_until: float = 0.0
    """Of the lease that it came with, on the clock of `boot`."""


@dataclass(slots=True)
class Journal:
    """SQLite in WAL mode, bounded: at most MAX_ATTEMPTS rows, and a WAL that is cut back after each checkpoint.

    `synchronous=FULL`: an intent must not be lost in a power cut, or the attempt would be started again after it.
    """

    path: Path
    _database: sqlite3.Connection | None = field(default=None, init=False)
    _thread: ThreadPoolExecutor | None = field(default=None, init=False)
    _known: set[AttemptId] = field(default_factory=set[AttemptId], init=False)
    _noted: list[_Change] = field(default_factory=list[_Change], init=False)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]], init=False)
    _writing: bool = field(default=False, init=False)
    _lazily: asyncio.TimerHandle | None = field(default=None, init=False)
    _urgent: bool = field(default=False, init=False)
    """Somebody will soon wait for what was noted."""

    def open(self) -> None:
        """Raises JournalError for a damaged file or one of a newer version."""
        try:
            database = self._connect()
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                database.close()
                raise JournalError(
                    f"{self.path} was written by a newer version of the daemon (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}): run that version, or move the folder away"
                )
            for older in range(version, SCHEMA_VERSION):
                statements = _UPGRADES.get(older, _SCHEMA)
                database.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version={older + 1}; COMMIT;")
            self._known = {AttemptId.parse(text) for (text,) in database.execute("SELECT attempt_id FROM attempts")}
        except sqlite3.DatabaseError as error:
            raise JournalError(
                f"{self.path} is not usable: {error}; move it away to start with an empty one"
            ) from error
        self._database = database
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA journal_size_limit=1048576")
        self.path.chmod(0o600)
        return database

    def close(self) -> None:
        """Write what was noted, also what nobody waited for. Idempotent."""
        if self._database is None or self._thread is None:
            return
        if self._lazily is not None:
            self._lazily.cancel()
        self._thread.shutdown(wait=True)
        try:
            self._write(self._noted)
        except sqlite3.Error as error:
            log.error("journal_not_written", error=str(error), changes=len(self._noted))
        self._noted = []
        self._database.close()
        self._database = self._thread = None

    @property
    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            raise JournalError("the journal is not open")
        return self._database

    def attempts(self) -> Sequence[AttemptRow]:
        """What is on the disk."""
        return [_row(row) for row in self._open.execute(f"SELECT {_COLUMNS} FROM attempts ORDER BY attempt_id")]

    # --- changes ------------------------------------------------------------------------------------------------------

    def add(self, row: AttemptRow) -> None:
        """Note the intent; `committed` tells when it is written. Raises JournalError when nothing new may start."""
        if row.attempt_id in self._known:
            raise JournalError(f"{row.attempt_id} is in the journal already")
        if len(self._known) >= MAX_ATTEMPTS:
            raise JournalError(
                f"{len(self._known)} attempts are not acknowledged yet; no new one is taken before they are"
            )
        self._known.add(row.attempt_id)
        self._noted.append((
            _INSERT,
            (
                str(row.attempt_id), str(row.job_id), row.epoch, row.status.SerializeToString(), row.ended, row.handle,
                row.log_limit, row.log_acked, row.boot, row.lease_until,
            ),
        ))  # fmt: skip

    def save(self, row: AttemptRow) -> None:
        """Note everything of `row` that changes. Written soon, whether or not anybody waits for `committed`."""
        values = (row.status.SerializeToString(), row.ended, row.handle, row.log_acked, str(row.attempt_id))
        self._noted.append((_UPDATE, values))
        self._write_lazily()

    def remove(self, attempt_id: AttemptId) -> None:
        """Note that nothing of the attempt is left. Written soon."""
        self._known.discard(attempt_id)
        self._noted.append((_DELETE, (str(attempt_id),)))
        self._write_lazily()

    def write_soon(self) -> None:
        """Begin to write what was noted, although nobody waits for it yet."""
        self._urgent = True
        if not self._writing:
            asyncio.get_running_loop().call_soon(self._write_next)

    async def committed(self) -> None:
        """Return when all that was noted before is on the disk. Raises JournalError when it could not be written."""
        if not self._noted and not self._writing:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        if not self._writing:
            # Whatever else this round of the event loop notes goes along.
            asyncio.get_running_loop().call_soon(self._write_next)
        await waiter

    def _write_lazily(self) -> None:
        if self._lazily is None and not self._writing:
            self._lazily = asyncio.get_running_loop().call_later(LAZY_SECONDS, self._write_next)

    def _write_next(self) -> None:
        """Send what was noted so far to the disk, unless something is on its way there; then it is next."""
        if self._lazily is not None:
            self._lazily.cancel()
            self._lazily = None
        if self._writing or self._thread is None:
            return
        changes, self._noted = self._noted, []
        waiting, self._waiting = self._waiting, []
        if not changes and not waiting:
            return
        self._writing, self._urgent = True, False
        writing = asyncio.get_running_loop().run_in_executor(self._thread, self._write, changes)
        writing.add_done_callback(lambda done: self._written(done, changes, waiting))

    def _written(self, done: asyncio.Future[None], changes: list[_Change], waiting: list[asyncio.Future[None]]) -> None:
        self._writing = False
        problem = None if done.cancelled() else done.exception()
        if problem is not None:
            log.error("journal_not_written", error=str(problem), changes=len(changes))
            # Intents are given up by whoever waits for them. The rest, harmless to repeat, goes with the next ones.
            self._noted[:0] = [change for change in changes if change[0] != _INSERT]
        for waiter in waiting:
            if waiter.done():
                continue
            if problem is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(JournalError(f"{self.path} could not be written: {problem}"))
        if self._waiting or self._urgent:
            self._write_next()
        elif self._noted:
            self._write_lazily()

    def _write(self, changes: Sequence[_Change]) -> None:
        """One transaction. Runs in the journal's thread, which leaves the event loop free while the disk syncs."""
        if not changes:
            return
        database = self._open
        database.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in changes:
                database.execute(statement, values)
            database.execute("COMMIT")
        except sqlite3.Error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


def _row(raw: tuple[object, ...]) -> AttemptRow:
    attempt_id, job_id, epoch, status, ended, handle, log_limit, log_acked, boot, lease_until = cast(
        "tuple[str, str, int, bytes, int, str | None, int, int, str, float]", raw
    )
    return AttemptRow(
        AttemptId.parse(attempt_id),
        JobId.parse(job_id),
        epoch,
        machine_pb2.AttemptStatus.FromString(status),
        bool(ended),
        handle,
        log_limit,
        log_acked,
        boot,
        lease_until,
    )
