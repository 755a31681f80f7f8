"""`dante test`: the whole suite, static checks included, from a clone.

The checks of the house (ruff, pyright, import rules, generated code, lock files) are tests like any other, in
tests/unit/test_house.py, so they run beside the rest. Arguments are pytest's: `dante test tests/unit -k ledger`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

REPOSITORY = Path(__file__).resolve().parents[3]
REQUIRE_ALL_VARIABLE = "DANTE_TEST_REQUIRE_ALL"


@dataclass(frozen=True, slots=True)
class OptionalServer:
    """A program that some tests need and that no Python wheel brings.

    Tests that need it carry `@pytest.mark.needs("NAME")` and are left out where `command` is not on PATH.
    """

    command: str
    debian_package: str
    purpose: str


# .ci/run installs these; add a line here when a test starts to need another program.
OPTIONAL_SERVERS: Mapping[str, OptionalServer] = {
    "bubblewrap": OptionalServer("bwrap", "bubblewrap", "jobs in the sandbox"),
    "busybox": OptionalServer("busybox", "busybox-static", "images for jobs in containers"),
    "docker": OptionalServer("dockerd", "docker.io", "jobs in Docker's containers"),
    "podman": OptionalServer("podman", "podman", "jobs in Podman's containers"),
    "slurm": OptionalServer("slurmctld", "slurm-wlm", "jobs of a cluster (brings munge)"),
    "nft": OptionalServer("nft", "nftables", "the filter of jobs' networks"),
    "ip": OptionalServer("ip", "iproute2", "network namespaces around container engines"),
    "cc": OptionalServer("cc", "build-essential", "GPU discovery, on a library that the tests build"),
}


def missing_servers() -> list[str]:
    """Names of the optional servers that this machine lacks."""
    return [name for name, server in OPTIONAL_SERVERS.items() if shutil.which(server.command) is None]


def everything_is_required() -> bool:
    """Whether a missing server fails the run (as in CI) instead of leaving its tests out."""
    return os.environ.get(REQUIRE_ALL_VARIABLE, "") not in ("", "0")


def pytest_command(arguments: list[str]) -> list[str]:
    """pytest in this interpreter, one worker more than cores unless the caller says otherwise: tests also wait."""
    command = [sys.executable, "-P", "-m", "pytest"]
    chose_workers = any(argument.startswith(("-n", "--numprocesses", "--pdb", "--dist")) for argument in arguments)
    if not chose_workers:
        command += ["-n", str(1 + max(2, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    return [*command, *arguments]


def main(arguments: list[str]) -> int:
    """Run the suite; returns pytest's status, or 2 when the clone or the environment is not fit for it."""
    if not (REPOSITORY / "tests").is_dir():
        print("dante test: there is no tests/ folder here; the suite runs from a clone", file=sys.stderr)
        return 2
    if importlib.util.find_spec("pytest") is None:
        print("dante test: the development tools are missing; start it as ./dante test", file=sys.stderr)
        return 2
    missing = missing_servers()
    for name in missing:
        server = OPTIONAL_SERVERS[name]
        verdict = "required here" if everything_is_required() else f"left out: {server.purpose}"
        print(f"dante test: {name} is missing, {verdict} (apt-get install {server.debian_package})", file=sys.stderr)
    if missing and everything_is_required():
        return 2
    return subprocess.run(pytest_command(arguments), cwd=REPOSITORY, check=False).returncode


@click.command("test", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Run the whole test suite of this clone; arguments are pytest's."""
    raise SystemExit(main(list(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
