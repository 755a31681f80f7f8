"""auth's tables. Named SQL: sql/queries.sql."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import cast
from uuid import UUID

from dantegpu.kit.db import Queries, Tx

QUERIES = Queries.of("dantegpu.services.auth")


@dataclass(frozen=True, slots=True)
class UserRow:
    """A person."""

    id: UUID
    email: str
    password_hash: str = field(repr=False)
    operator: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class TeamRow:
    """A team and the asking user's role in it (empty: none)."""

    id: UUID
    name: str
    role: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class MemberRow:
    """Somebody in a team."""

    user_id: UUID
    email: str
    role: str


@dataclass(frozen=True, slots=True)
class RefreshTokenRow:
    """A refresh token and its session."""

    session_id: UUID
    user_id: UUID
    team_id: UUID
    session_expires_at: datetime
    ended_at: datetime | None
    expires_at: datetime
    used_at: datetime | None


@dataclass(frozen=True, slots=True)
class ApiKeyRow:
    """A key without its secret."""

    id: UUID
    prefix: str
    name: str
    user_id: UUID
    team_id: UUID
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class ValidKeyRow:
    """A key that is accepted now, and what its user is now."""

    secret_sha256: bytes
    id: UUID
    user_id: UUID
    team_id: UUID
    role: str
    operator: bool
    scopes: list[str]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class JoinTokenRow:
    """A token with which machines join, without its secret."""

    id: UUID
    team_id: UUID
    expires_at: datetime
    uses: int
    max_uses: int


@dataclass(frozen=True, slots=True)
class MachineRow:
    """A machine and its public key."""

    id: UUID
    team_id: UUID
    public_key: str
    join_token_id: UUID
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class SigningKeyRow:
    """A signing key, its private half encrypted."""

    kid: str
    public_key: bytes
    private_key_sealed: bytes
    signs_from: datetime


@dataclass(frozen=True, slots=True)
class AuditHead:
    """The last row of the audit log."""

    seq: int
    mac: bytes


@dataclass(frozen=True, slots=True)
class AuditRow:
    """A security event; `mac` ties it to the row before."""

    seq: int
    occurred_at: datetime
    kind: str
    user_id: UUID | None
    team_id: UUID | None
    subject: str
    client_address: str
    request_id: str
    detail: str
    mac: bytes


@dataclass(frozen=True, slots=True)
class _Id:
    id: UUID


# --- users ------------------------------------------------------------------------------------------------------------


async def insert_user(tx: Tx, *, id: UUID, email: str, password_hash: str, operator: bool, now: datetime) -> bool:
    """False when the address is taken."""
    return (
        await tx.run(
            QUERIES["insert_user"], id=id, email=email, password_hash=password_hash, operator=operator, now=now
        )
        == 1
    )


async def user_by_email(tx: Tx, email: str) -> UserRow | None:
    return await tx.one(UserRow, QUERIES["user_by_email"], email=email)


async def user_by_id(tx: Tx, user_id: UUID) -> UserRow | None:
    return await tx.one(UserRow, QUERIES["user_by_id"], id=user_id)


async def set_password_hash(tx: Tx, user_id: UUID, old: str, new: str) -> None:
    """Does nothing when the hash is no longer `old`."""
    await tx.run(QUERIES["set_password_hash"], id=user_id, old=old, password_hash=new)


async def make_operator(tx: Tx, user_id: UUID) -> bool:
    """False when the user was one already."""
    return await tx.run(QUERIES["make_operator"], id=user_id) == 1


# --- teams ------------------------------------------------------------------------------------------------------------


async def insert_team(tx: Tx, *, id: UUID, name: str, now: datetime) -> None:
    await tx.run(QUERIES["insert_team"], id=id, name=name, now=now)


async def lock_team(tx: Tx, team_id: UUID) -> bool:
    """False when there is no such team."""
    return await tx.value(QUERIES["lock_team"], id=team_id) is not None


async def teams_of_user(tx: Tx, user_id: UUID) -> list[TeamRow]:
    """The one the user joined first comes first."""
    return await tx.all(TeamRow, QUERIES["teams_of_user"], user_id=user_id)


async def list_teams(
    tx: Tx, *, user_id: UUID | None, everything: bool, before: UUID | None, limit: int
) -> list[TeamRow]:
    return await tx.all(
        TeamRow, QUERIES["list_teams"], user_id=user_id, everything=everything, before=before, limit=limit
    )


async def put_member(tx: Tx, *, team_id: UUID, user_id: UUID, role: str, now: datetime) -> None:
    await tx.run(QUERIES["put_member"], team_id=team_id, user_id=user_id, role=role, now=now)


async def delete_member(tx: Tx, team_id: UUID, user_id: UUID) -> None:
    await tx.run(QUERIES["delete_member"], team_id=team_id, user_id=user_id)


