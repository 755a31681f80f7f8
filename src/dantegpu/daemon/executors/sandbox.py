"""The bubblewrap sandbox: what a job sees of the machine, and as whom it runs.

As root, bubblewrap makes namespaces and mounts with root's rights, because the Python to show may lie below a 0700
home. At last it enters a user namespace that the cell made (`--userns2`), in which there is one user: uid 1000, who is
an unprivileged user of the attempt's own outside (`uid`). It keeps three capabilities there, with which setpriv becomes
that user. A job never runs as the host's uid 0, not even inside a user namespace: root's files and /proc/sys would be
its own. Nothing of the job's own may reach what runs before that, so its variables are set only afterwards.
An ordinary user's bubblewrap makes the user namespace itself.
"""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dantegpu.daemon.executors.base import AttemptSpec
from dantegpu.daemon.executors.cells import Launch

INSIDE_UID = 1000
ATTEMPT_VARIABLE = "DANTE_ATTEMPT_ID"
WORK = "/work"
OUTPUT = "/output"
HOSTNAME = "dante"
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
RELOCATED_PREFIX = "/opt/dante/venv"
GET_BUBBLEWRAP = "install it, for example with: apt-get install bubblewrap"
_READY, _LOG, _SECCOMP, _USER_NAMESPACE = 9, 8, 7, 6
_ARGUMENTS = 4

_MERGED = ("bin", "lib", "lib32", "lib64", "sbin")
# Copied from the host's /etc, once, into one folder that becomes the job's: one mount instead of a dozen is 2 ms.
_HOST_ETC = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl/certs", "ssl/openssl.cnf", "pki/ca-trust", "pki/tls/certs",
    "alternatives", "localtime", "timezone", "protocols", "services", "mime.types", "fonts", "OpenCL", "vulkan",
)  # fmt: skip
_NETWORK_ETC = ("resolv.conf", "hosts")
_MAX_ETC_FILE_BYTES = 16 << 20
_OWN_ETC = {
    "passwd": f"root:x:0:0:root:/:/usr/sbin/nologin\ndante:x:{INSIDE_UID}:{INSIDE_UID}:job:{WORK}:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "group": f"root:x:0:\ndante:x:{INSIDE_UID}:\nnogroup:x:65534:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "hostname": f"{HOSTNAME}\n",
    "hosts": f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost\n",
    "resolv.conf": "",
}
_MAX_SCRIPT_LENGTH = 16 << 10
"""Of one that is written to a shell that waits."""
_SHELLS_OWN = {"IFS", "LINENO", "OLDPWD", "OPTIND", "PPID", "PWD", "UID", "EUID", "SHELLOPTS", "BASHOPTS", "ENV"}
"""Variables that a shell refuses to set, or that change what it makes of the rest of its script. (And all of bash.)"""


@dataclass(frozen=True, slots=True)
class PythonRuntime:
    """The daemon's own Python, shown to jobs read-only: (folder on the host, folder in the sandbox)."""

    mounts: tuple[tuple[str, str], ...]
    search_path: str
    host_search_path: str
    """PATH of a job without a sandbox, for which nothing is mounted elsewhere."""
    problem: str = ""

    @classmethod
    def of_this_process(cls, hidden: Path) -> "PythonRuntime":
        """`hidden` is the daemon's data, which must not become visible with it."""
        mounts: list[tuple[str, str]] = []
        folders: list[str] = []
        for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
            if _is_below(prefix, "/usr"):
                continue
            if prefix in ("/", os.path.expanduser("~")) or _is_below(str(hidden), prefix):
                problem = f"the daemon's Python ({prefix}) cannot be shown without private data"
                return cls((), SEARCH_PATH, SEARCH_PATH, problem)
            # A mount point below the job's own folder would have to be made inside that folder.
            inside = RELOCATED_PREFIX if _is_below(prefix, WORK) or _is_below(prefix, OUTPUT) else prefix
            mounts.append((prefix, inside))
            folders.append(f"{inside}/bin")
        on_host = [f"{prefix}/bin" for prefix, _ in mounts]
        return cls(tuple(mounts), ":".join((*folders, SEARCH_PATH)), ":".join((*on_host, SEARCH_PATH)))


