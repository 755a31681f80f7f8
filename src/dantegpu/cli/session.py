"""What every command shares: which platform, who we are there, and how to answer."""

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, Concatenate

import click

from dantegpu.cli import credentials, output
from dantegpu.cli.credentials import Credentials

if TYPE_CHECKING:
    from dantegpu.sdk import AsyncDante, Dante, Tokens

DEFAULT_URL = "http://127.0.0.1:8400"
RETRY_SECONDS = 60.0
FOLLOW_RETRY_SECONDS = 600.0
"""A follower outlives restarts and upgrades of the platform."""


@dataclass(slots=True)
class FileSession:
    """The SDK's tokens in the credentials file, shared with other `dante` processes."""

    url: str
    _held: bool = field(default=False, repr=False)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        with credentials.exclusive():
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def exclusive(self) -> AbstractContextManager[None]:
        return self._locked()

    def load(self) -> "Tokens | None":
        from dantegpu.sdk import Tokens

        entry = credentials.load(self.url)
        if entry is None or not entry.access_token or not entry.refresh_token:
            return None
        return Tokens(entry.access_token, entry.refresh_token)

    def store(self, tokens: "Tokens | None") -> None:
        with contextlib.nullcontext() if self._held else self._locked():
            entry = credentials.load(self.url) or Credentials(self.url)
            renewed = replace(
                entry,
                access_token=tokens.access_token if tokens else None,
                refresh_token=tokens.refresh_token if tokens else None,
            )
            credentials.write_locked(renewed, make_current=False)


@dataclass(slots=True)
class Cli:
    """One command's surroundings."""

    url_given: str | None
    as_json: bool
    _told: set[str] = field(default_factory=set[str])

    @property
    def url(self) -> str:
        """--url, DANTE_URL, the last login, this machine."""
        given = self.url_given or os.environ.get("DANTE_URL")
        if given:
            return credentials.normal(given)
        current = credentials.load()
        return current.url if current else DEFAULT_URL

    def client(self, *, retry_seconds: float = RETRY_SECONDS) -> "Dante":
        """A client that says on stderr what it waits for."""
        _keep_httpx_small()
        from dantegpu.sdk import Dante

        return Dante(**self._options(), retry_seconds=retry_seconds)

    def async_client(self, *, retry_seconds: float = FOLLOW_RETRY_SECONDS) -> "AsyncDante":
        _keep_httpx_small()
        from dantegpu.sdk import AsyncDante

        return AsyncDante(**self._options(), retry_seconds=retry_seconds)

    def _options(self) -> dict[str, Any]:
        url = self.url
        entry = credentials.load(url)
        api_key = os.environ.get("DANTE_API_KEY") or (entry.api_key if entry else None)
        return {
            "url": url,
            "api_key": api_key,
            "session": None if api_key else FileSession(url),
            "team_id": entry.team_id if entry else None,
            "on_wait": self._waits,
        }

    def _waits(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            output.note(f"dante: {text}")

    def answer(self, document: dict[str, object], human: Callable[[], None]) -> None:
        """Print `document` with --json; otherwise let `human` print."""
        if self.as_json:
            output.print_json(document)
        else:
            human()


def _keep_httpx_small() -> None:
    """httpx loads its own command line (rich, pygments) with the package: a third of our start, for nothing."""
    if "httpx" not in sys.modules:
        unused = ModuleType("httpx._main")
        unused.__dict__["main"] = lambda: None
        sys.modules.setdefault("httpx._main", unused)


def command[**P](
    name: str, *, options_anywhere: bool = True
) -> Callable[[Callable[Concatenate[Cli, P], int | None]], click.Command]:
    """A click command with --url and --json, whose function gets a Cli first. What it returns is the exit code.

    Without `options_anywhere` the first word that is no option ends the options: the rest is somebody else's command.
    """

    def decorate(function: Callable[Concatenate[Cli, P], int | None]) -> click.Command:
        @wraps(function)
        def body(*args: P.args, **options: P.kwargs) -> int | None:
            url: Any = options.pop("platform_url", None)
            as_json: Any = options.pop("as_json", False)
            inherited: object = click.get_current_context().find_root().obj
            return function(Cli(url or (inherited if isinstance(inherited, str) else None), as_json), *args, **options)

        made = click.command(name, context_settings={"allow_interspersed_args": options_anywhere})(body)
        made.params.append(click.Option(["--url", "platform_url"], metavar="URL", help="Address of the platform."))
        made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="One JSON object on stdout."))
        return made

    return decorate
