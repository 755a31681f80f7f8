"""Becomes a server process: `python -I -S launch.py JSON`. Standard library only; not imported by the platform.

A small program of its own, because what it does (user namespace, change of user, death signal) may only happen between
fork and exec, and Python code there is not safe in a process with threads.

JSON fields: `argv`; `directory` to start in; `parent_pid` and `death_signal` (0 = outlive the parent);
`map_to` (uid, gid) = run in a user namespace where root shows as this user; `become` (uid, gid) = really be this user;
`socket_folder` = opened before the change of user, its number replaces `{socket_folder_fd}` in argv.
"""

import ctypes
import json
import os
import sys

_PR_SET_PDEATHSIG = 1
_EXIT_CANNOT_LAUNCH = 126


def _map_root_to(uid: int, gid: int) -> None:
    os.unshare(os.CLONE_NEWUSER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} 0 1"), ("gid_map", f"{gid} 0 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _die_with(parent_pid: int, death_signal: int) -> None:
    """Ask the kernel for a signal when the parent dies, so that a killed platform leaves no server behind."""
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died before we could ask
        sys.exit(0)


def main() -> None:
    order = json.loads(sys.argv[1])
    argv: list[str] = order["argv"]
    os.umask(0o077)
    os.chdir(order["directory"])
    if order.get("socket_folder"):
        descriptor = os.open(order["socket_folder"], os.O_RDONLY | os.O_DIRECTORY)
        os.set_inheritable(descriptor, True)
        argv = [argument.replace("{socket_folder_fd}", str(descriptor)) for argument in argv]
    if order.get("map_to"):
        _map_root_to(*order["map_to"])
    if order.get("become"):
        uid, gid = order["become"]
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # Last, because a change of user clears it.
    if order.get("death_signal"):
        _die_with(order["parent_pid"], order["death_signal"])
    os.execv(argv[0], argv)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(f"cannot launch: {error}", file=sys.stderr)
        sys.exit(_EXIT_CANNOT_LAUNCH)
