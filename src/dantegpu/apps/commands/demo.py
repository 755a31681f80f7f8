"""`dante demo`: the whole platform in a folder of its own, and a real training job through every part of it."""

import asyncio
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import click

from dantegpu.apps.bootstrap import Login
from dantegpu.apps.commands.running import run_loop, unless_stopped
from dantegpu.apps.platform import Options, Platform, Ports
from dantegpu.cli.packing import pack
from dantegpu.contracts.rest.jobs import Job
from dantegpu.contracts.rest.machines import Machine
from dantegpu.domain.units import UDGPU_PER_DGPU, format_dgpu
from dantegpu.kit.telemetry import configure_logging
from dantegpu.sdk import AsyncDante

EXAMPLE = Path(__file__).resolve().parents[4] / "examples" / "digits"
ACCURACY_MIN = 0.9
JOIN_TIMEOUT_SECONDS = 60.0
JOB_TIMEOUT_SECONDS = 120.0
CONSUMER_CREDIT_UDGPU = 10 * UDGPU_PER_DGPU


@dataclass(slots=True)
class Outcome:
    """What `dante demo --json` prints. `states`: seconds from the submission to each state; `error` only after one."""

    ok: bool = False
    accuracy: float = 0.0
    states: dict[str, float] = field(default_factory=dict[str, float])
    cost_udgpu: int = 0
    ledger_balanced: bool = False
    results: str = ""
    seconds: float = 0.0
    error: str = ""


@click.command("demo")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end, nothing else on stdout.")
def demo(as_json: bool) -> None:
    """Start the platform on free ports, run examples/digits as a consumer would, show everything, stop everything."""
    if not EXAMPLE.is_dir():
        raise click.ClickException("the demo runs from a clone: examples/digits is not here")
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="dante-demo-"))
    with (folder / "platform.log").open("a", buffering=1) as log_file:
        configure_logging("dante demo", "info", log_file)
        # With --json, progress goes to stderr: a person who waits sees something all the same.
        say: Callable[[str], None] = lambda text: click.echo(text, err=as_json)  # noqa: E731
        outcome = run_loop(lambda stop: unless_stopped(_demo(folder, say), stop))
    if outcome is None:
        raise SystemExit(130)
    outcome.seconds = round(time.monotonic() - began, 2)
    if as_json:
        figures = asdict(outcome)
        if not outcome.error:
            del figures["error"]
        click.echo(json.dumps(figures))
    else:
        _tell(outcome, folder)
    if not outcome.ok:
        raise SystemExit(1)


def _tell(outcome: Outcome, folder: Path) -> None:
    click.echo("")
    if outcome.error:
        click.echo(f"The demo failed: {outcome.error}")
        click.echo(f"Logs: {folder / 'platform.log'}, {folder / 'provider.log'}")
        return
    click.echo("  states     " + "  ".join(f"{state} {seconds:.2f}s" for state, seconds in outcome.states.items()))
    click.echo(f"  accuracy   {outcome.accuracy:.3f} on digits it had not seen")
    click.echo(f"  picture    {Path(outcome.results) / 'learning_curve.png'}")
    click.echo(f"  results    {outcome.results}")
    click.echo(f"  cost       {format_dgpu(outcome.cost_udgpu)} $dGPU")
    click.echo(f"  ledger     {'balanced' if outcome.ledger_balanced else 'NOT BALANCED'}")
    click.echo(f"  took       {outcome.seconds:.1f} s; everything has been stopped")


async def _demo(folder: Path, say: Callable[[str], None]) -> Outcome:
    platform = Platform(Options(folder / "platform", Ports.free()), tell=lambda what: say(f"starting {what} ..."))
    try:
        await platform.start()
        assert platform.login is not None
        return await _run(platform.login, folder, say)
    except (AssertionError, asyncio.CancelledError):
        raise
    except Exception as error:  # noqa: BLE001 - the demo's outermost frame: a failure is its result
        return Outcome(error=f"{type(error).__name__}: {error}")
    finally:
        await platform.stop()
        log = folder / "platform" / "provider.log"
        if log.exists():
            shutil.move(log, folder / "provider.log")
        shutil.rmtree(folder / "platform", ignore_errors=True)