async def role_of(tx: Tx, team_id: UUID, user_id: UUID) -> str | None:
    return cast("str | None", await tx.value(QUERIES["role_of"], team_id=team_id, user_id=user_id))


async def members_of_team(tx: Tx, team_id: UUID) -> list[MemberRow]:
    return await tx.all(MemberRow, QUERIES["members_of_team"], team_id=team_id)


# --- sessions ---------------------------------------------------------------------------------------------------------


async def insert_session(
    tx: Tx, *, id: UUID, user_id: UUID, team_id: UUID, client_address: str, now: datetime, expires_at: datetime
) -> None:
    await tx.run(
        QUERIES["insert_session"], id=id, user_id=user_id, team_id=team_id, client_address=client_address, now=now,
        expires_at=expires_at,
    )  # fmt: skip


async def knows_address(tx: Tx, user_id: UUID, client_address: str) -> bool:
    """Whether the user logged in from this address before."""
    return bool(await tx.value(QUERIES["knows_address"], user_id=user_id, client_address=client_address))


async def insert_refresh_token(tx: Tx, *, sha256: bytes, session_id: UUID, expires_at: datetime) -> None:
    await tx.run(QUERIES["insert_refresh_token"], sha256=sha256, session_id=session_id, expires_at=expires_at)


async def lock_refresh_token(tx: Tx, sha256: bytes) -> RefreshTokenRow | None:
    """The token and its session, locked: two refreshes of one session come after one another."""
    return await tx.one(RefreshTokenRow, QUERIES["lock_refresh_token"], sha256=sha256)


async def refresh_token_unused(tx: Tx, sha256: bytes) -> bool:
    return bool(await tx.value(QUERIES["refresh_token_unused"], sha256=sha256))


async def use_refresh_token(tx: Tx, sha256: bytes, now: datetime) -> None:
    await tx.run(QUERIES["use_refresh_token"], sha256=sha256, now=now)


async def set_session_team(tx: Tx, session_id: UUID, team_id: UUID) -> None:
    await tx.run(QUERIES["set_session_team"], id=session_id, team_id=team_id)


async def end_session(tx: Tx, session_id: UUID, because: str, now: datetime) -> bool:
    """False when it had ended already."""
    return await tx.run(QUERIES["end_session"], id=session_id, because=because, now=now) == 1


async def delete_expired_sessions(tx: Tx, before: datetime) -> None:
    await tx.run(QUERIES["delete_expired_sessions"], before=before)


# --- API keys ---------------------------------------------------------------------------------------------------------


async def insert_api_key(
    tx: Tx, *, id: UUID, secret_sha256: bytes, prefix: str, name: str, user_id: UUID, team_id: UUID,
    scopes: Sequence[str], now: datetime, expires_at: datetime | None,
) -> ApiKeyRow:  # fmt: skip
    row = await tx.one(
        ApiKeyRow, QUERIES["insert_api_key"], id=id, secret_sha256=secret_sha256, prefix=prefix, name=name,
        user_id=user_id, team_id=team_id, scopes=list(scopes), now=now, expires_at=expires_at,
    )  # fmt: skip
    assert row is not None, "INSERT ... RETURNING gives a row"
    return row


async def count_api_keys(tx: Tx, user_id: UUID, now: datetime) -> int:
    """Keys that can be used."""
    return int(await tx.value(QUERIES["count_api_keys"], user_id=user_id, now=now))


async def list_api_keys(
    tx: Tx, *, team_id: UUID, user_id: UUID | None, before: UUID | None, limit: int
) -> list[ApiKeyRow]:
    """Newest first; those of `user_id` alone unless it is None."""
    return await tx.all(
        ApiKeyRow, QUERIES["list_api_keys"], team_id=team_id, user_id=user_id, before=before, limit=limit
    )


async def lock_api_key(tx: Tx, key_id: UUID) -> ApiKeyRow | None:
    return await tx.one(ApiKeyRow, QUERIES["lock_api_key"], id=key_id)


async def revoke_api_key(tx: Tx, key_id: UUID, now: datetime) -> bool:
    """False when it was revoked already."""
    return await tx.run(QUERIES["revoke_api_key"], id=key_id, now=now) == 1


async def revoke_api_keys_of_member(tx: Tx, team_id: UUID, user_id: UUID, now: datetime) -> list[UUID]:
    """The keys that were revoked."""
    rows = await tx.all(_Id, QUERIES["revoke_api_keys_of_member"], team_id=team_id, user_id=user_id, now=now)
    return [row.id for row in rows]


