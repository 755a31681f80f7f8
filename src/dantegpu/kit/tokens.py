"""Access tokens: signed by auth-service alone, checked by whoever has its public keys.

One algorithm, one token type, and the key comes from our own set by its `kid` and from nowhere else: `jku`, `x5u` and
`jwk` in a token's header are never looked at. `Ed25519` is EdDSA over Ed25519 under its fully specified name.
Sources: RFC 8725 (JWT best practices), RFC 9068 (`at+jwt`), RFC 9864 (`Ed25519` as a JOSE algorithm).
"""

import json
from datetime import datetime
from typing import Any, Final, cast

from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet, OKPKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.domain.ids import InvalidId, TeamId, UserId
from dantegpu.kit.actor import Actor
from dantegpu.kit.errors import Unauthenticated

ALGORITHM: Final = "Ed25519"
TOKEN_TYPE: Final = "at+jwt"
DEFAULT_ISSUER: Final = "dantegpu"
DEFAULT_AUDIENCE: Final = "dantegpu-api"
MAX_LIFETIME_SECONDS: Final = 600
MAX_TOKEN_LENGTH: Final = 4096
CLOCK_SKEW_SECONDS: Final = 5
"""How far the issuer's clock may be ahead of ours. It never lengthens a token's life."""


class InvalidToken(Unauthenticated):
    """The access token is expired, forged, or not for us."""

    type = "invalid-token"


class UnknownSigningKey(InvalidToken):
    """The token names a key that is not in the set: fetch the set again once, keys rotate."""

    type = "unknown-signing-key"


class _Claims(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    iss: str
    aud: str
    sub: str
    team: str
    role: str = Field(pattern="^(owner|member|viewer)$")
    op: bool
    iat: int
    nbf: int
    exp: int
    jti: str = Field(min_length=1)


def parse_jwks(jwks_json: str) -> KeySet:
    """The Ed25519 public keys of a JSON Web Key Set (RFC 7517); others are left out. Raises ValueError.

    Parse once per fetch, not per request.
    """
    try:
        keys = cast("list[dict[str, Any]]", json.loads(jwks_json)["keys"])
        usable = [
            OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": key["x"], "kid": key["kid"], "alg": ALGORITHM})
            for key in keys
            if key.get("kty") == "OKP" and key.get("crv") == "Ed25519" and key.get("alg") == ALGORITHM
        ]
    except (KeyError, TypeError, AttributeError, ValueError, JoseError) as error:
        raise ValueError(f"not a JSON Web Key Set: {type(error).__name__}") from error
    return KeySet(list(usable))


def verify_access_token(token: str, jwks: KeySet, issuer: str, audience: str, now: datetime) -> Actor:
    """The user who sends `token`. Raises InvalidToken; UnknownSigningKey when `jwks` may be out of date."""
    if len(token) > MAX_TOKEN_LENGTH:
        raise _invalid("it is too long")
    try:
        decoded = jwt.decode(token, jwks, algorithms=[ALGORITHM])
        header = decoded.header
        if header.get("typ") != TOKEN_TYPE or not isinstance(header.get("kid"), str):
            raise _invalid("it is not an access token")
        claims = _Claims.model_validate(decoded.claims)
    except InvalidKeyIdError as error:
        raise UnknownSigningKey("the access token is signed with a key that this platform does not use") from error
    except (JoseError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise _invalid("its signature or form is wrong") from error
    _check(claims, issuer, audience, now.timestamp())
    try:
        user_id, team_id = UserId.parse(claims.sub), TeamId.parse(claims.team)
    except InvalidId as error:
        raise _invalid("it names no user and team") from error
    return Actor(common_pb2.Actor.USER, user_id, team_id, role=claims.role, operator=claims.op)


def _check(claims: _Claims, issuer: str, audience: str, now: float) -> None:
    if claims.iss != issuer or claims.aud != audience:
        raise _invalid("it is for another platform")
    if now >= claims.exp:
        raise InvalidToken("the access token has expired; refresh it, or log in again: `dante login`")
    if claims.nbf > now + CLOCK_SKEW_SECONDS or claims.iat > now + CLOCK_SKEW_SECONDS:
        raise _invalid("it is not valid yet")
    if claims.exp - claims.iat > MAX_LIFETIME_SECONDS:
        raise _invalid("it would live for too long")


def _invalid(problem: str) -> InvalidToken:
    return InvalidToken(f"the access token is not accepted: {problem}; log in again: `dante login`")
