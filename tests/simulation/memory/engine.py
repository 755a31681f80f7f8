"""PostgreSQL for the simulation: tables in memory behind the same `Database` and `Tx` that services use.

Services and their `store.py` run unchanged: each named query of `queries.sql` has a function here that does the same to
tables in memory. READ COMMITTED with row locks, rollback, unique keys and CHECKs; a statement that nobody has written
for memory raises UnknownStatement. tests/conformance/test_stores.py runs the same suite against PostgreSQL.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, override

import psycopg
from psycopg import errors as pg

from dantegpu.kit.db import Asked, Database, Params, Tx
from dantegpu.kit.errors import Unavailable
from tests.simulation.loop import Process, current_process

type Row = dict[str, Any]
type Key = tuple[Any, ...]
type Handler = Callable[["MemoryTx", Mapping[str, Any]], Awaitable["list[Row] | int"]]

IDLE_IN_TRANSACTION_SECONDS = 10.0
"""As kit.db sets it for each connection."""


class UnknownStatement(Exception):
    """The memory store has no function for this SQL: write one in tests/simulation/memory, and a conformance test."""

    def __init__(self, schema: str, sql: str) -> None:
        super().__init__(f"schema {schema}: no function in memory for: {' '.join(sql.split())[:200]}")


@dataclass(slots=True)
class Table:
    """Rows by primary key. `uniques` give a row's key in a further unique index, None where it is not in it."""

    name: str
    key: tuple[str, ...]
    defaults: Row = field(default_factory=dict[str, Any])
    checks: Mapping[str, Callable[[Row], bool]] = field(default_factory=dict[str, Callable[[Row], bool]])
    uniques: Mapping[str, Callable[[Row], Key | None]] = field(default_factory=dict[str, Callable[[Row], "Key | None"]])
    rows: dict[Key, Row] = field(default_factory=dict[Key, Row])

    def key_of(self, row: Row) -> Key:
        return tuple(row[column] for column in self.key)


class Schema:
    """A service's tables and the functions for its SQL. `inline`: for kit's own statements, by how they begin."""

    def __init__(self, name: str, tables: Iterable[Table], statements: Mapping[str, Handler]) -> None:
        self.name = name
        self.tables = {table.name: table for table in tables}
        self._statements = dict(statements)
        self.serials: dict[str, int] = {}

    def handler(self, sql: str) -> Handler:
        found = self._statements.get(sql)
        if found is None:
            begins = " ".join(sql.split())
            found = next((it for start, it in self._statements.items() if begins.startswith(start)), None)
            if found is None:
                raise UnknownStatement(self.name, sql)
            self._statements[sql] = found
        return found

    def next_serial(self, name: str) -> int:
        self.serials[name] = self.serials.get(name, 0) + 1
        return self.serials[name]


class _Lock:
    __slots__ = ("owners", "waiting")

    def __init__(self, owners: "dict[MemoryTx, bool]") -> None:
        """`owners`: transaction -> whether exclusively."""
        self.owners = owners
        self.waiting: list[tuple[MemoryTx, bool, asyncio.Future[None]]] = []


@dataclass(frozen=True, slots=True)
class Change:
    """One row as it was committed. `before` None: it is new; `after` None: it is deleted."""

    table: str
    before: Row | None
    after: Row | None


def _no_pause(tx: "MemoryTx", at: str) -> Awaitable[None]:
    return asyncio.sleep(0)


def _nobody_looks(tx: "MemoryTx", changes: Sequence[Change]) -> None:
    return


