"""`dante bench NAME`: the benchmarks of a clone, each on a platform of its own in a temporary folder."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr

from dantegpu.apps.bootstrap import OPERATOR_EMAIL, Login
from dantegpu.apps.commands.running import run_loop, unless_stopped
from dantegpu.apps.platform import Running
from dantegpu.domain.scheduling import DEFAULT_POLICY, Objective

REPOSITORY = Path(__file__).resolve().parents[4]
START_SECONDS = 60.0

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object.")
_sandbox = click.option(
    "--sandbox", type=click.Choice(["auto", "bubblewrap", "none"]), default="auto", show_default=True,
    help="What the machine isolates jobs with; none: for comparison with systems that have no sandbox.",
)  # fmt: skip


@click.command("latency")
@click.option("--jobs", type=click.IntRange(1, 10_000), default=100, show_default=True)
@_sandbox
@_json
def latency(jobs: int, sandbox: str, as_json: bool) -> None:
    """Submit jobs one by one to an idle platform: POST sent to the first instruction of the process."""
    module = _bench("latency")
    environment = _environment(sandbox)
    _report(_on_a_platform(lambda running, login: module.measure(login, jobs), environment=environment), as_json)


@click.command("throughput")
@click.option("--jobs", type=click.IntRange(1, 1_000_000), default=1000, show_default=True)
@click.option("--submitters", type=click.IntRange(1, 256), default=8, show_default=True, help="Connections.")
@click.option("--array", type=click.IntRange(1, 1_000_000), help="One array of so many tasks instead of --jobs.")
@click.option("--queued", type=click.IntRange(0, 1_000_000), default=0, help="So many more wait for a GPU meanwhile.")
@click.option("--sleep", type=click.FloatRange(0, 600), default=0, help="Jobs sleep so many seconds: many run at once.")
@_sandbox
@_json
def throughput(array: int | None, sleep: float, sandbox: str, as_json: bool, **options: int) -> None:
    """Run many jobs (`true`), one POST each: first POST to the last job's end, and what it costs."""
    module = _bench("throughput")
    options |= {"array": array or 0}
    queued = options["queued"]
    result = _on_a_platform(
        lambda running, login: module.measure(running, login, sleep_seconds=sleep, **options),
        gpus=module.QUEUED_GPUS if queued else "",
        environment=_environment(sandbox),
    )
    _report(result, as_json)


@click.command("intake")
@click.option("--jobs", type=click.IntRange(1, 1_000_000), default=2000, show_default=True, help="One POST each.")
@click.option("--submitters", type=click.IntRange(1, 256), default=8, show_default=True, help="Connections.")
@click.option("--bulk", type=click.IntRange(1, 10_000), default=10_000, show_default=True, help="Jobs in one POST.")
@_json
def intake(jobs: int, submitters: int, bulk: int, as_json: bool) -> None:
    """Submit jobs to a platform without machines: one by one, then many distinct ones in one call."""
    module = _bench("throughput")
    result = _on_a_platform(
        lambda running, login: module.measure_intake(running, login, jobs=jobs, submitters=submitters, bulk=bulk),
        provider=False,
        environment=_environment("auto"),
    )
    _report(result, as_json)


@click.command("idle")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=30.0, show_default=True)
@_json
def idle(seconds: float, as_json: bool) -> None:
    """Memory and CPU of a platform that has nothing to do, without PostgreSQL and NATS."""
    module = _bench("idle")
    _report(_on_a_platform(lambda running, login: module.measure(running.pid, running.provider_pid, seconds)), as_json)


