"""Passwords: which are accepted, and their argon2id hashes, computed in threads."""

import asyncio
import unicodedata
from functools import cache
from importlib.resources import files
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.low_level import Type
from pydantic import SecretStr

from dantegpu.kit.errors import Unavailable
from dantegpu.services.auth.errors import WeakPassword

MIN_CHARACTERS: Final = 8
MAX_CHARACTERS: Final = 128
MAX_WAITING: Final = 200
"""Log-ins in line for a thread; more are sent away, so that a flood costs bounded memory and time."""
_THREADS: Final = 2

# OWASP's minimum for argon2id: 19 MiB, 2 passes, 1 lane.
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1, type=Type.ID)


@cache
def common_passwords() -> frozenset[str]:
    """The most used ones of 8 and more characters, in lower case."""
    text = (files("dantegpu.services.auth") / "common_passwords.txt").read_text()
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def normalise(password: SecretStr) -> str:
    """The same text for the same keys pressed, whichever way the system composes accents (NIST SP 800-63B)."""
    # What is far too long stays too long when cut, and costs no time.
    return unicodedata.normalize("NFKC", password.get_secret_value()[: 8 * MAX_CHARACTERS])


def check_strength(password: SecretStr, email: str) -> None:
    """Raises WeakPassword. `email` is normalised."""
    text = normalise(password)
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        raise WeakPassword(f"password: {MIN_CHARACTERS} to {MAX_CHARACTERS} characters, this one has {len(text)}")
    folded = text.casefold()
    if folded in common_passwords() or len(set(folded)) < 4:
        raise WeakPassword("password: this one is among the first that an attacker tries; choose another")
    if folded in (email, email.partition("@")[0]):
        raise WeakPassword("password: your e-mail address is no secret; choose another")


class Passwords:
    """Hashes and checks in at most two threads at once: each needs 19 MiB and a core for some 30 ms."""

    def __init__(self) -> None:
        self._threads = asyncio.Semaphore(_THREADS)
        self._waiting = 0
        # Checked when there is no such user, so that the answer takes as long.
        self._nobody = _HASHER.hash("nobody has this password")

    async def hash(self, password: SecretStr) -> str:
        """Raises Unavailable when too many wait already."""
        return await self._run_hash(normalise(password))

    async def matches(self, password: SecretStr, known_hash: str | None) -> bool:
        """Whether it is the one of `known_hash`; None (no such user) takes as long and is False. Raises Unavailable."""
        text = normalise(password)
        # What is too long to be anybody's costs no more to check than a password.
        matches = await self._run_verify(known_hash or self._nobody, text[: MAX_CHARACTERS + 1])
        return matches and known_hash is not None

    @staticmethod
    def outdated(known_hash: str) -> bool:
        """Whether the hash was made with other parameters than today's."""
        return _HASHER.check_needs_rehash(known_hash)

    async def _run_hash(self, text: str) -> str:
        async with _Turn(self):
            return await asyncio.to_thread(_HASHER.hash, text)

    async def _run_verify(self, known_hash: str, text: str) -> bool:
        async with _Turn(self):
            return await asyncio.to_thread(_verify, known_hash, text)

    def enter(self) -> asyncio.Semaphore:
        """Take a place in the line. Raises Unavailable when it is full."""
        if self._waiting >= MAX_WAITING:
            raise Unavailable("logging in", "too many people are at it")
        self._waiting += 1
        return self._threads

    def leave(self) -> None:
        self._waiting -= 1


class _Turn:
    def __init__(self, line: Passwords) -> None:
        self._line = line
        self._threads: asyncio.Semaphore | None = None

    async def __aenter__(self) -> None:
        threads = self._line.enter()
        try:
            await threads.acquire()
        except BaseException:
            self._line.leave()
            raise
        self._threads = threads

    async def __aexit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.release()
        self._line.leave()


def _verify(known_hash: str, text: str) -> bool:
    try:
        return _HASHER.verify(known_hash, text)
    except (VerificationError, InvalidHashError):
        return False
