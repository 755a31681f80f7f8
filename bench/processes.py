"""CPU seconds of a platform's processes, in groups. On a shared machine they say more than the clock on the wall."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil

from dantegpu.apps.platform import Running
from dantegpu.daemon.executors.cgroup import Cgroup, detect


def cpu_seconds(running: Running) -> dict[str, float]:
    """User and system seconds of each group so far: services, daemon, cells (what starts jobs), jobs (with their
    sandboxes), postgres, nats, client (this process)."""
    used: defaultdict[str, float] = defaultdict(float)
    services = psutil.Process(running.pid)
    used["services"] += _own(services)
    if running.provider_pid is not None:
        daemon = psutil.Process(running.provider_pid)
        used["daemon"] += _own(daemon)
        cells = [cell for keeper in daemon.children() for cell in keeper.children()]
        used["cells"] += sum(_own(process) for process in (*daemon.children(), *cells))
        in_groups = _in_groups(cells)
        # Nobody waits for some of a sandbox's processes: only the kernel's groups have counted all of them.
        used["jobs"] += _of_ended(cells) if in_groups is None else in_groups - sum(map(_own, cells))
    for child in services.children(recursive=True):
        try:
            name = child.name()
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        # Server processes end with their connections; the one that started them counts them then.
        if name.startswith("postgres"):
            used["postgres"] += times.user + times.system + times.children_user + times.children_system
        elif name.startswith("nats"):
            used["nats"] += times.user + times.system
    used["client"] += _own(psutil.Process(os.getpid()))
    return dict(used)


def rss_mb(running: Running) -> float:
    """Resident memory of services and daemon."""
    pids = [running.pid] + ([running.provider_pid] if running.provider_pid is not None else [])
    return round(sum(psutil.Process(pid).memory_info().rss for pid in pids) / (1 << 20), 1)


def _in_groups(cells: Sequence[psutil.Process]) -> float | None:
    """What the daemon's control groups have counted, those that are gone included; None without such groups."""
    names = {
        Path(line.rstrip()).parent.name
        for cell in cells
        for line in Path(f"/proc/{cell.pid}/cgroup").read_text().splitlines()
        if "/slot-" in line
    }
    if len(names) != 1:
        return None
    tree = detect(names.pop())
    return Cgroup(tree.version, tree.parents).stats().cpu_seconds


def _of_ended(cells: Sequence[psutil.Process]) -> float:
    """Cells that a busy time has left are kept for 30 s, and take their jobs' seconds with them."""
    times = [cell.cpu_times() for cell in cells]
    return sum(each.children_user + each.children_system for each in times)


def _own(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
