"""The scheduler's tables in memory: one function per query of services/scheduler/sql/queries.sql."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg import errors as pg

from dantegpu.services.scheduler.module import MIGRATIONS
from dantegpu.services.scheduler.store import QUERIES
from tests.simulation.memory.columns import columns_of, defaults_of, records, typed
from tests.simulation.memory.engine import Handler, MemoryTx, Row, Schema, Table
from tests.simulation.memory.kit import KIT_STATEMENTS, kit_tables
from tests.simulation.memory.lifetimes import LIFETIME_STATEMENTS
from tests.simulation.memory.preemptions import PREEMPTION_STATEMENTS
from tests.simulation.memory.quarantines import QUARANTINE_STATEMENTS
from tests.simulation.memory.upkeep import UPKEEP_STATEMENTS

LIVE = frozenset({"PLACED", "STARTING", "RUNNING", "STOPPING"})
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
_COLUMNS = columns_of(MIGRATIONS)
_STATEMENTS: dict[str, Handler] = {}
_OTHERS = {**LIFETIME_STATEMENTS, **QUARANTINE_STATEMENTS, **PREEMPTION_STATEMENTS, **UPKEEP_STATEMENTS}


def scheduler_schema() -> Schema:
    """Fresh and empty."""
    jobs = Table(
        "jobs",
        ("id",),
        defaults_of(_COLUMNS["jobs"]),
        checks={
            "state": lambda row: row["state"] in LIVE | TERMINAL | {"QUEUED"},
            "priority": lambda row: 0 <= row["priority"] <= 100,
            "cost_udgpu": lambda row: row["cost_udgpu"] >= 0,
            "live_has_attempt": lambda row: (row["state"] in LIVE) == (row["attempt_id"] is not None),
            "attempt_has_machine": lambda row: (row["attempt_id"] is None) == (row["machine_id"] is None),
            "queued_has_reason": lambda row: (row["state"] == "QUEUED") == (row["reason"] is not None),
            "terminal_has_end": lambda row: (row["state"] in TERMINAL) == (row["ended_at"] is not None),
        },
    )
    attempts = Table(
        "attempts",
        ("id",),
        defaults_of(_COLUMNS["attempts"]),
        checks={
            "epoch": lambda row: row["epoch"] > 0,
            "amounts": lambda row: min(row["cpu_milli"], row["memory_bytes"], row["disk_bytes"]) >= 0,
            "rate": lambda row: row["rate_udgpu_per_hour"] >= 0 and row["max_duration_seconds"] > 0,
            "billed_seconds": lambda row: row["billed_seconds"] >= 0,
            "windows_opened": lambda row: row["windows_opened"] > 0,
            "windows_closed": lambda row: 0 <= row["windows_closed"] <= row["windows_opened"],
            "cost_udgpu": lambda row: row["cost_udgpu"] >= 0,
            "settled": lambda row: not row["settled"] or row["ended_at"] is not None,
            "node_rank": lambda row: 0 <= row["node_rank"] < row["nodes"],
            "checkpoint_slot": lambda row: row["checkpoint_slot"] in (0, 1),
            "checkpointed_at": lambda row: (row["checkpoint_number"] == 0) == (row["checkpointed_at"] is None),
            "checkpoint": lambda row: row["checkpoint_sha256"] is None or row["checkpoint_number"] > 0,
        },
        uniques={
            "attempts_job_id_epoch_node_rank_key": lambda row: (row["job_id"], row["epoch"], row["node_rank"]),
            "attempts_one_live_per_node": lambda row: (
                (row["job_id"], row["node_rank"]) if row["ended_at"] is None else None
            ),
            "attempts_one_live_per_machine": lambda row: (
                (row["job_id"], row["machine_id"]) if row["ended_at"] is None and row["nodes"] > 1 else None
            ),
        },
    )
    usage = Table("device_usage", ("device_id",), checks={"leased_milli": lambda row: 0 <= row["leased_milli"] <= 1000})
    leases = Table(
        "device_leases",
        ("attempt_id", "device_id"),
        defaults_of(_COLUMNS["device_leases"]),
        checks={"milli": lambda row: 1 <= row["milli"] <= 1000},
    )
    machines = Table("machines", ("machine_id",), defaults_of(_COLUMNS["machines"]))
    events = Table("job_events", ("job_id", "seq"))
    after = Table("job_after", ("job_id", "after_id"))
    claims = Table("claims", ("job_id", "node_rank"), checks={"node_rank": lambda row: row["node_rank"] >= 0})
    quarantines = Table(
        "quarantines",
        ("machine_id",),
        defaults_of(_COLUMNS["quarantines"]),
        checks={"until": lambda row: row["until"] >= row["since"]},
    )
    return Schema(
        "scheduler",
        [*kit_tables(), jobs, attempts, usage, leases, machines, events, after, quarantines, claims],
        {**KIT_STATEMENTS, **_OTHERS, **_STATEMENTS},
    )


def statement(name: str) -> Callable[[Handler], Handler]:
    """The function below is the query `name` in memory."""

    def keep(handler: Handler) -> Handler:
        _STATEMENTS[QUERIES[name]] = handler
        return handler

    return keep


def _rows(tx: MemoryTx, table: str, ids: Iterable[UUID]) -> list[Row]:
    found = (tx.get(table, (row_id,)) for row_id in dict.fromkeys(ids))
    return [row for row in found if row is not None]


async def _locked(tx: MemoryTx, table: str, ids: Iterable[UUID]) -> list[Row]:
    keys = sorted((row["id"],) for row in _rows(tx, table, ids))
    await tx.lock(table, keys)
    return _rows(tx, table, [key[0] for key in keys])


def _only(rows: Iterable[Row], *columns: str) -> list[Row]:
    return [{column: row[column] for column in columns} for row in rows]


def _seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


# --- jobs -------------------------------------------------------------------------------------------------------------


@statement("insert_jobs")
async def _insert_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    for job_id, spec, priority in zip(params["ids"], params["specs"], params["priorities"], strict=True):
        shared = {name: params[name] for name in ("team_id", "user_id", "submitted_at", "traceparent")}
        row = {"id": job_id, "spec": spec, "priority": priority, "state": "QUEUED", "reason": "new", "event_seq": 1}
        await tx.insert("jobs", shared | row)
        event = {"job_id": job_id, "seq": 1, "state": "QUEUED", "type": "submitted", "message": "", "attempt_id": None}
        await tx.insert("job_events", event | {"occurred_at": params["submitted_at"]})
    return len(params["ids"])


@statement("jobs_by_id")
async def _jobs_by_id(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return _rows(tx, "jobs", params["ids"])


@statement("lock_job_ids")
async def _lock_job_ids(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return _only(await _locked(tx, "jobs", params["ids"]), "id")


@statement("lock_jobs")
async def _lock_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return await _locked(tx, "jobs", params["ids"])


@statement("list_jobs")
async def _list_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = [
        row
        for row in tx.scan("jobs")
        if params["team_id"] in (None, row["team_id"])
        and (params["before"] is None or row["id"] < params["before"])
        and row["array_id"] is None
        and (params["states"] is None or row["state"] in params["states"])
    ]
    return sorted(found, key=lambda row: row["id"], reverse=True)[: params["limit"]]


@statement("queued_jobs")
async def _queued_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    waiting = sorted(
        (row for row in tx.scan("jobs") if row["state"] == "QUEUED"), key=lambda row: (row["submitted_at"], row["id"])
    )
    if params["after_time"] != "-infinity":
        after = (params["after_time"], params["after_id"])
        waiting = [row for row in waiting if (row["submitted_at"], row["id"]) > after]
    return waiting[: params["limit"]]


@statement("queued_ids")
async def _queued_ids(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    ids = sorted(row["id"] for row in tx.scan("jobs") if row["state"] == "QUEUED" and row["id"] > params["after_id"])
    return [{"id": job_id} for job_id in ids[: params["limit"]]]


@statement("save_jobs")
async def _save_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = [typed(_COLUMNS["jobs"], record) for record in records(params["rows"])]
    await tx.lock("jobs", sorted((row["id"],) for row in new))
    for row in new:
        known = tx.get("jobs", (row["id"],))
        if known is not None:
            tx.update("jobs", known, **row)
    return len(new)


@statement("insert_events")
async def _insert_events(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = [typed(_COLUMNS["job_events"], record) for record in records(params["rows"])]
    for row in new:
        await tx.insert("job_events", row)
    return len(new)


@statement("events_after")
async def _events_after(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = [row for row in tx.scan("job_events") if row["job_id"] == params["job_id"] and row["seq"] > params["after"]]
    return sorted(found, key=lambda row: row["seq"])[: params["limit"]]


# --- attempts ---------------------------------------------------------------------------------------------------------


@statement("insert_attempts")
async def _insert_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    now: datetime = params["now"]
    opened = {
        "state": "PLACED", "created_at": now, "lease_renewed_at": now,
        "lease_expires_at": now + _seconds(params["lease_seconds"]),
    }  # fmt: skip
    new = [typed(_COLUMNS["attempts"], record) for record in records(params["rows"])]
    for row in new:
        await tx.insert("attempts", row | opened)
    for row in new:
        if row["nodes"] > 1 and not gang_is_whole(tx, row):
            raise pg.CheckViolation(f"job {row['job_id']} has {row['nodes']} nodes; all of an epoch are placed at once")
    return len(new)


def gang_is_whole(tx: MemoryTx, new: Row) -> bool:
    """The trigger attempts_gang_is_whole."""
    mine = [row for row in tx.scan("attempts") if row["job_id"] == new["job_id"]]
    whole = sum(row["epoch"] == new["epoch"] and row["nodes"] == new["nodes"] for row in mine) == new["nodes"]
    return whole and all(row["ended_at"] is not None for row in mine if row["epoch"] != new["epoch"])


@statement("lease_devices")
async def _lease_devices(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    sums: dict[UUID, int] = {}
    for record in records(params["rows"]):
        row = typed(_COLUMNS["device_leases"], record)
        await tx.insert("device_leases", row)
        sums[row["device_id"]] = sums.get(row["device_id"], 0) + row["milli"]
    for device_id in sorted(sums):
        await tx.lock("device_usage", [(device_id,)])
        known = tx.get("device_usage", (device_id,))
        if known is None:
            await tx.insert("device_usage", {"device_id": device_id, "leased_milli": sums[device_id]})
        else:
            tx.update("device_usage", known, leased_milli=known["leased_milli"] + sums[device_id])
    return len(sums)


@statement("release_devices")
async def _release_devices(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    wanted = set(params["attempt_ids"])
    held = [row for row in tx.scan("device_leases") if row["attempt_id"] in wanted and not row["released"]]
    await tx.lock("device_leases", [(row["attempt_id"], row["device_id"]) for row in held])
    freed: dict[UUID, int] = {}
    for row in held:
        now = tx.get("device_leases", (row["attempt_id"], row["device_id"]))
        if now is not None and not now["released"]:
            tx.update("device_leases", now, released=True)
            freed[row["device_id"]] = freed.get(row["device_id"], 0) + row["milli"]
    await tx.lock("device_usage", sorted((device_id,) for device_id in freed))
    for device_id, milli in freed.items():
        known = tx.get("device_usage", (device_id,))
        if known is not None:
            tx.update("device_usage", known, leased_milli=known["leased_milli"] - milli)
    return len(freed)


@statement("save_attempts")
async def _save_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = [typed(_COLUMNS["attempts"], record) for record in records(params["rows"])]
    await tx.lock("attempts", sorted((row["id"],) for row in new))
    saved = 0
    for row in new:
        known = tx.get("attempts", (row["id"],))
        if known is None or known["ended_at"] is not None:
            continue
        kept = {
            name: known[name] if row.get(name) is None else row[name]
            for name in ("stop_reason", "message", "results", "sandbox", "report_seq")
        }
        first = {
            name: row.get(name) if known[name] is None else known[name] for name in ("stop_requested_at", "running_at")
        }
        zero = {"billed_seconds": row.get("billed_seconds") or 0, "silent": row.get("silent") or False}
        tx.update("attempts", known, **(row | kept | first | zero))
        saved += 1
    return saved


@statement("save_ports")
async def _save_ports(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = [typed(_COLUMNS["attempts"], record) for record in records(params["rows"])]
    await tx.lock("attempts", sorted((row["id"],) for row in new))
    live = [(tx.get("attempts", (row["id"],)), row) for row in new]
    for known, row in live:
        if known is not None and known["ended_at"] is None:
            tx.update("attempts", known, ports=row["ports"])
    return len(live)


@statement("attempts_by_id")
async def _attempts_by_id(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return _rows(tx, "attempts", params["ids"])


@statement("lock_attempts")
async def _lock_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return await _locked(tx, "attempts", params["ids"])


@statement("attempts_of_jobs")
async def _attempts_of_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    wanted = set(params["job_ids"])
    found = [row for row in tx.scan("attempts") if row["job_id"] in wanted]
    return sorted(found, key=lambda row: (row["job_id"], row["epoch"], row["node_rank"]))


@statement("gang_nodes")
async def _gang_nodes(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    epochs = {row["id"]: row["epoch"] for row in _rows(tx, "jobs", params["job_ids"])}
    found = [row for row in tx.scan("attempts") if epochs.get(row["job_id"]) == row["epoch"]]
    return sorted(found, key=lambda row: (row["job_id"], row["node_rank"]))


@statement("leases_of_attempts")
async def _leases_of_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    wanted = set(params["attempt_ids"])
    found = [row for row in tx.scan("device_leases") if row["attempt_id"] in wanted]
    found.sort(key=lambda row: (row["attempt_id"], row["device_index"]))
    return [{name: row[name] for name in ("attempt_id", "device_id", "device_index", "milli")} for row in found]


def may_renew(row: Row, params: Mapping[str, Any]) -> bool:
    """Whether the query renew_leases renews this attempt's lease."""
    now: datetime = params["now"]
    asked = row["stop_requested_at"]
    return (
        row["machine_id"] == params["machine_id"]
        and row["ended_at"] is None
        and row["lease_expires_at"] > now
        and (asked is None or asked + _seconds(params["stop_timeout_seconds"]) > now)
    )


