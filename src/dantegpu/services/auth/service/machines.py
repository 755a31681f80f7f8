"""Machines: join tokens, enrolment, credentials for NATS."""

import base64
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dantegpu.domain.clock import Clock
from dantegpu.domain.ids import JoinTokenId, MachineId, TeamId
from dantegpu.kit.actor import Actor
from dantegpu.kit.db import Tx
from dantegpu.kit.errors import InvalidArgument
from dantegpu.kit.nats_jwt import is_user_public_key, machine_permissions, sign_user_jwt
from dantegpu.services.auth import store
from dantegpu.services.auth.audit import AuditEvent, AuditKind, AuditLog
from dantegpu.services.auth.errors import (
    InvalidJoinToken,
    InvalidProof,
    MachineNotFound,
    MachineOfAnotherTeam,
    MachineRevoked,
)
from dantegpu.services.auth.secrets import Secrets, new_token, token_sha256
from dantegpu.services.auth.service.common import require_user
from dantegpu.services.auth.settings import AuthSettings
from dantegpu.services.auth.store import JoinTokenRow, MachineRow

JOIN_TOKEN_PREFIX: Final = "dante_join_"
DEFAULT_JOIN_TOKEN_SECONDS: Final = 3600
MAX_JOIN_TOKEN_SECONDS: Final = 30 * 86_400
MAX_JOIN_TOKEN_USES: Final = 10_000
MAX_CLOCK_DIFFERENCE_SECONDS: Final = 300
_WRONG_SIGNATURE: Final = "signature: it is not one of the machine's key over the expected text"
_SIGNATURE: Final = re.compile(r"[A-Za-z0-9_-]{86}(==)?")


@dataclass(frozen=True, slots=True)
class Credential:
    """With which a machine connects to NATS until `expires_at`."""

    machine_id: MachineId
    team_id: TeamId
    nats_user_jwt: str = field(repr=False)
    expires_at: datetime


