"""Packing a working directory: what goes in, what is refused, and always the same bytes for the same content."""

import gzip
import hashlib
import heapq
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from pathspec import GitIgnoreSpec

from dantegpu.cli.errors import CliError
from dantegpu.domain.units import GIB, format_bytes

IGNORE_FILES: Final = (".gitignore", ".danteignore")
"""In each folder; the later one wins."""
ALWAYS_LEFT_OUT: Final = frozenset({".git", ".hg", ".svn"})
MAX_TOTAL_BYTES: Final = 10 * GIB
MAX_ENTRIES: Final = 200_000
MAX_DEPTH: Final = 64
_LARGEST_SHOWN: Final = 5
_COPY_BYTES: Final = 1 << 20
# Fast, and still most of what can be won with source code; results of other levels would have other digests.
_COMPRESSION: Final = 6


class PackingProblem(CliError):
    """The working directory cannot be sent as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="cannot-pack")


@dataclass(frozen=True, slots=True)
class Member:
    """One thing that goes in. `path` is relative, with `/`."""

    path: str
    source: Path
    size_bytes: int = 0
    executable: bool = False
    folder: bool = False
    link_goal: str | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed working directory."""

    archive: Path
    size_bytes: int
    files: int
    content_bytes: int
    """Before compression."""
    sha256: str


@dataclass(frozen=True, slots=True)
class _Rules:
    """Ignore files that hold below `folder`, the nearest last."""

    levels: tuple[tuple[PurePosixPath, GitIgnoreSpec], ...] = ()

    def with_level(self, folder: PurePosixPath, lines: list[str]) -> "_Rules":
        return _Rules((*self.levels, (folder, GitIgnoreSpec.from_lines(lines))))

    def ignores(self, path: PurePosixPath, is_folder: bool) -> bool:
        for folder, spec in reversed(self.levels):
            name = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
            verdict = spec.check_file(name).include
            if verdict is not None:
                return verdict
        return False


def list_members(root: Path) -> list[Member]:
    """What of `root` is sent, sorted by path.

    Raises PackingProblem for links that lead out, for sockets, pipes and devices, and for more than may be sent.
    """
    root = root.resolve()
    if root in (Path("/"), Path.home().resolve()):
        raise PackingProblem(
            f"{root} would be sent as a whole; go into the folder of your project, or use --no-files or --workdir DIR"
        )
    prefix, rules = _rules_above(root)
    members: list[Member] = []
    total_bytes = 0
    for member in _walk(root, PurePosixPath(), prefix, rules):
        members.append(member)
        total_bytes += member.size_bytes
        if len(members) > MAX_ENTRIES:
            raise PackingProblem(f"{root} holds more than {MAX_ENTRIES} files; name what is not needed in .danteignore")
    if total_bytes > MAX_TOTAL_BYTES:
        raise PackingProblem(_too_large(root, members, total_bytes))
    return sorted(members, key=lambda member: member.path.split("/"))


def _too_large(root: Path, members: list[Member], total_bytes: int) -> str:
    largest = heapq.nlargest(_LARGEST_SHOWN, members, key=lambda member: member.size_bytes)
    lines = [f"  {format_bytes(member.size_bytes):>8}  {member.path}" for member in largest]
    return "\n".join([
        f"{root} holds {format_bytes(total_bytes)}; at most {format_bytes(MAX_TOTAL_BYTES)} are sent. The largest:",
        *lines,
        "name what is not needed in .danteignore (same rules as .gitignore)",
    ])  # fmt: skip


def _rules_above(root: Path) -> tuple[PurePosixPath, _Rules]:
    """The ignore files of the git repository around `root`, and where `root` lies in it."""
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)
    prefix = PurePosixPath(root.relative_to(top).as_posix())
    rules = _Rules()
    folder, place = top, PurePosixPath()
    for part in prefix.parts:
        rules = _with_ignore_files(rules, folder, place)
        folder, place = folder / part, place / part
        if rules.ignores(place, is_folder=True):
            # The user means this folder although the repository leaves it out: its own rules hold.
            return PurePosixPath(), _Rules()
    return prefix, rules


