"""What Slurm prints, and what is made of it."""

import os
from pathlib import Path
from typing import Any

import pytest

from dantegpu.daemon.cluster import WatchedNode, inventory_of, rented_nodes
from dantegpu.daemon.executors.base import (
    AttemptRefused,
    AttemptSpec,
    DeviceGrant,
    InterruptedBy,
    SandboxKind,
    StopReason,
)
from dantegpu.daemon.executors.slurm import client, executor
from dantegpu.daemon.executors.slurm.client import JobRow, NodeRow, Slurm, gres_of
from dantegpu.daemon.executors.slurm.node import Order, in_slurms_group, leased_devices
from dantegpu.daemon.executors.slurm.site import SlurmSite
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.workspace import AttemptFolder
from dantegpu.domain.ids import AttemptId
from dantegpu.kit.settings import SettingsError

NODE_LINE = (
    "NodeName=gpu-1 Arch=x86_64 CoresPerSocket=16  CPUAlloc=4 CPUEfctv=30 CPUTot=32 CPULoad=0.10 "
    "AvailableFeatures=a,b ActiveFeatures=a,b Gres=gpu:a100:4(S:0-1),nic:2,gpu:t4:1 GresDrain=N/A "
    "GresUsed=gpu:a100:2(IDX:0-1),gpu:t4:0(IDX:N/A) NodeAddr=10.0.0.7 NodeHostName=gpu-1 Version=22.05.8 "
    "OS=Linux 6.1.0-18-amd64 #1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)  RealMemory=256000 AllocMem=2048 "
    "FreeMem=1 Sockets=2 Boards=1 State=MIXED+DRAIN* ThreadsPerCore=1 TmpDisk=100 Weight=1 Owner=N/A MCS_label=N/A "
    "Partitions=main,gpu BootTime=2026-11-26T16:36:24 CfgTRES=cpu=30,mem=250G,billing=30,gres/gpu=5 "
    "Reason=fan is broken [root@2026-11-26T20:06:39]"
)


def a_node(line: str = NODE_LINE) -> NodeRow:
    row = client.node_row(line)
    assert row is not None
    return row


def test_a_node_is_read_from_its_line():
    node = a_node()
    assert (node.name, node.cpus, node.memory_mib, node.address) == ("gpu-1", 30, 256_000, "10.0.0.7")
    assert node.gpu_types == ("a100",) * 4 + ("t4",)
    assert (node.gpus_used, node.cpus_used, node.memory_used_mib) == (2, 4, 2048)
    assert (node.os, node.kernel) == ("Linux", "6.1.0-18-amd64")
    assert node.partitions == {"main", "gpu"}
    assert node.problem == "Slurm says drain+mixed+not_responding: fan is broken"


@pytest.mark.parametrize("state", ["IDLE", "MIXED", "ALLOCATED", "IDLE+PLANNED"])
def test_a_node_on_which_slurm_starts_jobs_has_no_problem(state: str):
    assert not a_node(NODE_LINE.replace("MIXED+DRAIN*", state)).problem


def test_a_cluster_without_gpus_has_nodes_without_gpus():
    assert a_node("NodeName=n Gres=(null) GresUsed=gpu:0 CPUTot=2 State=IDLE").gpu_types == ()


def test_gpus_are_asked_for_by_the_types_of_those_that_were_leased():
    assert gres_of(["a100", "t4", "a100"]) == "gpu:a100:2,gpu:t4:1"
    assert gres_of(a_node("NodeName=n Gres=gpu:3 State=IDLE").gpu_types) == "gpu:3"
    assert not gres_of([])


def test_a_task_of_an_array_is_the_attempt_at_its_place():
    rows = map(
        client.job_row, ["7|1|RUNNING|n1|gres:gpu:t4:2|None|n1/att_a,att_b", "8|N/A|PENDING||N/A|Resources|n2/att_c"]
    )
    task, single = rows
    assert task is not None
    assert single is not None
    assert (task.id, task.label, task.gpus, task.live) == ("7_1", "n1/att_b", 2, True)
    assert (single.id, single.label, single.gpus, single.waiting) == ("8", "n2/att_c", 0, True)


def a_folder(tmp_path: Path, *, max_seconds: int = 0, **files: str) -> AttemptFolder:
    folder = AttemptFolder(tmp_path / "attempt")
    folder.create()
    spec = AttemptSpec(AttemptId.new(), ("true",), max_seconds=max_seconds)
    (folder.root / "order.json").write_text(Order(spec, SandboxKind.NONE, 0, 0).dumps())
    for name, text in files.items():
        (folder.root / name).write_text(text)
    return folder


def an_ended(state: str) -> JobRow:
    return JobRow("7", state, "n1", 0, "None", "n1/att_a")


@pytest.mark.parametrize(
    ("state", "by"),
    [
        ("CANCELLED", InterruptedBy.OWNER),
        ("PREEMPTED", InterruptedBy.OWNER),
        ("REQUEUED", InterruptedBy.OWNER),
        ("NODE_FAIL", InterruptedBy.FAULT),
        ("BOOT_FAIL", InterruptedBy.FAULT),
        ("DEADLINE", InterruptedBy.FAULT),
        ("TIMEOUT", InterruptedBy.FAULT),
    ],
)
def test_what_slurm_did_is_told_apart(tmp_path: Path, state: str, by: InterruptedBy):
    folder = a_folder(tmp_path, started="1 1\n", exit="143\n")
    status = executor.status_of(folder, an_ended(state))
    assert status.lost
    assert status.interruption is not None
    assert status.interruption.by is by


