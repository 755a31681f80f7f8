"""A machine with a real GPU: what a job sees of it, what is left in its memory, and who else may use it."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from dantegpu.contracts.rest.machines import Machine
from tests.fixtures.cluster import wait_until
from tests.fixtures.platform import UpPlatform

pytestmark = [pytest.mark.gpu, pytest.mark.needs("bubblewrap")]

FILL_HALF = textwrap.dedent("""
    import ctypes, json, sys
    cuda = ctypes.CDLL("libcuda.so.1")
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    free, total, address = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_uint64()
    def call(name, *arguments):
        assert getattr(cuda, name)(*arguments) == 0, name
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    size = ctypes.c_size_t(total.value // 2)
    call("cuMemAlloc_v2", ctypes.byref(address), size)
    call("cuMemsetD8_v2", address, ctypes.c_ubyte(165), size)
    call("cuCtxSynchronize")
    print(json.dumps([count.value, size.value]), flush=True)
    sys.stdin.read() if sys.argv[1:] == ["stay"] else None
""")
"""Writes a pattern into half of the memory of the first GPU that CUDA sees."""


def _machine(platform: UpPlatform) -> Machine:
    with platform.operator as operator:
        (machine,) = operator.machines.list().machines
    return machine


@pytest.fixture
def resident() -> Iterator["subprocess.Popen[str]"]:
    """A process of the machine itself that holds half of a GPU's memory until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", FILL_HALF, "stay"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_a_job_computes_on_the_cards_it_leased_and_on_no_others(platform: UpPlatform):
    said = platform.dante("run", "--no-files", "--gpu", "1", "--", "python3", "-c", FILL_HALF)
    assert said.returncode == 0, said.stderr
    count, filled_bytes = json.loads(said.stdout)
    assert (count, filled_bytes > 1 << 30) == (1, True)
    without = platform.dante("run", "--no-files", "--", "python3", "-c", FILL_HALF)
    assert (without.returncode, "AssertionError: cuInit" in without.stdout) == (1, True)
    listed = platform.dante("run", "--no-files", "--", "sh", "-c", "ls /dev | grep -c nvidia || true")
    assert listed.stdout == "0\n"


def test_nearly_all_memory_of_a_card_is_overwritten_between_two_jobs(platform: UpPlatform):
    device = _machine(platform).devices[0]
    if "NVIDIA" not in device.model:
        pytest.skip("the driver of this vendor's cards clears them by itself")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device.uuid}
    subprocess.run([sys.executable, "-c", FILL_HALF], env=environment, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "dantegpu.daemon.probe.scrub"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 0.97 * device.vram_bytes


def test_a_card_that_the_machine_itself_uses_is_offered_to_nobody_until_it_is_free(
    platform: UpPlatform, resident: "subprocess.Popen[str]"
):
    assert resident.stdout is not None
    assert json.loads(resident.stdout.readline())[1] > 0

    def problem() -> str:
        return _machine(platform).devices[0].problem

    wait_until(lambda: "processes of the machine itself" in problem(), "the card is withheld")
    with platform.operator as operator:
        job = operator.jobs.submit({"command": ["true"], "resources": {"gpu": "1"}})
        wait_until(lambda: operator.jobs.get(job.id).reason, "the job is told why it waits")
        assert resident.stdin is not None
        resident.stdin.close()
        wait_until(lambda: operator.jobs.get(job.id).state == "SUCCEEDED", "the job runs once the card is free")
    assert problem() == ""