def needed_mounts(tools: "Bubblewrap", python: PythonRuntime, others: Iterable[Path]) -> list[str]:
    """What bubblewrap needs of the machine's mounts, in the words of `keeper.py`. `others`: with all below them."""
    whole = ["/usr", "/etc", "/dev", "/proc", *(f"/{name}" for name in _MERGED), *(host for host, _ in python.mounts)]
    whole += map(str, others)
    single = ["/sys", "/tmp", tools.bwrap, tools.setpriv, *(f"/etc/{name}" for name in _NETWORK_ETC)]
    # A link has to be there, and what it leads to.
    folders = dict.fromkeys((*whole, *map(os.path.realpath, whole)))
    return [*(f"{folder}/" for folder in folders), *dict.fromkeys((*single, *map(os.path.realpath, single)))]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """The tools found on this machine, and which of their options exist."""

    bwrap: str
    setpriv: str
    options: frozenset[str]
    as_root: bool

    @classmethod
    def find(cls, search_path: str | None = None) -> "Bubblewrap | str":
        """The tools, or why there is no sandbox here."""
        path = f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin" if search_path is None else search_path
        bwrap = shutil.which("bwrap", path=path)
        if bwrap is None:
            return f"bubblewrap (bwrap) is not installed; {GET_BUBBLEWRAP}"
        as_root = os.geteuid() == 0
        setpriv = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin")
        if as_root and setpriv is None:
            return "setpriv is not installed; it is part of util-linux"
        text = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False, timeout=10).stdout
        options = frozenset(word for word in text.split() if word.startswith("--"))
        needed = {"--args", "--clearenv", "--perms", "--new-session", "--die-with-parent"}
        if lacking := (needed | {"--userns2"} if as_root else needed) - options:
            return f"{bwrap} is too old: it lacks {', '.join(sorted(lacking))}; {GET_BUBBLEWRAP}"
        return cls(bwrap, setpriv or "", options, as_root)


@dataclass(frozen=True, slots=True)
class Layout:
    """Host folders that become the job's, and files that the daemon made for all jobs."""

    work: Path
    output: Path
    etc: Path
    python: PythonRuntime
    seccomp: Path | None


def write_etc(folder: Path, host: Path = Path("/etc")) -> None:
    """Make the job's /etc: what programs need of the host's, nothing else, and its own users and names."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o755, parents=True)
    for name in _HOST_ETC:
        _copy_readable(host / name, fresh / name)
    for name, text in _OWN_ETC.items():
        (fresh / name).unlink(missing_ok=True)
        (fresh / name).write_text(text)
    for path in (fresh, *fresh.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _copy_readable(source: Path, target: Path) -> None:
    """Copy what everybody on the host may read; links stay links, and dangle where their goal is not shown."""
    if source.name == "localtime" and source.exists():
        source = source.resolve()
    try:
        info = source.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(info.st_mode):
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        for child in source.iterdir():
            _copy_readable(child, target / child.name)
    elif stat.S_ISLNK(info.st_mode):
        target.symlink_to(os.readlink(source))
    elif stat.S_ISREG(info.st_mode) and info.st_mode & 0o004 and info.st_size <= _MAX_ETC_FILE_BYTES:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        shutil.copyfile(source, target)


_VISIBLE_DEVICES = {"CUDA_VISIBLE_DEVICES": "nvidia", "ROCR_VISIBLE_DEVICES": "amd"}


def environment(spec: AttemptSpec, *, work: str, output: str, search_path: str) -> dict[str, str]:
    """The job's whole environment: nothing of the daemon's own gets in."""
    variables = {
        "PATH": search_path,
        "HOME": work,
        "USER": "dante",
        "LOGNAME": "dante",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",
        # A job's print is followed live; a file would otherwise get it in blocks of 8 KiB.
        "PYTHONUNBUFFERED": "1",
    }
    if spec.cpu_milli:
        # Else libraries start one thread per core of the machine, whatever part of it the job has.
        variables["OMP_NUM_THREADS"] = str(max(1, -(-spec.cpu_milli // 1000)))
    variables |= spec.env
    variables["DANTE_OUTPUT"] = output
    if spec.checkpoint:
        variables["DANTE_CHECKPOINT"] = f"{work}/{spec.checkpoint}"
    variables[ATTEMPT_VARIABLE] = str(spec.attempt_id)
    real = [device for device in spec.devices if not device.simulated]
    # Set also when empty: a job without a lease must find no device, whatever its own environment says.
    for name, vendor in _VISIBLE_DEVICES.items():
        variables[name] = ",".join(device.uuid for device in real if device.vendor == vendor)
    if simulated := [device for device in spec.devices if device.simulated]:
        variables["DANTE_SIMULATED_GPUS"] = ",".join(device.model for device in simulated)
    return variables


def inside(working_dir: str) -> str:
    """Where a command begins, as the job sees it."""
    return working_dir if working_dir.startswith("/") else f"{WORK}/{working_dir}".rstrip("/")


def _from(folder: str, command: Sequence[str]) -> Sequence[str]:
    """The command, begun in `folder`: that it is not there is the job's own failure, told in its log."""
    return ["/bin/sh", "-c", 'cd "$1" || exit 126; shift; exec "$@"', "sh", folder, *command] if folder else command


