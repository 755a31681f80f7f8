"""JobSpec between its REST form (what people write) and its protobuf form (what the platform computes with)."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, cast

from pydantic import ValidationError

from dantegpu.contracts.gen.dante.v1 import jobs_pb2
from dantegpu.contracts.rest.plain import plain_parts
from dantegpu.contracts.rest.spec import (
    MAX_JOBS_PER_CALL,
    Checkpoint,
    JobInput,
    JobList,
    JobSpec,
    RegistryAuth,
    Resources,
    Retry,
    Schedule,
    axis_text,
    exact_bytes,
)
from dantegpu.domain.arrays import Array, Axis
from dantegpu.domain.ports import Port
from dantegpu.domain.resources import parse_cpu_milli
from dantegpu.domain.units import MILLI_PER_UNIT, format_dgpu, format_duration, parse_dgpu, parse_duration, parse_memory


def spec_to_proto(spec: JobSpec) -> jobs_pb2.JobSpec:
    """`env` must be resolved. Nothing here can fail: the model has validated every part."""
    resources = spec.resources
    proto = jobs_pb2.JobSpec(
        name=spec.name,
        argv=spec.command,
        commands=spec.commands,
        env=spec.env,
        image=spec.image,
        entrypoint=spec.entrypoint,
        working_dir=spec.working_dir,
        resources=jobs_pb2.ResourceRequest(
            gpu=resources.gpu or "",
            cpu_milli=parse_cpu_milli(resources.cpu),
            memory_bytes=parse_memory(resources.memory),
            disk_bytes=parse_memory(resources.disk),
            shm_bytes=parse_memory(resources.shm_size) if resources.shm_size else 0,
        ),
        max_duration_seconds=parse_duration(spec.max_duration) if spec.max_duration else 0,
        priority=spec.priority,
        network=spec.network,
        labels=spec.labels,
        nodes=spec.nodes,
        ports=[jobs_pb2.Port(number=port.number, wished=port.wished) for port in map(Port.parse, spec.ports)],
        spot_policy="" if spec.spot_policy == "on-demand" else spec.spot_policy,
    )
    if spec.max_price is not None:
        proto.max_price_udgpu_per_gpu_hour = parse_dgpu(spec.max_price)
    if spec.retry is not None:
        seconds = parse_duration(spec.retry.duration) if spec.retry.duration else 0
        proto.retry.CopyFrom(jobs_pb2.RetryPolicy(on_events=spec.retry.on_events, duration_seconds=seconds))
    if spec.checkpoint is not None:
        saved = spec.checkpoint
        proto.checkpoint.path = saved.path.removeprefix("/work/")
        proto.checkpoint.signal = saved.signal
        proto.checkpoint.grace_seconds = parse_duration(saved.grace)
        proto.checkpoint.interval_seconds = parse_duration(saved.interval) if saved.interval else 0
    if spec.registry_auth is not None:
        auth = spec.registry_auth
        proto.registry_auth.CopyFrom(jobs_pb2.RegistryAuth(username=auth.username, password=auth.password))
    if spec.input is not None:
        proto.input_sha256 = spec.input.sha256
        proto.input_size_bytes = spec.input.size_bytes
    proto.after.extend(spec.after)
    if spec.deadline is not None and "T" in spec.deadline:
        proto.deadline.FromDatetime(datetime.fromisoformat(spec.deadline))
    elif spec.deadline is not None:
        proto.deadline_seconds = parse_duration(spec.deadline)
    if spec.schedule is not None:
        proto.schedule.cron = spec.schedule.cron
        proto.schedule.timezone = spec.schedule.timezone
    if spec.array is not None:
        proto.array.CopyFrom(_array_to_proto(spec.array, spec.max_parallel))
    return proto


COMMONS_MAX = 1000
COMMON_LENGTH_MAX = 4000


class SpecReader:
    """Job files to protobuf. What several jobs have in common is validated once, whatever each of them runs."""

    def __init__(self) -> None:
        self._commons: dict[tuple[str, str], jobs_pb2.JobSpec] = {}

    def read(self, document: object) -> jobs_pb2.JobSpec:
        """Raises pydantic's ValidationError."""
        parts = plain_parts(document)
        if parts is None:
            return spec_to_proto(JobSpec.model_validate(document))
        key = (parts.lines, repr(parts.common))
        common = self._commons.get(key)
        if common is None:
            common = spec_to_proto(JobSpec.model_validate({**parts.common, parts.lines: ["true"]}))
            del common.argv[:], common.commands[:]
            if len(self._commons) >= COMMONS_MAX:
                self._commons.clear()
            if len(key[1]) <= COMMON_LENGTH_MAX:
                self._commons[key] = common
        spec = jobs_pb2.JobSpec()
        spec.CopyFrom(common)
        spec.name = parts.name
        (spec.argv if parts.lines == "command" else spec.commands).extend(parts.run)
        if parts.env:
            spec.env.update(parts.env)
        return spec

    def read_many(self, document: "Mapping[str, object]") -> list[jobs_pb2.JobSpec]:
        """The same for a JobList's document. Raises pydantic's ValidationError, which names the place in the list."""
        found = cast("list[object]", document["jobs"] if isinstance(document["jobs"], list) else [])
        if len(document) == 1 and 1 <= len(found) <= MAX_JOBS_PER_CALL:
            try:
                return [self.read(each) for each in found]
            except ValidationError:
                pass  # what is wrong with the list as a whole is said below
        return [spec_to_proto(spec) for spec in JobList.model_validate(document).jobs]


