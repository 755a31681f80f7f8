"""Packing the working directory."""

import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from dantegpu.cli import packing
from dantegpu.cli.packing import Member, Packed, PackingProblem, list_members, pack


def a_project(root: Path, **files: str) -> Path:
    """A folder with these files; `__` in a name stands for `/`, `_dot_` for a leading dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def packed(root: Path) -> tuple[Packed, bytes]:
    target = root.parent / f"{root.name}.tar.gz"
    with target.open("wb") as file:
        result = pack(root, file)
    return result, target.read_bytes()


def names(root: Path) -> list[str]:
    return [member.path for member in list_members(root)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def test_files_and_folders_go_in_sorted_with_their_content(project: Path):
    a_project(project, train_py="x = 1", data__b="b", data__a="a")
    result, content = packed(project)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["data", "data/a", "data/b", "train.py"]
        file = tar.extractfile("train.py")
        assert file is not None
        assert file.read() == b"x = 1"
    assert (result.files, result.content_bytes) == (3, 7)
    assert result.sha256 == hashlib.sha256(content).hexdigest()
    assert result.size_bytes == len(content)


def test_the_same_content_gives_the_same_bytes_whatever_the_clock_and_the_umask(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for number, folder in enumerate((first, second)):
        folder.mkdir()
        a_project(folder, train_py="x = 1", data__a="a")
        (folder / "train.py").chmod(0o640 if number else 0o664)
        os.utime(folder / "data" / "a", (number, number))
    assert packed(first)[0].sha256 == packed(second)[0].sha256


def test_an_executable_file_stays_executable(project: Path):
    a_project(project, start="#!/bin/sh", plain="")
    (project / "start").chmod(0o700)
    with tarfile.open(fileobj=io.BytesIO(packed(project)[1])) as tar:
        assert {info.name: oct(info.mode) for info in tar} == {"start": "0o755", "plain": "0o644"}


def test_what_gitignore_names_stays_at_home_and_danteignore_has_the_last_word(project: Path):
    a_project(
        project,
        _dot_gitignore="*.bin\n/venv/\n!keep.bin\n",
        _dot_danteignore="secret.txt\n!needed.bin\n",
        train_py="",
        model="",
        secret="",
        venv__lib="",
    )
    for name in ("a.bin", "keep.bin", "needed.bin", "secret.txt"):
        (project / name).touch()
    assert names(project) == [
        ".danteignore", ".gitignore", "keep.bin", "model", "needed.bin", "secret", "train.py",
    ]  # fmt: skip


def test_an_ignore_file_in_a_folder_holds_below_it_only(project: Path):
    a_project(project, inner___dot_gitignore="*.log", inner__a="", b="")
    (project / "inner" / ".gitignore").write_text("*.log")
    (project / "inner" / "x.log").touch()
    (project / "x.log").touch()
    assert "x.log" in names(project)
    assert "inner/x.log" not in names(project)


def test_the_ignore_file_of_the_repository_above_holds_too(project: Path):
    a_project(project, _dot_gitignore="*.ckpt", work__train_py="")
    (project / ".git").mkdir()
    (project / "work" / "big.ckpt").touch()
    assert names(project / "work") == ["train.py"]


def test_a_folder_that_the_repository_ignores_is_sent_when_it_is_the_working_directory(project: Path):
    a_project(project, _dot_gitignore="build/", build__out="")
    (project / ".git").mkdir()
    assert names(project / "build") == ["out"]


def test_the_git_folder_never_goes_in(project: Path):
    a_project(project, a="")
    (project / ".git").mkdir()
    (project / ".git" / "config").touch()
    assert names(project) == ["a"]


def test_a_relative_link_that_stays_inside_is_sent_as_a_link(project: Path):
    a_project(project, data__a="")
    (project / "data" / "b").symlink_to("a")
    (project / "alias").symlink_to("data/../data")
    with tarfile.open(fileobj=io.BytesIO(packed(project)[1])) as tar:
        assert {info.name: info.linkname for info in tar if info.issym()} == {"data/b": "a", "alias": "data/../data"}


@pytest.mark.parametrize("goal", ["/etc/passwd", "../outside", "data/../../outside"])
def test_a_link_that_leads_out_is_refused_by_name(project: Path, goal: str):
    (project / "leak").symlink_to(goal)
    with pytest.raises(PackingProblem, match="leak links"):
        list_members(project)


def test_an_ignored_link_that_leads_out_does_no_harm(project: Path):
    a_project(project, _dot_danteignore="leak")
    (project / "leak").symlink_to("/etc")
    assert names(project) == [".danteignore"]


def test_a_named_pipe_and_a_socket_are_refused_by_name(project: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(project / "pipe")
    with pytest.raises(PackingProblem, match="pipe is a named pipe"):
        list_members(project)
    (project / "pipe").unlink()
    monkeypatch.chdir(project)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(PackingProblem, match="socket is a socket"):
            list_members(project)


def test_too_much_is_refused_with_the_largest_files_by_name(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "MAX_TOTAL_BYTES", 1000)
    a_project(project, small="x", data__large="x" * 900, larger="x" * 950)
    with pytest.raises(PackingProblem) as caught:
        list_members(project)
    lines = caught.value.message.splitlines()
    assert lines[1].split() == ["950B", "larger"]
    assert lines[2].split() == ["900B", "data/large"]
    assert ".danteignore" in lines[-1]


def test_too_many_files_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "MAX_ENTRIES", 2)
    a_project(project, a="", b="", c="")
    with pytest.raises(PackingProblem, match="more than 2 files"):
        list_members(project)


@pytest.mark.parametrize("folder", ["home", "root"])
def test_nobody_sends_their_home_or_the_whole_disk_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PackingProblem, match="as a whole"):
        list_members(tmp_path if folder == "home" else Path("/"))


def test_a_file_that_shrinks_while_it_is_read_is_told(project: Path, monkeypatch: pytest.MonkeyPatch):
    a_project(project, growing="x" * 100)
    members = list_members(project)
    (project / "growing").write_text("short")

    def as_listed_before(root: Path) -> list[Member]:
        assert root == project
        return members

    monkeypatch.setattr(packing, "list_members", as_listed_before)
    with pytest.raises(PackingProblem, match="growing changed while it was read"):
        packed(project)
