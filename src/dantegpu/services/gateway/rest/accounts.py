"""/v1/auth, /v1/me, /v1/teams, /v1/api-keys, /v1/join-tokens."""

from fastapi import APIRouter, Request

from dantegpu.contracts.gen.dante.v1 import auth_pb2, common_pb2
from dantegpu.contracts.rest import accounts
from dantegpu.domain.ids import ApiKeyId, TeamId
from dantegpu.kit import rpc
from dantegpu.services.gateway import convert
from dantegpu.services.gateway.context import (
    Account,
    AccountWriter,
    IdempotencyKey,
    MachineWriter,
    Paging,
    Platform,
    checked_id,
)

router = APIRouter()


@router.post("/v1/auth/register", status_code=201, tags=["accounts"], summary="Make an account and its first team")
async def register(body: accounts.Register, key: IdempotencyKey, platform: Platform) -> accounts.Registered:
    request = auth_pb2.RegisterRequest(
        email=body.email, password=body.password.get_secret_value(), team_name=body.team_name, idempotency_key=key
    )
    response = await rpc.call(platform.clients.auth.Register, request)
    return accounts.Registered(user=convert.user(response.user), team=convert.team(response.team))


@router.post("/v1/auth/login", tags=["accounts"], summary="Get an access token and a refresh token")
async def login(body: accounts.Login, http: Request, platform: Platform) -> accounts.LoggedIn:
    request = auth_pb2.LoginRequest(
        email=body.email,
        password=body.password.get_secret_value(),
        client_address=http.client.host if http.client else "",
    )
    response = await rpc.call(platform.clients.auth.Login, request)
    return accounts.LoggedIn(
        **convert.tokens(response.tokens).model_dump(),
        user=convert.user(response.user),
        teams=[convert.team(team) for team in response.teams],
    )


@router.post("/v1/auth/refresh", tags=["accounts"], summary="Exchange a refresh token for new tokens")
async def refresh(body: accounts.Refresh, platform: Platform) -> accounts.Tokens:
    request = auth_pb2.RefreshRequest(refresh_token=body.refresh_token.get_secret_value(), team_id=body.team_id)
    response = await rpc.call(platform.clients.auth.Refresh, request)
    return convert.tokens(response.tokens)


@router.post("/v1/auth/logout", status_code=204, tags=["accounts"], summary="End the session of a refresh token")
async def logout(body: accounts.Logout, platform: Platform) -> None:
    request = auth_pb2.LogoutRequest(refresh_token=body.refresh_token.get_secret_value())
    await rpc.call(platform.clients.auth.Logout, request)


async def _me(platform: Platform) -> accounts.Me:
    response = await rpc.call(platform.clients.auth.GetMe, common_pb2.Empty())
    teams = [convert.team(team) for team in response.teams]
    return accounts.Me(user=convert.user(response.user), teams=teams, team_id=response.team_id)


@router.get("/v1/me", tags=["accounts"], summary="Who am I, and for which team do I act?")
async def me(_actor: Account, platform: Platform) -> accounts.Me:
    return await _me(platform)


@router.get("/v1/teams", tags=["teams"], summary="Your teams")
async def list_teams(_actor: Account, platform: Platform) -> accounts.Teams:
    return accounts.Teams(teams=(await _me(platform)).teams)


@router.post("/v1/teams", status_code=201, tags=["teams"], summary="Make a team with a wallet of its own")
async def create_team(
    body: accounts.CreateTeam, _actor: AccountWriter, key: IdempotencyKey, platform: Platform
) -> accounts.Team:
    request = auth_pb2.CreateTeamRequest(name=body.name, idempotency_key=key)
    return convert.team((await rpc.call(platform.clients.auth.CreateTeam, request)).team)


@router.get("/v1/teams/{team_id}/members", tags=["teams"], summary="Members of a team")
async def list_members(team_id: str, _actor: Account, platform: Platform) -> accounts.Members:
    request = auth_pb2.ListMembersRequest(team_id=checked_id(TeamId, team_id))
    response = await rpc.call(platform.clients.auth.ListMembers, request)
    members = [accounts.Member(user_id=each.user_id, email=each.email, role=each.role) for each in response.members]
    return accounts.Members(members=members)


@router.put("/v1/teams/{team_id}/members/{email}", status_code=204, tags=["teams"], summary="Add or change a member")
async def set_member(
    team_id: str, email: str, body: accounts.SetMember, _actor: AccountWriter, platform: Platform
) -> None:
    request = auth_pb2.SetMemberRequest(team_id=checked_id(TeamId, team_id), email=email, role=body.role)
    await rpc.call(platform.clients.auth.SetMember, request)


@router.delete("/v1/teams/{team_id}/members/{email}", status_code=204, tags=["teams"], summary="Remove a member")
async def remove_member(team_id: str, email: str, _actor: AccountWriter, platform: Platform) -> None:
    request = auth_pb2.SetMemberRequest(team_id=checked_id(TeamId, team_id), email=email)
    await rpc.call(platform.clients.auth.SetMember, request)


@router.get("/v1/api-keys", tags=["api keys"], summary="Your API keys")
async def list_api_keys(_actor: Account, page: Paging, platform: Platform) -> accounts.ApiKeyPage:
    response = await rpc.call(platform.clients.auth.ListApiKeys, auth_pb2.ListApiKeysRequest(page=page))
    keys = [convert.api_key(each) for each in response.keys]
    return accounts.ApiKeyPage(keys=keys, next_cursor=response.next_cursor or None)


@router.post("/v1/api-keys", status_code=201, tags=["api keys"], summary="Make an API key")
async def create_api_key(
    body: accounts.CreateApiKey, _actor: AccountWriter, key: IdempotencyKey, platform: Platform
) -> accounts.CreatedApiKey:
    request = auth_pb2.CreateApiKeyRequest(
        name=body.name, scopes=body.scopes, expires_in_seconds=body.expires_in_seconds, idempotency_key=key
    )
    response = await rpc.call(platform.clients.auth.CreateApiKey, request)
    return accounts.CreatedApiKey(key=convert.api_key(response.key), secret=response.secret)


@router.delete("/v1/api-keys/{key_id}", status_code=204, tags=["api keys"], summary="Revoke an API key")
async def revoke_api_key(key_id: str, _actor: AccountWriter, platform: Platform) -> None:
    request = auth_pb2.RevokeApiKeyRequest(key_id=checked_id(ApiKeyId, key_id))
    await rpc.call(platform.clients.auth.RevokeApiKey, request)


@router.post("/v1/join-tokens", status_code=201, tags=["machines"], summary="Make a token with which machines join")
async def create_join_token(
    body: accounts.CreateJoinToken, _actor: MachineWriter, key: IdempotencyKey, platform: Platform
) -> accounts.JoinToken:
    request = auth_pb2.CreateJoinTokenRequest(
        expires_in_seconds=body.expires_in_seconds, max_uses=body.max_uses, idempotency_key=key
    )
    response = await rpc.call(platform.clients.auth.CreateJoinToken, request)
    return accounts.JoinToken(token=response.token, expires_at=convert.when(response.expires_at))
