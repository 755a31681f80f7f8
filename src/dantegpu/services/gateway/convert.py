"""Protobuf of the services -> bodies of the REST API."""

import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from uuid import uuid4

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import TypeAdapter

from dantegpu.contracts.gen.dante.v1 import (
    auth_pb2,
    billing_pb2,
    jobs_pb2,
    machine_pb2,
    marketplace_pb2,
    monitoring_pb2,
    registry_pb2,
)
from dantegpu.contracts.rest import accounts, billing, jobs, machines
from dantegpu.contracts.rest.convert import spec_from_proto
from dantegpu.domain.job import JobState, Outcome


def when(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)


def when_set(timestamp: Timestamp) -> datetime | None:
    return timestamp.ToDatetime(UTC) if timestamp.seconds or timestamp.nanos else None


def job_state(state: "jobs_pb2.JobState.ValueType") -> JobState:
    return JobState(jobs_pb2.JobState.Name(state))


def _outcome(outcome: "jobs_pb2.Outcome.ValueType") -> Outcome | None:
    return Outcome(jobs_pb2.Outcome.Name(outcome).removeprefix("OUTCOME_").lower()) if outcome else None


def job(proto: jobs_pb2.Job) -> jobs.Job:
    return jobs.Job(
        id=proto.id,
        team_id=proto.team_id,
        user_id=proto.user_id,
        name=proto.spec.name,
        spec=spec_from_proto(proto.spec),
        state=job_state(proto.state),
        reason=proto.reason or None,
        reason_text=proto.reason_text or None,
        epoch=proto.epoch,
        outcome=_outcome(proto.outcome),
        exit_code=proto.exit_code if proto.HasField("exit_code") else None,
        message=proto.message,
        cost_udgpu=proto.cost_udgpu,
        settled=proto.settled,
        results_epoch=proto.results_epoch or None,
        results=[result_file(file) for file in proto.results],
        attempts=[attempt(each) for each in proto.attempts],
        array=_progress(proto.array) if proto.HasField("array") else None,
        array_id=proto.array_id or None,
        array_index=proto.array_index if proto.array_id else None,
        schedule_id=proto.schedule_id or None,
        created_at=when(proto.created_at),
        started_at=when_set(proto.started_at),
        ended_at=when_set(proto.ended_at),
    )


_MARKS: Mapping[str, str] = {name: f"m{uuid4().hex}" for name in ("id", "name", "env", "commands", "argv")}
_time_json = TypeAdapter(datetime).dump_json
_CREATED_AT = datetime(1971, 1, 1, tzinfo=UTC) + timedelta(microseconds=10 * secrets.randbelow(10**13) + 1)
"""Stands for the time of a submission, as the marks stand for texts: nobody can know them and write them himself."""
_CREATED_TEXT = _time_json(_CREATED_AT).decode().strip('"')
_MARK = re.compile("|".join((
    f'"({_MARKS["id"]})"', f'"({_MARKS["name"]})"', f'{{"({_MARKS["env"]})":""}}',
    f'\\["({_MARKS["commands"]})"\\]', f'\\["({_MARKS["argv"]})"\\]', f'"({re.escape(_CREATED_TEXT)})"',
)))  # fmt: skip
_NUMBERS = {mark: number for number, mark in enumerate((*_MARKS.values(), _CREATED_TEXT))}


_string = json.encoder.encode_basestring
"""A JSON string, as pydantic writes it."""


@lru_cache(maxsize=1000)
def _time_text(seconds: int, nanos: int) -> str:
    """Of jobs that are submitted together it is the same."""
    return _time_json(when(Timestamp(seconds=seconds, nanos=nanos))).decode()


MAX_BODIES = 200
MAX_COMMON_BYTES = 4096


