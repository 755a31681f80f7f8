"""`python -m dantegpu.daemon`: the daemon in a process of its own, told by `DANTE_DAEMON_*` in the environment."""

import os
import sys

from dantegpu.daemon.lean import keep_lean, load_nvml_lean
from dantegpu.daemon.probe.signs import nvidia_shows

keep_lean()
if nvidia_shows() or os.environ.get("DANTE_DAEMON_GPUS") == "nvidia":
    load_nvml_lean()

from dantegpu.daemon.enrol import EnrolmentRefused  # noqa: E402 - only after keep_lean()
from dantegpu.daemon.executors.base import ExecutorError  # noqa: E402
from dantegpu.daemon.journal import JournalError  # noqa: E402
from dantegpu.daemon.module import AlreadyRunning  # noqa: E402
from dantegpu.daemon.probe.devices import InvalidSimulation  # noqa: E402
from dantegpu.daemon.running import run_daemon  # noqa: E402
from dantegpu.daemon.settings import DaemonSettings  # noqa: E402
from dantegpu.kit.settings import SettingsError  # noqa: E402

if __name__ == "__main__":
    try:
        run_daemon(DaemonSettings.load())
    except (SettingsError, EnrolmentRefused, AlreadyRunning, JournalError, InvalidSimulation, ExecutorError) as error:
        sys.exit(f"dante daemon: {error}")
