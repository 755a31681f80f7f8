"""The journal keeps what must not be forgotten, and leases end by themselves."""

import asyncio
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


async def test_what_was_committed_is_there_after_a_restart(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    row = a_row()
    row.boot, row.lease_until = "b", 12.5
    journal.add(row)
    row.status.state, row.status.seq, row.handle, row.ended, row.log_acked = jobs_pb2.FAILED, 4, "h", True, 50
    row.status.results.add(path="a", size_bytes=1)
    journal.save(row)
    await journal.committed()
    # Read by somebody else while the first is open: nothing waits for a proper end.
    again = Journal(journal.path)
    again.open()
    assert list(again.attempts()) == [row]
    again.remove(row.attempt_id)
    assert list(reopened(again).attempts()) == []
    journal.close()


async def test_what_nobody_waited_for_is_written_all_the_same(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    row = a_row()
    journal.add(row)
    await journal.committed()
    row.ended = True
    journal.save(row)
    async with asyncio.timeout(10):
        while not journal.attempts()[0].ended:
            await asyncio.sleep(0.01)
    journal.close()


async def test_attempts_that_come_together_share_a_transaction(tmp_path: Path):
    """Without that, the disk's syncs and not the processor would set how many jobs a machine starts per second."""
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    begun: list[str] = []
    journal._open.set_trace_callback(lambda text: begun.append(text) if text.startswith("BEGIN") else None)  # pyright: ignore[reportPrivateUsage]

    async def intend() -> None:
        journal.add(a_row())
        await journal.committed()

    await asyncio.gather(*(intend() for _ in range(50)))
    assert len(journal.attempts()) == 50
    assert len(begun) <= 2
    journal.close()


async def test_an_intent_that_cannot_be_written_is_an_error_and_later_changes_go_on(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    kept = a_row()
    journal.add(kept)
    await journal.committed()
    kept.ended = True
    journal.save(kept)
    journal._open.execute("PRAGMA query_only = ON")  # pyright: ignore[reportPrivateUsage]
    journal.add(a_row())
    with pytest.raises(JournalError, match="could not be written"):
        await journal.committed()
    journal._open.execute("PRAGMA query_only = OFF")  # pyright: ignore[reportPrivateUsage]
    await journal.committed()
    assert [row.ended for row in journal.attempts()] == [True]
    journal.close()


async def test_a_journal_of_the_first_version_is_taken_over(tmp_path: Path):
    path = tmp_path / "journal.db"
    row = a_row()
    with sqlite3.connect(path) as database:
        database.executescript(f"{journal_module._SCHEMA} PRAGMA user_version = 1;")  # pyright: ignore[reportPrivateUsage]
        values = (str(row.attempt_id), str(row.job_id), 3, row.status.SerializeToString(), 0, "h", 100, 0)
        database.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    database.close()
    journal = Journal(path)
    journal.open()
    row.handle = "h"
    assert list(journal.attempts()) == [row]
    journal.close()


def test_the_same_attempt_is_never_taken_twice(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.open()
    row = a_row()
    journal.add(row)
    with pytest.raises(JournalError, match="already"):
        journal.add(row)
    with pytest.raises(JournalError, match="already"):
        reopened(journal).add(row)


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
    LeaseFile(path).write({"att_1": 12.5}, 10.0)
    assert LeaseFile(path).read() == {"att_1": 12.5}
    path.write_text(path.read_text().replace('"boot": "', '"boot": "x'))
    assert LeaseFile(path).read() == {}
    path.write_text("{half")
    assert LeaseFile(path).read() == {}
