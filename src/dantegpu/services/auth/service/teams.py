"""Teams and who is in them."""

from typing import Final
from uuid import UUID

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import ApiKeyId, TeamId, UserId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import Forbidden, InvalidArgument
from dantegpu.kit.paging import decode_cursor, encode_cursor, page_limit
from dantegpu.services.auth import store
from dantegpu.services.auth.audit import AuditEvent, AuditKind, AuditLog
from dantegpu.services.auth.errors import LastOwner, LimitReached, TeamNotFound, UserNotFound
from dantegpu.services.auth.service.common import checked_name, normalise_email, require_user, role_in
from dantegpu.services.auth.settings import AuthSettings
from dantegpu.services.auth.store import MemberRow, TeamRow

ROLES: Final = ("owner", "member", "viewer")


class Teams:
    """Use cases of teams."""

    def __init__(self, audit: AuditLog, clock: Clock, settings: AuthSettings) -> None:
        self._audit = audit
        self._clock = clock
        self._settings = settings

    async def create(self, tx: Tx, actor: Actor, name: str) -> TeamRow:
        """The asking user owns it. Raises Unauthenticated, InvalidArgument, LimitReached."""
        user_id = require_user(actor)
        name = checked_name(name, "name")
        limit = self._settings.max_teams_per_user
        if len(await store.teams_of_user(tx, user_id.uuid)) >= limit:
            raise LimitReached("teams of yours", limit)
        now = self._clock.now()
        team_id = TeamId.new()
        await store.insert_team(tx, id=team_id.uuid, name=name, now=now)
        await store.put_member(tx, team_id=team_id.uuid, user_id=user_id.uuid, role="owner", now=now)
        await self._audit.add(tx, [AuditEvent(AuditKind.TEAM_CREATED, user_id, team_id)])
        return TeamRow(team_id.uuid, name, "owner", now)

    async def list_teams(self, tx: Tx, actor: Actor, limit: int, cursor: str) -> tuple[list[TeamRow], str]:
        """Newest first and the next cursor: an operator sees all, others their own. Raises Unauthenticated."""
        if not (actor.operator or actor.is_service):
            require_user(actor)
        limit = page_limit(limit)
        rows = await store.list_teams(
            tx,
            user_id=actor.user_id.uuid if actor.user_id else None,
            everything=actor.operator or actor.is_service,
            before=TeamId.parse(decode_cursor(cursor, str)[0]).uuid if cursor else None,
            limit=limit + 1,
        )
        more = len(rows) > limit
        return rows[:limit], encode_cursor(str(TeamId(rows[limit - 1].id))) if more else ""

    async def members(self, tx: Tx, actor: Actor, team_id: TeamId) -> list[MemberRow]:
        """Raises TeamNotFound."""
        members = await store.members_of_team(tx, team_id.uuid)
        if not (actor.operator or actor.is_service):
            user_id = require_user(actor).uuid
            if user_id not in {member.user_id for member in members}:
                raise TeamNotFound(team_id)
        if not members:
            raise TeamNotFound(team_id)
        return members

    async def set_member(self, tx: Tx, actor: Actor, team_id: TeamId, email: str, role: str) -> None:
        """Add, change or (`role` empty) remove a member. Owners may; members may remove themselves.

        Raises TeamNotFound, Forbidden, UserNotFound, LastOwner, LimitReached, InvalidArgument.
        """
        asking = require_user(actor)
        if role and role not in ROLES:
            raise InvalidArgument(f"role: expected one of {', '.join(ROLES)}, or nothing to remove the member")
        # One change of a team at a time: else two owners could remove one another.
        if not await store.lock_team(tx, team_id.uuid):
            raise TeamNotFound(team_id)
        asking_role = await role_in(tx, actor, team_id)
        if asking_role is None and not actor.operator:
            raise TeamNotFound(team_id)
        user = await store.user_by_email(tx, normalise_email(email))
        leaving = not role and user is not None and user.id == asking.uuid
        if not (asking_role == "owner" or actor.operator or leaving):
            raise Forbidden("only owners may change who is in the team")
        if user is None:
            raise UserNotFound()
        members = {member.user_id: member.role for member in await store.members_of_team(tx, team_id.uuid)}
        before = members.get(user.id, "")
        if before == role:
            return
        if before == "owner" and sum(each == "owner" for each in members.values()) == 1:
            raise LastOwner()
        if not before and len(members) >= self._settings.max_members_per_team:
            raise LimitReached("members in this team", self._settings.max_members_per_team)
        await self._change(tx, actor, team_id, user.id, before, role)

    async def _change(self, tx: Tx, actor: Actor, team_id: TeamId, user_id: UUID, before: str, role: str) -> None:
        now = self._clock.now()
        detail = f"{before or 'nobody'} -> {role or 'nobody'}"
        events = [AuditEvent(AuditKind.MEMBER_CHANGED, actor.user_id, team_id, UserId(user_id), detail=detail)]
        if role:
            await store.put_member(tx, team_id=team_id.uuid, user_id=user_id, role=role, now=now)
        else:
            await store.delete_member(tx, team_id.uuid, user_id)
            # They are dead without the membership; revoked, they stay so when the person comes back.
            revoked = await store.revoke_api_keys_of_member(tx, team_id.uuid, user_id, now)
            events += [AuditEvent(AuditKind.KEY_REVOKED, actor.user_id, team_id, ApiKeyId(key)) for key in revoked]
        await self._audit.add(tx, events)
