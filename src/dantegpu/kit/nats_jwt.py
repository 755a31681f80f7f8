"""NATS decentralised authentication: an operator vouches for accounts, an account for users, all by signed tokens.

The server knows the operator's and the account's tokens from its configuration. A user's token is signed by the
account alone, so a machine joins without any change at the server.

Source: NATS documentation, "JWTs" and "Decentralized JWT Authentication/Authorization"; nats-io/jwt v2 (claims).
"""

import base64
import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import nkeys
from pydantic import BaseModel, SecretStr, ValidationError

from dantegpu.contracts import subjects
from dantegpu.domain.ids import MachineId

JETSTREAM_FILE_BYTES_MAX: Final = 4 * 1024**3
JETSTREAM_MEMORY_BYTES_MAX: Final = 64 * 1024**2
CONNECTIONS_MAX: Final = 50_000
"""Of one account: services and machines together."""

_OPERATOR: Final[int] = nkeys.PREFIX_BYTE_OPERATOR
_ACCOUNT: Final[int] = nkeys.PREFIX_BYTE_ACCOUNT
_USER: Final[int] = nkeys.PREFIX_BYTE_USER
_UNLIMITED: Final = -1
_TRUST_FILE: Final = "trust.json"


class TrustFileDamaged(Exception):
    """The file with the platform's NATS keys cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class NatsKey:
    """An ed25519 key pair in NATS's text form. The seed is the secret half and never shows in a repr."""

    public: str
    seed: SecretStr


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects (wildcards allowed) that a user may publish and subscribe to; everything else is refused."""

    publish_allow: tuple[str, ...]
    subscribe_allow: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NatsTrust:
    """All keys and tokens of one platform's NATS: what a server is configured with and what signs its users."""

    operator: NatsKey
    operator_jwt: str
    system_account_public: str
    system_account_jwt: str
    account: NatsKey
    account_jwt: str

    @property
    def account_seed(self) -> SecretStr:
        return self.account.seed

    @property
    def account_public(self) -> str:
        return self.account.public


class _TrustSeeds(BaseModel):
    """The file's content. Tokens are not kept: they follow from the seeds and this version's limits."""

    operator_seed: SecretStr
    system_account_seed: SecretStr
    account_seed: SecretStr


def create_user_key() -> NatsKey:
    """A new key pair for a user: a machine makes its own and sends only the public half."""
    return _create_key(_USER)


def load_key(seed: SecretStr) -> NatsKey:
    """The key pair of `seed`. Raises ValueError when the text is not a NATS seed."""
    try:
        pair = nkeys.from_seed(seed.get_secret_value().encode())
        public = cast("bytes", pair.public_key).decode()
    except (nkeys.NkeysError, ValueError) as error:
        # `from None`: the original error might quote the seed.
        raise ValueError(f"not a NATS seed ({type(error).__name__})") from None
    return NatsKey(public=public, seed=seed)


def sign_with_seed(seed: SecretStr, data: bytes) -> bytes:
    """The ed25519 signature of `data`, for example of the nonce that a server sends to a connecting client."""
    return nkeys.from_seed(seed.get_secret_value().encode()).sign(data)


def is_user_public_key(text: str) -> bool:
    """Whether `text` is the well-formed public half of a user's key, checksum included (somebody else sent it)."""
    try:
        raw = base64.b32decode(text.encode("ascii"))
    except (ValueError, UnicodeEncodeError):
        return False
    body, checksum = raw[:-2], int.from_bytes(raw[-2:], "little")
    return len(raw) == 35 and raw[0] == _USER and nkeys.crc16(bytearray(body)) == checksum


def machine_permissions(machine_id: MachineId) -> Permissions:
    """A machine speaks only below its own subjects and hears only its replies and its desired attempts."""
    return Permissions(
        publish_allow=(f"{subjects.MACHINE_PREFIX}.{machine_id}.>",),
        subscribe_allow=(f"{subjects.machine_inbox_prefix(machine_id)}.>", subjects.machine_desired(machine_id)),
    )


def services_permissions() -> Permissions:
    """Everything in the platform's account."""
    return Permissions(publish_allow=(">",), subscribe_allow=(">",))


def create_trust() -> NatsTrust:
    """New keys and tokens for a new platform."""
    return _trust_of_seeds(_new_seeds())


def load_or_create_trust(folder: Path) -> NatsTrust:
    """The trust whose seeds lie in `folder` (file mode 0600); made at the first call.

    Raises TrustFileDamaged when the file is there but unreadable: making new keys then would lock out every machine.
    """
    path = folder / _TRUST_FILE
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        seeds = _new_seeds()
        _write_seeds(path, seeds)
        return _trust_of_seeds(seeds)
    advice = "Restore it from a backup; without it all machines have to join again."
    try:
        os.chmod(path, 0o600)
        return _trust_of_seeds(_TrustSeeds.model_validate_json(path.read_bytes()))
    except OSError as error:
        raise TrustFileDamaged(f"cannot read the NATS keys in {path}: {error.strerror}. {advice}") from error
    except (ValidationError, ValueError):
        # `from None`: pydantic's error quotes the file's content.
        raise TrustFileDamaged(f"the NATS keys in {path} are damaged. {advice}") from None


