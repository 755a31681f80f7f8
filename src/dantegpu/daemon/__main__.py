"""`python -m dantegpu.daemon`: the daemon in a process of its own, told by `DANTE_DAEMON_*` in the environment."""

import sys

from dantegpu.daemon.enrol import EnrolmentRefused
from dantegpu.daemon.journal import JournalError
from dantegpu.daemon.module import AlreadyRunning, run_daemon
from dantegpu.daemon.probe.devices import InvalidSimulation
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.kit.settings import SettingsError

if __name__ == "__main__":
    try:
        run_daemon(DaemonSettings.load())
    except (SettingsError, EnrolmentRefused, AlreadyRunning, JournalError, InvalidSimulation) as error:
        sys.exit(f"dante daemon: {error}")
