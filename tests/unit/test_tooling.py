"""./dante in a clone of its own: set-up, warm starts, and every odd way to be called.

The clone has empty lock files and a main module that prints how it was called, so nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dantegpu.apps import testing

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK_FILES = ("uv.txt", "base.txt", "platform.txt", "all.txt")
MAIN = """import json, os, sys
print(json.dumps({"module": __spec__.name, "arguments": sys.argv[1:], "cwd": os.getcwd()}))
"""
WARM_START_SECONDS = 0.5


class Clone:
    """A folder that looks like a fresh clone to ./dante, which it starts without a HOME."""

    def __init__(self, folder: Path, *, bin_folder: Path, pyenv_root: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": str(bin_folder), "PYENV_ROOT": str(pyenv_root), "LC_ALL": "C"}
        for name in ("dante", "scripts/setup_venv.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
        for name in LOCK_FILES:
            self.write(f"requirements/{name}", "# nothing\n")
        self.write("src/dantegpu/__init__.py", "")
        self.write("src/dantegpu/apps/main.py", MAIN)
        self.write("src/dantegpu/apps/testing.py", MAIN)

    def write(self, name: str, text: str) -> None:
        """Put a file into the clone."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def start(self, *arguments: str, cwd: Path | None = None, program: Path | None = None) -> subprocess.Popen[str]:
        """Start ./dante and do not wait."""
        return subprocess.Popen(
            [program or self.folder / "dante", *arguments],
            cwd=cwd or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, cwd: Path | None = None, program: Path | None = None) -> tuple[int, str, str]:
        """Run ./dante to its end: (status, stdout, stderr)."""
        process = self.start(*arguments, cwd=cwd, program=program)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def bin_without_python(folder: Path) -> Path:
    """A PATH with the few tools that the script may use, and a pyenv shim that starts nothing."""
    folder.mkdir()
    for tool in ("sh", "dirname", "readlink", "cmp", "sort", "id", "cut", "getent"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    for name in ("python3.13", "python3.12", "python3"):
        (folder / name).write_text("#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def pyenv_with_this_python(folder: Path) -> Path:
    """Version folders as pyenv makes them: this interpreter, and an entry that does not run."""
    versions = folder / "versions"
    (versions / "3.99.0" / "bin").mkdir(parents=True)
    (versions / "3.13.0").symlink_to(sys.base_prefix)
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, str]:
    """A clone after its first start, and what that start said on stderr."""
    folder = tmp_path_factory.mktemp("set up")
    clone = Clone(
        folder / "a clone",
        bin_folder=bin_without_python(folder / "bin"),
        pyenv_root=pyenv_with_this_python(folder / "pyenv"),
    )
    status, out, err = clone.run("first")
    assert status == 0, err
    assert json.loads(out)["arguments"] == ["first"]
    return clone, err


def test_the_first_start_passes_over_a_dead_shim_and_says_what_it_does(ready: tuple[Clone, str]):
    clone, said = ready
    lines = said.splitlines()
    assert all(line.startswith("dante: ") for line in lines)
    assert "first start" in lines[0]
    assert re.fullmatch(r"dante: set-up done in \d+ s", lines[-1])
    assert (clone.folder / ".venv" / "bin" / "python").exists()


def test_a_second_start_says_nothing_and_is_quick(ready: tuple[Clone, str]):
    clone, _ = ready
    durations: list[float] = []
    for _ in range(3):
        started = time.monotonic()
        status, _, err = clone.run("--help")
        durations.append(time.monotonic() - started)
        assert (status, err) == (0, "")
    assert min(durations) < WARM_START_SECONDS


def test_arguments_arrive_as_they_were_given(ready: tuple[Clone, str]):
    clone, _ = ready
    arguments = ["run", "--", "echo", "a b", "", "$HOME", "*", 'quo"te', "new\nline"]
    _, out, _ = clone.run(*arguments)
    assert json.loads(out)["arguments"] == arguments


def test_it_runs_in_the_callers_folder_even_through_links_to_links(ready: tuple[Clone, str], tmp_path: Path):
    clone, _ = ready
    (tmp_path / "far away").mkdir()
    (tmp_path / "far away" / "absolute").symlink_to(clone.folder / "dante")
    (tmp_path / "relative").symlink_to("far away/absolute")
    status, out, err = clone.run("x", cwd=tmp_path, program=tmp_path / "relative")
    assert (status, err) == (0, "")
    assert json.loads(out)["cwd"] == str(tmp_path)


def test_a_file_in_the_callers_folder_does_not_shadow_a_module(ready: tuple[Clone, str], tmp_path: Path):
    clone, _ = ready
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')\n", encoding="utf-8")
    status, _, err = clone.run("x", cwd=tmp_path)
    assert (status, err) == (0, "")


def test_dante_test_starts_the_suite_with_the_development_tools(ready: tuple[Clone, str]):
    clone, _ = ready
    status, out, err = clone.run("test", "-k", "ledger")
    assert status == 0, err
    assert json.loads(out) == {
        "module": "dantegpu.apps.testing",
        "arguments": ["-k", "ledger"],
        "cwd": str(clone.folder),
    }
    assert clone.run("test") == (0, clone.run("test")[1], "")


def test_a_changed_lock_file_renews_the_environment_once(ready: tuple[Clone, str]):
    clone, _ = ready
    clone.write("requirements/platform.txt", "# another nothing\n")
    clone.write("requirements/all.txt", "# another nothing\n")
    assert "have changed" in clone.run("x")[2]
    assert clone.run("x")[2] == ""


def test_an_environment_whose_python_was_removed_is_made_anew(ready: tuple[Clone, str]):
    clone, _ = ready
    link = clone.folder / ".venv" / "bin" / "python"
    link.unlink()
    link.symlink_to(clone.folder / "no such python")
    status, _, err = clone.run("x")
    assert status == 0
    assert "first start" in err


def test_two_first_starts_at_once_set_up_once_and_both_run(tmp_path: Path):
    clone = Clone(
        tmp_path / "clone",
        bin_folder=bin_without_python(tmp_path / "bin"),
        pyenv_root=pyenv_with_this_python(tmp_path / "pyenv"),
    )
    both = [clone.start("one"), clone.start("two")]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert [json.loads(out)["arguments"] for out, _ in ends] == [["one"], ["two"]]
    assert sum("first start" in err for _, err in ends) == 1


def test_without_any_python_it_says_where_to_get_one(tmp_path: Path):
    clone = Clone(tmp_path / "clone", bin_folder=bin_without_python(tmp_path / "bin"), pyenv_root=tmp_path / "none")
    clone.environment["HOME"] = str(tmp_path)
    status, out, err = clone.run("x")
    assert (status, out) == (1, "")
    assert "needs Python 3.12 or newer" in err
    assert "apt-get install python3" in err
    assert not (clone.folder / ".venv").exists()


def test_ci_installs_every_server_that_the_tests_may_need():
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    listed = set(re.findall(r"^    ([\w-]+)=([\w.-]+)$", script, re.MULTILINE))
    assert listed == {(server.command, server.debian_package) for server in testing.OPTIONAL_SERVERS.values()}


def test_a_missing_server_fails_the_suite_only_where_all_are_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(testing.REQUIRE_ALL_VARIABLE, "1")
    assert testing.main(["--version"]) == 2
    assert "bubblewrap is missing, required here" in capsys.readouterr().err
    monkeypatch.setenv(testing.REQUIRE_ALL_VARIABLE, "0")
    assert testing.main(["--version"]) == 0
    assert "bubblewrap is missing, left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "spread"), [([], True), (["-k", "x"], True), (["-n0"], False), (["--pdb"], False)]
)
def test_the_suite_uses_all_cores_unless_told_otherwise(arguments: list[str], spread: bool):
    command = testing.pytest_command(arguments)
    assert ("worksteal" in command) is spread
    assert command[len(command) - len(arguments) :] == arguments


def test_the_environment_of_the_suite_can_import_the_package_from_anywhere():
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import dantegpu; print(dantegpu.__version__)"],
        cwd="/",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", done.stdout.strip())
