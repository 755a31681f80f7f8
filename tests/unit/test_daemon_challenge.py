"""The self-test: what it measures, and that a machine which computes wrongly does not pass."""

from pathlib import Path

import numpy as np
import pytest

from dantegpu.daemon.probe import challenge
from dantegpu.daemon.probe.challenge import WrongResult, check_product, main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenge, "CPU_SIDE", 64)
    monkeypatch.setattr(challenge, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(challenge, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(challenge, "MEASURE_SECONDS", 0.001)


def test_a_sound_machine_gets_its_figures_and_leaves_nothing_on_the_disk(tmp_path: Path):
    found = main(tmp_path, seed=7)
    assert all(found[name] > 0 for name in ("cpu_gflops", "memory_gbps", "disk_write_mbps", "disk_read_mbps"))
    assert "problem" not in found
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_number_in_a_product_is_found():
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((128, 128), dtype=np.float32) for _ in range(2))
    r = random.standard_normal(128, dtype=np.float32)
    check_product(a, b, a @ b, r, "fp32")
    wrong = a @ b
    wrong[3, 5] += 50
    with pytest.raises(WrongResult, match="fp32 matrix product is wrong"):
        check_product(a, b, wrong, r, "fp32")
    with pytest.raises(WrongResult):
        check_product(a, b, wrong * np.float32("nan"), r, "fp32")


def test_a_disk_that_gives_back_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forgetful(_descriptor: int) -> bytes:
        return b"something else"

    monkeypatch.setattr(challenge, "_read", forgetful)
    assert main(tmp_path, seed=7)["problem"] == "the disk gave back something else than was written"
