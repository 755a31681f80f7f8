"""Spot work, claims and checkpoints in memory: services/scheduler/sql/preemptions.sql."""

from collections.abc import Mapping
from typing import Any

from dantegpu.services.scheduler.module import MIGRATIONS
from dantegpu.services.scheduler.store_preemptions import QUERIES
from tests.simulation.memory.columns import columns_of, records, typed
from tests.simulation.memory.engine import Handler, MemoryTx, Row

_COLUMNS = columns_of(MIGRATIONS)


async def _spot_attempts(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found: list[Row] = []
    live = [row for row in tx.scan("attempts") if row["ended_at"] is None and row["stop_requested_at"] is None]
    for row in sorted((row for row in live if row["spot"]), key=lambda row: (row["job_id"], row["node_rank"])):
        job = tx.get("jobs", (row["job_id"],))
        assert job is not None, "an attempt refers to its job"
        began_at = row["running_at"] or row["created_at"]
        names = ("job_id", "team_id", "epoch", "saves")
        times = {"saved_at": row["checkpointed_at"] or began_at, "began_at": began_at}
        of_job = {"attempt_id": row["id"], "priority": job["priority"]}
        found.append({name: row[name] for name in names} | times | of_job)
    return found[: params["limit"]]


async def _claims(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    rows = sorted(tx.scan("claims"), key=lambda row: (row["claimed_at"], row["job_id"], row["node_rank"]))
    names = ("job_id", "node_rank", "machine_id", "device_ids")
    return [{name: row[name] for name in names} for row in rows]


async def _insert_claims(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = [typed(_COLUMNS["claims"], record) for record in records(params["rows"])]
    for row in new:
        await tx.insert("claims", row | {"claimed_at": params["now"]})
    return len(new)


async def _delete_claims(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    keys = sorted((row["job_id"], row["node_rank"]) for row in tx.scan("claims") if row["job_id"] in params["job_ids"])
    await tx.lock("claims", keys)
    for key in keys:
        tx.delete("claims", key)
    return len(keys)


async def _save_checkpoints(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = {row["id"]: row for row in (typed(_COLUMNS["attempts"], record) for record in records(params["rows"]))}
    await tx.lock("attempts", sorted((row_id,) for row_id in new))
    saved = 0
    for row_id, row in new.items():
        known = tx.get("attempts", (row_id,))
        if known is None or known["ended_at"] is not None or known["checkpoint_number"] >= row["checkpoint_number"]:
            continue
        tx.update("attempts", known, **(row | {"checkpointed_at": params["now"]}))
        saved += 1
    return saved


async def _checkpoints_before(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found: list[Row] = []
    for attempt_id in params["ids"]:
        attempt = tx.get("attempts", (attempt_id,))
        saved = _saved_before(tx, attempt) if attempt is not None else None
        if saved is not None:
            found.append(
                {
                    "attempt_id": attempt_id,
                    "job_id": saved["job_id"],
                    "epoch": saved["epoch"],
                    "node_rank": saved["node_rank"],
                    "sha256": saved["checkpoint_sha256"],
                    "size_bytes": saved["checkpoint_size_bytes"],
                    "slot": saved["checkpoint_slot"],
                }
            )
    return found


def _saved_before(tx: MemoryTx, attempt: Row) -> Row | None:
    by_epoch: dict[int, dict[int, Row]] = {}
    for row in tx.scan("attempts"):
        if row["job_id"] == attempt["job_id"] and row["epoch"] < attempt["epoch"]:
            by_epoch.setdefault(row["epoch"], {})[row["node_rank"]] = row
    for _, nodes in sorted(by_epoch.items(), reverse=True):
        with_content = {rank: row for rank, row in nodes.items() if row["checkpoint_sha256"] is not None}
        if with_content and all(row["checkpoint_number"] for row in nodes.values()):
            return with_content.get(attempt["node_rank"], with_content.get(0))
    return None


PREEMPTION_STATEMENTS: dict[str, Handler] = {
    QUERIES["spot_attempts"]: _spot_attempts,
    QUERIES["claims"]: _claims,
    QUERIES["insert_claims"]: _insert_claims,
    QUERIES["delete_claims"]: _delete_claims,
    QUERIES["save_checkpoints"]: _save_checkpoints,
    QUERIES["checkpoints_before"]: _checkpoints_before,
}
