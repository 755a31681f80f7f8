"""Columns, types and defaults of a service's tables, read from its migrations: a new column needs no word here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

_TABLE = re.compile(r"CREATE TABLE (\w+) \(")
_ALTER = re.compile(r"ALTER TABLE (\w+)\s+(ADD COLUMN .*?);", re.DOTALL)
_DEFAULT = re.compile(r"\bDEFAULT ('[^']*'|[\w.-]+)")
_NOT_COLUMNS = ("CHECK", "UNIQUE", "PRIMARY", "FOREIGN", "CONSTRAINT")


@dataclass(frozen=True, slots=True)
class Column:
    """`type` as PostgreSQL names it. `default` is ready to be put into a row; a list is copied by whoever does."""

    type: str
    default: Any
    required: bool


def columns_of(folder: Path) -> dict[str, dict[str, Column]]:
    """Table -> column name -> column, after all migrations in `folder`."""
    tables: dict[str, dict[str, Column]] = {}
    for path in sorted(folder.glob("*.sql")):
        text = re.sub(r"--[^\n]*", "", path.read_text(encoding="utf-8"))
        for match in _TABLE.finditer(text):
            body = _until_closed(text, match.end())
            tables[match[1]] = dict(_columns(_split(body)))
        for match in _ALTER.finditer(text):
            added = [part.strip().removeprefix("ADD COLUMN ") for part in _split(match[2])]
            tables[match[1]] |= dict(_columns(part for part in added if not part.startswith(("ADD", "DROP", "ALTER"))))
    return tables


def defaults_of(columns: dict[str, Column]) -> dict[str, Any]:
    """What a row has in columns that an INSERT does not name."""
    return {name: column.default for name, column in columns.items()}


def typed(columns: dict[str, Column], row: dict[str, Any]) -> dict[str, Any]:
    """A record of jsonb_to_recordset with PostgreSQL's types. Columns that the table lacks stay as they are."""
    return {name: _value(columns[name].type, value) if name in columns else value for name, value in row.items()}


def records(rows: Jsonb) -> list[dict[str, Any]]:
    """The records that a Jsonb parameter holds."""
    return list(rows.obj)


def _value(type_: str, value: Any) -> Any:
    if value is None:
        return None
    match type_:
        case "uuid" if isinstance(value, str):
            return UUID(value)
        case "timestamptz" if isinstance(value, str):
            return datetime.fromisoformat(value)
        case "bytea" if isinstance(value, str):
            return bytes.fromhex(value)
        case "uuid[]":
            return [UUID(each) for each in value]
        case _:
            return value


def _until_closed(text: str, start: int) -> str:
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return text[start:index]
    raise ValueError("a CREATE TABLE is not closed")


def _split(body: str) -> Iterator[str]:
    depth = begin = 0
    for index, character in enumerate(body):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            yield body[begin:index].strip()
            begin = index + 1
    yield body[begin:].strip()


def _columns(parts: Iterator[str] | Any) -> Iterator[tuple[str, Column]]:
    for part in parts:
        words = part.split()
        if not words or words[0].startswith(_NOT_COLUMNS):
            continue
        default = _DEFAULT.search(part)
        required = "NOT NULL" in part or "PRIMARY KEY" in part
        yield words[0], Column(words[1], _default(words[1], default[1]) if default else None, required)


def _default(type_: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("'"):
        bare = text.strip("'")
        if type_ == "bytea":
            return b""
        return [] if type_.endswith("[]") else {} if type_ == "jsonb" else bare
    if text.lstrip("-").isdigit():
        return int(text)
    return None  # now(): whoever inserts gives it
