"""Who this user is on which platform: `DANTE_HOME/credentials.json`, mode 0600, one entry per platform's address."""

import contextlib
import fcntl
import json
import os
import stat
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from dantegpu.cli.errors import CliError

FORMAT: Final = 1
FILE_NAME: Final = "credentials.json"
_FILE_MODE: Final = 0o600
_FOREIGN_BITS: Final = stat.S_IRWXG | stat.S_IRWXO


def home() -> Path:
    """DANTE_HOME, or ~/.dante."""
    configured = os.environ.get("DANTE_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".dante"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An API key, or the tokens of a login, for the platform at `url`."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    access_token: str | None = field(default=None, repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    team_id: str = ""
    email: str = ""


def load(url: str | None = None) -> Credentials | None:
    """The entry of a platform, or without `url` the current one.

    A file that others can read is closed to them, with a note. Raises CliError when the file is not ours or damaged.
    """
    document = _read()
    chosen = normal(url) if url is not None else document.get("current")
    entry = document["platforms"].get(chosen) if isinstance(chosen, str) else None
    return Credentials(url=cast(str, chosen), **entry) if entry is not None else None


def save(
    url: str,
    *,
    api_key: str | None = None,
    access_token: str | None = None,
    refresh_token: str | None = None,
    team_id: str = "",
    email: str = "",
    make_current: bool = True,
) -> None:
    """Remember who we are at `url`; by default it becomes the platform that commands talk to."""
    entry = Credentials(normal(url), api_key, access_token, refresh_token, team_id, email)
    with exclusive():
        write_locked(entry, make_current=make_current)


def forget(url: str) -> bool:
    """Remove the entry of a platform; False: there was none."""
    with exclusive():
        document = _read()
        found = document["platforms"].pop(normal(url), None) is not None
        if document.get("current") == normal(url):
            document["current"] = next(iter(document["platforms"]), None)
        if found:
            _write(document)
        return found


@contextlib.contextmanager
def exclusive() -> Generator[None]:
    """One process at a time reads, changes and writes the file."""
    folder = _make_home()
    descriptor = os.open(folder / "credentials.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, _FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_locked(entry: Credentials, *, make_current: bool) -> None:
    """As `save`, inside `exclusive`."""
    document = _read()
    fields = {name: value for name, value in asdict(entry).items() if value and name != "url"}
    document["platforms"][entry.url] = fields
    if make_current:
        document["current"] = entry.url
    _write(document)


def normal(url: str) -> str:
    """One spelling per platform."""
    return url.strip().rstrip("/")


def _make_home() -> Path:
    folder = home()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _read() -> dict[str, Any]:
    path = home() / FILE_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return {"format": FORMAT, "current": None, "platforms": {}}
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}", code="credentials-unreadable") from error
    with os.fdopen(descriptor, encoding="utf-8") as file:
        _close_to_others(path, file.fileno())
        return _checked(path, file.read())


def _close_to_others(path: Path, descriptor: int) -> None:
    info = os.fstat(descriptor)
    if info.st_uid != os.geteuid():
        raise CliError(
            f"{path} belongs to user {info.st_uid}, not to you; it is not used. Remove it, or set DANTE_HOME",
            code="credentials-foreign",
        )
    if info.st_mode & _FOREIGN_BITS:
        os.fchmod(descriptor, _FILE_MODE)
        mode = stat.S_IMODE(info.st_mode)
        print(f"dante: {path} was open to others (mode {mode:03o}); it is 600 now. If somebody may have read it,"
              " log out and in again", file=sys.stderr)  # fmt: skip


def _checked(path: Path, text: str) -> dict[str, Any]:
    advice = f"remove {path} and log in again"
    try:
        document: Any = json.loads(text)
        platforms: Any = document["platforms"]
        if document["format"] > FORMAT:
            raise CliError(
                f"{path} was written by a newer version of dante; use that one, or {advice}", code="credentials-newer"
            )
        for url, entry in platforms.items():
            Credentials(url=url, **entry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CliError(f"{path} is damaged ({error}); {advice}", code="credentials-damaged") from error
    return document


def _write(document: dict[str, Any]) -> None:
    folder = _make_home()
    # Made 0600 by mkstemp and renamed: nobody ever sees it open or half written.
    descriptor, name = tempfile.mkstemp(prefix=".credentials.", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
        os.replace(name, folder / FILE_NAME)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