async def valid_api_keys(tx: Tx, sha256s: Sequence[bytes], now: datetime) -> dict[bytes, ValidKeyRow]:
    rows = await tx.all(ValidKeyRow, QUERIES["valid_api_keys"], sha256s=list(sha256s), now=now)
    return {row.secret_sha256: row for row in rows}


async def note_use_of_api_keys(tx: Tx, ids: Sequence[UUID], *, now: datetime, stale: datetime) -> None:
    """Write `last_used_at` of those where it is older than `stale`; skips keys that somebody else is writing."""
    await tx.run(QUERIES["note_use_of_api_keys"], ids=list(ids), now=now, stale=stale)


# --- machines ---------------------------------------------------------------------------------------------------------


async def insert_join_token(
    tx: Tx, *, id: UUID, token_sha256: bytes, team_id: UUID, created_by: UUID, now: datetime, expires_at: datetime,
    max_uses: int,
) -> None:  # fmt: skip
    await tx.run(
        QUERIES["insert_join_token"], id=id, token_sha256=token_sha256, team_id=team_id, created_by=created_by,
        now=now, expires_at=expires_at, max_uses=max_uses,
    )  # fmt: skip


async def lock_join_token(tx: Tx, token_sha256: bytes) -> JoinTokenRow | None:
    return await tx.one(JoinTokenRow, QUERIES["lock_join_token"], token_sha256=token_sha256)


async def use_join_token(tx: Tx, token_id: UUID) -> None:
    await tx.run(QUERIES["use_join_token"], id=token_id)


async def machine_by_key(tx: Tx, public_key: str) -> MachineRow | None:
    """The machine of a key that is not revoked."""
    return await tx.one(MachineRow, QUERIES["machine_by_key"], public_key=public_key)


async def lock_machine(tx: Tx, machine_id: UUID) -> MachineRow | None:
    return await tx.one(MachineRow, QUERIES["lock_machine"], id=machine_id)


async def insert_machine(
    tx: Tx, *, id: UUID, team_id: UUID, public_key: str, join_token_id: UUID, now: datetime
) -> bool:
    """False when the key is a machine already."""
    return (
        await tx.run(
            QUERIES["insert_machine"],
            id=id,
            team_id=team_id,
            public_key=public_key,
            join_token_id=join_token_id,
            now=now,
        )
        == 1
    )


async def note_renewal(tx: Tx, machine_id: UUID, now: datetime) -> None:
    await tx.run(QUERIES["note_renewal"], id=machine_id, now=now)


async def revoke_machine(tx: Tx, machine_id: UUID, now: datetime) -> bool:
    """False when it was revoked already."""
    return await tx.run(QUERIES["revoke_machine"], id=machine_id, now=now) == 1


# --- signing keys -----------------------------------------------------------------------------------------------------


async def lock_signing_keys(tx: Tx) -> None:
    """One replica at a time makes keys."""
    await tx.run(QUERIES["lock_signing_keys"])


async def signing_keys(tx: Tx) -> list[SigningKeyRow]:
    """Oldest first."""
    return await tx.all(SigningKeyRow, QUERIES["signing_keys"])


async def insert_signing_key(
    tx: Tx, *, kid: str, public_key: bytes, private_key_sealed: bytes, signs_from: datetime, now: datetime
) -> None:
    await tx.run(
        QUERIES["insert_signing_key"], kid=kid, public_key=public_key, private_key_sealed=private_key_sealed,
        signs_from=signs_from, now=now,
    )  # fmt: skip


async def delete_signing_keys(tx: Tx, kids: Sequence[str]) -> None:
    await tx.run(QUERIES["delete_signing_keys"], kids=list(kids))


# --- audit log --------------------------------------------------------------------------------------------------------


async def lock_audit_head(tx: Tx) -> AuditHead:
    head = await tx.one(AuditHead, QUERIES["lock_audit_head"])
    assert head is not None, "the migration made the row"
    return head


async def audit_head(tx: Tx) -> AuditHead:
    head = await tx.one(AuditHead, QUERIES["audit_head"])
    return head or AuditHead(0, b"")


async def insert_audit_row(tx: Tx, row: AuditRow, mac: bytes) -> None:
    await tx.run(
        QUERIES["insert_audit_row"], seq=row.seq, occurred_at=row.occurred_at, kind=row.kind, user_id=row.user_id,
        team_id=row.team_id, subject=row.subject, client_address=row.client_address, request_id=row.request_id,
        detail=row.detail, mac=mac,
    )  # fmt: skip


async def set_audit_head(tx: Tx, seq: int, mac: bytes) -> None:
    await tx.run(QUERIES["set_audit_head"], seq=seq, mac=mac)


async def audit_rows_after(tx: Tx, after: int, limit: int) -> list[AuditRow]:
    return await tx.all(AuditRow, QUERIES["audit_rows_after"], after=after, limit=limit)