class NewJobsJson:
    """Bodies of jobs that were just submitted: what many of them have in common is written out once."""

    def __init__(self) -> None:
        self._bodies: OrderedDict[tuple[bool, bool, bytes], list[str | int]] = OrderedDict()

    def many(self, protos: Iterable[jobs_pb2.Job]) -> str:
        """The body of Jobs. The messages are used up."""
        return f'{{"jobs":[{",".join(map(self.one, protos))}]}}'

    def one(self, proto: jobs_pb2.Job) -> str:
        """The body of Job. The message is used up."""
        spec = proto.spec
        env, commands, argv, time = spec.env, spec.commands, spec.argv, proto.created_at
        texts = (
            _string(proto.id),
            _string(spec.name),
            f"{{{','.join([f'{_string(name)}:{_string(env[name])}' for name in env])}}}" if env else "{}",
            f"[{','.join(map(_string, commands))}]",
            f"[{','.join(map(_string, argv))}]",
            _time_text(time.seconds, time.nanos),
        )
        given = bool(commands), bool(argv)
        proto.id = spec.name = ""
        # Not ClearField: what has been looked at would be copied first.
        time.seconds = time.nanos = 0
        if env:
            env.clear()
        del commands[:], argv[:]
        body = self._body(proto, commands=given[0], argv=given[1])
        return "".join([part if isinstance(part, str) else texts[part] for part in body])

    def _body(self, proto: jobs_pb2.Job, *, commands: bool, argv: bool) -> list[str | int]:
        common = (commands, argv, proto.SerializeToString())
        body = self._bodies.pop(common, None) or _body_of(proto, commands=commands, argv=argv)
        if len(common[2]) <= MAX_COMMON_BYTES and not proto.spec.HasField("registry_auth"):
            self._bodies[common] = body
            if len(self._bodies) > MAX_BODIES:
                self._bodies.popitem(last=False)
        return body


def _body_of(proto: jobs_pb2.Job, *, commands: bool, argv: bool) -> list[str | int]:
    """The JSON of a job in pieces; between them the numbers of what is its own."""
    proto.id, proto.spec.name = _MARKS["id"], _MARKS["name"]
    proto.created_at.FromDatetime(_CREATED_AT)
    proto.spec.env[_MARKS["env"]] = ""
    proto.spec.commands.extend([_MARKS["commands"]] if commands else [])
    proto.spec.argv.extend([_MARKS["argv"]] if argv else [])
    pieces = [piece for piece in _MARK.split(job(proto).model_dump_json()) if piece]
    return [_NUMBERS.get(piece, piece) for piece in pieces]


def schedule(proto: jobs_pb2.Schedule) -> jobs.Schedule:
    return jobs.Schedule(
        id=proto.id,
        team_id=proto.team_id,
        user_id=proto.user_id,
        name=proto.spec.name,
        spec=spec_from_proto(proto.spec),
        next_at=when_set(proto.next_at),
        last_job_id=proto.last_job_id or None,
        runs=proto.runs,
        created_at=when(proto.created_at),
        stopped_at=when_set(proto.stopped_at),
    )


def _progress(proto: jobs_pb2.ArrayProgress) -> jobs.ArrayProgress:
    ended = proto.succeeded + proto.failed + proto.cancelled
    return jobs.ArrayProgress(
        size=proto.size,
        created=proto.created,
        waiting=proto.size - ended - proto.placed - proto.starting - proto.running - proto.stopping,
        placed=proto.placed,
        starting=proto.starting,
        running=proto.running,
        stopping=proto.stopping,
        succeeded=proto.succeeded,
        failed=proto.failed,
        cancelled=proto.cancelled,
        max_parallel=proto.max_parallel or None,
    )


def result_file(proto: jobs_pb2.ResultFile) -> jobs.ResultFile:
    return jobs.ResultFile(path=proto.path, size_bytes=proto.size_bytes, sha256=proto.sha256)


