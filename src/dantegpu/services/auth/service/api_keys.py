"""API keys: made, listed, revoked, and asked "whose is this?" by the gateway."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import ApiKeyId, TeamId, UserId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import Forbidden, InvalidArgument, Unauthenticated
from dantegpu.kit.paging import decode_cursor, encode_cursor, page_limit
from dantegpu.services.auth import store
from dantegpu.services.auth.audit import AuditEvent, AuditKind, AuditLog
from dantegpu.services.auth.errors import ApiKeyNotFound, InvalidScope, LimitReached, TeamNotFound
from dantegpu.services.auth.secrets import new_token, token_sha256
from dantegpu.services.auth.service.common import checked_name, require_user, role_in
from dantegpu.services.auth.settings import AuthSettings
from dantegpu.services.auth.store import ApiKeyRow, ValidKeyRow

PREFIX: Final = "dante_"
SHOWN_CHARACTERS: Final = len(PREFIX) + 6
SCOPES: Final = frozenset(
    f"{kind}:{right}" for kind in ("account", "admin", "jobs", "machines", "wallet") for right in ("read", "write")
)
ADMIN_SCOPE: Final = "admin:write"
MAX_KEYS_PER_CALL: Final = 1000
MAX_LIFETIME_SECONDS: Final = 10 * 366 * 86_400
_USE_NOTED_EVERY: Final = timedelta(minutes=1)


def covered(scope: str, scopes: frozenset[str]) -> bool:
    """Whether somebody with `scopes` has this one: writing includes reading."""
    return scope in scopes or f"{scope.partition(':')[0]}:write" in scopes


class ApiKeys:
    """Use cases of API keys."""

    def __init__(self, audit: AuditLog, clock: Clock, settings: AuthSettings) -> None:
        self._audit = audit
        self._clock = clock
        self._settings = settings

    async def create(
        self, tx: Tx, actor: Actor, name: str, scopes: Sequence[str], expires_in_seconds: int
    ) -> tuple[ApiKeyRow, str]:
        """A key for the asking user in the acting team, and its secret, which is not stored.

        Raises Unauthenticated, TeamNotFound, InvalidArgument, InvalidScope, LimitReached, Forbidden.
        """
        user_id, team_id = require_user(actor), actor.require_team()
        name = checked_name(name, "name")
        wanted = self._checked_scopes(actor, scopes)
        if not 0 <= expires_in_seconds <= MAX_LIFETIME_SECONDS:
            raise InvalidArgument(f"expires_in_seconds: expected 0 (never) to {MAX_LIFETIME_SECONDS}")
        if await role_in(tx, actor, team_id) is None:
            raise TeamNotFound(team_id)
        now = self._clock.now()
        limit = self._settings.max_api_keys_per_user
        if await store.count_api_keys(tx, user_id.uuid, now) >= limit:
            raise LimitReached("API keys of yours", limit)
        secret = new_token(PREFIX)
        key_id = ApiKeyId.new()
        row = await store.insert_api_key(
            tx,
            id=key_id.uuid,
            secret_sha256=token_sha256(secret),
            prefix=secret[:SHOWN_CHARACTERS],
            name=name,
            user_id=user_id.uuid,
            team_id=team_id.uuid,
            scopes=wanted,
            now=now,
            expires_at=now + timedelta(seconds=expires_in_seconds) if expires_in_seconds else None,
        )
        await self._audit.add(tx, [AuditEvent(AuditKind.KEY_CREATED, user_id, team_id, key_id)])
        return row, secret

    @staticmethod
    def _checked_scopes(actor: Actor, scopes: Sequence[str]) -> list[str]:
        wanted = sorted(set(scopes))
        if unknown := [scope for scope in wanted if scope not in SCOPES]:
            raise InvalidScope(f"scopes: {unknown[0][:50]!r} is none; there are {', '.join(sorted(SCOPES))}")
        # A key must not make a key that may do more.
        if actor.scopes and (not wanted or not all(covered(scope, actor.scopes) for scope in wanted)):
            raise Forbidden(
                f"an API key can only make keys with its own scopes or fewer: {', '.join(sorted(actor.scopes))}"
            )
        return wanted

    async def list_keys(self, tx: Tx, actor: Actor, limit: int, cursor: str) -> tuple[list[ApiKeyRow], str]:
        """Keys of the acting team, newest first, and the next cursor: all for its owners, else one's own."""
        user_id, team_id = require_user(actor), actor.require_team()
        limit = page_limit(limit)
        sees_all = await role_in(tx, actor, team_id) == "owner"
        rows = await store.list_api_keys(
            tx,
            team_id=team_id.uuid,
            user_id=None if sees_all else user_id.uuid,
            before=ApiKeyId.parse(decode_cursor(cursor, str)[0]).uuid if cursor else None,
            limit=limit + 1,
        )
        more = len(rows) > limit
        return rows[:limit], encode_cursor(str(ApiKeyId(rows[limit - 1].id))) if more else ""

    async def revoke(self, tx: Tx, actor: Actor, key_id: ApiKeyId) -> None:
        """One's own key, or one of a team that one owns; again: nothing. Raises ApiKeyNotFound, Unauthenticated."""
        user_id = require_user(actor)
        row = await store.lock_api_key(tx, key_id.uuid)
        if row is None:
            raise ApiKeyNotFound(key_id)
        own = row.user_id == user_id.uuid
        if not (own or actor.operator or await role_in(tx, actor, TeamId(row.team_id)) == "owner"):
            raise ApiKeyNotFound(key_id)
        if await store.revoke_api_key(tx, key_id.uuid, self._clock.now()):
            await self._audit.add(tx, [AuditEvent(AuditKind.KEY_REVOKED, user_id, TeamId(row.team_id), key_id)])

    async def verify(self, tx: Tx, actor: Actor, keys: Sequence[str]) -> list[tuple[Actor, ValidKeyRow] | None]:
        """Who sends each key; None: it is wrong, expired or revoked, or its user left the team.

        Raises Unauthenticated (for services only), InvalidArgument.
        """
        if not actor.is_service:
            raise Unauthenticated("only the platform's own services ask whose a key is")
        if len(keys) > MAX_KEYS_PER_CALL:
            raise InvalidArgument(f"keys: at most {MAX_KEYS_PER_CALL} at once")
        now = self._clock.now()
        sha256s = [token_sha256(key) for key in keys]
        valid = await store.valid_api_keys(tx, sha256s, now)
        if valid:
            ids = [row.id for row in valid.values()]
            await store.note_use_of_api_keys(tx, ids, now=now, stale=now - _USE_NOTED_EVERY)
        return [(_actor(row), row) if (row := valid.get(sha256)) else None for sha256 in sha256s]


def _actor(row: ValidKeyRow) -> Actor:
    scopes = frozenset(row.scopes)
    return Actor(
        common_pb2.Actor.USER,
        user_id=UserId(row.user_id),
        team_id=TeamId(row.team_id),
        role=row.role,
        # A key with scopes is an operator's only when it was made to be.
        operator=row.operator and (not scopes or ADMIN_SCOPE in scopes),
        scopes=scopes,
    )
