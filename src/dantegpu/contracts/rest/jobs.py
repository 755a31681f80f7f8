"""Jobs as the API shows them."""

from pydantic import Field

from dantegpu.contracts.rest.base import Page, Response, Timestamp, Udgpu
from dantegpu.contracts.rest.spec import JobSpec
from dantegpu.domain.job import JobState, Outcome


class ResultFile(Response):
    """A file that a job left in $DANTE_OUTPUT."""

    path: str = Field(description="Relative to $DANTE_OUTPUT")
    size_bytes: int
    sha256: str


class PublishedPort(Response):
    """Where a port of a job is reached while the attempt runs."""

    number: int = Field(description="What the job listens on")
    address: str = Field(description="Of the machine, as its owner says it is reached")
    machine_port: int


class Attempt(Response):
    """One try of a job on one machine."""

    id: str
    job_id: str
    epoch: int = Field(description="1, 2, ...: rises with each attempt of the job")
    node_rank: int = Field(default=0, description="Which of the job's nodes; all nodes of an epoch run at once")
    machine_id: str
    state: JobState
    outcome: Outcome | None = None
    exit_code: int | None = None
    message: str = ""
    rate_udgpu_per_hour: Udgpu = Field(description="Locked when the job was placed")
    billed_seconds: int
    cost_udgpu: Udgpu
    device_ids: list[str] = Field(default_factory=list)
    simulated: bool = Field(default=False, description="Ran on simulated devices")
    sandbox: str = Field(default="", description="What it really ran in: bubblewrap, none")
    spot: bool = Field(default=False, description="Could be preempted, at the price of spot work")
    checkpointed_at: Timestamp | None = Field(default=None, description="When its last checkpoint was kept")
    resumed_epoch: int | None = Field(default=None, description="Whose checkpoint it began with; null: it began anew")
    ports: list[PublishedPort] = Field(default_factory=list[PublishedPort], description="From RUNNING on")
    created_at: Timestamp
    started_at: Timestamp | None = None
    ended_at: Timestamp | None = None


class ArrayProgress(Response):
    """How far an array is: its tasks by state. Those not created yet wait without a row of their own."""

    size: int
    created: int = Field(description="Tasks are created as their turn comes")
    waiting: int = Field(description="QUEUED, or not created yet")
    placed: int
    starting: int
    running: int
    stopping: int
    succeeded: int
    failed: int
    cancelled: int
    max_parallel: int | None = None

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled


class Job(Response):
    """What is to run, and how far it is."""

    id: str
    team_id: str
    user_id: str
    name: str
    spec: JobSpec
    state: JobState
    reason: str | None = Field(default=None, description="Why it still waits, while QUEUED: no_funds, no_capacity, ...")
    reason_text: str | None = Field(default=None, description="The same for people")
    epoch: int = Field(description="Epoch of the latest attempt; 0: none yet")
    outcome: Outcome | None = None
    exit_code: int | None = None
    message: str = ""
    cost_udgpu: Udgpu = Field(description="Settled so far")
    settled: bool = Field(description="cost_udgpu is final")
    results_epoch: int | None = Field(default=None, description="The attempt whose results are published")
    results: list[ResultFile] = Field(default_factory=list[ResultFile], description="Only when one job is asked for")
    attempts: list[Attempt] = Field(default_factory=list[Attempt], description="Only when one job is asked for")
    array: ArrayProgress | None = Field(default=None, description="Only of an array")
    array_id: str | None = Field(default=None, description="Of a task: its array")
    array_index: int | None = Field(default=None, description="Of a task: its DANTE_ARRAY_INDEX")
    schedule_id: str | None = Field(default=None, description="Of a job that a schedule submitted")
    created_at: Timestamp
    started_at: Timestamp | None = None
    ended_at: Timestamp | None = None


class Schedule(Response):
    """A job that is submitted again and again."""

    id: str
    team_id: str
    user_id: str
    name: str
    spec: JobSpec
    next_at: Timestamp | None = Field(default=None, description="null: it is stopped")
    last_job_id: str | None = None
    runs: int
    created_at: Timestamp
    stopped_at: Timestamp | None = None


