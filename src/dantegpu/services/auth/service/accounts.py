"""Registering, logging in, sessions."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from pydantic import SecretStr

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import SessionId, TeamId, UserId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import Unauthenticated
from dantegpu.services.auth import store
from dantegpu.services.auth.audit import AuditEvent, AuditKind, AuditLog
from dantegpu.services.auth.errors import (
    EmailTaken,
    InvalidEmail,
    InvalidRefreshToken,
    OperatorEmailTaken,
    TeamNotFound,
    WrongCredentials,
)
from dantegpu.services.auth.passwords import Passwords, check_strength
from dantegpu.services.auth.secrets import Secrets, new_token, token_sha256
from dantegpu.services.auth.service.common import MAX_NAME_LENGTH, checked_name, normalise_email, require_user
from dantegpu.services.auth.settings import AuthSettings
from dantegpu.services.auth.signing import SigningKeys
from dantegpu.services.auth.store import RefreshTokenRow, TeamRow, UserRow
from dantegpu.services.auth.throttle import LoginThrottle

REFRESH_TOKEN_PREFIX: Final = "danterefresh_"
_MAX_ADDRESS_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """An access token, its life, and the refresh token that comes after it."""

    access_token: str = field(repr=False)
    expires_in_seconds: int
    refresh_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A new session."""

    tokens: Tokens
    user: UserRow
    teams: list[TeamRow]


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """Who wants to log in, before the password is checked."""

    email: str
    client_address: str
    user: UserRow | None


