"""What a new platform needs once: the operator's account, its API key, a first credit, and a join token."""

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from dantegpu.contracts.gen.dante.v1 import auth_pb2, auth_pb2_grpc, billing_pb2, billing_pb2_grpc, common_pb2
from dantegpu.domain.ids import TeamId, UserId
from dantegpu.domain.units import UDGPU_PER_DGPU
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, Actor
from dantegpu.kit.nats_jwt import NatsTrust, create_user_key, creds_file_text, services_permissions, sign_user_jwt
from dantegpu.kit.rpc import Channels

OPERATOR_EMAIL: Final = "operator@localhost"
FIRST_CREDIT_UDGPU: Final = 100 * UDGPU_PER_DGPU
_STEP_TIMEOUT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Login:
    """The operator's credentials for the CLI of this machine."""

    url: str
    api_key: SecretStr
    team_id: str
    email: str


def write_services_creds(path: Path, trust: NatsTrust) -> None:
    """NATS credentials of the services, mode 0600: all subjects of the platform's account."""
    key = create_user_key()
    permissions = services_permissions()
    jwt = sign_user_jwt(trust.account_seed, trust.account_public, key.public, "services", permissions, None)
    path.touch(mode=0o600)
    path.write_text(creds_file_text(jwt, key.seed))


async def set_up_operator(addresses: Mapping[str, str], url: str, data_dir: Path) -> tuple[Login, str]:
    """Make what is missing and find what is there; (login, join token for one machine). May be called at every start.

    Secrets lie in `data_dir`/secrets with mode 0600. Raises RemoteError, Unavailable.
    """
    channels = Channels(addresses)
    try:
        auth = auth_pb2_grpc.AuthServiceStub(channels.to("auth-service"))
        billing = billing_pb2_grpc.BillingServiceStub(channels.to("billing-payment-service"))
        secrets_dir = data_dir / "secrets"
        password = _secret_file(secrets_dir / "operator.password", lambda: secrets.token_urlsafe(24))
        ensured = await rpc.call(
            auth.EnsureOperator,
            auth_pb2.EnsureOperatorRequest(email=OPERATOR_EMAIL, password=password),
            actor=SERVICE,
            timeout_seconds=_STEP_TIMEOUT_SECONDS,
        )
        operator = Actor(
            common_pb2.Actor.USER,
            user_id=UserId.parse(ensured.user.id),
            team_id=TeamId.parse(ensured.team.id),
            role="owner",
            operator=True,
        )
        api_key = await _api_key(auth, operator, secrets_dir / "operator.key")
        await _first_credit(billing, operator, ensured.team.id, data_dir / "credited")
        request = auth_pb2.CreateJoinTokenRequest(expires_in_seconds=3600)
        token = await rpc.call(auth.CreateJoinToken, request, actor=operator)
        return Login(url, SecretStr(api_key), ensured.team.id, OPERATOR_EMAIL), token.token
    finally:
        await channels.stop()


async def _api_key(auth: auth_pb2_grpc.AuthServiceStub, operator: Actor, path: Path) -> str:
    if path.exists():
        known = path.read_text().strip()
        verified = await rpc.call(auth.VerifyApiKeys, auth_pb2.VerifyApiKeysRequest(keys=[known]), actor=SERVICE)
        if verified.results[0].valid:
            return known
        path.unlink()
    created = await rpc.call(auth.CreateApiKey, auth_pb2.CreateApiKeyRequest(name="this machine"), actor=operator)
    return _secret_file(path, lambda: created.secret)


async def _first_credit(
    billing: billing_pb2_grpc.BillingServiceStub, operator: Actor, team_id: str, done: Path
) -> None:
    # Once per platform. The file remembers it because idempotency keys are forgotten after some days.
    if done.exists():
        return
    credit = billing_pb2.CreditRequest(
        team_id=team_id,
        amount_udgpu=FIRST_CREDIT_UDGPU,
        text="first credit of a new platform",
        idempotency_key="first-credit",
    )
    await rpc.call(billing.Credit, credit, actor=operator)
    done.touch()


def _secret_file(path: Path, make: Callable[[], str]) -> str:
    """The secret in `path`, mode 0600; made at the first call."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(make())
    return path.read_text().strip()
