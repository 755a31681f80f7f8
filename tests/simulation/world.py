"""A whole platform in one thread: two schedulers, billing, machines with their daemons, users; and its wiring."""

import asyncio
import hashlib
import shutil
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, cast

from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

from dantegpu.contracts.gen.dante.v1 import (
    billing_pb2,
    billing_pb2_grpc,
    common_pb2,
    jobs_pb2,
    jobs_pb2_grpc,
    marketplace_pb2_grpc,
    registry_pb2_grpc,
    storage_pb2_grpc,
)
from dantegpu.daemon.agent import Agent
from dantegpu.daemon.attempt import Attempt, Tools
from dantegpu.daemon.devices import DeviceWatch
from dantegpu.daemon.executors.base import DeviceGrant
from dantegpu.daemon.leases import LEASES, LeaseFile
from dantegpu.daemon.link import Link
from dantegpu.daemon.probe.devices import GpuSample, simulated_gpus
from dantegpu.daemon.scrub import HeldFile, Scrubber
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.transfer import TransferFailed
from dantegpu.daemon.workspace import Workspace
from dantegpu.domain.ids import JobId, TeamId, UserId
from dantegpu.kit import rpc
from dantegpu.kit.actor import Actor
from dantegpu.kit.bus import Bus
from dantegpu.kit.deps import Deps
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import LostLeadership
from dantegpu.kit.lifecycle import Service
from dantegpu.services.billing import module as billing_module
from dantegpu.services.billing.settings import BillingSettings
from dantegpu.services.scheduler import module as scheduler_module
from dantegpu.services.scheduler.settings import SchedulerSettings
from tests.simulation import coverage
from tests.simulation.hardware import DiskJournal, Hardware, JobProcess, SimExecutor, SimProbe, SimShipper
from tests.simulation.loop import Nap, Process, ProcessKilled, SimLoop, current_process
from tests.simulation.market import Market
from tests.simulation.memory.billing import billing_schema
from tests.simulation.memory.engine import IDLE_IN_TRANSACTION_SECONDS, Change, MemoryServer, MemoryTx
from tests.simulation.memory.scheduler import scheduler_schema
from tests.simulation.nats import SimClient, SimNats
from tests.simulation.patches import START_SECONDS
from tests.simulation.rpc import SimChannels, SimNetwork, SimServer
from tests.simulation.scenario import Fault, JobPlan, Scenario

SCHEDULERS = ("scheduler-a", "scheduler-b")
BILLING = "billing"
MARKET = "market"
LEASE_SECONDS = 6.0
LEASE_GRACE_SECONDS = 1.5
ORPHAN_AGE_SECONDS = 20
"""Less than the settings allow: nothing here holds up a plan for that long."""
SERVICE_START_SECONDS = 1.0
DATABASE_AT_ONCE_CHANCE = 0.8
_SCHEDULER_SETTINGS = SchedulerSettings(
    lease_seconds=LEASE_SECONDS, lease_grace_seconds=LEASE_GRACE_SECONDS, stop_grace_seconds=1.5,
    stop_timeout_seconds=20.0, timer_seconds=2.5, settlement_seconds=2.5, orphan_sweep_seconds=6.0,
    inventory_refresh_seconds=7.0, max_duration_seconds=300, quarantine_seconds=3.0,
    array_seconds=5.0,
).model_copy(update={"orphan_age_seconds": ORPHAN_AGE_SECONDS})  # fmt: skip
_BILLING_SETTINGS = BillingSettings()
_DAEMON_SETTINGS = DaemonSettings(sync_interval_seconds=2.0, heartbeat_interval_seconds=3.0)


class SimClock:
    """A process's wall clock: the world's time and its own error."""

    def __init__(self, loop: SimLoop, skew_seconds: float = 0.0) -> None:
        self._loop = loop
        self._began = datetime.fromtimestamp(START_SECONDS, UTC) + timedelta(seconds=skew_seconds)
        self._known = (0.0, self._began)

    def now(self) -> datetime:
        seconds = self._loop.time()
        if seconds != self._known[0]:
            self._known = (seconds, self._began + timedelta(seconds=seconds))
        return self._known[1]

    def monotonic(self) -> float:
        return self._loop.time()


