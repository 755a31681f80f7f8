"""Policy is data: which machine is the best one for a job, among those that can take it."""

from dataclasses import dataclass
from enum import StrEnum


class Objective(StrEnum):
    """What a ranking looks at first. Ties go on to the others, in the end to the machine's place in the snapshot."""

    CHEAPEST = "cheapest"
    FRAGMENTATION = "fragmentation"
    SPREAD = "spread"


@dataclass(frozen=True, slots=True)
class Policy:
    """`fair_share`: within one priority, the team with the smallest dominant share goes next; else the oldest job."""

    objective: Objective = Objective.CHEAPEST
    fair_share: bool = True


DEFAULT_POLICY = Policy()
