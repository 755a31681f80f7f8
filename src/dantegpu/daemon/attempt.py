"""One attempt on this machine, from the intent to the moment when nothing of it is left."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from dantegpu.contracts.gen.dante.v1 import jobs_pb2, machine_pb2
from dantegpu.daemon.archive import ArchiveRefused, unpack
from dantegpu.daemon.checkpoints import CheckpointFailed, Checkpoints
from dantegpu.daemon.devices import DeviceWatch
from dantegpu.daemon.disk import FIRST_LOOK_SECONDS, DiskWatch
from dantegpu.daemon.endings import Ended, judge, notice_of, saves, stopped
from dantegpu.daemon.environment import gang_of, job_environment
from dantegpu.daemon.executors.base import (
    Adoption,
    AlreadyStarted,
    AttemptRefused,
    AttemptSpec,
    DeviceGrant,
    Executor,
    ExecutorError,
    ExitStatus,
    Handle,
    ImageRequest,
    JobAtFault,
    NoRoom,
    Stats,
    StopReason,
)
from dantegpu.daemon.journal import AttemptRow, Journal, JournalError
from dantegpu.daemon.logs import LogShipper, Tail
from dantegpu.daemon.results import Platform, ask_urls, upload
from dantegpu.daemon.transfer import HashedFile, TransferFailed, Transfers
from dantegpu.daemon.workspace import AttemptFolder, Workspace
from dantegpu.domain.images import ImageReference, InvalidImage
from dantegpu.domain.ports import Port
from dantegpu.kit.lifecycle import Wakeup
from dantegpu.kit.telemetry import span

log = structlog.get_logger(__name__)

MAX_INPUT_UNPACKED_BYTES = 64 << 30
DEFAULT_RESULTS_BYTES = 10 << 30
LOG_COMPLETE_SECONDS = 10.0
"""How long the end of an attempt waits for the last of its log to be stored."""
LOG_GIVE_UP_SECONDS = 600.0
DISK_FACTOR = 4
"""A log this many times over its limit ends the attempt: the limit cuts what is sent, this protects the disk."""
WATCH_SECONDS = 1.0
STARTING_MAX = 16
"""So many start at once: of many that come together, the first lend their cells to the last."""
ADOPTED_SEQ_STEP = 1000
"""Not every change is in the journal: after a restart, reports are numbered above all that may have been told."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all attempts of the daemon share."""

    journal: Journal
    workspace: Workspace
    executor: Executor
    shipper: LogShipper
    transfers: Transfers
    platform: Platform
    sandbox: str
    """What jobs without an image run in: bubblewrap | none."""
    engine: str
    """What jobs with an image run in: docker | podman; empty: no such job may come here."""
    address: str
    """Where others reach this machine."""
    devices: "Sequence[DeviceGrant]"
    watch: DeviceWatch
    changed: "Callable[[Attempt], None]"
    """Called after each change of `row.status`."""
    starting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STARTING_MAX))


