"""The daemon keeps a job's progress when it has to stop, and puts it in place again."""

import hashlib
import io
import tarfile

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from tests.fixtures.machines import MachinePlatform, RunningDaemon, a_tar, until

COUNTING = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["DANTE_CHECKPOINT"])
print("from", os.environ.get("DANTE_RESUMED_FROM", "the beginning"), flush=True)
step = int((folder / "step").read_text()) if (folder / "step").exists() else 0
def save(*_):
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "step").write_text(str(step))
    (folder / "latest").exists() or (folder / "latest").symlink_to("step")
    (folder / "outside").symlink_to("/etc/passwd")
    print("saved", step, flush=True)
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
while step < 7: step += 1
print("step", step, flush=True)
time.sleep(600)
"""


def saves(**fields: object) -> jobs_pb2.Checkpoint:
    return jobs_pb2.Checkpoint(path="ckpt", signal="SIGUSR1", **fields)  # type: ignore[arg-type]


async def preempt(platform: MachinePlatform, attempt_id: str) -> None:
    platform.desired[attempt_id].stop = True
    platform.desired[attempt_id].stop_reason = "preempted"
    await platform.change()


async def test_a_job_is_given_notice_saves_and_what_it_saved_is_uploaded_without_what_lies_outside(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    # A shell that does not know the signal waits for the program that does.
    attempt_id = await machine_platform.place(
        "sh", "-c", "python3 job.py; echo over", files={"job.py": COUNTING.encode()}, checkpoint=saves(),
        grace_ms=60_000,
    )  # fmt: skip
    await until(lambda: b"step 7\n" in machine_platform.logs.get(attempt_id, b""))
    await preempt(machine_platform, attempt_id)
    status = await machine_platform.ended(attempt_id)
    assert (status.outcome, status.message) == (jobs_pb2.OUTCOME_CANCELLED, "stopped: preempted")
    assert machine_platform.logs[attempt_id] == b"from the beginning\nstep 7\nsaved 7\nover\n"
    packed = machine_platform.results["checkpoint"]
    assert (status.checkpoint.sha256, status.checkpoint.number) == (hashlib.sha256(packed).hexdigest(), 1)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert sorted(tar.getnames()) == ["ckpt", "ckpt/deep", "ckpt/latest", "ckpt/step"]


async def test_a_checkpoint_is_in_place_before_the_start_instead_of_what_came_with_the_files(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    packed = a_tar({"ckpt/step": b"41"})
    digest = hashlib.sha256(packed).hexdigest()
    machine_platform.blobs[digest] = packed
    attempt_id = await machine_platform.place(
        "sh", "-c", 'cat "$DANTE_CHECKPOINT/step"; ls ckpt; echo "after $DANTE_RESUMED_FROM"',
        files={"ckpt/step": b"0", "ckpt/old": b""}, checkpoint=saves(),
        resume=machine_pb2.Resume(epoch=3, sha256=digest, size_bytes=len(packed)),
    )  # fmt: skip
    assert (await machine_platform.ended(attempt_id)).state == jobs_pb2.SUCCEEDED
    assert machine_platform.logs[attempt_id] == b"41step\nafter 3\n"


async def test_a_job_that_does_not_save_in_time_ends_with_the_grace_and_what_is_there_is_kept(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    script = "mkdir ckpt; echo half > ckpt/state; trap '' USR1; echo begun; while :; do sleep 0.1; done"
    attempt_id = await machine_platform.place("sh", "-c", script, checkpoint=saves(), grace_ms=300)
    await until(lambda: machine_platform.logs.get(attempt_id))
    await preempt(machine_platform, attempt_id)
    assert (await machine_platform.ended(attempt_id)).checkpoint.size_bytes
    with tarfile.open(fileobj=io.BytesIO(machine_platform.results["checkpoint"])) as tar:
        assert tar.getnames() == ["ckpt", "ckpt/state"]


async def test_a_path_that_leads_out_of_the_work_folder_is_not_followed(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    attempt_id = await machine_platform.place("sh", "-c", "ln -s /etc ckpt; echo begun; sleep 600", checkpoint=saves())
    await until(lambda: machine_platform.logs.get(attempt_id))
    await preempt(machine_platform, attempt_id)
    status = await machine_platform.ended(attempt_id)
    assert "its checkpoint was not kept: ckpt cannot be read" in status.message
    assert (status.outcome, machine_platform.results) == (jobs_pb2.OUTCOME_CANCELLED, {})


async def test_a_checkpoint_is_kept_every_so_often_while_the_job_runs(
    machine_platform: MachinePlatform, running_daemon: RunningDaemon
):
    script = "mkdir ckpt; echo 1 > ckpt/state; echo begun; until [ -e go ]; do sleep 0.1; done"
    attempt_id = await machine_platform.place("sh", "-c", script, checkpoint=saves(interval_seconds=1))
    status = await until(
        lambda: s if (s := machine_platform.statuses.get(attempt_id)) and s.checkpoint.number > 1 else None
    )
    assert status.state == jobs_pb2.RUNNING
    (running_daemon.settings.state / "work" / "attempts" / attempt_id / "work" / "go").touch()
    assert (await machine_platform.ended(attempt_id)).outcome == jobs_pb2.OUTCOME_SUCCEEDED
