"""Quarantines in memory: services/scheduler/sql/quarantines.sql."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from dantegpu.services.scheduler.store_quarantines import QUERIES
from tests.simulation.memory.engine import Handler, MemoryTx, Row

_FAULTS = ("lost", "provider_fault")


async def _faulty_machines(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    last_success: dict[UUID, datetime] = {}
    for row in tx.scan("attempts"):
        if row["outcome"] == "succeeded":
            known = last_success.get(row["machine_id"], row["ended_at"])
            last_success[row["machine_id"]] = max(known, row["ended_at"])
    incidents: dict[UUID, set[object]] = {}
    teams: dict[UUID, set[UUID]] = {}
    for row in tx.scan("attempts"):
        machine_id, ended_at = row["machine_id"], row["ended_at"]
        if row["outcome"] not in _FAULTS or ended_at <= params["since"]:
            continue
        shut = tx.get("quarantines", (machine_id,))
        if shut is not None and ended_at <= shut["until"]:
            continue
        if machine_id in last_success and last_success[machine_id] >= ended_at:
            continue
        incident = int(ended_at.timestamp() // 60) if row["outcome"] == "lost" else row["job_id"]
        incidents.setdefault(machine_id, set()).add(incident)
        teams.setdefault(machine_id, set()).add(row["team_id"])
    found = [
        {"machine_id": machine_id, "incidents": len(incidents[machine_id]), "teams": len(teams[machine_id])}
        for machine_id in sorted(incidents)
        if len(incidents[machine_id]) >= params["faults"] * (1 if len(teams[machine_id]) > 1 else 2)
    ]
    return found[: params["limit"]]


async def _quarantine(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    key, now = (params["machine_id"],), params["now"]
    row: Row = {"machine_id": params["machine_id"], "since": now, "reason": params["reason"], "released_by": ""}
    await tx.lock("quarantines", [key])
    known = tx.get("quarantines", key)
    if known is None:
        until = now + timedelta(seconds=params["seconds"])
        return [await tx.insert("quarantines", row | {"until": until, "times": 1})]
    again = known["until"] > now - timedelta(seconds=params["forget_seconds"]) and not known["released_by"]
    times = known["times"] if again else 0
    seconds = min(params["max_seconds"], params["seconds"] * 2**times)
    return [tx.update("quarantines", known, **row, until=now + timedelta(seconds=seconds), times=times + 1)]


async def _in_quarantine(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = [
        row
        for row in tx.scan("quarantines")
        if row["until"] > params["now"] and (params["ids"] is None or row["machine_id"] in params["ids"])
    ]
    return sorted(found, key=lambda row: row["machine_id"])


async def _release(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    await tx.lock("quarantines", sorted((machine_id,) for machine_id in params["ids"]))
    rows = await _in_quarantine(tx, params)
    return [tx.update("quarantines", row, until=params["now"], released_by=params["by"]) for row in rows]


QUARANTINE_STATEMENTS: Mapping[str, Handler] = {
    QUERIES["faulty_machines"]: _faulty_machines,
    QUERIES["quarantine"]: _quarantine,
    QUERIES["in_quarantine"]: _in_quarantine,
    QUERIES["release"]: _release,
}