def sandboxed(tools: Bubblewrap, layout: Layout, spec: AttemptSpec, uid: int) -> Launch:
    """How to start `spec` inside. As root, the job runs as the host's `uid`, else as the daemon's own user."""
    variables = environment(spec, work=WORK, output=OUTPUT, search_path=layout.python.search_path)
    command = _from(inside(spec.working_dir) if spec.working_dir else "", spec.command)
    before = {name: value for name, value in variables.items() if name in _SHELLS_OWN or name.startswith("BASH")}
    script = _script({name: value for name, value in variables.items() if name not in before}, command)
    plain = is_plain(spec) and not before and len(script) <= _MAX_SCRIPT_LENGTH
    return replace(_launch(tools, layout, spec, uid, before), script=script, plain=plain)


def parked(tools: Bubblewrap, layout: Layout, spec: AttemptSpec, uid: int) -> Launch:
    """A sandbox for any attempt that `is_plain`, made ahead: its shell waits for the attempt's `script`."""
    return _launch(tools, layout, spec, uid, {})


def is_plain(spec: AttemptSpec) -> bool:
    """Whether it sees of the machine what all such attempts see."""
    usual = AttemptSpec(spec.attempt_id, spec.command)
    return not (spec.devices or spec.network) and (spec.tmp_bytes, spec.shm_bytes) == (usual.tmp_bytes, usual.shm_bytes)


def _script(variables: Mapping[str, str], command: Sequence[str]) -> str:
    """For the shell inside: it tells the daemon that the command runs, and becomes it; a missing one ends with 127.

    By a script, because what stands in arguments is seen by all users of the machine.
    """
    exports = "".join(f"export {name}={shlex.quote(value)};" for name, value in variables.items())
    closed = f"{_READY}>&- {_USER_NAMESPACE}<&- </dev/null"
    return f"exec >&{_LOG} 2>&1 {_LOG}>&-; {exports} echo r >&{_READY}; exec {shlex.join(command)} {closed}"