def attempt(proto: jobs_pb2.Attempt) -> jobs.Attempt:
    return jobs.Attempt(
        id=proto.id,
        job_id=proto.job_id,
        epoch=proto.epoch,
        node_rank=proto.node_rank,
        machine_id=proto.machine_id,
        state=job_state(proto.state),
        outcome=_outcome(proto.outcome),
        exit_code=proto.exit_code if proto.HasField("exit_code") else None,
        message=proto.message,
        rate_udgpu_per_hour=proto.rate_udgpu_per_hour,
        billed_seconds=proto.billed_seconds,
        cost_udgpu=proto.cost_udgpu,
        device_ids=list(proto.device_ids),
        simulated=proto.simulated,
        sandbox=proto.sandbox,
        spot=proto.spot,
        checkpointed_at=when_set(proto.checkpointed_at),
        resumed_epoch=proto.resumed_epoch or None,
        ports=[
            jobs.PublishedPort(number=port.number, address=port.address, machine_port=port.machine_port)
            for port in proto.ports
        ],
        created_at=when(proto.created_at),
        started_at=when_set(proto.started_at),
        ended_at=when_set(proto.ended_at),
    )


def job_event(proto: jobs_pb2.JobEvent) -> jobs.JobEvent:
    return jobs.JobEvent(
        job_id=proto.job_id,
        seq=proto.seq,
        state=job_state(proto.state),
        type=proto.type,
        message=proto.message,
        attempt_id=proto.attempt_id or None,
        occurred_at=when(proto.occurred_at),
    )


def metrics(job_id: str, proto: monitoring_pb2.ReadMetricsResponse) -> jobs.Metrics:
    points = [_metrics_point(point, proto.interval_seconds) for point in proto.points]
    return jobs.Metrics(
        job_id=job_id, epoch=proto.epoch, interval_seconds=proto.interval_seconds, step=proto.step, points=points
    )


def _metrics_point(proto: machine_pb2.MetricsPoint, interval_seconds: float) -> jobs.MetricsPoint:
    return jobs.MetricsPoint(
        number=proto.number,
        elapsed_seconds=proto.number * interval_seconds,
        cpu_cores=proto.cpu_cores if proto.HasField("cpu_cores") else None,
        memory_bytes=proto.memory_bytes if proto.HasField("memory_bytes") else None,
        read_bytes_per_second=proto.read_bytes_per_second if proto.HasField("read_bytes_per_second") else None,
        written_bytes_per_second=proto.written_bytes_per_second if proto.HasField("written_bytes_per_second") else None,
        processes=proto.processes,
        devices=[
            jobs.DeviceUse(
                index=use.index,
                gpu_utilisation=use.gpu_utilisation,
                vram_used_bytes=use.vram_used_bytes,
                memory_utilisation=use.memory_utilisation,
                temperature_celsius=use.temperature_celsius,
                power_watts=use.power_watts,
                throttle_reasons=list(use.throttle_reasons),
            )
            for use in proto.devices
        ],
    )


def explanation(proto: jobs_pb2.Explanation) -> jobs.Explanation:
    return jobs.Explanation(
        job_id=proto.job_id,
        reason=proto.reason or None,
        reason_text=proto.reason_text or None,
        machines_total=proto.machines_total,
        machines_fitting=proto.machines_fitting,
        machines_free=proto.machines_free,
        constraints=[
            jobs.Constraint(constraint=each.constraint, machines_excluded=each.machines_excluded, text=each.text)
            for each in proto.constraints
        ],
        relaxations=[
            jobs.Relaxation(
                field=each.field,
                from_value=getattr(each, "from"),
                to_value=each.to,
                machines=each.machines,
                available_now=each.available_now,
                machines_free=each.machines_free,
            )
            for each in proto.relaxations
        ],
    )


