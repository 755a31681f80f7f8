"""Upkeep in memory: services/scheduler/sql/upkeep.sql."""

from collections.abc import Mapping
from typing import Any

from dantegpu.services.scheduler.store_upkeep import QUERIES
from tests.simulation.memory.engine import Handler, MemoryTx, Row

_AUTH = b"\xa2\x03"


async def _stale_checkpoints(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    def saved_later(row: Row) -> bool:
        later: dict[int, list[Row]] = {}
        for each in tx.scan("attempts"):
            if each["job_id"] == row["job_id"] and each["epoch"] > row["epoch"]:
                later.setdefault(each["epoch"], []).append(each)
        return any(
            all(node["checkpoint_number"] for node in nodes) and any(node["checkpoint_sha256"] for node in nodes)
            for nodes in later.values()
        )

    def over(at: Any) -> bool:
        return at is not None and at <= params["before"]

    found: list[Row] = []
    for row in tx.scan("attempts"):
        job = tx.get("jobs", (row["job_id"],))
        assert job is not None, "an attempt refers to its job"
        stale = row["saves"] and not row["checkpoints_deleted"] and over(row["ended_at"])
        if stale and (over(job["ended_at"]) or saved_later(row)):
            found.append(row)
    found.sort(key=lambda row: (row["ended_at"], row["id"]))
    names = ("id", "job_id", "epoch", "node_rank")
    return [{name: row[name] for name in names} for row in found[: params["limit"]]]


async def _checkpoints_deleted(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    await tx.lock("attempts", [(each,) for each in params["ids"]])
    rows = [row for each in params["ids"] if (row := tx.get("attempts", (each,))) is not None]
    for row in rows:
        tx.update("attempts", row, checkpoints_deleted=True)
    return len(rows)


async def _specs_with_auth(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    wanted = [row for row in tx.scan("jobs") if row["settled"] and _AUTH in row["spec"] and row["id"] > params["after"]]
    chosen = sorted(wanted, key=lambda row: row["id"])[: params["limit"]]
    await tx.lock("jobs", [(row["id"],) for row in chosen])
    return [{"id": row["id"], "spec": row["spec"]} for row in chosen]


async def _replace_specs(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    specs = dict(zip(params["ids"], params["specs"], strict=True))
    rows = [row for job_id in specs if (row := tx.get("jobs", (job_id,))) is not None and row["settled"]]
    for row in rows:
        tx.update("jobs", row, spec=specs[row["id"]])
    return len(rows)


UPKEEP_STATEMENTS: Mapping[str, Handler] = {
    QUERIES["stale_checkpoints"]: _stale_checkpoints,
    QUERIES["checkpoints_deleted"]: _checkpoints_deleted,
    QUERIES["specs_with_auth"]: _specs_with_auth,
    QUERIES["replace_specs"]: _replace_specs,
}