@statement("renew_leases")
async def _renew_leases(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    asked = set(zip(params["ids"], params["epochs"], strict=True))
    keys = sorted(
        (row["id"],) for row in tx.scan("attempts") if (row["id"], row["epoch"]) in asked and may_renew(row, params)
    )
    await tx.lock("attempts", keys)
    now: datetime = params["now"]
    renewed = 0
    for key in keys:
        row = tx.get("attempts", key)
        if row is not None and may_renew(row, params):
            expires_at = now + _seconds(params["lease_seconds"])
            tx.update("attempts", row, lease_renewed_at=now, lease_expires_at=expires_at)
            renewed += 1
    return renewed


@statement("out_of_lease")
async def _out_of_lease(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return [
        {"id": row["id"]} for row in _rows(tx, "attempts", params["ids"]) if row["lease_expires_at"] <= params["now"]
    ]


@statement("report_positions")
async def _report_positions(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    jobs = [row for row in _rows(tx, "jobs", params["job_ids"]) if row["machine_id"] == params["machine_id"]]
    wanted = set(params["job_ids"])
    nodes = [
        row
        for row in tx.scan("attempts")
        if row["job_id"] in wanted
        and row["machine_id"] == params["machine_id"]
        and row["ended_at"] is None
        and row["nodes"] > 1
    ]
    return [{"id": row["attempt_id"], "report_seq": row["report_seq"]} for row in jobs] + [
        {"id": row["id"], "report_seq": row["report_seq"]} for row in nodes
    ]


@statement("resolve_attempts")
async def _resolve_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    names = ("id", "job_id", "team_id", "machine_id", "epoch", "node_rank")
    return [
        {name: row[name] for name in names} | {"live": row["ended_at"] is None}
        for row in _rows(tx, "attempts", params["ids"])
    ]


@statement("attempts_to_settle")
async def _attempts_to_settle(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return [{"id": row["id"]} for row in _rows(tx, "attempts", params["ids"]) if not row["settled"]]


# --- machines ---------------------------------------------------------------------------------------------------------


_DESIRED = ("id", "job_id", "team_id", "epoch", "machine_id", "stop_reason", "lease_expires_at", "node_rank")


def _machines(tx: MemoryTx, attempt: Row) -> list[UUID]:
    if attempt["nodes"] == 1:
        return []
    same = (attempt["job_id"], attempt["epoch"])
    nodes = [row for row in tx.scan("attempts") if (row["job_id"], row["epoch"]) == same]
    return [row["machine_id"] for row in sorted(nodes, key=lambda row: row["node_rank"])]


@statement("desired_attempts")
async def _desired_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    wanted = set(params["machine_ids"])
    return _desired(tx, (row for row in tx.scan("attempts") if row["machine_id"] in wanted), params["now"])


def _desired(tx: MemoryTx, attempts: Iterable[Row], now: datetime) -> list[Row]:
    found: list[Row] = []
    for row in attempts:
        if row["ended_at"] is None and row["lease_expires_at"] > now:
            job = tx.get("jobs", (row["job_id"],))
            if job is not None:
                of_job = {"spec": job["spec"], "traceparent": job["traceparent"], "first_attempt_id": job["attempt_id"]}
                found.append({name: row[name] for name in _DESIRED} | of_job | {"node_machines": _machines(tx, row)})
    return sorted(found, key=lambda row: row["id"])


@statement("bump_machines")
async def _bump_machines(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    revisions: list[Row] = []
    for machine_id in sorted(params["machine_ids"]):
        await tx.lock("machines", [(machine_id,)])
        known = tx.get("machines", (machine_id,))
        if known is None:
            await tx.insert("machines", {"machine_id": machine_id, "desired_revision": 1})
        else:
            tx.update("machines", known, desired_revision=known["desired_revision"] + 1)
        revision = known["desired_revision"] + 1 if known is not None else 1
        revisions.append({"machine_id": machine_id, "desired_revision": revision})
    return revisions


@statement("machine_revisions")
async def _machine_revisions(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = (tx.get("machines", (machine_id,)) for machine_id in params["machine_ids"])
    return [{name: row[name] for name in ("machine_id", "desired_revision")} for row in found if row is not None]


@statement("live_leases")
async def _live_leases(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    devices: dict[UUID, list[Row]] = {}
    for row in tx.scan("device_leases"):
        devices.setdefault(row["attempt_id"], []).append(row)
    names = (
        "machine_id", "team_id", "cpu_milli", "memory_bytes", "disk_bytes", "running_at", "max_duration_seconds",
    )  # fmt: skip
    found: list[Row] = []
    for row in tx.scan("attempts"):
        if row["ended_at"] is None:
            held = sorted(devices.get(row["id"], []), key=lambda it: it["device_index"])
            ids = {"device_ids": [it["device_id"] for it in held], "millis": [it["milli"] for it in held]}
            of_attempt = {"attempt_id": row["id"], "stopping": row["stop_requested_at"] is not None}
            found.append({name: row[name] for name in names} | ids | of_attempt)
    return found


@statement("past_use")
async def _past_use(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    def kept(moment: datetime) -> float:
        return 0.5 ** (max(0.0, (params["now"] - moment).total_seconds()) / params["half_life_seconds"])

    milli: dict[UUID, int] = {}
    for row in tx.scan("device_leases"):
        milli[row["attempt_id"]] = milli.get(row["attempt_id"], 0) + row["milli"]
    recent = [row for row in tx.scan("attempts") if row["ended_at"] is None or row["ended_at"] > params["since"]]
    recent.sort(key=lambda row: row["ended_at"] or params["now"], reverse=True)
    found: dict[UUID, Row] = {}
    for row in recent[: params["limit"]]:
        weight = kept(row["ended_at"] or params["now"]) - kept(row["created_at"])
        team = found.setdefault(
            row["team_id"], {"team_id": row["team_id"], "gpu_milli": 0.0, "cpu_milli": 0.0, "memory_bytes": 0.0}
        )
        team["gpu_milli"] += weight * milli.get(row["id"], 0)
        team["cpu_milli"] += weight * row["cpu_milli"]
        team["memory_bytes"] += weight * row["memory_bytes"]
    return list(found.values())


# --- timers and settlement --------------------------------------------------------------------------------------------


@statement("due_attempts")
async def _due_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    now: datetime = params["now"]
    due: list[Row] = []
    for row in tx.scan("attempts"):
        if row["ended_at"] is not None:
            continue
        most = row["max_duration_seconds"] + params["stop_grace_seconds"]
        lost = row["lease_expires_at"] + _seconds(params["lease_grace_seconds"]) <= now
        running_at = row["running_at"]
        overdue = row["stop_reason"] is None and running_at is not None and running_at + _seconds(most) <= now
        if lost or overdue:
            times = {"lease_renewed_at": row["lease_renewed_at"], "lost": lost, "overdue": overdue}
            due.append({"job_id": row["job_id"], "attempt_id": row["id"]} | times)
    return sorted(due, key=lambda row: row["job_id"])[: params["limit"]]


@statement("unsettled_attempts")
async def _unsettled_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = [row for row in tx.scan("attempts") if row["ended_at"] is not None and not row["settled"]]
    found = sorted(found, key=lambda row: row["ended_at"])[: params["limit"]]
    return _only(found, "id", "job_id", "billed_seconds", "windows_opened", "windows_closed")


@statement("attempts_needing_window")
async def _attempts_needing_window(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found: list[Row] = []
    for row in tx.scan("attempts"):
        opened = row["windows_opened"] * params["window_seconds"]
        if row["ended_at"] is not None or row["running_at"] is None or opened >= row["max_duration_seconds"]:
            continue
        if row["running_at"] + _seconds(opened - params["ahead_seconds"]) <= params["now"]:
            found.append(row)
    return sorted(found, key=lambda row: row["id"])[: params["limit"]]


@statement("attempts_with_full_windows")
async def _attempts_with_full_windows(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found: list[Row] = []
    for row in tx.scan("attempts"):
        if row["ended_at"] is None and row["running_at"] is not None and row["windows_closed"] < row["windows_opened"]:
            full = _seconds((row["windows_closed"] + 1) * params["window_seconds"])
            if row["running_at"] + full <= row["lease_renewed_at"]:
                found.append(row)
    return sorted(found, key=lambda row: row["id"])[: params["limit"]]


@statement("open_windows")
async def _open_windows(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = dict(zip(params["ids"], params["windows_opened"], strict=True))
    rows = [row for row in await _locked(tx, "attempts", new) if row["windows_opened"] < new[row["id"]]]
    for row in rows:
        tx.update("attempts", row, windows_opened=new[row["id"]])
    return len(rows)


@statement("close_windows")
async def _close_windows(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = {record["id"]: record for record in records(params["rows"])}
    cost: dict[UUID, int] = {}
    for row in await _locked(tx, "attempts", new):
        record = new[row["id"]]
        if row["windows_closed"] == record["closed_before"] and not row["settled"]:
            tx.update(
                "attempts", row, windows_closed=record["windows_closed"], settled=record["settled"],
                cost_udgpu=row["cost_udgpu"] + record["cost_udgpu"],
            )  # fmt: skip
            cost[row["job_id"]] = cost.get(row["job_id"], 0) + record["cost_udgpu"]
    for job in await _locked(tx, "jobs", cost):
        tx.update("jobs", job, cost_udgpu=job["cost_udgpu"] + cost[job["id"]])
    return len(cost)


@statement("jobs_to_mark_settled")
async def _jobs_to_mark_settled(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    unsettled = {row["job_id"] for row in tx.scan("attempts") if not row["settled"]}

    def due(row: Row) -> bool:
        if params["ids"] is not None and row["id"] not in params["ids"]:
            return False
        whole = row["array_size"] is not None
        return row["ended_at"] is not None and not row["settled"] and not whole and row["id"] not in unsettled

    ids = sorted(row["id"] for row in tx.scan("jobs") if due(row))[: params["limit"]]
    found = [row for row in await _locked(tx, "jobs", ids) if due(row)]
    return _only(found, "id", "team_id", "state", "event_seq", "cost_udgpu")


@statement("mark_jobs_settled")
async def _mark_jobs_settled(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    rows = await _locked(tx, "jobs", params["job_ids"])
    for row in rows:
        tx.update("jobs", row, settled=True, event_seq=row["event_seq"] + 1)
    return len(rows)
