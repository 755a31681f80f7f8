"""What teams use of the fleet, now and lately: the measure of fairness.

Sources: Ghodsi et al., "Dominant Resource Fairness", NSDI 2011; the decay is that of Kay and Lauder, "A Fair Share
Scheduler", CACM 31(1), 1988.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from dantegpu.domain.ids import TeamId
from dantegpu.domain.resources import ResourceRequest
from dantegpu.domain.scheduling.policy import Policy
from dantegpu.domain.scheduling.snapshot import Lease, Snapshot, TeamUse

_FORGOTTEN = 1e-6
_NOTHING = (0, 0, 0)


class PastShares:
    """Each team's share averaged over the past, where a half-life ago counts half. Teams are numbers (`Shape.team`)."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}
        self._at: datetime | None = None

    def of(self, team: int) -> float:
        return self._shares.get(team, 0.0)

    def feed(self, shares: Mapping[TeamId, float], now: datetime) -> None:
        """What the caller knows of the time before: the averages as they are at `now`."""
        self._shares = {team_id.uuid.int: share for team_id, share in shares.items()}
        self._at = now

    def advance(self, held: Mapping[int, float], half_life_seconds: int, now: datetime) -> None:
        """Teams have held these shares since the last call."""
        before, self._at = self._at, now
        if before is None or now <= before:
            return
        kept = 0.5 ** ((now - before).total_seconds() / half_life_seconds) if half_life_seconds else 0.0
        shares = {team: share * kept for team, share in self._shares.items()}
        for team, share in held.items():
            shares[team] = shares.get(team, 0.0) + share * (1 - kept)
        self._shares = {team: share for team, share in shares.items() if share > _FORGOTTEN}


def average_shares(snapshot: Snapshot, used: Mapping[TeamId, tuple[float, float, float]]) -> dict[TeamId, float]:
    """Dominant shares of the fleet, of what teams used on average in milli-GPUs, milli-cores and bytes."""
    totals = _totals(snapshot)
    return {
        team_id: max(use / total for use, total in zip(uses, totals, strict=True)) for team_id, uses in used.items()
    }


def _totals(snapshot: Snapshot) -> tuple[int, int, int]:
    return (
        max(int(snapshot.device_total.sum()), 1),
        max(int(snapshot.cpu_total.sum()), 1),
        max(int(snapshot.memory_total.sum()), 1),
    )


class Shares:
    """What each team uses of the whole fleet, while plans are made. Teams are numbers: a round asks very often."""

    def __init__(self, snapshot: Snapshot, policy: Policy, past: PastShares) -> None:
        self._past = past
        self._quotas = {team_id.uuid.int: quota for team_id, quota in policy.quotas.items()}
        # Plain lists of milli-GPUs, milli-cores and bytes: they change with every job that is drawn.
        self._use = {
            team_id.uuid.int: [use.gpu_milli, use.cpu_milli, use.memory_bytes]
            for team_id, use in snapshot.team_use.items()
        }
        self._totals = _totals(snapshot)
        self.held = {team: self._dominant(use) for team, use in self._use.items()}
        """The dominant share of what each team holds now, 0..1."""

    def of(self, team: int) -> float:
        """What decides whose turn it is: the share that the team holds and the average of what it held."""
        return self.held.get(team, 0.0) + self._past.of(team)

    def within_quota(self, team: int, request: ResourceRequest, nodes: int = 1) -> bool:
        """May the team take this, `nodes` times, as its own? A team without a quota borrows everything."""
        quota = self._quotas.get(team)
        return quota is not None and quota.allows(TeamUse(*self._use.get(team, _NOTHING)), request, nodes)

    def add(self, team: int, request: ResourceRequest, times: int = 1) -> float:
        """The team holds so much more (less, when `times` is negative). What `of` says then."""
        milli = request.gpu.total_milli * times if request.gpu is not None else 0
        return self._change(team, milli, request.cpu_milli * times, request.memory_bytes * times) + self._past.of(team)

    def remove_lease(self, lease: Lease) -> None:
        """The team no longer holds this."""
        milli = sum([milli for _, milli in lease.devices])
        self._change(lease.team_id.uuid.int, -milli, -lease.cpu_milli, -lease.memory_bytes)

    def _change(self, team: int, gpu_milli: int, cpu_milli: int, memory_bytes: int) -> float:
        use = self._use.get(team)
        if use is None:
            use = self._use[team] = [0, 0, 0]
        use[0] += gpu_milli
        use[1] += cpu_milli
        use[2] += memory_bytes
        held = self.held[team] = self._dominant(use)
        return held

    def _dominant(self, use: Sequence[int]) -> float:
        gpu, cpu, memory = self._totals
        return max(use[0] / gpu, use[1] / cpu, use[2] / memory)
