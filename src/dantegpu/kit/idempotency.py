"""The same request twice is answered twice and done once: answers by the caller's Idempotency-Key."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from google.protobuf.message import Message

from dantegpu.kit.db import Tx
from dantegpu.kit.errors import ErrorStatus, InvalidArgument, ServiceError

KEEP_HOURS = 48
MAX_KEY_LENGTH = 255


class IdempotencyKeyReused(ServiceError):
    """The key came before with another body: answering either would be wrong."""

    type = "idempotency-key-reused"
    status = ErrorStatus.CONFLICT


async def once[R: Message](
    tx: Tx, *, scope: str, key: str, request: Message, response_type: type[R], do: Callable[[], Awaitable[R]]
) -> R:
    """Answer of `do()`, or the answer it gave when (scope, key) came before with the same request.

    scope: who asks for what, e.g. "team_...:SubmitJobs". An empty key always runs `do`. Everything happens in `tx`, so
    the answer is remembered exactly when the work is committed. Raises IdempotencyKeyReused, InvalidArgument.
    """
    if not key:
        return await do()
    _check(key)
    # Two requests with one key at the same time: the second waits here until the first has committed.
    await tx.run("SELECT pg_advisory_xact_lock(hashtextextended(%(scope)s || %(key)s, 7))", scope=scope, key=key)
    if remembered := await recall(tx, scope=scope, key=key, request=request, response_type=response_type):
        return remembered
    response = await do()
    await tx.run(
        "INSERT INTO idempotency (scope, key, request_sha256, response) VALUES (%(scope)s, %(key)s, %(sha)s, %(body)s)",
        scope=scope, key=key, sha=_digest(request), body=response.SerializeToString(),
    )  # fmt: skip
    return response


async def recall[R: Message](tx: Tx, *, scope: str, key: str, request: Message, response_type: type[R]) -> R | None:
    """The answer that `once` gave to this request before, or None. Raises IdempotencyKeyReused, InvalidArgument.

    For edges whose checks depend on what changes: a repeated request gets its answer, not today's refusal.
    """
    if not key:
        return None
    _check(key)
    found = await tx.one(
        _Remembered, "SELECT request_sha256, response FROM idempotency WHERE scope=%(scope)s AND key=%(key)s",
        scope=scope, key=key,
    )  # fmt: skip
    if found is None:
        return None
    if found.request_sha256 != _digest(request):
        raise IdempotencyKeyReused(
            f"Idempotency-Key {key!r} came before with another body; use a new key for a new request"
        )
    response = response_type()
    response.ParseFromString(found.response)
    return response


async def forget_old(tx: Tx) -> int:
    """Delete answers that nobody will ask for again; how many."""
    return await tx.run(
        "DELETE FROM idempotency WHERE created_at < now() - make_interval(hours => %(h)s)", h=KEEP_HOURS
    )


def _check(key: str) -> None:
    if len(key) > MAX_KEY_LENGTH or "\x00" in key:
        raise InvalidArgument(f"Idempotency-Key: at most {MAX_KEY_LENGTH} characters, this one has {len(key)}")


def _digest(request: Message) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


@dataclass(frozen=True, slots=True)
class _Remembered:
    request_sha256: bytes
    response: bytes
