"""Policy is data: which machine is the best one for a job, and which team's turn it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dantegpu.domain.ids import TeamId
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.snapshot import TeamUse

DEFAULT_HALF_LIFE_SECONDS = 24 * 3600


class Objective(StrEnum):
    """What a ranking looks at first. Ties go on to the others, in the end to the machine's place in the snapshot."""

    CHEAPEST = "cheapest"
    """The lowest price, then the fullest machine. The default: what a job costs is somebody's bill."""
    FASTEST = "fastest"
    """The fastest GPU by `speeds`, of equally fast ones the cheapest. Without GPUs the same as cheapest."""
    FRAGMENTATION = "fragmentation"
    """Where the least room is spoilt for what will be asked for next. For a cluster with one owner or one price."""
    SPREAD = "spread"
    """The emptiest machine."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a team has for certain, whoever else asks: GPUs in 1/1000, and cores in 1/1000 unless it is None."""

    gpu_milli: int
    cpu_milli: int | None = None

    def allows(self, use: TeamUse, request: ResourceRequest, nodes: int = 1) -> bool:
        """Does the team stay within its quota when it takes this, `nodes` times, as well?"""
        gpu_milli = request.gpu.total_milli * nodes if request.gpu is not None else 0
        cores = self.cpu_milli is None or use.cpu_milli + request.cpu_milli * nodes <= self.cpu_milli
        return cores and use.gpu_milli + gpu_milli <= self.gpu_milli


@dataclass(frozen=True, slots=True)
class Policy:
    """`fair_share`: within one priority, the team with the smallest dominant share goes next; else the oldest job.

    A team's share is what it holds now and what it held lately: `half_life_seconds` ago counts half.

    `quotas`: where there are any, teams within theirs go first, whatever the priorities. Only what they leave idle is
    borrowed by the others, teams without a quota among them, and what a borrower gives back is theirs again first.
    """

    objective: Objective = Objective.CHEAPEST
    fair_share: bool = True
    half_life_seconds: int = DEFAULT_HALF_LIFE_SECONDS
    quotas: Mapping[TeamId, Quota] = field(default_factory=dict[TeamId, Quota])


DEFAULT_POLICY = Policy()


def borrowed(team_use: Mapping[TeamId, TeamUse], policy: Policy) -> dict[TeamId, TeamUse]:
    """What teams hold beyond their quotas: what may be reclaimed for a team within its own. Empty without quotas."""
    over: dict[TeamId, TeamUse] = {}
    for team_id, use in team_use.items() if policy.quotas else ():
        quota = policy.quotas.get(team_id, Quota(0, 0))
        cores = use.cpu_milli - quota.cpu_milli if quota.cpu_milli is not None else 0
        excess = TeamUse(max(use.gpu_milli - quota.gpu_milli, 0), max(cores, 0))
        if excess != TeamUse():
            over[team_id] = excess
    return over
