"""The journal keeps what must not be forgotten, and leases end by themselves."""

import sqlite3
from pathlib import Path

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon import journal as journal_module
from dantegpu.daemon.journal import AttemptRow, Journal, JournalError
from dantegpu.daemon.leases import LeaseFile, lease_until
from dantegpu.domain.ids import AttemptId, JobId


def a_row() -> AttemptRow:
    status = machine_pb2.AttemptStatus(epoch=3, seq=1, state=jobs_pb2.STARTING)
    return AttemptRow(AttemptId.new(), JobId.new(), 3, status, log_limit=100)


def reopened(journal: Journal) -> Journal:
    journal.close()
    again = Journal(journal.path)
    again.open()
    return again


def test_what_was_written_is_there_after_a_restart(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    row = a_row()
    journal.add(row)
    row.status.state, row.status.seq, row.handle, row.ended, row.log_acked = jobs_pb2.FAILED, 4, "h", True, 50
    row.status.results.add(path="a", size_bytes=1)
    journal.save(row)
    journal = reopened(journal)
    assert list(journal.attempts()) == [row]
    journal.remove(row.attempt_id)
    assert list(reopened(journal).attempts()) == []


def test_the_same_attempt_is_never_taken_twice(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    row = a_row()
    journal.add(row)
    with pytest.raises(sqlite3.IntegrityError):
        journal.add(row)


def test_a_full_journal_takes_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "MAX_ATTEMPTS", 1)
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    journal.add(a_row())
    with pytest.raises(JournalError, match="not acknowledged"):
        journal.add(a_row())


def test_a_journal_of_a_newer_version_is_a_clear_error(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    journal.close()
    with sqlite3.connect(journal.path) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="newer version"):
        journal.open()


def test_a_damaged_journal_is_a_clear_error(tmp_path: Path):
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(JournalError, match="not usable"):
        Journal(path).open()


def test_the_journal_is_private(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_a_lease_ends_before_the_server_may_give_it_to_somebody_else():
    assert lease_until(100.0, 30_000) == 125.0
    assert lease_until(100.0, 1_000) == pytest.approx(100.8)  # pyright: ignore[reportUnknownMemberType]


def test_leases_outlive_the_daemon_but_not_the_boot(tmp_path: Path):
    path = tmp_path / "leases.json"
    LeaseFile(path).write({"att_1": 12.5})
    assert LeaseFile(path).read() == {"att_1": 12.5}
    path.write_text(path.read_text().replace('"boot": "', '"boot": "x'))
    assert LeaseFile(path).read() == {}
    path.write_text("{half")
    assert LeaseFile(path).read() == {}
