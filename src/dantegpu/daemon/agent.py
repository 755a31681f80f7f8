"""The reconcile loop: what the platform wants of this machine, what the machine has, and how one becomes the other."""

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

import structlog

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon import owner
from dantegpu.daemon.attempt import Attempt, Tools, sandbox_of
from dantegpu.daemon.benchmarks import BUSY_PAUSE_SECONDS, Benchmarks
from dantegpu.daemon.executors.base import Adoption, Executor, ExecutorError
from dantegpu.daemon.executors.processes import boot_id
from dantegpu.daemon.journal import AttemptRow, JournalError
from dantegpu.daemon.leases import LeaseFile, ServerClock, boottime, lease_until
from dantegpu.daemon.link import Link
from dantegpu.daemon.meter import METRICS_INTERVAL_SECONDS, Meter, use_of
from dantegpu.daemon.owner import Hours
from dantegpu.daemon.probe.devices import GpuSample
from dantegpu.daemon.probe.machine import Watched
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.domain.ids import AttemptId, JobId, MachineId
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Pace, Tasks, Wakeup

log = structlog.get_logger(__name__)

FENCE_CHECK_SECONDS = 1.0
UNACKNOWLEDGED_SYNC_SECONDS = 2.0
"""The next sync comes this soon while the platform has not acknowledged something: usually a push does before."""
OVER_MARGIN_SECONDS = 1.0
"""By so much two estimates of the server's clock may differ."""
MIN_SYNC_PAUSE_SECONDS = 0.05
REPORT_PAUSE_SECONDS = 0.01
"""Between two reports, at least: what changes meanwhile is told in one message."""
UNTOLD_RUNNING_SECONDS = 0.02
"""A start is told after this time. A job that is shorter is told once, as ended: half of the platform's work."""
INVENTORY_EVERY_HEARTBEATS = 12
STOP_GRACE_SECONDS = 3.0
STOP_TIMEOUT_SECONDS = 8.0
MAX_REPORT_ATTEMPTS = 200
SCRUB_AGAIN_SECONDS = 30.0
HOURS_CHECK_SECONDS = 5.0


