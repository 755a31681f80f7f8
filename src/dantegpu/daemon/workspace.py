"""An attempt's folder on this machine: where the job's files, results and log lie, and how they go away again."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from dantegpu.domain.ids import AttemptId

SPARES_MAX = 64
"""Folders kept for the next attempts: making the seven files and folders of one anew costs more than `true` does."""
MARK_BYTES = 40
"""Of the line in `started`, whose file is used again: a shorter line would leave the end of the last one."""
SPARE_STARTED, SPARE_EXIT = "started.spare", "exit.spare"
"""What a cell renames to `started` and `exit`. Only one cell can have the first, so it starts the attempt."""
_FILES = ("output.log", "started", "exit", "stop", "handle.new", "resumed", SPARE_STARTED, SPARE_EXIT)
_KEPT = frozenset(("work", "output", *_FILES))
_FRESH_FOLDER_BYTES = 4096
"""Of a folder that has never held much: ext4's do not shrink, and the next job would list it slowly."""
_GET_FLAGS = 0x80086601
_HARMLESS_FLAGS = 0x80000 | 0x1000 | 0x10000000
"""Extents, index, inline data: the file system's own choice. Any other one may be the last job's, see chattr(1)."""


class ResultsTooLarge(Exception):
    """The job left more files or bytes in its output folder than are uploaded."""


@dataclass(frozen=True)
class AttemptFolder:
    """`attempts/<id>/`, 0700: only `work`, `output` and the log's descriptor are ever seen by the job.

    Making a path costs as much as using it, so each is made once.
    """

    root: Path
    spares: Path | None = None
    """Where folders lie that can be had instead of new ones. Each is complete: it was moved there last of all."""
    parked: Path | None = None
    """Where those lie for which a sandbox waits already."""

    @cached_property
    def work(self) -> Path:
        return self.root / "work"

    @cached_property
    def output(self) -> Path:
        return self.root / "output"

    @cached_property
    def log(self) -> Path:
        return self.root / "output.log"

    @cached_property
    def started(self) -> Path:
        """Made by the shim, exclusively, before anything runs: "pid starttime"."""
        return self.root / "started"

    @cached_property
    def exit(self) -> Path:
        return self.root / "exit"

    @cached_property
    def stop(self) -> Path:
        return self.root / "stop"

    @cached_property
    def resumed(self) -> Path:
        """Made once an earlier attempt's checkpoint is in place: that attempt's epoch."""
        return self.root / "resumed"

    @property
    def checkpoint(self) -> Path:
        """The archive of a checkpoint while it comes or goes."""
        return self.root / "checkpoint.tar.gz"

    @property
    def handle(self) -> Path:
        return self.root / "handle.json"

    @property
    def once(self) -> Path:
        """A container's own marks lie in here. The job may write to it, so nobody opens anything in it."""
        return self.root / "once"

    def create(self) -> bool:
        """Make what is missing of it; False when it was there already, perhaps in part."""
        root = str(self.root)
        if self._take_spare():
            return True
        try:
            os.mkdir(root, 0o700)
            fresh = True
        except FileExistsError:
            fresh = False
        except FileNotFoundError:
            os.makedirs(root, 0o700)
            fresh = True
        for name in ("work", "output"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{root}/{name}", 0o755)
        os.close(os.open(f"{root}/output.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600))
        return fresh

    def _take_spare(self) -> bool:
        for place in (self.parked, self.spares):
            try:
                name = next(iter(os.listdir(place)), None) if place is not None else None
                if name is not None:
                    # Refused when the attempt's folder is there and not empty.
                    os.rename(f"{place}/{name}", self.root)
                    return True
            except OSError:
                continue
        return False

    def read_handle(self) -> str | None:
        """None while nothing was prepared."""
        try:
            with open(f"{self.root}/handle.json", encoding="utf-8") as file:
                return file.read() or None
        except FileNotFoundError:
            return None

    def write_handle(self, text: str) -> None:
        """Whole or not at all, also when the daemon is killed at this moment."""
        fresh = f"{self.root}/handle.new"
        content = text.encode()
        # Not truncated to nothing: ext4 would send such a file to the disk when it is closed.
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, content)
            if os.fstat(descriptor).st_size > len(content):
                os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)
        os.rename(fresh, f"{self.root}/handle.json")

    def forget_handle(self) -> None:
        """First of all when it goes away: whoever finds a handle takes what it names for the attempt's own."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{self.root}/handle.json", f"{self.root}/handle.new")

    async def give_to(self, uid: int) -> None:
        """Make the job's two folders belong to `uid`. Only while nothing of the job runs."""
        if any(os.scandir(self.work)) or any(os.scandir(self.output)):
            await asyncio.to_thread(self._give_all_to, uid)
        else:
            for top in (self.work, self.output):
                os.chown(top, uid, uid, follow_symlinks=False)

    def _give_all_to(self, uid: int) -> None:
        for top in (self.work, self.output):
            os.chown(top, uid, uid, follow_symlinks=False)
            for folder, folders, files, descriptor in os.fwalk(top):
                del folder
                for name in (*folders, *files):
                    os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)

    async def removed(self, *, used_again: bool = False) -> None:
        """`remove`, in a thread when it may take long. `used_again`: nobody can have kept a descriptor of it."""
        if not (used_again and self._made_spare()) and not self._removed_empty():
            await asyncio.to_thread(self.remove)

    def unpark(self) -> None:
        """Nothing waits for it any more; it may be an attempt's by now."""
        if self.spares is not None:
            with contextlib.suppress(OSError):
                os.rename(self.root, self.spares / self.root.name)

    def _made_spare(self) -> bool:
        """Move it to the spares if the job left nothing in it and on it; False when it has to be removed."""
        if self.spares is None:
            return False
        root = str(self.root)
        self.forget_handle()
        try:
            if len(os.listdir(self.spares)) >= SPARES_MAX or not set(os.listdir(root)) <= _KEPT:
                return False
            if not (_untouched(f"{root}/work") and _untouched(f"{root}/output")):
                return False
            for name in ("stop", "resumed"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{root}/{name}")
            if os.stat(f"{root}/output.log").st_size:
                os.truncate(f"{root}/output.log", 0)
            with contextlib.suppress(FileNotFoundError):
                _blank(f"{root}/started")
                os.rename(f"{root}/started", f"{root}/{SPARE_STARTED}")
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{root}/exit", f"{root}/{SPARE_EXIT}")
            os.rename(root, f"{self.spares}/{self.root.name}")
        except OSError:
            return False
        return True

    def remove(self) -> None:
        """Remove everything; a job may have taken the permissions from its own folders."""
        if self._removed_empty() or not self.root.is_dir():
            return
        shutil.rmtree(self.root, onexc=_unlock_and_retry)

    def _removed_empty(self) -> bool:
        """The short way for a job that left no files: no listing, a fixed number of calls."""
        root = str(self.root)
        self.forget_handle()
        try:
            os.rmdir(f"{root}/work")
            os.rmdir(f"{root}/output")
            for name in _FILES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{root}/{name}")
            os.rmdir(root)
        except OSError:
            return False
        return True


def _untouched(folder: str) -> bool:
    """Whether a job's folder is as if new, and the daemon's own again: empty, with nothing that a job can set on it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if info.st_mode != stat.S_IFDIR | 0o755 or info.st_size > _FRESH_FOLDER_BYTES or os.listdir(descriptor):
            return False
        # `security.` is the system's own (SELinux); access lists are among the others.
        if any(not name.startswith("security.") for name in _attributes(descriptor)) or _flags(descriptor):
            return False
        if info.st_uid != os.geteuid():
            os.fchown(descriptor, os.geteuid(), os.getegid())
    finally:
        os.close(descriptor)
    return True


def _attributes(descriptor: int) -> list[str]:
    try:
        return os.listxattr(descriptor)
    except OSError:
        return []  # a file system without any


def _flags(descriptor: int) -> int:
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8))[:4], sys.byteorder) & ~_HARMLESS_FLAGS
    except OSError:
        return 0  # a file system without any


def _blank(path: str) -> None:
    """A reader takes the line for one that is not complete yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b" " * MARK_BYTES)
    finally:
        os.close(descriptor)


