"""Where containers' images come from: a real registry on loopback, pulled by Docker and by Podman."""

from dataclasses import replace
from pathlib import Path

import pytest

from dantegpu.daemon.executors.base import AttemptRefused, AttemptSpec, ImageRequest, JobAtFault
from dantegpu.daemon.executors.container import ContainerExecutor, ContainerLimits
from dantegpu.daemon.executors.container.images import ImageRefused, PullFailed
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.images import ImageReference
from tests.fixtures.containers import write_small_archive
from tests.fixtures.executors import ACCEPTED_ESCAPES, Bench, ContainerKind, a_job, container_limits, read_bytes
from tests.fixtures.image_registry import PASSWORD, USER, ImageRegistry


class Pulling(ContainerKind):
    """Every job asks the registry."""

    def make(self, folder: Path) -> ContainerExecutor:
        limits = ContainerLimits(accepted_escapes=ACCEPTED_ESCAPES)
        return ContainerExecutor(Workspace(folder), self.socket, limits)

    def fit(self, spec: AttemptSpec) -> AttemptSpec:
        return spec


@pytest.fixture
def small_archive(tmp_path: Path) -> Path:
    return write_small_archive(tmp_path / "small.tar")


@pytest.fixture
async def puller(short_dir: Path, container_kind: ContainerKind):
    bench = Bench(Pulling(container_kind.socket), short_dir / "data")
    await bench.executor.probe()
    yield bench
    await bench.executor.sweep(set())
    await bench.executor.close()


def wanting(spec: AttemptSpec, reference: str, username: str = "", password: str = "") -> AttemptSpec:
    return replace(spec, image=ImageRequest(ImageReference.parse(reference), username, password))


async def test_an_image_is_pulled_and_a_digest_pins_what_a_tag_does_not(
    puller: Bench, image_registry: ImageRegistry, small_archive: Path
):
    first = image_registry.add("acme/tool", "v1", small_archive, "first")
    image_registry.add("acme/tool", "v1", small_archive, "second")
    name = f"{image_registry.host}/acme/tool"
    show = a_job("sh", "-c", "echo $MARKER")
    assert (await puller.run(wanting(show, f"{name}:v1")))[1] == "second\n"
    pinned = wanting(a_job("sh", "-c", "echo $MARKER"), f"{name}:v1@{first}")
    assert (await puller.run(pinned))[1] == "first\n"
    status, text = await puller.run(replace(pinned, attempt_id=a_job("true").attempt_id, command=()))
    assert (status.exit_code, text) == (0, "own program\n")


async def test_a_private_image_needs_its_password_each_time_and_the_machine_keeps_none(
    puller: Bench, image_registry: ImageRegistry, small_archive: Path
):
    image_registry.add("private/tool", "v1", small_archive)
    name = f"{image_registry.host}/private/tool:v1"
    with pytest.raises(ImageRefused, match="registry_auth"):
        await puller.prepare(wanting(a_job("true"), name))
    status, _ = await puller.run(wanting(a_job("true"), name, USER, PASSWORD))
    assert status.exit_code == 0
    # That it lies here now is no reason to let somebody else's job use it.
    with pytest.raises(ImageRefused):
        await puller.prepare(wanting(a_job("true"), name))
    with pytest.raises(ImageRefused):
        await puller.prepare(wanting(a_job("true"), name, USER, "wrong"))
    assert isinstance(puller.kind, Pulling)
    for folder in (puller.kind.socket.parent, puller.workspace.root):
        assert not [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in read_bytes(path)]
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if PASSWORD.encode() in read_bytes(path)]


async def test_an_image_that_nobody_has_is_the_jobs_own_fault_and_a_dead_registry_is_not(
    puller: Bench, image_registry: ImageRegistry
):
    with pytest.raises(JobAtFault, match="could not be pulled"):
        await puller.prepare(wanting(a_job("true"), f"{image_registry.host}/acme/none:v1"))
    with pytest.raises(PullFailed):
        await puller.prepare(wanting(a_job("true"), "127.0.0.1:1/acme/tool:v1"))


async def test_progress_is_told_while_an_image_is_pulled(
    puller: Bench, image_registry: ImageRegistry, small_archive: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dantegpu.daemon.executors.container.images.PROGRESS_SECONDS", 0.0)
    image_registry.add("acme/tool", "v2", small_archive, "progress")
    told: list[str] = []
    spec = wanting(a_job("true"), f"{image_registry.host}/acme/tool:v2")
    await puller.executor.prepare(spec, told.append)
    assert told
    assert all(text.startswith(f"pulling {image_registry.host}/acme/tool:v2: ") for text in told)


async def test_the_longest_unused_images_of_jobs_go_first_and_the_owners_own_stay(
    containers: Bench, container_kind: ContainerKind, image_registry: ImageRegistry, small_archive: Path
):
    for tag in ("a", "b", "c"):
        image_registry.add("acme/cached", tag, small_archive, tag)
    limits = replace(container_limits(), image_cache_bytes=2 * small_archive.stat().st_size + 1_000_000)
    executor = ContainerExecutor(containers.workspace, container_kind.socket, limits)
    await executor.probe()
    names = [f"{image_registry.host}/acme/cached:{tag}" for tag in ("a", "b", "a", "c")]
    for name in names:
        spec = wanting(a_job("true"), name)
        await executor.destroy(await executor.prepare(spec))
    here = [name for name in sorted(set(names)) if await executor.has_image(name)]
    assert here == [names[0], names[3]]
    assert await executor.has_image(container_kind.reference)
    await executor.close()


async def test_an_image_without_a_program_needs_a_command(
    puller: Bench, image_registry: ImageRegistry, small_archive: Path
):
    image_registry.add("acme/bare", "v1", small_archive, config={})
    with pytest.raises(JobAtFault, match="no command"):
        await puller.prepare(replace(wanting(a_job("true"), f"{image_registry.host}/acme/bare:v1"), command=()))


async def test_an_image_that_the_owner_does_not_allow_is_refused_before_a_registry_is_asked(
    short_dir: Path, container_kind: ContainerKind, image_registry: ImageRegistry
):
    limits = container_limits(allowed_images=("docker.io/acme/*",))
    executor = ContainerExecutor(Workspace(short_dir / "data"), container_kind.socket, limits)
    with pytest.raises(AttemptRefused, match="owner does not allow the image"):
        await executor.prepare(wanting(a_job("true"), f"{image_registry.host}/acme/tool:v1"))
    assert image_registry.pulls == []
    await executor.close()