class SchedulePage(Page):
    """Schedules, by page."""

    schedules: list[Schedule]


class JobPage(Page):
    """Jobs, by page."""

    jobs: list[Job]


class Jobs(Response):
    """The answer to a list of specs, in the order sent."""

    jobs: list[Job]


class JobEvent(Response):
    """One line of a job's history."""

    job_id: str
    seq: int = Field(description="Rises by one per job; the `id` of the server-sent event")
    state: JobState
    type: str = Field(
        description="submitted | waiting | placed | starting | running | stop_requested | ended | requeued | settled"
    )
    message: str = ""
    attempt_id: str | None = None
    occurred_at: Timestamp


class JobEvents(Response):
    """A part of a job's history."""

    events: list[JobEvent]
    last_seq: int = Field(description="Ask for what comes next with `?after_seq=`")


class LogChunk(Response):
    """Bytes of one attempt's log, as a server-sent event."""

    epoch: int
    offset: int = Field(description="Of the first byte of this chunk in the attempt's log")
    data_base64: str = Field(description="The bytes, standard base64: a log may hold anything")
    next_offset: int
    complete: bool = Field(description="The attempt's log ends here")


class DeviceUse(Response):
    """What one of the attempt's GPUs did."""

    index: int = Field(description="On its machine")
    gpu_utilisation: float = Field(description="0..1")
    vram_used_bytes: int
    memory_utilisation: float = Field(description="0..1, of the memory's bandwidth")
    temperature_celsius: float
    power_watts: float
    throttle_reasons: list[str] = Field(default_factory=list, description="What slowed it down")


class MetricsPoint(Response):
    """What an attempt used on average over one interval; null: not measured on its machine."""

    number: int = Field(description="1, 2, ...: of the intervals since it began, the one that ends here")
    elapsed_seconds: float = Field(description="Since it began")
    cpu_cores: float | None = None
    memory_bytes: int | None = Field(default=None, description="With the files that the system keeps in memory for it")
    read_bytes_per_second: float | None = Field(default=None, description="From disks")
    written_bytes_per_second: float | None = Field(default=None, description="To disks")
    processes: int
    devices: list[DeviceUse]


class Metrics(Response):
    """What one attempt used over time. Jobs that run for less than an interval have none."""

    job_id: str
    epoch: int
    interval_seconds: float
    step: int = Field(description="Every step-th point is kept: a long series is thinned out")
    points: list[MetricsPoint]


class Constraint(Response):
    """One demand of the job, and how many machines it excludes."""

    constraint: str = Field(description="gpu_model, vram, gpu_count, cpu, memory, max_price, status, ...")
    machines_excluded: int
    text: str


class Relaxation(Response):
    """The smallest change of one field that would open machines."""

    field: str
    from_value: str
    to_value: str
    machines: int
    available_now: bool = Field(description="The job would start at once")
    machines_free: int = Field(default=0, description="How many of them are free now")


class Explanation(Response):
    """Why a job waits: what excludes how many machines, and what would help."""

    job_id: str
    reason: str | None = None
    reason_text: str | None = None
    machines_total: int
    machines_fitting: int
    machines_free: int = Field(default=0, description="Of those fitting; 0: all are busy")
    constraints: list[Constraint]
    relaxations: list[Relaxation]


class ResultDownload(ResultFile):
    """A result and where to get it."""

    url: str = Field(description="Presigned GET, valid for a few minutes")


class Results(Response):
    """All published results of a job."""

    job_id: str
    epoch: int | None = Field(default=None, description="The attempt that made them; null: none are published")
    node_rank: int = Field(default=0, description="The node that made them")
    complete: bool = Field(description="The job has ended: no more will come")
    files: list[ResultDownload]


class StreamEnd(Response):
    """The last word of an event stream (`event: end`): nothing more will come.

    A stream that ends without it was cut: come back with Last-Event-ID.
    """

    job_id: str
    state: JobState
    outcome: Outcome | None = None
    exit_code: int | None = None
    message: str = ""
    cost_udgpu: Udgpu
    settled: bool
