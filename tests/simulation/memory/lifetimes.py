"""Deadlines and dependencies in memory: services/scheduler/sql/lifetimes.sql. No schedules, no arrays."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from dantegpu.services.scheduler.store_arrays import QUERIES as ARRAYS
from dantegpu.services.scheduler.store_lifetimes import QUERIES as LIFETIMES
from dantegpu.services.scheduler.store_schedules import QUERIES as SCHEDULES
from tests.simulation.memory.engine import Handler, MemoryTx, Row


async def _hold_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    for job_id, after_id in zip(params["job_ids"], params["after_ids"], strict=True):
        if tx.get("job_after", (job_id, after_id)) is None:
            await tx.insert("job_after", {"job_id": job_id, "after_id": after_id})
    held: list[Row] = []
    for job_id in sorted(set(params["job_ids"])):
        await tx.lock("jobs", [(job_id,)])
        row = tx.get("jobs", (job_id,))
        if row is None:
            continue
        waits = {"reason": "waiting_for_jobs", "reason_detail": params["detail"], "not_before": params["never"]}
        free = {"reason": None, "reason_detail": "", "not_before": None}
        held.append(tx.update("jobs", row, held=True, **(waits if row["state"] == "QUEUED" else free)))
    return held


async def _set_deadlines(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    new = dict(zip(params["job_ids"], params["deadlines"], strict=True))
    await tx.lock("jobs", sorted((job_id,) for job_id in new))
    rows = [(job_id, tx.get("jobs", (job_id,))) for job_id in new]
    return [tx.update("jobs", row, deadline_at=new[job_id]) for job_id, row in rows if row is not None]


async def _held_and_due(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    after: dict[UUID, list[Row]] = {}
    for link in tx.scan("job_after"):
        before = tx.get("jobs", (link["after_id"],))
        if before is not None:
            after.setdefault(link["job_id"], []).append(before)
    due: list[Row] = []
    for row in tx.scan("jobs"):
        if not row["held"] or row["ended_at"] is not None or row["id"] not in after:
            continue
        failed = [it for it in after[row["id"]] if it["state"] in ("FAILED", "CANCELLED")]
        ready = all(it["state"] == "SUCCEEDED" for it in after[row["id"]])
        if ready or failed:
            first = min(failed, key=lambda it: (it["ended_at"], it["id"]))["id"] if failed else None
            whole = row["array_size"] is not None
            due.append({"id": row["id"], "is_array": whole, "ready": ready, "failed_id": first})
    return sorted(due, key=lambda row: row["id"])[: params["limit"]]


async def _release_jobs(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    await tx.lock("jobs", sorted((job_id,) for job_id in params["ids"]))
    rows = [tx.get("jobs", (job_id,)) for job_id in params["ids"]]
    return [tx.update("jobs", row, held=False) for row in rows if row is not None and row["held"]]


async def _past_deadline(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    due = [
        row
        for row in tx.scan("jobs")
        if row["deadline_at"] is not None
        and row["deadline_at"] <= params["now"]
        and row["ended_at"] is None
        and row["array_id"] is None
        and (row["stop_reason"] or "") not in params["ending_reasons"]
    ]
    return sorted(due, key=lambda row: row["deadline_at"])[: params["limit"]]


async def _nothing_there(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    """Nothing makes an array or a schedule here: the statements that would have no function in memory."""
    return []


LIFETIME_STATEMENTS: Mapping[str, Handler] = {
    LIFETIMES["hold_jobs"]: _hold_jobs,
    LIFETIMES["set_deadlines"]: _set_deadlines,
    LIFETIMES["held_and_due"]: _held_and_due,
    LIFETIMES["release_jobs"]: _release_jobs,
    LIFETIMES["past_deadline"]: _past_deadline,
    SCHEDULES["due_schedules"]: _nothing_there,
    ARRAYS["open_arrays"]: _nothing_there,
}