@click.command("adopt")
@click.option("--kills", type=click.IntRange(1, 10_000), default=200, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments and the jobs' lengths.")
@_sandbox
@_json
def adopt(kills: int, seed: int, sandbox: str, as_json: bool) -> None:
    """Kill -9 the machine's daemon at random moments with four jobs running: what is lost, doubled or left over."""
    module = _bench("adopt")
    result = _on_a_platform(
        lambda running, login: module.measure(login, kills, sandbox, seed),
        provider=False,
        environment=_environment(sandbox),
    )
    _report(result, as_json)


@click.command("container")
@click.option("--rounds", type=click.IntRange(3, 10_000), default=30, show_default=True)
@click.option("--socket", type=click.Path(path_type=Path), help="The engine's; default: as the daemon finds it.")
@_json
def container(rounds: int, socket: Path | None, as_json: bool) -> None:
    """Run `true` in our containers and in plain ones of the same engine, Docker or Podman: what ours costs on top."""
    # Only here: the daemon's settings are nothing that other benchmarks should wait for.
    from dantegpu.daemon.containers import GET_ENGINE, find_socket
    from dantegpu.daemon.executors.container.engine import EngineError, EngineUnreachable
    from dantegpu.daemon.settings import DaemonSettings

    found = socket or find_socket(DaemonSettings.load().containers)
    if found is None:
        raise click.ClickException(f"no container engine: {GET_ENGINE}, or name one with --socket")
    module = _bench("container")
    try:
        result = asyncio.run(module.measure(found, rounds))
    except (module.CannotMeasure, EngineError, EngineUnreachable) as error:
        raise click.ClickException(str(error)) from error
    _report(result, as_json)


@click.command("placement")
@click.option("--machines", type=_FILE, required=True, help="CSV: sn, cpu_milli, memory_mib, gpu, model.")
@click.option("--requests", type=_FILE, required=True, help="CSV: cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec.")
@click.option("--batch", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Requests per round.")
@click.option("--objective", type=click.Choice([it.value for it in Objective]), default=Objective.FRAGMENTATION.value)
@click.option("--out", type=_NEW_FILE, help="Write the placements: request, machine, devices, milli.")
@click.option("--sample", type=click.FloatRange(0.01, 100), help="Draw arrivals until they ask for this many clusters.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of --sample.")
@click.option("--arrivals-out", type=_NEW_FILE, help="Write the requests as they arrived.")
@_json
def placement(as_json: bool, **options: Any) -> None:
    """Place a cluster trace with the production scheduler: how full the GPUs get, and how fast."""
    module = _bench("placement")
    options = {name: options[name] for name in ("batch", "objective", "seed", "out", "arrivals_out")} | {
        "machines_path": options["machines"],
        "requests_path": options["requests"],
        "sample_ratio": options["sample"],
    }
    try:
        result = module.measure(**options)
    except (module.InvalidTrace, OSError) as error:
        raise click.ClickException(str(error)) from error
    _report(result, as_json)


@click.command("scale")
@click.option("--size", type=click.IntRange(1, 10), help="Only this size: 1 has 1,000 machines and 100,000 jobs.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--objective", type=click.Choice([it.value for it in Objective]), default=DEFAULT_POLICY.objective.value)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per size.")
def scale(size: int | None, rounds: int, objective: str, as_json: bool) -> None:
    """Rounds of the production scheduler on huge fleets and queues: 1x, 3x and 10x of 1,000 machines, 100,000 jobs."""
    module = _bench("scale")
    sizes = module.SIZES if size is None else ((1000 * size, 100_000 * size),)
    for result in module.measure(sizes, rounds=rounds, objective=objective, progress=_say):
        _report(result, as_json)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _bench(name: str) -> Any:
    if not (REPOSITORY / "bench").is_dir():
        raise click.ClickException("benchmarks run from a clone: there is no bench/ folder here")
    sys.path.insert(0, str(REPOSITORY))
    return import_module(f"bench.{name}")


def _report(result: Any, as_json: bool) -> None:
    figures = asdict(result)
    if as_json:
        click.echo(json.dumps(figures))
    else:
        for name, value in figures.items():
            click.echo(f"{name:<20}{value}")


def _environment(sandbox: str) -> dict[str, str]:
    """Settings of a platform under load: one principal sends everything."""
    return {
        "DANTE_DAEMON_SANDBOX": sandbox,
        "DANTE_RATE_LIMIT_PER_SECOND": "100000",
        "DANTE_RATE_LIMIT_BURST": "100000",
    }


def _on_a_platform[T](
    measure: Callable[[Running, Login], Awaitable[T]],
    *,
    provider: bool = True,
    gpus: str = "",
    environment: Mapping[str, str] | None = None,
) -> T:
    """Run `measure` against a platform in a process of its own, as `dante up` makes it."""
    folder = Path(tempfile.mkdtemp(prefix="dante-bench-"))
    command = [
        sys.executable,
        "-P",
        "-m",
        "dantegpu.apps.main",
        "up",
        "--data",
        str(folder / "platform"),
        "--port",
        "0",
        *(("--simulate-gpus", gpus) if gpus else ()),
        *(() if provider else ("--no-provider",)),
    ]
    variables = {**os.environ, "DANTE_HOME": str(folder), **(environment or {})}
    up = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables)
    try:
        running = _wait_running(folder / "platform", up)
        key = (folder / "platform" / "secrets" / "operator.key").read_text().strip()
        login = Login(running.url, SecretStr(key), "", OPERATOR_EMAIL)
        result = run_loop(lambda stop: unless_stopped(_awaited(measure(running, login)), stop))
        if result is None:
            raise SystemExit(130)
        return result
    finally:
        up.terminate()
        up.wait()
        shutil.rmtree(folder, ignore_errors=True)


async def _awaited[T](work: Awaitable[T]) -> T:
    return await work


def _wait_running(data_dir: Path, up: "subprocess.Popen[bytes]") -> Running:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if up.poll() is not None:
            assert up.stderr is not None
            raise click.ClickException(f"the platform did not start:\n{up.stderr.read().decode(errors='replace')}")
        running = Running.read(data_dir)
        if running is not None:
            return running
        time.sleep(0.05)
    raise click.ClickException(f"the platform did not start within {START_SECONDS:.0f} s")
