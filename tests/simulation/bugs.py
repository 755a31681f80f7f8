"""Bugs to plant, one at a time: each takes away one of the things that keep I1 to I6. The simulation must find all.

Most replace a function of production code. Where the guard is SQL (the expiry in renew_leases, a constraint), its
counterpart in memory is what is taken away; tests/conformance shows that the two are the same.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from nats.aio.msg import Msg

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon import agent
from dantegpu.daemon.attempt import Attempt
from dantegpu.daemon.executors.base import Adoption
from dantegpu.domain.ids import MachineId
from dantegpu.domain.job import reports
from dantegpu.domain.job.transitions import transition
from dantegpu.kit import bus
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lease import Leadership
from dantegpu.services.billing import service as billing
from dantegpu.services.scheduler.service import preemption, transitions
from dantegpu.services.scheduler.service.machines import Machines
from dantegpu.services.scheduler.store_preemptions import SpotRow
from tests.simulation.hardware import SimExecutor
from tests.simulation.memory import billing as billing_memory
from tests.simulation.memory import scheduler as scheduler_memory
from tests.simulation.memory.engine import MemoryTx, Row

type Put = Callable[[object, str, Any], None]


def leader_without_epoch_check(put: Put) -> None:
    """A leader that was replaced goes on committing its plans."""

    async def held(self: Leadership, tx: Any) -> None:
        return

    put(Leadership, "assert_held", held)


def report_without_epoch_check(put: Put) -> None:
    """A report counts for whatever attempt of the job is live, on whichever machine."""

    def fold_report(job: Any, report: reports.AttemptReport, now: Any) -> Any:
        if not job.state.live or report.seq <= job.report_seq:
            return reports.Stale("")
        after, effects = transition(job, report.event, now)
        return reports.Folded(replace(after, report_seq=report.seq), effects)

    put(transitions.lifecycle, "fold_report", fold_report)


def answer_before_commit(put: Put) -> None:
    """A machine is told that its reports are committed before they are; then the transaction fails."""
    really = Machines.sync

    async def sync(self: Machines, machine_id: MachineId, request: machine_pb2.SyncRequest) -> Any:
        try:
            return await really(self, machine_id, request)
        except ServiceError:
            acks = [machine_pb2.AttemptAck(attempt_id=it.attempt_id, seq=it.seq) for it in request.attempts]
            return machine_pb2.DesiredState(machine_id=str(machine_id), revision=0, acknowledged=acks)

    put(Machines, "sync", sync)


def ack_before_commit(put: Put) -> None:
    """Streams are acknowledged as messages come in, and machines when they sync: both before anything is committed."""

    async def drain(self: Any) -> None:
        batch: list[Msg] = [await self._queue.get()]
        for message in batch:
            await message.ack()
        await self._handler(batch)

    put(bus, "_Consumer", type("Hasty", (vars(bus)["_Consumer"],), {"drain": drain}))
    answer_before_commit(put)


def lease_renewed_after_expiry(put: Put) -> None:
    """A renewal that arrives late brings a lease back to life."""

    def may_renew(row: Row, params: Mapping[str, Any]) -> bool:
        return row["machine_id"] == params["machine_id"] and row["ended_at"] is None

    put(scheduler_memory, "may_renew", may_renew)


def hold_closed_twice(put: Put) -> None:
    """Closing a hold that is closed posts it again, and nothing in the schema minds."""
    really = billing.store.find_holds

    async def find_holds(tx: Any, ids: Any) -> Any:
        found = await really(tx, ids)
        return {key: replace(window, hold=replace(window.hold, charged_udgpu=None)) for key, window in found.items()}

    def resolve(tx: MemoryTx, row: Row, **changes: Any) -> None:
        tx.update("holds", row, **changes)

    put(billing.store, "find_holds", find_holds)
    put(billing_memory, "resolve_hold", resolve)
    put(billing_memory, "may_resolve", _whatever)


def device_freed_before_the_process_died(put: Put) -> None:
    """A machine reports the end as soon as it has asked the process to end."""
    really = Attempt._end  # pyright: ignore[reportPrivateUsage]

    async def end(self: Any, reason: Any) -> None:
        self._report_end(reason, None, [], 0)
        await really(self, reason)

    put(Attempt, "_end", end)


def device_freed_when_the_stop_was_asked_for(put: Put) -> None:
    """The scheduler gives devices back when it asks for the stop, not when the machine says that it has ended."""
    really = transitions.JobBatch.save

    async def save(self: Any, tx: Any, outbox: Any, wakeups: Any, **options: Any) -> None:
        await really(self, tx, outbox, wakeups, **options)
        stopping = [it for it, record in self._attempts.items() if record.get("stop_requested_at")]
        if stopping:
            await transitions.store.release_devices(tx, stopping)

    put(transitions.JobBatch, "save", save)


def killed_too_late(put: Put) -> None:
    """The daemon ends what has lost its lease a whole lease later."""

    def lease_until(sent_at: float, lease_ms: int) -> float:
        return sent_at + 2 * lease_ms / 1000

    put(agent, "lease_until", lease_until)


def started_again_after_a_restart(put: Put) -> None:
    """A restarted daemon does not look whether an attempt was started already."""

    async def adopt(self: Any, handle: Any) -> Adoption:
        self._workspace.attempt(handle.attempt_id).started.unlink(missing_ok=True)
        return Adoption.NOT_STARTED

    put(SimExecutor, "adopt", adopt)


def gang_half_placed(put: Put) -> None:
    """Of a gang's nodes the last one is left out, and nothing in the schema minds."""
    really = transitions.store.insert_attempts

    async def insert_attempts(tx: Any, rows: Sequence[Mapping[str, Any]], **options: Any) -> None:
        kept = [row for row in rows if row["nodes"] == 1 or row["node_rank"] < row["nodes"] - 1]
        await really(tx, kept, **options)

    async def lease_devices(tx: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        known = await transitions.store.attempts_by_id(tx, [row["attempt_id"] for row in rows])
        await leasing(tx, [row for row in rows if row["attempt_id"] in known])

    leasing = transitions.store.lease_devices
    put(transitions.store, "insert_attempts", insert_attempts)
    put(transitions.store, "lease_devices", lease_devices)
    put(scheduler_memory, "gang_is_whole", _whatever)


def on_demand_work_is_preempted(put: Put) -> None:
    """Everything that runs is taken for spot work."""

    async def spot_attempts(tx: MemoryTx, limit: int) -> Any:
        rows = [row for row in tx.scan("attempts") if row["ended_at"] is None and row["stop_requested_at"] is None]
        return [
            SpotRow(
                row["id"], row["job_id"], row["team_id"], row["epoch"], 0, False, row["created_at"], row["created_at"]
            )
            for row in sorted(rows, key=lambda row: (row["job_id"], row["node_rank"]))
        ]

    put(preemption.store_preemptions, "spot_attempts", spot_attempts)


def _whatever(*arguments: Any) -> bool:
    return True


BUGS: Sequence[Callable[[Put], None]] = (
    leader_without_epoch_check,
    report_without_epoch_check,
    ack_before_commit,
    lease_renewed_after_expiry,
    hold_closed_twice,
    device_freed_before_the_process_died,
    device_freed_when_the_stop_was_asked_for,
    killed_too_late,
    started_again_after_a_restart,
    gang_half_placed,
    on_demand_work_is_preempted,
)


@contextmanager
def planted(bug: Callable[[Put], None]) -> Generator[None]:
    """Production code has the bug while this is open."""
    undo: list[tuple[object, str, Any]] = []

    def put(owner: object, name: str, value: Any) -> None:
        undo.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    bug(put)
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