class Attempt:
    """The task `run` drives it; `desire`, `stop` and `fence` are called from outside at any moment."""

    def __init__(self, row: AttemptRow, tools: Tools, lease_until: float) -> None:
        self.row = row
        self.lease_until = lease_until
        """On the boot clock: when it must be dead, unless the lease is renewed."""
        self.desired: machine_pb2.DesiredAttempt | None = None
        self._tools = tools
        self._folder: AttemptFolder = tools.workspace.attempt(row.attempt_id)
        self._handle: Handle | None = None
        self._stop: tuple[float, str] | None = None
        self._fenced = False
        self._stopping = Wakeup()
        self._ending: asyncio.Task[None] | None = None
        """Ends the running attempt; `_reason` is why."""
        self._reason: Ended | None = None
        self._watching = False
        self._started_at: float | None = None
        self._tail = Tail(row.attempt_id, self._folder.log, row.log_limit, row.log_acked)
        self._checkpoints = Checkpoints(self._folder, tools.transfers, self._urls)
        self._disk = DiskWatch(
            (self._folder.work, self._folder.output),
            lambda: self.desired.spec.resources.disk_bytes if self.desired is not None else 0,
            self._folder.log,
            DISK_FACTOR * row.log_limit,
            self.check,
        )

    @property
    def ended(self) -> bool:
        return self.row.ended

    @property
    def running(self) -> bool:
        return not self.row.ended and self.row.status.state in (jobs_pb2.RUNNING, jobs_pb2.STOPPING)

    @property
    def devices(self) -> list[int]:
        """Indexes of the devices leased to it; unknown, so none, until a restarted daemon has heard of them again."""
        return [lease.index for lease in self.desired.devices] if self.desired is not None else []

    @property
    def ran_seconds(self) -> float:
        """Since its start; 0 before."""
        return self._ran_seconds()

    async def stats(self) -> Stats | None:
        """What it uses right now; None when nothing of it runs."""
        return await self._tools.executor.stats(self._handle) if self._handle is not None and self.running else None

    async def processes(self) -> set[int] | None:
        """Pids of what runs of it; None where its executor cannot tell."""
        return await self._tools.executor.processes(self._handle) if self._handle is not None else set()

    def status(self) -> machine_pb2.AttemptStatus:
        """What the platform is told now."""
        status = machine_pb2.AttemptStatus()
        status.CopyFrom(self.row.status)
        if self._handle is not None:
            status.log_bytes = max(self._tail.size, self._tail.acked)
        return status

    def stop(self, grace_seconds: float, reason: str) -> None:
        """The platform, or the daemon's owner, wants it to end."""
        if self._stop is None:
            self._stop = (grace_seconds, reason)
            self._stopping.notify()
            self.check()

    def fence(self) -> None:
        """Its lease is over: kill it now; somebody else may already be running the job."""
        if not self._fenced:
            self._fenced = True
            self._stopping.notify()
            self.check()

    def check(self) -> None:
        """End it if there is a reason to. Asked about once a second, for what no event tells: time and disk."""
        if self._ending is None and self._watching and (reason := self._reason_to_stop()) is not None:
            self._reason = reason
            self._ending = asyncio.create_task(self._end(reason))

    # --- the way through ----------------------------------------------------------------------------------------------

    async def load(self) -> Adoption:
        """After a restart of the daemon: what is there of it."""
        if self.row.handle is not None:
            self._handle = Handle.loads(self.row.handle)
        elif (known := self._folder.read_handle()) is not None:
            self._handle = Handle.loads(known)
        if self._handle is None:
            return Adoption.NOT_STARTED
        if not self.row.ended:
            self.row.status.seq += ADOPTED_SEQ_STEP
            self._tools.journal.save(self.row)
        return await self._tools.executor.adopt(self._handle)

    async def run(self, adoption: Adoption = Adoption.NOT_STARTED) -> None:
        """Bring it to its end, tell it, and return when the platform has its log. Never raises for a job's fault."""
        traceparent = self.desired.traceparent if self.desired is not None else ""
        with span("attempt", traceparent, attempt_id=str(self.row.attempt_id), job_id=str(self.row.job_id)):
            try:
                if adoption is Adoption.NOT_STARTED:
                    await self._start()
                ending, exit_status = await self._watch()
            except Ended as error:
                ending, exit_status = error, None
            except JobAtFault as error:
                ending, exit_status = Ended(jobs_pb2.OUTCOME_FAILED, str(error)), None
            except NoRoom as error:
                ending, exit_status = Ended(jobs_pb2.OUTCOME_PREEMPTED, str(error)), None
            except (ExecutorError, JournalError, OSError, TimeoutError) as error:
                log.exception("attempt_failed_here", attempt_id=str(self.row.attempt_id))
                ending, exit_status = Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, f"the machine failed: {error}"), None
            await self._finish(ending, exit_status)

    async def _start(self) -> None:
        desired = self.desired
        if desired is None:
            raise Ended(jobs_pb2.OUTCOME_LOST, "the daemon was restarted before the attempt had started")
        spec = self._spec(desired)
        if refusal := self._tools.watch.refusal(desired.devices, desired.team_id):
            raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, refusal)
        self._tools.watch.held(desired.attempt_id, desired.team_id, self.devices)
        takes_long = spec.image is not None or desired.spec.input_sha256 or self._tools.executor.queues
        async with nullcontext() if takes_long else self._tools.starting:
            with span("attempt.prepare"):
                await self._prepare(desired, spec)
            self._tools.shipper.add(self._tail)
            # The intent is on its way to the disk since the attempt was accepted; nothing runs before it is there.
            await self._tools.journal.committed()
            self._raise_if_stopped()
            if self._folder.resumed.exists():
                spec = replace(spec, env={**spec.env, "DANTE_RESUMED_FROM": self._folder.resumed.read_text()})
            with span("attempt.start"):
                try:
                    await self._start_executor(spec)
                except AlreadyStarted:
                    await self._tools.executor.adopt(self._started)
        self._started_at = time.monotonic()

    async def _start_executor(self, spec: AttemptSpec) -> None:
        executor = self._tools.executor
        if not executor.queues:
            return await executor.start(self._started, spec)
        try:
            await self._or_stopped(executor.start(self._started, spec))
        except Ended:
            # It may have got its turn in this very moment.
            await executor.stop(self._started, grace_seconds=0, reason=StopReason.REQUESTED)
            raise

    def _spec(self, desired: machine_pb2.DesiredAttempt) -> AttemptSpec:
        job = desired.spec
        command = tuple(job.argv) or ("/bin/sh", "-e", "-c", "\n".join(job.commands))
        by_index = {device.index: device for device in self._tools.devices}
        if missing := [lease.index for lease in desired.devices if lease.index not in by_index]:
            raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, f"this machine has no device {missing[0]}")
        if job.image and not self._tools.engine:
            raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, "this machine runs no container images")
        if job.image and not (job.argv or job.commands):
            command = ()
        try:
            return AttemptSpec(
                self.row.attempt_id,
                command,
                job_environment(desired),
                cpu_milli=job.resources.cpu_milli,
                memory_bytes=job.resources.memory_bytes,
                network=job.network,
                devices=tuple(by_index[lease.index] for lease in desired.devices),
                image=image_request(job),
                entrypoint=tuple(job.entrypoint),
                working_dir=job.working_dir,
                shm_bytes=job.resources.shm_bytes,
                checkpoint=job.checkpoint.path,
                max_seconds=job.max_duration_seconds,
                ports=tuple(Port(port.number, port.wished) for port in job.ports),
                gang=gang_of(desired),
            )
        except (AttemptRefused, InvalidImage) as error:
            raise Ended(jobs_pb2.OUTCOME_FAILED, str(error)) from error

    async def _prepare(self, desired: machine_pb2.DesiredAttempt, spec: AttemptSpec) -> None:
        await self._make_folder(desired)
        preparing = self._prepare_executor(spec)
        # A pull may take long; anything else is over before somebody could stop it.
        await (self._or_stopped(preparing) if spec.image is not None else preparing)

    async def _prepare_executor(self, spec: AttemptSpec) -> None:
        self._handle = await self._tools.executor.prepare(spec, self._tell)

    async def _make_folder(self, desired: machine_pb2.DesiredAttempt) -> None:
        """The work folder with the job's input in it. Done again after a crash, from the start."""
        if not self._folder.create():
            # An earlier daemon left it: prepared already, or half of an input that is fetched again.
            if self._folder.read_handle() is not None:
                return
            await asyncio.to_thread(self._folder.remove)
            self._folder.create()
        if desired.spec.input_sha256:
            await self._or_stopped(self._fetch(desired))
        if desired.HasField("resume"):
            await self._or_stopped(self._restore(desired))

    async def _restore(self, desired: machine_pb2.DesiredAttempt) -> None:
        try:
            await self._checkpoints.restore(desired.resume, desired.spec.checkpoint.path, MAX_INPUT_UNPACKED_BYTES)
        except TransferFailed as error:
            raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, str(error)) from error
        except ArchiveRefused as error:
            raise Ended(jobs_pb2.OUTCOME_FAILED, f"the job's checkpoint cannot be unpacked: {error}") from error

    async def _fetch(self, desired: machine_pb2.DesiredAttempt) -> None:
        archive = self._folder.root / "input.tar.gz"
        reply = await self._urls(machine_pb2.UrlsRequest(input=True))
        try:
            await self._tools.transfers.fetch(
                reply.input_url,
                archive,
                sha256=desired.spec.input_sha256,
                size_bytes=desired.spec.input_size_bytes,
            )
            await asyncio.to_thread(unpack, archive, self._folder.work, max_bytes=MAX_INPUT_UNPACKED_BYTES)
        except TransferFailed as error:
            raise Ended(jobs_pb2.OUTCOME_PROVIDER_FAULT, str(error)) from error
        except ArchiveRefused as error:
            raise Ended(jobs_pb2.OUTCOME_FAILED, f"the job's input cannot be unpacked: {error}") from error
        archive.unlink()

    async def _watch(self) -> tuple[Ended | None, ExitStatus]:
        """Until it has ended, by itself or because it was stopped."""
        handle = self._started
        self._tools.shipper.add(self._tail)
        self.row.handle = handle.dumps()
        if self.row.status.state != jobs_pb2.RUNNING:
            self.row.status.message = ""
            del self.row.status.ports[:]
            self.row.status.ports.extend(published(self._tools, handle))
            # Not written down: after a crash, its folder says the same.
            self._change(jobs_pb2.RUNNING, save=False)
        self._watching = True
        beside: list[asyncio.Task[None]] = []
        # Most jobs that end within a second cost no task for this.
        watching = asyncio.get_running_loop().call_later(
            FIRST_LOOK_SECONDS, lambda: beside.append(asyncio.create_task(self._disk.run()))
        )
        if self.desired is not None and self.desired.spec.checkpoint.interval_seconds:
            beside.append(asyncio.create_task(self._save_now_and_then()))
        try:
            self.check()
            status = await self._tools.executor.wait(handle)
        except BaseException:
            if self._ending is not None:
                self._ending.cancel()
            raise
        finally:
            watching.cancel()
            for task in beside:
                task.cancel()
            self._watching = False
        if self._ending is not None:
            await self._ending
        if status.stop_reason is StopReason.LEASE_LOST and self._reason is None:
            # By its node, or by a daemon that died before it could say so.
            self._fenced = True
            self._reason = self._reason_to_stop()
        # It may have ended by itself in the very moment in which it was stopped: then its own end counts.
        return (self._reason if status.stop_reason is not None or status.lost else None), status

    def _reason_to_stop(self) -> Ended | None:
        if self._fenced:
            return Ended(jobs_pb2.OUTCOME_LOST, "the lease could not be renewed in time, so the machine ended it")
        if self._stop is not None:
            return self._stopped()
        limit = self.desired.spec.max_duration_seconds if self.desired is not None else 0
        if limit and self._ran_seconds() > limit:
            return Ended(jobs_pb2.OUTCOME_TIMED_OUT, f"ended after its maximum duration of {limit} s")
        return Ended(jobs_pb2.OUTCOME_FAILED, self._disk.full) if self._disk.full else None

    async def _end(self, reason: Ended) -> None:
        if reason.outcome == jobs_pb2.OUTCOME_LOST:
            grace_seconds, why = 0.0, StopReason.LEASE_LOST
        else:
            self._change(jobs_pb2.STOPPING)
            grace_seconds = self.desired.stop_grace_ms / 1000 if self.desired is not None else 0.0
            why = StopReason.TIMED_OUT if reason.outcome == jobs_pb2.OUTCOME_TIMED_OUT else StopReason.REQUESTED
            if self._stop is not None:
                grace_seconds = self._stop[0]
            if self._disk.full:
                # It would go on filling it all the while.
                grace_seconds, why = 0.0, StopReason.DISK_LIMIT
        notice = notice_of(self.desired.spec) if self._saves and self.desired is not None else None
        stopping = asyncio.create_task(
            self._tools.executor.stop(self._started, grace_seconds=grace_seconds, reason=why, notice=notice)
        )
        try:
            # A lease that runs out during the grace ends the grace.
            while not stopping.done():
                await asyncio.wait({stopping}, timeout=WATCH_SECONDS)
                if self._fenced and not stopping.done():
                    await self._tools.executor.stop(self._started, grace_seconds=0, reason=why)
        finally:
            await stopping

    async def _finish(self, ending: Ended | None, exit_status: ExitStatus | None) -> None:
        """Results and log first, then the report that makes them count."""
        if self._tail.sent or self.row.epoch > 1 or self._tail.size:
            self._tools.shipper.ended(self._tail)
        else:
            # The report of its end says so: that costs nobody anything. Of a later attempt the log itself has to say
            # it, or the one before it would still be shown as the latest.
            self._tail.silent()
        results: list[HashedFile] = []
        ran_ms = int(self._ran_seconds() * 1000) if exit_status is not None else 0
        if exit_status is not None and not self._fenced and not exit_status.lost:
            if self._saves and ending is not None and (problem := await self._save()):
                ending = Ended(ending.outcome, f"{ending.message}; its checkpoint was not kept: {problem}")
            try:
                with span("attempt.upload"):
                    output, limit = self._folder.output, self._max_kept_bytes
                    results = await upload(output, limit, self._urls, self._tools.transfers)
            except Ended as error:
                ending = ending or error
        if not self._fenced and self._handle is not None and not self._tail.complete.is_set() and self._tail.size:
            await _within(self._tail.complete.wait(), LOG_COMPLETE_SECONDS)
        await self._tools.watch.released(str(self.row.attempt_id))
        self._report_end(ending, exit_status, results, ran_ms)

    @property
    def _saves(self) -> bool:
        return self._stop is not None and self.desired is not None and saves(self.desired.spec, self._stop[1])

    async def _save(self) -> str:
        """Upload its checkpoint, to be told with the next report. Returns what went wrong."""
        if self.desired is None:
            return "the daemon has just been restarted"
        status, limit = self.row.status, self._max_kept_bytes
        try:
            with span("attempt.checkpoint"):
                saved = await self._checkpoints.save(self.desired.spec.checkpoint.path, status.checkpoint.number, limit)
        except (CheckpointFailed, TransferFailed, OSError, Ended) as error:
            log.warning("checkpoint_not_kept", attempt_id=str(self.row.attempt_id), error=str(error))
            return str(error)
        status.checkpoint.CopyFrom(saved)
        return ""

    async def _save_now_and_then(self) -> None:
        seconds = self.desired.spec.checkpoint.interval_seconds if self.desired is not None else 0
        while seconds:
            await asyncio.sleep(seconds)
            if not await self._save() and self._ending is None:
                self._change(self.row.status.state)

    def _report_end(
        self, ending: Ended | None, exit_status: ExitStatus | None, results: list[HashedFile], ran_ms: int
    ) -> None:
        outcome, message = judge(ending, exit_status, self.desired)
        status = self.row.status
        status.outcome = outcome
        status.message = message
        status.ran_ms = ran_ms
        if exit_status is not None and exit_status.exit_code is not None:
            status.exit_code = exit_status.exit_code
        status.results.extend(result.to_proto() for result in results)
        state = jobs_pb2.FAILED
        if outcome == jobs_pb2.OUTCOME_SUCCEEDED:
            state = jobs_pb2.SUCCEEDED
        elif outcome == jobs_pb2.OUTCOME_CANCELLED:
            state = jobs_pb2.CANCELLED
        self.row.ended = True
        self.row.log_acked = self._tail.acked
        self._change(state)

    @property
    def forgettable(self) -> bool:
        """Whether `forget` has nothing to wait for."""
        return self._handle is None or self._fenced or self._tail.complete.is_set()

    async def forget(self) -> None:
        """The platform has acknowledged the end: remove everything, once its log is stored too."""
        if not self.forgettable:
            await _within(self._tail.complete.wait(), LOG_GIVE_UP_SECONDS)
        self._tools.shipper.remove(self.row.attempt_id)
        if self._handle is None and (prepared := self._folder.read_handle()) is not None:
            # It was stopped in the middle of its preparation.
            self._handle = Handle.loads(prepared)
        if self._handle is not None:
            await self._tools.executor.destroy(self._handle)
        else:
            await self._folder.removed()
        self._tools.journal.remove(self.row.attempt_id)

    def resume_log(self) -> None:
        """After a restart: an ended attempt whose log may not be stored completely."""
        if self._folder.log.exists():
            self._tools.shipper.add(self._tail)
            self._tools.shipper.ended(self._tail)
        else:
            self._tail.complete.set()

    # --- small things -------------------------------------------------------------------------------------------------

    @property
    def _started(self) -> Handle:
        if self._handle is None:
            raise AssertionError("the attempt was not prepared")
        return self._handle

    def _ran_seconds(self) -> float:
        if self._started_at is None:
            try:
                began = self._folder.started.stat().st_mtime
            except FileNotFoundError:
                return 0.0
            self._started_at = time.monotonic() - max(0.0, time.time() - began)
        return time.monotonic() - self._started_at

    def _change(self, state: "jobs_pb2.JobState.ValueType", *, save: bool = True) -> None:
        self.row.status.state = state
        self.row.status.seq += 1
        if self.desired is not None:
            self.row.status.sandbox = sandbox_of(self._tools, self.desired)
        if save:
            self._tools.journal.save(self.row)
        log.debug(
            "attempt_changed",
            attempt_id=str(self.row.attempt_id),
            job_id=str(self.row.job_id),
            state=jobs_pb2.JobState.Name(state),
            message=self.row.status.message,
        )
        self._tools.changed(self)

    def _tell(self, what: str) -> None:
        """Say what takes so long, while nothing runs yet."""
        self.row.status.message = what
        self._change(jobs_pb2.STARTING)

    def _stopped(self) -> Ended:
        return stopped(self._stop[1] if self._stop is not None else "")

    def _raise_if_stopped(self) -> None:
        if self._fenced:
            raise Ended(jobs_pb2.OUTCOME_LOST, "the lease ran out before the start")
        if self._stop is not None:
            raise self._stopped()

    async def _or_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` unless the attempt is stopped or fenced meanwhile."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                self._raise_if_stopped()
                stopping = asyncio.create_task(self._stopping.wait(WATCH_SECONDS))
                await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
            await task
        finally:
            task.cancel()

    async def _urls(self, request: machine_pb2.UrlsRequest) -> machine_pb2.UrlsReply:
        request.attempt_id = str(self.row.attempt_id)
        request.epoch = self.row.epoch
        return await ask_urls(self._tools.platform, request)

    @property
    def _max_kept_bytes(self) -> int:
        return (self.desired.results_limit_bytes if self.desired is not None else 0) or DEFAULT_RESULTS_BYTES


def sandbox_of(tools: Tools, desired: machine_pb2.DesiredAttempt) -> str:
    """What this attempt runs in on this machine."""
    return tools.engine if desired.spec.image else tools.sandbox


def published(tools: Tools, handle: Handle) -> list[jobs_pb2.PublishedPort]:
    """Where the ports of an attempt on this machine are reached."""
    return [
        jobs_pb2.PublishedPort(number=it.number, address=it.address or tools.address, machine_port=it.machine_port)
        for it in tools.executor.published(handle)
    ]


def image_request(job: jobs_pb2.JobSpec) -> ImageRequest | None:
    """Raises InvalidImage."""
    if not job.image:
        return None
    auth = job.registry_auth
    return ImageRequest(ImageReference.parse(job.image), auth.username, auth.password)


async def _within(work: Awaitable[object], seconds: float) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return
