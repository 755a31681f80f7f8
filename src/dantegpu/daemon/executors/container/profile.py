"""Podman's seccomp profile, without what it permits for containers inside containers.

Docker's default refuses a container without capabilities to make namespaces or to mount; Podman's permits it, so a job
could reach parts of the kernel that only root inside a new user namespace reaches. Source: containers/common,
pkg/seccomp/seccomp.json; the names are those that the sandbox of processes refuses too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dantegpu.daemon.executors.seccomp import CLONE_NAMESPACES, refused_names

type Json = dict[str, Any]

_EPERM = 1


def hardened(profile: Mapping[str, Any]) -> Json:
    """The same profile, with fewer permissions. `clone` stays for threads and processes, without new namespaces."""
    refused = refused_names()
    # clone3 hides its flags in memory; by the profile's default it is answered ENOSYS, and C libraries fall back.
    dropped = refused | {"clone", "clone3"}
    rules: list[Json] = []
    for rule in profile["syscalls"]:
        names = [name for name in rule["names"] if name not in dropped]
        if names:
            rules.append({**rule, "names": names})
    rules.append({
        "names": ["clone"], "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
    })  # fmt: skip
    rules.append({"names": sorted(refused), "action": "SCMP_ACT_ERRNO", "errnoRet": _EPERM, "args": []})
    return {**profile, "syscalls": rules}


def write_hardened(source: Path, target: Path) -> None:
    """Raises OSError, ValueError, KeyError where the engine's own profile cannot be read."""
    target.write_text(json.dumps(hardened(json.loads(source.read_text()))))
