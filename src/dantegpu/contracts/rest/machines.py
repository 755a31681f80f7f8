"""Providers' machines, their prices, and the offers made of both."""

from enum import StrEnum

from pydantic import Field, SecretStr

from dantegpu.contracts.rest.base import Page, Request, Response, Timestamp, Udgpu

MAX_DEVICES = 64
MAX_PRICE_UDGPU_PER_HOUR = 10**12


class MachineStatus(StrEnum):
    """What a machine does, as the platform sees it."""

    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    PAUSED = "paused"
    UNKNOWN = "unknown"
    OFFLINE = "offline"
    LEFT = "left"


class MachineIntent(StrEnum):
    """What its provider wants a machine to do."""

    ACTIVE = "active"
    PAUSED = "paused"
    DRAINING = "draining"
    LEFT = "left"


class DeviceReport(Request):
    """One GPU as the machine sees it."""

    index: int = Field(ge=0, lt=1024)
    model: str = Field(min_length=1, max_length=200)
    uuid: str = Field(default="", max_length=100)
    vram_bytes: int = Field(ge=0, le=1 << 44)
    compute_capability: str = Field(default="", max_length=10)
    pcie_bus_id: str = Field(default="", max_length=40)
    simulated: bool = False


class InventoryReport(Request):
    """What a machine has and may lease."""

    hostname: str = Field(max_length=255)
    cpu_milli: int = Field(ge=0, le=10**7)
    memory_bytes: int = Field(ge=0, le=1 << 50)
    disk_bytes: int = Field(ge=0, le=1 << 60)
    os: str = Field(default="", max_length=200)
    kernel: str = Field(default="", max_length=200)
    driver_version: str = Field(default="", max_length=50)
    cuda_version: str = Field(default="", max_length=50)
    devices: list[DeviceReport] = Field(default_factory=list[DeviceReport], max_length=MAX_DEVICES)
    sandbox: str = Field(default="none", max_length=50, description="bubblewrap, none")
    executors: list[str] = Field(default_factory=list, max_length=16)
    limits_missing: list[str] = Field(default_factory=list, max_length=64)
    container_engine: str = Field(default="", max_length=255)
    allowed_images: list[str] = Field(default_factory=list, max_length=64)
    networks: list[str] = Field(default_factory=list, max_length=16)
    site: str = Field(default="", max_length=63)
    daemon_version: str = Field(default="", max_length=50)
    region: str = Field(default="", max_length=50)
    simulated: bool = False
    shares_devices: bool = False


class EnrolMachine(Request):
    """Enrolment: the join token, the machine's public key, and a signature that proves that it holds the private one.

    Signed is the UTF-8 text `dante-enrol\\n<public_key>\\n<signed_at>`. The same key again is the same machine.
    """

    join_token: SecretStr = Field(max_length=200)
    public_key: str = Field(max_length=100, description="nkeys user key, U...")
    signed_at: int = Field(description="Unix seconds, within 5 minutes of the server's clock")
    signature: str = Field(max_length=200, description="Ed25519, base64url")
    inventory: InventoryReport


class RenewMachine(Request):
    """Signed is `dante-renew\\n<machine_id>\\n<signed_at>`."""

    signed_at: int
    signature: str = Field(max_length=200)


class MachineCredentials(Response):
    """What a machine connects with."""

    machine_id: str
    team_id: str
    nats_url: str = Field(description="Where the machine connects")
    nats_user_jwt: str = Field(description="Limited to this machine's subjects")
    expires_at: Timestamp


class DeviceBenchmark(Response):
    """What the machine's self-test measured of a GPU; 0: not measured."""

    fp32_tflops: float
    bf16_tflops: float
    memory_gbps: float
    pcie_gbps: float
    vram_checked_bytes: int
    score: float = Field(description="100: an RTX 4090 that reaches its data sheet")


