"""The daemon's journal: what it was asked to run and what it has not yet told. Survives kill -9 and a power cut.

An attempt is written down before anything of it happens. It is forgotten only when the platform has acknowledged its
end and its folder is gone. No secret is kept here: the job's environment comes again with each desired state.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import AttemptId, JobId

SCHEMA_VERSION = 1
MAX_ATTEMPTS = 10_000
SCHEMA = """
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


@dataclass(slots=True)
class Journal:
    """SQLite in WAL mode. `synchronous=FULL`: an intent must not be lost in a power cut after the platform was told
    that the attempt starts; there are a few writes per attempt, so the syncs cost nothing that anybody would feel."""

    path: Path
    _database: sqlite3.Connection | None = field(default=None, init=False)

    def open(self) -> None:
        """Raises JournalError for a damaged file or one of a newer version."""
        try:
            database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.execute("PRAGMA journal_size_limit=1048576")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                database.close()
                raise JournalError(
                    f"{self.path} was written by a newer version of the daemon (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}): run that version, or move the folder away"
                )
            if version == 0:
                database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        except sqlite3.DatabaseError as error:
            raise JournalError(
                f"{self.path} is not usable: {error}; move it away to start with an empty one"
            ) from error
        self.path.chmod(0o600)
        self._database = database

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    @property
    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            raise JournalError("the journal is not open")
        return self._database

    def attempts(self) -> Sequence[AttemptRow]:
        rows = self._open.execute(
            "SELECT attempt_id, job_id, epoch, status, ended, handle, log_limit, log_acked FROM attempts"
            " ORDER BY attempt_id"
        )
        return [_row(row) for row in rows]

    def add(self, row: AttemptRow) -> None:
        """The intent. Raises JournalError when the journal is full: then nothing new may start."""
        count = self._open.execute("SELECT count(*) FROM attempts").fetchone()[0]
        if count >= MAX_ATTEMPTS:
            raise JournalError(f"{count} attempts are not acknowledged yet; no new one is taken before they are")
        self._open.execute(
            "INSERT INTO attempts (attempt_id, job_id, epoch, status, ended, handle, log_limit, log_acked)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                str(row.attempt_id), str(row.job_id), row.epoch, row.status.SerializeToString(), row.ended, row.handle,
                row.log_limit, row.log_acked,
            ),
        )  # fmt: skip

    def save(self, row: AttemptRow) -> None:
        """Everything of `row` but its identity."""
        self._open.execute(
            "UPDATE attempts SET status = ?, ended = ?, handle = ?, log_limit = ?, log_acked = ? WHERE attempt_id = ?",
            (
                row.status.SerializeToString(), row.ended, row.handle, row.log_limit, row.log_acked,
                str(row.attempt_id),
            ),
        )  # fmt: skip

    def remove(self, attempt_id: AttemptId) -> None:
        self._open.execute("DELETE FROM attempts WHERE attempt_id = ?", (str(attempt_id),))


def _row(raw: tuple[object, ...]) -> AttemptRow:
    attempt_id, job_id, epoch, status, ended, handle, log_limit, log_acked = cast(
        "tuple[str, str, int, bytes, int, str | None, int, int]", raw
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
    )
