"""Schema migrations: numbered SQL files, applied by yoyo-migrations, one schema per service."""

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

import psycopg
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
    folders = (KIT_MIGRATIONS, migrations)
    # The name of the file is yoyo's id for it.
    known = {file.stem for folder in folders for file in folder.glob("*.sql")}
    with psycopg.connect(dsn, autocommit=True) as connection:
        if _applied(connection, schema, known) == known:
            return
        # yoyo's own lock is a row that a killed process leaves behind; an advisory lock ends with its connection.
        connection.execute("SELECT pg_advisory_lock(hashtext('dante migrate'))")
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        _applied(connection, schema, known)  # another start may have come first
        _apply(dsn, schema, folders)


def _applied(connection: psycopg.Connection[Any], schema: str, known: set[str]) -> set[str]:
    """Migrations that the schema has. Raises NewerData."""
    table = f"{schema}._yoyo_migration"
    if connection.execute("SELECT to_regclass(%s)", [table]).fetchone() == (None,):
        return set()
    name = sql.Identifier(schema, "_yoyo_migration")
    rows = connection.execute(sql.SQL("SELECT migration_id FROM {}").format(name)).fetchall()
    applied = {str(row[0]) for row in rows}
    if unknown := sorted(applied - known):
        raise NewerData(schema, unknown)
    return applied


def _apply(dsn: str, schema: str, folders: Sequence[Path]) -> None:
    # Imported late: no start but the first one after an update needs it, its parser of SQL and their memory.
    import yoyo

    library = cast(Any, yoyo)  # it has no types
    with library.get_backend(_yoyo_url(dsn, schema)) as backend:
        backend.apply_migrations(backend.to_apply(library.read_migrations(*map(str, folders))))


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
