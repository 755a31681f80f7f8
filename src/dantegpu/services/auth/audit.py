"""The audit log: security events in a chain that shows any later change.

Each row's `mac` is an HMAC over the row and the `mac` of the row before it, under a key that is not in the database:
whoever can write to the database can neither change, insert, reorder nor remove a row without being found, except by
putting back an old copy of the whole log. Addresses typed by people who failed to log in are not recorded: it is the
field that passwords are mistyped into.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import Id, TeamId, UserId
from dantegpu.kit.db import Tx
from dantegpu.kit.telemetry import current_request_id
from dantegpu.services.auth import store
from dantegpu.services.auth.secrets import Secrets
from dantegpu.services.auth.store import AuditRow

_BATCH: Final = 1000
_MAX_ADDRESS_LENGTH: Final = 64


class AuditKind(StrEnum):
    """What the log tells of."""

    REGISTERED = "registered"
    LOGIN_OK = "login_ok"
    LOGIN_FAILED = "login_failed"
    LOGGED_OUT = "logged_out"
    REFRESH_REUSED = "refresh_reused"
    KEY_CREATED = "key_created"
    KEY_REVOKED = "key_revoked"
    TEAM_CREATED = "team_created"
    MEMBER_CHANGED = "member_changed"
    JOIN_TOKEN_CREATED = "join_token_created"
    MACHINE_ENROLLED = "machine_enrolled"
    MACHINE_REVOKED = "machine_revoked"
    OPERATOR_MADE = "operator_made"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """What happened. `detail` never holds a secret or what a person typed."""

    kind: AuditKind
    user_id: UserId | None = None
    team_id: TeamId | None = None
    subject: Id | None = None
    client_address: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AuditProblem:
    """Where the chain breaks first."""

    seq: int
    text: str


class AuditLog:
    """Appends to the chain and checks it."""

    def __init__(self, secrets: Secrets, clock: Clock) -> None:
        self._secrets = secrets
        self._clock = clock

    async def add(self, tx: Tx, events: Iterable[AuditEvent]) -> None:
        """Append at the end of the chain. Last thing in a transaction: it locks the chain's head until the commit."""
        head = await store.lock_audit_head(tx)
        seq, mac = head.seq, head.mac
        now = self._clock.now()
        for event in events:
            seq += 1
            row = AuditRow(
                seq=seq,
                occurred_at=now,
                kind=event.kind.value,
                user_id=event.user_id.uuid if event.user_id else None,
                team_id=event.team_id.uuid if event.team_id else None,
                subject=str(event.subject or ""),
                client_address=event.client_address[:_MAX_ADDRESS_LENGTH],
                request_id=current_request_id(),
                detail=event.detail,
                mac=b"",
            )
            mac = self._mac(mac, row)
            await store.insert_audit_row(tx, row, mac)
        await store.set_audit_head(tx, seq, mac)

    async def verify(self, tx: Tx) -> AuditProblem | None:
        """The first row that is not as it was written, or None."""
        head = await store.audit_head(tx)
        seq, mac = 0, b""
        while rows := await store.audit_rows_after(tx, seq, _BATCH):
            for row in rows:
                if row.seq != seq + 1:
                    return AuditProblem(seq + 1, f"row {seq + 1} is missing")
                expected = self._mac(mac, row)
                if row.mac != expected:
                    return AuditProblem(row.seq, f"row {row.seq} was changed, or the one before it")
                if row.seq == head.seq and row.mac != head.mac:
                    return AuditProblem(row.seq, f"row {row.seq} is not the one that was written")
                seq, mac = row.seq, row.mac
        # More rows than the head tells of were added while we read; fewer means that the end was cut off.
        if seq < head.seq:
            return AuditProblem(seq + 1, f"the log ends at row {seq}, but {head.seq} rows were written")
        return None

    def _mac(self, previous: bytes, row: AuditRow) -> bytes:
        content = [
            previous.hex(), row.seq, int(row.occurred_at.timestamp() * 1_000_000), row.kind, str(row.user_id or ""),
            str(row.team_id or ""), row.subject, row.client_address, row.request_id, row.detail,
        ]  # fmt: skip
        return self._secrets.mac("audit", json.dumps(content, separators=(",", ":")).encode())


async def verify_audit_log(tx: Tx, secrets: Secrets, clock: Clock) -> AuditProblem | None:
    """The first row of the audit log that is not as it was written, or None."""
    return await AuditLog(secrets, clock).verify(tx)
