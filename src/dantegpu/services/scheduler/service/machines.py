"""What machines say (sync, reports, URLs) and what they are told (their desired attempts)."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from dantegpu.contracts import objects, subjects
from dantegpu.contracts.gen.dante.v1 import (
    jobs_pb2,
    machine_pb2,
    registry_pb2,
    registry_pb2_grpc,
    storage_pb2,
    storage_pb2_grpc,
)
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import AttemptId, DeviceId, InvalidId, JobId, MachineId, TeamId
from dantegpu.domain.job import StopReason
from dantegpu.domain.ports import MAX_PORT, MAX_PORTS
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE
from dantegpu.kit.bus import Bus
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import ErrorStatus, ServiceError, status_of
from dantegpu.kit.lifecycle import Pace, Tasks, Wakeup
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler import store, store_preemptions
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.service.transitions import JobBatch, Opened, Wakeups
from dantegpu.services.scheduler.settings import SchedulerSettings
from dantegpu.services.scheduler.store_preemptions import CheckpointRow

log = structlog.get_logger(__name__)

MAX_ATTEMPTS_PER_SYNC = 10_000
MAX_RESULT_FILES = 10_000
MAX_BENCHMARK_BYTES = 32 << 20
MAX_PATH_LENGTH = 1024
PUSH_PAUSE_SECONDS = 0.01
"""Between two pushes of desired attempts, at least."""
FIRST_RENDEZVOUS_PORT = 20_000
RENDEZVOUS_PORTS = 10_000
"""Below the range that kernels give to outgoing connections."""
MAX_CHECKPOINTS = 1_000_000
MAX_GANG_NODES = 64
GANG_NUMBERS = 1 << 18
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?", re.ASCII)
_GOES_ON = frozenset({StopReason.PREEMPTED.value, StopReason.NO_FUNDS.value, StopReason.MACHINE_DRAINED.value})
"""A job that is stopped for one of these comes back to the queue."""
_ENDED = frozenset({jobs_pb2.SUCCEEDED, jobs_pb2.FAILED, jobs_pb2.CANCELLED})


class Machines:
    """Folds what machines report and answers with what they shall run."""

    def __init__(
        self,
        db: Database,
        inventory: Inventory,
        registry: registry_pb2_grpc.RegistryServiceStub,
        storage: storage_pb2_grpc.StorageServiceStub,
        outbox: Outbox,
        wakeups: Wakeups,
        clock: Clock,
        settings: SchedulerSettings,
    ) -> None:
        self._db = db
        self._inventory = inventory
        self._registry = registry
        self._storage = storage
        self._outbox = outbox
        self._wakeups = wakeups
        self._clock = clock
        self._settings = settings

    async def fold(self, reports: Sequence[tuple[MachineId, machine_pb2.AttemptStatus]]) -> None:
        """Apply reports, in order, in one transaction."""
        usable = [(machine, status) for machine, status in reports if self._well_formed(machine, status)]
        if usable:
            async with self._db.transaction() as tx:
                await self._fold(tx, usable, self._clock.now())
            self._wakeups.folded([(machine, status) for machine, status in usable if status.state in _ENDED])

    def _well_formed(self, machine_id: MachineId, status: machine_pb2.AttemptStatus) -> bool:
        try:
            AttemptId.parse(status.attempt_id)
            JobId.parse(status.job_id)
        except InvalidId as error:
            log.warning("report_refused", machine_id=str(machine_id), error=str(error))
            return False
        # Consumers write these paths to their disks: a list that would not have got its URLs is not published either.
        if problem := self._results_problem(status.results):
            log.warning("reported_results_refused", machine_id=str(machine_id), problem=problem)
            del status.results[:]
        if problem := self._checkpoint_problem(status.checkpoint):
            log.warning("reported_checkpoint_refused", machine_id=str(machine_id), problem=problem)
            status.ClearField("checkpoint")
        if problem := ports_problem(status.ports):
            log.warning("reported_ports_refused", machine_id=str(machine_id), problem=problem)
            del status.ports[:]
        return True

    async def _fold(
        self, tx: Tx, reports: Sequence[tuple[MachineId, machine_pb2.AttemptStatus]], now: datetime
    ) -> None:
        batch = await JobBatch.lock_reported(tx, [status for _, status in reports], now)
        for machine_id, status in reports:
            batch.fold(machine_id, status)
        await batch.save(tx, self._outbox, self._wakeups, lease_seconds=self._settings.lease_seconds)

    async def sync(self, machine_id: MachineId, request: machine_pb2.SyncRequest) -> machine_pb2.DesiredState:
        """Fold what the machine has, renew the leases of what lives, answer with what it shall have."""
        if refusal := await self._refusal(machine_id):
            return refusal
        statuses = [s for s in request.attempts[:MAX_ATTEMPTS_PER_SYNC] if self._well_formed(machine_id, s)]
        live = [(AttemptId.parse(s.attempt_id).uuid, s.epoch) for s in statuses if s.state not in _ENDED]
        if statuses:
            await self._fold_news(machine_id, statuses)
        now = self._clock.now()
        async with self._db.transaction() as tx:
            if live:
                await store.renew_leases(
                    tx, machine_id.uuid, live, now=now, lease_seconds=self._settings.lease_seconds,
                    stop_timeout_seconds=self._settings.stop_timeout_seconds,
                )  # fmt: skip
            state = (await self._desired(tx, [machine_id.uuid], now))[machine_id.uuid]
        # Only now, after the commit: what is acknowledged may be forgotten by the machine.
        state.acknowledged.extend(
            machine_pb2.AttemptAck(attempt_id=s.attempt_id, epoch=s.epoch, seq=s.seq) for s in statuses
        )
        return state

    async def _fold_news(self, machine_id: MachineId, statuses: Sequence[machine_pb2.AttemptStatus]) -> None:
        """Most syncs only renew: no job is locked unless there is something new to fold.

        In a transaction of its own: what folds locks attempts and then its machine's row, and a renewal locks attempts.
        One that did both would wait for a report that waits for it.
        """
        async with self._db.transaction() as tx:
            job_ids = [JobId.parse(status.job_id).uuid for status in statuses]
            folded = await store.report_positions(tx, machine_id.uuid, job_ids)
            news = [s for s in statuses if s.seq > folded.get(AttemptId.parse(s.attempt_id).uuid, s.seq)]
            if news:
                await self._fold(tx, [(machine_id, status) for status in news], self._clock.now())

    async def _refusal(self, machine_id: MachineId) -> machine_pb2.DesiredState | None:
        if self._inventory.machine(machine_id) is not None:
            return None
        request = registry_pb2.GetMachinesRequest(machine_ids=[str(machine_id)])
        try:
            answer = await rpc.call(self._registry.GetMachines, request, actor=SERVICE)
        except ServiceError as error:
            if status_of(error) is not ErrorStatus.NOT_FOUND:
                raise
            return machine_pb2.DesiredState(machine_id=str(machine_id), error="unknown machine: enrol it again")
        if answer.machines[0].status == registry_pb2.MACHINE_LEFT:
            return machine_pb2.DesiredState(machine_id=str(machine_id), error="this machine has left", left=True)
        return None

    async def desired(self, machine_ids: Sequence[UUID]) -> dict[UUID, machine_pb2.DesiredState]:
        async with self._db.transaction() as tx:
            return await self._desired(tx, machine_ids, self._clock.now())

    def news(
        self,
        opened: Sequence[Opened],
        revisions: Mapping[UUID, int],
        acks: Mapping[UUID, Sequence[machine_pb2.AttemptAck]],
    ) -> dict[UUID, machine_pb2.DesiredState]:
        """Only these attempts, as they were committed, and what machines may forget."""
        now = self._clock.now()
        machine_ids = {each.row.machine_id for each in opened} | acks.keys()
        states = self._states(sorted(machine_ids), revisions, now)
        for each in opened:
            desired = self._desired_attempt(each.row, each.leases, now)
            if desired.lease_ms > 0:
                states[each.row.machine_id].desired.append(desired)
        for machine_id, state in states.items():
            state.partial = True
            state.acknowledged.extend(acks.get(machine_id, ()))
        return states

    async def _desired(
        self, tx: Tx, machine_ids: Sequence[UUID], now: datetime
    ) -> dict[UUID, machine_pb2.DesiredState]:
        # The revision first: if the set changes between the two reads, the newer set goes out under the older number
        # and is replaced by the push that follows the change.
        revisions = await store.machine_revisions(tx, machine_ids)
        rows = await store.desired_attempts(tx, machine_ids, now)
        leases = await store.leases_of_attempts(tx, [row.id for row in rows]) if rows else {}
        return await self._filled(tx, self._states(machine_ids, revisions, now), rows, leases, now)

    async def _filled(
        self,
        tx: Tx,
        states: dict[UUID, machine_pb2.DesiredState],
        rows: Sequence[store.DesiredRow],
        leases: Mapping[UUID, Sequence[store.LeaseRow]],
        now: datetime,
    ) -> dict[UUID, machine_pb2.DesiredState]:
        again = [row.id for row in rows if row.epoch > 1]
        checkpoints = await store_preemptions.checkpoints_before(tx, again) if again else {}
        for row in rows:
            desired = self._desired_attempt(row, leases.get(row.id, []), now)
            saved = checkpoints.get(row.id)
            if saved is not None and desired.spec.HasField("checkpoint"):
                desired.resume.CopyFrom(
                    machine_pb2.Resume(epoch=saved.epoch, sha256=saved.sha256, size_bytes=saved.size_bytes)
                )
            states[row.machine_id].desired.append(desired)
        return states

    @staticmethod
    def _states(
        machine_ids: Sequence[UUID], revisions: Mapping[UUID, int], now: datetime
    ) -> dict[UUID, machine_pb2.DesiredState]:
        server_time_us = int(now.timestamp() * 1_000_000)
        return {
            machine_id: machine_pb2.DesiredState(
                machine_id=str(MachineId(machine_id)),
                revision=revisions.get(machine_id, 0),
                server_time_us=server_time_us,
            )
            for machine_id in machine_ids
        }

    def _desired_attempt(
        self, row: store.DesiredRow, leases: Iterable[store.LeaseRow], now: datetime
    ) -> machine_pb2.DesiredAttempt:
        spec = jobs_pb2.JobSpec.FromString(row.spec)
        if not spec.max_duration_seconds:
            spec.max_duration_seconds = self._settings.max_duration_seconds
        return machine_pb2.DesiredAttempt(
            attempt_id=str(AttemptId(row.id)),
            job_id=str(JobId(row.job_id)),
            team_id=str(TeamId(row.team_id)),
            epoch=row.epoch,
            spec=spec,
            devices=[
                machine_pb2.DeviceLease(
                    device_id=str(DeviceId(lease.device_id)), index=lease.device_index, milli=lease.milli
                )
                for lease in leases
            ],
            lease_ms=int((row.lease_expires_at - now).total_seconds() * 1000),
            stop=row.stop_reason is not None,
            stop_grace_ms=self._stop_grace_ms(row, spec),
            stop_reason=row.stop_reason or "",
            traceparent=row.traceparent,
            log_limit_bytes=self._settings.log_limit_bytes,
            results_limit_bytes=self._settings.results_limit_bytes,
            node_rank=row.node_rank,
            node_addresses=[self._address(MachineId(machine)) for machine in row.node_machines],
            rendezvous_port=_rendezvous_port(row.first_attempt_id),
            gang_number=_gang_number(row.first_attempt_id) if len(row.node_machines) > 1 and _share(spec) else 0,
        )

    def _stop_grace_ms(self, row: store.DesiredRow, spec: jobs_pb2.JobSpec) -> int:
        """A job that will go on elsewhere has the time that it asked for to save its progress."""
        seconds = self._settings.stop_grace_seconds
        if row.stop_reason in _GOES_ON and spec.HasField("checkpoint"):
            seconds = float(spec.checkpoint.grace_seconds or seconds)
        return int(seconds * 1000)

    def _address(self, machine_id: MachineId) -> str:
        """Where others reach the machine; empty when it has just left."""
        machine = self._inventory.machine(machine_id)
        return machine.inventory.address if machine is not None else ""

    async def urls(self, machine_id: MachineId, request: machine_pb2.UrlsRequest) -> machine_pb2.UrlsReply:
        """Presigned URLs for an attempt that this machine holds at this moment, and for nothing else (I7) but the
        small object by which it measures its network."""
        if request.HasField("benchmark"):
            return await self._benchmark_urls(machine_id, request.benchmark)
        async with self._db.transaction() as tx:
            found = await store.attempts_by_id(tx, [AttemptId.parse(request.attempt_id).uuid])
            attempt = next(iter(found.values()), None)
            if (
                attempt is None
                or attempt.machine_id != machine_id.uuid
                or attempt.epoch != request.epoch
                or attempt.ended_at is not None
                or attempt.lease_expires_at <= self._clock.now()
            ):
                return machine_pb2.UrlsReply(error="stale")
            job = (await store.jobs_by_id(tx, [attempt.job_id]))[attempt.job_id]
            before = await store_preemptions.checkpoints_before(tx, [attempt.id]) if request.resume else {}
            saved = before.get(attempt.id)
        if problem := self._results_problem(request.results):
            return machine_pb2.UrlsReply(error=f"refused: {problem}")
        if request.input and not jobs_pb2.JobSpec.FromString(job.spec).input_sha256:
            return machine_pb2.UrlsReply(error="refused: the job has no input")
        if request.HasField("checkpoint") and (problem := self._checkpoint_problem(request.checkpoint)):
            return machine_pb2.UrlsReply(error=f"refused: {problem}")
        if request.resume or request.HasField("checkpoint"):
            return await self._checkpoint_urls(request, attempt, saved)
        items = [_presign_input(job)] if request.input else []
        prefix = objects.results_prefix(str(JobId(job.id)), attempt.epoch, attempt.node_rank)
        items += [_presign_result(prefix, result) for result in request.results]
        urls = await self._presign(items)
        input_url = urls.pop(0) if request.input else ""
        return machine_pb2.UrlsReply(input_url=input_url, result_urls=urls)

    async def _presign(self, items: Sequence[storage_pb2.Presign]) -> list[str]:
        answer = await rpc.call(self._storage.PresignUrls, storage_pb2.PresignRequest(items=items), actor=SERVICE)
        return list(answer.urls)

    async def _checkpoint_urls(
        self, request: machine_pb2.UrlsRequest, attempt: store.AttemptRow, saved: CheckpointRow | None
    ) -> machine_pb2.UrlsReply:
        reply = machine_pb2.UrlsReply()
        if request.resume and saved is not None:
            key = _checkpoint_key(saved.job_id, saved.epoch, saved.node_rank, saved.slot)
            found = await rpc.call(self._storage.StatObjects, storage_pb2.StatObjectsRequest(keys=[key]), actor=SERVICE)
            # A machine may say that it has saved what it has not; whoever goes on begins anew then.
            if found.sizes_bytes[0] == saved.size_bytes:
                (reply.resume_url,) = await self._presign(
                    [storage_pb2.Presign(method=storage_pb2.Presign.GET, key=key)]
                )
        if request.HasField("checkpoint"):
            reply.checkpoint_slot = 1 - attempt.checkpoint_slot if attempt.checkpoint_number else 0
            key = _checkpoint_key(attempt.job_id, attempt.epoch, attempt.node_rank, reply.checkpoint_slot)
            wanted = request.checkpoint
            put = storage_pb2.Presign(
                method=storage_pb2.Presign.PUT, key=key, size_bytes=wanted.size_bytes, sha256=wanted.sha256
            )
            (reply.checkpoint_url,) = await self._presign([put])
        return reply

    def _checkpoint_problem(self, saved: machine_pb2.Saved) -> str:
        if saved.sha256 and not _SHA256.fullmatch(saved.sha256):
            return "a checkpoint's SHA-256 is 64 hex digits"
        if saved.slot not in (0, 1) or not 0 <= saved.number <= MAX_CHECKPOINTS:
            return f"checkpoint {saved.number} in slot {saved.slot}"
        if not 0 <= saved.size_bytes <= self._settings.results_limit_bytes:
            return f"a checkpoint of {saved.size_bytes} bytes, at most {self._settings.results_limit_bytes} are kept"
        return ""

    async def _benchmark_urls(self, machine_id: MachineId, file: jobs_pb2.ResultFile) -> machine_pb2.UrlsReply:
        if not 0 < file.size_bytes <= MAX_BENCHMARK_BYTES:
            return machine_pb2.UrlsReply(error=f"refused: a measurement has 1 to {MAX_BENCHMARK_BYTES} bytes")
        key = objects.benchmark_key(str(machine_id))
        items = [
            storage_pb2.Presign(method=storage_pb2.Presign.GET, key=key),
            storage_pb2.Presign(
                method=storage_pb2.Presign.PUT, key=key, size_bytes=file.size_bytes, sha256=file.sha256
            ),
        ]
        get, put = await self._presign(items)
        return machine_pb2.UrlsReply(input_url=get, result_urls=[put])

    def _results_problem(self, results: Sequence[jobs_pb2.ResultFile]) -> str:
        if len(results) > MAX_RESULT_FILES:
            return f"{len(results)} result files, at most {MAX_RESULT_FILES} are kept"
        if (total := sum(result.size_bytes for result in results)) > self._settings.results_limit_bytes:
            return f"{total} bytes of results, at most {self._settings.results_limit_bytes} are kept"
        for result in results:
            if not is_safe_path(result.path) or result.size_bytes < 0:
                return f"result path {result.path[:200]!r} is not a plain relative path"
        return ""


def ports_problem(ports: Sequence[jobs_pb2.PublishedPort]) -> str:
    """What is wrong with where a machine says that a job is reached; people open these addresses."""
    if len(ports) > MAX_PORTS:
        return f"{len(ports)} ports, a job publishes at most {MAX_PORTS}"
    for port in ports:
        if not _HOST.fullmatch(port.address):
            return f"{port.address[:100]!r} is neither an address nor a name"
        if not (0 < port.number <= MAX_PORT and 0 < port.machine_port <= MAX_PORT):
            return f"port {port.number} at port {port.machine_port}"
    return ""


def is_safe_path(path: str) -> bool:
    """A relative POSIX path without `..`, empty parts or control characters."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and len(path.encode()) <= MAX_PATH_LENGTH
        and not path.startswith("/")
        and ".." not in parts
        and "/".join(parts) == path
        and path.isprintable()
    )


