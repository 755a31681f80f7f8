"""PostgreSQL: one pool per service on the service's own schema, explicit transactions, named queries.

Only `store.py` files and kit use what is here.
"""

import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import psycopg
import structlog
from psycopg.pq.abc import PGresult
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from dantegpu.kit.errors import Unavailable
from dantegpu.kit.pipeline import Answer, Pipeline

POOL_TIMEOUT_SECONDS = 3.0
CONNECT_TIMEOUT_SECONDS = 3
CHECK_AFTER_SECONDS = 0.5
"""A pooled connection that was not used for so long is tried before it is handed out."""
IDLE_IN_TRANSACTION_SECONDS = 10
"""A process that was stopped in mid-transaction keeps its locks from the others for at most this long."""
TRANSACTION_SECONDS = 60
"""The same if it was stopped between two statements of one round trip. From PostgreSQL 17 on."""
_TRANSACTION_TIMEOUT_VERSION = 170_000

log = structlog.get_logger(__name__)

type Params = Mapping[str, object]


class Tx:
    """One open transaction. Commits when its `async with` block ends, rolls back when the block raises."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.after_commit: list[Callable[[], None]] = []
        """Called once the commit is known to have happened; for waking tasks, never for work that must not be lost."""

    async def all[T](self, row: type[T], sql: str, **params: object) -> list[T]:
        """All rows as instances of the dataclass `row` (column names = field names)."""
        answer = self._pipeline.put(sql, params)
        await self._pipeline.sync()
        return self._pipeline.rows(answer, _rows_of(row))

    async def one[T](self, row: type[T], sql: str, **params: object) -> T | None:
        found = await self.all(row, sql, **params)
        return found[0] if found else None

    async def value(self, sql: str, **params: object) -> Any:
        """First column of the first row, or None."""
        answer = self._pipeline.put(sql, params)
        await self._pipeline.sync()
        found = self._pipeline.rows(answer, lambda _: itemgetter(0))
        return found[0] if found else None

    async def run(self, sql: str, **params: object) -> int:
        """Execute; the number of rows touched."""
        answer = self._pipeline.put(sql, params)
        await self._pipeline.sync()
        return answer.result.command_tuples or 0 if answer.result is not None else 0

    async def send(self, sql: str, **params: object) -> None:
        """Execute without waiting for the answer. What goes wrong is raised by a later statement or at the end."""
        self._pipeline.put(sql, params)

    async def ask[T](self, row: type[T], sql: str, **params: object) -> "Asked[T]":
        """Like all(), but what it returns gives the rows: several questions share a round trip."""
        return _Question(self._pipeline, self._pipeline.put(sql, params), row)

    async def run_many(self, sql: str, rows: Sequence[Params]) -> None:
        """Execute once per row, pipelined. For large batches prefer `unnest` of arrays in one statement."""
        for params in rows:
            self._pipeline.put(sql, params)


class Asked[T](Protocol):
    """A question that is on its way."""

    async def rows(self) -> list[T]:
        """The answer, once it is there. Within the transaction."""
        ...

    def known(self) -> list[T]:
        """The answer, which is there after a statement that was waited for, and after the commit."""
        ...


class _Question[T]:
    def __init__(self, pipeline: Pipeline, answer: Answer, row: type[T]) -> None:
        self._pipeline = pipeline
        self._answer = answer
        self._row = row

    async def rows(self) -> list[T]:
        if self._answer.result is None:
            await self._pipeline.sync()
        return self.known()

    def known(self) -> list[T]:
        return self._pipeline.rows(self._answer, _rows_of(self._row))


class Database:
    """A pool of connections whose search_path is `schema` (and nothing else: a service sees only its own tables)."""

    def __init__(self, dsn: str, schema: str, *, max_size: int = 4) -> None:
        self.dsn = dsn
        self.schema = schema
        self._pool = AsyncConnectionPool(
            dsn,
            connection_class=psycopg.AsyncConnection[DictRow],
            kwargs={
                "row_factory": dict_row,
                "autocommit": True,
                "connect_timeout": CONNECT_TIMEOUT_SECONDS,
                "options": f"-c search_path={schema} "
                f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_SECONDS}s",
                "application_name": f"dante {schema}",
            },
            min_size=1,
            max_size=max_size,
            open=False,
            timeout=POOL_TIMEOUT_SECONDS,
            reconnect_timeout=15.0,
            name=schema,
            configure=_configure,
            check=self._check,
        )
        self._pipelines: WeakKeyDictionary[psycopg.AsyncConnection[DictRow], Pipeline] = WeakKeyDictionary()
        self._used_at_seconds: WeakKeyDictionary[psycopg.AsyncConnection[DictRow], float] = WeakKeyDictionary()

    async def start(self) -> None:
        await self._pool.open()

    async def stop(self) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def transaction(self, *, durable: bool = True) -> AsyncGenerator[Tx]:
        """A transaction. Raises Unavailable when PostgreSQL does not answer or breaks off.

        After Unavailable the caller cannot know whether a commit in flight happened: what it does must be idempotent.
        One that is not `durable` does not wait for the disk: a crash of PostgreSQL (not of this process) may undo it,
        unless a durable commit on the same server came after it.
        """
        async with self._pipelined() as pipeline:
            tx = Tx(pipeline)
            # Each answer that nobody waits for is a round trip less: BEGIN goes along with the first statement.
            pipeline.put("BEGIN", {})
            if not durable:
                pipeline.put("SET LOCAL synchronous_commit = off", {})
            yield tx
            pipeline.put("COMMIT", {})
            await pipeline.sync()
        for callback in tx.after_commit:
            callback()

    @asynccontextmanager
    async def statement(self) -> AsyncGenerator[Tx]:
        """For one statement: it is its own transaction, without BEGIN and COMMIT.

        Raises Unavailable like transaction().
        """
        async with self._pipelined() as pipeline:
            tx = Tx(pipeline)
            yield tx
            await pipeline.finish()
        assert not tx.after_commit, "nothing commits here that somebody could wait for"

    @asynccontextmanager
    async def _pipelined(self) -> AsyncGenerator[Pipeline]:
        try:
            async with self._pool.connection() as connection:
                pipeline = self._pipelines.get(connection) or Pipeline(connection)
                self._pipelines[connection] = pipeline
                pipeline.open()
                try:
                    yield pipeline
                except BaseException:
                    await pipeline.abandon()
                    raise
                finally:
                    pipeline.close()
                self._used_at_seconds[connection] = time.monotonic()
        except psycopg.errors.DiskFull as error:
            raise Unavailable("the database", "its disk is full: the operator has to free space", 30) from error
        except PoolTimeout as error:
            raise Unavailable("the database") from error
        except psycopg.errors.QueryCanceled:
            raise
        except (
            psycopg.OperationalError,
            psycopg.InterfaceError,
            psycopg.errors.IdleInTransactionSessionTimeout,
            psycopg.errors.TransactionTimeout,
        ) as error:
            log.warning("database_unavailable", schema=self.schema, error=str(error).strip())
            raise Unavailable("the database") from error

    async def _check(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        # A connection that just worked needs no round trip of its own to show that it does.
        if time.monotonic() - self._used_at_seconds.get(connection, -CHECK_AFTER_SECONDS) >= CHECK_AFTER_SECONDS:
            await cast(Any, AsyncConnectionPool.check_connection)(connection)  # typed for tuple rows only

    async def ready(self) -> None:
        """Raises Unavailable when a trivial query fails."""
        async with self.transaction() as tx:
            await tx.value("SELECT 1")


async def _configure(connection: psycopg.AsyncConnection[DictRow]) -> None:
    if connection.info.server_version >= _TRANSACTION_TIMEOUT_VERSION:
        await connection.execute(f"SET transaction_timeout = '{TRANSACTION_SECONDS}s'".encode())


class Queries:
    """Named SQL statements of a service, from its `sql/queries.sql`:

    -- name: claim_jobs
    UPDATE ... ;
    """

    _HEADER = re.compile(r"^-- name: (\w+)\s*$", re.MULTILINE)

    def __init__(self, text: str) -> None:
        parts = self._HEADER.split(text)
        self._statements = {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
        if len(self._statements) != len(parts) // 2:
            raise ValueError("two queries have the same name")

    @staticmethod
    def of(package: str, name: str = "queries") -> "Queries":
        """The queries of a package such as `dantegpu.services.auth`, from its `sql/<name>.sql`."""
        return Queries((files(package) / "sql" / f"{name}.sql").read_text())

    def __getitem__(self, name: str) -> str:
        return self._statements[name]


@cache
def _rows_of[T](row: type[T]) -> Callable[[PGresult], Callable[[Sequence[Any]], T]]:
    """Makes rows of a result's columns, by position. Fields must be the columns."""
    names = [field.name.encode() for field in fields(cast(Any, row))]

    def make_maker(result: PGresult) -> Callable[[Sequence[Any]], T]:
        columns = [result.fname(index) for index in range(result.nfields)]
        if columns == names:
            return lambda values: row(*values)
        if set(columns) != set(names):
            raise TypeError(f"{row.__name__} has fields {names}, the statement gives {columns}")
        places = [columns.index(name) for name in names]
        return lambda values: row(*[values[place] for place in places])

    return make_maker