class MemoryServer:
    """One PostgreSQL server. `pause` is called around each statement and commit: it fails there, or time passes."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.schemas: dict[str, Schema] = {}
        self.locks: dict[tuple[str, str, Key], _Lock] = {}
        self.sessions: dict[MemoryTx, None] = {}
        self.pause: Callable[[MemoryTx, str], Awaitable[None] | None] = _no_pause
        """What it returns, if anything, is awaited."""
        self.on_commit: Callable[[MemoryTx, Sequence[Change]], None] = _nobody_looks
        self.deadlocks = 0

    def add(self, schema: Schema) -> None:
        self.schemas[schema.name] = schema

    def break_all(self) -> None:
        """A restart: every transaction that is open is rolled back."""
        for session in list(self.sessions):
            session.abort("terminating connection due to administrator command")

    def break_process(self, process: Process) -> None:
        """A process died: the server sees its connections end."""
        for session in list(self.sessions):
            if session.process is process:
                session.abort("the client is gone")

    def break_idle(self, process: Process, idle_since: float) -> None:
        """A process was stopped for longer than a transaction may lie idle."""
        for session in list(self.sessions):
            if session.process is process and session.active_at_seconds <= idle_since:
                session.abort("terminating connection due to idle-in-transaction timeout")


class _Told[T]:
    """An answer that is there at once."""

    def __init__(self, rows: list[T]) -> None:
        self._rows = rows

    async def rows(self) -> list[T]:
        return self._rows

    def known(self) -> list[T]:
        return self._rows


class MemoryTx(Tx):
    """One transaction: what it wrote lies over the committed rows until it ends."""

    def __init__(self, server: MemoryServer, schema: Schema) -> None:
        self.server = server
        self.schema = schema
        self.process = current_process()
        self.after_commit: list[Callable[[], None]] = []
        self.began_at = server.now()
        self.active_at_seconds = 0.0
        self._written: dict[str, dict[Key, Row | None]] = {}
        self._held: dict[tuple[str, str, Key], None] = {}
        self._waits_for: _Lock | None = None
        self._failed = False
        self._broken = ""
        self.ended = False
        server.sessions[self] = None

    # --- the interface of Tx ------------------------------------------------------------------------------------------

    @override
    async def all[T](self, row: type[T], sql: str, **params: object) -> list[T]:
        return [row(**found) for found in await self._rows(sql, params)]

    @override
    async def one[T](self, row: type[T], sql: str, **params: object) -> T | None:
        found = await self._rows(sql, params)
        return row(**found[0]) if found else None

    @override
    async def value(self, sql: str, **params: object) -> Any:
        found = await self._rows(sql, params)
        return next(iter(found[0].values())) if found else None

    @override
    async def run(self, sql: str, **params: object) -> int:
        done = await self._execute(sql, params)
        return done if isinstance(done, int) else len(done)

    @override
    async def send(self, sql: str, **params: object) -> None:
        await self._execute(sql, params)

    @override
    async def ask[T](self, row: type[T], sql: str, **params: object) -> Asked[T]:
        return _Told(await self.all(row, sql, **params))

    @override
    async def run_many(self, sql: str, rows: Sequence[Params]) -> None:
        for params in rows:
            await self._execute(sql, params)

    async def _rows(self, sql: str, params: Mapping[str, Any]) -> list[Row]:
        found = await self._execute(sql, params)
        if isinstance(found, int):
            raise psycopg.ProgrammingError("the last operation didn't produce a result")
        return found

    async def _execute(self, sql: str, params: Mapping[str, Any]) -> list[Row] | int:
        self._check()
        handler = self.schema.handler(sql)
        if (pause := self.server.pause(self, "statement")) is not None:
            await pause
        self._check()
        if self._failed:
            raise pg.InFailedSqlTransaction("current transaction is aborted, commands ignored until end of block")
        try:
            result = await handler(self, params)
        except psycopg.Error:
            self._failed = True
            raise
        if (pause := self.server.pause(self, "answer")) is not None:
            await pause
        self._check()
        return result

    def _check(self) -> None:
        if self._broken:
            raise psycopg.OperationalError(self._broken)
        self.active_at_seconds = asyncio.get_running_loop().time()

    # --- rows ---------------------------------------------------------------------------------------------------------

    def adds_to(self, table: str) -> bool:
        """Whether it has inserted rows."""
        return any(key not in self.schema.tables[table].rows for key in self._written.get(table, ()))

    def table(self, name: str) -> Table:
        return self.schema.tables[name]

    def get(self, table: str, key: Key) -> Row | None:
        written = self._written.get(table)
        if written is not None and key in written:
            return written[key]
        return self.schema.tables[table].rows.get(key)

    def scan(self, table: str) -> Iterator[Row]:
        """What this transaction sees now."""
        committed = self.schema.tables[table].rows
        written = self._written.get(table)
        if not written:
            yield from list(committed.values())
            return
        for key, row in list(committed.items()):
            if key not in written:
                yield row
            elif (own := written[key]) is not None:
                yield own
        yield from [row for key, row in written.items() if row is not None and key not in committed]

    async def insert(self, table: str, row: Row) -> Row:
        """Raises UniqueViolation, CheckViolation."""
        definition = self.schema.tables[table]
        full = definition.defaults | row
        key = definition.key_of(full)
        # Whoever inserted the same key and has not ended yet is waited for, as PostgreSQL does.
        await self.lock(table, [key])
        if self.get(table, key) is not None:
            raise pg.UniqueViolation(f'duplicate key value violates unique constraint "{table}_pkey": {key}')
        for name, index in definition.uniques.items():
            await self._lock_unique(definition, name, index, full)
        self._store(definition, key, full)
        return full

    async def _lock_unique(self, table: Table, name: str, index: Callable[[Row], Key | None], row: Row) -> None:
        unique = index(row)
        if unique is None:
            return
        await self._lock((self.schema.name, f"{table.name}.{name}", unique), exclusive=True)
        for other in self.scan(table.name):
            if index(other) == unique:
                raise pg.UniqueViolation(f'duplicate key value violates unique constraint "{name}": {unique}')

    def update(self, table: str, row: Row, **changes: Any) -> Row:
        """`row` as this transaction sees it, locked before. Raises CheckViolation."""
        definition = self.schema.tables[table]
        after = row | changes
        self._store(definition, definition.key_of(after), after)
        return after

    def delete(self, table: str, key: Key) -> None:
        self._written.setdefault(table, {})[key] = None

    def _store(self, table: Table, key: Key, row: Row) -> None:
        for name, holds in table.checks.items():
            if not holds(row):
                raise pg.CheckViolation(
                    f'new row for relation "{table.name}" violates check constraint "{name}": {row}'
                )
        self._written.setdefault(table.name, {})[key] = row

    # --- locks --------------------------------------------------------------------------------------------------------

    async def lock(self, table: str, keys: Iterable[Key], *, share: bool = False) -> None:
        """Row locks in the order of `keys`, until the transaction ends."""
        for key in keys:
            await self._lock((self.schema.name, table, key), exclusive=not share)

    async def _lock(self, name: tuple[str, str, Key], *, exclusive: bool) -> None:
        lock = self.server.locks.get(name)
        self._held[name] = None
        if lock is None:
            self.server.locks[name] = _Lock({self: exclusive})
            return
        if self._may_have(lock, exclusive):
            lock.owners[self] = exclusive or lock.owners.get(self, False)
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lock.waiting.append((self, exclusive, granted))
        self._waits_for = lock
        if self._is_deadlocked():
            self.server.deadlocks += 1
            self._forget_waiting(lock)
            raise pg.DeadlockDetected(f"deadlock detected at {name}")
        try:
            await granted
        finally:
            self._waits_for = None
            self._forget_waiting(lock)
        self._check()

    def _forget_waiting(self, lock: _Lock) -> None:
        self._waits_for = None
        lock.waiting = [entry for entry in lock.waiting if entry[0] is not self]

    def _may_have(self, lock: _Lock, exclusive: bool) -> bool:
        others = [it for owner, it in lock.owners.items() if owner is not self]
        if exclusive:
            return not others
        # First come, first served: a shared lock does not overtake somebody who waits for the row.
        return not any(others) and (self in lock.owners or not lock.waiting)

    def _is_deadlocked(self) -> bool:
        seen: set[int] = set()
        todo: list[MemoryTx] = [self]
        while todo:
            lock = todo.pop()._waits_for
            for owner in lock.owners if lock is not None else ():
                if owner is self and lock is not self._waits_for:
                    return True
                if owner is not self and id(owner) not in seen:
                    seen.add(id(owner))
                    todo.append(owner)
        return False

    def _release(self) -> None:
        for name in self._held:
            lock = self.server.locks.get(name)
            if lock is None:
                continue
            lock.owners.pop(self, None)
            if lock.waiting:
                self._grant(lock)
            if not lock.owners and not lock.waiting:
                del self.server.locks[name]
        self._held.clear()

    @staticmethod
    def _grant(lock: _Lock) -> None:
        while lock.waiting:
            tx, exclusive, granted = lock.waiting[0]
            others = [it for owner, it in lock.owners.items() if owner is not tx]
            if (others if exclusive else any(others)) or granted.done():
                if granted.done():
                    lock.waiting.pop(0)
                    continue
                return
            lock.owners[tx] = exclusive or lock.owners.get(tx, False)
            lock.waiting.pop(0)
            granted.set_result(None)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Raises OperationalError when the connection breaks: then the commit may have happened or not."""
        self._check()
        if (pause := self.server.pause(self, "commit")) is not None:
            await pause
        self._check()
        if self._failed:
            self.rollback()
            return
        changes: list[Change] = []
        for name, written in self._written.items():
            rows = self.schema.tables[name].rows
            for key, row in written.items():
                before = rows.get(key)
                if row is None:
                    rows.pop(key, None)
                else:
                    rows[key] = row
                changes.append(Change(name, before, row))
        self._end()
        self.server.on_commit(self, changes)
        if (pause := self.server.pause(self, "committed")) is not None:
            await pause
        if self._broken:
            raise psycopg.OperationalError(self._broken)

    def rollback(self) -> None:
        self._end()

    def abort(self, why: str) -> None:
        """The server ends it: nothing of it was done, its locks are free, the client hears of it at its next word."""
        self._broken = why
        if self.ended:
            return
        # It must not be given a lock any more: nobody would ever give that back.
        waiting = self._waits_for.waiting if self._waits_for is not None else []
        mine = [entry for entry in waiting if entry[0] is self]
        if self._waits_for is not None:
            self._forget_waiting(self._waits_for)
        self._end()
        for _, _, granted in mine:
            if not granted.done():
                granted.set_result(None)

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._written.clear()
            self.server.sessions.pop(self, None)
            self._release()