def _checkpoint_key(job_id: UUID, epoch: int, node_rank: int, slot: int) -> str:
    return f"{objects.checkpoint_prefix(str(JobId(job_id)), epoch, node_rank)}/{slot}"


def _presign_input(job: store.JobRow) -> storage_pb2.Presign:
    spec = jobs_pb2.JobSpec.FromString(job.spec)
    return storage_pb2.Presign(method=storage_pb2.Presign.GET, key=f"blobs/{TeamId(job.team_id)}/{spec.input_sha256}")


def _rendezvous_port(first_attempt_id: UUID) -> int:
    """A port on node 0 that all nodes agree on without asking, and that another job there hardly has."""
    return FIRST_RENDEZVOUS_PORT + first_attempt_id.int % RENDEZVOUS_PORTS


def _share(spec: jobs_pb2.JobSpec) -> bool:
    """Do the job's nodes need a network of their own?"""
    return bool(spec.image) and spec.network


def _gang_number(first_attempt_id: UUID) -> int:
    """Of 24 bits, the last six zero; never 0. Another one for each attempt, so what clashes once does not again."""
    return (1 + first_attempt_id.int % (GANG_NUMBERS - 1)) * MAX_GANG_NODES


def _presign_result(prefix: str, result: jobs_pb2.ResultFile) -> storage_pb2.Presign:
    return storage_pb2.Presign(
        method=storage_pb2.Presign.PUT,
        key=f"{prefix}/{result.path}",
        size_bytes=result.size_bytes,
        sha256=result.sha256,
    )


