"""Resolve pyproject.toml into the lock files under requirements/.

    python scripts/lock.py               keep what is locked, add and drop what pyproject.toml asks for
    python scripts/lock.py --upgrade     take the newest versions (or --upgrade-package NAME, repeatable)

Needs `uv` beside the interpreter or on PATH (the `dev` extra brings it). Each file holds exact versions with the
hashes of every wheel and source archive, for all Python versions and systems that pyproject.toml allows:

    uv.txt         the installer that ./dante bootstraps
    base.txt       SDK, command line and provider daemon
    platform.txt   base, the services and the embedded servers: what ./dante installs
    all.txt        platform and the development tools: what `./dante test` installs
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "requirements"
HEADER = "# Locked by scripts/lock.py from pyproject.toml; do not edit.\n"
# The widest set first: it pins the versions that the narrower ones then must use.
EXTRAS_BY_FILE = {"all.txt": ["dev"], "platform.txt": ["server", "embedded", "otlp"], "base.txt": []}


def uv_path() -> str:
    """Where uv is; exits with advice when it is nowhere."""
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        sys.exit("lock: no uv found; run `./dante test` once, it installs it into .venv")
    return found


def compile_lock(source: str, output: str, arguments: list[str], *, stdin: str | None = None) -> None:
    """Resolve `source` into requirements/`output`, with hashes and without any address or machine's path."""
    target = REQUIREMENTS / output
    command = [uv_path(), "pip", "compile", source, "--output-file", f"requirements/{output}", "--quiet"]
    command += ["--universal", "--python-version", "3.12", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, input=stdin, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"lock: uv could not resolve {output}")
    target.write_text(HEADER + target.read_text(encoding="utf-8").removeprefix(HEADER), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write all lock files; uv's own message is the report of a failure."""
    parser = argparse.ArgumentParser(description="Resolve pyproject.toml into the files under requirements/.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions of everything")
    parser.add_argument("--upgrade-package", action="append", default=[], metavar="NAME")
    options = parser.parse_args(arguments)
    upgrades = ["--upgrade"] if options.upgrade else [f"--upgrade-package={name}" for name in options.upgrade_package]
    REQUIREMENTS.mkdir(exist_ok=True)
    widest, *narrower = EXTRAS_BY_FILE
    extras = [f"--extra={name}" for name in EXTRAS_BY_FILE[widest]]
    compile_lock("pyproject.toml", widest, [*extras, *upgrades])
    for output in narrower:
        # From scratch under the widest file's versions, so that one environment can grow into the other.
        (REQUIREMENTS / output).unlink(missing_ok=True)
        extras = [f"--extra={name}" for name in EXTRAS_BY_FILE[output]]
        compile_lock("pyproject.toml", output, [*extras, f"--constraint=requirements/{widest}"])
    (REQUIREMENTS / "uv.txt").unlink(missing_ok=True)
    compile_lock("-", "uv.txt", [f"--constraint=requirements/{widest}"], stdin="uv\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
