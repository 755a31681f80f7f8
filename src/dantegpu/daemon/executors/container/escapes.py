"""Which builds of runc and of NVIDIA's container toolkit let a job out of its container.

Sources: the advisories GHSA-xr7r-f8xq-vfvv (CVE-2024-21626), GHSA-9493-h29p-rfm2 (CVE-2025-31133; CVE-2025-52565
and CVE-2025-52881 were fixed by the same releases), NVIDIA's bulletins 5582 (CVE-2024-0132) and 5659 (CVE-2025-23266),
and Debian's security tracker for what was fixed without a new upstream version.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOOL_SECONDS = 10
_NUMBERS = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:-rc\.?(\d+))?")
_FINAL = 1_000_000
"""A release comes after all of its candidates."""

type Version = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Escape:
    """`fixed`: the first good release of each release line; a line that is newer than all of them is good."""

    name: str
    fixed: tuple[Version, ...]
    backports: tuple[re.Pattern[str], ...] = ()
    """Distributions' own builds that have the fix under an older number."""

    def concerns(self, version: str) -> bool:
        numbers = parse_version(version)
        if numbers is None:
            return True
        if any(pattern.match(version) for pattern in self.backports):
            return False
        same_line = [good for good in self.fixed if good[:2] == numbers[:2]]
        if same_line:
            return numbers < same_line[0]
        return numbers < max(self.fixed)


RUNC: Sequence[Escape] = (
    Escape("CVE-2024-21626", ((1, 1, 12, _FINAL),), (re.compile(r"1\.1\.5\+ds1-1\+deb12u[1-9]"),)),
    Escape("CVE-2025-31133", ((1, 2, 8, _FINAL), (1, 3, 3, _FINAL), (1, 4, 0, 3))),
)
TOOLKIT: Sequence[Escape] = (
    Escape("CVE-2024-0132", ((1, 16, 2, _FINAL),)),
    Escape("CVE-2025-23266", ((1, 17, 8, _FINAL),)),
)
ALL_NAMES: frozenset[str] = frozenset(escape.name for escape in (*RUNC, *TOOLKIT))


def parse_version(text: str) -> Version | None:
    """(major, minor, patch, release candidate), comparable; None: no version stands in it."""
    found = _NUMBERS.search(text)
    if found is None:
        return None
    major, minor, patch, candidate = found.groups()
    return int(major), int(minor), int(patch), int(candidate) if candidate else _FINAL


@dataclass(frozen=True, slots=True)
class Findings:
    """`open`: escapes that nobody has accepted, by what they concern. `accepted`: those that the owner has."""

    open: Mapping[str, str]
    accepted: Mapping[str, str]

    @property
    def problem(self) -> str:
        """Why no container may run here; empty: nothing is in the way."""
        if not self.open:
            return ""
        listed = "; ".join(f"{name}: {what}" for name, what in self.open.items())
        names = ",".join(self.open)
        return f"jobs could get out ({listed}); update it, or accept the risk: DANTE_DAEMON_ACCEPT_ESCAPES={names}"


def look(runtime: str, runtime_version: str, toolkit_version: str, accepted: frozenset[str]) -> Findings:
    """What is known about these builds. An empty version of a runtime that is there counts as bad."""
    found: dict[str, str] = {}
    if runtime in ("runc", "", "nvidia"):
        shown = f"runc {runtime_version or 'of an unknown version'}"
        found |= {escape.name: shown for escape in RUNC if escape.concerns(runtime_version)}
    if toolkit_version:
        shown = f"NVIDIA container toolkit {toolkit_version}"
        found |= {escape.name: shown for escape in TOOLKIT if escape.concerns(toolkit_version)}
    return Findings(
        {name: what for name, what in found.items() if name not in accepted},
        {name: what for name, what in found.items() if name in accepted},
    )


def installed_toolkit(search_path: str | None = None) -> str:
    """The toolkit's version, empty where it is not installed. Blocks for a moment."""
    for tool in ("nvidia-ctk", "nvidia-container-cli"):
        path = shutil.which(tool, path=search_path)
        if path is None:
            continue
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False, timeout=TOOL_SECONDS
        ).stdout
        found = _NUMBERS.search(text)
        return found.group(0) if found else "of an unknown version"
    return ""
