"""What the daemon finds out about its machine: GPUs, cgroups of both versions, and the seccomp filter."""

import struct
import sys
from pathlib import Path

import pytest

from dantegpu.daemon.executors import seccomp
from dantegpu.daemon.executors.base import AttemptRefused, AttemptSpec, DeviceGrant
from dantegpu.daemon.executors.cgroup import Cgroup, Limits, detect
from dantegpu.daemon.executors.sandbox import PythonRuntime, environment
from dantegpu.daemon.probe.devices import InvalidSimulation, simulated_gpus
from dantegpu.daemon.probe.machine import Probe
from dantegpu.domain.ids import AttemptId


def test_simulated_gpus_look_like_their_model_and_say_what_they_are():
    devices = simulated_gpus("RTX 4090:2, a100")
    assert [device.index for device in devices] == [0, 1, 2]
    assert [device.model for device in devices] == ["NVIDIA GeForce RTX 4090"] * 2 + ["NVIDIA A100-SXM4-80GB"]
    assert all(device.simulated and device.vram_bytes > 20 << 30 for device in devices)
    assert devices[0].compute_capability == "8.9"


@pytest.mark.parametrize(
    ("text", "why"), [("RTX 4091", "did you mean 'RTX 4090'"), ("Voodoo 2", "known: "), ("A100:99", "at most 64")]
)
def test_a_simulation_that_cannot_be_is_refused(text: str, why: str):
    with pytest.raises(InvalidSimulation, match=why):
        simulated_gpus(text)


def test_a_machine_without_gpus_is_a_cpu_machine(tmp_path: Path):
    probe = Probe(tmp_path)
    inventory = probe.probe_machine()
    assert inventory.cpu_milli >= 1000
    assert inventory.memory_bytes > 0
    assert inventory.disk_bytes > 0
    assert 0 <= probe.utilisation().cpu <= 1
    assert not inventory.simulated
    assert Probe(tmp_path, simulate="L4").probe_machine().simulated


def a_cgroup_host(folder: Path, *, kind: str, own: str) -> Path:
    """Folders that look like /proc/self and a mounted hierarchy."""
    proc = folder / "proc"
    proc.mkdir()
    mount = folder / "cgroup"
    (mount / own.strip("/")).mkdir(parents=True)
    options = "rw" if kind == "cgroup2" else "rw,memory"
    (proc / "mountinfo").write_text(
        f"1 1 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {mount} rw,relatime - {kind} cgroup {options}\n"
    )
    (proc / "cgroup").write_text(f"0::{own}\n" if kind == "cgroup2" else f"4:memory:{own}\n")
    return proc


def test_version_2_groups_get_their_limits_and_tell_of_kills(tmp_path: Path):
    proc = a_cgroup_host(tmp_path, kind="cgroup2", own="/system.slice/dante.service")
    own = tmp_path / "cgroup/system.slice/dante.service"
    (own / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (own / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (own / "dante-1").mkdir()
    (own / "dante-1/cgroup.subtree_control").touch()
    tree = detect("dante-1", proc=proc)
    assert (tree.limits, tree.missing) == ({"cpu", "memory", "pids"}, {})
    group = tree.group("slot-0")
    group.create()
    folder = own / "dante-1/slot-0"
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max"):
        (folder / name).touch()
    group.set_limits(Limits(cpu_milli=1500, memory_bytes=1 << 30, pids_max=10))
    limits = {name: (folder / name).read_text() for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max")}
    assert limits == {
        "memory.max": str(1 << 30), "memory.swap.max": "0", "cpu.max": "150000 100000", "pids.max": "10",
    }  # fmt: skip
    for name in limits:
        (folder / name).write_text("")
    group.set_limits(Limits(pids_max=5))
    assert [(folder / name).read_text() for name in limits] == ["max", "max", "max 100000", "5"]
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert group.oom_kills() == 2
    (folder / "cpu.stat").write_text("usage_usec 2500000\n")
    (folder / "memory.current").write_text("123\n")
    stats = group.stats()
    assert (stats.cpu_seconds, stats.memory_bytes) == (2.5, 123)
    assert Cgroup.from_json(group.to_json()) == group


def test_a_version_2_group_that_was_not_delegated_is_named_with_its_remedy(tmp_path: Path):
    proc = a_cgroup_host(tmp_path, kind="cgroup2", own="/")
    (tmp_path / "cgroup/cgroup.controllers").write_text("cpu\n")
    tree = detect("dante-1", proc=proc)
    assert tree.limits == set()
    assert "Delegate=yes" in tree.missing["memory"]


def test_a_version_1_host_has_what_is_mounted(tmp_path: Path):
    proc = a_cgroup_host(tmp_path, kind="cgroup", own="/box")
    tree = detect("dante-1", proc=proc)
    assert tree.limits == {"memory"}
    assert tree.parents["memory"] == tmp_path / "cgroup/box/dante-1"
    assert "no cgroup hierarchy with the pids controller" in tree.missing["pids"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_of_the_filter_lands_inside_it(machine: str):
    code = seccomp.program(machine)
    assert code is not None
    instructions = list(struct.iter_unpack("=HBBI", code))
    assert len(instructions) < 4096
    for place, (operation, jump_true, jump_false, _) in enumerate(instructions):
        if operation & 0x07 == 0x05:
            assert place + 1 + max(jump_true, jump_false) < len(instructions)
    assert instructions[-1] == (0x06, 0, 0, 0x7FFF0000)


def test_an_unknown_processor_has_no_filter():
    assert seccomp.program("m68k") is None


def test_a_job_sees_its_devices_and_no_others():
    devices = (
        DeviceGrant("GPU-1", "A100", 0, vendor="nvidia"),
        DeviceGrant("MIG-a", "A100", 1, vendor="nvidia"),
        DeviceGrant("", "RTX 4090", 2, simulated=True),
    )
    asked = {"CUDA_VISIBLE_DEVICES": "0,1,2", "ROCR_VISIBLE_DEVICES": "0"}
    spec = AttemptSpec(AttemptId.new(), ("true",), asked, devices=devices)
    seen = environment(spec, work="/work", output="/output", search_path="/bin")
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["DANTE_SIMULATED_GPUS"]) == ("GPU-1,MIG-a", "RTX 4090")
    assert seen["ROCR_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", ["", "A B", "1A", "A=B", "É"])
def test_what_is_no_name_of_a_variable_is_refused(name: str):
    with pytest.raises(AttemptRefused):
        AttemptSpec(AttemptId.new(), ("true",), {name: "x"})


def test_a_python_that_would_show_private_data_is_not_shown():
    runtime = PythonRuntime.of_this_process(Path(sys.base_prefix) / "data")
    assert runtime.mounts == ()
    assert "private data" in runtime.problem
