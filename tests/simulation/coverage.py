"""What happened in a run, counted: so that nobody can make the runs so small that nothing happens in them any more."""

from collections.abc import Mapping
from enum import StrEnum

from tests.simulation.memory.engine import Row
from tests.simulation.memory.scheduler import TERMINAL


class Outcome(StrEnum):
    """What a run may come to; what may go wrong in it is a Fault."""

    JOB_SUCCEEDED = "job SUCCEEDED"
    JOB_FAILED = "job FAILED"
    JOB_CANCELLED = "job CANCELLED"
    ATTEMPT_SUCCEEDED = "attempt succeeded"
    ATTEMPT_FAILED = "attempt failed"
    ATTEMPT_CANCELLED = "attempt cancelled"
    ATTEMPT_LOST = "attempt lost"
    ATTEMPT_PREEMPTED = "attempt preempted"
    ATTEMPT_TIMED_OUT = "attempt timed_out"
    ATTEMPT_PROVIDER_FAULT = "attempt provider_fault"
    PLACED_AGAIN = "job placed again"
    GANG_PLACED = "gang placed"
    NO_FUNDS = "job waits for funds"
    RESERVED = "job waits for a device that is kept for it"
    LEADER_CHANGED = "another scheduler leads"
    LATER_WINDOW = "later window billed"
    HOLD_ORPHANED = "hold without an attempt voided"
    FENCED = "machine ended what had lost its lease"
    ADOPTED = "daemon adopted what was running"
    RESTORED = "job went on from a checkpoint"
    LATE_PUSH = "late push ignored"
    STREAM_LOST = "consumer of a stream made again"


_OF_LOG: Mapping[str, Outcome] = {
    "lease_expired": Outcome.FENCED,
    "late_push_ignored": Outcome.LATE_PUSH,
    "consumer_recreated": Outcome.STREAM_LOST,
    "orphaned_holds_voided": Outcome.HOLD_ORPHANED,
}
_OF_REASON: Mapping[str, Outcome] = {"no_funds": Outcome.NO_FUNDS, "reserved": Outcome.RESERVED}


def of_log(event: str, fields: Mapping[str, object]) -> Outcome | None:
    """What production code says of it."""
    if event == "attempt_adopted" and fields["found"] == "running":
        return Outcome.ADOPTED
    return _OF_LOG.get(event)


def of_job(before: Row | None, after: Row) -> Outcome | None:
    if before is None:
        return None
    if before["state"] != after["state"] and after["state"] in TERMINAL:
        return Outcome(f"job {after['state']}")
    return _OF_REASON.get(after["reason"]) if before["reason"] != after["reason"] else None


def of_attempt(before: Row | None, after: Row) -> Outcome | None:
    if before is None:
        if after["nodes"] > 1:
            return Outcome.GANG_PLACED if not after["node_rank"] else None
        return Outcome.PLACED_AGAIN if after["epoch"] > 1 else None
    if before["ended_at"] is None and after["ended_at"] is not None:
        return Outcome(f"attempt {after['outcome']}")
    return None
