"""What a container looks like, and how Docker and Podman are told. Everything that isolates a job stands here.

An image may set nothing that acts outside: its user, volumes, health check, entry point as process 1, and variables
that GPU hooks or the loader obey are all overridden.
"""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dantegpu.daemon.executors.base import AttemptSpec
from dantegpu.daemon.executors.container.ports import Pair
from dantegpu.daemon.executors.sandbox import HOSTNAME, OUTPUT, WORK, environment, inside
from dantegpu.daemon.workspace import AttemptFolder

type Json = dict[str, Any]

ENTRY = Path(__file__).with_name("entry.sh").read_text()
ATTEMPT_VARIABLE = "DANTE_ATTEMPT_ID"
LOG = "/dante/log"
ONCE = "/dante/once"
EXIT_ALREADY_STARTED = 75
CPU_PERIOD_US = 100_000
MAX_OPEN_FILES = 1 << 20
IMAGE_VOLUME_BYTES = 64 << 20
GUARDED_PREFIXES = ("LD_", "NVIDIA_")
"""Variables of these names are obeyed by the loader and by NVIDIA's hooks, which run with the machine's rights."""
NO_GPUS = ("NVIDIA_VISIBLE_DEVICES", "void")
"""Without it, NVIDIA's runtime shows all GPUs to an image that is made for CUDA."""
_TMPFS_OPTIONS = ("rw", "nosuid", "nodev", "exec")
_CONTAINER_PIDS = 4
"""Processes of ours in the container, on top of what the job may have."""


@dataclass(frozen=True, slots=True)
class User:
    """As whom a job runs. `inside` is the uid it sees, `host` the one that owns its files on the machine.

    `mapped_from`: the first host uid of a user namespace that the engine is asked to make; None: it makes none, or all.
    """

    inside: int
    host: int
    mapped_from: int | None = None


MAPPED_UIDS = 65_536


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says about itself, as far as anybody listens."""

    id: str
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    size_bytes: int = 0
    digests: tuple[str, ...] = ()

    @classmethod
    def read(cls, image: Mapping[str, Any]) -> "ImageConfig":
        config: Mapping[str, Any] = image.get("Config") or {}
        return cls(
            str(image["Id"]),
            tuple(config.get("Env") or ()),
            tuple(config.get("Entrypoint") or ()),
            tuple(config.get("Cmd") or ()),
            tuple(config.get("Volumes") or ()),
            int(image.get("Size") or 0),
            tuple(image.get("RepoDigests") or ()),
        )

    def command_of(self, spec: AttemptSpec) -> list[str]:
        """What a job runs: the image's own program only where the job names none."""
        if spec.command:
            return [*spec.entrypoint, *spec.command]
        return [*(spec.entrypoint or self.entrypoint), *self.command]

    @property
    def guarded(self) -> list[str]:
        """Names of variables that the image may not set."""
        names = (entry.partition("=")[0] for entry in self.env)
        return sorted({name for name in names if name.startswith(GUARDED_PREFIXES)})


