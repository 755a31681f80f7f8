"""What is decided about containers before any engine is asked: names, bad versions, GPUs, sockets."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from dantegpu.daemon.containers import find_socket
from dantegpu.daemon.disk import used_bytes
from dantegpu.daemon.executors.base import AttemptRefused, AttemptSpec, DeviceGrant
from dantegpu.daemon.executors.container import escapes, gpus
from dantegpu.daemon.executors.container.engine import EngineFacts
from dantegpu.daemon.executors.container.plan import Gpus, ImageConfig, Plan, User, docker_body, podman_body
from dantegpu.daemon.settings import DaemonSettings
from dantegpu.daemon.workspace import AttemptFolder
from dantegpu.domain.ids import AttemptId
from dantegpu.domain.images import ImageReference, InvalidImage
from dantegpu.kit.settings import SettingsError

DIGEST = f"sha256:{'a' * 64}"
GPU = DeviceGrant("GPU-1", "RTX 4090", 0)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12", "docker.io/library/python:3.12"),
        ("acme/train", "docker.io/acme/train:latest"),
        ("ghcr.io/acme/a/b:v1", "ghcr.io/acme/a/b:v1"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        (f"acme/train@{DIGEST}", f"docker.io/acme/train@{DIGEST}"),
    ],
)
def test_what_is_left_out_of_an_images_name_is_put_in(text: str, full: str):
    assert str(ImageReference.parse(text)) == full


@pytest.mark.parametrize(
    ("publish", "said"),
    [("30000-30099", "expected ADDRESS:FIRST-LAST"), ("1.2.3.4:80-90", "within 1024-65535"),
     ("1.2.3.4:3000-2000", "within"), ("1.2.3.400:3000-3001", "1.2.3.400")],
)  # fmt: skip
def test_where_ports_may_be_published_is_checked_at_the_start(publish: str, said: str):
    with pytest.raises(SettingsError, match=said):
        DaemonSettings.load({"publish": publish, "allow_network": True})
    with pytest.raises(SettingsError, match="needs allow_network"):
        DaemonSettings.load({"publish": "1.2.3.4:3000-3001"})


def test_people_are_told_the_address_that_the_owner_gives_or_the_one_that_is_listened_at():
    def told(**settings: str) -> str:
        policy = DaemonSettings.load({"allow_network": True, **settings}).publish_policy
        assert policy is not None
        return policy.told

    assert told(publish="1.2.3.4:3000-3001") == "1.2.3.4"
    assert told(publish="0.0.0.0:3000-3001") == ""
    assert told(publish="0.0.0.0:3000-3001", publish_host="gpu.example") == "gpu.example"


def test_a_digest_is_what_is_pulled_whatever_the_tag_says():
    assert ImageReference.parse(f"acme/train:v1@{DIGEST}").pinned == f"docker.io/acme/train@{DIGEST}"


@pytest.mark.parametrize(
    "text", ["", "UPPER/x", "a b", "x:", "x@sha256:12", "-x", "a//b", "http://x/y", "x" * 501, "a/../b"]
)
def test_what_is_no_image_is_refused_with_what_was_expected(text: str):
    with pytest.raises(InvalidImage):
        ImageReference.parse(text)


@pytest.mark.parametrize(
    ("version", "bad"),
    [
        ("1.1.5+ds1-1+deb12u1", {"CVE-2025-31133"}),
        ("1.1.5+ds1-1", {"CVE-2024-21626", "CVE-2025-31133"}),
        ("1.1.12", {"CVE-2025-31133"}),
        ("1.2.7", {"CVE-2025-31133"}),
        ("1.2.8", set[str]()),
        ("1.3.2", {"CVE-2025-31133"}),
        ("1.3.3", set[str]()),
        ("1.4.0-rc.2", {"CVE-2025-31133"}),
        ("1.4.0-rc.3", set[str]()),
        ("1.5.0", set[str]()),
        ("", {"CVE-2024-21626", "CVE-2025-31133"}),
    ],
)
def test_builds_of_runc_that_let_jobs_out_are_known(version: str, bad: set[str]):
    assert set(escapes.look("runc", version, "", frozenset()).open) == bad


def test_old_toolkits_are_known_and_an_owner_may_accept_a_risk_by_its_name():
    assert set(escapes.look("crun", "1.8", "1.16.1", frozenset()).open) == {"CVE-2024-0132", "CVE-2025-23266"}
    findings = escapes.look("crun", "1.8", "1.17.7", frozenset({"CVE-2025-23266"}))
    assert (findings.problem, set(findings.accepted)) == ("", {"CVE-2025-23266"})
    with pytest.raises(SettingsError, match="CVE-1"):
        DaemonSettings.load({"accept_escapes": "CVE-1"})


def facts(*, podman: bool = False, cdi: bool = True) -> EngineFacts:
    return EngineFacts(podman, "1", "1.47", "runc", "1.3.3", False, True, None, cdi, Path("/var/lib/docker"))


def test_people_are_told_whose_users_a_containers_jobs_are():
    plain, mapped = facts(cdi=False), replace(facts(), remapped_uid=165536)
    assert "no user namespace" in plain.describe(daemon_is_root=True)
    assert plain.describe(daemon_is_root=True).endswith("GPUs by device requests")
    assert "userns-remap" in mapped.describe(daemon_is_root=True)
    assert "a user namespace per job" in facts(podman=True).describe(daemon_is_root=True)
    assert replace(facts(), rootless=True).describe(daemon_is_root=False) == (
        "docker 1, runc 1.3.3, rootless, GPUs by CDI"
    )


def test_gpus_are_asked_for_by_cdi_where_the_machine_declares_them_and_by_the_engine_else(tmp_path: Path):
    assert gpus.choose([GPU], facts(), [tmp_path]) == Gpus(uuids=("GPU-1",))
    (tmp_path / "nvidia.yaml").write_text("kind: nvidia.com/gpu\ndevices: [{name: '0'}, {name: GPU-1}]\n")
    (tmp_path / "broken.json").write_text("{")
    assert gpus.choose([GPU], facts(), [tmp_path]) == Gpus(cdi=("nvidia.com/gpu=GPU-1",))
    assert gpus.choose([GPU], facts(cdi=False), [tmp_path]) == Gpus(uuids=("GPU-1",))
    with pytest.raises(AttemptRefused, match="nvidia-ctk"):
        gpus.choose([GPU], facts(podman=True), [tmp_path / "none"])


def a_plan(folder: Path, devices: Gpus, **fields: object) -> Plan:
    image = ImageConfig("sha256:1", ("LD_PRELOAD=/evil.so", "NVIDIA_VISIBLE_DEVICES=all", "A=1"), volumes=("/data",))
    spec = AttemptSpec(AttemptId.new(), ("true",), devices=(GPU,), **fields)  # pyright: ignore[reportArgumentType]
    return Plan("name", image, spec, AttemptFolder(folder), User(7, 7), {}, gpus=devices)


def test_variables_that_hooks_and_the_loader_obey_never_stand_in_a_containers_configuration(tmp_path: Path):
    plan = a_plan(tmp_path, Gpus(cdi=("nvidia.com/gpu=GPU-1",)), env={"LD_PRELOAD": "/work/mine.so"})
    docker, podman = docker_body(plan), podman_body(plan)
    assert "LD_PRELOAD" in docker["Env"]  # without a value: taken away from what the image says
    assert not [entry for entry in docker["Env"] if entry.startswith("LD_PRELOAD=")]
    assert "NVIDIA_VISIBLE_DEVICES=void" in docker["Env"]
    assert "LD_PRELOAD" not in podman["env"]
    assert podman["unsetenv"] == ["LD_PRELOAD"]
    assert "LD_PRELOAD=/work/mine.so" in docker["Cmd"]
    assert docker["HostConfig"]["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}]
    assert podman["devices"] == [{"path": "nvidia.com/gpu=GPU-1"}]
    by_request = docker_body(a_plan(tmp_path, Gpus(uuids=("GPU-1",))))
    assert by_request["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["GPU-1"]
    assert "/data" in docker["HostConfig"]["Tmpfs"]


def test_the_engine_is_the_named_one_or_the_first_that_is_there(short_dir: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_socket("none") is None
    assert find_socket("unix:///x/y.sock") == Path("/x/y.sock")
    path = short_dir / "docker.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        assert find_socket("auto") == path


def test_what_a_job_fills_is_counted_in_blocks_and_links_lead_nowhere(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "big").write_bytes(b"x" * (1 << 20))
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "link").symlink_to("/")
    assert 1 << 20 <= used_bytes([tmp_path]) < 2 << 20
