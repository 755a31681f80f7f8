"""Unpacking what strangers packed, and walking what strangers left."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from dantegpu.daemon.archive import ArchiveRefused, unpack
from dantegpu.daemon.workspace import AttemptFolder, ResultsTooLarge, open_output, output_files

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
