"""The daemon's composition root: only wiring, and the order in which things start and stop."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.agent import Agent
from dantegpu.daemon.attempt import Attempt, Tools
from dantegpu.daemon.benchmarks import Benchmarks
from dantegpu.daemon.containers import Containers, choose_containers
from dantegpu.daemon.devices import DeviceWatch
from dantegpu.daemon.enrol import EnrolmentRefused, GatewayUnreachable, Identity
from dantegpu.daemon.executors.base import Capabilities, DeviceGrant, Executor, SandboxKind
from dantegpu.daemon.executors.container import ContainerExecutor
from dantegpu.daemon.executors.process import ProcessExecutor
from dantegpu.daemon.executors.routed import RoutedExecutor
from dantegpu.daemon.executors.sandbox import describe_limits
from dantegpu.daemon.journal import Journal
from dantegpu.daemon.lean import give_back_memory
from dantegpu.daemon.leases import LEASES, LeaseFile
from dantegpu.daemon.link import Link
from dantegpu.daemon.logs import LogShipper
from dantegpu.daemon.ops import OpsServer
from dantegpu.daemon.probe.devices import Gpu
from dantegpu.daemon.probe.machine import Inventory, Probe, Watched, address_towards
from dantegpu.daemon.scrub import HeldFile, Scrubber
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.transfer import Transfers
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.units import MILLI_PER_UNIT

log = structlog.get_logger(__name__)

SERVICE_NAME = "beatrice-core-services"
ENROL_PAUSE_SECONDS = 1.0
MAX_ENROL_PAUSE_SECONDS = 30.0
MAX_NOTE_LENGTH = 250
"""The registry takes texts of up to 255 characters."""


class AlreadyRunning(Exception):
    """Another daemon holds this state folder."""


@dataclass(frozen=True, slots=True)
class Rented:
    """What a daemon rents out: the machine it runs on, or a node of a cluster."""

    watched: Watched
    executor: Executor
    engine: str
    found: Inventory
    inventory: machine_pb2.Inventory


async def this_machine(settings: DaemonSettings) -> Rented:
    """The machine that the daemon runs on."""
    probe = Probe(settings.state, simulate=settings.simulate_gpus, gpus=settings.gpus)
    plain, capabilities = await choose_executor(settings)
    containers = await choose_containers(settings, Workspace(settings.state / "work"))
    found = await asyncio.to_thread(probe.probe_machine)
    inventory = inventory_message(found, capabilities, settings, containers)
    return Rented(probe, RoutedExecutor(plain, containers.executor), containers.engine, found, inventory)


@dataclass(slots=True)
class Daemon:
    """Everything of one provider machine. `run` returns when it was told to stop, or the machine has left."""

    settings: DaemonSettings
    on_ready: Callable[[str], None] | None = None
    """Called with the machine's id once it is enrolled and listening."""
    look: Callable[[DaemonSettings], Awaitable[Rented]] = this_machine

    async def run(self, stop: asyncio.Event) -> None:
        """Raises AlreadyRunning, EnrolmentRefused, JournalError."""
        state = self.settings.state
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(state / "lock"):
            await self._run(stop)

    async def _run(self, stop: asyncio.Event) -> None:
        state = self.settings.state
        identity = Identity.load(state)
        identity.reach_at(self.settings.gateway_url)
        rented = await self.look(self.settings)
        inventory, executor = rented.inventory, rented.executor
        if not inventory.address:
            platform_url = identity.saved.gateway_url if identity.saved is not None else self.settings.gateway_url
            inventory.address = str(self.settings.address or await asyncio.to_thread(address_towards, platform_url))
        journal = Journal(state / "journal.db")
        transfers = Transfers()
        try:
            if not await self._enrol(identity, inventory, stop):
                return
            journal.open()
            await self._work(identity, rented, journal, transfers, stop)
        finally:
            await transfers.close()
            await executor.close()
            journal.close()
            rented.watched.close()

    async def _work(
        self,
        identity: Identity,
        rented: Rented,
        journal: Journal,
        transfers: Transfers,
        stop: asyncio.Event,
    ) -> None:
        watched, executor, found, inventory = rented.watched, rented.executor, rented.found, rented.inventory
        link = Link(identity, self.settings.nats_url)
        shipper = LogShipper(link.logs)
        tools = Tools(
            journal=journal,
            workspace=Workspace(self.settings.state / "work"),
            executor=executor,
            shipper=shipper,
            transfers=transfers,
            platform=link,
            sandbox=inventory.sandbox,
            engine=rented.engine,
            address=inventory.address or inventory.hostname,
            devices=[_grant(gpu) for gpu in found.gpus.devices],
            watch=DeviceWatch(
                lambda: asyncio.to_thread(watched.sample_gpus),
                found.gpus.devices,
                HeldFile(self.settings.state / "held_gpus.json"),
                Scrubber(enabled=self.settings.scrub_gpus),
                shares=inventory.shares_devices or found.simulated,
                max_celsius=self.settings.max_gpu_celsius,
            ),
            changed=_nobody_listens,
        )
        leases = LeaseFile(self.settings.state / LEASES)
        agent = Agent(self.settings, identity.machine_id, inventory, watched, executor, tools, leases)
        benchmarks = Benchmarks(
            self.settings.state / "benchmark.json", found.gpus.devices, self.settings.benchmark_every_hours
        )
        agent.measures_itself(benchmarks)
        ops = OpsServer(self.settings.ops_listen, agent.problems, agent.gauges)
        await shipper.start()
        try:
            await ops.start()
            await agent.adopt()
            await agent.start(link)
            await link.start(agent.desired_pushed, agent.connection_up)
            give_back_memory()
            log.info("daemon_started", machine_id=str(identity.machine_id), sandbox=inventory.sandbox)
            if self.on_ready is not None:
                self.on_ready(str(identity.machine_id))
            await _first_of(stop, agent.left)
        finally:
            await agent.stop()
            await link.stop()
            await shipper.stop()
            await ops.stop()
            if agent.left.is_set():
                identity.forget()

    async def _enrol(self, identity: Identity, inventory: machine_pb2.Inventory, stop: asyncio.Event) -> bool:
        """False when it was told to stop while the gateway did not answer."""
        pause_seconds = ENROL_PAUSE_SECONDS
        while not identity.enrolled:
            if not self.settings.gateway_url or not self.settings.join_token.get_secret_value():
                raise EnrolmentRefused("this machine is not enrolled: dante provider join URL --token TOKEN")
            try:
                await identity.enrol(self.settings.gateway_url, self.settings.join_token, inventory)
            except GatewayUnreachable as error:
                log.warning("not_enrolled_yet", error=str(error), retry_in_seconds=pause_seconds)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause_seconds)
                if stop.is_set():
                    return False
                pause_seconds = min(MAX_ENROL_PAUSE_SECONDS, pause_seconds * 2)
        return True


