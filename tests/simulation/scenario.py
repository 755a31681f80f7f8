"""What a seed stands for: how many machines and jobs, what the jobs do, which faults happen and how often."""

from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

FAULT_SHARE = 0.28
GANG_SHARE = 0.4
SPOT_SHARE = 0.5
SAVES_SHARE = 0.8
LONG_SHARE = 0.35
BIG_SHARE = 0.03
"""Most runs are small: a bug needs few machines and few jobs, but many tries. Some are big, for what only many do."""


class Fault(StrEnum):
    """What may go wrong in a run. Each seed has some of them."""

    SCHEDULER_KILLED = "scheduler killed"
    SCHEDULER_STOPPED = "scheduler stopped"
    LEADER_STOPPED = "leader stopped in mid-transaction"
    BILLING_KILLED = "billing killed"
    DAEMON_KILLED = "daemon killed"
    DAEMON_STOPPED = "daemon stopped"
    MACHINE_LOST = "machine lost"
    LINE_CUT = "line to NATS cut"
    CONNECTION_BROKEN = "connection to NATS broken"
    NATS_DOWN = "NATS down"
    NATS_EMPTIED = "NATS's store deleted"
    DATABASE_DOWN = "database restarted"
    COMMIT_UNKNOWN = "answers to commits lost"
    CALLS_LOST = "calls between services lost"
    BILLING_CUT_OFF = "scheduler and billing cut apart"
    MESSAGES_LATE = "messages late and out of order"
    MESSAGES_TWICE = "messages twice"
    ACKS_LOST = "acknowledgements of streams lost"
    PRICE_CHANGE = "price change"
    CANCEL = "job cancelled"
    POOR = "teams out of funds"


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job: when it is submitted, what it asks for, what its command does."""

    at_seconds: float
    team: int
    gpus: int
    nodes: int
    """Machines that run it at once: more than one is a gang."""
    cpu_milli: int
    runs_seconds: float
    exit_code: int
    stubborn: bool
    """Ignores SIGTERM."""
    max_duration_seconds: int
    retries_errors: bool
    spot: bool = False
    saves: bool = False
    """A checkpoint, when it has to stop."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run before it happens."""

    seed: int
    machines: tuple[int, ...]
    """GPUs of each."""
    teams: int
    jobs: tuple[JobPlan, ...]
    faults: frozenset[Fault]
    fault_pause_seconds: float
    """Mean time between two faults."""
    chaos_seconds: float
    """How long faults happen; then everything is repaired and must come to its end."""
    clock_skew_seconds: tuple[float, float]
    """Wall clocks of the two schedulers."""


@dataclass(frozen=True, slots=True)
class _Size:
    """What the seeds draw from. `fault_pause_seconds`: from ... to."""

    machines: tuple[int, ...]
    jobs: tuple[int, ...]
    chaos_seconds: tuple[float, float]
    fault_pause_seconds: tuple[float, float]


SMALL = _Size(
    machines=(1, 1, 1, 1, 2, 2, 3), jobs=(1, 1, 1, 2, 2, 2, 3), chaos_seconds=(3, 10), fault_pause_seconds=(0.4, 2.5)
)
BIG = _Size(machines=(1, 2, 3), jobs=(3, 4, 5), chaos_seconds=(12, 24), fault_pause_seconds=(1, 5))


def scenario_of(seed: int) -> Scenario:
    """The same seed is the same scenario, for ever (of this version)."""
    random = Random(f"scenario {seed}")
    teams = random.randint(1, 2)
    faults = [fault for fault in Fault if random.random() < (0.5 if fault is Fault.DAEMON_KILLED else FAULT_SHARE)]
    size = BIG if random.random() < BIG_SHARE else SMALL
    chaos_seconds = random.uniform(*size.chaos_seconds)
    machines = tuple(random.choice((1, 1, 2)) for _ in range(random.choice(size.machines)))
    jobs = [_job(random, teams, machines, chaos_seconds) for _ in range(random.choice(size.jobs))]
    jobs = _some_of_them_spot(seed, jobs)
    return Scenario(
        seed=seed,
        machines=machines,
        teams=teams,
        jobs=tuple(sorted(jobs, key=lambda job: job.at_seconds)),
        faults=frozenset(faults),
        fault_pause_seconds=random.uniform(*size.fault_pause_seconds),
        chaos_seconds=chaos_seconds,
        clock_skew_seconds=(random.uniform(-0.05, 0.05), random.uniform(-0.05, 0.05)),
    )


def _some_of_them_spot(seed: int, jobs: list[JobPlan]) -> list[JobPlan]:
    """Chance of its own: everything else is what it was for this seed."""
    random = Random(f"spot {seed}")
    return [replace(job, spot=random.random() < SPOT_SHARE, saves=random.random() < SAVES_SHARE) for job in jobs]


def _job(random: Random, teams: int, machines: tuple[int, ...], chaos_seconds: float) -> JobPlan:
    nodes = min(len(machines), 2) if random.random() < GANG_SHARE else 1
    gpus = min(max(machines) if nodes == 1 else min(machines), random.choice((0, 1, 1, 1, 2)))
    long = random.random() < LONG_SHARE
    # What fails and is tried again is short: the same, five times over, shows nothing new the fifth time.
    retries_errors = not long and random.random() < 0.12
    return JobPlan(
        at_seconds=random.uniform(0.2, chaos_seconds * 0.4),
        team=random.randrange(teams),
        gpus=gpus,
        nodes=nodes,
        cpu_milli=random.choice((500, 1500, 2500)),
        runs_seconds=random.uniform(4, 11) if long else random.uniform(0.05, 1.5),
        exit_code=random.choice((0, 0, 0, 1, 3)),
        stubborn=random.random() < 0.2,
        max_duration_seconds=random.choice((4, 60, 60, 60, 60)),
        retries_errors=retries_errors,
    )
