"""What our container costs over a plain one: `true` in a container of busybox, from the call until it is gone."""

import asyncio
import io
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from dantegpu.daemon.executors.base import AttemptSpec, Executor, ImageRequest, SandboxKind
from dantegpu.daemon.executors.container import ContainerExecutor, ContainerLimits
from dantegpu.daemon.executors.container.engine import Engine
from dantegpu.daemon.executors.container.escapes import ALL_NAMES
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.ids import AttemptId
from dantegpu.domain.images import ImageReference

REPOSITORY, TAG = "docker.io/library/dante-bench", "latest"
IMAGE = f"{REPOSITORY}:{TAG}"
"""Podman takes no other tag for what is imported."""
WARM_UP = 2
PLAIN_LIMIT = 1024
API_SECONDS = 60.0
PAUSE_SECONDS = 0.5
"""Between jobs, for a sandbox to be made ahead."""


class CannotMeasure(Exception):
    """The machine lacks something; the message says what."""


@dataclass(frozen=True, slots=True)
class Container:
    """Medians in milliseconds of whole runs, taken in turn. `plain_ms`: the engine's own client, `run --rm`;
    `plain_api_ms`: create, start, wait and remove by the API alone, without a client's start, user or limits.
    `sandbox_start_ms`: from the order to start until the command runs in bubblewrap, for a job that comes when none
    came for a moment, so that a sandbox was made ahead; `new_sandbox_start_ms`: for one that comes at once after
    another. None: no bubblewrap here."""

    engine: str
    rounds: int
    plain_ms: float
    plain_api_ms: float
    ours_ms: float
    overhead_percent: float
    overhead_over_api_percent: float
    sandbox_start_ms: float | None
    new_sandbox_start_ms: float | None


async def measure(socket: Path, rounds: int) -> Container:
    """Raises CannotMeasure, EngineUnreachable, EngineError."""
    with tempfile.TemporaryDirectory(prefix="dante-bench-") as folder:
        limits = ContainerLimits(local_images=(IMAGE,), accepted_escapes=ALL_NAMES)
        executor = ContainerExecutor(Workspace(Path(folder) / "container"), socket, limits)
        engine = Engine(socket)
        try:
            capabilities = await executor.probe()
            if capabilities.sandbox is SandboxKind.NONE:
                raise CannotMeasure(capabilities.missing["container"])
            facts = await engine.facts()
            _import_image(socket)
            client = _client(facts.name, socket)
            kinds: dict[str, Callable[[], Awaitable[None]]] = {
                "plain": lambda: _run_plain(client),
                "api": lambda: _run_api(engine, podman=facts.podman),
                "ours": lambda: _run_ours(executor),
            }
            found = await _in_turn(kinds, rounds)
            await engine.remove_image(IMAGE)
        finally:
            await engine.close()
            await executor.close()
        sandbox_ms, new_sandbox_ms = await _sandbox_start_ms(Path(folder) / "process", rounds)
    plain, api, ours = (statistics.median(found[name]) * 1000 for name in ("plain", "api", "ours"))
    return Container(
        facts.name, rounds, round(plain, 1), round(api, 1), round(ours, 1), round(100 * (ours / plain - 1), 1),
        round(100 * (ours / api - 1), 1), sandbox_ms, new_sandbox_ms,
    )  # fmt: skip


async def _in_turn(kinds: dict[str, Callable[[], Awaitable[None]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind; in turn, so that what else the machine does concerns all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(WARM_UP + rounds):
        for name, run in kinds.items():
            began = time.perf_counter()
            await run()
            if number >= WARM_UP:
                found[name].append(time.perf_counter() - began)
    return found


def _client(engine: str, socket: Path) -> list[str]:
    program = shutil.which(engine)
    if program is None:
        raise CannotMeasure(f"there is no client {engine!r} on PATH to compare with")
    if engine == "podman":
        # It would raise the limits to its own defaults, which not every machine permits.
        limits = [f"--ulimit={kind}={PLAIN_LIMIT}:{PLAIN_LIMIT}" for kind in ("nofile", "nproc")]
        start = ["--remote", "--url", f"unix://{socket}", "run", *limits]
    else:
        start = ["--host", f"unix://{socket}", "run"]
    return [program, *start, "--rm", "--pull=never", "--network=none", IMAGE, "/bin/true"]


async def _run_plain(command: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise CannotMeasure(f"{command[0]} run failed: {said.decode(errors='replace').strip()[:300]}")


async def _run_api(engine: Engine, *, podman: bool) -> None:
    name = f"dante-bench-{AttemptId.new()}"
    if podman:
        limits = [{"type": kind, "soft": PLAIN_LIMIT, "hard": PLAIN_LIMIT} for kind in ("NOFILE", "NPROC")]
        body = {"image": IMAGE, "command": ["/bin/true"], "netns": {"nsmode": "none"}, "r_limits": limits}
    else:
        body = {"Image": IMAGE, "Cmd": ["/bin/true"], "HostConfig": {"NetworkMode": "none"}}
    await engine.create(name, body)
    await engine.start(name)
    await engine.wait(name)
    await engine.remove(name)


async def _run_ours(executor: Executor) -> None:
    spec = AttemptSpec(
        AttemptId.new(), ("/bin/true",), cpu_milli=1000, memory_bytes=1 << 30,
        image=ImageRequest(ImageReference.parse(IMAGE)),
    )  # fmt: skip
    handle = await executor.prepare(spec)
    await executor.start(handle, spec)
    status = await executor.wait(handle)
    await executor.destroy(handle)
    if status.exit_code != 0:
        raise CannotMeasure(f"our container ended with {status.exit_code}")


async def _sandbox_start_ms(folder: Path, rounds: int) -> tuple[float | None, float | None]:
    """After a pause, and without one."""
    executor = ProcessExecutor(Workspace(folder), sandbox=SandboxKind.BUBBLEWRAP)
    try:
        if (await executor.probe()).sandbox is SandboxKind.NONE:
            return None, None
        medians: list[float] = []
        for pause_seconds in (PAUSE_SECONDS, 0.0):
            samples: list[float] = []
            for _ in range(WARM_UP + rounds):
                await asyncio.sleep(pause_seconds)
                spec = AttemptSpec(AttemptId.new(), ("true",))
                handle = await executor.prepare(spec)
                began = time.perf_counter()
                await executor.start(handle, spec)
                samples.append(time.perf_counter() - began)
                await executor.wait(handle)
                await executor.destroy(handle)
            medians.append(round(1000 * statistics.median(samples[WARM_UP:]), 2))
        return medians[0], medians[1]
    finally:
        await executor.close()


def _import_image(socket: Path) -> None:
    """Busybox and nothing else, as `docker import` does it: no registry is asked."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise CannotMeasure("busybox is missing, of which the image is made: apt-get install busybox-static")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tar.gettarinfo(busybox, "bin/busybox")
        info.uid = info.gid = 0
        info.mode = 0o755
        with Path(busybox).open("rb") as file:
            tar.addfile(info, file)
        for name in ("sh", "true"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name in ("tmp", "work", "output", "etc"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=API_SECONDS) as client:
        answer = client.post(
            "http://engine/v1.41/images/create",
            params={"fromSrc": "-", "repo": REPOSITORY, "tag": TAG},
            content=archive.getvalue(),
            headers={"content-type": "application/x-tar"},
        )
    if answer.is_error or '"error"' in answer.text:
        raise CannotMeasure(f"the image could not be made: {answer.text.strip()[:300]}")
