"""The rules of the house, checked like any behaviour: style, types, imports, generated code, lock files, sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "dantegpu"
GENERATED = PACKAGE / "contracts" / "gen"
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
DOMAIN_MAY_IMPORT = sys.stdlib_module_names | {"numpy"}
# Written in two halves so that this file does not find itself.
UNFINISHED_MARKS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.\"'-])/(?:work/main|work/shared|ro" + r"ot/|home/\w+/)")


def run_tool(*arguments: str) -> None:
    """Run a Python tool in the repository; its output is the failure's message."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"


def tracked_files(*suffixes: str) -> list[Path]:
    """Files of the repository, also new ones that are not ignored; generated code is left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [REPOSITORY / name for name in listed.split("\0") if name]
    return [
        path
        for path in paths
        if path.is_file() and GENERATED not in path.parents and (not suffixes or path.suffix in suffixes)
    ]


def python_trees() -> Iterator[tuple[Path, ast.Module]]:
    """Each hand-written Python file with its syntax tree."""
    for path in tracked_files(".py"):
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def locked_versions(name: str) -> dict[str, str]:
    """Package -> version in a file under requirements/."""
    text = (REPOSITORY / "requirements" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9-]*)==([^\s;]+)", text, re.MULTILINE))


def test_types_are_complete():
    run_tool("-m", "basedpyright")


def test_the_linter_finds_nothing():
    run_tool("-m", "ruff", "check", "--no-cache")


def test_every_file_is_formatted():
    run_tool("-m", "ruff", "format", "--check", "--no-cache")


def test_imports_point_one_way():
    run_tool("-c", "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))")


def test_declared_and_imported_packages_agree():
    run_tool("-m", "deptry", ".")


def test_the_generated_code_is_what_the_protos_say():
    run_tool("scripts/gen_proto.py", "--check")


def test_the_domain_imports_the_standard_library_and_numpy_only():
    foreign: list[str] = []
    for path in sorted((PACKAGE / "domain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            foreign += [
                f"{relative(path)}:{node.lineno} imports {name}"
                for name in names
                if name.split(".")[0] not in DOMAIN_MAY_IMPORT and not name.startswith("dantegpu.domain")
            ]
    assert foreign == []


def test_no_file_is_longer_than_600_lines():
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in tracked_files(".py", ".sql")}
    assert {name: lines for name, lines in long.items() if lines > FILE_LINES_MAX} == {}


def test_no_function_is_longer_than_70_lines():
    long = [
        f"{relative(path)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path, tree in python_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_every_module_and_every_public_class_of_its_own_says_what_it_is_for():
    """Classes with a base (errors, ids, settings, servicers) are explained by it, rows of a store by their table."""
    silent: list[str] = []
    for path, tree in python_trees():
        if PACKAGE not in path.parents:
            continue
        # An empty __init__.py has nothing to explain.
        if tree.body and ast.get_docstring(tree) is None:
            silent.append(relative(path))
        silent += [
            f"{relative(path)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            and not (node.name.startswith("_") or node.bases or path.name == "store.py")
            and ast.get_docstring(node) is None
        ]
    assert silent == []


def test_nothing_is_marked_unfinished_and_no_path_of_one_machine_is_written_down():
    found: list[str] = []
    for path in tracked_files():
        if path.suffix in {".gz", ".png", ".ico", ".woff2"} or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if UNFINISHED_MARKS.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{relative(path)}:{number} {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize("name", ["uv.txt", "base.txt", "platform.txt", "all.txt"])
def test_each_locked_package_has_hashes_and_no_lock_file_names_an_address(name: str):
    text = (REPOSITORY / "requirements" / name).read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#")]
    assert entries
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|--index|--find-links| @ ", text)


def test_the_lock_files_satisfy_pyproject():
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    base: list[str] = project["dependencies"]
    wanted = {
        "base.txt": base,
        "platform.txt": [*base, *extras["server"], *extras["embedded"], *extras["otlp"]],
        "all.txt": [*base, *(requirement for extra in extras.values() for requirement in extra)],
    }
    unmet: list[str] = []
    for file_name, requirements in wanted.items():
        versions = locked_versions(file_name)
        for requirement in map(Requirement, requirements):
            name = canonicalize_name(requirement.name)
            if name != "dantegpu" and not (name in versions and requirement.specifier.contains(versions[name])):
                unmet.append(f"{file_name}: {requirement}; run scripts/lock.py")
    assert unmet == []


def test_the_lock_files_agree_on_every_version():
    everything = locked_versions("all.txt")
    for name in ("base.txt", "platform.txt", "uv.txt"):
        assert locked_versions(name).items() <= everything.items()
