"""Statements on one connection in libpq's pipeline mode, by its own interface.

psycopg connects, adapts values and names errors. Its cursors are left out: they cost a service two to three times what
the statements themselves do, and a platform's time is mostly small statements. See "Pipeline Mode" in libpq's manual.
"""

import asyncio
import re
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast, override
from uuid import UUID

import psycopg
from psycopg.adapt import Dumper, PyFormat, Transformer
from psycopg.pq import ConnStatus, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult

MAX_PREPARED = 1000
"""Statements that a connection keeps prepared; what comes after is sent whole each time."""
RESET_SECONDS = 5.0
"""A connection whose last statement cannot be ended within this time is given up."""
_PARAMETER = re.compile(rb"%(?:\((\w+)\)s|(%))")


class Answer:
    """What the server says to one statement: there after the next `Pipeline.sync`, if that raises nothing."""

    __slots__ = ("result",)

    def __init__(self) -> None:
        self.result: PGresult | None = None


class Pipeline:
    """The statements of one connection. Its user has it alone from open() to close()."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        for array, dumper in _ARRAYS.values():
            connection.adapters.register_dumper(array, dumper)
        self._connection = connection
        self._pgconn = connection.pgconn
        self._adapt = Transformer(connection)
        self._prepared: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._seen: set[str] = set()
        self._named = 0
        self._unanswered: deque[Answer] = deque()
        self._syncs = 0
        """Sent, and not answered yet."""

    def open(self) -> None:
        self._pgconn.enter_pipeline_mode()

    def close(self) -> None:
        """Everything sent must be answered by now, or the connection closed."""
        if self._pgconn.status != ConnStatus.BAD:
            self._pgconn.exit_pipeline_mode()

    def put(self, sql: str, params: Mapping[str, object]) -> Answer:
        """Add a statement to what is sent next; libpq sends when it has much, sync() the rest."""
        query, names = _parsed(sql)
        values = self._adapt.dump_sequence([_fast(params[name]) for name in names], [PyFormat.AUTO] * len(names))
        types, formats = self._adapt.types or (), self._adapt.formats
        name = self._prepared.get((sql, types))
        if name is None and sql in self._seen and len(self._prepared) < MAX_PREPARED:
            # Used again: worth preparing. A name is never used for another statement.
            self._named += 1
            name = self._prepared[sql, types] = f"dante_{self._named}".encode()
            self._pgconn.send_prepare(name, query, types)
            self._unanswered.append(Answer())
        self._seen.add(sql)
        if name is None:
            self._pgconn.send_query_params(query, values, types, formats, Format.BINARY)
        else:
            self._pgconn.send_query_prepared(name, values, formats, Format.BINARY)
        answer = Answer()
        self._unanswered.append(answer)
        return answer

    async def sync(self) -> None:
        """Wait until everything that was sent is answered. Raises the first error among the answers.

        The server knows by it, too, that a transaction is idle now, and does not wait for the client in vain.
        """
        self._pgconn.pipeline_sync()
        self._syncs += 1
        await self._drain()

    async def finish(self) -> None:
        """Like sync(), where anything is unanswered."""
        if self._unanswered:
            await self.sync()

    async def _drain(self) -> None:
        await self._flush()
        error: psycopg.Error | None = None
        while self._syncs:
            try:
                result = await self._next_result()
            except psycopg.OperationalError as broken:
                # Why the server ended the session says more than that it did.
                raise error or broken from None
            if result is None:
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                self._syncs -= 1
                continue
            # A session that the server ends says so without having been asked.
            answer = self._unanswered.popleft() if self._unanswered else Answer()
            if result.status == ExecStatus.FATAL_ERROR:
                error = error or psycopg.errors.error_from_result(result)
            elif result.status != ExecStatus.PIPELINE_ABORTED:
                answer.result = result
        if error is not None:
            # Among what failed may be a preparation; and a table may have changed under a prepared statement.
            self._prepared.clear()
            self._seen.clear()
            raise error

    async def _next_result(self) -> PGresult | None:
        """None: between two statements."""
        while self._pgconn.is_busy():
            await self._ready(reading=True)
            self._pgconn.consume_input()
        result = self._pgconn.get_result()
        if result is None and self._pgconn.status == ConnStatus.BAD:
            raise psycopg.OperationalError("the connection is lost")
        return result

    async def _flush(self) -> None:
        while self._pgconn.flush():
            # The server may wait for its answers to be read before it reads on.
            await self._ready(reading=True, writing=True)
            self._pgconn.consume_input()

    async def _ready(self, *, reading: bool, writing: bool = False) -> None:
        loop, socket = asyncio.get_running_loop(), self._pgconn.socket
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(socket, _set, ready)
        if writing:
            loop.add_writer(socket, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(socket)
            if writing:
                loop.remove_writer(socket)

    async def abandon(self) -> None:
        """After an error or a cancellation: end what is under way and roll back. Raises nothing; what cannot be
        ended is closed."""
        try:
            async with asyncio.timeout(RESET_SECONDS):
                if self._unanswered or self._syncs:
                    await self._cancel()
                if self._pgconn.transaction_status != TransactionStatus.IDLE:
                    self.put("ROLLBACK", {})
                    await self.sync()
        except (psycopg.Error, TimeoutError):
            await self._connection.close()
        except asyncio.CancelledError:
            await self._connection.close()
            raise

    async def _cancel(self) -> None:
        if self._pgconn.status == ConnStatus.BAD:
            raise psycopg.OperationalError("the connection is lost")
        if not self._syncs:
            self._pgconn.pipeline_sync()
            self._syncs += 1
            await self._flush()
        await self._connection.cancel_safe(timeout=RESET_SECONDS)
        with suppress(psycopg.errors.QueryCanceled):
            await self._drain()

    def rows[T](self, answer: Answer, make: Callable[[PGresult], Callable[[Sequence[Any]], T]]) -> list[T]:
        """All rows of an answer; `make` gives the maker of rows with the result's columns."""
        result = answer.result
        if result is None or result.status != ExecStatus.TUPLES_OK:
            raise psycopg.ProgrammingError("the last operation didn't produce a result")
        self._adapt.set_pgresult(result)
        return self._adapt.load_rows(0, result.ntuples, make(result))


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


