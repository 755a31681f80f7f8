"""`dante provider install`: the daemon as a service of systemd, under a user of its own."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import click

UNIT_NAME = "dante-provider.service"
USER = "dante-provider"
UNIT_FOLDER = Path("/etc/systemd/system")
CONFIG_PATH = Path("/etc/dante/provider.toml")
STATE = "/var/lib/dante-provider"

# What is not here is left out on purpose: ProtectKernelTunables, ProtectProc, PrivateDevices, ProtectClock and
# ProtectHostname would keep the sandbox from mounting /proc, from its host name, or jobs from their GPUs.
_UNIT = """\
[Unit]
Description=DanteGPU provider (beatrice-core-services)
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User={user}
Group={user}
SupplementaryGroups={groups}
Environment=DANTE_DAEMON_CONFIG={config}
ExecStart={python} -P -m dantegpu.daemon
Restart=always
RestartSec=5
# The daemon ends its jobs itself; after a crash the next one takes them over.
KillMode=process
TimeoutStopSec=30
# Limits of jobs: the daemon makes control groups below its own.
Delegate=yes
StateDirectory=dante-provider
StateDirectoryMode=0700
UMask=0077
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectKernelModules=yes
ProtectKernelLogs=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""

_CONFIG = """\
# Settings of this machine's daemon; docs/settings.md lists all of them. Restart the service after a change.
state = {state}
gateway_url = {url}
join_token = {token}
# region = "eu-west"
# hours = "22:00-06:30"
# max_gpu_celsius = 85
# reserve_cpus = 2
# reserve_memory = "4GB"
# idle_command = "/usr/local/bin/my-own-work"
# share_gpus = true
# allow_network = true
# publish = "0.0.0.0:30000-30099"
"""


def unit_text(python: str, config: Path, groups: str) -> str:
    """The unit. Raises ClickException where the service's user could not read the interpreter."""
    real = os.path.realpath(python)
    for path in (python, real):
        if path.startswith("/root/"):
            raise click.ClickException(
                f"{path} lies in /root, which the user {USER} cannot read; install DanteGPU in /opt and run this there"
            )
    home = "read-only" if any(path.startswith("/home/") for path in (python, real)) else "yes"
    return _UNIT.format(user=USER, groups=groups, config=config, python=python, home=home)


def config_text(url: str, token: str) -> str:
    """The settings file of a machine that joins."""
    return _CONFIG.format(state=json.dumps(STATE), url=json.dumps(url), token=json.dumps(token))


def gpu_groups() -> str:
    """Groups that may open AMD's device nodes, where they exist; NVIDIA's are open to everybody."""
    return " ".join(name for name in ("video", "render") if _has_group(name))


def _has_group(name: str) -> bool:
    return any(line.startswith(f"{name}:") for line in Path("/etc/group").read_text().splitlines())


@click.command("install")
@click.argument("url", required=False, default="")
@click.option("--token", envvar="DANTE_DAEMON_JOIN_TOKEN", default="", help="From `dante provider token`.")
@click.option("--python", default=sys.executable, help="The interpreter of the service (default: this one).")
@click.option("--dry-run", is_flag=True, help="Only print the unit and the settings.")
def install(url: str, token: str, python: str, dry_run: bool) -> None:
    """Make the provider's daemon a service of systemd, under a user of its own, and start it.

    URL and --token are written into the settings file, unless there is one already.
    """
    if dry_run:
        click.echo(f"# {UNIT_FOLDER / UNIT_NAME}\n{unit_text(python, CONFIG_PATH, gpu_groups())}")
        click.echo(f"# {CONFIG_PATH}\n{config_text(url, token)}", nl=False)
        return
    if os.geteuid() != 0:
        raise click.ClickException("only root can install a service: sudo dante provider install ...")
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        raise click.ClickException(
            "systemd does not run this machine; let your own supervisor run `dante provider run --config FILE`"
        )
    if not CONFIG_PATH.exists() and not (url and token):
        raise click.UsageError("say where to join: dante provider install URL --token TOKEN")
    unit = unit_text(python, CONFIG_PATH, gpu_groups())
    _make_user()
    _write_config(url, token)
    (UNIT_FOLDER / UNIT_NAME).write_text(unit)
    for command in (["daemon-reload"], ["enable", "--now", UNIT_NAME]):
        subprocess.run(["systemctl", *command], check=True)
    click.echo(f"{UNIT_NAME} runs; `journalctl -u {UNIT_NAME}` shows its log, {CONFIG_PATH} has its settings", err=True)


def _make_user() -> None:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        command = ["useradd", "--system", "--home-dir", STATE, "--shell", "/usr/sbin/nologin", "--user-group", USER]
        subprocess.run(command, check=True)


def _write_config(url: str, token: str) -> None:
    if CONFIG_PATH.exists():
        return
    CONFIG_PATH.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # The join token is in it: only the service's user may read it.
    descriptor = os.open(CONFIG_PATH, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    with os.fdopen(descriptor, "w") as file:
        file.write(config_text(url, token))
    user = pwd.getpwnam(USER)
    os.chown(CONFIG_PATH, user.pw_uid, user.pw_gid)
