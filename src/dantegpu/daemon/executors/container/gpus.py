"""How a container gets its leased GPUs and no other: by CDI, or by the engine's own request.

Source of CDI's files: github.com/cncf-tags/container-device-interface, SPEC.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dantegpu.daemon.executors.base import AttemptRefused, DeviceGrant
from dantegpu.daemon.executors.container.engine import EngineFacts
from dantegpu.daemon.executors.container.plan import Gpus

KIND = "nvidia.com/gpu"
SPEC_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
MAX_SPEC_BYTES = 4 << 20


def choose(devices: Sequence[DeviceGrant], facts: EngineFacts, folders: Sequence[Path] = SPEC_FOLDERS) -> Gpus:
    """Raises AttemptRefused where this machine's containers can get no GPU."""
    real = [device for device in devices if not device.simulated]
    if not real:
        return Gpus()
    if facts.cdi:
        known = cdi_names(folders)
        names = [_name(device, known) for device in real]
        if all(names):
            return Gpus(cdi=tuple(f"{KIND}={name}" for name in names))
    if facts.podman:
        raise AttemptRefused(
            f"no CDI device of the kind {KIND} is declared for GPU {real[0].uuid}: nvidia-ctk cdi generate --output"
            " /etc/cdi/nvidia.yaml --device-name-strategy uuid"
        )
    return Gpus(uuids=tuple(device.uuid for device in real))


def _name(device: DeviceGrant, known: frozenset[str]) -> str:
    """By uuid where the machine's specification has it: an index may mean another card after a reboot."""
    return next((name for name in (device.uuid, str(device.index)) if name in known), "")


def cdi_names(folders: Sequence[Path]) -> frozenset[str]:
    """Names of the devices of our kind that the machine's CDI files declare. A broken file declares none."""
    found: set[str] = set()
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix in (".yaml", ".yml", ".json") and path.stat().st_size <= MAX_SPEC_BYTES:
                found |= _declared(path)
    return frozenset(found)


def _declared(path: Path) -> set[str]:
    import yaml  # a megabyte that a machine without such files does not need

    try:
        document: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return set()
    if not isinstance(document, Mapping):
        return set()
    spec = cast("Mapping[str, Any]", document)
    if spec.get("kind") != KIND:
        return set()
    devices: list[Mapping[str, Any]] = spec.get("devices") or []
    return {str(device["name"]) for device in devices if "name" in device}