def test_slurms_time_limit_after_the_jobs_own_maximum_is_the_jobs_own(tmp_path: Path):
    folder = a_folder(tmp_path, max_seconds=60, started="1 1\n", exit="143\n")
    os.utime(folder.started, (0, 0))
    status = executor.status_of(folder, an_ended("TIMEOUT"))
    assert status.interruption is not None
    assert status.interruption.by is InterruptedBy.TIME_LIMIT


def test_a_job_that_ended_well_in_the_moment_of_its_interruption_has_ended_well(tmp_path: Path):
    folder = a_folder(tmp_path, started="1 1\n", exit="0\n")
    status = executor.status_of(folder, an_ended("PREEMPTED"))
    assert (status.exit_code, status.interruption) == (0, None)


def test_what_the_daemon_stopped_is_no_interruption(tmp_path: Path):
    folder = a_folder(tmp_path, started="1 1\n", stop="requested")
    status = executor.status_of(folder, an_ended("CANCELLED"))
    assert (status.exit_code, status.stop_reason, status.interruption) == (137, StopReason.REQUESTED, None)


def test_out_of_memory_is_the_jobs_own_failure(tmp_path: Path):
    status = executor.status_of(a_folder(tmp_path, started="1 1\n"), an_ended("OUT_OF_MEMORY"))
    assert (status.exit_code, status.oom_killed, status.interruption) == (137, True, None)


def test_an_end_that_slurm_has_forgotten_is_what_the_node_wrote(tmp_path: Path):
    assert executor.status_of(a_folder(tmp_path, exit="3\n"), None).exit_code == 3


def test_a_job_gets_the_gpus_that_slurm_gave_it_and_starts_with_no_other_number():
    found = [DeviceGrant(f"GPU-{n}", "A100", n, (f"/dev/nvidia{n}", "/dev/nvidiactl")) for n in range(12)]
    assert [device.uuid for device in leased_devices(2, "1,11", found)] == ["GPU-1", "GPU-11"]
    for slurms in ("1", "", "1,99"):
        with pytest.raises(AttemptRefused, match="2 are leased"):
            leased_devices(2, slurms, found)


@pytest.mark.parametrize(
    ("own", "slurms"),
    [
        ("4:memory:/slurm/uid_0/job_7/step_batch", True),
        ("0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0", True),
        ("0::/system.slice/node1_slurmstepd.scope/job_7", True),
        ("4:memory:/process_api/abc\n0::/", False),
        ("0::/user.slice/user-1000.slice", False),
    ],
)
def test_no_group_is_made_where_slurm_tracks_by_groups(own: str, slurms: bool):
    assert in_slurms_group(own) is slurms


def the_settings(tmp_path: Path, **fields: Any) -> DaemonSettings:
    return DaemonSettings.load({"executor": "slurm", "state": tmp_path, **fields})


def test_an_inventory_knows_models_by_their_names_or_by_the_owners_word(tmp_path: Path):
    found = inventory_of(a_node(), the_settings(tmp_path, slurm_gpus="t4=T4"))
    assert [gpu.model for gpu in found.gpus.devices] == ["NVIDIA A100-SXM4-80GB"] * 4 + ["Tesla T4"]
    assert found.memory_bytes == (256_000 - 30 * executor.OVERHEAD_MIB) << 20
    assert (found.hostname, found.cpu_milli, found.simulated) == ("gpu-1", 30_000, False)


def test_only_the_nodes_that_the_owner_names_are_rented_out(tmp_path: Path):
    nodes = [
        a_node(),
        a_node("NodeName=cpu-1 Partitions=main State=IDLE"),
        a_node("NodeName=gpu-2 Partitions=x State=IDLE"),
    ]

    def names(**fields: Any) -> list[str]:
        return [node.name for node in rented_nodes(nodes, the_settings(tmp_path, **fields))]

    assert names() == ["gpu-1", "cpu-1", "gpu-2"]
    assert names(slurm_nodes="gpu*") == ["gpu-1", "gpu-2"]
    assert names(slurm_nodes="gpu*", slurm_partition="main") == ["gpu-1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slurm_gpus": "big"}, "not TYPE=MODEL"),
        ({"slurm_gpus": "big=RTX 409O"}, "did you mean 'RTX 4090'"),
        ({"idle_command": "mine"}, "idle_command has no meaning with executor = slurm"),
        ({"slurm_options": "--account='x"}, "slurm_options"),
    ],
)
def test_settings_that_fit_no_cluster_are_refused(tmp_path: Path, fields: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        the_settings(tmp_path, **fields)


def test_gpus_of_strangers_are_taken_from_those_that_no_attempt_has_leased(tmp_path: Path):
    site = SlurmSite(Slurm("dante"), tmp_path)
    site._strangers = {"n1": 1}  # pyright: ignore[reportPrivateUsage]
    watched = WatchedNode(site, "n1", 3, lambda: {2})
    assert [bool(sample.problem) for sample in watched.sample_gpus()] == [False, True, False]
    assert "does not know the node n1" in watched.closed()