class Agent:
    """Owns the attempts of this machine. `left` is set when the platform does not want the machine any more."""

    def __init__(
        self,
        settings: DaemonSettings,
        machine_id: MachineId,
        inventory: machine_pb2.Inventory,
        probe: Watched,
        executor: Executor,
        tools: Tools,
        leases: LeaseFile,
    ) -> None:
        self.left = asyncio.Event()
        self._settings = settings
        self._machine_id = machine_id
        self._boot_id = uuid.uuid4().hex
        self._inventory = inventory
        self._probe = probe
        self._executor = executor
        self._tools = replace(tools, changed=self._changed)
        self._leases = leases
        self._benchmarks: Benchmarks | None = None
        self._idle_job = owner.IdleJob(settings.idle_command)
        self._meter = Meter(probe.sample_gpus)
        self._attempts: dict[AttemptId, Attempt] = {}
        self._waiting: dict[AttemptId, Attempt] = {}
        """After a restart: journaled but not started; they start when the platform still wants them."""
        self._over: dict[AttemptId, float] = {}
        """Attempts that are forgotten, and until when a push that is late or comes twice may still bring them."""
        self._revision = -1
        self._link: Link | None = None
        self._tasks = Tasks("agent")
        self._sync_now = Wakeup()
        self._beat_now = Wakeup()
        self._report_now = Wakeup()
        self._report_pace = Pace(REPORT_PAUSE_SECONDS)
        self._dirty: dict[AttemptId, None] = {}
        self._beats_since_inventory = INVENTORY_EVERY_HEARTBEATS
        self._stopping = False
        self._server_clock = ServerClock()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over what an earlier daemon left, before anything is heard from the platform."""
        leases = self._leases.read()
        boot = boot_id()
        for row in self._tools.journal.attempts():
            first_lease = row.lease_until if row.boot == boot else 0.0
            attempt = Attempt(row, self._tools, leases.get(str(row.attempt_id), first_lease))
            self._attempts[row.attempt_id] = attempt
            adoption = await attempt.load()
            if row.ended:
                attempt.resume_log()
                self._dirty[row.attempt_id] = None
            elif adoption is Adoption.NOT_STARTED:
                self._waiting[row.attempt_id] = attempt
            else:
                log.info("attempt_adopted", attempt_id=str(row.attempt_id), found=adoption.value)
                self._tasks.spawn(attempt.run(adoption), f"attempt {row.attempt_id}")
        # Before anything is told: the next daemon must go on above the numbers that this one uses.
        await self._tools.journal.committed()
        self._fence_expired()
        await self._executor.sweep(set(self._attempts))
        self._tools.watch.only({str(a.row.attempt_id) for a in self._attempts.values() if not a.ended})

    def measures_itself(self, benchmarks: Benchmarks) -> None:
        """Before `start`: this machine benchmarks itself while it is idle, and tells what it found last."""
        self._benchmarks = benchmarks
        benchmarks.tell(self._inventory)

    async def start(self, link: Link) -> None:
        self._link = link
        self._tools.watch.on_change.append(self._devices_changed)
        self._tasks.loop(self._fence, "fence")
        self._tasks.loop(self._sync, "sync")
        self._tasks.loop(self._report, "report")
        self._tasks.loop(self._beat, "heartbeat")
        self._tasks.loop(self._measure, "metrics")
        self._tasks.loop(self._keep_hours, "hours")
        self._tasks.loop(self._idle, "idle job")
        self._tasks.loop(self._clean_gpus, "scrub")
        if self._benchmarks is not None:
            self._tasks.loop(self._benchmark, "benchmark")

    async def stop(self) -> None:
        """Idempotent. Unless attempts are to be kept, they end now and the platform is told."""
        if not self._stopping:
            self._stopping = True
            live = [attempt for attempt in self._attempts.values() if not attempt.ended]
            keep = self._settings.keep_attempts_on_stop
            if not keep and live:
                for attempt in live:
                    attempt.stop(STOP_GRACE_SECONDS, "daemon_stopped")
                await self._until_ended(live)
            if not (keep and live):
                # Else the next daemon is back before anybody misses this one.
                await self._last_words()
        await self._tasks.stop()
        self._idle_job.stop()

    async def _until_ended(self, live: list[Attempt]) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                while any(not attempt.ended for attempt in live) or self._dirty:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("attempts_still_running", attempts=sum(not attempt.ended for attempt in live))

    async def _last_words(self) -> None:
        if self._link is None:
            return
        try:
            await self._link.heartbeat(machine_pb2.Heartbeat(
                machine_id=str(self._machine_id), boot_id=self._boot_id, leaving=True
            ))  # fmt: skip
        except ServiceError:
            return

    # --- for operators -----------------------------------------------------------------------------------------------

    def problems(self) -> dict[str, str]:
        """What keeps this machine from taking work at this moment."""
        if self._link is None or not self._link.connected:
            return {"platform": "not connected to NATS; running jobs go on until their leases end"}
        return {}

    def gauges(self) -> dict[str, float]:
        attempts = self._attempts.values()
        return {
            "dante_daemon_attempts_live": sum(not attempt.ended for attempt in attempts),
            "dante_daemon_attempts_unacknowledged": sum(attempt.ended for attempt in attempts),
            "dante_daemon_connected": float(self._link is not None and self._link.connected),
            "dante_daemon_devices": len(self._inventory.devices),
            **self._meter.gauges(),
        }

    # --- the line -----------------------------------------------------------------------------------------------------

    def connection_up(self) -> None:
        self._beats_since_inventory = INVENTORY_EVERY_HEARTBEATS
        self._beat_now.notify()
        self._sync_now.notify()

    async def desired_pushed(self, state: machine_pb2.DesiredState) -> None:
        """A push may bring new attempts, as long as their lease still holds. It renews none."""
        if state.machine_id != str(self._machine_id):
            log.warning("push_refused", machine_id=state.machine_id)
            return
        sent_at = self._server_clock.boot_time_of(state.server_time_us, boottime())
        if sent_at is None:
            self._sync_now.notify()
            return
        await self._apply(state, sent_at=sent_at, renews=False, asked=set(self._attempts))

    @property
    def _up(self) -> Link:
        if self._link is None:
            raise AssertionError("the agent has not started")
        return self._link

    async def _sync(self) -> None:
        unacknowledged = any(attempt.ended for attempt in self._attempts.values())
        interval = self._settings.sync_interval_seconds
        await self._sync_now.wait(min(interval, UNACKNOWLEDGED_SYNC_SECONDS) if unacknowledged else interval)
        if not self._up.connected:
            await asyncio.sleep(MIN_SYNC_PAUSE_SECONDS)
            return
        asked = set(self._attempts)
        request = machine_pb2.SyncRequest(
            machine_id=str(self._machine_id),
            boot_id=self._boot_id,
            attempts=[attempt.status() for attempt in self._attempts.values()],
        )
        sent_at = boottime()
        try:
            state = await self._up.sync(request)
        except ServiceError as error:
            log.info("sync_failed", error=str(error))
            return
        if not state.error:
            self._server_clock.synced(sent_at, state.server_time_us)
        await self._apply(state, sent_at=sent_at, renews=True, asked=asked)
        await asyncio.sleep(MIN_SYNC_PAUSE_SECONDS)

    async def _report(self) -> None:
        await self._report_now.wait(None if not self._dirty else MIN_SYNC_PAUSE_SECONDS)
        for attempt_id in [attempt_id for attempt_id in self._dirty if attempt_id not in self._attempts]:
            del self._dirty[attempt_id]
        changed = list(self._dirty)[:MAX_REPORT_ATTEMPTS]
        statuses = [self._attempts[attempt_id].status() for attempt_id in changed]
        if not statuses:
            return
        if not self._up.connected:
            await asyncio.sleep(FENCE_CHECK_SECONDS)
            return
        self._report_pace.begin()
        try:
            await self._up.report(statuses)
        except ServiceError as error:
            log.info("report_failed", error=str(error))
            # The sync tells the same, by another way.
            self._sync_now.notify()
            await asyncio.sleep(FENCE_CHECK_SECONDS)
            return
        for attempt_id, status in zip(changed, statuses, strict=True):
            attempt = self._attempts.get(attempt_id)
            if attempt is None or attempt.row.status.seq <= status.seq:
                self._dirty.pop(attempt_id, None)
        if self._dirty:
            self._report_now.notify()
        await self._report_pace.rest()

    async def _beat(self) -> None:
        await self._beat_now.wait(self._settings.heartbeat_interval_seconds)
        if not self._up.connected:
            return
        sample = await asyncio.to_thread(self._probe.utilisation)
        heartbeat = machine_pb2.Heartbeat(
            machine_id=str(self._machine_id),
            boot_id=self._boot_id,
            running_attempts=sum(not attempt.ended for attempt in self._attempts.values()),
            cpu_utilisation=sample.cpu,
            memory_used_bytes=sample.memory_used_bytes,
            devices=[use_of(gpu) for gpu in sample.gpus],
        )
        self._meter.look(sample.gpus)
        await self._look_at_devices(sample.gpus)
        self._beats_since_inventory += 1
        if self._beats_since_inventory > INVENTORY_EVERY_HEARTBEATS:
            # Nobody acknowledges a heartbeat, so the inventory comes again now and then.
            heartbeat.inventory.CopyFrom(self._inventory)
            self._beats_since_inventory = 0
        await self._up.heartbeat(heartbeat)

    async def _measure(self) -> None:
        await asyncio.sleep(METRICS_INTERVAL_SECONDS)
        points = await self._meter.measure(list(self._attempts.values()))
        if points and self._up.connected:
            await self._up.metrics(machine_pb2.MetricsReport(points=points))

    async def _benchmark(self) -> None:
        benchmarks = self._benchmarks
        pause_seconds = benchmarks.pause_seconds() if benchmarks is not None else None
        if benchmarks is None or pause_seconds is None:
            await asyncio.Event().wait()  # never; ends with the daemon
            return
        await asyncio.sleep(pause_seconds)
        while any(not attempt.ended for attempt in self._attempts.values()):
            await asyncio.sleep(BUSY_PAUSE_SECONDS)
        if await benchmarks.run():
            await benchmarks.run_network(self._up, self._tools.transfers)
            benchmarks.tell(self._inventory)
            self._tell_inventory()

    async def _keep_hours(self) -> None:
        """Outside of the hours of its owner the machine takes nothing, and hands back what runs."""
        hours = Hours.parse(self._settings.hours)
        open_now = hours is None or hours.open_at(datetime.now().astimezone())
        outside = "" if open_now else f"outside of its hours {hours}"
        closed = outside or self._probe.closed()
        if closed != self._inventory.closed:
            log.info("hours_changed", closed=closed)
            self._inventory.closed = closed
            self._tell_inventory()
        if outside:
            for attempt in self._attempts.values():
                attempt.stop(STOP_GRACE_SECONDS, "hours_over")
        await asyncio.sleep(HOURS_CHECK_SECONDS)

    async def _idle(self) -> None:
        """The owner's own job, for as long as nothing is rented."""
        if not self._settings.idle_command:
            await asyncio.Event().wait()
        await asyncio.sleep(owner.IDLE_BEFORE_SECONDS)
        if not any(not attempt.ended for attempt in self._attempts.values()):
            await self._idle_job.run()

    async def _look_at_devices(self, samples: Sequence[GpuSample]) -> None:
        own: set[int] | None = self._benchmarks.pids if self._benchmarks is not None else set()
        if any(sample.pids for sample in samples):
            own = own | self._idle_job.pids | self._tools.watch.pids
            for attempt in list(self._attempts.values()):
                pids = await attempt.processes() if not attempt.ended else set[int]()
                own = None if own is None or pids is None else own | pids
        self._tools.watch.look(samples, own)

    async def _clean_gpus(self) -> None:
        await self._tools.watch.clean()
        await asyncio.sleep(SCRUB_AGAIN_SECONDS)

    def _devices_changed(self) -> None:
        """A device was taken out or came back: the platform hears it at once."""
        for device in self._inventory.devices:
            device.problem = self._tools.watch.problems.get(device.index, "")
        self._tell_inventory()

    def _tell_inventory(self) -> None:
        self._beats_since_inventory = INVENTORY_EVERY_HEARTBEATS
        self._beat_now.notify()

    # --- desired and actual -------------------------------------------------------------------------------------------

    async def _apply(
        self, state: machine_pb2.DesiredState, *, sent_at: float, renews: bool, asked: set[AttemptId]
    ) -> None:
        if state.left:
            log.warning("machine_left", error=state.error)
            for attempt in self._attempts.values():
                attempt.stop(0.0, "machine_left")
            self.left.set()
            return
        if state.error:
            log.warning("sync_refused", error=state.error)
            return
        self._acknowledged(state.acknowledged)
        if state.partial and state.after_revision > self._revision:
            self._sync_now.notify()  # a push got lost
        if state.revision < self._revision:
            return
        self._revision = state.revision
        wanted: set[AttemptId] = set()
        for desired in state.desired:
            attempt_id = AttemptId.parse(desired.attempt_id)
            wanted.add(attempt_id)
            if attempt_id not in self._attempts and (attempt_id in asked or (not renews and attempt_id in self._over)):
                # Forgotten since this was asked for, or sent: it may not run a second time.
                log.warning("ended_attempt_not_started_again", attempt_id=str(attempt_id))
                continue
            self._want(attempt_id, desired, sent_at, renews)
        for attempt_id, attempt in self._attempts.items() if not state.partial else ():
            # What came after the question was asked cannot be missing in its answer.
            if attempt_id in asked and attempt_id not in wanted and not attempt.ended:
                log.warning("attempt_without_lease", attempt_id=str(attempt_id))
                self._give_up(attempt)
        if renews or self._executor.reads_leases:
            # Else the lease that an attempt came with is in the journal only.
            self._write_leases()

    def _want(self, attempt_id: AttemptId, desired: machine_pb2.DesiredAttempt, sent_at: float, renews: bool) -> None:
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            lease = lease_until(sent_at, desired.lease_ms)
            if lease <= boottime():
                # A push that was under way for so long that its attempt may be somebody else's by now (I6).
                log.warning("late_push_ignored", attempt_id=str(attempt_id))
                self._sync_now.notify()
                return
            attempt = self._accept(attempt_id, desired, lease)
        if attempt is None or attempt.ended:
            return
        attempt.desired = desired
        if renews:
            attempt.lease_until = lease_until(sent_at, desired.lease_ms)
        if desired.stop:
            attempt.stop(desired.stop_grace_ms / 1000, desired.stop_reason)
        if self._waiting.pop(attempt_id, None) is not None:
            self._tasks.spawn(attempt.run(), f"attempt {attempt_id}")

    def _accept(self, attempt_id: AttemptId, desired: machine_pb2.DesiredAttempt, lease: float) -> Attempt | None:
        """Write the intent down; nothing of the attempt happens before."""
        if self._stopping:
            return None
        status = machine_pb2.AttemptStatus(
            attempt_id=desired.attempt_id,
            job_id=desired.job_id,
            epoch=desired.epoch,
            seq=1,
            state=jobs_pb2.STARTING,
            sandbox=sandbox_of(self._tools, desired),
        )
        row = AttemptRow(
            attempt_id, JobId.parse(desired.job_id), desired.epoch, status, log_limit=desired.log_limit_bytes,
            boot=boot_id(), lease_until=lease,
        )  # fmt: skip
        try:
            self._tools.journal.add(row)
            # While the attempt is prepared, its intent is on its way to the disk.
            self._tools.journal.write_soon()
        except JournalError as error:
            log.error("attempt_not_taken", attempt_id=str(attempt_id), error=str(error))
            return None
        self._idle_job.stop()
        if self._benchmarks is not None:
            self._benchmarks.stop()
        attempt = Attempt(row, self._tools, lease)
        self._attempts[attempt_id] = attempt
        self._waiting[attempt_id] = attempt
        if desired.spec.input_sha256 or desired.spec.image:
            # Fetching takes a while, so people see it; else the start itself is the next thing to tell.
            self._changed(attempt)
        return attempt

    def _acknowledged(self, acks: Iterable[machine_pb2.AttemptAck]) -> None:
        forgettable: list[Attempt] = []
        for ack in acks:
            attempt = self._attempts.get(AttemptId.parse(ack.attempt_id))
            if attempt is None or not attempt.ended or ack.seq < attempt.row.status.seq:
                continue
            del self._attempts[attempt.row.attempt_id]
            self._over[attempt.row.attempt_id] = attempt.lease_until + OVER_MARGIN_SECONDS
            self._dirty.pop(attempt.row.attempt_id, None)
            if attempt.forgettable:
                forgettable.append(attempt)
            else:
                self._tasks.spawn(attempt.forget(), f"forget {attempt.row.attempt_id}")
        if forgettable:
            self._tasks.spawn(self._forget(forgettable), "forget")

    async def _forget(self, attempts: Iterable[Attempt]) -> None:
        for attempt in attempts:
            try:
                await attempt.forget()
            except (ExecutorError, OSError, TimeoutError) as error:
                # Its row stays: the next daemon tries again.
                log.warning("attempt_not_removed", attempt_id=str(attempt.row.attempt_id), error=str(error))
            # What is new is more urgent than what is over.
            await asyncio.sleep(0)

    def _give_up(self, attempt: Attempt) -> None:
        attempt.fence()
        if self._waiting.pop(attempt.row.attempt_id, None) is not None:
            # Nothing of it runs; its task only says so.
            self._tasks.spawn(attempt.run(), f"attempt {attempt.row.attempt_id}")

    def _changed(self, attempt: Attempt) -> None:
        if attempt.row.status.state == jobs_pb2.RUNNING:
            asyncio.get_running_loop().call_later(UNTOLD_RUNNING_SECONDS, self._tell, attempt)
        else:
            self._tell(attempt)

    def _tell(self, attempt: Attempt) -> None:
        if attempt.row.attempt_id in self._attempts:
            self._dirty[attempt.row.attempt_id] = None
            self._report_now.notify()

    # --- leases -------------------------------------------------------------------------------------------------------

    async def _fence(self) -> None:
        # The boot clock has no timer in asyncio, and after a suspend its timers come late: look once a second.
        await asyncio.sleep(FENCE_CHECK_SECONDS if self._attempts else self._settings.sync_interval_seconds)
        self._fence_expired()

    def _fence_expired(self) -> None:
        now = boottime()
        self._over = {attempt_id: until for attempt_id, until in self._over.items() if until > now}
        for attempt in list(self._attempts.values()):
            if not attempt.ended and attempt.lease_until < now:
                log.warning("lease_expired", attempt_id=str(attempt.row.attempt_id))
                self._give_up(attempt)
            attempt.check()

    def _write_leases(self) -> None:
        leases = {str(a.row.attempt_id): a.lease_until for a in self._attempts.values() if not a.ended}
        self._leases.write(leases, boottime())
