"""Typed ids: a UUIDv7 inside, `prefix_` + 26 characters of Crockford base32 outside (the TypeID text form).

The text form sorts like the UUID, so like the time of creation. Ids of different kinds never compare equal.
Sources: RFC 9562 section 5.7 and 6.2 (UUIDv7, monotonic random); TypeID specification 0.3.
"""

import os
import struct
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self
from uuid import UUID, uuid5

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]
_NO_DIGIT = "!"
_AS_PYTHON = dict.fromkeys(range(128), _NO_DIGIT) | str.maketrans(_ALPHABET, "0123456789abcdefghijklmnopqrstuv")
"""To the digits that int() knows; what int() would overlook (`_`, a sign) is no digit."""
_SUFFIX_LENGTH = 26
_RANDOM_BITS = 74
_RANDOM_LIMIT = 1 << _RANDOM_BITS
_LOW_BITS_MASK = (1 << 62) - 1
_STEP = struct.Struct(">I")
REMEMBERED = 16_384
"""Texts and values of the last ids: each is written and read a dozen times while its job is on its way."""
_DERIVED_NAMESPACE = UUID("5f9c3a52-7d0e-5c3e-9a0b-0d1f7c9be6a1")


class InvalidId(ValueError):
    """The text is not an id of the expected kind. `expected` is that kind's prefix, `text` what came."""

    def __init__(self, expected: str, text: str, problem: str) -> None:
        super().__init__(
            f"expected an id like {expected}_01h455vb4pex5vsknk084sn02q, got {_shorten(text)!r}: {problem}"
        )
        self.expected = expected
        self.text = text
        self.problem = problem


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


class _Uuid7Source:
    """UUIDv7 values that strictly rise within this process, also when the wall clock steps back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._milliseconds = 0
        self._random = 0

    def next(self, count: int) -> list[UUID]:
        now_milliseconds = time.time_ns() // 1_000_000
        with self._lock:
            if now_milliseconds > self._milliseconds:
                self._milliseconds = now_milliseconds
                self._random = int.from_bytes(os.urandom(10)) & (_RANDOM_LIMIT - 1)
            # A random step keeps ids of one millisecond unguessable and apart in forked processes.
            return [self._step(step) for (step,) in _STEP.iter_unpack(os.urandom(_STEP.size * count))]

    def _step(self, step: int) -> UUID:
        self._random += 1 + step
        if self._random >= _RANDOM_LIMIT:
            self._milliseconds += 1
            self._random = int.from_bytes(os.urandom(8))
        value = (self._milliseconds & 0xFFFF_FFFF_FFFF) << 80
        value |= 0x7 << 76 | (self._random >> 62) << 64
        value |= 0b10 << 62 | self._random & _LOW_BITS_MASK
        return UUID(int=value)


_uuid7 = _Uuid7Source()


@lru_cache(maxsize=REMEMBERED)
def _encode(value: int) -> str:
    return "".join([_PAIRS[value >> shift & 0x3FF] for shift in range(120, -1, -10)])


@lru_cache(maxsize=REMEMBERED)
def _decode(prefix: str, text: str, suffix: str) -> UUID:
    """Raises InvalidId."""
    digits = suffix.translate(_AS_PYTHON)
    if _NO_DIGIT in digits or not digits.isascii():
        character = next(character for character in suffix if character not in _ALPHABET)
        raise InvalidId(prefix, text, f"{character!r} is not in the alphabet {_ALPHABET}")
    value = int(digits, 32)
    if value >> 128:
        raise InvalidId(prefix, text, "the first character must be 0..7")
    return UUID(int=value)


@dataclass(frozen=True, slots=True, order=True)
class Id:
    """Base of all ids. Subclasses only set `prefix`; comparing or mixing two kinds is a type error."""

    prefix: ClassVar[str] = "id"
    uuid: UUID

    @classmethod
    def new(cls) -> Self:
        """A fresh id, greater than every id that this process made before."""
        return cls(*_uuid7.next(1))

    @classmethod
    def new_uuids(cls, count: int) -> list[UUID]:
        """What `count` fresh ids have inside: for those who make thousands of them at once."""
        return _uuid7.next(count)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form. Raises `InvalidId` that says which prefix was expected and what came."""
        prefix, separator, suffix = text.rpartition("_")
        if not separator:
            raise InvalidId(cls.prefix, text, "the prefix is missing")
        if prefix != cls.prefix:
            raise InvalidId(cls.prefix, text, f"the prefix is {_shorten(prefix)!r}, expected {cls.prefix!r}")
        if len(suffix) != _SUFFIX_LENGTH:
            raise InvalidId(cls.prefix, text, f"{len(suffix)} characters after the prefix, expected {_SUFFIX_LENGTH}")
        return cls(_decode(cls.prefix, text, suffix))

    @classmethod
    def derived(cls, *parts: "Id | str | int") -> Self:
        """The one id that belongs to `parts`, the same on every call: a replay makes no second thing.

        Order and kinds of the parts matter; a text part may hold any character.
        """
        name = "".join(f"{len(text)}:{text}" for text in (f"{type(part).__name__}/{part}" for part in parts))
        return cls(uuid5(_DERIVED_NAMESPACE, f"{cls.prefix}|{name}"))

    def __str__(self) -> str:
        return f"{self.prefix}_{_encode(self.uuid.int)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class JobId(Id):
    __slots__ = ()
    prefix = "job"


class AttemptId(Id):
    __slots__ = ()
    prefix = "att"


class MachineId(Id):
    __slots__ = ()
    prefix = "mach"


class DeviceId(Id):
    __slots__ = ()
    prefix = "dev"


class UserId(Id):
    __slots__ = ()
    prefix = "usr"


class TeamId(Id):
    """A team owns jobs, wallets and, as a provider, machines."""

    __slots__ = ()
    prefix = "team"


class ScheduleId(Id):
    __slots__ = ()
    prefix = "sched"


class ApiKeyId(Id):
    __slots__ = ()
    prefix = "key"


class HoldId(Id):
    __slots__ = ()
    prefix = "hold"


class TransferId(Id):
    __slots__ = ()
    prefix = "xfer"


class AccountId(Id):
    __slots__ = ()
    prefix = "acct"


class SessionId(Id):
    __slots__ = ()
    prefix = "ses"


class RequestId(Id):
    __slots__ = ()
    prefix = "req"


class EventId(Id):
    __slots__ = ()
    prefix = "evt"


class JoinTokenId(Id):
    __slots__ = ()
    prefix = "join"
