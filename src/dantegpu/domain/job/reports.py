"""Reports of machines: stale epochs and doubled reports are decided here, before the table is asked."""

from dataclasses import dataclass, replace
from datetime import datetime

from dantegpu.domain.ids import AttemptId, MachineId
from dantegpu.domain.job.events import (
    AttemptEnded,
    AttemptRunning,
    AttemptStarting,
    AttemptStopping,
    Effect,
    OnNode,
)
from dantegpu.domain.job.gang import rank_of
from dantegpu.domain.job.model import JobSnapshot
from dantegpu.domain.job.transitions import transition


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """One change of an attempt as its machine tells it. `seq` rises by one per change within an attempt."""

    attempt_id: AttemptId
    machine_id: MachineId
    epoch: int
    seq: int
    event: AttemptStarting | AttemptRunning | AttemptStopping | AttemptEnded


@dataclass(frozen=True, slots=True)
class Stale:
    """The report changes nothing: doubled, late, or of an attempt that this machine no longer holds."""

    why: str


@dataclass(frozen=True, slots=True)
class Folded:
    """The report counts: the job with it, and what to do about it."""

    job: JobSnapshot
    effects: tuple[Effect, ...]


def fold_report(job: JobSnapshot, report: AttemptReport, now: datetime) -> Folded | Stale:
    """Apply a machine's report, or say why it changes nothing. Never raises for what a machine may send."""
    if not job.state.live or job.attempt_id is None:
        return Stale(f"the job has no live attempt ({job.state})")
    if job.gang:
        return _fold_node(job, report, now)
    if report.epoch != job.epoch or report.attempt_id != job.attempt_id:
        return Stale(f"epoch {report.epoch} is not the live attempt's epoch {job.epoch}")
    if report.machine_id != job.machine_id:
        return Stale("the attempt belongs to another machine")
    if report.seq <= job.report_seq:
        return Stale(f"report {report.seq} was already folded (the last was {job.report_seq})")
    after, effects = transition(job, report.event, now)
    return Folded(after.but(report_seq=report.seq), effects)


def _fold_node(job: JobSnapshot, report: AttemptReport, now: datetime) -> Folded | Stale:
    rank = rank_of(job, report.attempt_id)
    if report.epoch != job.epoch or rank is None:
        return Stale(f"epoch {report.epoch} is not the live attempts' epoch {job.epoch}")
    node = job.gang[rank]
    if report.machine_id != node.machine_id:
        return Stale("the attempt belongs to another machine")
    if node.ended or report.seq <= node.report_seq:
        return Stale(f"report {report.seq} was already folded (the last was {node.report_seq})")
    after, effects = transition(job, OnNode(rank, report.event), now)
    gang = tuple(
        replace(each, report_seq=report.seq) if number == rank else each for number, each in enumerate(after.gang)
    )
    return Folded(after.but(gang=gang), effects)
