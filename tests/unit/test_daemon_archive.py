"""Unpacking what strangers packed, and walking what strangers left."""

import fcntl
import io
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dantegpu.daemon.archive import ArchiveRefused, unpack
from dantegpu.daemon.workspace import (
    MARK_BYTES,
    SPARE_STARTED,
    SPARES_MAX,
    AttemptFolder,
    ResultsTooLarge,
    Workspace,
    open_output,
    output_files,
)
from dantegpu.domain.ids import AttemptId

LIMIT_BYTES = 1 << 20


def member(name: str, kind: bytes = tarfile.REGTYPE, *, content: bytes = b"", link: str = "", mode: int = 0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(content)
    return info, content


def unpack_members(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    archive, target = folder / "a.tar.gz", folder / "in" / "side"
    target.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    unpack(archive, target, max_bytes=LIMIT_BYTES)
    return target


def test_files_folders_and_inner_links_arrive(tmp_path: Path):
    target = unpack_members(
        tmp_path,
        member("./", tarfile.DIRTYPE),
        member("src/train.py", content=b"print()", mode=0o4755),
        member("data", tarfile.DIRTYPE),
        member("src/link", tarfile.SYMTYPE, link="../data"),
    )
    assert (target / "src/train.py").read_bytes() == b"print()"
    assert (target / "src/train.py").stat().st_mode & 0o7777 == 0o755
    assert (target / "data").is_dir()
    assert os.readlink(target / "src/link") == "../data"


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([member("../evil", content=b"x")], "leads out"),
        ([member("a/../../evil", content=b"x")], "leads out"),
        ([member("/etc/evil", content=b"x")], "absolute"),
        ([member("link", tarfile.SYMTYPE, link="/etc")], "absolute"),
        ([member("link", tarfile.SYMTYPE, link="..")], "links out"),
        ([member("a/link", tarfile.SYMTYPE, link="../../evil")], "links out"),
        ([member("d", tarfile.DIRTYPE), member("l", tarfile.SYMTYPE, link="d"), member("l/x", content=b"x")], "link"),
        ([member("l", tarfile.SYMTYPE, link="x"), member("l", content=b"x")], "twice"),
        ([member("hard", tarfile.LNKTYPE, link="../../../etc/passwd")], "neither"),
        ([member("sda", tarfile.BLKTYPE)], "neither"),
        ([member("pipe", tarfile.FIFOTYPE)], "neither"),
        ([member("big", content=bytes(LIMIT_BYTES + 1))], "larger"),
        ([member("/".join("d" * 70), content=b"x")], "deep"),
    ],
)
def test_what_would_escape_or_overflow_is_refused(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], why: str
):
    with pytest.raises(ArchiveRefused, match=why):
        unpack_members(tmp_path, *members)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["side"]


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b\x08\x00garbage"])
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(ArchiveRefused, match="damaged"):
        unpack(archive, tmp_path, max_bytes=LIMIT_BYTES)


def test_only_regular_files_are_results(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model.bin").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    found = output_files(tmp_path, max_files=10, max_bytes=100)
    assert [(file.path, file.size_bytes) for file in found] == [("sub/model.bin", 3)]


def test_too_many_or_too_large_results_are_an_error(tmp_path: Path):
    for number in range(3):
        (tmp_path / str(number)).write_bytes(b"abc")
    with pytest.raises(ResultsTooLarge, match="2 files"):
        output_files(tmp_path, max_files=2, max_bytes=100)
    with pytest.raises(ResultsTooLarge, match="8 bytes"):
        output_files(tmp_path, max_files=10, max_bytes=8)


@pytest.mark.parametrize("path", ["link", "folder/passwd", "../secret", "/etc/passwd", "sub//x", ""])
def test_a_result_is_never_opened_through_a_link_or_outside(tmp_path: Path, path: str):
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "secret").write_text("x")
    (output / "link").symlink_to("/etc/passwd")
    (output / "folder").symlink_to("/etc")
    with pytest.raises((OSError, ValueError)):
        os.close(open_output(output, path))


def test_a_folder_is_removed_even_when_the_job_closed_it(tmp_path: Path):
    folder = AttemptFolder(tmp_path / "att")
    folder.create()
    (folder.work / "a/b").mkdir(parents=True)
    (folder.work / "a/b/c").touch()
    (folder.work / "out").symlink_to("/etc")
    (folder.work / "a/b").chmod(0)
    (folder.work / "a").chmod(0)
    folder.remove()
    folder.remove()
    assert not folder.root.exists()
    assert Path("/etc/passwd").exists()


async def test_the_folder_of_a_job_that_left_nothing_is_the_next_ones_and_looks_new(tmp_path: Path):
    workspace = Workspace(tmp_path)
    workspace.create()
    first = workspace.attempt(AttemptId.new())
    assert first.create()
    first.write_handle("a long handle")
    first.started.write_text("12 34".ljust(MARK_BYTES - 1) + "\n")
    first.exit.write_text("0              \n")
    first.stop.write_text("requested")
    first.log.write_text("secret")
    inode = first.work.stat().st_ino
    await first.removed(used_again=True)
    assert workspace.attempts() == []
    second = workspace.attempt(AttemptId.new())
    assert second.create()
    assert second.work.stat().st_ino == inode
    assert second.log.read_text() == ""
    assert second.read_handle() is None
    assert not any(path.exists() for path in (second.started, second.exit, second.stop))
    assert not (second.root / SPARE_STARTED).read_text().strip()
    second.write_handle("short")
    assert second.read_handle() == "short"


def leave_many_names(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number:0200}").touch()
    for path in folder.iterdir():
        path.unlink()


def leave_a_flag(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    flags = int.from_bytes(fcntl.ioctl(descriptor, 0x80086601, bytes(8))[:4], sys.byteorder)
    fcntl.ioctl(descriptor, 0x40086602, (flags | 0x40).to_bytes(8, sys.byteorder))  # nodump
    os.close(descriptor)


LEFT: list[Callable[[Path], object]] = [
    lambda folder: (folder / "file").touch(),
    lambda folder: (folder / "folder").mkdir(),
    lambda folder: (folder / "link").symlink_to("/"),
    lambda folder: folder.chmod(0o777),
    lambda folder: os.setxattr(folder, "user.note", b"x"),
    leave_many_names,
    leave_a_flag,
]


@pytest.mark.parametrize("leave", LEFT)
@pytest.mark.parametrize("name", ["work", "output"])
async def test_a_folder_on_which_a_job_left_anything_is_nobody_elses(
    tmp_path: Path, name: str, leave: Callable[[Path], object]
):
    workspace = Workspace(tmp_path)
    workspace.create()
    folder = workspace.attempt(AttemptId.new())
    folder.create()
    leave(folder.root / name)
    await folder.removed(used_again=True)
    assert not folder.root.exists()
    assert list((tmp_path / "spare").iterdir()) == []


async def test_no_more_folders_are_kept_than_a_busy_time_needs(tmp_path: Path):
    workspace = Workspace(tmp_path)
    workspace.create()
    folders = [workspace.attempt(AttemptId.new()) for _ in range(SPARES_MAX + 1)]
    for folder in folders:
        folder.create()
    for folder in folders:
        await folder.removed(used_again=True)
    assert len(list((tmp_path / "spare").iterdir())) == SPARES_MAX
    assert workspace.attempts() == []