def _launch(tools: Bubblewrap, layout: Layout, spec: AttemptSpec, uid: int, variables: Mapping[str, str]) -> Launch:
    """`variables`: those that its shell must find set; setpriv sees them too."""
    arguments = [*_namespaces(spec), *_mounts(tools, layout, spec)]
    arguments += ["--new-session", "--clearenv", "--setenv", "PATH", SEARCH_PATH, "--chdir", WORK, "--cap-drop", "ALL"]
    arguments += [part for name, value in variables.items() for part in ("--setenv", name, value)]
    files: dict[int, str] = {}
    if layout.seccomp is not None:
        arguments += ["--seccomp", str(_SECCOMP)]
        files[_SECCOMP] = str(layout.seccomp)
    elif "--disable-userns" in tools.options and not tools.as_root:
        arguments.append("--disable-userns")
    command, shell = [tools.bwrap, "--args", str(_ARGUMENTS), "--"], ["/bin/sh", "-s"]
    outside = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8"}
    if not tools.as_root:
        arguments += ["--unshare-user", "--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID)]
        return Launch([*command, *shell], outside, "/", {_ARGUMENTS: arguments}, files, sandbox=True)
    arguments += ["--userns2", str(_USER_NAMESPACE)]
    for name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
        arguments += ["--cap-add", name]
    command += [tools.setpriv, "--reuid", str(INSIDE_UID), "--regid", str(INSIDE_UID), "--clear-groups"]
    command += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--", *shell]
    users = {_USER_NAMESPACE: f"{INSIDE_UID} {uid} 1"}
    return Launch(command, outside, "/", {_ARGUMENTS: arguments}, files, users, sandbox=True)


def unsandboxed(work: Path, output: Path, spec: AttemptSpec, search_path: str) -> Launch:
    """How to start `spec` as the daemon's own user, seeing what that user sees, in a session of its own."""
    variables = environment(spec, work=str(work), output=str(output), search_path=search_path)
    folder = str(work / spec.working_dir) if spec.working_dir else ""
    return Launch(_from(folder, spec.command), variables, str(work))


def _namespaces(spec: AttemptSpec) -> list[str]:
    arguments = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent"]
    if not spec.network:
        arguments.append("--unshare-net")
    return [*arguments, "--hostname", HOSTNAME]


def _mounts(tools: Bubblewrap, layout: Layout, spec: AttemptSpec) -> list[str]:
    mounts: list[tuple[str, str, str]] = [("--ro-bind", str(layout.etc), "/etc")]
    if spec.network:
        mounts += [("--ro-bind-try", f"/etc/{name}", f"/etc/{name}") for name in _NETWORK_ETC]
    mounts += [("--ro-bind", host, inside) for host, inside in layout.python.mounts]
    if tools.setpriv and not _is_below(os.path.realpath(tools.setpriv), "/usr"):
        mounts.append(("--ro-bind", tools.setpriv, tools.setpriv))
    mounts += _devices(spec)
    mounts += [("--bind", str(layout.work), WORK), ("--bind", str(layout.output), OUTPUT)]
    arguments = [*_system(), "--proc", "/proc", "--dev", "/dev"]
    arguments += [*_tmpfs(tools, "/dev/shm", spec), *_tmpfs(tools, "/tmp", spec)]
    arguments += _folders("/run", "/var", "/home", *_parents(inside for _, _, inside in mounts))
    arguments += ["--symlink", "/tmp", "/var/tmp"]
    arguments += [part for mount in mounts for part in mount]
    return [*arguments, "--remount-ro", "/"]


def _parents(paths: Iterable[str]) -> list[str]:
    """The folders above mount points, outermost first: bubblewrap itself would make them closed to the job."""
    found = {str(parent) for path in paths for parent in Path(path).parents}
    given = ("/", "/dev", "/etc", "/tmp", "/usr", "/proc", "/sys")
    return sorted(found - set(given) | ({"/sys"} & found))


def _folders(*paths: str) -> list[str]:
    return [part for path in dict.fromkeys(paths) for part in ("--perms", "0755", "--dir", path)]


def _system() -> list[str]:
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in _MERGED:
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    return arguments


def _tmpfs(tools: Bubblewrap, path: str, spec: AttemptSpec) -> list[str]:
    size_bytes = spec.shm_bytes or spec.tmp_bytes if path == "/dev/shm" else spec.tmp_bytes
    size = ["--size", str(size_bytes)] if "--size" in tools.options and size_bytes else []
    return ["--perms", "1777", *size, "--tmpfs", path]


def _devices(spec: AttemptSpec) -> list[tuple[str, str, str]]:
    """Only the leased devices' nodes. CUDA reads its cards' topology from /sys; others see the processors' only."""
    paths = [path for device in spec.devices for path in device.paths]
    shown = "/sys" if paths else "/sys/devices/system"
    mounts = [("--ro-bind", shown, shown)] if Path(shown).is_dir() else []
    return [*mounts, *(("--dev-bind", path, path) for path in dict.fromkeys(paths))]


def describe_limits(missing: Mapping[str, str]) -> list[str]:
    """`missing` of an executor, one line each, for people."""
    return [f"{name}: {why}" for name, why in sorted(missing.items())]
