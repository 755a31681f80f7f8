"""A Slurm cluster as one provider: each of its nodes is a machine of the platform, and one daemon speaks for all.

A node has an identity, a journal and a line to the platform of its own, so everything that holds for a machine (leases,
fencing, adoption, prices, drain) holds for it. Slurm's commands are shared: one look at the queue serves all nodes.
"""

import asyncio
import contextlib
import fnmatch
import ipaddress
import shlex
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from dantegpu.daemon.containers import Containers
from dantegpu.daemon.enrol import EnrolmentRefused
from dantegpu.daemon.executors.base import ExecutorError, SandboxKind
from dantegpu.daemon.executors.routed import RoutedExecutor
from dantegpu.daemon.executors.slurm.client import NodeRow, Slurm, SlurmUnreachable
from dantegpu.daemon.executors.slurm.executor import OVERHEAD_MIB, SlurmExecutor
from dantegpu.daemon.executors.slurm.site import SlurmSite
from dantegpu.daemon.leases import LEASES
from dantegpu.daemon.module import Daemon, Rented, inventory_message, locked
from dantegpu.daemon.probe.devices import Gpu, Gpus, GpuSample
from dantegpu.daemon.probe.machine import Inventory, Utilisation
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.gpus import find_known_gpu
from dantegpu.domain.units import MIB, MILLI_PER_UNIT

log = structlog.get_logger(__name__)

POLLS_PER_LOOK = 5
"""Nodes change less often than the queue: they are looked at in every fifth of its intervals."""
RETRY_SECONDS = 10.0


def site_of(settings: DaemonSettings) -> SlurmSite:
    """The cluster that these settings name. Nothing is asked of it yet."""
    options = [f"--partition={settings.slurm_partition}"] if settings.slurm_partition else []
    # By it one daemon's jobs are told from another's, also after a restart.
    name = f"dante-{zlib.crc32(str(settings.state).encode()):08x}"
    slurm = Slurm(name, config=settings.slurm_conf, options=[*options, *shlex.split(settings.slurm_options)])
    return SlurmSite(
        slurm,
        settings.state / "slurm",
        poll_seconds=settings.slurm_poll_seconds,
        start_seconds=settings.slurm_start_seconds,
    )


def rented_nodes(nodes: Sequence[NodeRow], settings: DaemonSettings) -> list[NodeRow]:
    """Those that the owner's settings name."""
    patterns = settings.slurm_node_patterns or ["*"]
    return [
        node
        for node in nodes
        if any(fnmatch.fnmatchcase(node.name, pattern) for pattern in patterns)
        and (not settings.slurm_partition or settings.slurm_partition in node.partitions)
    ]


class WatchedNode:
    """A node as its daemon watches it, by what Slurm said last. Asked in threads."""

    def __init__(self, site: SlurmSite, name: str, gpus: int, held: Callable[[], set[int]]) -> None:
        self._site = site
        self._name = name
        self._gpus = gpus
        self._held = held

    def utilisation(self) -> Utilisation:
        node = self._site.node(self._name)
        if node is None:
            return Utilisation(0.0, 0, self.sample_gpus())
        return Utilisation(node.cpus_used / max(1, node.cpus), node.memory_used_mib * MIB, self.sample_gpus())

    def sample_gpus(self) -> Sequence[GpuSample]:
        """GPUs in use by others of the cluster are not for rent meanwhile. Which they are is Slurm's to choose."""
        held = self._held()
        free = [index for index in reversed(range(self._gpus)) if index not in held]
        taken = set(free[: self._site.strangers_gpus(self._name)])
        return [
            GpuSample(index, problem="is used by another job of the cluster" if index in taken else "")
            for index in range(self._gpus)
        ]

    def closed(self) -> str:
        node = self._site.node(self._name)
        return node.problem if node is not None else f"Slurm does not know the node {self._name} any more"

    def close(self) -> None:
        return