def machine(proto: registry_pb2.Machine) -> machines.Machine:
    inventory = proto.inventory
    use = {each.index: each for each in proto.device_utilisation}
    status = registry_pb2.MachineStatus.Name(proto.status).removeprefix("MACHINE_").lower()
    intent = registry_pb2.MachineIntent.Name(proto.intent).removeprefix("INTENT_").lower()
    return machines.Machine(
        id=proto.id,
        team_id=proto.team_id,
        hostname=inventory.hostname,
        status=machines.MachineStatus(status),
        intent=machines.MachineIntent(intent) if proto.intent else None,
        cpu_milli=inventory.cpu_milli,
        memory_bytes=inventory.memory_bytes,
        disk_bytes=inventory.disk_bytes,
        os=inventory.os,
        kernel=inventory.kernel,
        driver_version=inventory.driver_version,
        cuda_version=inventory.cuda_version,
        devices=[_device(each, use.get(each.index)) for each in inventory.devices],
        sandbox=inventory.sandbox,
        executors=list(inventory.executors),
        limits_missing=list(inventory.limits_missing),
        container_engine=inventory.container_engine,
        allowed_images=list(inventory.allowed_images),
        networks=list(inventory.networks),
        site=inventory.site,
        daemon_version=inventory.daemon_version,
        region=inventory.region,
        simulated=inventory.simulated,
        shares_devices=inventory.shares_devices,
        closed=inventory.closed,
        benchmark=_benchmark(inventory.benchmark) if inventory.HasField("benchmark") else None,
        running_attempts=proto.running_attempts,
        cpu_utilisation=proto.cpu_utilisation,
        memory_used_bytes=proto.memory_used_bytes,
        joined_at=when(proto.joined_at),
        last_heartbeat_at=when_set(proto.last_heartbeat_at),
    )


def quarantine(proto: jobs_pb2.Quarantine) -> machines.Quarantine:
    return machines.Quarantine(
        machine_id=proto.machine_id, reason=proto.reason, since=when(proto.since), until=when(proto.until)
    )


def _benchmark(proto: machine_pb2.Benchmark) -> machines.Benchmark:
    return machines.Benchmark(
        measured_at=datetime.fromtimestamp(proto.measured_at_unix_s, UTC),
        cpu_gflops=proto.cpu_gflops,
        memory_gbps=proto.memory_gbps,
        disk_write_mbps=proto.disk_write_mbps,
        disk_read_mbps=proto.disk_read_mbps,
        network_up_mbps=proto.network_up_mbps,
        network_down_mbps=proto.network_down_mbps,
        problem=proto.problem,
        score=proto.score,
    )


def _device_benchmark(proto: machine_pb2.DeviceBenchmark) -> machines.DeviceBenchmark:
    return machines.DeviceBenchmark(
        fp32_tflops=proto.fp32_tflops,
        bf16_tflops=proto.bf16_tflops,
        memory_gbps=proto.memory_gbps,
        pcie_gbps=proto.pcie_gbps,
        vram_checked_bytes=proto.vram_checked_bytes,
        score=proto.score,
    )


def _device(proto: machine_pb2.Device, use: machine_pb2.DeviceUtilisation | None) -> machines.Device:
    return machines.Device(
        id=proto.id,
        index=proto.index,
        model=proto.model,
        uuid=proto.uuid,
        vram_bytes=proto.vram_bytes,
        compute_capability=proto.compute_capability,
        simulated=proto.simulated,
        problem=proto.problem,
        vendor=proto.vendor,
        mig_profile=proto.mig_profile,
        pcie_generation=proto.pcie_generation,
        pcie_width=proto.pcie_width,
        power_limit_watts=proto.power_limit_watts,
        ecc=proto.ecc,
        benchmark=_device_benchmark(proto.benchmark) if proto.benchmark.score else None,
        gpu_utilisation=use.gpu_utilisation if use else None,
        vram_used_bytes=use.vram_used_bytes if use else None,
        temperature_celsius=use.temperature_celsius if use else None,
        power_watts=use.power_watts if use else None,
        memory_utilisation=use.memory_utilisation if use else None,
        throttle_reasons=list(use.throttle_reasons) if use else [],
        processes=use.processes if use else None,
    )