async def choose_executor(settings: DaemonSettings) -> tuple[ProcessExecutor, Capabilities]:
    """With `sandbox=auto`, a machine without bubblewrap runs its own team's jobs unsandboxed, and says so."""
    workspace = Workspace(settings.state / "work")
    workspace.create()
    if settings.sandbox != "none":
        executor = ProcessExecutor(workspace, sandbox=SandboxKind.BUBBLEWRAP, allow_network=settings.allow_network)
        capabilities = await executor.probe()
        if capabilities.sandbox is SandboxKind.BUBBLEWRAP or settings.sandbox == "bubblewrap":
            return executor, capabilities
        await executor.close()
        log.warning("no_sandbox", why=capabilities.missing.get("sandbox", ""))
        missing_sandbox = capabilities.missing.get("sandbox", "")
    else:
        missing_sandbox = "switched off (sandbox=none)"
    executor = ProcessExecutor(workspace, sandbox=SandboxKind.NONE, allow_network=True)
    capabilities = await executor.probe()
    missing = {**capabilities.missing, "sandbox": missing_sandbox}
    return executor, Capabilities(capabilities.sandbox, capabilities.limits, missing, capabilities.network)


def inventory_message(
    found: Inventory,
    capabilities: Capabilities,
    settings: DaemonSettings,
    containers: Containers,
    plain: str = ProcessExecutor.name,
) -> machine_pb2.Inventory:
    """What the platform is told about this machine. `plain`: the executor of jobs without an image."""
    problems = [*describe_limits(capabilities.missing), *(note[:MAX_NOTE_LENGTH] for note in containers.notes)]
    if found.gpus.problem:
        problems.append(f"gpu: {found.gpus.problem}")
    return machine_pb2.Inventory(
        hostname=found.hostname,
        cpu_milli=max(0, found.cpu_milli - int(settings.reserve_cpus * MILLI_PER_UNIT)),
        memory_bytes=max(0, found.memory_bytes - settings.reserved_memory_bytes),
        disk_bytes=found.disk_bytes,
        os=found.os,
        kernel=found.kernel,
        driver_version=found.gpus.driver_version,
        cuda_version=found.gpus.cuda_version,
        devices=[
            machine_pb2.Device(
                index=gpu.index,
                model=gpu.model,
                uuid=gpu.uuid,
                vram_bytes=gpu.vram_bytes,
                compute_capability=gpu.compute_capability,
                pcie_bus_id=gpu.pcie_bus_id,
                simulated=gpu.simulated,
                vendor=gpu.vendor,
                mig_profile=gpu.mig_profile,
                parent_uuid=gpu.parent_uuid,
                pcie_generation=gpu.pcie_generation,
                pcie_width=gpu.pcie_width,
                power_limit_watts=gpu.power_limit_watts,
                ecc=gpu.ecc,
            )
            for gpu in found.gpus.devices
        ],
        sandbox=capabilities.sandbox.value,
        executors=[plain, *([ContainerExecutor.name] if containers.engine else [])],
        limits_missing=problems,
        container_engine=containers.about[:MAX_NOTE_LENGTH],
        allowed_images=settings.allowed_images_list,
        networks=[*(["plain"] if capabilities.network else []), *containers.networks],
        daemon_version=_own_version(),
        region=settings.region,
        site=settings.site,
        simulated=found.simulated,
        shares_devices=settings.share_gpus,
    )


def _grant(gpu: Gpu) -> DeviceGrant:
    return DeviceGrant(
        uuid=gpu.uuid, model=gpu.model, index=gpu.index, paths=gpu.paths, simulated=gpu.simulated, vendor=gpu.vendor
    )


def _nobody_listens(attempt: Attempt) -> None:
    raise AssertionError(f"{attempt.row.attempt_id} changed before the agent was there")


def _own_version() -> str:
    try:
        return version("dantegpu")
    except PackageNotFoundError:
        return ""


@contextlib.contextmanager
def locked(path: Path):
    """Only one daemon at a time works in this folder. Raises AlreadyRunning."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(f"another daemon is running with the state folder {path.parent}") from None
    try:
        yield
    finally:
        os.close(descriptor)


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