class Accounts:
    """Use cases of people: register, log in, refresh, log out; and the operator's account."""

    def __init__(
        self,
        secrets: Secrets,
        keys: SigningKeys,
        passwords: Passwords,
        throttle: LoginThrottle,
        audit: AuditLog,
        clock: Clock,
        settings: AuthSettings,
    ) -> None:
        self._secrets = secrets
        self._keys = keys
        self._passwords = passwords
        self._throttle = throttle
        self._audit = audit
        self._clock = clock
        self._settings = settings

    # --- registration -------------------------------------------------------------------------------------------------

    async def new_password_hash(self, email: str, password: SecretStr) -> str:
        """Outside of any transaction: it takes a while. Raises InvalidEmail, WeakPassword, Unavailable."""
        check_strength(password, normalise_email(email))
        return await self._passwords.hash(password)

    async def register(self, tx: Tx, email: str, password_hash: str, team_name: str) -> tuple[UserRow, TeamRow]:
        """A user and the first team. Raises EmailTaken, InvalidEmail, InvalidArgument."""
        created = await self._create(tx, normalise_email(email), password_hash, team_name, operator=False)
        if created is None:
            raise EmailTaken()
        user, team = created
        await self._audit.add(tx, [AuditEvent(AuditKind.REGISTERED, UserId(user.id), TeamId(team.id))])
        return created

    async def _create(
        self, tx: Tx, email: str, password_hash: str, team_name: str, *, operator: bool
    ) -> tuple[UserRow, TeamRow] | None:
        """None when the address is taken."""
        now = self._clock.now()
        user_id = UserId.new()
        if not await store.insert_user(
            tx, id=user_id.uuid, email=email, password_hash=password_hash, operator=operator, now=now
        ):
            return None
        team = await self._create_first_team(tx, user_id.uuid, team_name or email.partition("@")[0], now)
        return UserRow(user_id.uuid, email, password_hash, operator, now), team

    async def _create_first_team(self, tx: Tx, user_id: UUID, name: str, now: datetime) -> TeamRow:
        name = checked_name(name[:MAX_NAME_LENGTH], "team_name")
        team = TeamRow(TeamId.new().uuid, name, "owner", now)
        await store.insert_team(tx, id=team.id, name=team.name, now=now)
        await store.put_member(tx, team_id=team.id, user_id=user_id, role="owner", now=now)
        return team

    # --- logging in ---------------------------------------------------------------------------------------------------

    async def begin_login(self, tx: Tx, email: str, client_address: str) -> LoginAttempt:
        """Raises RateLimited."""
        client_address = client_address[:_MAX_ADDRESS_LENGTH]
        try:
            email = normalise_email(email)
            user = await store.user_by_email(tx, email)
        except InvalidEmail:
            # Nobody's address. It is counted and answered like any other unknown one.
            email, user = "", None
        known = user is not None and await store.knows_address(tx, user.id, client_address)
        self._throttle.attempt(email, client_address, address_is_known=known)
        return LoginAttempt(email, client_address, user)

    async def password_matches(self, attempt: LoginAttempt, password: SecretStr) -> bool:
        """Outside of any transaction: it takes a while, and the same while for an unknown user. Raises Unavailable."""
        return await self._passwords.matches(password, attempt.user.password_hash if attempt.user else None)

    async def new_hash_if_outdated(self, attempt: LoginAttempt, password: SecretStr) -> str | None:
        """After a right password: its hash with today's parameters, when it has others."""
        if attempt.user is None or not self._passwords.outdated(attempt.user.password_hash):
            return None
        return await self._passwords.hash(password)

    async def finish_login(
        self, tx: Tx, attempt: LoginAttempt, *, matches: bool, new_hash: str | None
    ) -> LoggedIn | WrongCredentials:
        """A new session. The refusal is a value: what is recorded about it has to be committed."""
        user = attempt.user
        if user is None or not matches:
            event = AuditEvent(
                AuditKind.LOGIN_FAILED, UserId(user.id) if user else None, client_address=attempt.client_address
            )
            await self._audit.add(tx, [event])
            return WrongCredentials()
        self._throttle.succeeded(attempt.email, attempt.client_address)
        if new_hash is not None:
            await store.set_password_hash(tx, user.id, user.password_hash, new_hash)
        now = self._clock.now()
        teams = await store.teams_of_user(tx, user.id)
        if not teams:
            # Removed from every team: a person without one could not even make a new one.
            teams = [await self._create_first_team(tx, user.id, user.email.partition("@")[0], now)]
        tokens = await self._open_session(tx, user, teams[0], attempt.client_address, now)
        event = AuditEvent(
            AuditKind.LOGIN_OK, UserId(user.id), TeamId(teams[0].id), client_address=attempt.client_address
        )
        await self._audit.add(tx, [event])
        return LoggedIn(tokens, user, teams)

    async def _open_session(self, tx: Tx, user: UserRow, team: TeamRow, address: str, now: datetime) -> Tokens:
        session_id = SessionId.new()
        session_end = now + timedelta(seconds=self._settings.session_seconds)
        await store.insert_session(
            tx, id=session_id.uuid, user_id=user.id, team_id=team.id, client_address=address, now=now,
            expires_at=session_end,
        )  # fmt: skip
        refresh_token = new_token(REFRESH_TOKEN_PREFIX)
        await self._remember_refresh_token(tx, refresh_token, session_id.uuid, session_end, now)
        return self._tokens(user, team, refresh_token)

    async def _remember_refresh_token(
        self, tx: Tx, token: str, session_id: UUID, session_end: datetime, now: datetime
    ) -> None:
        expires_at = min(session_end, now + timedelta(seconds=self._settings.refresh_token_seconds))
        await store.insert_refresh_token(tx, sha256=token_sha256(token), session_id=session_id, expires_at=expires_at)

    def _tokens(self, user: UserRow, team: TeamRow, refresh_token: str) -> Tokens:
        access_token, seconds = self._keys.sign(UserId(user.id), TeamId(team.id), team.role, operator=user.operator)
        return Tokens(access_token, seconds, refresh_token)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def refresh(self, tx: Tx, token: str, team_id: TeamId | None) -> Tokens | InvalidRefreshToken:
        """New tokens for an unused refresh token; `team_id` switches the session to another team of the user.

        A used token ends its session (a thief or the owner holds a copy), unless the answer may have been lost: within
        some seconds, and while the follow-up token is unused, the same follow-up token is given again. The refusal is a
        value: the end of the session has to be committed. Raises TeamNotFound; then the token stays unused.
        """
        now = self._clock.now()
        sha256 = token_sha256(token)
        found = await store.lock_refresh_token(tx, sha256)
        if found is None or found.ended_at or now >= found.expires_at or now >= found.session_expires_at:
            return InvalidRefreshToken()
        next_token = self._secrets.follow_up_token(token, REFRESH_TOKEN_PREFIX)
        if found.used_at is not None and not await self._answer_may_be_lost(tx, found, next_token, now):
            await store.end_session(tx, found.session_id, "reuse", now)
            event = AuditEvent(AuditKind.REFRESH_REUSED, UserId(found.user_id), subject=SessionId(found.session_id))
            await self._audit.add(tx, [event])
            return InvalidRefreshToken()
        user, team = await self._session_user(tx, found, team_id)
        if found.used_at is None:
            await store.use_refresh_token(tx, sha256, now)
            await self._remember_refresh_token(tx, next_token, found.session_id, found.session_expires_at, now)
        if team.id != found.team_id:
            await store.set_session_team(tx, found.session_id, team.id)
        return self._tokens(user, team, next_token)

    async def _answer_may_be_lost(self, tx: Tx, found: RefreshTokenRow, next_token: str, now: datetime) -> bool:
        assert found.used_at is not None
        recent = now - found.used_at <= timedelta(seconds=self._settings.refresh_retry_seconds)
        return recent and await store.refresh_token_unused(tx, token_sha256(next_token))

    async def _session_user(self, tx: Tx, found: RefreshTokenRow, team_id: TeamId | None) -> tuple[UserRow, TeamRow]:
        """The user, and the team to act for: `team_id`, else the session's, else the first that is left."""
        user = await store.user_by_id(tx, found.user_id)
        teams = await store.teams_of_user(tx, found.user_id)
        if user is None or not teams:
            raise InvalidRefreshToken()
        wanted = team_id.uuid if team_id else found.team_id
        team = next((each for each in teams if each.id == wanted), None)
        if team is None and team_id is not None:
            raise TeamNotFound(team_id)
        return user, team or teams[0]

    async def log_out(self, tx: Tx, token: str) -> None:
        """End the session. A token that nobody knows is fine: whoever holds it is logged out."""
        found = await store.lock_refresh_token(tx, token_sha256(token))
        if found and await store.end_session(tx, found.session_id, "logout", self._clock.now()):
            event = AuditEvent(AuditKind.LOGGED_OUT, UserId(found.user_id), subject=SessionId(found.session_id))
            await self._audit.add(tx, [event])

    async def me(self, tx: Tx, actor: Actor) -> tuple[UserRow, list[TeamRow]]:
        """Raises Unauthenticated."""
        user_id = require_user(actor).uuid
        user = await store.user_by_id(tx, user_id)
        if user is None:
            raise Unauthenticated("your account is gone; register again")
        return user, await store.teams_of_user(tx, user_id)

    # --- the operator -------------------------------------------------------------------------------------------------

    async def find_operator(self, tx: Tx, actor: Actor, email: str) -> LoginAttempt:
        """Raises Forbidden, InvalidEmail."""
        actor.require_service()
        email = normalise_email(email)
        return LoginAttempt(email, "", await store.user_by_email(tx, email))

    async def ensure_operator(
        self, tx: Tx, found: LoginAttempt, *, password_hash: str | None, matches: bool
    ) -> tuple[UserRow, TeamRow]:
        """`password_hash` for a new account; `matches`: the password is that of the account found.

        Raises OperatorEmailTaken when somebody else registered with the address.
        """
        if password_hash is not None:
            await self._create(tx, found.email, password_hash, "operator", operator=False)
        user = await store.user_by_email(tx, found.email)
        if user is None:
            raise OperatorEmailTaken()
        # Another replica may have made the account just now: then its hash is not the one that we made.
        if not user.operator:
            if user.password_hash != password_hash and not matches:
                raise OperatorEmailTaken()
            if await store.make_operator(tx, user.id):
                await self._audit.add(tx, [AuditEvent(AuditKind.OPERATOR_MADE, UserId(user.id))])
        teams = await store.teams_of_user(tx, user.id)
        team = teams[0] if teams else await self._create_first_team(tx, user.id, "operator", self._clock.now())
        return UserRow(user.id, user.email, user.password_hash, True, user.created_at), team