@lru_cache(maxsize=2000)
def _parsed(sql: str) -> tuple[bytes, tuple[str, ...]]:
    """`%(name)s` as `$1`, and the names in the order of the numbers."""
    names: dict[str, int] = {}

    def number(match: re.Match[bytes]) -> bytes:
        if match[2]:
            return b"%"
        return b"$%d" % names.setdefault(match[1].decode(), len(names) + 1)

    query = _PARAMETER.sub(number, sql.encode())
    return query, tuple(names)


# Lists are what most statements are about, and psycopg adapts them element by element. Here they become arrays in
# PostgreSQL's binary form: a header, then each element's length and bytes. See array_recv in PostgreSQL's source.


class _Array:
    __slots__ = ("data",)
    element_oid = 0

    def __init__(self, elements: Sequence[bytes]) -> None:
        self.data = _HEADER.pack(1, _NULL in elements, self.element_oid, len(elements), 1) + b"".join(elements)


class _Uuids(_Array):
    element_oid = 2950


class _Texts(_Array):
    element_oid = 25


class _Blobs(_Array):
    element_oid = 17


class _Integers(_Array):
    element_oid = 20


class _Booleans(_Array):
    element_oid = 16


class _ArrayDumper(Dumper):
    format = Format.BINARY

    @override
    def dump(self, obj: _Array) -> bytes:
        return obj.data


class _UuidsDumper(_ArrayDumper):
    oid = 2951


class _TextsDumper(_ArrayDumper):
    oid = 1009


class _BlobsDumper(_ArrayDumper):
    oid = 1001


class _IntegersDumper(_ArrayDumper):
    oid = 1016


class _BooleansDumper(_ArrayDumper):
    oid = 1000


_HEADER = struct.Struct(">iiIii")
"""Dimensions, whether there are NULLs, type of the elements, their number, the first one's index."""
_NULL = b"\xff\xff\xff\xff"
_ARRAYS: Mapping[type, tuple[type[_Array], type[_ArrayDumper]]] = {
    UUID: (_Uuids, _UuidsDumper),
    str: (_Texts, _TextsDumper),
    bytes: (_Blobs, _BlobsDumper),
    int: (_Integers, _IntegersDumper),
    bool: (_Booleans, _BooleansDumper),
}


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(4) + data


_ELEMENTS: Mapping[type, Callable[[Any], bytes]] = {
    UUID: lambda uuid: b"\x00\x00\x00\x10" + uuid.bytes,
    str: lambda text: _sized(text.encode()),
    bytes: _sized,
    int: lambda number: b"\x00\x00\x00\x08" + number.to_bytes(8, signed=True),
    bool: lambda truth: b"\x00\x00\x00\x01\x01" if truth else b"\x00\x00\x00\x01\x00",
}


def _fast(value: object) -> object:
    if type(value) is not list:
        return value
    values = cast("list[object]", value)
    kind = type(next((each for each in values if each is not None), None))
    element = _ELEMENTS.get(kind)
    if element is None:
        return values
    return _ARRAYS[kind][0]([_NULL if each is None else element(each) for each in values])
