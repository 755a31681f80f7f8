"""The daemon on a machine with NVIDIA's cards (a library that the tests build): who gets which, and who gets none."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon import agent, benchmarks, devices, meter
from dantegpu.daemon.probe import nvml
from tests.fixtures.machines import MachinePlatform, RunningDaemon, daemon_settings, until
from tests.fixtures.nvml import H100, GpuMemory, Nvidia

pytestmark = pytest.mark.needs("cc")
GIB = 1 << 30


@pytest.fixture
async def gpu_daemon(
    nvidia: Nvidia, machine_platform: MachinePlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningDaemon]:
    """A daemon with two cards."""
    monkeypatch.setattr(agent, "SCRUB_AGAIN_SECONDS", 0.1)
    nvml.DEVICE_FOLDER.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (nvml.DEVICE_FOLDER / name).touch()
    for _ in range(2):
        nvidia.add(H100, used=GIB // 4)
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "machine"))
    await daemon.start()
    await until(lambda: machine_platform.heartbeats)
    yield daemon
    await daemon.stop()


def problems(platform: MachinePlatform) -> list[str] | None:
    """What the last inventory says of each device."""
    told = [beat.inventory for beat in platform.heartbeats if beat.HasField("inventory")]
    return [device.problem for device in told[-1].devices] if told else None


def lease(index: int) -> machine_pb2.DeviceLease:
    return machine_pb2.DeviceLease(index=index, milli=1000)


async def test_a_job_sees_its_own_card_and_no_other(machine_platform: MachinePlatform, gpu_daemon: RunningDaemon):
    script = f'ls {nvml.DEVICE_FOLDER}; echo "$CUDA_VISIBLE_DEVICES"'
    attempt_id = await machine_platform.place("sh", "-c", script, devices=[lease(1)])
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    assert machine_platform.logs[attempt_id] == b"nvidia1\nnvidiactl\nGPU-1\n"
    without = await machine_platform.place("sh", "-c", f'ls {nvml.DEVICE_FOLDER}; echo "<$CUDA_VISIBLE_DEVICES>"')
    await machine_platform.ended(without)
    assert machine_platform.logs[without].endswith(b"No such file or directory\n<>\n")


async def test_what_a_card_is_and_does_is_told(
    nvidia: Nvidia, machine_platform: MachinePlatform, gpu_daemon: RunningDaemon
):
    nvidia.change(nvidia.cards[0], util=80, throttle=0x40)
    beat = await until(lambda: next((b for b in machine_platform.heartbeats if b.devices[0].gpu_utilisation), None))
    assert (beat.devices[0].gpu_utilisation, list(beat.devices[0].throttle_reasons)) == (
        0.8, ["temperature (hardware)"],
    )  # fmt: skip
    told = next(beat.inventory for beat in machine_platform.heartbeats if beat.HasField("inventory"))
    card = told.devices[0]
    assert (card.uuid, card.pcie_generation, card.ecc, card.vendor, card.problem) == ("GPU-0", 5, True, "nvidia", "")


async def test_a_card_that_falls_ill_is_taken_out_at_once_and_takes_no_job_until_it_is_well(
    nvidia: Nvidia, machine_platform: MachinePlatform, gpu_daemon: RunningDaemon
):
    nvidia.change(nvidia.cards[0], ecc_lost=2)
    await until(lambda: (problems(machine_platform) or [""])[0].startswith("2 uncorrectable"))
    attempt_id = await machine_platform.place("true", devices=[lease(0)])
    status = await machine_platform.ended(attempt_id)
    assert status.outcome == jobs_pb2.OUTCOME_PROVIDER_FAULT
    assert "GPU 0 2 uncorrectable memory errors" in status.message
    well = await machine_platform.place("true", devices=[lease(1)])
    assert (await machine_platform.ended(well)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    nvidia.change(nvidia.cards[0], ecc_lost=0)
    await until(lambda: problems(machine_platform) == ["", ""])


async def test_a_jobs_own_processes_are_no_strangers_on_its_card(
    nvidia: Nvidia, machine_platform: MachinePlatform, gpu_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", "until [ -e go ]; do sleep 0.01; done", devices=[lease(0)])
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    folder = gpu_daemon.settings.state / "work" / "attempts" / attempt_id
    pid = int((folder / "started").read_text().split()[0])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    nvidia.change(nvidia.cards[0], pid=[int(children[0])])
    nvidia.change(nvidia.cards[1], pid=[1])
    await until(lambda: problems(machine_platform) == ["", "is used by 1 processes of the machine itself"])
    (folder / "work" / "go").touch()
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED


async def test_a_card_that_a_job_leaves_full_is_withheld_before_the_end_is_told(
    nvidia: Nvidia,
    machine_platform: MachinePlatform,
    gpu_daemon: RunningDaemon,
    gpu_memory: GpuMemory,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(devices, "FREED_TIMEOUT_SECONDS", 0.1)
    await until(lambda: problems(machine_platform) == ["", ""])
    attempt_id = await machine_platform.place("sh", "-c", "until [ -e go ]; do sleep 0.01; done", devices=[lease(0)])
    await machine_platform.reached(attempt_id, jobs_pb2.RUNNING)
    nvidia.change(nvidia.cards[0], used=20 * GIB)
    (gpu_daemon.settings.state / "work" / "attempts" / attempt_id / "work" / "go").touch()
    await machine_platform.ended(attempt_id)
    await until(lambda: "withheld" in (problems(machine_platform) or [""])[0])
    nvidia.change(nvidia.cards[0], used=GIB // 4)
    await until(lambda: problems(machine_platform) == ["", ""])
    assert gpu_memory.clean


async def test_a_cards_memory_is_overwritten_before_the_end_of_a_job_is_told(
    machine_platform: MachinePlatform, gpu_daemon: RunningDaemon, gpu_memory: GpuMemory
):
    attempt_id = await machine_platform.place("true", devices=[lease(0)])
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
    assert gpu_memory.clean
    gpu_memory.fill()
    without = await machine_platform.place("true")
    await machine_platform.ended(without)
    assert not gpu_memory.clean


async def test_what_a_job_uses_is_told_while_it_runs_and_only_of_its_own_cards(
    nvidia: Nvidia,
    machine_platform: MachinePlatform,
    gpu_daemon: RunningDaemon,
    monkeypatch: pytest.MonkeyPatch,
):
    for module in (agent, meter):
        monkeypatch.setattr(module, "METRICS_INTERVAL_SECONDS", 0.2)
    nvidia.change(nvidia.cards[1], util=90, used=30 * GIB)
    script = "import os\nwhile not os.path.exists('go'): open('x', 'w').write('y' * 9999)"
    attempt_id = await machine_platform.place("python3", "-c", script, devices=[lease(1)])
    point = await until(lambda: next((p for p in machine_platform.metrics if p.number >= 2), None))
    assert point.attempt_id == attempt_id
    assert point.cpu_cores > 0
    assert point.memory_bytes > 1 << 20
    assert point.processes >= 1
    assert [(use.index, use.gpu_utilisation, use.vram_used_bytes) for use in point.devices] == [(1, 0.9, 30 * GIB)]
    nvidia.change(nvidia.cards[1], used=GIB // 4)
    (gpu_daemon.settings.state / "work" / "attempts" / attempt_id / "work" / "go").touch()
    await machine_platform.ended(attempt_id)


async def test_a_short_job_is_not_measured(
    machine_platform: MachinePlatform, gpu_daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(agent, "METRICS_INTERVAL_SECONDS", 0.02)
    attempt_id = await machine_platform.place("sleep", "0.5", devices=[lease(0)])
    await machine_platform.ended(attempt_id)
    assert machine_platform.metrics == []


async def test_an_idle_machine_measures_itself_and_tells_the_figures(
    nvidia: Nvidia, machine_platform: MachinePlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmarks, "FIRST_AFTER_SECONDS", 0.1)
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "machine", benchmark_every_hours=1000))
    await daemon.start()
    told = await until(
        lambda: next((b.inventory for b in machine_platform.heartbeats if b.inventory.benchmark.network_up_mbps), None),
        timeout_seconds=120,
    )
    assert told.benchmark.cpu_gflops > 0
    assert told.benchmark.memory_gbps > 0
    assert told.benchmark.network_down_mbps > 0
    assert [len(blob) for blob in machine_platform.blobs.values()] == [benchmarks.NETWORK_BYTES]
    assert told.benchmark.disk_write_mbps > 0
    assert told.benchmark.problem == ""
    await daemon.stop()
    # The next daemon knows them already.
    machine_platform.heartbeats.clear()
    again = RunningDaemon(daemon_settings(machine_platform, tmp_path / "machine", benchmark_every_hours=1000))
    await again.start()
    beat = await until(lambda: next((b for b in machine_platform.heartbeats if b.HasField("inventory")), None))
    assert beat.inventory.benchmark == told.benchmark
    await again.stop()


async def test_a_job_ends_the_self_test_at_once(
    nvidia: Nvidia, machine_platform: MachinePlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmarks, "FIRST_AFTER_SECONDS", 0.1)
    daemon = RunningDaemon(daemon_settings(machine_platform, tmp_path / "machine", benchmark_every_hours=1000))
    await daemon.start()

    def measuring() -> bool:
        found = subprocess.run(["pgrep", "-f", f"challenge {tmp_path}"], capture_output=True, check=False)
        return found.returncode == 0

    await until(measuring)
    attempt_id = await machine_platform.place("true")
    await until(lambda: not measuring())
    await machine_platform.ended(attempt_id)
    assert not (tmp_path / "machine" / "benchmark.json").exists()
    await daemon.stop()