def _array_to_proto(array: int | dict[str, str | list[str]], max_parallel: int | None) -> jobs_pb2.ArraySpec:
    if isinstance(array, int):
        return jobs_pb2.ArraySpec(size=array, max_parallel=max_parallel or 0)
    axes = [Axis.parse(name, values) for name, values in array.items()]
    return jobs_pb2.ArraySpec(
        size=Array.of(axes).size,
        axes=[
            jobs_pb2.ArrayAxis(name=axis.name, values=axis.values, first=axis.first, count=axis.count) for axis in axes
        ],
        max_parallel=max_parallel or 0,
    )


def spec_from_proto(proto: jobs_pb2.JobSpec) -> JobSpec:
    """What was accepted, in the words of the job file. Not validated again: it was when it came in."""
    asked = proto.resources
    whole, rest = divmod(asked.cpu_milli, MILLI_PER_UNIT)
    price = proto.max_price_udgpu_per_gpu_hour if proto.HasField("max_price_udgpu_per_gpu_hour") else None
    return JobSpec.model_construct(
        # Also what a proto does not have: for a default, pydantic inspects the signature of its factory each time.
        type="task",
        files=[],
        name=proto.name,
        image=proto.image,
        registry_auth=_auth_from_proto(proto),
        entrypoint=list(proto.entrypoint),
        working_dir=proto.working_dir,
        env=dict(proto.env),
        commands=list(proto.commands),
        command=list(proto.argv),
        resources=Resources.model_construct(
            gpu=asked.gpu or None,
            cpu=f"{whole}.{rest:03d}".rstrip("0") if rest else str(whole),
            memory=exact_bytes(asked.memory_bytes),
            disk=exact_bytes(asked.disk_bytes),
            shm_size=exact_bytes(asked.shm_bytes) if asked.shm_bytes else None,
        ),
        max_price=None if price is None else format_dgpu(price),
        max_duration=format_duration(proto.max_duration_seconds) if proto.max_duration_seconds else None,
        retry=_retry_from_proto(proto),
        priority=proto.priority,
        after=list(proto.after),
        deadline=_deadline_from_proto(proto),
        schedule=_schedule_from_proto(proto),
        array=_array_from_proto(proto),
        max_parallel=proto.array.max_parallel or None,
        input=_input_from_proto(proto),
        network=proto.network,
        ports=[str(Port(port.number, port.wished)) for port in proto.ports],
        labels=dict(proto.labels),
        nodes=max(proto.nodes, 1),
        spot_policy=_spot_policy_from_proto(proto),
        checkpoint=_checkpoint_from_proto(proto),
    )


def _spot_policy_from_proto(proto: jobs_pb2.JobSpec) -> Literal["spot", "on-demand", "auto"]:
    match proto.spot_policy:
        case "spot" | "auto" as asked:
            return asked
        case _:
            return "on-demand"


def _checkpoint_from_proto(proto: jobs_pb2.JobSpec) -> Checkpoint | None:
    if not proto.HasField("checkpoint"):
        return None
    saved = proto.checkpoint
    return Checkpoint.model_construct(
        path=f"/work/{saved.path}",
        signal=saved.signal or "SIGTERM",
        grace=format_duration(saved.grace_seconds),
        interval=format_duration(saved.interval_seconds) if saved.interval_seconds else None,
    )


def _auth_from_proto(proto: jobs_pb2.JobSpec) -> RegistryAuth | None:
    """Without the password: whoever may read the job need not know it."""
    if not proto.HasField("registry_auth"):
        return None
    return RegistryAuth.model_construct(username=proto.registry_auth.username, password="")


def array_of(proto: jobs_pb2.ArraySpec) -> Array:
    """Raises InvalidArray when it is none that can be run."""
    axes = [Axis(axis.name, tuple(axis.values), axis.first, axis.count) for axis in proto.axes]
    return Array.of(axes) if axes else Array.plain(proto.size)


def _array_from_proto(proto: jobs_pb2.JobSpec) -> int | dict[str, str | list[str]] | None:
    if not proto.HasField("array"):
        return None
    array = array_of(proto.array)
    return {axis.name: axis_text(axis) for axis in array.axes} or array.size


def _deadline_from_proto(proto: jobs_pb2.JobSpec) -> str | None:
    if proto.HasField("deadline"):
        return proto.deadline.ToDatetime(UTC).isoformat().replace("+00:00", "Z")
    return format_duration(proto.deadline_seconds) if proto.deadline_seconds else None


def _schedule_from_proto(proto: jobs_pb2.JobSpec) -> Schedule | None:
    if not proto.HasField("schedule"):
        return None
    return Schedule.model_construct(cron=proto.schedule.cron, timezone=proto.schedule.timezone)


def _retry_from_proto(proto: jobs_pb2.JobSpec) -> Retry | None:
    if not proto.HasField("retry"):
        return None
    seconds = proto.retry.duration_seconds
    return Retry.model_construct(
        on_events=list(proto.retry.on_events), duration=format_duration(seconds) if seconds else None
    )


def _input_from_proto(proto: jobs_pb2.JobSpec) -> JobInput | None:
    if not proto.input_sha256:
        return None
    return JobInput.model_construct(sha256=proto.input_sha256, size_bytes=proto.input_size_bytes)
