"""A job's checkpoint: one archive of what lies at its path.

It is uploaded when the job has to stop and, where it asks for that, every so often; it is put in place again before the
next attempt starts elsewhere. What lies in the work folder is the job's: no link is followed, and only regular files,
folders and links that stay inside are taken along.
"""

import asyncio
import contextlib
import os
import shutil
import stat
import tarfile
from pathlib import Path
from typing import IO

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.archive import MAX_MEMBERS, unpack
from dantegpu.daemon.results import Urls
from dantegpu.daemon.transfer import Transfers, hash_files
from dantegpu.daemon.workspace import AttemptFolder, OutputFile, open_output

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class CheckpointFailed(Exception):
    """The checkpoint could not be kept; the message says why."""


class Checkpoints:
    """The checkpoints of one attempt."""

    def __init__(self, folder: AttemptFolder, transfers: Transfers, urls: Urls) -> None:
        self._folder = folder
        self._transfers = transfers
        self._urls = urls
        self._number = 0

    async def save(self, path: str, after_number: int, max_bytes: int) -> machine_pb2.Saved:
        """Upload what lies at `path` now. Raises CheckpointFailed, TransferFailed."""
        self._number = number = max(self._number, after_number) + 1
        # A name of its own: a thread that nobody waits for any more may still be writing the one before.
        archive = self._folder.root / f"checkpoint-{number}.tar.gz"
        try:
            if not await asyncio.to_thread(pack, self._folder.work, path, archive, max_bytes):
                return machine_pb2.Saved(number=number)
            packed = [OutputFile(archive.name, archive.stat().st_size)]
            (hashed,) = await asyncio.to_thread(hash_files, archive.parent, packed)
            saved = machine_pb2.Saved(sha256=hashed.sha256, size_bytes=hashed.file.size_bytes, number=number)
            reply = await self._urls(machine_pb2.UrlsRequest(checkpoint=saved))
            await self._transfers.send(archive.parent, [hashed], [reply.checkpoint_url])
            saved.slot = reply.checkpoint_slot
            return saved
        finally:
            archive.unlink(missing_ok=True)

    async def restore(self, resume: machine_pb2.Resume, path: str, max_bytes: int) -> None:
        """Put an earlier attempt's checkpoint in place, unless it is there no more: then the job begins anew.

        Raises TransferFailed, ArchiveRefused.
        """
        reply = await self._urls(machine_pb2.UrlsRequest(resume=True))
        if not reply.resume_url:
            return
        archive = self._folder.checkpoint
        try:
            await self._transfers.fetch(
                reply.resume_url, archive, sha256=resume.sha256, size_bytes=resume.size_bytes, what="checkpoint"
            )
            await asyncio.to_thread(_replace, archive, self._folder.work, path, max_bytes)
        finally:
            archive.unlink(missing_ok=True)
        self._folder.resumed.write_text(str(resume.epoch))


def _replace(archive: Path, work: Path, path: str, max_bytes: int) -> None:
    """What came with the job's files at that path is older."""
    old = work / path
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            old.unlink()
    unpack(archive, work, max_bytes=max_bytes)


def pack(work: Path, path: str, archive: Path, max_bytes: int) -> bool:
    """Write what lies at `path` below `work` into a .tar.gz; False: nothing does. Blocking.

    Raises CheckpointFailed.
    """
    try:
        top = open_output(work, path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointFailed(f"{path} cannot be read: {error.strerror}") from error
    try:
        with archive.open("xb") as file:
            _write(top, path, file, max_bytes)
    except OSError as error:
        raise CheckpointFailed(f"{path} could not be packed: {error}") from error
    finally:
        os.close(top)
    return True


def _write(top: int, path: str, file: IO[bytes], max_bytes: int) -> None:
    # Not compressed: weights hardly are smaller then, and the job's devices wait meanwhile.
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=0) as tar:
        packer = _Packer(tar, max_bytes)
        if stat.S_ISDIR(os.fstat(top).st_mode):
            for folder, folders, names, descriptor in os.fwalk(".", dir_fd=top, follow_symlinks=False):
                inside = os.path.normpath(f"{path}/{folder}")
                packer.folder(inside)
                for name in (*names, *(each for each in folders if _is_link(each, descriptor))):
                    packer.add(f"{inside}/{name}", name, descriptor)
        else:
            packer.file(path, os.dup(top))


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


class _Packer:
    """Adds members to an archive within bounds."""

    def __init__(self, tar: tarfile.TarFile, max_bytes: int) -> None:
        self._tar = tar
        self._bytes_left = max_bytes
        self._members_left = MAX_MEMBERS

    def _member(self, name: str, size_bytes: int = 0) -> tarfile.TarInfo:
        self._bytes_left -= size_bytes
        self._members_left -= 1
        if self._bytes_left < 0 or self._members_left < 0:
            raise CheckpointFailed("the checkpoint is larger than what is kept of a job's results")
        info = tarfile.TarInfo(name)
        info.size = size_bytes
        return info

    def folder(self, path: str) -> None:
        info = self._member(path)
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        self._tar.addfile(info)

    def add(self, path: str, name: str, folder: int) -> None:
        """A file or a link; anything else is left out."""
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            self._link(path, os.readlink(name, dir_fd=folder))
        elif stat.S_ISREG(mode):
            self.file(path, os.open(name, _OPEN_FLAGS, dir_fd=folder))

    def file(self, path: str, descriptor: int) -> None:
        """Closes the descriptor."""
        with os.fdopen(descriptor, "rb") as opened:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                info = self._member(path, found.st_size)
                info.mode = 0o755 if found.st_mode & 0o100 else 0o644
                self._tar.addfile(info, opened)

    def _link(self, path: str, goal: str) -> None:
        if goal.startswith("/") or os.path.normpath(f"{os.path.dirname(path)}/{goal}").startswith(".."):
            return
        info = self._member(path)
        info.type, info.linkname = tarfile.SYMTYPE, goal
        self._tar.addfile(info)
