"""Secrets of the platform: the key that encrypts what must not be readable in a database dump, and random tokens."""

import base64
import contextlib
import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from dantegpu.kit.nats_jwt import NatsKey, load_key, load_or_create_trust
from dantegpu.services.auth.settings import AuthSettings

KEY_FILE: Final = "auth.kek"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOKEN_CHARACTERS: Final = 43
"""62^43 > 2^256."""


class SecretsUnusable(Exception):
    """A key file is damaged, or does not fit the database; the message says which and what to do."""


def new_token(prefix: str) -> str:
    """`prefix` and 256 random bits."""
    return prefix + _base62(os.urandom(_KEY_BYTES))


def token_sha256(token: str) -> bytes:
    """What is stored of a token. A plain hash is enough: nobody can try 2^256 tokens."""
    return hashlib.sha256(token.encode()).digest()


def _base62(data: bytes) -> str:
    number = int.from_bytes(data)
    digits: list[str] = []
    for _ in range(_TOKEN_CHARACTERS):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


class Secrets:
    """Component: loads the key-encryption key (made at the first start) and the seed of the machines' NATS account."""

    def __init__(self, settings: AuthSettings) -> None:
        self._key_file = settings.key_encryption_key_file or settings.secrets_dir / KEY_FILE
        self._secrets_dir = settings.secrets_dir
        self._nats_seed_file = settings.nats_account_seed_file
        self._key = b""
        self._nats_account: NatsKey | None = None

    async def start(self) -> None:
        """Raises SecretsUnusable, TrustFileDamaged."""
        self._key = load_or_create_key(self._key_file)
        self._nats_account = self._load_nats_account()

    async def stop(self) -> None:
        pass

    @property
    def nats_account(self) -> NatsKey:
        if self._nats_account is None:
            raise RuntimeError("the secrets are not loaded yet")
        return self._nats_account

    def seal(self, purpose: str, data: bytes) -> bytes:
        """`data` encrypted and authenticated; opens only for the same purpose (AES-256-GCM, random nonce)."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + AESGCM(self._subkey("seal")).encrypt(nonce, data, purpose.encode())

    def open(self, purpose: str, sealed: bytes) -> bytes:
        """Raises SecretsUnusable when the key is another one or the data was changed."""
        try:
            return AESGCM(self._subkey("seal")).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], purpose.encode())
        except (InvalidTag, ValueError) as error:
            raise SecretsUnusable(
                f"the key in {self._key_file} is not the one that the database's secrets were encrypted with; "
                "restore that file from a backup"
            ) from error

    def mac(self, purpose: str, data: bytes) -> bytes:
        """HMAC-SHA-256 under a key of this purpose alone."""
        return hmac.digest(self._subkey(f"mac {purpose}"), data, "sha256")

    def follow_up_token(self, token: str, prefix: str) -> str:
        """The one token that comes after `token`: unpredictable without our key, the same when asked again."""
        return prefix + _base62(self.mac("refresh", token.encode()))

    def _subkey(self, purpose: str) -> bytes:
        if not self._key:
            raise RuntimeError("the secrets are not loaded yet")
        return hmac.digest(self._key, f"dante auth {purpose}".encode(), "sha256")

    def _load_nats_account(self) -> NatsKey:
        if self._nats_seed_file is None:
            return load_or_create_trust(self._secrets_dir).account
        try:
            return load_key(SecretStr(self._nats_seed_file.read_text().strip()))
        except OSError as error:
            raise SecretsUnusable(f"cannot read the NATS account's seed {self._nats_seed_file}: {error}") from error
        except ValueError as error:
            raise SecretsUnusable(f"{self._nats_seed_file} holds no seed of a NATS account") from error


def load_or_create_key(path: Path) -> bytes:
    """The 256-bit key in `path` (base64, mode 0600), made at the first call. Raises SecretsUnusable."""
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            _create_key(path)
    try:
        os.chmod(path, 0o600)
        key = base64.b64decode(path.read_bytes().strip(), validate=True)
    except OSError as error:
        raise SecretsUnusable(f"cannot read the key {path}: {error.strerror}") from error
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise SecretsUnusable(f"the key in {path} is damaged (expected {_KEY_BYTES} bytes in base64); restore it")
    return key


def _create_key(path: Path) -> None:
    """Whole or not at all, and never over a key that another replica just made. Raises FileExistsError then."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(os.urandom(_KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        temporary.unlink()
