"""This machine as its own platform sees it, for `dante up` and `dante status`."""

import asyncio
import json
from collections import Counter
from pathlib import Path

from dantegpu.apps.embedded.provider import last_words
from dantegpu.contracts.rest.machines import Machine
from dantegpu.sdk import AsyncDante, Dante, DanteError

JOIN_SECONDS = 30.0
POLL_SECONDS = 0.1
_AWAY = ("offline", "unknown")


async def joined(url: str, data_dir: Path) -> Machine | str:
    """The machine once its daemon is heard, or, after JOIN_SECONDS, a line for people that says why not."""
    try:
        async with asyncio.timeout(JOIN_SECONDS), AsyncDante(url, api_key=_operator_key(data_dir)) as client:
            while True:
                machine_id = _machine_id(data_dir)
                if machine_id is not None:
                    machine = await client.machines.get(machine_id)
                    if machine.status not in _AWAY:
                        return machine
                await asyncio.sleep(POLL_SECONDS)
    except (TimeoutError, DanteError):
        return f"has not joined yet, it goes on trying; {reason(data_dir)}"


def look(url: str, data_dir: Path) -> Machine | str:
    """The machine as it is now, or a line for people that says why nobody knows."""
    machine_id = _machine_id(data_dir)
    if machine_id is None:
        return f"has not joined; {reason(data_dir)}"
    try:
        with Dante(url, api_key=_operator_key(data_dir), retry_seconds=0) as client:
            return client.machines.get(machine_id)
    except (DanteError, OSError) as error:
        return f"unknown: {error}"


def reason(data_dir: Path) -> str:
    """What the daemon said last, and where its log is."""
    log_path = data_dir / "provider.log"
    said = last_words(log_path)
    return f"its log {log_path} " + (f"ends with: {said}" if said else "is empty")


def describe(machine: Machine) -> str:
    """`"host: idle, 2x RTX 4090 (simulated), 16 cores, sandbox bubblewrap"`"""
    gpus = Counter(f"{device.model}{' (simulated)' if device.simulated else ''}" for device in machine.devices)
    parts = [str(machine.status), *(f"{count}x {name}" for name, count in gpus.items())]
    parts += [] if gpus else ["no GPU"]
    parts += [f"{machine.cpu_milli / 1000:g} cores", f"sandbox {machine.sandbox or 'none'}"]
    return f"{machine.hostname}: {', '.join(parts)}"


def isolates(machine: Machine) -> bool:
    """Whether other teams' jobs may come here."""
    return machine.sandbox not in ("", "none")


def _machine_id(data_dir: Path) -> str | None:
    try:
        return json.loads((data_dir / "provider" / "machine.json").read_text())["machine_id"]
    except (OSError, ValueError, KeyError):
        return None


def _operator_key(data_dir: Path) -> str:
    return (data_dir / "secrets" / "operator.key").read_text().strip()
