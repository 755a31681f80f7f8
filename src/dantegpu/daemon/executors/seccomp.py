"""The system calls that no job needs and that kernels have been broken by: refused by a seccomp filter.

A list of refusals, not of permissions: training code uses nearly everything else. Written as a BPF program by hand,
because it is one page, and a C library would be a dependency for every provider. Sources: seccomp(2), bpf(4),
the system call tables of Linux 6.x, and Docker's default profile for the choice.
"""

import errno
import platform
import struct
from dataclasses import dataclass

_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER_EQUAL = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_SET = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL_PROCESS = 0x80000000
_OFFSET_NUMBER = 0  # struct seccomp_data
_OFFSET_ARCHITECTURE = 4
_OFFSET_ARGUMENT_0 = 16
_OFFSET_ARGUMENT_1 = 24
_X32_BIT = 0x40000000
CLONE_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; TIME does not fit into clone
_TIOCSTI = 0x5412
_TIOCLINUX = 0x541C


@dataclass(frozen=True, slots=True)
class _Table:
    audit_architecture: int
    clone: int
    clone3: int
    ioctl: int
    refused: dict[str, int]


_COMMON = {  # the same number on every architecture since Linux 5.1
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "quotactl_fd": 443,
}
_TABLES = {
    "x86_64": _Table(
        0xC000003E,
        56,
        435,
        16,
        _COMMON
        | {
            "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164,
            "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
            "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179,
            "lookup_dcookie": 212, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249,
            "keyctl": 250, "unshare": 272, "perf_event_open": 298, "fanotify_init": 300, "open_by_handle_at": 304,
            "clock_adjtime": 305, "setns": 308, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
            "userfaultfd": 323, "vhangup": 153, "syslog": 103,
        },
    ),
    "aarch64": _Table(
        0xC00000B7,
        220,
        435,
        29,
        _COMMON
        | {
            "lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "vhangup": 58,
            "quotactl": 60, "acct": 89, "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106,
            "clock_settime": 112, "syslog": 116, "reboot": 142, "sethostname": 161, "setdomainname": 162,
            "settimeofday": 170, "adjtimex": 171, "add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224,
            "swapoff": 225, "perf_event_open": 241, "fanotify_init": 262, "open_by_handle_at": 265,
            "clock_adjtime": 266, "setns": 268, "kcmp": 272, "finit_module": 273, "bpf": 280, "userfaultfd": 282,
            "kexec_file_load": 294,
        },
    ),
}  # fmt: skip


def refused_names() -> frozenset[str]:
    """The system calls that no job may make, on any processor."""
    return frozenset(name for table in _TABLES.values() for name in table.refused)


def _instruction(code: int, constant: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, constant)


def _refuse(error_number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | error_number)


def program(machine: str | None = None) -> bytes | None:
    """The filter as an array of `struct sock_filter`, or None for a processor whose table is not known here."""
    table = _TABLES.get(machine or platform.machine())
    if table is None:
        return None
    code = [
        _instruction(_LOAD_WORD, _OFFSET_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, table.audit_architecture, jump_true=1),
        # Another system call convention has other numbers, so nothing below would hold.
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD_WORD, _OFFSET_NUMBER),
    ]
    if table.audit_architecture == _TABLES["x86_64"].audit_architecture:
        code += [_instruction(_JUMP_GREATER_EQUAL, _X32_BIT, jump_false=1), _refuse(errno.ENOSYS)]
    for number in sorted(table.refused.values()):
        code += [_instruction(_JUMP_EQUAL, number, jump_false=1), _refuse(errno.EPERM)]
    code += [
        # clone3 hides its flags in memory; ENOSYS makes the C library fall back to clone.
        _instruction(_JUMP_EQUAL, table.clone3, jump_false=1),
        _refuse(errno.ENOSYS),
        _instruction(_JUMP_EQUAL, table.clone, jump_false=4),
        _instruction(_LOAD_WORD, _OFFSET_ARGUMENT_0),
        _instruction(_JUMP_SET, CLONE_NAMESPACES, jump_false=1),
        _refuse(errno.EPERM),
        _instruction(_RETURN, _ALLOW),
        # Typing into somebody else's terminal.
        _instruction(_JUMP_EQUAL, table.ioctl, jump_false=4),
        _instruction(_LOAD_WORD, _OFFSET_ARGUMENT_1),
        _instruction(_JUMP_EQUAL, _TIOCSTI, jump_true=1),
        _instruction(_JUMP_EQUAL, _TIOCLINUX, jump_false=1),
        _refuse(errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(code)
