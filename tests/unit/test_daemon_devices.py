"""Which GPUs may be leased: health, strangers on them, and memory that an ended attempt has left behind."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon import devices
from dantegpu.daemon.devices import DeviceWatch
from dantegpu.daemon.probe.devices import GpuSample, simulated_gpus
from dantegpu.daemon.scrub import HeldFile, Scrubber
from tests.fixtures.nvml import GpuMemory

GIB = 1 << 30


class Bench:
    """A watch over two GPUs whose samples a test sets."""

    def __init__(self, folder: Path, *, shares: bool = False) -> None:
        self.samples = [GpuSample(0, vram_used_bytes=GIB // 4), GpuSample(1, vram_used_bytes=GIB // 4)]
        self.changes = 0
        self.gpus = [replace(gpu, uuid=f"GPU-{gpu.index}", vendor="nvidia") for gpu in simulated_gpus("RTX 4090:2")]
        self.folder = folder
        self.shares = shares
        self.watch = self.another()
        self.watch.on_change.append(self.changed)

    def another(self) -> DeviceWatch:
        """As the next daemon on this machine makes it."""
        return DeviceWatch(self.sample, self.gpus, HeldFile(self.folder / "held"), Scrubber(), shares=self.shares)

    async def sample(self) -> Sequence[GpuSample]:
        return self.samples

    def changed(self) -> None:
        self.changes += 1

    def look(self, *samples: GpuSample, own: set[int] | None = None) -> None:
        self.samples = list(samples) or self.samples
        self.watch.look(self.samples, set() if own is None else own)


def lease(index: int, milli: int = 1000) -> machine_pb2.DeviceLease:
    return machine_pb2.DeviceLease(index=index, milli=milli)


def test_a_device_is_shared_only_where_its_owner_allows_it_and_only_within_a_team(tmp_path: Path):
    whole, shared = Bench(tmp_path), Bench(tmp_path, shares=True)
    assert "leased as a whole only" in whole.watch.refusal([lease(0, 500)], "us")
    assert shared.watch.refusal([lease(0, 500)], "us") == ""
    shared.watch.held("att", "us", [0])
    assert shared.watch.refusal([lease(0, 500)], "us") == ""
    assert "in use by another team" in shared.watch.refusal([lease(0, 500)], "them")
    assert shared.watch.refusal([lease(1)], "them") == ""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.look()
    return bench


def test_a_device_with_a_fault_is_taken_out_and_comes_back_when_it_is_well(bench: Bench):
    bench.look(GpuSample(0, problem="XID error 79"), GpuSample(1))
    assert bench.watch.problems == {0: "XID error 79"}
    assert bench.watch.refusal([lease(1)], "us") == ""
    assert "GPU 0 XID error 79" in bench.watch.refusal([lease(1), lease(0)], "us")
    bench.look(GpuSample(0), GpuSample(1))
    assert bench.watch.problems == {}
    assert bench.changes == 2


def test_a_device_that_a_stranger_uses_is_taken_out_for_as_long_as_he_does(bench: Bench):
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        bench.look(GpuSample(0, pids=frozenset({stranger.pid})), GpuSample(1, pids=frozenset({os.getpid()})),
                   own={os.getpid()})  # fmt: skip
        assert bench.watch.problems == {0: "is used by 1 processes of the machine itself"}
    finally:
        stranger.kill()
        stranger.wait()
    # The driver may name it for a moment longer than it lives.
    bench.look(GpuSample(0, pids=frozenset({stranger.pid})), GpuSample(1))
    assert bench.watch.problems == {}


def test_where_an_executor_cannot_tell_its_processes_nobody_on_a_leased_device_is_a_stranger(bench: Bench):
    bench.watch.held("att", "us", [0])
    samples = [GpuSample(0, pids=frozenset({os.getpid()})), GpuSample(1, pids=frozenset({os.getpid()}))]
    bench.watch.look(samples, None)
    assert list(bench.watch.problems) == [1]


@pytest.mark.needs("cc")
async def test_a_device_is_given_on_only_when_its_memory_is_free_and_overwritten(
    bench: Bench, gpu_memory: GpuMemory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "FREED_POLL_SECONDS", 0.001)
    bench.watch.held("att", "us", [0])
    fills = [GIB * 20, GIB * 20, GIB // 4]

    async def sample() -> Sequence[GpuSample]:
        return [GpuSample(0, vram_used_bytes=fills.pop(0) if len(fills) > 1 else fills[0])]

    monkeypatch.setattr(bench.watch, "_sample", sample)
    await bench.watch.released("att")
    assert fills == [GIB // 4]
    assert bench.watch.problems == {}
    assert gpu_memory.clean


@pytest.mark.needs("cc")
async def test_a_device_whose_memory_stays_full_is_withheld_until_it_is_free_and_overwritten(
    bench: Bench, gpu_memory: GpuMemory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "FREED_TIMEOUT_SECONDS", 0.0)
    bench.watch.held("att", "us", [0])
    full = GpuSample(0, vram_used_bytes=GIB * 20 + GIB // 4)
    bench.samples = [full, GpuSample(1)]
    await bench.watch.released("att")
    await bench.watch.clean()
    assert bench.watch.problems == {0: "is withheld: 20GB of its memory were not freed by the last job"}
    bench.look(full, GpuSample(1))
    assert bench.watch.problems
    bench.look(GpuSample(0, vram_used_bytes=GIB // 4), GpuSample(1))
    assert "not cleared after the last job" in bench.watch.problems[0]
    assert not gpu_memory.clean
    await bench.watch.clean()
    assert bench.watch.problems == {}
    assert gpu_memory.clean


async def test_a_shared_device_is_not_asked_for_its_memory_while_others_use_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "FREED_TIMEOUT_SECONDS", 0.0)
    bench.watch.held("one", "us", [0])
    bench.watch.held("two", "us", [0])
    bench.samples = [GpuSample(0, vram_used_bytes=GIB * 20)]
    await bench.watch.released("one")
    assert bench.watch.problems == {}
    await bench.watch.released("two")
    assert list(bench.watch.problems) == [0]


@pytest.mark.needs("cc")
async def test_a_device_whose_memory_cannot_be_overwritten_is_withheld_with_the_reason_until_it_can(
    bench: Bench, gpu_memory: GpuMemory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DANTE_FAKE_CUDA_FAILS", "cuCtxSynchronize")
    bench.watch.held("att", "us", [0])
    await bench.watch.released("att")
    expected = "is withheld: its memory was not cleared after the last job: cuCtxSynchronize failed with CUDA error 1"
    assert bench.watch.problems == {0: expected}
    assert expected in bench.watch.refusal([lease(0)], "us")
    monkeypatch.setenv("DANTE_FAKE_CUDA_FAILS", "cuMemAlloc_v2")
    os.truncate(gpu_memory.path, 128 << 20)
    await bench.watch.clean()
    assert bench.watch.problems[0].endswith("134217728 bytes could not be reached")
    gpu_memory.fill()
    monkeypatch.delenv("DANTE_FAKE_CUDA_FAILS")
    await bench.watch.clean()
    assert bench.watch.problems == {}
    assert gpu_memory.clean


async def test_without_the_drivers_library_a_device_is_withheld_after_its_first_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    bench.watch.held("att", "us", [0])
    await bench.watch.released("att")
    assert "libcuda.so.1 of its driver is missing" in bench.watch.problems[0]


@pytest.mark.needs("cc")
async def test_a_daemon_that_died_leaves_its_successor_a_device_to_clear_and_one_that_is_still_in_use(
    bench: Bench, gpu_memory: GpuMemory
):
    bench.watch.held("ended", "us", [0])
    bench.watch.held("lives", "us", [1])
    after = bench.another()
    after.only({"lives"})
    after.look(bench.samples, set())
    assert list(after.problems) == [0]
    assert "in use by another team" in after.refusal([lease(1)], "them")
    await after.clean()
    assert after.problems == {}
    assert gpu_memory.clean
    gpu_memory.fill()
    await after.released("lives")
    assert gpu_memory.clean
    assert after.refusal([lease(1)], "them") == ""
