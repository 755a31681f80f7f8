"""auth-service's gRPC door: protobuf to typed values and back, one transaction per step."""

from datetime import datetime
from typing import TYPE_CHECKING, Any, override

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import SecretStr

from dantegpu.contracts.gen.dante.v1 import auth_pb2 as pb
from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.contracts.gen.dante.v1.auth_pb2_grpc import AuthServiceServicer
from dantegpu.domain.ids import ApiKeyId, MachineId, TeamId, UserId
from dantegpu.kit.actor import Actor, current_actor
from dantegpu.kit.db import Database
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.idempotency import once
from dantegpu.services.auth.secrets import Secrets
from dantegpu.services.auth.service.accounts import Accounts, Tokens
from dantegpu.services.auth.service.api_keys import ApiKeys
from dantegpu.services.auth.service.common import normalise_email
from dantegpu.services.auth.service.machines import Credential, Machines
from dantegpu.services.auth.service.teams import Teams
from dantegpu.services.auth.signing import SigningKeys
from dantegpu.services.auth.store import ApiKeyRow, TeamRow, UserRow, ValidKeyRow

if TYPE_CHECKING:
    from grpc import aio

    type Context = aio.ServicerContext[Any, Any]

_REMEMBERED = "remembered answer"


class AuthRpc(AuthServiceServicer):
    """The servicer; use cases are in `service`."""

    def __init__(
        self,
        db: Database,
        secrets: Secrets,
        keys: SigningKeys,
        accounts: Accounts,
        teams: Teams,
        api_keys: ApiKeys,
        machines: Machines,
    ) -> None:
        self._db = db
        self._secrets = secrets
        self._keys = keys
        self._accounts = accounts
        self._teams = teams
        self._api_keys = api_keys
        self._machines = machines

    # --- accounts -----------------------------------------------------------------------------------------------------

    @override
    async def Register(self, request: pb.RegisterRequest, context: "Context") -> pb.RegisterResponse:
        email = normalise_email(request.email)
        password_hash = await self._accounts.new_password_hash(email, SecretStr(request.password))
        # A digest of the request is stored with its answer: nobody must be able to guess the password with it.
        remembered = pb.RegisterRequest()
        remembered.CopyFrom(request)
        remembered.password = self._secrets.mac("idempotency", request.password.encode()).hex()
        async with self._db.transaction() as tx:

            async def register() -> pb.RegisterResponse:
                user, team = await self._accounts.register(tx, email, password_hash, request.team_name)
                return pb.RegisterResponse(user=_user(user), team=_team(team))

            return await once(
                tx,
                scope=f"{email}:Register",
                key=request.idempotency_key,
                request=remembered,
                response_type=pb.RegisterResponse,
                do=register,
            )

    @override
    async def Login(self, request: pb.LoginRequest, context: "Context") -> pb.LoginResponse:
        password = SecretStr(request.password)
        async with self._db.transaction() as tx:
            attempt = await self._accounts.begin_login(tx, request.email, request.client_address)
        matches = await self._accounts.password_matches(attempt, password)
        new_hash = await self._accounts.new_hash_if_outdated(attempt, password) if matches else None
        async with self._db.transaction() as tx:
            outcome = await self._accounts.finish_login(tx, attempt, matches=matches, new_hash=new_hash)
        if isinstance(outcome, ServiceError):
            raise outcome
        teams = map(_team, outcome.teams)
        return pb.LoginResponse(tokens=_tokens(outcome.tokens), user=_user(outcome.user), teams=teams)

    @override
    async def Refresh(self, request: pb.RefreshRequest, context: "Context") -> pb.RefreshResponse:
        team_id = TeamId.parse(request.team_id) if request.team_id else None
        async with self._db.transaction() as tx:
            outcome = await self._accounts.refresh(tx, request.refresh_token, team_id)
        if isinstance(outcome, ServiceError):
            raise outcome
        return pb.RefreshResponse(tokens=_tokens(outcome))

    @override
    async def Logout(self, request: pb.LogoutRequest, context: "Context") -> common_pb2.Empty:
        async with self._db.transaction() as tx:
            await self._accounts.log_out(tx, request.refresh_token)
        return common_pb2.Empty()

    @override
    async def GetJwks(self, request: common_pb2.Empty, context: "Context") -> pb.GetJwksResponse:
        async with self._db.transaction() as tx:
            return pb.GetJwksResponse(jwks_json=await self._keys.jwks_json(tx))

    @override
    async def GetMe(self, request: common_pb2.Empty, context: "Context") -> pb.GetMeResponse:
        actor = current_actor()
        async with self._db.transaction() as tx:
            user, teams = await self._accounts.me(tx, actor)
        return pb.GetMeResponse(user=_user(user), teams=map(_team, teams), team_id=str(actor.team_id or ""))

    @override
    async def EnsureOperator(self, request: pb.EnsureOperatorRequest, context: "Context") -> pb.EnsureOperatorResponse:
        password = SecretStr(request.password)
        async with self._db.transaction() as tx:
            found = await self._accounts.find_operator(tx, current_actor(), request.email)
        matches, password_hash = False, None
        if found.user is None:
            password_hash = await self._accounts.new_password_hash(found.email, password)
        elif not found.user.operator:
            matches = await self._accounts.password_matches(found, password)
        async with self._db.transaction() as tx:
            user, team = await self._accounts.ensure_operator(tx, found, password_hash=password_hash, matches=matches)
        return pb.EnsureOperatorResponse(user=_user(user), team=_team(team))

    # --- API keys -----------------------------------------------------------------------------------------------------

    @override
    async def VerifyApiKeys(self, request: pb.VerifyApiKeysRequest, context: "Context") -> pb.VerifyApiKeysResponse:
        async with self._db.transaction() as tx:
            results = await self._api_keys.verify(tx, current_actor(), request.keys)
        return pb.VerifyApiKeysResponse(results=map(_verified, results))

    @override
    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: "Context") -> pb.CreateApiKeyResponse:
        actor = current_actor()
        async with self._db.transaction() as tx:

            async def create() -> pb.CreateApiKeyResponse:
                row, secret = await self._api_keys.create(
                    tx, actor, request.name, request.scopes, request.expires_in_seconds
                )
                return pb.CreateApiKeyResponse(key=_api_key(row), secret=self._seal(secret))

            response = await once(
                tx,
                scope=f"{actor.user_id}:{actor.team_id}:CreateApiKey",
                key=request.idempotency_key,
                request=request,
                response_type=pb.CreateApiKeyResponse,
                do=create,
            )
        response.secret = self._unseal(response.secret)
        return response

    @override
    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: "Context") -> pb.ListApiKeysResponse:
        async with self._db.transaction() as tx:
            rows, next_cursor = await self._api_keys.list_keys(
                tx, current_actor(), request.page.limit, request.page.cursor
            )
        return pb.ListApiKeysResponse(keys=map(_api_key, rows), next_cursor=next_cursor)

    @override
    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: "Context") -> common_pb2.Empty:
        key_id = ApiKeyId.parse(request.key_id)
        async with self._db.transaction() as tx:
            await self._api_keys.revoke(tx, current_actor(), key_id)
        return common_pb2.Empty()

    # --- teams --------------------------------------------------------------------------------------------------------

    @override
    async def CreateTeam(self, request: pb.CreateTeamRequest, context: "Context") -> pb.CreateTeamResponse:
        actor = current_actor()
        async with self._db.transaction() as tx:

            async def create() -> pb.CreateTeamResponse:
                return pb.CreateTeamResponse(team=_team(await self._teams.create(tx, actor, request.name)))

            return await once(
                tx,
                scope=f"{actor.user_id}:CreateTeam",
                key=request.idempotency_key,
                request=request,
                response_type=pb.CreateTeamResponse,
                do=create,
            )

    @override
    async def ListMembers(self, request: pb.ListMembersRequest, context: "Context") -> pb.ListMembersResponse:
        team_id = TeamId.parse(request.team_id)
        async with self._db.transaction() as tx:
            rows = await self._teams.members(tx, current_actor(), team_id)
        members = [pb.Member(user_id=str(UserId(row.user_id)), email=row.email, role=row.role) for row in rows]
        return pb.ListMembersResponse(members=members)

    @override
    async def SetMember(self, request: pb.SetMemberRequest, context: "Context") -> common_pb2.Empty:
        team_id = TeamId.parse(request.team_id)
        async with self._db.transaction() as tx:
            await self._teams.set_member(tx, current_actor(), team_id, request.email, request.role)
        return common_pb2.Empty()

    @override
    async def ListTeams(self, request: pb.ListTeamsRequest, context: "Context") -> pb.ListTeamsResponse:
        async with self._db.transaction() as tx:
            rows, next_cursor = await self._teams.list_teams(
                tx, current_actor(), request.page.limit, request.page.cursor
            )
        return pb.ListTeamsResponse(teams=map(_team, rows), next_cursor=next_cursor)

    # --- machines -----------------------------------------------------------------------------------------------------

    @override
    async def CreateJoinToken(
        self, request: pb.CreateJoinTokenRequest, context: "Context"
    ) -> pb.CreateJoinTokenResponse:
        actor = current_actor()
        async with self._db.transaction() as tx:

            async def create() -> pb.CreateJoinTokenResponse:
                token, expires_at = await self._machines.create_join_token(
                    tx, actor, request.expires_in_seconds, request.max_uses
                )
                return pb.CreateJoinTokenResponse(token=self._seal(token), expires_at=_timestamp(expires_at))

            response = await once(
                tx,
                scope=f"{actor.user_id}:{actor.team_id}:CreateJoinToken",
                key=request.idempotency_key,
                request=request,
                response_type=pb.CreateJoinTokenResponse,
                do=create,
            )
        response.token = self._unseal(response.token)
        return response

    @override
    async def EnrolMachine(self, request: pb.EnrolMachineRequest, context: "Context") -> pb.EnrolMachineResponse:
        async with self._db.transaction() as tx:
            credential = await self._machines.enrol(
                tx, request.join_token, request.public_key, request.signed_at_unix_s, request.signature
            )
        return pb.EnrolMachineResponse(credential=_credential(credential))

    @override
    async def RenewMachine(self, request: pb.RenewMachineRequest, context: "Context") -> pb.RenewMachineResponse:
        machine_id = MachineId.parse(request.machine_id)
        async with self._db.transaction() as tx:
            credential = await self._machines.renew(tx, machine_id, request.signed_at_unix_s, request.signature)
        return pb.RenewMachineResponse(credential=_credential(credential))

    @override
    async def RevokeMachine(self, request: pb.RevokeMachineRequest, context: "Context") -> common_pb2.Empty:
        machine_id = MachineId.parse(request.machine_id)
        async with self._db.transaction() as tx:
            await self._machines.revoke(tx, current_actor(), machine_id)
        return common_pb2.Empty()

    def _seal(self, secret: str) -> str:
        """Answers are stored for repeated requests; what is secret in them only encrypted."""
        return self._secrets.seal(_REMEMBERED, secret.encode()).hex()

    def _unseal(self, sealed: str) -> str:
        return self._secrets.open(_REMEMBERED, bytes.fromhex(sealed)).decode()


