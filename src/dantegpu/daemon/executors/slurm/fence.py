"""The end of an attempt whose lease nobody renews: on its node, where that needs neither the daemon nor Slurm.

The daemon writes all leases of a node's attempts to one file at each renewal, as it does on any machine. That file is
looked at here. What it says is by the clock of the daemon's machine, so only two things count: that it has changed, and
how long the lease ran on when it was written. Counted from the moment in which the change is seen, that ends no
attempt too early, and none later than the file system takes to show the change plus a look's interval.
"""

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dantegpu.daemon.leases import Renewal, boottime, read_renewal

LOOKS_PER_LEASE = 8
FIRST_LOOK_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""At most, between two looks: one small file is opened for each attempt."""
HANG_SECONDS = 5.0
"""A look that takes longer will not come back: the file system hangs, as when the daemon's machine serves it."""
NAMED_SECONDS = 15.0
"""How long the file may take to name an attempt that is about to start."""
KILL_AGAIN_SECONDS = 1.0
"""What was forking while all were killed is killed after this time."""


class LeaseWatch:
    """Of one attempt, in the daemon's file of leases."""

    def __init__(self, path: Path, attempt_id: str) -> None:
        self._path = path
        self._attempt_id = attempt_id
        self._seen = ""
        self._until = boottime()
        self._pause_seconds = FIRST_LOOK_SECONDS
        self._looks = 0
        self._over = threading.Event()

    def may_start(self) -> bool:
        """Whether the lease runs. Slurm may start a job long after the daemon is gone that submitted it."""
        first = self._look()
        if first is not None and first.age_seconds < first.rest_seconds:
            return True
        # Too old, or a clock on the wall is wrong. A daemon that lives renews it within the lease.
        seen, deadline = self._seen, boottime() + (first.rest_seconds if first is not None else NAMED_SECONDS)
        while boottime() < deadline:
            time.sleep(self._pause_seconds)
            self._look()
            if self._seen != seen:
                return True
        return False

    def start(self, kill: Callable[[], None]) -> None:
        """From now on. `kill` is called over and over once the lease is over; it must touch no shared file.

        In threads, because whatever touches a file system that hangs does so, too.
        """
        # The program's signals are for its first thread, which waits for the job.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for body in (self._keep_looking, self._notice_a_hang):
                threading.Thread(target=body, args=(kill,), daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """The job has ended."""
        self._over.set()

    def _look(self) -> Renewal | None:
        try:
            renewal = read_renewal(self._path, self._attempt_id)
        except (OSError, json.JSONDecodeError):
            return None  # no news
        if renewal is not None and renewal.mark != self._seen:
            self._until = boottime() + renewal.rest_seconds
            self._pause_seconds = min(LOOK_SECONDS, renewal.rest_seconds / LOOKS_PER_LEASE)
            self._seen = renewal.mark
        return renewal

    def _keep_looking(self, kill: Callable[[], None]) -> None:
        while not self._over.is_set():
            began_at = boottime()
            self._look()
            self._looks += 1
            # After all processes of the job were stopped for a while, its lease may have been renewed meanwhile.
            if began_at >= self._until:
                self._end(kill)
            self._over.wait(max(0.0, min(self._pause_seconds, self._until - boottime())))

    def _notice_a_hang(self, kill: Callable[[], None]) -> None:
        while not self._over.wait(max(self._pause_seconds, self._until - boottime())):
            looks = self._looks
            if boottime() >= self._until and not self._over.wait(HANG_SECONDS) and looks == self._looks:
                self._end(kill)

    def _end(self, kill: Callable[[], None]) -> None:
        while not self._over.is_set():
            kill()
            self._over.wait(KILL_AGAIN_SECONDS)
