"""Every NATS subject, stream and consumer of the platform. No other file spells one out."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from dantegpu.domain.ids import MachineId, TeamId

MACHINE_PREFIX: Final = "dante.machine"

JOB_SUBMITTED: Final = "dante.queue.submitted"
"""Stream JOBS: the jobs that one transaction accepted, from the intake's outbox to placement."""
JOBS_CHANGED: Final = "dante.jobs.changed"
"""Stream EVENTS: what one transaction changed of jobs; wakes those who follow one of them."""
LOGS_APPENDED: Final = "dante.logs.appended"
"""Core subject, in no stream: wakes those who follow the log of one of the jobs."""

ALL_JOB_EVENTS: Final = "dante.jobs.*"
ALL_MACHINE_EVENTS: Final = "dante.gpus.*"
ALL_ASK_EVENTS: Final = "dante.market.*"
ALL_WALLET_EVENTS: Final = "dante.billing.*"

ALL_HEARTBEATS: Final = f"{MACHINE_PREFIX}.*.heartbeat"
ALL_SYNCS: Final = f"{MACHINE_PREFIX}.*.sync"
ALL_REPORTS: Final = f"{MACHINE_PREFIX}.*.report"
ALL_LOGS: Final = f"{MACHINE_PREFIX}.*.logs"
ALL_METRICS: Final = f"{MACHINE_PREFIX}.*.metrics"
ALL_URLS: Final = f"{MACHINE_PREFIX}.*.urls"


def machine_event(machine_id: MachineId) -> str:
    return f"dante.gpus.{machine_id}"


def ask_event(machine_id: MachineId) -> str:
    return f"dante.market.{machine_id}"


def wallet_event(team_id: TeamId) -> str:
    return f"dante.billing.{team_id}"


def machine_heartbeat(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.heartbeat"


def machine_sync(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.sync"


def machine_desired(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.desired"


def machine_report(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.report"


def machine_logs(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.logs"


def machine_metrics(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.metrics"


def machine_urls(machine_id: MachineId) -> str:
    return f"{MACHINE_PREFIX}.{machine_id}.urls"


def machine_inbox_prefix(machine_id: MachineId) -> str:
    """Prefix of the reply subjects that this machine's NATS user may subscribe to."""
    return f"_INBOX_{machine_id}"


def is_own_inbox(subject: str, reply_to: str) -> bool:
    """Whether an answer to what came on a machine's `subject` goes to that machine. Raises InvalidId."""
    return reply_to.startswith(f"{machine_inbox_prefix(machine_of(subject))}.")


def machine_of(subject: str) -> MachineId:
    """The machine that sent on `subject`: NATS lets a machine publish under its own subjects only.

    Raises InvalidId when the subject is not a machine's.
    """
    parts = subject.split(".")
    return MachineId.parse(parts[2] if len(parts) == 4 else subject)


@dataclass(frozen=True, slots=True)
class Stream:
    """A JetStream stream. `work_queue` deletes a message once acknowledged; else it stays until `max_age`."""

    name: str
    subjects: tuple[str, ...]
    work_queue: bool
    max_age: timedelta
    max_bytes: int


JOBS: Final = Stream("JOBS", (JOB_SUBMITTED,), work_queue=True, max_age=timedelta(days=7), max_bytes=256 << 20)
REPORTS: Final = Stream("REPORTS", (ALL_REPORTS,), work_queue=True, max_age=timedelta(days=1), max_bytes=256 << 20)
EVENTS: Final = Stream(
    "EVENTS",
    (ALL_JOB_EVENTS, ALL_MACHINE_EVENTS, ALL_ASK_EVENTS, ALL_WALLET_EVENTS),
    work_queue=False,
    max_age=timedelta(hours=1),
    max_bytes=256 << 20,
)
STREAMS: Final = (JOBS, REPORTS, EVENTS)

PLACEMENT_CONSUMER: Final = "placement"
"""Durable consumer of JOBS."""
REPORTS_CONSUMER: Final = "reports"
"""Durable consumer of REPORTS."""