def _with_ignore_files(rules: _Rules, folder: Path, place: PurePosixPath) -> _Rules:
    for name in IGNORE_FILES:
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="surrogateescape")
        except (FileNotFoundError, IsADirectoryError):
            continue
        rules = rules.with_level(place, text.splitlines())
    return rules


def _walk(folder: Path, place: PurePosixPath, prefix: PurePosixPath, rules: _Rules) -> Iterator[Member]:
    """`place` is where `folder` lies in what is packed, `prefix / place` where it lies in the repository."""
    if len(place.parts) >= MAX_DEPTH:
        raise PackingProblem(f"{place} lies more than {MAX_DEPTH} folders deep")
    rules = _with_ignore_files(rules, folder, prefix / place)
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path = place / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name in ALWAYS_LEFT_OUT or rules.ignores(prefix / path, is_folder):
            continue
        if not _is_text(entry.name):
            raise PackingProblem(f"the name of {str(path)!r} is not UTF-8; rename it")
        if is_folder:
            yield Member(path.as_posix(), Path(entry.path), folder=True)
            yield from _walk(Path(entry.path), path, prefix, rules)
        else:
            yield _member(entry, path)


def _member(entry: "os.DirEntry[str]", path: PurePosixPath) -> Member:
    info = entry.stat(follow_symlinks=False)
    source = Path(entry.path)
    if stat.S_ISREG(info.st_mode):
        executable = bool(info.st_mode & stat.S_IXUSR)
        return Member(path.as_posix(), source, size_bytes=info.st_size, executable=executable)
    if stat.S_ISLNK(info.st_mode):
        goal = os.readlink(source)
        _check_link(path, goal)
        return Member(path.as_posix(), source, link_goal=goal)
    kind = {stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    what = kind.get(stat.S_IFMT(info.st_mode), "neither a file nor a folder")
    raise PackingProblem(f"{path} is {what} and cannot be sent; remove it or name it in .danteignore")


def _check_link(path: PurePosixPath, goal: str) -> None:
    advice = "copy what it points to, or name it in .danteignore"
    if goal.startswith("/"):
        raise PackingProblem(f"{path} links to the absolute path {goal}, which the machine does not have; {advice}")
    depth = len(path.parts) - 1
    for part in goal.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            raise PackingProblem(f"{path} links out of the working directory ({goal}); {advice}")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def pack(root: Path, target: IO[bytes], on_progress: Callable[[int, int], None] = lambda done, total: None) -> Packed:
    """Write `root` as a .tar.gz to `target`, a file open for writing.

    The same content gives the same bytes: entries are sorted, times and owners are 0, modes are 755 or 644.
    """
    members = list_members(root)
    content_bytes = sum(member.size_bytes for member in members)
    done_bytes = 0
    output = _Hashing(target)
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=output, compresslevel=_COMPRESSION, mtime=0) as compressed,  # pyright: ignore[reportArgumentType]
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for member in members:
            _add(tar, member)
            done_bytes += member.size_bytes
            on_progress(done_bytes, content_bytes)
    target.flush()
    return Packed(
        archive=Path(target.name),
        size_bytes=output.size_bytes,
        files=sum(not member.folder for member in members),
        content_bytes=content_bytes,
        sha256=output.digest.hexdigest(),
    )


def _add(tar: tarfile.TarFile, member: Member) -> None:
    info = tarfile.TarInfo(member.path)
    info.mode = 0o755 if member.folder or member.executable else 0o644
    if member.folder:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    elif member.link_goal is not None:
        info.type = tarfile.SYMTYPE
        info.linkname = member.link_goal
        info.mode = 0o777
        tar.addfile(info)
    else:
        info.size = member.size_bytes
        descriptor = os.open(member.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as content:
            try:
                tar.addfile(info, content)
            except OSError as error:
                if error.errno is not None:
                    raise
                # tarfile's word for a file that ended early.
                raise PackingProblem(f"{member.path} changed while it was read; try again") from error


class _Hashing:
    """Counts and digests what passes through."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size_bytes += len(data)
        return self._target.write(data)

    def flush(self) -> None:
        self._target.flush()
