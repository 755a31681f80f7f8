"""Which container engine this machine's jobs may use, by the owner's settings and by what is there."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dantegpu.daemon.executors.base import SandboxKind
from dantegpu.daemon.executors.container import ContainerExecutor, ContainerLimits
from dantegpu.daemon.executors.container.engine import default_sockets
from dantegpu.daemon.executors.container.network import NetworkPolicy
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.workspace import Workspace

OFF = "none"
AUTO = "auto"
_LACKING = {"network": "network of jobs with an image", "site": "network of a job's nodes with an image"}
GET_ENGINE = "install Docker or Podman and give the daemon's user its socket, for example: apt-get install docker.io"


@dataclass(frozen=True, slots=True)
class Containers:
    """`executor` is there also when `engine` is empty, if only to end what an earlier daemon has left."""

    executor: ContainerExecutor | None
    engine: str
    """docker | podman; empty: jobs with an image do not come here."""
    about: str
    """The engine, for people: its version, its runtime, whose users its jobs are."""
    networks: Sequence[str]
    """What the inventory says of them: image where jobs with an image may have one, ports where they may publish,
    gang where nodes on several machines reach one another."""
    notes: Sequence[str]
    """For people: why not, or which risks the owner has accepted."""


def find_socket(setting: str) -> Path | None:
    """The engine's socket: the one that was named, or the first that is there and may be used."""
    if setting == OFF:
        return None
    if setting != AUTO:
        return Path(setting.removeprefix("unix://")).expanduser()
    return next((path for path in default_sockets() if _usable(path)), None)


def _usable(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode) and os.access(path, os.R_OK | os.W_OK)
    except OSError:
        return False


async def choose_containers(settings: DaemonSettings, workspace: Workspace) -> Containers:
    """Looks at the engine; the caller closes `executor`."""
    socket = find_socket(settings.containers)
    if socket is None:
        off = settings.containers == OFF
        return Containers(None, "", "", (), [] if off else [f"container: no Docker or Podman socket; {GET_ENGINE}"])
    limits = ContainerLimits(
        network=network_policy(settings),
        image_cache_bytes=settings.image_cache_gb << 30,
        local_images=settings.local_images_list,
        allowed_images=settings.allowed_images_list,
        accepted_escapes=frozenset(settings.accepted_escapes),
    )
    executor = ContainerExecutor(workspace, socket, limits)
    capabilities = await executor.probe()
    notes = [f"{_LACKING.get(name, name)}: {why}" for name, why in sorted(capabilities.missing.items())]
    notes += [f"container: {name} ({what}) accepted by the owner" for name, what in executor.accepted_escapes.items()]
    engine = "" if capabilities.sandbox is SandboxKind.NONE else capabilities.sandbox.value
    facts = executor.facts
    about = facts.describe(daemon_is_root=os.geteuid() == 0) if facts is not None else ""
    kinds = {"image": capabilities.network, "ports": capabilities.ports, "gang": capabilities.gangs}
    return Containers(executor, engine, about, [kind for kind, given in kinds.items() if given], notes)


def network_policy(settings: DaemonSettings) -> NetworkPolicy | None:
    """What the owner's settings say about the network of jobs with an image."""
    if not settings.allow_network:
        return None
    return NetworkPolicy(
        settings.network_open_ranges,
        settings.resolver_addresses,
        settings.publish_policy,
        settings.site_port if settings.site else 0,
    )
