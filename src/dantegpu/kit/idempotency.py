"""The same request twice is answered twice and done once: answers by the caller's Idempotency-Key."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import cast

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
    await tx.send("SELECT pg_advisory_xact_lock(hashtextextended(%(scope)s || %(key)s, 7))", scope=scope, key=key)
    if remembered := await recall(tx, scope=scope, key=key, request=request, response_type=response_type):
        return remembered
    response = await do()
    await tx.send(
        "INSERT INTO idempotency (scope, key, request_sha256, response) VALUES (%(scope)s, %(key)s, %(sha)s, %(body)s)",
        scope=scope, key=key, sha=_digest(request), body=response.SerializeToString(),
    )  # fmt: skip
    return response


@dataclass(frozen=True, slots=True)
class Keyed[Q: Message]:
    """A request that must be done once. An empty key: it is done each time."""

    scope: str
    key: str
    request: Q


async def once_each[Q: Message, R: Message](
    tx: Tx,
    asked: Sequence[Keyed[Q]],
    response_type: type[R],
    do: Callable[[Sequence[int]], Awaitable[Sequence[R]]],
) -> list[R | ServiceError]:
    """`once` for many requests of many callers; one that cannot be answered gets its error in its place.

    `do` gets the places (in `asked`) of the requests that are new, and answers in their order.
    """
    answers: dict[int, R | ServiceError] = {}
    first: dict[tuple[str, str], int] = {}
    for place, each in enumerate(asked):
        if each.key and (problem := _problem(each.key)):
            answers[place] = problem
        elif each.key:
            first.setdefault((each.scope, each.key), place)
    known = await _known(tx, list(first))
    new: list[int] = []
    for place, each in enumerate(asked):
        found = known.get((each.scope, each.key))
        if place in answers:
            continue
        if found is not None:
            answers[place] = _again(each, found.request_sha256, found.response, response_type)
        elif not each.key or first[each.scope, each.key] == place:
            new.append(place)
    if new:
        answers |= dict(zip(new, await do(new), strict=True))
        await _remember(tx, [(asked[place], cast(R, answers[place])) for place in new if asked[place].key])
    for place, each in enumerate(asked):
        if place not in answers:  # the same key came twice in this batch
            leader = first[each.scope, each.key]
            response = cast(R, answers[leader]).SerializeToString()
            digest = _digest(asked[leader].request)
            answers[place] = _again(each, digest, response, response_type)
    return [answers[place] for place in range(len(asked))]


async def _known(tx: Tx, keys: Sequence[tuple[str, str]]) -> "dict[tuple[str, str], _RememberedKey]":
    """Remembered answers by (scope, key). Other transactions with one of the keys wait from here on."""
    if not keys:
        return {}
    scopes, names = [scope for scope, _ in keys], [key for _, key in keys]
    # Sorted: two batches that share keys would wait for one another.
    await tx.send(
        "SELECT pg_advisory_xact_lock(number) FROM (SELECT hashtextextended(scope || key, 7) AS number"
        " FROM unnest(%(scopes)s::text[], %(keys)s::text[]) AS asked (scope, key) ORDER BY 1) AS numbers",
        scopes=scopes, keys=names,
    )  # fmt: skip
    rows = await tx.all(
        _RememberedKey, "SELECT scope, key, request_sha256, response FROM idempotency"
        " WHERE (scope, key) IN (SELECT * FROM unnest(%(scopes)s::text[], %(keys)s::text[]))",
        scopes=scopes, keys=names,
    )  # fmt: skip
    return {(row.scope, row.key): row for row in rows}


async def _remember[Q: Message, R: Message](tx: Tx, done: "Sequence[tuple[Keyed[Q], R]]") -> None:
    if done:
        await tx.send(
            "INSERT INTO idempotency (scope, key, request_sha256, response) SELECT * FROM unnest(%(scopes)s::text[],"
            " %(keys)s::text[], %(digests)s::bytea[], %(bodies)s::bytea[])",
            scopes=[each.scope for each, _ in done], keys=[each.key for each, _ in done],
            digests=[_digest(each.request) for each, _ in done],
            bodies=[response.SerializeToString() for _, response in done],
        )  # fmt: skip


def _again[Q: Message, R: Message](
    asked: Keyed[Q], digest: bytes, response: bytes, response_type: type[R]
) -> R | ServiceError:
    if digest != _digest(asked.request):
        return _reused(asked.key)
    answer = response_type()
    answer.ParseFromString(response)
    return answer


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
        raise _reused(key)
    response = response_type()
    response.ParseFromString(found.response)
    return response


async def forget_old(tx: Tx) -> int:
    """Delete answers that nobody will ask for again; how many."""
    return await tx.run(
        "DELETE FROM idempotency WHERE created_at < now() - make_interval(hours => %(h)s)", h=KEEP_HOURS
    )


def _check(key: str) -> None:
    if problem := _problem(key):
        raise problem


def _problem(key: str) -> InvalidArgument | None:
    if len(key) > MAX_KEY_LENGTH or "\x00" in key:
        return InvalidArgument(f"Idempotency-Key: at most {MAX_KEY_LENGTH} characters, this one has {len(key)}")
    return None


def _reused(key: str) -> IdempotencyKeyReused:
    return IdempotencyKeyReused(
        f"Idempotency-Key {key!r} came before with another body; use a new key for a new request"
    )


def _digest(request: Message) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


@dataclass(frozen=True, slots=True)
class _Remembered:
    request_sha256: bytes
    response: bytes


@dataclass(frozen=True, slots=True)
class _RememberedKey:
    scope: str
    key: str
    request_sha256: bytes
    response: bytes