class Benchmark(Response):
    """What the machine's self-test measured of everything else."""

    measured_at: Timestamp
    cpu_gflops: float
    memory_gbps: float
    disk_write_mbps: float
    disk_read_mbps: float
    network_up_mbps: float = Field(description="MB/s to the platform's storage; 0: not measured")
    network_down_mbps: float
    problem: str = Field(default="", description="What it computed wrongly")
    score: float = Field(description="Of the CPU; 100: 1000 GFLOPS and 50 GB/s")


class Device(Response):
    """One GPU."""

    id: str
    index: int
    model: str
    uuid: str = ""
    vram_bytes: int
    compute_capability: str = ""
    simulated: bool = False
    problem: str = Field(default="", description="Why nothing is placed on it now; empty: it is well")
    vendor: str = Field(default="", description="nvidia, amd")
    mig_profile: str = Field(default="", description="`1g.10gb`: a part of a card, leased as a device of its own")
    pcie_generation: int = 0
    pcie_width: int = 0
    power_limit_watts: float = 0
    ecc: bool = False
    benchmark: DeviceBenchmark | None = None
    gpu_utilisation: float | None = Field(default=None, description="0..1")
    vram_used_bytes: int | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    memory_utilisation: float | None = Field(default=None, description="0..1, of the memory's bandwidth")
    throttle_reasons: list[str] = Field(default_factory=list, description="What slows it down")
    processes: int | None = Field(default=None, description="That compute on it")


class Quarantine(Response):
    """A machine failed job after job: it gets no new work for a while."""

    machine_id: str
    reason: str
    since: Timestamp
    until: Timestamp


class Quarantines(Response):
    """Machines in quarantine."""

    quarantines: list[Quarantine]


class Machine(Response):
    """A provider's machine."""

    id: str
    team_id: str = Field(description="The provider")
    hostname: str
    status: MachineStatus
    intent: MachineIntent | None = Field(default=None, description="What its provider wants; null: it is not yours")
    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    os: str = ""
    kernel: str = ""
    driver_version: str = ""
    cuda_version: str = ""
    devices: list[Device]
    sandbox: str
    executors: list[str]
    limits_missing: list[str]
    container_engine: str = Field(default="", description="Its version, its runtime, and whose users its jobs are")
    allowed_images: list[str] = Field(
        default_factory=list, description="Patterns of the images that its owner lets run; none: all"
    )
    networks: list[str] = Field(
        default_factory=list,
        description="Jobs that may have one: plain (without an image), image; ports: may publish some; "
        "gang: their nodes reach one another within the site",
    )
    site: str = Field(default="", description="Its owner's name for machines that form one network")
    daemon_version: str = ""
    region: str = ""
    simulated: bool
    closed: str = Field(default="", description="Why its owner takes no jobs now; empty: it is open")
    benchmark: Benchmark | None = Field(default=None, description="null: not measured yet")
    shares_devices: bool = Field(default=False, description="Jobs of one team may share a GPU (`gpu: 0.5`)")
    running_attempts: int
    cpu_utilisation: float = Field(description="0..1")
    memory_used_bytes: int
    quarantine: Quarantine | None = Field(default=None, description="Only of your own machines")
    joined_at: Timestamp
    last_heartbeat_at: Timestamp | None = None


class MachinePage(Page):
    """Machines, by page."""

    machines: list[Machine]


class SetAsk(Request):
    """A field that is left out keeps its price."""

    price_udgpu_per_gpu_hour: int | None = Field(default=None, strict=True, ge=0, le=MAX_PRICE_UDGPU_PER_HOUR)
    price_udgpu_per_cpu_hour: int | None = Field(
        default=None,
        strict=True,
        ge=0,
        le=MAX_PRICE_UDGPU_PER_HOUR,
        description="Per core-hour, for jobs without a GPU",
    )


class Ask(Response):
    """What a machine costs."""

    machine_id: str
    price_udgpu_per_gpu_hour: Udgpu
    price_udgpu_per_cpu_hour: Udgpu
    updated_at: Timestamp | None = Field(default=None, description="null: the platform's default price")


class Offer(Response):
    """A machine for rent."""

    machine: Machine
    ask: Ask
    rentable: bool


class OfferPage(Page):
    """Offers, by page."""

    offers: list[Offer] = Field(description="Cheapest first")
