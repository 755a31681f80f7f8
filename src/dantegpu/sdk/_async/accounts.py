"""Accounts, teams, API keys."""

from pydantic import SecretStr

from dantegpu.contracts.rest.accounts import (
    ApiKeyPage,
    CreateApiKey,
    CreatedApiKey,
    CreateTeam,
    LoggedIn,
    Login,
    Logout,
    Me,
    Member,
    Members,
    Register,
    Registered,
    Role,
    SetMember,
    Team,
    Teams,
)
from dantegpu.sdk._async.transport import AsyncTransport
from dantegpu.sdk.protocol import MemorySession, Tokens, new_idempotency_key


class AsyncAuthApi:
    """`client.auth`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def register(self, email: str, password: str, *, team_name: str = "") -> Registered:
        """Make an account with its first team. It is not logged in yet."""
        body = Register(email=email, password=SecretStr(password), team_name=team_name)
        return await self._transport.call(
            Registered,
            "POST",
            "/v1/auth/register",
            body=body,
            idempotency_key=new_idempotency_key(),
            anonymous=True,
        )

    async def login(self, email: str, password: str) -> LoggedIn:
        """Log this client in; its session keeps the tokens and renews them."""
        body = Login(email=email, password=SecretStr(password))
        answer = await self._transport.call(LoggedIn, "POST", "/v1/auth/login", body=body, anonymous=True)
        if self._transport.session is None:
            self._transport.session = MemorySession()
        self._transport.session.store(Tokens(answer.access_token, answer.refresh_token))
        return answer

    async def logout(self) -> None:
        """End the session on the platform and forget its tokens."""
        session = self._transport.session
        tokens = session.load() if session else None
        if session is None or tokens is None:
            return
        body = Logout(refresh_token=SecretStr(tokens.refresh_token))
        await self._transport.send("POST", "/v1/auth/logout", body=body, anonymous=True)
        session.store(None)

    async def switch_team(self, team_id: str) -> None:
        """Act for another of your teams from now on. Raises DanteError for an API key."""
        await self._transport.switch_team(team_id)

    async def me(self) -> Me:
        """Who this client is, and for which team it acts."""
        return await self._transport.call(Me, "GET", "/v1/me")


class AsyncTeamsApi:
    """`client.teams`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self) -> list[Team]:
        """The teams you are in."""
        return (await self._transport.call(Teams, "GET", "/v1/teams")).teams

    async def create(self, name: str) -> Team:
        """A new team with a wallet, owned by you."""
        return await self._transport.call(
            Team, "POST", "/v1/teams", body=CreateTeam(name=name), idempotency_key=new_idempotency_key()
        )

    async def members(self, team_id: str) -> "list[Member]":
        """Who is in a team of yours."""
        return (await self._transport.call(Members, "GET", f"/v1/teams/{team_id}/members")).members

    async def set_member(self, team_id: str, email: str, role: Role) -> None:
        """Add somebody, or change their role. For owners."""
        await self._transport.send("PUT", f"/v1/teams/{team_id}/members/{email}", body=SetMember(role=role))

    async def remove_member(self, team_id: str, email: str) -> None:
        """Take somebody out of a team. For owners."""
        await self._transport.send("DELETE", f"/v1/teams/{team_id}/members/{email}")


class AsyncKeysApi:
    """`client.keys`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, name: str, *, expires_in_seconds: int = 0) -> CreatedApiKey:
        """A new API key of the team you act for; its secret is shown only now. 0: it never expires."""
        body = CreateApiKey(name=name, expires_in_seconds=expires_in_seconds)
        return await self._transport.call(
            CreatedApiKey, "POST", "/v1/api-keys", body=body, idempotency_key=new_idempotency_key()
        )

    async def list(self, *, cursor: str | None = None, limit: int = 100) -> ApiKeyPage:
        """One page of your keys."""
        params = {"cursor": cursor, "limit": limit}
        return await self._transport.call(ApiKeyPage, "GET", "/v1/api-keys", params=params)

    async def revoke(self, key_id: str) -> None:
        """End a key; the platform refuses it within seconds."""
        await self._transport.send("DELETE", f"/v1/api-keys/{key_id}")