def sign_user_jwt(
    account_seed: SecretStr,
    account_public: str,
    user_public_key: str,
    name: str,
    permissions: Permissions,
    expires_at: datetime | None,
) -> str:
    """A token with which the holder of `user_public_key` connects until `expires_at` (aware; None = for ever).

    Raises ValueError when `user_public_key` is not a user's public key.
    """
    if not is_user_public_key(user_public_key):
        raise ValueError("not the public half of a NATS user key (U..., 56 characters)")
    nats = {
        "pub": {"allow": list(permissions.publish_allow)},
        "sub": {"allow": list(permissions.subscribe_allow)},
        "subs": _UNLIMITED,
        "data": _UNLIMITED,
        "payload": _UNLIMITED,
        "type": "user",
        "version": 2,
    }
    issuer = NatsKey(public=account_public, seed=account_seed)
    return _sign_claims(issuer, user_public_key, name, nats, expires_at)


def creds_file_text(user_jwt: str, seed: SecretStr) -> str:
    """The content of a `.creds` file as NATS clients read it. It holds the seed: write it with mode 0600."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed.get_secret_value()}\n------END USER NKEY SEED------\n"
    )


def _create_key(prefix: int) -> NatsKey:
    seed = nkeys.encode_seed(os.urandom(32), prefix).decode()
    return load_key(SecretStr(seed))


def _new_seeds() -> _TrustSeeds:
    return _TrustSeeds(
        operator_seed=_create_key(_OPERATOR).seed,
        system_account_seed=_create_key(_ACCOUNT).seed,
        account_seed=_create_key(_ACCOUNT).seed,
    )


def _trust_of_seeds(seeds: _TrustSeeds) -> NatsTrust:
    return _trust_of(load_key(seeds.operator_seed), load_key(seeds.system_account_seed), load_key(seeds.account_seed))


def _trust_of(operator: NatsKey, system_account: NatsKey, account: NatsKey) -> NatsTrust:
    operator_claims = {"system_account": system_account.public, "type": "operator", "version": 2}
    return NatsTrust(
        operator=operator,
        operator_jwt=_sign_claims(operator, operator.public, "dante", operator_claims, None),
        system_account_public=system_account.public,
        system_account_jwt=_sign_claims(operator, system_account.public, "system", _account_claims(0, 0), None),
        account=account,
        account_jwt=_sign_claims(
            operator,
            account.public,
            "platform",
            _account_claims(JETSTREAM_FILE_BYTES_MAX, JETSTREAM_MEMORY_BYTES_MAX),
            None,
        ),
    )


def _account_claims(jetstream_file_bytes_max: int, jetstream_memory_bytes_max: int) -> dict[str, Any]:
    """Limits of an account; 0 bytes of both kinds means: no JetStream."""
    limits: dict[str, Any] = {
        "subs": _UNLIMITED,
        "data": _UNLIMITED,
        "payload": _UNLIMITED,
        "imports": _UNLIMITED,
        "exports": _UNLIMITED,
        "wildcards": True,
        "conn": CONNECTIONS_MAX,
        "leaf": 0,
    }
    if jetstream_file_bytes_max or jetstream_memory_bytes_max:
        limits |= {
            "mem_storage": jetstream_memory_bytes_max,
            "disk_storage": jetstream_file_bytes_max,
            "streams": _UNLIMITED,
            "consumer": _UNLIMITED,
        }
    return {"limits": limits, "default_permissions": {"pub": {}, "sub": {}}, "type": "account", "version": 2}


def _sign_claims(
    issuer: NatsKey, subject_public: str, name: str, nats: dict[str, Any], expires_at: datetime | None
) -> str:
    claims: dict[str, Any] = {
        "iat": int(datetime.now(UTC).timestamp()),
        "iss": issuer.public,
        "name": name,
        "sub": subject_public,
        "nats": nats,
    }
    if expires_at is not None:
        if expires_at.tzinfo is None:
            raise ValueError("expires_at must carry its time zone")
        claims["exp"] = int(expires_at.timestamp())
    # The id is a hash of all other claims, in the alphabet NATS uses.
    claims["jti"] = base64.b32encode(hashlib.sha256(_json(claims)).digest()).decode().rstrip("=")
    header = {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = f"{_base64url(_json(header))}.{_base64url(_json(claims))}"
    return f"{signed}.{_base64url(sign_with_seed(issuer.seed, signed.encode()))}"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _write_seeds(path: Path, seeds: _TrustSeeds) -> None:
    """Write whole or not at all, readable by the owner only from the first moment on."""
    content = {name: cast("SecretStr", secret).get_secret_value() for name, secret in seeds}
    temporary = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
