"""Unpacking a job's input: an archive made by somebody else, unpacked with the daemon's rights.

Python's own extraction filter has been escaped before (CVE-2025-4517), so nothing here resolves a path at all: each
folder is opened below the one before it, following no link, and every file is created exclusively.
"""

import contextlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_MEMBERS = 500_000
MAX_DEPTH = 64
MAX_NAME_BYTES = 255
_COPY_BYTES = 1 << 20
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class ArchiveRefused(Exception):
    """The archive is damaged, too large, or wants to write outside its folder."""


@dataclass(slots=True)
class _Budget:
    bytes_left: int
    members_left: int = MAX_MEMBERS

    def take(self, size_bytes: int) -> None:
        self.members_left -= 1
        self.bytes_left -= size_bytes
        if self.members_left < 0:
            raise ArchiveRefused(f"more than {MAX_MEMBERS} files")
        if self.bytes_left < 0:
            raise ArchiveRefused("unpacked, it is larger than this machine allows")


def unpack(archive: Path, target: Path, *, max_bytes: int) -> None:
    """Unpack a .tar.gz into `target`: folders, regular files and links that stay inside. Raises ArchiveRefused."""
    budget = _Budget(max_bytes)
    root = os.open(target, _FOLDER_FLAGS)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                _unpack_member(tar, member, root, budget)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ArchiveRefused(f"it is damaged: {error}") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ArchiveRefused(f"{error.filename!r} comes twice or passes through a link") from error
    finally:
        os.close(root)


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, root: int, budget: _Budget) -> None:
    parts = _parts(member.name)
    budget.take(member.size if member.isreg() else 0)
    if not parts:
        return
    folder = _open_folder(root, parts[:-1])
    try:
        name = parts[-1]
        if member.isdir():
            os.close(_open_below(folder, name))
        elif member.isreg():
            source = tar.extractfile(member)
            if source is None:
                raise ArchiveRefused(f"{member.name!r} has no content")
            _write_file(folder, name, source, executable=bool(member.mode & 0o100))
        elif member.issym():
            _check_link(parts, member.linkname)
            os.symlink(member.linkname, name, dir_fd=folder)
        else:
            raise ArchiveRefused(f"{member.name!r} is neither a file, a folder nor a symbolic link")
    finally:
        os.close(folder)


def _parts(name: str) -> list[str]:
    if name.startswith("/"):
        raise ArchiveRefused(f"{name!r} is an absolute path")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ArchiveRefused(f"{name!r} leads out of the folder")
    if len(parts) > MAX_DEPTH or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
        raise ArchiveRefused(f"{name[:80]!r} is too deep or too long")
    return parts


def _check_link(parts: list[str], goal: str) -> None:
    """The job would follow it inside its sandbox only, but a link that leads out is never what somebody packed."""
    depth = len(parts) - 1
    if goal.startswith("/") or "\0" in goal:
        raise ArchiveRefused(f"{'/'.join(parts)!r} links to the absolute path {goal!r}")
    for part in goal.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            raise ArchiveRefused(f"{'/'.join(parts)!r} links out of the folder")


def _open_folder(root: int, parts: list[str]) -> int:
    folder = os.dup(root)
    for part in parts:
        try:
            inner = _open_below(folder, part)
        finally:
            os.close(folder)
        folder = inner
    return folder


def _open_below(folder: int, name: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=folder)
    try:
        return os.open(name, _FOLDER_FLAGS, dir_fd=folder)
    except OSError as error:
        raise ArchiveRefused(f"{name!r} is not a folder, or a link stands in its place") from error


def _write_file(folder: int, name: str, source: IO[bytes], *, executable: bool) -> None:
    descriptor = os.open(name, _FILE_FLAGS, 0o755 if executable else 0o644, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in _chunks(source):
            file.write(chunk)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(_COPY_BYTES):
        yield chunk
