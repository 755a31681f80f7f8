"""Which GPUs a container sees: Podman with a CDI file, whose devices are nodes that do nothing."""

from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import AttemptRefused, DeviceGrant
from dantegpu.daemon.executors.container import ContainerExecutor
from dantegpu.daemon.workspace import Workspace
from tests.fixtures.containers import CDI_GPUS, ContainerServer
from tests.fixtures.executors import Bench, ContainerKind, a_shell_job, container_limits

pytestmark = pytest.mark.needs("podman", "busybox", "ip")

SEEN = 'ls /dev | grep nvidia; echo "$CDI_GPU|$NVIDIA_VISIBLE_DEVICES"'


class WithGpus(ContainerKind):
    def make(self, folder: Path) -> ContainerExecutor:
        limits = container_limits(cdi_folders=(self.socket.parent / "etc" / "cdi",))
        return ContainerExecutor(Workspace(folder), self.socket, limits)


def a_gpu(index: int, uuid: str) -> DeviceGrant:
    return DeviceGrant(uuid, "RTX 4090", index, (f"/dev/nvidia{index}",), vendor="nvidia")


async def test_a_container_has_the_gpu_that_its_job_leased_and_no_other(
    podman_server: ContainerServer, short_dir: Path
):
    bench = Bench(WithGpus(podman_server.socket), short_dir / "data")
    try:
        one, two = (a_gpu(index, uuid) for index, uuid in enumerate(CDI_GPUS))
        assert await seen(bench, two) == ["nvidia1", "GPU-two|void"]
        assert await seen(bench, one, two) == ["nvidia0", "nvidia1", "GPU-two|void"]
        assert await seen(bench) == ["|void"]
        with pytest.raises(AttemptRefused, match="GPU-three: nvidia-ctk cdi generate"):
            await bench.prepare(a_shell_job("true", devices=(a_gpu(2, "GPU-three"),)))
    finally:
        await bench.executor.close()


async def seen(bench: Bench, *devices: DeviceGrant) -> list[str]:
    status, text = await bench.run(a_shell_job(SEEN, devices=devices))
    assert status.exit_code == 0, text
    return text.splitlines()
