"""What the machine's owner sets: hours, reserves, a settings file, a job of his own, a service of systemd."""

import asyncio
import os
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dantegpu.apps.commands.install import CONFIG_PATH, install, unit_text
from dantegpu.daemon.devices import DeviceWatch
from dantegpu.daemon.owner import Hours, IdleJob, InvalidHours
from dantegpu.daemon.probe.devices import GpuSample, simulated_gpus
from dantegpu.daemon.scrub import HeldFile, Scrubber
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.kit.settings import SettingsError


@pytest.mark.parametrize(
    ("text", "open_at", "closed_at"),
    [("22:00-06:30", ["22:00", "23:59", "00:00", "06:29"], ["06:30", "12:00", "21:59"]),
     ("9:00-17:00", ["09:00", "16:59"], ["17:00", "08:59"])],
)  # fmt: skip
def test_hours_hold_by_local_time_and_over_midnight(text: str, open_at: list[str], closed_at: list[str]):
    hours = Hours.parse(text)
    assert hours is not None
    assert all(hours.open_at(datetime.fromisoformat(f"2026-03-01T{each}")) for each in open_at)
    assert not any(hours.open_at(datetime.fromisoformat(f"2026-03-01T{each}")) for each in closed_at)


@pytest.mark.parametrize("text", ["22-6", "25:00-06:00", "06:00-06:00", "always", "22:00-06:61"])
def test_hours_that_are_none_are_refused_with_an_example(text: str):
    with pytest.raises(InvalidHours, match="such as 22:00-06:30"):
        Hours.parse(text)


def test_settings_come_from_a_file_the_environment_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "provider.toml"
    config.write_text('region = "file"\nreserve_memory = "4GB"\nhours = "22:00-06:00"\nlog_level = "error"\n')
    monkeypatch.setenv("DANTE_DAEMON_CONFIG", str(config))
    monkeypatch.setenv("DANTE_DAEMON_REGION", "environment")
    settings = DaemonSettings.load({"log_level": "debug"})
    assert (settings.region, settings.log_level, settings.hours) == ("environment", "debug", "22:00-06:00")
    assert settings.reserved_memory_bytes == 4 << 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('regoin = "x"', "did you mean 'region'"),
        ("region =", "not valid TOML"),
        ('hours = "noon"', "such as 22:00-06:30"),
        ('reserve_memory = "much"', "reserve_memory"),
    ],
)
def test_a_wrong_settings_file_says_what_and_where(tmp_path: Path, text: str, said: str):
    config = tmp_path / "provider.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as refused:
        DaemonSettings.load({"config": config})
    assert said in str(refused.value)
    assert str(config) in str(refused.value)


async def test_the_idle_job_gives_way_with_everything_that_it_started(tmp_path: Path):
    script = f"setsid sleep 600 & echo $! > {tmp_path}/child; wait"
    job = IdleJob(f"sh -c '{script}'")
    running = asyncio.create_task(job.run())
    child = tmp_path / "child"
    async with asyncio.timeout(20):
        while not child.exists() or not child.read_text().strip():
            await asyncio.sleep(0.01)
        pid = int(child.read_text())
        assert pid in job.pids
        job.stop()
        await running
        while os.path.exists(f"/proc/{pid}") and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            await asyncio.sleep(0.01)
    assert job.pids == set()


def test_a_gpu_that_is_too_hot_takes_nothing_until_it_has_cooled_down(tmp_path: Path):
    async def never() -> list[GpuSample]:
        return []

    watch = DeviceWatch(never, simulated_gpus("RTX 4090"), HeldFile(tmp_path / "held"), Scrubber(), max_celsius=80)
    said: list[bool] = []
    for celsius in (80, 81, 79, 76, 75):
        watch.look([GpuSample(0, temperature_celsius=celsius)], set())
        said.append("too hot" in watch.problems.get(0, ""))
    assert said == [False, True, True, True, False]


def test_the_service_is_printed_and_systemd_accepts_it(tmp_path: Path):
    result = CliRunner().invoke(
        install, ["https://platform", "--token", "t", "--python", "/usr/bin/python3", "--dry-run"]
    )
    assert result.exit_code == 0
    assert f"Environment=DANTE_DAEMON_CONFIG={CONFIG_PATH}" in result.output
    assert 'gateway_url = "https://platform"' in result.output
    assert "NoNewPrivileges=yes" in result.output
    if shutil.which("systemd-analyze") is None:
        return
    unit = tmp_path / "dante-provider.service"
    unit.write_text(unit_text("/usr/bin/python3", CONFIG_PATH, ""))
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_an_interpreter_that_the_services_user_cannot_read_is_refused():
    with pytest.raises(click.ClickException, match="install DanteGPU in /opt"):
        unit_text("/root/venv/bin/python", CONFIG_PATH, "")
