"""An attempt's folder on this machine: where the job's files, results and log lie, and how they go away again."""

import asyncio
import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dantegpu.domain.ids import AttemptId


class ResultsTooLarge(Exception):
    """The job left more files or bytes in its output folder than are uploaded."""


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """`attempts/<id>/`, 0700: only `work`, `output` and the log's descriptor are ever seen by the job."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def log(self) -> Path:
        return self.root / "output.log"

    @property
    def started(self) -> Path:
        """Made by the shim, exclusively, before anything runs: "pid starttime"."""
        return self.root / "started"

    @property
    def exit(self) -> Path:
        return self.root / "exit"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
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

    def read_handle(self) -> str | None:
        """None while nothing was prepared."""
        try:
            return self.handle.read_text() or None
        except FileNotFoundError:
            return None

    def write_handle(self, text: str) -> None:
        """Whole or not at all, also when the daemon is killed at this moment."""
        fresh = f"{self.root}/handle.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        os.rename(fresh, f"{self.root}/handle.json")

    def forget_handle(self) -> None:
        """First of all when it goes away: whoever finds a handle takes what it names for the attempt's own."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.root}/handle.json")

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

    async def removed(self) -> None:
        """`remove`, in a thread when it may take long."""
        if not self._removed_empty():
            await asyncio.to_thread(self.remove)

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
            for name in ("output.log", "started", "exit", "stop", "handle.new", "resumed"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{root}/{name}")
            os.rmdir(root)
        except OSError:
            return False
        return True


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


@dataclass(frozen=True, slots=True)
class Workspace:
    """The daemon's folder for attempts."""

    root: Path

    def create(self) -> None:
        (self.root / "attempts").mkdir(mode=0o700, parents=True, exist_ok=True)

    def attempt(self, attempt_id: AttemptId) -> AttemptFolder:
        return AttemptFolder(self.root / "attempts" / str(attempt_id))

    def attempts(self) -> list[AttemptFolder]:
        folder = self.root / "attempts"
        return [AttemptFolder(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
