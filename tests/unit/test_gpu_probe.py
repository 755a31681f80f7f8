"""What the daemon finds out about GPUs: NVIDIA's through the real binding, AMD's through the kernel's files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dantegpu.daemon.probe import amd, nvml
from dantegpu.daemon.probe.amd import AmdGpus
from dantegpu.daemon.probe.machine import Probe
from dantegpu.daemon.probe.nvml import Nvml
from tests.fixtures.nvml import H100, RTX4090, Nvidia, fake_library

needs_cc = pytest.mark.needs("cc")


@needs_cc
def test_an_nvidia_card_is_described_and_measured(nvidia: Nvidia):
    (nvml.DEVICE_FOLDER).mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (nvml.DEVICE_FOLDER / name).touch()
    nvidia.add(H100, used=7 << 30, util=50, memutil=20, throttle=0x44, pid=[os.getpid()])
    nvidia.add(RTX4090)
    driver = Nvml()
    found = driver.open(first_index=0)
    assert (found.driver_version, found.cuda_version, found.problem) == ("570.86.10", "12.8", "")
    card = found.devices[0]
    assert (card.model, card.uuid, card.vram_bytes, card.compute_capability, card.vendor) == (
        "NVIDIA H100 80GB HBM3", "GPU-0", 80 << 30, "9.0", "nvidia",
    )  # fmt: skip
    assert (card.pcie_generation, card.pcie_width, card.power_limit_watts, card.ecc) == (5, 16, 700, True)
    assert [Path(path).name for path in card.paths] == ["nvidia0", "nvidiactl", "nvidia-uvm"]
    busy, idle = driver.sample()
    assert (busy.utilisation, busy.memory_utilisation, busy.vram_used_bytes) == (0.5, 0.2, 7 << 30)
    assert (busy.temperature_celsius, busy.power_watts) == (35, 90)
    assert busy.throttled == ("power cap", "temperature (hardware)")
    assert busy.pids == {os.getpid()}
    # What a card does not measure is zero, not a failure.
    assert (idle.power_watts, found.devices[1].ecc, idle.problem) == (0, False, "")
    driver.close()


@needs_cc
def test_the_instances_of_a_cut_up_card_are_devices_of_their_own(nvidia: Nvidia):
    access = nvml.CAPABILITIES_FOLDER / "gpu0/mig/gi2"
    (access / "ci0").mkdir(parents=True)
    (access / "access").write_text("DeviceFileMinor: 12\nDeviceFileMode: 292\n")
    (access / "ci0/access").write_text("DeviceFileMinor: 13\nDeviceFileMode: 292\n")
    (nvml.DEVICE_FOLDER / "nvidia-caps").mkdir(parents=True)
    for name in ("nvidia0", "nvidia-caps/nvidia-cap12", "nvidia-caps/nvidia-cap13", "nvidia-caps/nvidia-cap99"):
        (nvml.DEVICE_FOLDER / name).touch()
    nvidia.add(H100, mig_mode=1)
    nvidia.add({"name": "NVIDIA H100 MIG 1g.10gb", "vram": 10 << 30, "used": 1 << 30}, gi=2, ci=0, uuid="MIG-a")
    nvidia.add({"name": "NVIDIA H100 MIG 2g.20gb", "vram": 20 << 30}, gi=3, ci=0, uuid="MIG-b")
    nvidia.add(H100, uuid="GPU-whole")
    driver = Nvml()
    first, second, whole = driver.open(first_index=0).devices
    assert (first.uuid, first.mig_profile, first.vram_bytes, first.parent_uuid) == (
        "MIG-a", "1g.10gb", 10 << 30, "GPU-0",
    )  # fmt: skip
    assert [Path(path).name for path in first.paths] == ["nvidia0", "nvidia-cap12", "nvidia-cap13"]
    assert (second.mig_profile, whole.uuid, whole.mig_profile) == ("2g.20gb", "GPU-whole", "")
    assert [first.index, second.index, whole.index] == [0, 1, 2]
    assert driver.sample()[0].vram_used_bytes == 1 << 30
    driver.close()


@needs_cc
def test_a_card_in_mig_mode_without_instances_is_not_offered_and_says_how_to_change_that(nvidia: Nvidia):
    nvidia.add(H100, mig_mode=1)
    found = Nvml().open(first_index=0)
    assert found.devices == ()
    assert "nvidia-smi mig -cgi" in found.problem


@needs_cc
@pytest.mark.parametrize(
    ("ill", "said"),
    [
        ({"remap_failure": 1}, "worn out"),
        ({"remap_pending": 1}, "wait to be remapped"),
        ({"retired_pending": 1}, "wait to be retired"),
        ({"ecc_lost": 3}, "3 uncorrectable memory errors"),
        ({"lost": 1}, "fallen off the bus"),
        ({"xid": [79]}, "XID error 79"),
    ],
)
def test_an_ill_card_says_what_it_has_and_the_other_is_well(nvidia: Nvidia, ill: dict[str, object], said: str):
    card = nvidia.add(H100)
    nvidia.add(H100)
    driver = Nvml()
    driver.open(first_index=0)
    assert [sample.problem for sample in driver.sample()] == ["", ""]
    nvidia.change(card, **ill)
    first, second = driver.sample()
    assert said in first.problem
    assert second.problem == ""
    driver.close()


@needs_cc
@pytest.mark.parametrize(("old", "used_bytes"), [(0, 1 << 30), (1, 3 << 29)])
def test_what_the_driver_keeps_for_itself_is_not_used_memory_where_it_can_tell(
    nvidia: Nvidia, old: int, used_bytes: int
):
    nvidia.add(H100, used=1 << 30, reserved=1 << 29, old=old)
    driver = Nvml()
    driver.open(first_index=0)
    assert driver.sample()[0].vram_used_bytes == used_bytes
    driver.close()


@needs_cc
def test_the_error_of_a_faulty_program_is_not_the_cards(nvidia: Nvidia):
    card = nvidia.add(H100)
    driver = Nvml()
    driver.open(first_index=0)
    nvidia.change(card, xid=[13, 31])
    assert driver.sample()[0].problem == ""
    driver.close()


@needs_cc
def test_a_card_comes_back_when_its_last_error_is_long_ago(nvidia: Nvidia, monkeypatch: pytest.MonkeyPatch):
    nvidia.add(H100, xid=[48])
    driver = Nvml()
    driver.open(first_index=0)
    assert "XID error 48" in driver.sample()[0].problem
    monkeypatch.setattr(nvml, "XID_HOLD_SECONDS", 0.0)
    assert driver.sample()[0].problem == ""
    driver.close()


@needs_cc
def test_a_dead_card_does_not_hide_the_others(nvidia: Nvidia):
    nvidia.add(H100, lost=1)
    nvidia.add(H100)
    found = Nvml().open(first_index=0)
    assert [device.uuid for device in found.devices] == ["GPU-1"]
    assert "GPU 0 does not answer" in found.problem


@needs_cc
def test_a_driver_that_does_not_answer_leaves_a_cpu_machine_and_says_so(nvidia: Nvidia):
    nvidia.path.unlink()
    found = Nvml().open(first_index=0)
    assert found.devices == ()
    assert "Driver Not Loaded" in found.problem


@needs_cc
def test_a_machine_can_keep_its_gpus_for_itself(nvidia: Nvidia, tmp_path: Path):
    nvidia.add(H100)
    assert len(Probe(tmp_path).probe_machine().gpus.devices) == 1
    assert Probe(tmp_path, gpus="none").probe_machine().gpus.devices == ()


@needs_cc
def test_the_binding_still_measures_when_what_it_does_not_need_is_dropped(nvidia: Nvidia, tmp_path: Path):
    nvidia.add(H100, used=7 << 30, util=50, ecc_lost=1, throttle=4, pid=[1])
    nvidia.add(H100, mig_mode=1)
    nvidia.add({"name": "NVIDIA H100 MIG 1g.10gb", "vram": 10 << 30}, gi=2, ci=0, uuid="MIG-a")
    nvidia.add(H100, lost=1)
    code = (
        "from dantegpu.daemon.lean import load_nvml_lean; load_nvml_lean(); import pynvml;"
        "from dantegpu.daemon.probe.nvml import Nvml; driver = Nvml(required=True); found = driver.open(0);"
        "print(len(vars(pynvml)) < 400, found.problem, [d.uuid for d in found.devices], driver.sample());"
        "driver.close()"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(fake_library().parent)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    driver = Nvml()
    found = driver.open(first_index=0)
    expected = f"True {found.problem} {[device.uuid for device in found.devices]} {driver.sample()}\n"
    assert (answer.stdout, answer.stderr) == (expected, "")
    driver.close()


def an_amd_card(system: Path, number: int, *, computes: bool = True) -> Path:
    """Files as amdgpu and amdkfd show them."""
    folder = system / f"class/drm/card{number}/device"
    (folder / f"drm/renderD{128 + number}").mkdir(parents=True)
    (folder / "hwmon/hwmon3").mkdir(parents=True)
    (folder / "ras").mkdir()
    files = {
        "vendor": "0x1002", "device": "0x740f", "product_name": "AMD Instinct MI210", "unique_id": "a1b2",
        "mem_info_vram_total": 64 << 30, "mem_info_vram_used": 1 << 30, "gpu_busy_percent": 75, "mem_busy_percent": 10,
        "max_link_speed": "16.0 GT/s PCIe", "max_link_width": 16, "hwmon/hwmon3/power1_average": 120_000_000,
        "hwmon/hwmon3/power1_cap": 300_000_000, "hwmon/hwmon3/temp1_input": 41_000, "ras/umc_err_count": "ue: 0\nce: 4",
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    if computes:
        node = system / f"class/kfd/kfd/topology/nodes/{number + 1}"
        node.mkdir(parents=True)
        (node / "properties").write_text(f"simd_count 416\ndrm_render_minor {128 + number}\n")
        (node / "gpu_id").write_text(f"{7000 + number}\n")
    return folder


def test_an_amd_card_is_described_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(amd, "SYSTEM_FOLDER", tmp_path)
    monkeypatch.setattr(amd, "DEVICE_FOLDER", tmp_path / "dev")
    (tmp_path / "dev/dri").mkdir(parents=True)
    for name in ("kfd", "dri/renderD128"):
        (tmp_path / "dev" / name).touch()
    folder = an_amd_card(tmp_path, 0)
    an_amd_card(tmp_path, 1, computes=False)
    (tmp_path / "class/kfd/kfd/proc/4242").mkdir(parents=True)
    (tmp_path / "class/kfd/kfd/proc/4242/vram_7000").write_text("1048576\n")
    driver = AmdGpus()
    (card,) = driver.open(first_index=2).devices
    assert (card.index, card.model, card.uuid, card.vram_bytes) == (2, "AMD Instinct MI210", "GPU-a1b2", 64 << 30)
    assert (card.vendor, card.pcie_generation, card.pcie_width, card.power_limit_watts) == ("amd", 4, 16, 300)
    assert [Path(path).name for path in card.paths] == ["kfd", "renderD128"]
    (sample,) = driver.sample()
    assert (sample.utilisation, sample.vram_used_bytes, sample.pids) == (0.75, 1 << 30, {4242})
    assert (sample.temperature_celsius, sample.power_watts, sample.problem) == (41, 120, "")
    (folder / "ras/umc_err_count").write_text("ue: 2\nce: 4\n")
    assert "2 uncorrectable memory errors" in driver.sample()[0].problem


@pytest.mark.gpu
def test_the_cards_of_this_machine_are_found_and_measured(tmp_path: Path):
    # In a process of its own: this one may have the library of the other tests.
    code = (
        "import json, sys; from pathlib import Path; from dantegpu.daemon.probe.machine import Probe;"
        "probe = Probe(Path(sys.argv[1])); found = probe.probe_machine().gpus; sample = probe.sample_gpus();"
        "print(json.dumps([found.problem, [[d.uuid, d.vram_bytes, d.paths] for d in found.devices],"
        "[[s.vram_used_bytes, s.temperature_celsius, s.problem] for s in sample]]))"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    problem, devices, samples = json.loads(answer.stdout)
    assert problem == ""
    assert devices
    assert len(devices) == len(samples)
    for (uuid, vram_bytes, paths), (used_bytes, celsius, _) in zip(devices, samples, strict=True):
        assert uuid
        assert paths
        assert 0 <= used_bytes < vram_bytes
        assert 0 < celsius < 120