def _unlock_and_retry(function: object, path: str, error: BaseException) -> None:
    del function
    if isinstance(error, FileNotFoundError):
        return
    if not isinstance(error, PermissionError):
        raise error
    parent = os.path.dirname(path)
    os.chmod(parent, 0o700)
    if os.path.isdir(path) and not os.path.islink(path):
        os.chmod(path, 0o700)
        shutil.rmtree(path, onexc=_raise)
    else:
        os.unlink(path)


def _raise(function: object, path: str, error: BaseException) -> None:
    del function, path
    if not isinstance(error, FileNotFoundError):
        raise error


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A regular file that the job left, relative to its output folder, with `/`."""

    path: str
    size_bytes: int


def output_files(output: Path, *, max_files: int, max_bytes: int) -> list[OutputFile]:
    """The regular files below `output`, sorted by path. Links, sockets and devices are left out.

    Raises ResultsTooLarge.
    """
    found: list[OutputFile] = []
    total_bytes = 0
    for path, size_bytes in _walk(output):
        total_bytes += size_bytes
        found.append(OutputFile(path, size_bytes))
        if len(found) > max_files:
            raise ResultsTooLarge(f"more than {max_files} files in the output folder")
        if total_bytes > max_bytes:
            raise ResultsTooLarge(f"more than {max_bytes} bytes in the output folder")
    return sorted(found, key=lambda file: file.path)


def _walk(output: Path) -> Iterator[tuple[str, int]]:
    for folder, _, names, descriptor in os.fwalk(output, follow_symlinks=False):
        relative = Path(folder).relative_to(output)
        for name in names:
            info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            path = (relative / name).as_posix()
            if stat.S_ISREG(info.st_mode) and _is_text(path):
                yield path, info.st_size


def _is_text(path: str) -> bool:
    """A name that is not UTF-8 cannot be told to anybody."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_output(output: Path, path: str) -> int:
    """A read-only descriptor of one result. Follows no link at any step, so a job cannot point outside its folder."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a path inside the output folder")
    descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        return os.open(parts[-1], flags, dir_fd=descriptor)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=128)
def _folder(root: Path, attempt_id: AttemptId) -> AttemptFolder:
    """Asked for several times per attempt."""
    return AttemptFolder(root / "attempts" / str(attempt_id), root / "spare", root / "parked")


@dataclass(frozen=True, slots=True)
class Workspace:
    """The daemon's folder for attempts."""

    root: Path

    def create(self) -> None:
        for name in ("attempts", "spare", "parked"):
            (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def attempt(self, attempt_id: AttemptId) -> AttemptFolder:
        return _folder(self.root, attempt_id)

    def attempts(self) -> list[AttemptFolder]:
        folder = self.root / "attempts"
        if not folder.is_dir():
            return []
        return [AttemptFolder(path, self.root / "spare") for path in sorted(folder.iterdir()) if path.is_dir()]

    def park(self) -> AttemptFolder:
        """A folder for the next attempt, for which something may be made ready."""
        folder = AttemptFolder(self.root / "parked" / str(AttemptId.new()), self.root / "spare")
        folder.create()
        return folder

    def unpark_all(self) -> None:
        """What a daemon before this one had parked."""
        shutil.rmtree(self.root / "parked", ignore_errors=True)
        self.create()
