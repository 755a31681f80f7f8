"""The same request twice is answered twice and done once: answers by the caller's Idempotency-Key."""

import hashlib
from collections.abc import Awaitable, Callable

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
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidArgument(f"Idempotency-Key: at most {MAX_KEY_LENGTH} characters, this one has {len(key)}")
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    # Two requests with one key at the same time: the second waits here until the first has committed.
    await tx.run("SELECT pg_advisory_xact_lock(hashtextextended(%(scope)s || %(key)s, 7))", scope=scope, key=key)
    found = await tx.one(
        _Remembered, "SELECT request_sha256, response FROM idempotency WHERE scope=%(scope)s AND key=%(key)s",
        scope=scope, key=key,
    )  # fmt: skip
    if found:
        if found.request_sha256 != digest:
            raise IdempotencyKeyReused(
                f"Idempotency-Key {key!r} came before with another body; use a new key for a new request"
            )
        response = response_type()
        response.ParseFromString(found.response)
        return response
    response = await do()
    await tx.run(
        "INSERT INTO idempotency (scope, key, request_sha256, response) VALUES (%(scope)s, %(key)s, %(sha)s, %(body)s)",
        scope=scope, key=key, sha=digest, body=response.SerializeToString(),
    )  # fmt: skip
    return response


async def forget_old(tx: Tx) -> int:
    """Delete answers that nobody will ask for again; how many."""
    return await tx.run(
        "DELETE FROM idempotency WHERE created_at < now() - make_interval(hours => %(h)s)", h=KEEP_HOURS
    )


class _Remembered:
    def __init__(self, request_sha256: bytes, response: bytes) -> None:
        self.request_sha256 = request_sha256
        self.response = response
