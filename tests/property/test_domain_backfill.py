"""A job with a reservation starts by it, whatever small jobs come meanwhile; nothing is ever over capacity."""

from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from dantegpu.domain.gpus import KNOWN_GPUS
from dantegpu.domain.ids import DeviceId, JobId, MachineId, TeamId
from dantegpu.domain.resources import DeviceInfo, GpuRequest, MachineInfo, ResourceRequest
from dantegpu.domain.scheduling import MARGIN_SECONDS, Lease, PendingJob, Placement, Running, Snapshot, plan_round

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TEAM = TeamId(UUID(int=1))
GPU = KNOWN_GPUS["A100"]
LARGE = JobId(UUID(int=999))


def at(second: int) -> datetime:
    return T0 + timedelta(seconds=second)


def a_machine(number: int, gpus: int) -> MachineInfo:
    devices = (
        DeviceInfo(
            DeviceId(UUID(int=number * 10 + index + 1)), index, GPU.model, GPU.vram_bytes, GPU.compute_capability
        )
        for index in range(gpus)
    )
    return MachineInfo(MachineId(UUID(int=number + 1)), TEAM, 8000, 8, 8, tuple(devices))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A small job, and after how many of its seconds it really ends."""

    job: PendingJob
    runs_seconds: int


@st.composite
def arrivals(draw: st.DrawFn, number: int) -> Arrival:
    gpu = draw(st.sampled_from([None, GpuRequest((), 1, 1, 1000), GpuRequest((), 1, 1, 500)]))
    seconds = draw(st.integers(1, 300))
    job = PendingJob(
        JobId(UUID(int=number + 1)), TEAM, at(draw(st.integers(0, 600))), ResourceRequest(gpu, 1000, 1, 1),
        priority=draw(st.sampled_from([10, 50])), max_duration_seconds=seconds,
    )  # fmt: skip
    return Arrival(job, draw(st.integers(1, seconds + MARGIN_SECONDS)))


class World:
    """Machines and what runs on them, moved on from one event to the next."""

    def __init__(self, machines: list[MachineInfo], large: PendingJob, small: list[Arrival]) -> None:
        self.machines = machines
        self.waiting = {large.id: Arrival(large, 60)} | {arrival.job.id: arrival for arrival in small}
        self.running: list[tuple[Running, datetime]] = []
        self.large_at: datetime | None = None
        self.promised_at: datetime | None = None

    def step(self, now: datetime) -> None:
        self.running = [(running, ends) for running, ends in self.running if ends > now]
        running = [each for each, _ in self.running]
        pending = [arrival.job for arrival in self.waiting.values() if arrival.job.submitted_at <= now]
        snapshot = Snapshot.from_machines(self.machines, [each.lease for each in running])
        plan = plan_round(snapshot, running, pending, now=now)
        assert Counter({it.job_id for it in plan.placements} | {it.job_id for it in plan.unplaced}) == Counter(
            job.id for job in pending
        )
        for reservation in plan.reservations:
            if reservation.job.id == LARGE:
                assert self.promised_at is None or reservation.start_at <= self.promised_at
                self.promised_at = reservation.start_at
        for placement in plan.placements:
            self._start(placement, now)
        for placement in plan.placements:
            self.waiting.pop(placement.job_id, None)
        self._check()

    def _start(self, placement: Placement, now: datetime) -> None:
        arrival = self.waiting[placement.job_id]
        devices = tuple((share.device_id, share.milli) for share in placement.devices)
        lease = Lease(placement.machine_id, TEAM, placement.cpu_milli, 1, 1, devices)
        seconds = arrival.job.max_duration_seconds or 60
        ends_at = now + timedelta(seconds=seconds + MARGIN_SECONDS)
        self.running.append((Running(lease, ends_at), now + timedelta(seconds=arrival.runs_seconds)))
        if placement.job_id == LARGE:
            self.large_at = now

    def _check(self) -> None:
        used = Counter[DeviceId]()
        for running, _ in self.running:
            used.update(dict(running.lease.devices))
        assert all(milli <= 1000 for milli in used.values())

    def next_event(self, now: datetime) -> datetime | None:
        ends = [ends for _, ends in self.running]
        comes = [arrival.job.submitted_at for arrival in self.waiting.values()]
        return min((moment for moment in (*ends, *comes) if moment > now), default=None)


@given(st.data())
def test_a_reserved_job_is_not_delayed_by_what_fills_its_gaps_and_starts_in_the_end(data: st.DataObject):
    gpus = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), "gpus")
    machines = [a_machine(number, count) for number, count in enumerate(gpus)]
    nodes = data.draw(st.integers(1, len(gpus)), "nodes")
    count = data.draw(st.integers(1, sorted(gpus, reverse=True)[nodes - 1]), "gpus per node")
    request = ResourceRequest(GpuRequest((), count, count, 1000), data.draw(st.integers(1, 8)) * 1000, 1, 1)
    submitted = data.draw(st.integers(0, 100), "large one comes")
    large = PendingJob(LARGE, TEAM, at(submitted), request, nodes=nodes, max_duration_seconds=60)
    small = [data.draw(arrivals(number)) for number in range(data.draw(st.integers(0, 12), "small ones"))]
    # What was there first goes first, and is no backfill.
    small = [
        each if each.job.submitted_at > at(submitted) else replace(each, job=replace(each.job, priority=10))
        for each in small
    ]
    world = World(machines, large, small)
    moment: datetime | None = T0
    while moment is not None:
        world.step(moment)
        moment = world.next_event(moment)
    assert world.waiting == {}
    assert world.large_at is not None
    assert world.promised_at is None or world.large_at <= world.promised_at
