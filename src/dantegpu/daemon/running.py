"""A daemon in a process of its own: this machine's, or that of a whole cluster."""

import asyncio
import signal
from collections.abc import Callable

from dantegpu.daemon.module import SERVICE_NAME, Daemon
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.kit.telemetry import configure_logging, configure_tracing


def run_daemon(settings: DaemonSettings, on_ready: Callable[[str], None] | None = None) -> None:
    """Run until SIGTERM or SIGINT; SIGUSR1 ends it too and leaves its jobs running."""
    configure_logging(SERVICE_NAME, settings.log_level)
    configure_tracing(SERVICE_NAME, settings.otlp_endpoint)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

        def hand_over() -> None:
            settings.keep_attempts_on_stop = True
            stop.set()

        loop.add_signal_handler(signal.SIGUSR1, hand_over)
        if settings.executor == "slurm":
            # Imported only where it is used: the daemon of a plain machine shall stay small.
            from dantegpu.daemon.cluster import Cluster

            await Cluster(settings, on_ready).run(stop)
        else:
            await Daemon(settings, on_ready).run(stop)

    asyncio.run(main())
