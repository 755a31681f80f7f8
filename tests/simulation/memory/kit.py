"""kit's own tables in memory: the outbox, remembered answers, the leader's lease. By how each statement begins."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from tests.simulation.memory.engine import Handler, MemoryTx, Row, Table


def kit_tables() -> list[Table]:
    """Fresh and empty."""
    return [
        Table("outbox", ("id",)),
        Table("idempotency", ("scope", "key")),
        Table("leader", ("name",)),
        Table("advisory", ("key",)),
    ]


async def _add_messages(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    ids: list[Row] = []
    for subject, message_id, payload in zip(params["subjects"], params["ids"], params["payloads"], strict=True):
        row = {"id": tx.schema.next_serial("outbox"), "subject": subject, "message_id": message_id, "payload": payload}
        await tx.insert("outbox", row)
        ids.append({"id": row["id"]})
    return ids


async def _next_messages(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    return sorted(tx.scan("outbox"), key=lambda row: row["id"])[: params["n"]]


async def _forget_messages(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    found = [(row_id,) for row_id in sorted(params["ids"]) if tx.get("outbox", (row_id,))]
    await tx.lock("outbox", found)
    for key in found:
        tx.delete("outbox", key)
    return len(found)


async def _wait_for_key(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    await tx.lock("advisory", [(params["scope"] + params["key"],)])
    return [{"pg_advisory_xact_lock": None}]


async def _wait_for_keys(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    asked = sorted({scope + key for scope, key in zip(params["scopes"], params["keys"], strict=True)})
    await tx.lock("advisory", [(key,) for key in asked])
    return [{"pg_advisory_xact_lock": None} for _ in asked]


async def _recall_each(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    asked = dict.fromkeys(zip(params["scopes"], params["keys"], strict=True))
    names = ("scope", "key", "request_sha256", "response")
    found = (tx.get("idempotency", key) for key in asked)
    return [{name: row[name] for name in names} for row in found if row is not None]


async def _remember_each(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    for scope, key, sha, body in zip(
        params["scopes"], params["keys"], params["digests"], params["bodies"], strict=True
    ):
        await _remember(tx, {"scope": scope, "key": key, "sha": sha, "body": body})
    return len(params["keys"])


async def _remember(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    await tx.insert("idempotency", {
        "scope": params["scope"], "key": params["key"], "request_sha256": params["sha"], "response": params["body"],
        "created_at": tx.server.now(),
    })  # fmt: skip
    return 1


async def _recall(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = tx.get("idempotency", (params["scope"], params["key"]))
    return [{name: found[name] for name in ("request_sha256", "response")}] if found else []


async def _forget_answers(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    before = tx.server.now() - timedelta(hours=params["h"])
    old = sorted((row["scope"], row["key"]) for row in tx.scan("idempotency") if row["created_at"] < before)
    await tx.lock("idempotency", old)
    for key in old:
        tx.delete("idempotency", key)
    return len(old)


async def _acquire(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    key = (params["name"],)
    await tx.lock("leader", [key])
    # now() is the time at which the transaction began, not that at which the lock was had.
    now = tx.began_at
    known = tx.get("leader", key)
    holder: UUID = params["holder"]
    expires_at = now + timedelta(seconds=params["lease"])
    if known is None:
        await tx.insert("leader", {"name": params["name"], "holder": holder, "epoch": 1, "expires_at": expires_at})
        return [{"epoch": 1}]
    if known["holder"] != holder and known["expires_at"] > now:
        return []
    epoch = known["epoch"] + (known["holder"] != holder)
    tx.update("leader", known, holder=holder, epoch=epoch, expires_at=expires_at)
    return [{"epoch": epoch}]


async def _held_epoch(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    key = (params["name"],)
    if tx.get("leader", key) is None:
        return []
    await tx.lock("leader", [key], share=True)
    known = tx.get("leader", key)
    return [{"epoch": known["epoch"]}] if known is not None and known["holder"] == params["holder"] else []


async def _give_up(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    key = (params["name"],)
    await tx.lock("leader", [key])
    known = tx.get("leader", key)
    if known is None or known["holder"] != params["holder"]:
        return 0
    tx.update("leader", known, expires_at=tx.began_at)
    return 1


KIT_STATEMENTS: Mapping[str, Handler] = {
    "INSERT INTO outbox": _add_messages,
    "SELECT id, subject, message_id, payload FROM outbox": _next_messages,
    "DELETE FROM outbox": _forget_messages,
    "SELECT pg_advisory_xact_lock(number) FROM": _wait_for_keys,
    "SELECT pg_advisory_xact_lock": _wait_for_key,
    "INSERT INTO idempotency (scope, key, request_sha256, response) SELECT": _remember_each,
    "INSERT INTO idempotency": _remember,
    "SELECT scope, key, request_sha256, response FROM idempotency": _recall_each,
    "SELECT request_sha256, response FROM idempotency": _recall,
    "DELETE FROM idempotency": _forget_answers,
    "INSERT INTO leader": _acquire,
    "SELECT epoch FROM leader": _held_epoch,
    "UPDATE leader SET expires_at": _give_up,
}