def inventory_to_proto(report: machines.InventoryReport) -> machine_pb2.Inventory:
    return machine_pb2.Inventory(
        hostname=report.hostname,
        cpu_milli=report.cpu_milli,
        memory_bytes=report.memory_bytes,
        disk_bytes=report.disk_bytes,
        os=report.os,
        kernel=report.kernel,
        driver_version=report.driver_version,
        cuda_version=report.cuda_version,
        devices=[
            machine_pb2.Device(
                index=device.index,
                model=device.model,
                uuid=device.uuid,
                vram_bytes=device.vram_bytes,
                compute_capability=device.compute_capability,
                pcie_bus_id=device.pcie_bus_id,
                simulated=device.simulated,
            )
            for device in report.devices
        ],
        sandbox=report.sandbox,
        executors=report.executors,
        limits_missing=report.limits_missing,
        container_engine=report.container_engine,
        allowed_images=report.allowed_images,
        networks=report.networks,
        site=report.site,
        daemon_version=report.daemon_version,
        region=report.region,
        simulated=report.simulated,
        shares_devices=report.shares_devices,
    )


def ask(proto: marketplace_pb2.Ask) -> machines.Ask:
    return machines.Ask(
        machine_id=proto.machine_id,
        price_udgpu_per_gpu_hour=proto.price_udgpu_per_gpu_hour,
        price_udgpu_per_cpu_hour=proto.price_udgpu_per_cpu_hour,
        updated_at=when_set(proto.updated_at),
    )


def offer(proto: marketplace_pb2.Offer) -> machines.Offer:
    return machines.Offer(machine=machine(proto.machine), ask=ask(proto.ask), rentable=proto.rentable)


def wallet(proto: billing_pb2.Wallet) -> billing.Wallet:
    return billing.Wallet(
        team_id=proto.team_id,
        balance_udgpu=proto.balance_udgpu,
        held_udgpu=proto.held_udgpu,
        available_udgpu=proto.available_udgpu,
        earned_udgpu=proto.earned_udgpu,
    )


def entry(proto: billing_pb2.Entry) -> billing.Entry:
    return billing.Entry(
        transfer_id=proto.transfer_id,
        kind=proto.kind,
        amount_udgpu=proto.amount_udgpu,
        balance_after_udgpu=proto.balance_after_udgpu,
        job_id=proto.job_id or None,
        attempt_id=proto.attempt_id or None,
        text=proto.text,
        created_at=when(proto.created_at),
    )


def receipt(proto: billing_pb2.Receipt) -> billing.Receipt:
    return billing.Receipt(
        job_id=proto.job_id,
        payer_team_id=proto.payer_team_id,
        total_udgpu=proto.total_udgpu,
        lines=[
            billing.ReceiptLine(
                attempt_id=line.attempt_id,
                window=line.window,
                rate_udgpu_per_hour=line.rate_udgpu_per_hour,
                used_seconds=line.used_seconds,
                charged_udgpu=line.charged_udgpu,
                provider_udgpu=line.provider_udgpu,
                fee_udgpu=line.fee_udgpu,
                closed_at=when_set(line.closed_at),
                open=line.open,
            )
            for line in proto.lines
        ],
    )


def user(proto: auth_pb2.User) -> accounts.User:
    return accounts.User(id=proto.id, email=proto.email, operator=proto.operator, created_at=when(proto.created_at))


def team(proto: auth_pb2.Team) -> accounts.Team:
    return accounts.Team(id=proto.id, name=proto.name, role=proto.role, created_at=when(proto.created_at))


def api_key(proto: auth_pb2.ApiKey) -> accounts.ApiKey:
    return accounts.ApiKey(
        id=proto.id,
        name=proto.name,
        team_id=proto.team_id,
        prefix=proto.prefix,
        scopes=list(proto.scopes),
        created_at=when(proto.created_at),
        expires_at=when_set(proto.expires_at),
        last_used_at=when_set(proto.last_used_at),
        revoked_at=when_set(proto.revoked_at),
    )


def tokens(proto: auth_pb2.TokenPair) -> accounts.Tokens:
    return accounts.Tokens(
        access_token=proto.access_token,
        expires_in_seconds=proto.expires_in_seconds,
        refresh_token=proto.refresh_token,
    )