def _timestamp(at: datetime | None) -> Timestamp | None:
    if at is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(at)
    return timestamp


def _user(row: UserRow) -> pb.User:
    created_at = _timestamp(row.created_at)
    return pb.User(id=str(UserId(row.id)), email=row.email, operator=row.operator, created_at=created_at)


def _team(row: TeamRow) -> pb.Team:
    return pb.Team(id=str(TeamId(row.id)), name=row.name, role=row.role, created_at=_timestamp(row.created_at))


def _tokens(tokens: Tokens) -> pb.TokenPair:
    return pb.TokenPair(
        access_token=tokens.access_token,
        expires_in_seconds=tokens.expires_in_seconds,
        refresh_token=tokens.refresh_token,
    )


def _api_key(row: ApiKeyRow) -> pb.ApiKey:
    return pb.ApiKey(
        id=str(ApiKeyId(row.id)),
        name=row.name,
        team_id=str(TeamId(row.team_id)),
        prefix=row.prefix,
        scopes=row.scopes,
        created_at=_timestamp(row.created_at),
        expires_at=_timestamp(row.expires_at),
        last_used_at=_timestamp(row.last_used_at),
        revoked_at=_timestamp(row.revoked_at),
    )


def _verified(result: tuple[Actor, ValidKeyRow] | None) -> pb.VerifiedApiKey:
    if result is None:
        return pb.VerifiedApiKey(valid=False)
    actor, row = result
    return pb.VerifiedApiKey(valid=True, actor=actor.to_proto(), expires_at=_timestamp(row.expires_at))


def _credential(credential: Credential) -> pb.MachineCredential:
    return pb.MachineCredential(
        machine_id=str(credential.machine_id),
        team_id=str(credential.team_id),
        nats_user_jwt=credential.nats_user_jwt,
        expires_at=_timestamp(credential.expires_at),
    )
