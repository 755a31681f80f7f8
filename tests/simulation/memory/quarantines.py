"""Machines in quarantine, in memory: the queries of services/scheduler/sql/quarantines.sql."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from dantegpu.services.scheduler.store_quarantines import QUERIES
from tests.simulation.memory.engine import Handler, MemoryTx, Row

_FAULTS = ("lost", "provider_fault")


async def _faulty_machines(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    succeeded_at: dict[UUID, datetime] = {}
    for row in tx.scan("attempts"):
        if row["outcome"] == "succeeded":
            machine = row["machine_id"]
            succeeded_at[machine] = max(row["ended_at"], succeeded_at.get(machine, row["ended_at"]))
    incidents: dict[UUID, set[object]] = {}
    teams: dict[UUID, set[UUID]] = {}
    for row in tx.scan("attempts"):
        machine = row["machine_id"]
        if row["outcome"] not in _FAULTS or row["ended_at"] <= params["since"]:
            continue
        known = tx.get("quarantines", (machine,))
        if known is not None and row["ended_at"] <= known["until"]:
            continue
        if machine in succeeded_at and succeeded_at[machine] >= row["ended_at"]:
            continue
        lost = row["outcome"] == "lost"
        incidents.setdefault(machine, set()).add(row["ended_at"].timestamp() // 60 if lost else row["job_id"])
        teams.setdefault(machine, set()).add(row["team_id"])
    found = [
        {"machine_id": machine, "incidents": len(each), "teams": len(teams[machine])}
        for machine, each in sorted(incidents.items())
        if len(each) >= params["faults"] * (1 if len(teams[machine]) > 1 else 2)
    ]
    return found[: params["limit"]]


async def _quarantine(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    key = (params["machine_id"],)
    await tx.lock("quarantines", [key])
    known = tx.get("quarantines", key)
    now: datetime = params["now"]
    new = {"machine_id": params["machine_id"], "since": now, "reason": params["reason"], "released_by": ""}
    if known is None:
        return [await tx.insert("quarantines", new | {"until": now + timedelta(seconds=params["seconds"]), "times": 1})]
    forgotten = now - timedelta(seconds=params["forget_seconds"])
    again = known["until"] > forgotten and not known["released_by"]
    seconds = min(params["max_seconds"], params["seconds"] * 2 ** (known["times"] if again else 0))
    times = known["times"] + 1 if again else 1
    return [tx.update("quarantines", known, **new, times=times, until=now + timedelta(seconds=seconds))]


async def _in_quarantine(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    rows = [row for row in tx.scan("quarantines") if row["until"] > params["now"]]
    wanted = [row for row in rows if params["ids"] is None or row["machine_id"] in params["ids"]]
    return sorted(wanted, key=lambda row: row["machine_id"])


async def _release(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    keys = sorted((machine_id,) for machine_id in params["ids"])
    await tx.lock("quarantines", keys)
    rows = [row for key in keys if (row := tx.get("quarantines", key)) is not None and row["until"] > params["now"]]
    return [tx.update("quarantines", row, until=params["now"], released_by=params["by"]) for row in rows]


QUARANTINE_STATEMENTS: Mapping[str, Handler] = {
    QUERIES["faulty_machines"]: _faulty_machines,
    QUERIES["quarantine"]: _quarantine,
    QUERIES["in_quarantine"]: _in_quarantine,
    QUERIES["release"]: _release,
}
