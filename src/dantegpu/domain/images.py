"""Names of container images: `registry/repository:tag@digest`, of which nearly every part may be left out.

Source: the grammar of github.com/distribution/reference, and what Docker puts in for what is left out.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
MAX_LENGTH = 500
EXPECTED = "an image such as python:3.12, ghcr.io/acme/train:v1 or ghcr.io/acme/train@sha256:<64 hex digits>"

_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::\d+)?"
)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class InvalidImage(ValueError):
    """This is no name of an image."""


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A complete name. With a digest the content is fixed, and the tag, if any, is for people only."""

    registry: str
    repository: str
    tag: str
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> "ImageReference":
        """Raises InvalidImage."""
        if len(text) > MAX_LENGTH:
            raise InvalidImage(f"an image's name has at most {MAX_LENGTH} characters")
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise InvalidImage(f"{digest[:80]!r} is no digest; expected {EXPECTED}")
        first, slash, path = rest.partition("/")
        if not slash or not ("." in first or ":" in first or first == "localhost"):
            first, path = DEFAULT_REGISTRY, rest
        name, colon, tag = path.partition(":")
        if first in (DEFAULT_REGISTRY, "index.docker.io", "registry-1.docker.io"):
            first = DEFAULT_REGISTRY
            name = name if "/" in name else f"library/{name}"
        valid = _HOST.fullmatch(first) and _REPOSITORY.fullmatch(name) and (not colon or _TAG.fullmatch(tag))
        if not valid:
            raise InvalidImage(f"{text[:80]!r} is no name of an image; expected {EXPECTED}")
        return cls(first, name, tag or ("" if digest else DEFAULT_TAG), digest)

    @property
    def pinned(self) -> str:
        """What an engine is asked for: by digest where there is one."""
        name = f"{self.registry}/{self.repository}"
        return f"{name}@{self.digest}" if self.digest else f"{name}:{self.tag}"

    def __str__(self) -> str:
        name = f"{self.registry}/{self.repository}"
        return f"{name}{f':{self.tag}' if self.tag else ''}{f'@{self.digest}' if self.digest else ''}"

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether one of these patterns (`*`, `?`, `[...]`) is of its whole name, `docker.io/library/python:3.12`."""
        return any(fnmatch.fnmatchcase(str(self), pattern) for pattern in patterns)
