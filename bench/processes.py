"""CPU seconds of a platform's processes, in groups. On a shared machine they say more than the clock on the wall."""

import os
from collections import defaultdict

import psutil

from dantegpu.apps.platform import Running


def cpu_seconds(running: Running) -> dict[str, float]:
    """User and system seconds of each group so far: services, daemon, cells (what starts jobs), jobs (that have ended,
    their sandboxes included), postgres, nats, client (this process).

    Cells that a busy time has left are kept for 30 s. Measure within that: they take their jobs' seconds with them.
    """
    used: defaultdict[str, float] = defaultdict(float)
    services = psutil.Process(running.pid)
    used["services"] += _own(services)
    if running.provider_pid is not None:
        daemon = psutil.Process(running.provider_pid)
        used["daemon"] += _own(daemon)
        for keeper in daemon.children():
            used["cells"] += _own(keeper)
            for cell in keeper.children():
                times = cell.cpu_times()
                used["cells"] += times.user + times.system
                used["jobs"] += times.children_user + times.children_system
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


def _own(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