class Dispatcher:
    """Component: pushes what has changed of a machine's desired attempts. A lost push is repaired by the next sync."""

    def __init__(self, machines: Machines, bus: Bus) -> None:
        self._machines = machines
        self._bus = bus
        self._due: set[UUID] = set()
        """Machines that have to hear everything."""
        self._opened: list[Opened] = []
        self._revisions: dict[UUID, int] = {}
        """Of the machines whose attempts these are."""
        self._acks: defaultdict[UUID, list[machine_pb2.AttemptAck]] = defaultdict(list)
        self._pushed: dict[UUID, int] = {}
        """The last revision that each machine was sent from here."""
        self._wakeup = Wakeup()
        self._pace = Pace(PUSH_PAUSE_SECONDS)
        self._tasks = Tasks("dispatcher")

    def notify(self, machine_ids: set[UUID]) -> None:
        self._due |= machine_ids
        self._wakeup.notify()

    def opened(self, attempts: Sequence[Opened], revisions: Mapping[UUID, int]) -> None:
        """These attempts are new on their machines."""
        self._opened.extend(attempts)
        for machine_id, revision in revisions.items():
            self._revisions[machine_id] = max(revision, self._revisions.get(machine_id, 0))
        self._wakeup.notify()

    def folded(self, reports: Sequence[tuple[MachineId, machine_pb2.AttemptStatus]]) -> None:
        """The ends that these tell of are committed."""
        for machine_id, s in reports:
            ack = machine_pb2.AttemptAck(attempt_id=s.attempt_id, epoch=s.epoch, seq=s.seq)
            self._acks[machine_id.uuid].append(ack)
        if reports:
            self._wakeup.notify()

    async def start(self) -> None:
        self._tasks.loop(self._push, "push")

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _push(self) -> None:
        """The first change goes at once; what changes until the pause is over goes together."""
        await self._wakeup.wait()
        self._pace.begin()
        due, self._due = self._due, set()
        opened, self._opened = self._opened, []
        revisions, self._revisions = self._revisions, {}
        acks, self._acks = self._acks, defaultdict(list)
        try:
            if due:
                await self._publish(await self._machines.desired(sorted(due)))
            news = [each for each in opened if each.row.machine_id not in due]
            if news or acks:
                await self._publish(self._machines.news(news, self._newest(revisions, acks), acks))
        except ServiceError:
            # All of it once more: what was pushed already is known there as old.
            self.notify(due | {each.row.machine_id for each in opened})
            raise
        await self._pace.rest()

    def _newest(self, revisions: Mapping[UUID, int], acks: Iterable[UUID]) -> dict[UUID, int]:
        """A push never goes out under an older revision than the last one: commits may be told out of order."""
        machine_ids = {*revisions, *acks}
        return {each: max(revisions.get(each, 0), self._pushed.get(each, 0)) for each in machine_ids}

    async def _publish(self, states: Mapping[UUID, machine_pb2.DesiredState]) -> None:
        for machine_id, state in states.items():
            state.after_revision = self._pushed.get(machine_id, 0)
            self._pushed[machine_id] = state.revision
            await self._bus.publish(subjects.machine_desired(MachineId(machine_id)), state)


def decode_reports(messages: Sequence[Msg]) -> list[tuple[MachineId, machine_pb2.AttemptStatus]]:
    """Statuses in order of arrival, each with the machine that NATS says sent it.

    What cannot be read is left out: a machine that sends rubbish must not hold up the reports of the others.
    """
    found: list[tuple[MachineId, machine_pb2.AttemptStatus]] = []
    for message in messages:
        try:
            machine_id = subjects.machine_of(message.subject)
            report = machine_pb2.Report.FromString(message.data)
        except (InvalidId, DecodeError) as error:
            log.warning("report_refused", subject=message.subject, error=str(error))
            continue
        found.extend((machine_id, status) for status in report.attempts)
    return found
