"""Schema migrations: numbered SQL files, applied by yoyo-migrations, one schema per service."""

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

import psycopg
import yoyo
from psycopg import conninfo, sql

from dantegpu.kit.errors import Unavailable

KIT_MIGRATIONS = Path(str(files("dantegpu.kit") / "sql" / "migrations"))


class NewerData(Exception):
    """The database was written by a newer version of DanteGPU; running this one on it could destroy data."""

    def __init__(self, schema: str, unknown: list[str]) -> None:
        super().__init__(
            f"the data (schema {schema}) comes from a newer version of DanteGPU: it has migrations that this version "
            f"does not know ({', '.join(unknown)}). Start the newer version, or restore a backup made before it."
        )


async def migrate(dsn: str, schema: str, migrations: Path) -> None:
    """Bring `schema` up to date with kit's tables and the service's own. Raises NewerData, Unavailable."""
    try:
        await asyncio.to_thread(_migrate, dsn, schema, migrations)
    except psycopg.OperationalError as error:
        raise Unavailable("the database", str(error).strip()) from error


class Migrations:
    """Component: brings the schema up to date when the service starts. Comes first in a service's components."""

    def __init__(self, dsn: str, schema: str, migrations: Path) -> None:
        self._arguments = (dsn, schema, migrations)

    async def start(self) -> None:
        await migrate(*self._arguments)

    async def stop(self) -> None:
        pass


def _migrate(dsn: str, schema: str, migrations: Path) -> None:
    library = cast(Any, yoyo)  # it has no types
    known = library.read_migrations(str(KIT_MIGRATIONS), str(migrations))
    with psycopg.connect(dsn, autocommit=True) as connection:
        # yoyo's own lock is a row that a killed process leaves behind; an advisory lock ends with its connection.
        connection.execute("SELECT pg_advisory_lock(hashtext('dante migrate'))")
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        with library.get_backend(_yoyo_url(dsn, schema)) as backend:
            pending = backend.to_apply(known)  # also makes yoyo's tables when they are not there yet
            table = sql.Identifier(schema, "_yoyo_migration")
            applied = connection.execute(sql.SQL("SELECT migration_id FROM {}").format(table)).fetchall()
            if unknown := sorted({str(row[0]) for row in applied} - {str(migration.id) for migration in known}):
                raise NewerData(schema, unknown)
            backend.apply_migrations(pending)


def _yoyo_url(dsn: str, schema: str) -> str:
    parts = conninfo.conninfo_to_dict(dsn)
    user = quote(str(parts.pop("user", "") or ""), safe="")
    password = quote(str(parts.pop("password", "") or ""), safe="")
    database = quote(str(parts.pop("dbname", "") or ""), safe="")
    host = str(parts.pop("host", "") or "")
    query: dict[str, str] = {"schema": schema}
    if host.startswith("/"):
        query["host"] = host
        host = ""
    port = parts.pop("port", None)
    if port and not host:
        query["port"] = str(port)
    netloc = f"{user}:{password}@{host}" + (f":{port}" if port and host else "")
    return f"postgresql+psycopg://{netloc}/{database}?{urlencode(query)}"
