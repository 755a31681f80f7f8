"""Who this machine is: a key pair made here, and a short-lived credential for NATS that the platform signs for it.

The seed never leaves the state folder. Enrolment and renewal go over HTTPS to the gateway, each proved by a signature.
"""

import base64
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import structlog
from pydantic import AwareDatetime, BaseModel, SecretStr, ValidationError

from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.contracts.rest.machines import DeviceReport, InventoryReport, MachineCredentials
from dantegpu.domain.ids import MachineId
from dantegpu.kit.nats_jwt import NatsKey, create_user_key, load_key, sign_with_seed

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_SECONDS = 15.0
RENEW_AT_FRACTION = 0.5
"""Of the credential's life: enough is left to live through an outage of the gateway."""


class EnrolmentRefused(Exception):
    """The platform said no: the message says why and what to do."""


class GatewayUnreachable(Exception):
    """The gateway does not answer; nothing was changed, try again later."""


class _Saved(BaseModel):
    gateway_url: str
    machine_id: str
    team_id: str
    nats_url: str
    nats_user_jwt: str
    issued_at: AwareDatetime
    expires_at: AwareDatetime


@dataclass(slots=True)
class Identity:
    """Loaded from the state folder, or made by `enrol`."""

    folder: Path
    key: NatsKey
    saved: _Saved | None

    @classmethod
    def load(cls, folder: Path) -> "Identity":
        """The key is made at the first start. Raises EnrolmentRefused when the files are damaged."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        seed_file = folder / "machine.nk"
        try:
            if seed_file.exists():
                key = load_key(SecretStr(seed_file.read_text().strip()))
            else:
                key = create_user_key()
                _write_private(seed_file, key.seed.get_secret_value())
            credential = folder / "machine.json"
            saved = _Saved.model_validate_json(credential.read_text()) if credential.exists() else None
        except (ValueError, ValidationError) as error:
            raise EnrolmentRefused(f"the machine's identity in {folder} is damaged ({error}); enrol it again") from None
        return cls(folder, key, saved)

    @property
    def enrolled(self) -> bool:
        return self.saved is not None

    @property
    def _known(self) -> _Saved:
        if self.saved is None:
            raise EnrolmentRefused("this machine is not enrolled: dante provider join URL --token TOKEN")
        return self.saved

    @property
    def machine_id(self) -> MachineId:
        return MachineId.parse(self._known.machine_id)

    @property
    def nats_url(self) -> str:
        return self._known.nats_url

    @property
    def expired(self) -> bool:
        return datetime.now(UTC) >= self._known.expires_at

    @property
    def renewal_due(self) -> bool:
        life: timedelta = self._known.expires_at - self._known.issued_at
        return datetime.now(UTC) >= self._known.issued_at + life * RENEW_AT_FRACTION

    def credentials(self) -> tuple[str, str]:
        """(user JWT, seed), asked for at each connect to NATS."""
        return self._known.nats_user_jwt, self.key.seed.get_secret_value()

    async def enrol(self, gateway_url: str, join_token: SecretStr, inventory: machine_pb2.Inventory) -> None:
        """Join the platform; the same key again is the same machine. Raises EnrolmentRefused, GatewayUnreachable."""
        signed_at = int(time.time())
        body = {
            "join_token": join_token.get_secret_value(),
            "public_key": self.key.public,
            "signed_at": signed_at,
            "signature": self._sign(f"dante-enrol\n{self.key.public}\n{signed_at}"),
            "inventory": inventory_report(inventory).model_dump(),
        }
        self._save(gateway_url, await _post(gateway_url, "/v1/machines", body))
        log.info("machine_enrolled", machine_id=self._known.machine_id)

    async def renew(self) -> None:
        """A fresh credential for NATS. Raises EnrolmentRefused (the machine has left), GatewayUnreachable."""
        known = self._known
        signed_at = int(time.time())
        body = {
            "signed_at": signed_at,
            "signature": self._sign(f"dante-renew\n{known.machine_id}\n{signed_at}"),
        }
        answer = await _post(known.gateway_url, f"/v1/machines/{known.machine_id}/credentials", body)
        self._save(known.gateway_url, answer)
        log.info("credential_renewed", expires_at=str(self._known.expires_at))

    def _sign(self, text: str) -> str:
        signature = sign_with_seed(self.key.seed, text.encode())
        return base64.urlsafe_b64encode(signature).decode().rstrip("=")

    def _save(self, gateway_url: str, credential: MachineCredentials) -> None:
        self.saved = _Saved(
            gateway_url=gateway_url,
            machine_id=credential.machine_id,
            team_id=credential.team_id,
            nats_url=credential.nats_url,
            nats_user_jwt=credential.nats_user_jwt,
            issued_at=datetime.now(UTC),
            expires_at=credential.expires_at,
        )
        _write_private(self.folder / "machine.json", self.saved.model_dump_json())

    def reach_at(self, gateway_url: str) -> None:
        """The platform has moved: credentials are renewed at its new address. "" changes nothing."""
        if self.saved is not None and gateway_url and gateway_url != self.saved.gateway_url:
            self.saved = self.saved.model_copy(update={"gateway_url": gateway_url})
            _write_private(self.folder / "machine.json", self.saved.model_dump_json())

    def forget(self) -> None:
        """After the machine has left the platform."""
        (self.folder / "machine.json").unlink(missing_ok=True)
        self.saved = None


def inventory_report(inventory: machine_pb2.Inventory) -> InventoryReport:
    """The same inventory as REST has it."""
    return InventoryReport(
        hostname=inventory.hostname,
        cpu_milli=inventory.cpu_milli,
        memory_bytes=inventory.memory_bytes,
        disk_bytes=inventory.disk_bytes,
        os=inventory.os,
        kernel=inventory.kernel,
        driver_version=inventory.driver_version,
        cuda_version=inventory.cuda_version,
        devices=[
            DeviceReport(
                index=device.index,
                model=device.model,
                uuid=device.uuid,
                vram_bytes=device.vram_bytes,
                compute_capability=device.compute_capability,
                pcie_bus_id=device.pcie_bus_id,
                simulated=device.simulated,
            )
            for device in inventory.devices
        ],
        sandbox=inventory.sandbox,
        executors=list(inventory.executors),
        limits_missing=list(inventory.limits_missing),
        container_engine=inventory.container_engine,
        allowed_images=list(inventory.allowed_images),
        networks=list(inventory.networks),
        site=inventory.site,
        daemon_version=inventory.daemon_version,
        region=inventory.region,
        simulated=inventory.simulated,
        shares_devices=inventory.shares_devices,
    )


async def _post(gateway_url: str, path: str, body: dict[str, Any]) -> MachineCredentials:
    try:
        # Without TLS there is nothing to verify; reading all authorities' certificates would cost 10 MB.
        verify = not gateway_url.startswith("http://")
        async with httpx.AsyncClient(base_url=gateway_url, timeout=REQUEST_TIMEOUT_SECONDS, verify=verify) as client:
            response = await client.post(path, json=body)
    except httpx.HTTPError as error:
        raise GatewayUnreachable(f"{gateway_url} does not answer ({error or type(error).__name__})") from error
    if response.status_code >= 500 or response.status_code == 429:
        raise GatewayUnreachable(f"{gateway_url} answered {response.status_code}")
    if response.status_code >= 400:
        raise EnrolmentRefused(_problem_text(response))
    try:
        return MachineCredentials.model_validate_json(response.content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, entry["loc"])) for entry in error.errors())
        raise EnrolmentRefused(f"{gateway_url}{path} answered something else than a credential ({fields})") from None


class _Problem(BaseModel):
    """RFC 9457."""

    title: str = ""
    detail: str = ""


def _problem_text(response: httpx.Response) -> str:
    try:
        problem = _Problem.model_validate_json(response.content)
    except ValidationError:
        problem = _Problem()
    return problem.detail or problem.title or f"the platform answered {response.status_code}"


def _write_private(path: Path, text: str) -> None:
    """0600 from its first byte on, and never half."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
