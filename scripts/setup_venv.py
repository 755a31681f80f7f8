"""Make or renew .venv from a lock file; ./dante calls this when the stamp in .venv is missing or old.

    PYTHON scripts/setup_venv.py platform|all

Standard library only, because it runs before anything is installed. Tells what it does on stderr in plain words.
Two set-ups at once are safe: the second waits for the first and then finds nothing left to do. The stamp, a copy
of the lock file, is written last, so a set-up that was cut off anywhere is simply done again.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "requirements"
VENV = REPOSITORY / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOCK_FILE = REPOSITORY / ".venv.lockfile"
# Narrow to wide; an environment that once was made wide stays so when the narrow lock file changes.
SETS = ("platform", "all")
APT_TIMEOUT_SECONDS = 300


class SetupError(Exception):
    """The environment could not be made; the message says why and what to do."""


def say(text: str) -> None:
    """One progress line; stdout belongs to the command that follows."""
    print(f"dante: {text}", file=sys.stderr, flush=True)


def lock_path(name: str) -> Path:
    """The lock file of a set, e.g. requirements/platform.txt."""
    return REQUIREMENTS / f"{name}.txt"


def stamp_path(name: str) -> Path:
    """The copy of the set's lock file that says what .venv was made from; ./dante compares the two."""
    return VENV / f"dante-{name}.stamp"


def is_current(name: str) -> bool:
    """Whether .venv runs and holds exactly what the lock file names."""
    stamp = stamp_path(name)
    return _runs(VENV_PYTHON) and stamp.is_file() and stamp.read_bytes() == lock_path(name).read_bytes()


def _runs(python: Path) -> bool:
    """False for an interpreter that is missing, or whose base installation was removed."""
    if not python.exists():
        return False
    command = [str(python), "-c", "import sys; sys.exit(sys.version_info < (3, 12))"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def only_one_at_a_time() -> Generator[None]:
    """Hold the set-up lock; it goes away with the process, so a killed set-up blocks nobody."""
    with LOCK_FILE.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this folder is running, waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def installer_environment() -> dict[str, str]:
    """The environment for pip and uv: uv is told of the index and the certificates that pip is set up with."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    environment.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    environment.setdefault("PIP_ROOT_USER_ACTION", "ignore")
    # Lines such as global.index-url='https://...' or :env:.cert='...'; the environment comes last, and wins.
    command = [str(VENV_PYTHON), "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout
    pairs = (line.partition("=") for line in listed.splitlines())
    settings = {key.rpartition(".")[2]: value.strip("'") for key, _, value in pairs}
    for pip_name, uv_name in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        if settings.get(pip_name):
            environment.setdefault(uv_name, settings[pip_name])
    return environment


def run(command: list[str], environment: dict[str, str], *, quiet: bool) -> bool:
    """Run an installer; False when it failed. With `quiet` its messages are dropped."""
    output = subprocess.DEVNULL if quiet else sys.stderr
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False)
    return done.returncode == 0


def install_packages(name: str) -> None:
    """Bring .venv to exactly the lock file's packages, by uv, or by pip where uv does not run."""
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "--no-input"]
    lock = str(lock_path(name))
    environment = installer_environment()
    uv = VENV / "bin" / "uv"
    if not uv.exists():
        run([*pip, "--only-binary=:all:", "-r", str(REQUIREMENTS / "uv.txt")], environment, quiet=True)
    if uv.exists():
        sync = [str(uv), "pip", "sync", "--python", str(VENV_PYTHON), "--require-hashes", "--allow-empty-requirements"]
        if not sys.stderr.isatty():
            sync.append("--quiet")
        if run([*sync, lock], environment, quiet=False):
            return
        say("uv could not install the packages (above), trying pip")
    if not run([*pip, "-r", lock], environment, quiet=False):
        raise SetupError(
            "the Python packages could not be installed (the reason is above).\n"
            "       Check the network, or set PIP_INDEX_URL to a package index that this machine reaches, "
            "and start again."
        )


def link_project() -> None:
    """Make `import dantegpu` find src/ without building anything; relative, so the folder may be moved."""
    site_packages = next((VENV / "lib").glob("python3.*/site-packages"))
    relative = os.path.relpath(REPOSITORY / "src", site_packages)
    (site_packages / "dantegpu.pth").write_text(relative + "\n", encoding="utf-8")


def make_venv(name: str) -> None:
    """Build or renew .venv for the set `name` and stamp it.

    Raises SetupError when the packages cannot be had.
    """
    started = time.monotonic()
    wide = SETS[-1]
    if name != wide and stamp_path(wide).exists():
        name = wide
    covered = SETS[: SETS.index(name) + 1]
    if _runs(VENV_PYTHON):
        say("the locked packages have changed, updating .venv")
    else:
        version = ".".join(map(str, sys.version_info[:3]))
        say(f"first start: setting up .venv with Python {version} (once, about a minute)")
        shutil.rmtree(VENV, ignore_errors=True)
        venv.EnvBuilder(with_pip=True, symlinks=True, clear=True).create(VENV)
    for stamp in map(stamp_path, SETS):
        stamp.unlink(missing_ok=True)
    install_packages(name)
    link_project()
    for each in covered:
        shutil.copyfile(lock_path(each), stamp_path(each))
    say(f"set-up done in {time.monotonic() - started:.0f} s")


def install_bubblewrap() -> None:
    """Install the sandbox where that needs no password; a failure is a note, since `dante doctor` tells the rest."""
    if shutil.which("bwrap") or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    say("installing bubblewrap, the sandbox that jobs run in (apt-get)")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "bubblewrap"]):
        try:
            done = subprocess.run(
                ["apt-get", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=environment,
                timeout=APT_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            say(f"apt-get {arguments[0]} took longer than {APT_TIMEOUT_SECONDS} s; going on without bubblewrap")
            return
        # A failed update is no reason to stop: the package lists at hand may do.
        if done.returncode != 0 and arguments[0] == "install":
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            say(f"bubblewrap was not installed ({reason}); `dante doctor` says what that means")


def main(arguments: list[str]) -> int:
    """Return 0 when .venv is ready."""
    if len(arguments) != 1 or arguments[0] not in SETS:
        print(f"usage: setup_venv.py {'|'.join(SETS)}", file=sys.stderr)
        return 2
    (name,) = arguments
    try:
        with only_one_at_a_time():
            if not is_current(name):
                make_venv(name)
                install_bubblewrap()
    except SetupError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"set-up failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("set-up interrupted; the next start does it again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