async def _run(login: Login, folder: Path, say: Callable[[str], None]) -> Outcome:
    async with AsyncDante(login.url, api_key=login.api_key.get_secret_value()) as operator:
        machine = await _machine(operator)
        isolated = machine.sandbox not in ("", "none")
        say(f"provider: {machine.hostname}, {machine.cpu_milli / 1000:g} cores, sandbox {machine.sandbox or 'none'}")
        if not isolated:
            say("this machine cannot isolate jobs (see `dante doctor`), so the operator's own team runs the job")
            outcome = await _train(operator, folder, say)
        else:
            async with AsyncDante(login.url) as consumer:
                await _become_consumer(consumer, operator, say)
                outcome = await _train(consumer, folder, say)
        ledger = await operator.admin.ledger()
        outcome.ledger_balanced = ledger.balanced and ledger.open_holds == 0
        outcome.ok = outcome.ok and outcome.ledger_balanced
        return outcome


async def _machine(operator: AsyncDante) -> Machine:
    """This machine, once its daemon has joined."""
    async with asyncio.timeout(JOIN_TIMEOUT_SECONDS):
        while True:
            for machine in (await operator.machines.list()).machines:
                if machine.status in ("idle", "busy"):
                    return machine
            await asyncio.sleep(0.1)


async def _become_consumer(consumer: AsyncDante, operator: AsyncDante, say: Callable[[str], None]) -> None:
    email, password = "ada@example.org", secrets.token_urlsafe(18)
    registered = await consumer.auth.register(email, password, team_name="demo")
    await consumer.auth.login(email, password)
    await operator.admin.credit(registered.team.id, CONSUMER_CREDIT_UDGPU, text="welcome")
    say(f"consumer {email} registered; the operator credited {format_dgpu(CONSUMER_CREDIT_UDGPU)} $dGPU")


async def _train(client: AsyncDante, folder: Path, say: Callable[[str], None]) -> Outcome:
    archive = folder / "input.tar.gz"
    with archive.open("wb") as target:
        pack(EXAMPLE, target)
    job_input = await client.uploads.put(archive)
    archive.unlink()
    job = await client.jobs.submit(
        {
            "name": "digits",
            "commands": ["python train.py"],
            "resources": {"cpu": 1, "memory": "512MB"},
            "input": job_input.model_dump(),
        }
    )
    say(f"{job.id} submitted")
    outcome = Outcome()
    async with asyncio.timeout(JOB_TIMEOUT_SECONDS):
        await asyncio.gather(_follow_states(client, job, outcome, say), _follow_log(client, job, say))
        done = await client.jobs.wait(job.id, settled=True)
    outcome.cost_udgpu = done.cost_udgpu
    if done.state != "SUCCEEDED":
        outcome.error = f"the job ended {done.state}: {done.message or done.outcome}"
        return outcome
    results = folder / "results"
    await client.jobs.download(job.id, results)
    outcome.results = str(results)
    outcome.accuracy = float(json.loads((results / "metrics.json").read_text())["accuracy"])
    outcome.ok = outcome.accuracy >= ACCURACY_MIN
    return outcome


async def _follow_states(client: AsyncDante, job: Job, outcome: Outcome, say: Callable[[str], None]) -> None:
    def after(moment: datetime) -> float:
        return round((moment - job.created_at).total_seconds(), 3)

    outcome.states["QUEUED"] = 0.0
    async for event in client.jobs.events(job.id, follow=True):
        if event.state not in outcome.states:
            outcome.states[event.state] = after(event.occurred_at)
            say(f"{event.state:<10}{after(event.occurred_at):7.2f} s  {event.message}")


async def _follow_log(client: AsyncDante, job: Job, say: Callable[[str], None]) -> None:
    pending = ""
    async for chunk in client.jobs.logs(job.id, follow=True):
        *lines, pending = (pending + chunk.data.decode(errors="replace")).split("\n")
        for line in lines:
            say(f"  | {line}")
    if pending:
        say(f"  | {pending}")