class Machines:
    """Use cases of machines: each holds a key pair and gets credentials for it."""

    def __init__(self, secrets: Secrets, audit: AuditLog, clock: Clock, settings: AuthSettings) -> None:
        self._secrets = secrets
        self._audit = audit
        self._clock = clock
        self._credential_seconds = settings.machine_credential_seconds

    async def create_join_token(
        self, tx: Tx, actor: Actor, expires_in_seconds: int, max_uses: int
    ) -> tuple[str, datetime]:
        """A token for machines of the acting team, and when it expires. Raises Unauthenticated, Forbidden."""
        user_id, team_id = require_user(actor), actor.require_writer()
        seconds = expires_in_seconds or DEFAULT_JOIN_TOKEN_SECONDS
        uses = max_uses or 1
        if not 0 < seconds <= MAX_JOIN_TOKEN_SECONDS:
            raise InvalidArgument(f"expires_in_seconds: expected at most {MAX_JOIN_TOKEN_SECONDS} (30 days)")
        if not 0 < uses <= MAX_JOIN_TOKEN_USES:
            raise InvalidArgument(f"max_uses: expected 1 to {MAX_JOIN_TOKEN_USES}")
        now = self._clock.now()
        token_id, token = JoinTokenId.new(), new_token(JOIN_TOKEN_PREFIX)
        expires_at = now + timedelta(seconds=seconds)
        await store.insert_join_token(
            tx, id=token_id.uuid, token_sha256=token_sha256(token), team_id=team_id.uuid, created_by=user_id.uuid,
            now=now, expires_at=expires_at, max_uses=uses,
        )  # fmt: skip
        await self._audit.add(tx, [AuditEvent(AuditKind.JOIN_TOKEN_CREATED, user_id, team_id, token_id)])
        return token, expires_at

    async def enrol(
        self, tx: Tx, join_token: str, public_key: str, signed_at_unix_seconds: int, signature: str
    ) -> Credential:
        """The machine of `public_key`: a new one, or the same again when the answer was lost.

        Raises InvalidProof, InvalidJoinToken, MachineOfAnotherTeam.
        """
        text = f"dante-enrol\n{public_key}\n{signed_at_unix_seconds}"
        self._check_proof(public_key, text, signed_at_unix_seconds, signature)
        token = await store.lock_join_token(tx, token_sha256(join_token))
        if token is None:
            raise InvalidJoinToken()
        machine = await store.machine_by_key(tx, public_key)
        if machine is None:
            machine = await self._insert(tx, token, public_key)
        elif machine.team_id != token.team_id:
            raise MachineOfAnotherTeam()
        elif machine.join_token_id != token.id and not self._usable(token):
            # The token that it joined with is good for asking again, also when used up: the answer may be lost.
            raise InvalidJoinToken()
        return self._credential(machine)

    async def renew(self, tx: Tx, machine_id: MachineId, signed_at_unix_seconds: int, signature: str) -> Credential:
        """Raises MachineRevoked, InvalidProof; the latter also for an absent machine: nobody shall try out ids."""
        self._check_time(signed_at_unix_seconds)
        machine = await store.lock_machine(tx, machine_id.uuid)
        text = f"dante-renew\n{machine_id}\n{signed_at_unix_seconds}"
        if machine is None or not _verify(machine.public_key, text, signature):
            raise InvalidProof(_WRONG_SIGNATURE)
        if machine.revoked_at is not None:
            raise MachineRevoked(machine_id)
        await store.note_renewal(tx, machine.id, self._clock.now())
        return self._credential(machine)

    async def revoke(self, tx: Tx, actor: Actor, machine_id: MachineId) -> None:
        """No further credentials; the last one works until it expires. Again: nothing.

        Raises MachineNotFound, Forbidden, Unauthenticated.
        """
        may_all = actor.operator or actor.is_service
        team_id = None if may_all else actor.require_team()
        machine = await store.lock_machine(tx, machine_id.uuid)
        if machine is None or (team_id is not None and machine.team_id != team_id.uuid):
            raise MachineNotFound(machine_id)
        if not may_all:
            actor.require_writer()
        if await store.revoke_machine(tx, machine.id, self._clock.now()):
            event = AuditEvent(AuditKind.MACHINE_REVOKED, actor.user_id, TeamId(machine.team_id), machine_id)
            await self._audit.add(tx, [event])

    async def _insert(self, tx: Tx, token: JoinTokenRow, public_key: str) -> MachineRow:
        if not self._usable(token):
            raise InvalidJoinToken()
        machine = MachineRow(MachineId.new().uuid, token.team_id, public_key, token.id, None)
        if not await store.insert_machine(
            tx, id=machine.id, team_id=machine.team_id, public_key=public_key, join_token_id=token.id,
            now=self._clock.now(),
        ):  # fmt: skip
            # The same key joined with another token at this moment.
            existing = await store.machine_by_key(tx, public_key)
            if existing is None or existing.team_id != token.team_id:
                raise MachineOfAnotherTeam()
            return existing
        await store.use_join_token(tx, token.id)
        event = AuditEvent(
            AuditKind.MACHINE_ENROLLED, team_id=TeamId(token.team_id), subject=MachineId(machine.id),
            detail=str(JoinTokenId(token.id)),
        )  # fmt: skip
        await self._audit.add(tx, [event])
        return machine

    def _usable(self, token: JoinTokenRow) -> bool:
        return token.uses < token.max_uses and self._clock.now() < token.expires_at

    def _check_proof(self, public_key: str, text: str, signed_at_unix_seconds: int, signature: str) -> None:
        if not is_user_public_key(public_key):
            raise InvalidProof("public_key: expected the public half of an nkeys user key, U and 55 more characters")
        self._check_time(signed_at_unix_seconds)
        if not _verify(public_key, text, signature):
            raise InvalidProof(_WRONG_SIGNATURE)

    def _check_time(self, signed_at_unix_seconds: int) -> None:
        difference = abs(signed_at_unix_seconds - int(self._clock.now().timestamp()))
        if difference > MAX_CLOCK_DIFFERENCE_SECONDS:
            raise InvalidProof(
                f"signed_at is {difference} s away from the server's time; set the machine's clock (NTP) and try again"
            )

    def _credential(self, machine: MachineRow) -> Credential:
        machine_id = MachineId(machine.id)
        account = self._secrets.nats_account
        expires_at = self._clock.now().replace(microsecond=0) + timedelta(seconds=self._credential_seconds)
        user_jwt = sign_user_jwt(
            account.seed, account.public, machine.public_key, str(machine_id), machine_permissions(machine_id),
            expires_at,
        )  # fmt: skip
        return Credential(machine_id, TeamId(machine.team_id), user_jwt, expires_at)


def _verify(public_key: str, text: str, signature: str) -> bool:
    """`public_key` is well-formed: type byte, 32 bytes of key, checksum in base32."""
    if not _SIGNATURE.fullmatch(signature):
        return False
    raw_key = base64.b32decode(public_key)[1:33]
    raw_signature = base64.urlsafe_b64decode(signature.rstrip("=") + "==")
    try:
        Ed25519PublicKey.from_public_bytes(raw_key).verify(raw_signature, text.encode())
    except InvalidSignature:
        return False
    return True
