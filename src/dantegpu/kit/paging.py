"""Cursor pagination: bounded pages, and cursors that say nothing to the caller."""

import base64
import binascii
import json
from typing import Any, cast

from dantegpu.kit.errors import InvalidArgument

DEFAULT_PAGE = 50
MAX_PAGE = 500
MAX_CURSOR_LENGTH = 500


def page_limit(asked: int, *, default: int = DEFAULT_PAGE, maximum: int = MAX_PAGE) -> int:
    """Items on a page: `default` for 0, never above `maximum`. Raises InvalidArgument for a negative number."""
    if asked < 0:
        raise InvalidArgument(f"limit: expected 1 to {maximum}, or 0 for {default}; got {asked}")
    return min(asked, maximum) if asked else default


def encode_cursor(*parts: int | str) -> str:
    """The sort key of the last item of a page as opaque text."""
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(cursor: str, *kinds: type) -> list[Any]:
    """The parts of a cursor that `encode_cursor` made of these kinds. Raises InvalidArgument for anything else."""
    problem = InvalidArgument("cursor: not one of this list's; leave it out to start from the beginning")
    if len(cursor) > MAX_CURSOR_LENGTH:
        raise problem
    try:
        parts = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise problem from error
    if not isinstance(parts, list):
        raise problem
    found = cast("list[Any]", parts)
    if [type(part) for part in found] != list(kinds):
        raise problem
    return found
