"""Billing's tables in memory: one function per query of services/billing/sql/queries.sql."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from uuid import UUID

from psycopg import errors as pg

from dantegpu.services.billing.module import MIGRATIONS
from dantegpu.services.billing.store import QUERIES
from tests.simulation.memory.columns import columns_of, defaults_of
from tests.simulation.memory.engine import Handler, MemoryTx, Row, Schema, Table
from tests.simulation.memory.kit import KIT_STATEMENTS, kit_tables

_COLUMNS = columns_of(MIGRATIONS)
_RESULTS = ("used_seconds", "charged_udgpu", "provider_udgpu", "fee_udgpu", "closed_at")
_STATEMENTS: dict[str, Handler] = {}


def billing_schema() -> Schema:
    """Fresh and empty."""
    accounts = Table("accounts", ("id",), uniques={"accounts_kind_team": lambda row: (row["kind"], row["team_id"])})
    transfers = Table(
        "transfers",
        ("id",),
        checks={
            "amount_udgpu": lambda row: row["amount_udgpu"] > 0,
            "two_accounts": lambda row: row["debit_account_id"] != row["credit_account_id"],
            "usage_has_window": lambda row: (
                (row["kind"] in ("usage", "fee"))
                == (None not in (row["attempt_id"], row["window_index"], row["job_id"]))
            ),
        },
        uniques={
            "transfers_once_per_window": lambda row: (
                (row["attempt_id"], row["window_index"], row["kind"]) if row["attempt_id"] is not None else None
            )
        },
    )
    balances = Table(
        "balances",
        ("account_id",),
        defaults_of(_COLUMNS["balances"]),
        checks={
            "never_overdrawn": lambda row: row["kind"] == "issuance" or row["balance_udgpu"] >= row["held_udgpu"],
            "held_udgpu": lambda row: (
                row["held_udgpu"] >= 0 and (row["kind"] == "team_wallet" or not row["held_udgpu"])
            ),
        },
    )
    holds = Table(
        "holds",
        ("id",),
        defaults_of(_COLUMNS["holds"]),
        checks={
            "amounts": lambda row: min(row["window_index"], row["rate_udgpu_per_hour"], row["ceiling_udgpu"]) >= 0,
            "simulated": lambda row: not row["simulated"] or row["payer_team_id"] == row["provider_team_id"],
            "state": _state_fits,
        },
        uniques={"holds_attempt_id_window_index_key": lambda row: (row["attempt_id"], row["window_index"])},
    )
    tables = [*kit_tables(), accounts, transfers, balances, holds]
    return Schema("billing", tables, {**KIT_STATEMENTS, **_STATEMENTS})


def _state_fits(row: Row) -> bool:
    results = [row[name] for name in _RESULTS]
    if row["state"] == "open":
        return all(value is None for value in results)
    return (
        None not in results
        and 0 <= row["used_seconds"] <= row["window_seconds"]
        and 0 <= row["charged_udgpu"] <= row["ceiling_udgpu"]
        and row["charged_udgpu"] == row["provider_udgpu"] + row["fee_udgpu"]
        and (row["charged_udgpu"] > 0) == (row["state"] == "posted")
    )


def statement(name: str) -> Callable[[Handler], Handler]:
    """The function below is the query `name` in memory."""

    def keep(handler: Handler) -> Handler:
        _STATEMENTS[QUERIES[name]] = handler
        return handler

    return keep


async def _locked(tx: MemoryTx, table: str, ids: Iterable[UUID]) -> list[Row]:
    keys = sorted((row_id,) for row_id in set(ids) if tx.get(table, (row_id,)) is not None)
    await tx.lock(table, keys)
    return [row for row in (tx.get(table, key) for key in keys) if row is not None]


# --- holds ------------------------------------------------------------------------------------------------------------


@statement("ensure_accounts")
async def _ensure_accounts(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    new = sorted(zip(params["ids"], params["kinds"], params["team_ids"], strict=True), key=lambda account: account[0])
    made = 0
    for account_id, kind, team_id in new:
        if tx.get("accounts", (account_id,)) is not None:
            continue
        await tx.lock("accounts", [(account_id,)])
        if tx.get("accounts", (account_id,)) is None:
            await tx.insert("accounts", {"id": account_id, "kind": kind, "team_id": team_id})
            await tx.insert("balances", {"account_id": account_id, "kind": kind})
            made += 1
    return made


@statement("lock_balances")
async def _lock_balances(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    names = ("account_id", "balance_udgpu", "held_udgpu")
    return [{name: row[name] for name in names} for row in await _locked(tx, "balances", params["ids"])]


_HOLD_COLUMNS = (
    "id", "attempt_id", "window_index", "job_id", "payer_team_id", "provider_team_id", "rate_udgpu_per_hour",
    "window_seconds", "ceiling_udgpu", "fee_basis_points", "simulated", "charged_udgpu",
)  # fmt: skip


@statement("find_holds")
async def _find_holds(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = (tx.get("holds", (hold_id,)) for hold_id in params["ids"])
    return [{name: row[name] for name in _HOLD_COLUMNS} for row in found if row is not None]


_HOLD_PARAMS = {
    "id": "ids", "attempt_id": "attempt_ids", "window_index": "windows", "job_id": "job_ids",
    "payer_team_id": "payers", "provider_team_id": "providers", "payer_account_id": "payer_accounts",
    "rate_udgpu_per_hour": "rates", "window_seconds": "window_seconds", "ceiling_udgpu": "ceilings",
    "fee_basis_points": "fees", "simulated": "simulated",
}  # fmt: skip


@statement("insert_holds")
async def _insert_holds(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    added: defaultdict[UUID, int] = defaultdict(int)
    for index in range(len(params["ids"])):
        row = {column: params[name][index] for column, name in _HOLD_PARAMS.items()}
        await tx.insert("holds", row | {"opened_at": params["now"]})
        added[row["payer_account_id"]] += row["ceiling_udgpu"]
    for balance in await _locked(tx, "balances", added):
        held = balance["held_udgpu"] + added[balance["account_id"]]
        tx.update("balances", balance, held_udgpu=held, version=balance["version"] + 1)
    return len(added)


@statement("resolve_holds_if_open")
async def _resolve_holds_if_open(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    columns = zip(
        params["ids"], params["used_seconds"], params["charged"], params["provider"], params["fee"], strict=True
    )
    results = {row_id: dict(zip(_RESULTS, (*values, params["now"]), strict=True)) for row_id, *values in columns}
    still_open = [row for row in await _locked(tx, "holds", results) if may_resolve(row)]
    for row in still_open:
        result = results[row["id"]]
        resolve_hold(tx, row, state="posted" if result["charged_udgpu"] > 0 else "voided", **result)
    return len(still_open)


def may_resolve(row: Row) -> bool:
    """Whether the query resolve_holds_if_open touches this hold."""
    return row["state"] == "open"


def resolve_hold(tx: MemoryTx, row: Row, **changes: Any) -> None:
    """An UPDATE of a hold, with the trigger resolve_hold_once."""
    if row["state"] != "open" or changes["state"] == "open":
        raise pg.IntegrityConstraintViolation(
            f"hold {row['id']} is {row['state']} and cannot become {changes['state']}"
        )
    tx.update("holds", row, **changes)


@statement("open_holds_after")
async def _open_holds_after(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = [row for row in tx.scan("holds") if row["state"] == "open" and row["opened_at"] <= params["until"]]
    if params["after_id"] is not None:
        found = [row for row in found if (row["opened_at"], row["id"]) > (params["after"], params["after_id"])]
    found.sort(key=lambda row: (row["opened_at"], row["id"]))
    names = ("id", "attempt_id", "window_index", "opened_at")
    return [{name: row[name] for name in names} for row in found[: params["n"]]]


# --- transfers --------------------------------------------------------------------------------------------------------

_TRANSFER_PARAMS = {
    "id": "ids", "kind": "kinds", "debit_account_id": "debits", "credit_account_id": "credits",
    "amount_udgpu": "amounts", "linked_id": "linked", "job_id": "job_ids", "attempt_id": "attempt_ids",
    "window_index": "windows", "text": "texts",
}  # fmt: skip


@statement("post_transfers")
async def _post_transfers(tx: MemoryTx, params: Mapping[str, Any]) -> int:
    delta: defaultdict[UUID, int] = defaultdict(int)
    for index in range(len(params["ids"])):
        row = {column: params[name][index] for column, name in _TRANSFER_PARAMS.items()}
        debit, credit = row["debit_account_id"], row["credit_account_id"]
        delta[debit] -= row["amount_udgpu"]
        delta[credit] += row["amount_udgpu"]
        balances = tx.get("balances", (debit,)), tx.get("balances", (credit,))
        if balances[0] is None or balances[1] is None:
            continue  # the query joins both: the caller sees by the number of balances that one is missing
        after = {
            "debit_balance_after_udgpu": balances[0]["balance_udgpu"] + delta[debit],
            "credit_balance_after_udgpu": balances[1]["balance_udgpu"] + delta[credit],
        }
        seq = {"seq": tx.schema.next_serial("transfers"), "created_at": params["now"]}
        await tx.insert("transfers", row | after | seq)
    freed = dict(zip(params["freed_accounts"], params["freed"], strict=True))
    changed = await _locked(tx, "balances", delta.keys() | freed.keys())
    for balance in changed:
        account_id = balance["account_id"]
        tx.update(
            "balances", balance, balance_udgpu=balance["balance_udgpu"] + delta[account_id],
            held_udgpu=balance["held_udgpu"] - freed.get(account_id, 0), version=balance["version"] + 1,
        )  # fmt: skip
    return len(changed)


@statement("find_transfer")
async def _find_transfer(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    found = tx.get("transfers", (params["id"],))
    return [{name: found[name] for name in ("id", "amount_udgpu", "text")}] if found else []


@statement("wallet")
async def _wallet(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    rows = [row for key in ("wallet_id", "earnings_id") if (row := tx.get("balances", (params[key],))) is not None]
    return [{
        "balance_udgpu": sum(row["balance_udgpu"] for row in rows if row["kind"] == "team_wallet"),
        "held_udgpu": sum(row["held_udgpu"] for row in rows),
        "earned_udgpu": sum(row["balance_udgpu"] for row in rows if row["kind"] == "team_earnings"),
    }]  # fmt: skip


@statement("entries_before")
async def _entries_before(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    own = params["account_id"]
    entries: list[Row] = []
    for row in tx.scan("transfers"):
        if own in (row["debit_account_id"], row["credit_account_id"]) and row["seq"] < params["before"]:
            paid = row["debit_account_id"] == own
            names = ("id", "seq", "kind", "job_id", "attempt_id", "text", "created_at")
            entries.append({name: row[name] for name in names} | {
                "amount_udgpu": -row["amount_udgpu"] if paid else row["amount_udgpu"],
                "balance_after_udgpu": row[f"{'debit' if paid else 'credit'}_balance_after_udgpu"],
            })  # fmt: skip
    return sorted(entries, key=lambda row: row["seq"], reverse=True)[: params["n"]]


_RECEIPT_COLUMNS = (
    "attempt_id", "window_index", "payer_team_id", "rate_udgpu_per_hour", "state", "used_seconds", "charged_udgpu",
    "provider_udgpu", "fee_udgpu", "opened_at", "closed_at",
)  # fmt: skip


@statement("receipt")
async def _receipt(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    team = params["team_id"]
    rows = [
        row
        for row in tx.scan("holds")
        if row["job_id"] == params["job_id"]
        and (params["attempt_ids"] is None or row["attempt_id"] in params["attempt_ids"])
        and team in (None, row["payer_team_id"], row["provider_team_id"])
    ]
    charged = [row["charged_udgpu"] for row in rows if row["charged_udgpu"] is not None]
    rows.sort(key=lambda row: (row["opened_at"], row["attempt_id"], row["window_index"]), reverse=True)
    total = {"total_udgpu": sum(charged) if charged else None}
    return [{name: row[name] for name in _RECEIPT_COLUMNS} | total for row in rows[: params["n"]]]


# --- the auditor ------------------------------------------------------------------------------------------------------


@statement("audit")
async def _audit(tx: MemoryTx, params: Mapping[str, Any]) -> list[Row]:
    problems = list(ledger_problems(tx.scan))
    return [{
        "accounts": sum(1 for _ in tx.scan("accounts")),
        "transfers": sum(1 for _ in tx.scan("transfers")),
        "open_holds": sum(row["state"] == "open" for row in tx.scan("holds")),
        "sum_udgpu": sum(row["balance_udgpu"] for row in tx.scan("balances")),
        "problems": problems[: params["n"]],
    }]  # fmt: skip


def ledger_problems(scan: Callable[[str], Iterable[Row]]) -> Iterator[str]:
    """Everything re-summed from the facts: what the query `audit` finds."""
    summed: defaultdict[UUID, int] = defaultdict(int)
    billed: defaultdict[tuple[UUID, int], dict[str, int]] = defaultdict(dict)
    transfers = sorted(scan("transfers"), key=lambda row: row["seq"])
    by_id = {row["id"]: row for row in transfers}
    for row in transfers:
        for side, sign in (("debit", -1), ("credit", 1)):
            account = row[f"{side}_account_id"]
            summed[account] += sign * row["amount_udgpu"]
            after = row[f"{side}_balance_after_udgpu"]
            if after != summed[account]:
                yield f"account {account}: the entry of transfer number {row['seq']} says balance {after}"
        if row["attempt_id"] is not None:
            billed[row["attempt_id"], row["window_index"]][row["kind"]] = row["amount_udgpu"]
        linked = by_id.get(row["linked_id"]) if row["linked_id"] is not None else None
        if row["linked_id"] is not None and (linked is None or linked["linked_id"] != row["id"]):
            yield f"transfer {row['id']}: its linked transfer {row['linked_id']} does not link back"
    yield from _balance_problems(scan, summed)
    for row in scan("holds"):
        parts = billed.pop((row["attempt_id"], row["window_index"]), {})
        said = (row["provider_udgpu"], row["fee_udgpu"]) if row["state"] == "posted" else (0, 0)
        if said != (parts.get("usage", 0), parts.get("fee", 0)):
            yield f"window {row['window_index']} of attempt {row['attempt_id']}: the hold says {said}, not {parts}"
    for attempt, window in billed:
        yield f"window {window} of attempt {attempt}: billed without a hold"


def _balance_problems(scan: Callable[[str], Iterable[Row]], summed: Mapping[UUID, int]) -> Iterator[str]:
    held: defaultdict[UUID, int] = defaultdict(int)
    for row in scan("holds"):
        if row["state"] == "open":
            held[row["payer_account_id"]] += row["ceiling_udgpu"]
    total = 0
    for row in scan("balances"):
        account, balance = row["account_id"], row["balance_udgpu"]
        total += balance
        if balance != summed.get(account, 0):
            yield f"account {account} ({row['kind']}): its balance is cached as {balance}, not {summed.get(account, 0)}"
        if row["held_udgpu"] != held[account]:
            yield f"account {account} ({row['kind']}): {row['held_udgpu']} are cached as held, not {held[account]}"
        if row["kind"] != "issuance" and balance < row["held_udgpu"]:
            yield f"account {account} ({row['kind']}): overdrawn, {balance - row['held_udgpu']} available"
    if total:
        yield f"all balances add up to {total}, not 0"