@dataclass(frozen=True, slots=True)
class Gpus:
    """How the leased GPUs are asked for: by CDI's names, or by the engine's own request."""

    cdi: tuple[str, ...] = ()
    uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One container, before it is said in an engine's words."""

    name: str
    image: ImageConfig
    spec: AttemptSpec
    folder: AttemptFolder
    user: User
    labels: Mapping[str, str]
    network: str = ""
    """Name of the engine's network; empty: none."""
    resolvers: Sequence[str] = ()
    """Whom to ask for names, where there is a network."""
    ports: Sequence[Pair] = ()
    publish_at: str = ""
    """The machine's address at which they are published."""
    gpus: Gpus = field(default_factory=Gpus)
    seccomp_profile: Path | None = None

    @property
    def arguments(self) -> list[str]:
        guarded = {name: text for name, text in self._variables.items() if name.startswith(GUARDED_PREFIXES)}
        exports = [f"{name}={text}" for name, text in guarded.items()]
        return [str(len(exports)), *exports, inside(self.spec.working_dir), *self.image.command_of(self.spec)]

    @property
    def _variables(self) -> dict[str, str]:
        variables = environment(self.spec, work=WORK, output=OUTPUT, search_path="")
        variables[ATTEMPT_VARIABLE] = str(self.spec.attempt_id)
        if not variables["PATH"]:
            del variables["PATH"]
        return variables

    @property
    def environment(self) -> dict[str, str]:
        given = {name: text for name, text in self._variables.items() if not name.startswith(GUARDED_PREFIXES)}
        # A request by the engine's own words sets the variable itself.
        return given if self.gpus.uuids else {**given, NO_GPUS[0]: NO_GPUS[1]}

    @property
    def removed(self) -> list[str]:
        return [name for name in self.image.guarded if name not in self.environment]

    @property
    def binds(self) -> list[tuple[Path, str, bool]]:
        """(on the machine, in the container, whether programs may run from it)."""
        folder = self.folder
        return [(folder.work, WORK, True), (folder.output, OUTPUT, True), (folder.log, LOG, False),
                (folder.once, ONCE, False)]  # fmt: skip

    @property
    def tmpfs(self) -> dict[str, int]:
        volumes = {path: IMAGE_VOLUME_BYTES for path in self.image.volumes if path not in (WORK, OUTPUT)}
        return {**volumes, "/tmp": self.spec.tmp_bytes, "/var/tmp": self.spec.tmp_bytes}

    @property
    def shm_bytes(self) -> int:
        return self.spec.shm_bytes or self.spec.tmp_bytes

    @property
    def pids_max(self) -> int:
        return self.spec.pids_max + _CONTAINER_PIDS if self.spec.pids_max else 0


def _tmpfs_options(size_bytes: int) -> list[str]:
    return [*_TMPFS_OPTIONS, "mode=1777", *([f"size={size_bytes}"] if size_bytes else [])]


def docker_body(plan: Plan) -> Json:
    """For POST /containers/create of Docker's API."""
    spec, user = plan.spec, f"{plan.user.inside}:{plan.user.inside}"
    # A name without "=" takes the image's variable away.
    env = [*(f"{name}={text}" for name, text in plan.environment.items()), *plan.removed]
    host: Json = {
        "NetworkMode": plan.network or "none",
        "Dns": list(plan.resolvers),
        "PortBindings": {
            f"{number}/tcp": [{"HostIp": plan.publish_at, "HostPort": str(machine_port)}]
            for number, machine_port in plan.ports
        },
        "ReadonlyRootfs": True,
        "Privileged": False,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Mounts": [
            {"Type": "bind", "Source": str(source), "Target": target, "BindOptions": {"Propagation": "rprivate"}}
            for source, target, _ in plan.binds
        ],
        "Tmpfs": {path: ",".join(_tmpfs_options(size)) for path, size in plan.tmpfs.items()},
        "ShmSize": plan.shm_bytes,
        "Memory": spec.memory_bytes,
        # As much as Memory: no swap.
        "MemorySwap": spec.memory_bytes,
        "CpuPeriod": CPU_PERIOD_US if spec.cpu_milli else 0,
        "CpuQuota": _cpu_quota_us(spec),
        "PidsLimit": plan.pids_max or None,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "none"},
        "DeviceRequests": _device_requests(plan.gpus),
    }
    return {
        "Image": plan.image.id,
        "Hostname": HOSTNAME,
        "User": user,
        "Entrypoint": ["/bin/sh", "-c", ENTRY, "dante"],
        "Cmd": plan.arguments,
        "Env": env,
        "WorkingDir": WORK,
        "Labels": dict(plan.labels),
        "Healthcheck": {"Test": ["NONE"]},
        **_docker_address(plan),
        "ExposedPorts": {f"{number}/tcp": {} for number, _ in plan.ports},
        "HostConfig": host,
    }


def _docker_address(plan: Plan) -> Json:
    """A gang's node has the addresses that the others know."""
    if (gang := plan.spec.gang) is None:
        return {}
    mac = gang.mac(gang.rank)
    endpoint = {"IPAMConfig": {"IPv4Address": gang.address(gang.rank)}, "MacAddress": mac}
    # The first is how Docker was told until its API 1.44.
    return {"MacAddress": mac, "NetworkingConfig": {"EndpointsConfig": {plan.network: endpoint}}}