@dataclass(slots=True)
class Cluster:
    """All nodes that are for rent, also those that come later. `run` returns when it was told to stop."""

    settings: DaemonSettings
    on_ready: Callable[[str], None] | None = None
    """Called with the id of each machine once it is enrolled and listening."""
    _joined_before: bool = False
    _nodes: dict[str, DaemonSettings] = field(default_factory=dict[str, DaemonSettings])
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, stop: asyncio.Event) -> None:
        """Raises AlreadyRunning, EnrolmentRefused, JournalError, SlurmUnreachable (Slurm cannot be used from here)."""
        state = self.settings.state
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
            raise SlurmUnreachable(
                "Slurm's commands are not here: apt-get install slurm-client, or use another machine"
            )
        with locked(state / "lock"):
            site = site_of(self.settings)
            site.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._joined_before = any((state / "nodes").glob("*/machine.json"))
            try:
                async with asyncio.TaskGroup() as group:
                    telling = group.create_task(self._until_told(stop))
                    try:
                        await self._look(site, group, first=True)
                    except BaseException:
                        telling.cancel()
                        raise
                    group.create_task(self._look_again(site, group))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                await site.close()

    async def _until_told(self, stop: asyncio.Event) -> None:
        await stop.wait()
        for node in self._nodes.values():
            node.keep_attempts_on_stop = self.settings.keep_attempts_on_stop
        self._stop.set()

    async def _look_again(self, site: SlurmSite, group: asyncio.TaskGroup) -> None:
        while not await _within(self._stop, site.poll_seconds * POLLS_PER_LOOK):
            await self._look(site, group)

    async def _look(self, site: SlurmSite, group: asyncio.TaskGroup, *, first: bool = False) -> None:
        """Where each node stands, and a daemon for each that is new."""
        try:
            nodes = await site.look_at_nodes()
        except ExecutorError as error:
            if first and not self._joined_before:
                raise
            # What runs there goes on, and its leases bound for how long without us.
            log.warning("slurm_unreachable", error=str(error))
            return
        for node in rented_nodes(nodes, self.settings):
            if node.name not in self._nodes:
                settings = self._of_node(node)
                self._nodes[node.name] = settings
                group.create_task(self._rent_out(site, node, settings))
        if first and not self._nodes:
            raise SlurmUnreachable("no node of the cluster fits slurm_nodes and slurm_partition; sinfo lists them")

    def _of_node(self, node: NodeRow) -> DaemonSettings:
        return self.settings.model_copy(
            update={
                "state": self.settings.state / "nodes" / node.name,
                "benchmark_every_hours": 0.0,  # it would measure this machine
                "keep_attempts_on_stop": self.settings.keep_attempts_on_stop,
            }
        )

    async def _rent_out(self, site: SlurmSite, node: NodeRow, settings: DaemonSettings) -> None:
        async def look(of_node: DaemonSettings) -> Rented:
            return await self._rented(site, node, of_node)

        while not self._stop.is_set():
            try:
                await Daemon(settings, self.on_ready, look).run(self._stop)
            except ExecutorError as error:
                # A node that is down or full: its trial job has not run, so nothing is known of it yet.
                log.warning("node_not_rented_out_yet", node=node.name, error=str(error))
                await _within(self._stop, RETRY_SECONDS)
            except EnrolmentRefused as error:
                why = f"the node {node.name}: {error} (each node is a machine: dante provider token --max-uses N)"
                if not self._joined_before:
                    raise EnrolmentRefused(why) from error
                # A node that came later must not keep the others from working.
                log.warning("node_not_enrolled", error=why)
                return
            else:
                return

    async def _rented(self, site: SlurmSite, node: NodeRow, settings: DaemonSettings) -> Rented:
        wanted = SandboxKind.NONE if settings.sandbox == "none" else SandboxKind.BUBBLEWRAP
        executor = SlurmExecutor(
            Workspace(settings.state / "work"), site, node.name, sandbox=wanted,
            allow_network=settings.allow_network, gpu_types=node.gpu_types, leases=settings.state / LEASES,
        )  # fmt: skip
        capabilities = await executor.probe()
        found = await asyncio.to_thread(inventory_of, node, settings)
        inventory = inventory_message(found, capabilities, settings, Containers(None, "", "", (), []), executor.name)
        inventory.address = _address(node)
        watched = WatchedNode(site, node.name, len(node.gpu_types), executor.held)
        return Rented(watched, RoutedExecutor(executor, None), "", found, inventory)


def inventory_of(node: NodeRow, settings: DaemonSettings) -> Inventory:
    """What Slurm and its administrator say of a node; nothing of it is measured."""
    models = settings.slurm_gpu_types
    gpus = [
        _gpu(index, models.get(kind, kind), simulated=settings.slurm_simulated_gpus)
        for index, kind in enumerate(node.gpu_types)
    ]
    # Slurm gives whole cores, so there are never more attempts than these.
    overhead_mib = OVERHEAD_MIB * node.cpus
    return Inventory(
        hostname=node.name,
        cpu_milli=node.cpus * MILLI_PER_UNIT,
        memory_bytes=max(0, node.memory_mib - overhead_mib) * MIB,
        disk_bytes=shutil.disk_usage(settings.state).free,
        os=node.os,
        kernel=node.kernel,
        gpus=Gpus(tuple(gpus)),
    )


def _gpu(index: int, name: str, *, simulated: bool) -> Gpu:
    known = find_known_gpu(name)
    if known is None:
        return Gpu(index, name, "", 0, "", simulated=simulated)
    capability = f"{known.compute_capability // 10}.{known.compute_capability % 10}" if known.compute_capability else ""
    return Gpu(index, known.model, "", known.vram_bytes, capability, simulated=simulated)


def _address(node: NodeRow) -> str:
    """Only an address will do: a name means something inside the cluster only."""
    try:
        return str(ipaddress.ip_address(node.address))
    except ValueError:
        return ""


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it was set in that time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await event.wait()
    return False
