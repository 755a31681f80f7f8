"""Signing keys of access tokens: one signs, the next is published already, old ones stay until their tokens die."""

import asyncio
import base64
import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

import structlog
from joserfc import jwt
from joserfc.jwk import OKPKey

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import RequestId, TeamId, UserId
from dantegpu.kit.db import Database, Tx
from dantegpu.kit.errors import Unavailable
from dantegpu.kit.tokens import ALGORITHM, MAX_LIFETIME_SECONDS, TOKEN_TYPE
from dantegpu.services.auth import store
from dantegpu.services.auth.secrets import Secrets
from dantegpu.services.auth.settings import AuthSettings

log = structlog.get_logger(__name__)

_KEEP_AFTER_SECONDS: Final = 2 * MAX_LIFETIME_SECONDS
"""How long a key stays published after its last signature."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """It signs from `signs_from` until the next key does."""

    kid: str
    signs_from: datetime
    key: OKPKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class RotationPlan:
    """What to do so that one key signs now and the next is published: new keys by when they sign, and dead ones."""

    add_signing_from: list[datetime]
    remove: list[str]


def plan_rotation(
    keys: list[tuple[str, datetime]], now: datetime, *, period_seconds: int, notice_seconds: int
) -> RotationPlan:
    """`keys` are (kid, signs_from), oldest first."""
    add: list[datetime] = []
    current = [signs_from for _, signs_from in keys if signs_from <= now]
    if not current:
        add.append(now)
    if not any(signs_from > now for _, signs_from in keys):
        due = (current[-1] if current else now) + timedelta(seconds=period_seconds)
        add.append(max(due, now + timedelta(seconds=notice_seconds)))
    dead_before = now - timedelta(seconds=_KEEP_AFTER_SECONDS)
    remove = [kid for (kid, _), (_, next_from) in pairwise(keys) if next_from < dead_before]
    return RotationPlan(add, remove)


class SigningKeys:
    """Component: has a key to sign with from start() on. `rotate` is called from time to time (upkeep.py)."""

    def __init__(self, db: Database, secrets: Secrets, clock: Clock, settings: AuthSettings) -> None:
        self._db = db
        self._secrets = secrets
        self._clock = clock
        self._settings = settings
        self._keys: list[SigningKey] = []

    async def start(self) -> None:
        """Raises SecretsUnusable, Unavailable."""
        async with self._db.transaction() as tx:
            await self.rotate(tx)

    async def stop(self) -> None:
        pass

    async def rotate(self, tx: Tx) -> None:
        """Make the keys that are missing, remove dead ones, and load what there is. Raises SecretsUnusable."""
        await store.lock_signing_keys(tx)
        now = self._clock.now()
        rows = await store.signing_keys(tx)
        plan = plan_rotation(
            [(row.kid, row.signs_from) for row in rows],
            now,
            period_seconds=self._settings.signing_key_period_seconds,
            notice_seconds=self._settings.signing_key_notice_seconds,
        )
        for signs_from in plan.add_signing_from:
            await self._create(tx, signs_from, now)
        if plan.remove:
            await store.delete_signing_keys(tx, plan.remove)
        self._keys = [self._loaded(row) for row in await store.signing_keys(tx)]

    async def jwks_json(self, tx: Tx) -> str:
        """The public keys of the database: also of those that another replica just made."""
        public = [_jwk(row.public_key, row.kid) for row in await store.signing_keys(tx)]
        return json.dumps({"keys": public}, separators=(",", ":"))

    def sign(self, user_id: UserId, team_id: TeamId, role: str, *, operator: bool) -> tuple[str, int]:
        """An access token for `user_id` acting for `team_id`, and its life in seconds."""
        now = self._clock.now()
        signing = next((key for key in reversed(self._keys) if key.signs_from <= now), None)
        if signing is None:
            raise Unavailable("auth-service", "it has no signing key yet")
        issued_at = int(now.timestamp())
        seconds = self._settings.access_token_seconds
        claims = {
            "iss": self._settings.token_issuer,
            "aud": self._settings.token_audience,
            "sub": str(user_id),
            "team": str(team_id),
            "role": role,
            "op": operator,
            "iat": issued_at,
            "nbf": issued_at,
            "exp": issued_at + seconds,
            "jti": str(RequestId.new()),
        }
        header = {"alg": ALGORITHM, "typ": TOKEN_TYPE, "kid": signing.kid}
        return jwt.encode(header, claims, signing.key, algorithms=[ALGORITHM]), seconds

    async def _create(self, tx: Tx, signs_from: datetime, now: datetime) -> None:
        key = await asyncio.to_thread(OKPKey.generate_key, "Ed25519")
        kid = key.thumbprint()
        values = key.as_dict(private=True)
        await store.insert_signing_key(
            tx,
            kid=kid,
            public_key=_from_base64url(str(values["x"])),
            private_key_sealed=self._secrets.seal(_purpose(kid), _from_base64url(str(values["d"]))),
            signs_from=signs_from,
            now=now,
        )
        log.info("signing_key_made", kid=kid, signs_from=signs_from.isoformat())

    def _loaded(self, row: store.SigningKeyRow) -> SigningKey:
        private = self._secrets.open(_purpose(row.kid), row.private_key_sealed)
        jwk = _jwk(row.public_key, row.kid) | {"d": _base64url(private)}
        return SigningKey(row.kid, row.signs_from, OKPKey.import_key(jwk))


def _purpose(kid: str) -> str:
    return f"signing key {kid}"


def _jwk(public_key: bytes, kid: str) -> dict[str, str | list[str]]:
    return {"kty": "OKP", "crv": "Ed25519", "x": _base64url(public_key), "kid": kid, "alg": ALGORITHM, "use": "sig"}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
