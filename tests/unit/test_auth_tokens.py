"""Access tokens are accepted only from our issuer, for us, of the one algorithm, and while they live."""

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, OKPKey

from dantegpu.domain.ids import TeamId, UserId
from dantegpu.kit.tokens import InvalidToken, UnknownSigningKey, parse_jwks, verify_access_token

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
SECONDS = int(NOW.timestamp())
KEY = OKPKey.generate_key("Ed25519", {"kid": "k1", "alg": "Ed25519"})
OTHER_KEY = OKPKey.generate_key("Ed25519", {"kid": "k1", "alg": "Ed25519"})
JWKS_JSON = json.dumps({"keys": [KEY.as_dict(private=False)]})
JWKS = parse_jwks(JWKS_JSON)
USER, TEAM = UserId.new(), TeamId.new()


def a_token(key: Any = KEY, header: dict[str, Any] | None = None, **changes: Any) -> str:
    claims = {
        "iss": "us", "aud": "api", "sub": str(USER), "team": str(TEAM), "role": "member", "op": False,
        "iat": SECONDS, "nbf": SECONDS, "exp": SECONDS + 300, "jti": "1",
    } | changes  # fmt: skip
    wanted = {"alg": "Ed25519", "typ": "at+jwt", "kid": "k1"} | (header or {})
    claims = {name: value for name, value in claims.items() if value is not ...}
    wanted = {name: value for name, value in wanted.items() if value is not ...}
    if isinstance(key, OctKey):
        return jwt.encode(wanted, claims, key, algorithms=["HS256"], default_type=None)
    # By hand: the library refuses to write some of the headers that an attacker would send.
    signed = f"{base64url(json.dumps(wanted).encode())}.{base64url(json.dumps(claims).encode())}"
    return f"{signed}.{base64url(key.get_op_key('sign').sign(signed.encode()))}"


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def verify(token: str, jwks: KeySet = JWKS, now: datetime = NOW) -> Any:
    return verify_access_token(token, jwks, "us", "api", now)


def test_a_token_of_ours_names_its_user_team_and_role():
    actor = verify(a_token(op=True))
    assert (actor.user_id, actor.team_id, actor.role, actor.operator) == (USER, TEAM, "member", True)
    assert actor.scopes == frozenset()


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "them"}, {"aud": "other"}, {"aud": ["api", "other"]}, {"iss": ...}, {"aud": ...}, {"exp": ...},
        {"nbf": ...}, {"iat": ...}, {"jti": ...}, {"sub": "usr_x"}, {"sub": str(TEAM)}, {"team": ""}, {"role": "root"},
        {"op": "true"}, {"op": 1}, {"exp": SECONDS}, {"exp": "9999999999"}, {"exp": SECONDS + 601},
        {"nbf": SECONDS + 60}, {"iat": SECONDS + 60},
    ],
)  # fmt: skip
def test_a_token_with_a_wrong_claim_is_refused(changes: dict[str, Any]):
    with pytest.raises(InvalidToken):
        verify(a_token(**changes))


@pytest.mark.parametrize(
    "header",
    [
        {"typ": "JWT"},
        {"typ": ...},
        {"kid": ...},
        {"alg": "EdDSA"},
        {"crit": ["exp"]},
        {"b64": False},
        {"b64": False, "crit": ["b64"]},
    ],
)
def test_a_token_with_a_wrong_header_is_refused(header: dict[str, Any]):
    with pytest.raises(InvalidToken):
        verify(a_token(header=header))


def test_a_token_expires_to_the_second_and_a_slightly_fast_issuer_is_forgiven():
    verify(a_token(), now=NOW + timedelta(seconds=299))
    verify(a_token(), now=NOW - timedelta(seconds=4))
    with pytest.raises(InvalidToken):
        verify(a_token(), now=NOW + timedelta(seconds=300))
    with pytest.raises(InvalidToken):
        verify(a_token(), now=NOW - timedelta(seconds=6))


def test_a_token_signed_by_another_key_is_refused():
    with pytest.raises(InvalidToken):
        verify(a_token(OTHER_KEY))


def test_a_token_of_an_unknown_key_says_that_the_keys_may_have_changed():
    with pytest.raises(UnknownSigningKey):
        verify(a_token(header={"kid": "k2"}))


def test_a_key_inside_the_token_is_not_used():
    public = OTHER_KEY.as_dict(private=False)
    with pytest.raises(InvalidToken):
        verify(
            a_token(OTHER_KEY, header={"jwk": public, "jku": "https://evil.example/keys", "x5u": "https://e.example"})
        )


def test_our_public_key_is_not_a_shared_secret():
    secret = OctKey.import_key(base64.urlsafe_b64decode(KEY.as_dict()["x"] + "="))  # type: ignore[operator]
    with pytest.raises(InvalidToken):
        verify(a_token(secret, header={"alg": "HS256"}))


def test_an_unsigned_or_changed_or_endless_token_is_refused():
    head, body, signature = a_token().split(".")
    none = base64url(b'{"alg":"none","typ":"at+jwt","kid":"k1"}')
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    richer = base64url(json.dumps(claims | {"op": True}).encode())
    for token in (
        f"{none}.{body}.",
        f"{none}.{body}.{signature}",
        f"{head}.{richer}.{signature}",
        f"{head}.{body}.",
        f"{head}.{body}",
        "",
        "...",
        "é",
        "a.b.c",
        f"{head}.{body}.{'A' * 5000}",
    ):
        with pytest.raises(InvalidToken):
            verify(token)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": 1}', '{"keys": [1]}', '{"keys":[{"kty":"OKP"}]}'])
def test_a_damaged_key_set_is_an_error_or_empty_and_trusts_nobody(text: str):
    try:
        jwks = parse_jwks(text)
    except ValueError:
        return
    with pytest.raises(InvalidToken):
        verify(a_token(), jwks)
