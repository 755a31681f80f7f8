"""What the use cases share: who asks, and how names and addresses are written."""

import re
import unicodedata
from typing import Final

from dantegpu.contracts.gen.dante.v1 import common_pb2
from dantegpu.domain.ids import TeamId, UserId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import InvalidArgument, Unauthenticated
from dantegpu.services.auth import store
from dantegpu.services.auth.errors import InvalidEmail

MAX_NAME_LENGTH: Final = 100
MAX_EMAIL_LENGTH: Final = 255
_EMAIL: Final = re.compile(r"[^@\s]{1,64}@[^@\s]{1,190}")


def require_user(actor: Actor) -> UserId:
    """The person who asks, by password or API key. Raises Unauthenticated."""
    if actor.kind != common_pb2.Actor.USER or actor.user_id is None:
        raise Unauthenticated("log in first: `dante login`, or send an API key")
    return actor.user_id


def normalise_email(text: str) -> str:
    """One spelling per address. Raises InvalidEmail."""
    if len(text) > MAX_EMAIL_LENGTH:
        raise InvalidEmail()
    email = unicodedata.normalize("NFKC", text.strip()).lower()
    if not _EMAIL.fullmatch(email) or not email.isprintable():
        raise InvalidEmail()
    return email


def checked_name(text: str, what: str) -> str:
    """A name as people see it, 1 to 100 printable characters. Raises InvalidArgument."""
    name = text.strip()
    if not 1 <= len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise InvalidArgument(f"{what}: expected 1 to {MAX_NAME_LENGTH} printable characters")
    return name


async def role_in(tx: Tx, actor: Actor, team_id: TeamId) -> str | None:
    """What the asking user is in a team now; None: not in it."""
    return await store.role_of(tx, team_id.uuid, require_user(actor).uuid)