def _cpu_quota_us(spec: AttemptSpec) -> int:
    return max(1000, spec.cpu_milli * CPU_PERIOD_US // 1000) if spec.cpu_milli else 0


def _device_requests(gpus: Gpus) -> list[Json]:
    if gpus.cdi:
        return [{"Driver": "cdi", "DeviceIDs": list(gpus.cdi)}]
    if gpus.uuids:
        return [{"Driver": "nvidia", "DeviceIDs": list(gpus.uuids), "Capabilities": [["gpu", "compute", "utility"]]}]
    return []


def podman_body(plan: Plan) -> Json:
    """For POST /libpod/containers/create: Docker's call cannot ask Podman for a user namespace of this container."""
    spec, user = plan.spec, plan.user
    limits: Json = {"pids": {"limit": plan.pids_max or -1}}
    if spec.memory_bytes:
        limits["memory"] = {"limit": spec.memory_bytes, "swap": spec.memory_bytes}
    if spec.cpu_milli:
        limits["cpu"] = {"period": CPU_PERIOD_US, "quota": _cpu_quota_us(spec)}
    mounts: list[Json] = [
        _mount(
            "bind", str(source), target, ["rbind", "rw", "rprivate", "nosuid", "nodev", *([] if runs else ["noexec"])]
        )
        for source, target, runs in plan.binds
    ]
    mounts += [_mount("tmpfs", "tmpfs", path, _tmpfs_options(size)) for path, size in plan.tmpfs.items()]
    body: Json = {
        "image": plan.image.id,
        "hostname": HOSTNAME,
        "user": f"{user.inside}:{user.inside}",
        "entrypoint": ["/bin/sh", "-c", ENTRY, "dante"],
        "command": plan.arguments,
        "env": plan.environment,
        "unsetenv": plan.removed,
        "work_dir": WORK,
        "labels": dict(plan.labels),
        "healthconfig": {"Test": ["NONE"]},
        "read_only_filesystem": True,
        "no_new_privileges": True,
        "cap_drop": ["ALL"],
        "mounts": mounts,
        "image_volume_mode": "ignore",
        "shm_size": plan.shm_bytes,
        "resource_limits": limits,
        "r_limits": _rlimits(spec),
        "restart_policy": "no",
        "log_configuration": {"driver": "none"},
        "devices": [{"path": name} for name in plan.gpus.cdi],
        "cgroupns": {"nsmode": "private"},
    }
    if plan.seccomp_profile is not None:
        body["seccomp_profile_path"] = str(plan.seccomp_profile)
    if plan.network:
        gang = spec.gang
        own: Json = {} if gang is None else {
            "static_ips": [gang.address(gang.rank)], "static_mac": gang.mac(gang.rank)
        }  # fmt: skip
        body |= {"netns": {"nsmode": "bridge"}, "Networks": {plan.network: own}, "dns_server": list(plan.resolvers)}
        body["portmappings"] = [
            {"container_port": number, "host_port": machine_port, "host_ip": plan.publish_at, "protocol": "tcp"}
            for number, machine_port in plan.ports
        ]
    else:
        body["netns"] = {"nsmode": "none"}
    if user.mapped_from is not None:
        mapping = [{"container_id": 0, "host_id": user.mapped_from, "size": MAPPED_UIDS}]
        body |= {"userns": {"nsmode": "private"}, "idmappings": {"UIDMap": mapping, "GIDMap": mapping}}
    return body


def _mount(kind: str, source: str, target: str, options: Sequence[str]) -> Json:
    return {"type": kind, "source": source, "destination": target, "options": list(options)}


def _rlimits(spec: AttemptSpec) -> list[Json]:
    """Podman would raise the limits to its own defaults, which not every machine permits."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    open_files = MAX_OPEN_FILES if files == resource.RLIM_INFINITY else min(files, MAX_OPEN_FILES)
    wanted = (spec.pids_max or 4096) + _CONTAINER_PIDS
    count = wanted if processes == resource.RLIM_INFINITY else min(processes, wanted)
    return [
        {"type": "NOFILE", "soft": open_files, "hard": open_files},
        {"type": "NPROC", "soft": count, "hard": count},
        {"type": "CORE", "soft": 0, "hard": 0},
    ]
