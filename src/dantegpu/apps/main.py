"""The `dante` command: what uses a platform (dantegpu.cli) and what runs one, in one table."""

import os
from typing import NoReturn

from dantegpu.cli.commands import COMMANDS
from dantegpu.cli.framework import Entry, Group, Table, build_cli, merge, run

_PLATFORM = "Platform"

PLATFORM_COMMANDS: Table = {
    "demo": Entry("dantegpu.apps.commands.demo:demo", "See everything at work: a real training job.", _PLATFORM),
    "up": Entry("dantegpu.apps.commands.up:up", "Run the whole platform on this machine.", _PLATFORM),
    "status": Entry("dantegpu.apps.commands.control:status", "Say whether it runs, and where.", _PLATFORM),
    "down": Entry("dantegpu.apps.commands.control:down", "Stop it.", _PLATFORM),
    "reset": Entry("dantegpu.apps.commands.control:reset", "Delete it with all its data.", _PLATFORM),
    "doctor": Entry("dantegpu.apps.commands.doctor:doctor", "Say what this machine lacks.", _PLATFORM),
    "serve": Entry("dantegpu.apps.commands.serve:serve", "Run one service of a platform.", _PLATFORM),
    "init": Entry("dantegpu.apps.commands.init:init", "Write the files of a platform over many processes.", _PLATFORM),
    "sim": Entry("dantegpu.apps.commands.sim:sim", "Simulate the platform with faults, seed by seed.", _PLATFORM),
    "test": Entry("dantegpu.apps.testing:command", "Run the test suite of this clone.", _PLATFORM),
    "bench": Group(
        "Measure this machine's platform.",
        {
            "latency": Entry("dantegpu.apps.commands.bench:latency", "Submit to first instruction, idle platform."),
            "throughput": Entry("dantegpu.apps.commands.bench:throughput", "Many small jobs, from POST to end."),
            "container": Entry("dantegpu.apps.commands.bench:container", "What our containers cost over plain ones."),
            "adopt": Entry("dantegpu.apps.commands.bench:adopt", "Kill the daemon over and over while jobs run."),
            "intake": Entry("dantegpu.apps.commands.bench:intake", "Accepted submissions, nothing runs."),
            "placement": Entry("dantegpu.apps.commands.bench:placement", "Fill a cluster trace with the scheduler."),
            "scale": Entry("dantegpu.apps.commands.bench:scale", "Rounds on a huge fleet and queue."),
            "idle": Entry("dantegpu.apps.commands.bench:idle", "Memory and CPU of an idle platform."),
        },
        _PLATFORM,
    ),
    "provider": Group(
        "Rent out your machines.",
        {
            "join": Entry("dantegpu.apps.commands.provider:join", "Make this machine a provider and run its daemon."),
            "install": Entry("dantegpu.apps.commands.install:install", "Make the daemon a service of systemd."),
            "run": Entry("dantegpu.apps.commands.provider:run", "Run the daemon of a machine that has joined."),
        },
        "Machines",
    ),
}

EXPECTED = (
    "dantegpu.apps.embedded.errors:EmbeddedServerError",
    "dantegpu.kit.errors:ServiceError",
    "dantegpu.kit.http:PortTaken",
    "dantegpu.kit.migrate:NewerData",
    "dantegpu.kit.nats_jwt:TrustFileDamaged",
    "dantegpu.kit.settings:SettingsError",
    "dantegpu.services.auth.secrets:SecretsUnusable",
)
"""Errors of the platform's own parts that are told as they are, without a traceback."""


def main() -> NoReturn:
    """Entry point of the `dante` script."""
    # We never fork without exec; gRPC's fork handlers would only warn on stderr when a child process is started.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    run(build_cli(merge(COMMANDS, PLATFORM_COMMANDS)), expected=EXPECTED)


if __name__ == "__main__":
    main()