@dataclass(frozen=True, slots=True)
class TraceLine:
    """Something that happened. `who`: a process, or empty for the world."""

    at_seconds: float
    who: str
    what: str


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold."""

    invariant: str
    what: str
    at_seconds: float


@dataclass(slots=True)
class Accepted:
    """A job that was answered with 2xx."""

    job_id: JobId
    plan: JobPlan
    number: int


@dataclass(frozen=True, slots=True)
class SimIdentity:
    """What Link needs of the machine's identity."""

    machine_id: Any
    nats_url: str = "sim"
    credentials: None = None
    renewal_due: bool = False
    expired: bool = False


class SimTransfers:
    """Uploads arrive under the key that their URL names."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def send(self, output: Path, files: Any, urls: Any) -> None:
        await asyncio.sleep(self._world.random.uniform(0.001, 0.1))
        for file, url in zip(files, urls, strict=True):
            self._world.objects[str(url)] = (output / file.file.path).read_bytes()

    async def fetch(self, url: str, target: Path, *, sha256: str, size_bytes: int, what: str) -> None:
        await asyncio.sleep(self._world.random.uniform(0.001, 0.1))
        data = self._world.objects[url]
        if hashlib.sha256(data).hexdigest() != sha256 or len(data) != size_bytes:
            raise TransferFailed(f"the {what} is another one")
        target.write_bytes(data)


@dataclass(slots=True)
class Watchers:
    """Who looks at each step. Set by the checks."""

    commit: Callable[[MemoryTx, Sequence[Change]], None]
    started: Callable[[Hardware, JobProcess], None]
    ended: Callable[[Hardware, JobProcess], None]
    answered: Callable[[Accepted], None]


def _no_bytes(*arguments: Any) -> None:
    return


class World:
    """Everything of one run. Random numbers of the network, of faults and of production code are drawn apart."""

    def __init__(self, scenario: Scenario, folder: Path, *, tracing: bool = False) -> None:
        self.scenario = scenario
        self.loop = SimLoop()
        self.random = Random(f"production {scenario.seed}")
        self.network_random = Random(f"network {scenario.seed}")
        self.fault_random = Random(f"faults {scenario.seed}")
        self.happened: Counter[str] = Counter()
        """How often each Fault and each Outcome was there."""
        self.broker = SimNats(self.loop, self.network_random, self.happened)
        self.network = SimNetwork(self.loop, self.network_random, self.happened)
        self.clock = SimClock(self.loop)
        self.database = MemoryServer(self.clock.now)
        self.database_up = True
        self.unknown_commit_chance = 0.0
        self.stop_next_plan_seconds = 0.0
        self.when_started: deque[Callable[[Hardware], None]] = deque()
        """Each is called once, with the next machine on which a job's process starts."""
        self.folder = folder
        self.tracing = tracing
        self.trace: list[TraceLine] = []
        self.violations: list[Violation] = []
        self.stopped = False
        self.processes: dict[str, Process] = {}
        self.machines: list[Hardware] = []
        self.accepted: list[Accepted] = []
        self.objects: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.teams: list[TeamId] = []
        self.user = Process("user", self.loop)
        self.market: Market | None = None
        self.watchers = Watchers(_no_bytes, _no_bytes, _no_bytes, _no_bytes)
        self._starting: dict[str, Callable[[Process], Coroutine[Any, Any, None]]] = {}
        self._credits = 0
        self._running_since: dict[Process, float] = {}

    # --- words --------------------------------------------------------------------------------------------------------

    def say(self, what: str, who: str = "") -> None:
        if self.tracing:
            self.trace.append(TraceLine(self.loop.time(), who, self._named(what)))

    def _named(self, text: str) -> str:
        for long, short in self.names.items():
            if long in text:
                text = text.replace(long, short)
        return text

    def name(self, thing: object, short: str) -> None:
        """How an id is called in the trace."""
        if self.tracing:
            self.names[str(thing)] = short

    def violate(self, invariant: str, what: str) -> None:
        """Note it and end the run: what follows would only be its consequence."""
        self.violations.append(Violation(invariant, self._named(what), self.loop.time()))
        self.say(f"VIOLATION {invariant}: {what}")
        self.stopped = True

    def logged(self, level: str, module: str, event: str, fields: dict[str, Any]) -> None:
        """What production code logs. A crash that it had to catch at an outermost loop is a finding."""
        process = current_process()
        if self.loop.ending:
            return
        if (outcome := coverage.of_log(event, fields)) is not None:
            self.happened[outcome] += 1
        error = sys.exc_info()[1]
        if (level == "exception" or event == "loop_failed") and error is not None and _is_crash(error):
            self.violate("crash", f"{process.name if process else ''}: {module} {event} {fields} {error!r}")
        if self.tracing and level != "debug":
            words = " ".join(f"{key}={value}" for key, value in fields.items())
            self.say(f"{event} {words}", process.name if process else "")

    # --- processes ----------------------------------------------------------------------------------------------------

    def hardware_of(self, process: Process | None) -> Hardware:
        name = process.name if process is not None else ""
        return next(machine for machine in self.machines if machine.name == name)

    def start(self, name: str, run: Callable[[Process], Coroutine[Any, Any, None]]) -> Process:
        """A new process called `name`; run() is its main function."""
        process = Process(name, self.loop)
        process.on_kill.append(lambda: self._died(process))
        self.processes[name] = process
        self._running_since[process] = self.loop.time()
        self._starting[name] = run
        process.spawn(self._main(process, run))
        return process

    async def _main(self, process: Process, run: Callable[[Process], Awaitable[None]]) -> None:
        try:
            await run(process)
        except Exception as error:  # noqa: BLE001 - a process whose main function fails ends and is started again
            if _is_crash(error):
                self.violate("crash", f"{process.name} did not start: {error!r}")
            self.say(f"could not start: {error}", process.name)
            process.kill()
            self.loop.later(SERVICE_START_SECONDS, self.restart, process.name)

    def restart(self, name: str) -> None:
        """Start it again, as its supervisor does, unless it runs."""
        hardware = next((machine for machine in self.machines if machine.name == name), None)
        if not self.processes[name].alive and (hardware is None or hardware.powered):
            self.say("starts", name)
            self.start(name, self._starting[name])

    def _died(self, process: Process) -> None:
        self.say("dies", process.name)
        self.database.break_process(process)
        for client in [client for client in self.broker.clients if client.belongs_to(process)]:
            self.loop.later(0.0, self._close_client, client)

    def _close_client(self, client: SimClient) -> None:
        self.loop.create_task(client.close())

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while. The database ends its idle transactions meanwhile."""
        if not process.running:
            return
        process.freeze()
        self.say(f"stopped for {seconds:.1f} s", process.name)
        self.loop.later(seconds, self._thaw, process)
        self.loop.later(
            IDLE_IN_TRANSACTION_SECONDS, lambda: process.frozen and self.database.break_idle(process, self.loop.time())
        )

    def supervised_since(self, hardware: Hardware) -> float:
        """Since when the machine's daemon runs without having been stopped; now when it does not."""
        process = self.processes[hardware.name]
        return self._running_since.get(process, 0.0) if process.running else self.loop.time()

    def _thaw(self, process: Process) -> None:
        if process.frozen:
            self.say("goes on", process.name)
            self._running_since[process] = self.loop.time()
            process.thaw()

    # --- the platform -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The database, empty."""
        self.database.add(scheduler_schema())
        self.database.add(billing_schema())

    def build(self) -> None:
        """Start everything."""
        self.database.pause = self._database_pause
        self.database.on_commit = self.watchers.commit
        self.teams = [TeamId.new() for _ in range(self.scenario.teams)]
        for number, team in enumerate(self.teams, 1):
            self.name(team, f"team{number}")
        self.start(MARKET, self._run_market)
        self.start(BILLING, self._run_billing)
        for name, skew in zip(SCHEDULERS, self.scenario.clock_skew_seconds, strict=True):
            self.start(name, self._scheduler(skew))
        for number, gpus in enumerate(self.scenario.machines, 1):
            self._add_machine(f"machine{number}", gpus)

    def _add_machine(self, name: str, gpus: int) -> None:
        disk = self.folder / name
        disk.mkdir(parents=True)
        machine = Hardware(self.loop, self.random, name, disk, gpus, TeamId.new())
        machine.on_start = self._started
        machine.on_end = self.watchers.ended
        self.machines.append(machine)
        self.name(machine.id, name)
        for index, device in enumerate(machine.device_ids):
            self.name(device, f"{name}/gpu{index}")
        self.start(name, self._daemon(machine))

    def _started(self, machine: Hardware, process: JobProcess) -> None:
        self.watchers.started(machine, process)
        if self.when_started:
            self.when_started.popleft()(machine)

    def _database_pause(self, tx: MemoryTx, at: str) -> Awaitable[None] | None:
        process = tx.process
        if process is not None:
            process.failpoint()
        if not self.database_up:
            tx.abort("the database system is shutting down")
            return None
        if at in ("begin", "answer"):
            return None
        chance = self.network_random.random()
        if at != "statement" and chance < self.unknown_commit_chance:
            self.happened[Fault.COMMIT_UNKNOWN] += 1
            tx.abort("server closed the connection unexpectedly")
        elif at != "committed":
            if self.stop_next_plan_seconds and process is not None and tx.adds_to("attempts"):
                return self._stop_planning(process)
            if chance > DATABASE_AT_ONCE_CHANCE:
                # Most statements are so fast that nobody else comes in between: it would cost, and show little more.
                return Nap(self.loop, 0.01 * (chance - DATABASE_AT_ONCE_CHANCE))
        return None

    async def _stop_planning(self, process: Process) -> None:
        seconds, self.stop_next_plan_seconds = self.stop_next_plan_seconds, 0.0
        self.happened[Fault.LEADER_STOPPED] += 1
        self.loop.outside.run(self.freeze, process, seconds)
        await asyncio.sleep(0)

    async def _connected_bus(self, name: str) -> Bus:
        bus = Bus("sim", None, name=name)
        await bus.start()
        return bus

    async def _serve(self, process: Process, door: str, clock: SimClock, build: Callable[[Deps], Service]) -> None:
        bus = await self._connected_bus(process.name)
        service = build(Deps(clock, bus, cast(Any, SimChannels(self.network))))
        for component in service.components:
            await component.start()
        if service.register_rpc is not None:
            service.register_rpc(cast(Any, SimServer(self.network, process, door)))

    def _scheduler(self, skew_seconds: float) -> Callable[[Process], Coroutine[Any, Any, None]]:
        async def run(process: Process) -> None:
            clock = SimClock(self.loop, skew_seconds)
            await self._serve(
                process, process.name, clock, lambda deps: scheduler_module.build(deps, _SCHEDULER_SETTINGS)
            )

        return run

    async def _run_billing(self, process: Process) -> None:
        await self._serve(
            process, "billing-payment-service", self.clock, lambda deps: billing_module.build(deps, _BILLING_SETTINGS)
        )

    async def _run_market(self, process: Process) -> None:
        market = Market(await self._connected_bus(process.name), self.clock, self.objects)
        for machine in self.machines:
            market.join(machine)
        add: list[tuple[str, Callable[[Any, Any], None]]] = [
            ("provider-registry-service", registry_pb2_grpc.add_RegistryServiceServicer_to_server),
            ("agora-marketplace", marketplace_pb2_grpc.add_MarketplaceServiceServicer_to_server),
            ("storage-service", storage_pb2_grpc.add_StorageServiceServicer_to_server),
        ]
        for door, register in add:
            register(cast(Any, market), SimServer(self.network, process, door))
        await market.start()
        self.market = market
        await market.run()

    def _daemon(self, machine: Hardware) -> Callable[[Process], Coroutine[Any, Any, None]]:
        async def run(process: Process) -> None:
            workspace = Workspace(machine.disk / "work")
            workspace.create()
            journal = DiskJournal(machine)
            journal.open()
            link = Link(cast(Any, SimIdentity(machine.id)), "")
            executor = SimExecutor(machine, workspace)
            tools = Tools(
                journal=journal,
                workspace=workspace,
                executor=executor,
                shipper=cast(Any, SimShipper()),
                transfers=cast(Any, SimTransfers(self)),
                platform=link,
                sandbox="bubblewrap",
                engine="",
                address=machine.name,
                devices=[
                    DeviceGrant(uuid=f"GPU-{machine.name}-{i}", model="RTX 4090", index=i) for i in range(machine.gpus)
                ],
                changed=_nobody_listens,
                watch=DeviceWatch(
                    _no_samples,
                    simulated_gpus(f"RTX 4090:{machine.gpus}" if machine.gpus else ""),
                    HeldFile(machine.disk / "held_gpus.json"),
                    Scrubber(),
                ),
            )
            agent = Agent(
                _DAEMON_SETTINGS, machine.id, machine.inventory(), cast(Any, SimProbe()), cast(Any, executor), tools,
                LeaseFile(machine.disk / LEASES),
            )  # fmt: skip
            await agent.adopt()
            await agent.start(link)
            await link.start(agent.desired_pushed, agent.connection_up)

        return run

    # --- users --------------------------------------------------------------------------------------------------------

    def member_of(self, team: TeamId) -> Actor:
        return Actor(common_pb2.Actor.USER, user_id=UserId(team.uuid), team_id=team, role="owner")

    async def call[R](self, method: Callable[[str], tuple[Any, Any]], actor: Actor) -> Any:
        """As a client with retries: the same request, to either replica, until somebody answers."""
        attempt = 0
        while not self.stopped:
            attempt += 1
            stub, request = method(self.network_random.choice(SCHEDULERS))
            try:
                return await rpc.call(stub, request, actor=actor, timeout_seconds=4.0)
            except ServiceError as error:
                self.say(f"{type(request).__name__} failed ({error.message}), trying again", "user")
                await asyncio.sleep(self.network_random.uniform(0.2, 1.5))
        raise asyncio.CancelledError

    def _jobs(self, door: str) -> jobs_pb2_grpc.JobServiceStub:
        return jobs_pb2_grpc.JobServiceStub(cast(Any, SimChannels(self.network).to(door)))

    async def submit(self, plan: JobPlan, number: int) -> None:
        team = self.teams[plan.team]
        spec = spec_of(plan)
        request = jobs_pb2.SubmitJobsRequest(specs=[spec], idempotency_key=f"job {number}")
        answer: jobs_pb2.SubmitJobsResponse = await self.call(
            lambda door: (self._jobs(door).SubmitJobs, request), self.member_of(team)
        )
        accepted = Accepted(JobId.parse(answer.jobs[0].id), plan, number)
        self.name(accepted.job_id, f"job{number}")
        self.name(accepted.job_id.uuid, f"job{number}")
        self.accepted.append(accepted)
        self.say(f"job{number} accepted: {plan}", "user")
        self.watchers.answered(accepted)

    async def cancel(self, accepted: Accepted) -> None:
        self.say(f"stops job{accepted.number}", "user")
        request = jobs_pb2.StopJobsRequest(job_ids=[str(accepted.job_id)])
        await self.call(
            lambda door: (self._jobs(door).StopJobs, request), self.member_of(self.teams[accepted.plan.team])
        )

    async def credit(self, team: TeamId, amount_udgpu: int) -> None:
        self._credits += 1
        self.say(f"credits {team} with {amount_udgpu} micro-$dGPU", "user")
        stub = billing_pb2_grpc.BillingServiceStub(cast(Any, SimChannels(self.network).to("billing-payment-service")))
        request = billing_pb2.CreditRequest(
            team_id=str(team), amount_udgpu=amount_udgpu, text="", idempotency_key=f"credit {self._credits}"
        )
        await self.call(lambda _: (stub.Credit, request), Actor(common_pb2.Actor.USER, team_id=team, operator=True))

    def forget(self) -> None:
        """Free what the run made."""
        self.loop.close()
        for machine in self.machines:
            machine.journal_file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def spec_of(plan: JobPlan) -> jobs_pb2.JobSpec:
    words = ["sim", f"{plan.runs_seconds:.3f}", str(plan.exit_code), *(["stubborn"] if plan.stubborn else [])]
    spec = jobs_pb2.JobSpec(
        argv=words,
        resources=jobs_pb2.ResourceRequest(
            gpu=str(plan.gpus) if plan.gpus else "", cpu_milli=plan.cpu_milli, memory_bytes=1 << 30
        ),
        max_duration_seconds=plan.max_duration_seconds,
        nodes=plan.nodes,
    )
    if plan.spot:
        spec.spot_policy = "spot"
    if plan.saves:
        spec.checkpoint.path = "ckpt"
        spec.checkpoint.grace_seconds = 3
    if plan.retries_errors:
        spec.retry.on_events.append("error")
    return spec


def _is_crash(error: BaseException) -> bool:
    """Whether it is anything but an outage that a loop waits for to end."""
    if isinstance(error, BaseExceptionGroup):
        return any(_is_crash(inner) for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions)
    expected = ServiceError | NatsError | JetStreamError | TimeoutError | OSError | LostLeadership | ProcessKilled
    return not isinstance(error, expected)


async def _no_samples() -> list[GpuSample]:
    return []


def _nobody_listens(attempt: Attempt) -> None:
    raise AssertionError(f"{attempt.row.attempt_id} changed before the agent was there")
