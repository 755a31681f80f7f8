"""An attempt on a cluster's node ends with its lease, and not before."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dantegpu.daemon.executors.slurm import fence
from dantegpu.daemon.executors.slurm.fence import LeaseWatch
from dantegpu.daemon.leases import LeaseFile, boottime

ATTEMPT = "att_1"
WAIT_SECONDS = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leases.json"


@pytest.fixture
def watch(path: Path) -> Iterator[LeaseWatch]:
    """Of the attempt, and ended with the test: its threads would look on."""
    watch = LeaseWatch(path, ATTEMPT)
    yield watch
    watch.stop()


def renew(path: Path, rest_seconds: float, *, seconds_ago: float = 0.0) -> float:
    """As a daemon does it whose boot clock shows other numbers than the node's. `seconds_ago` by the node's clock."""
    now = boottime() + 1_000_000
    fresh = path.with_suffix(".fresh")
    LeaseFile(fresh).write({ATTEMPT: now + rest_seconds, "att_2": now + 3600}, now)
    raw = json.loads(fresh.read_text())
    fresh.write_text(json.dumps(raw | {"wall": raw["wall"] - seconds_ago}))
    fresh.rename(path)
    return boottime()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_attempt_ends_when_its_lease_does(path: Path, watch: LeaseWatch):
    written_at = renew(path, 0.3)
    killed = threading.Event()
    assert watch.may_start()
    watch.start(killed.set)
    assert killed.wait(WAIT_SECONDS)
    assert boottime() - written_at >= 0.3


def test_a_lease_that_is_renewed_ends_nothing_also_when_its_file_is_gone_for_a_while(path: Path, watch: LeaseWatch):
    renew(path, 1.5)
    killed = threading.Event()
    assert watch.may_start()
    watch.start(killed.set)
    over_at = boottime() + 2
    while boottime() < over_at:
        renew(path, 1.5)
        path.rename(path.with_suffix(".gone"))
        assert not killed.wait(0.02)
        path.with_suffix(".gone").rename(path)
        assert not killed.wait(0.05)


def test_a_renewal_that_is_seen_only_after_the_end_counts(path: Path, watch: LeaseWatch):
    """As when all processes of a job were stopped for longer than its lease."""
    renew(path, 0.3)
    killed = threading.Event()
    assert watch.may_start()
    over_at = boottime() + 0.3
    until(lambda: boottime() > over_at)
    renew(path, 3600)
    watch.start(killed.set)
    assert not killed.wait(0.3)


def test_a_file_system_that_hangs_keeps_none_alive(path: Path, watch: LeaseWatch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fence, "HANG_SECONDS", 0.1)
    renew(path, 0.3)
    killed = threading.Event()
    assert watch.may_start()
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for a writer
    watch.start(killed.set)
    assert killed.wait(WAIT_SECONDS)
    os.close(os.open(path, os.O_RDWR))


def test_what_slurm_starts_long_after_its_daemon_is_gone_does_not_start(path: Path, monkeypatch: pytest.MonkeyPatch):
    renew(path, 0.3, seconds_ago=5)
    assert not LeaseWatch(path, ATTEMPT).may_start()
    monkeypatch.setattr(fence, "NAMED_SECONDS", 0.1)
    assert not LeaseWatch(path, "att_3").may_start()
    path.unlink()
    assert not LeaseWatch(path, ATTEMPT).may_start()


def test_a_clock_that_is_wrong_delays_a_start_until_the_next_renewal_only(path: Path):
    renew(path, 5, seconds_ago=3600)
    watch = LeaseWatch(path, ATTEMPT)
    with ThreadPoolExecutor(1) as thread:
        may = thread.submit(watch.may_start)
        until(lambda: bool(renew(path, 5, seconds_ago=3600)) and may.done())
        assert may.result()


def test_signals_go_to_the_thread_that_waits_for_the_job(path: Path, watch: LeaseWatch):
    renew(path, 3600)
    before = threading.enumerate()
    watch.start(lambda: None)
    fresh = [thread for thread in threading.enumerate() if thread not in before]
    assert len(fresh) == 2
    for thread in fresh:
        lines = Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
        blocked = int(next(line for line in lines if line.startswith("SigBlk")).split()[1], 16)
        assert blocked & 1 << 14  # SIGTERM
        assert blocked & 1 << 13  # SIGALRM
