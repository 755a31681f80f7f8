"""Who calls: an access token (JWT, checked here) or an API key (auth-service is asked)."""

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from joserfc.jwk import KeySet

from dantegpu.contracts.gen.dante.v1 import auth_pb2, auth_pb2_grpc, common_pb2
from dantegpu.domain.clock import Clock
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, Actor
from dantegpu.kit.errors import ServiceError, Unavailable
from dantegpu.kit.lifecycle import Tasks
from dantegpu.kit.tokens import UnknownSigningKey, parse_jwks, verify_access_token
from dantegpu.services.gateway.errors import InvalidCredential

API_KEY_PREFIX = "dante_"
KEY_CACHE_SECONDS = 4.0
"""A revoked key stops working within 5 s."""
UNKNOWN_KEY_CACHE_SECONDS = 1.0
MAX_CACHED_KEYS = 20_000
MAX_KEYS_PER_CALL = 1000
MAX_CREDENTIAL_LENGTH = 8192
JWKS_CACHE_SECONDS = 300.0
JWKS_RETRY_SECONDS = 1.0
"""Tokens with unknown keys, which anybody can make, cause one fetch in this time at most."""

_REFUSED = "the API key is wrong, expired or revoked; make a new one with `dante keys create`"


@dataclass(frozen=True, slots=True)
class _Cached:
    actor: Actor | None
    fresh_until_seconds: float


class ApiKeys:
    """Answers of auth-service to "whose key is this?", kept for a few seconds.

    The first unknown key is asked for at once; those that arrive meanwhile share the next call.
    """

    def __init__(self, auth: auth_pb2_grpc.AuthServiceStub, clock: Clock) -> None:
        self._auth = auth
        self._clock = clock
        # By the key's digest, so that no secret lies about in memory longer than its request.
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[Actor | None]] = {}
        self._asking = False
        self._tasks = Tasks("api keys")

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        await self._tasks.stop()

    async def actor_of(self, key: str) -> Actor:
        """Raises InvalidCredential, Unavailable."""
        cached = self._cache.get(_digest(key))
        if cached is not None and self._clock.monotonic() < cached.fresh_until_seconds:
            actor = cached.actor
        else:
            actor = await self._ask(key)
        if actor is None:
            raise InvalidCredential(_REFUSED)
        return actor

    async def _ask(self, key: str) -> Actor | None:
        answer = self._waiting.get(key)
        if answer is None:
            answer = self._waiting[key] = asyncio.get_running_loop().create_future()
        if not self._asking:
            self._asking = True
            self._tasks.spawn(self._ask_all(), "verify")
        return await asyncio.shield(answer)

    async def _ask_all(self) -> None:
        try:
            while self._waiting:
                batch = {key: self._waiting[key] for key in list(self._waiting)[:MAX_KEYS_PER_CALL]}
                for key in batch:
                    del self._waiting[key]
                await self._ask_batch(batch)
        finally:
            self._asking = False

    async def _ask_batch(self, batch: dict[str, "asyncio.Future[Actor | None]"]) -> None:
        request = auth_pb2.VerifyApiKeysRequest(keys=list(batch))
        try:
            response = await rpc.call(self._auth.VerifyApiKeys, request, actor=SERVICE)
        except ServiceError as error:
            for answer in batch.values():
                answer.set_exception(error)
                answer.exception()  # marks it as seen: the request that asked may be gone
            return
        for (key, answer), verified in zip(batch.items(), response.results, strict=True):
            actor = Actor.from_proto(verified.actor) if verified.valid else None
            self._remember(key, actor, verified)
            answer.set_result(actor)

    def _remember(self, key: str, actor: Actor | None, verified: auth_pb2.VerifiedApiKey) -> None:
        seconds = KEY_CACHE_SECONDS if actor else UNKNOWN_KEY_CACHE_SECONDS
        if actor and verified.HasField("expires_at"):
            left = verified.expires_at.ToDatetime(self._clock.now().tzinfo) - self._clock.now()
            seconds = min(seconds, left.total_seconds())
        self._cache[_digest(key)] = _Cached(actor, self._clock.monotonic() + seconds)
        while len(self._cache) > MAX_CACHED_KEYS:
            self._cache.popitem(last=False)


class AccessTokens:
    """Checks access tokens with the public keys of auth-service, fetched when needed and kept."""

    def __init__(self, auth: auth_pb2_grpc.AuthServiceStub, clock: Clock, issuer: str, audience: str) -> None:
        self._auth = auth
        self._clock = clock
        self._issuer = issuer
        self._audience = audience
        self._keys: KeySet | None = None
        self._fetched_at_seconds = 0.0
        self._tried_at_seconds = float("-inf")
        self._fetching = asyncio.Lock()

    async def actor_of(self, token: str) -> Actor:
        """Raises InvalidToken, Unavailable."""
        keys = await self._current_keys()
        try:
            return self._verify(token, keys)
        except UnknownSigningKey:
            # The keys may have rotated since they were fetched.
            newer = await self._newer_keys(keys)
            if newer is keys:
                raise
        return self._verify(token, newer)

    def _verify(self, token: str, keys: KeySet) -> Actor:
        return verify_access_token(token, keys, self._issuer, self._audience, self._clock.now())

    async def _current_keys(self) -> KeySet:
        keys = self._keys
        if keys is not None and self._clock.monotonic() - self._fetched_at_seconds < JWKS_CACHE_SECONDS:
            return keys
        return await self._newer_keys(keys)

    async def _newer_keys(self, known: KeySet | None) -> KeySet:
        """The keys, fetched again unless somebody just did. Those known go on working while auth-service is away."""
        async with self._fetching:
            recently = self._clock.monotonic() - self._tried_at_seconds < JWKS_RETRY_SECONDS
            if self._keys is not None and (self._keys is not known or recently):
                return self._keys
            self._tried_at_seconds = self._clock.monotonic()
            try:
                response = await rpc.call(self._auth.GetJwks, common_pb2.Empty(), actor=SERVICE)
                self._keys = parse_jwks(response.jwks_json)
                self._fetched_at_seconds = self._clock.monotonic()
            except Unavailable:
                if self._keys is None:
                    raise
            return self._keys


class Authenticator:
    """Tells the two kinds of credentials apart."""

    def __init__(self, tokens: AccessTokens, keys: ApiKeys) -> None:
        self._tokens = tokens
        self._keys = keys

    async def actor_of(self, credential: str) -> Actor:
        """Raises Unauthenticated or one of its kin, Unavailable."""
        if credential.startswith(API_KEY_PREFIX):
            return await self._keys.actor_of(credential)
        return await self._tokens.actor_of(credential)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def credential_of(authorization: str, api_key: str) -> str:
    """The token or key of a request's headers; empty: none. Raises InvalidCredential."""
    if api_key:
        return _bounded(api_key.strip())
    if not authorization:
        return ""
    scheme, _, credential = authorization.partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise InvalidCredential("send `Authorization: Bearer <access token or API key>`")
    return _bounded(credential.strip())


def _bounded(credential: str) -> str:
    if len(credential) > MAX_CREDENTIAL_LENGTH or not credential.isascii():
        raise InvalidCredential("this is neither an access token nor an API key")
    return credential