_UNREACHABLE = (psycopg.OperationalError, psycopg.InterfaceError)


class _Transaction:
    """What `async with db.transaction()` enters."""

    def __init__(self, server: MemoryServer, schema: Schema) -> None:
        self._server = server
        self._schema = schema

    async def __aenter__(self) -> Tx:
        self._tx = MemoryTx(self._server, self._schema)
        try:
            if (pause := self._server.pause(self._tx, "begin")) is not None:
                await pause
        except BaseException:
            self._tx.rollback()
            raise
        return self._tx

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                await self._tx.commit()
        except _UNREACHABLE as broken:
            raise Unavailable("the database") from broken
        finally:
            self._tx.rollback()
        if isinstance(error, _UNREACHABLE):
            raise Unavailable("the database") from error
        if error is None:
            for callback in self._tx.after_commit:
                callback()


class MemoryDatabase(Database):
    """A process's connections to one schema of a MemoryServer."""

    def __init__(self, server: MemoryServer, schema: str) -> None:
        self.dsn = "memory"
        self.schema = schema
        self._server = server

    @override
    async def start(self) -> None:
        return

    @override
    async def stop(self) -> None:
        return

    @override
    def transaction(self, *, durable: bool = True) -> Any:
        return _Transaction(self._server, self._server.schemas[self.schema])

    @override
    def statement(self) -> Any:
        return self.transaction()

    @override
    async def ready(self) -> None:
        return
