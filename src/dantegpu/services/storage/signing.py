"""Presigned URLs of the embedded store: one key, one method, a length, a digest, a time, under an HMAC."""

import hmac
import os
import secrets
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, urlencode

from pydantic import SecretBytes

from dantegpu.services.storage.errors import UrlExpired, UrlRefused
from dantegpu.services.storage.store.base import Grant

KEY_FILE = "storage-url.key"
KEY_BYTES = 32


def load_or_create_key(folder: Path) -> SecretBytes:
    """The signing key in `folder`, mode 0600; made at the first call."""
    path = folder / KEY_FILE
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        temporary = folder / f".{KEY_FILE}.{secrets.token_hex(8)}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(temporary, path)  # two processes at their first start: the first link wins, both read it
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return SecretBytes(path.read_bytes())


def signed_url(base_url: str, grant: Grant, key: SecretBytes) -> str:
    query = {"m": grant.method, "e": str(grant.expires_at_unix_s)}
    if grant.method == "PUT":
        query |= {"l": str(grant.size_bytes), "h": grant.sha256}
    if grant.name:
        query["n"] = grant.name
    query["s"] = _signature(grant, key)
    return f"{base_url.rstrip('/')}/o/{quote(grant.key)}?{urlencode(query)}"


def verify(method: str, key_text: str, query: Mapping[str, str], now_unix_s: float, key: SecretBytes) -> Grant:
    """The grant of a request for `/o/<key>`. HEAD is allowed where GET is. Raises UrlRefused, UrlExpired."""
    try:
        grant = Grant(
            method=query["m"],
            key=key_text,
            expires_at_unix_s=int(query["e"]),
            size_bytes=int(query.get("l", "0")),
            sha256=query.get("h", ""),
            name=query.get("n", ""),
        )
        signature = query["s"]
    except (KeyError, ValueError):
        raise UrlRefused("this is not a complete presigned URL; ask the platform for one") from None
    if not hmac.compare_digest(_signature(grant, key).encode(), signature.encode("utf-8", "replace")):
        raise UrlRefused("the URL was altered: its signature does not fit; ask the platform for a new one")
    if now_unix_s >= grant.expires_at_unix_s:
        raise UrlExpired("the URL is over; ask the platform for a new one")
    if method != grant.method and (method, grant.method) != ("HEAD", "GET"):
        raise UrlRefused(f"the URL is for {grant.method}, not for {method}")
    return grant


def disposition(name: str) -> str:
    """Content-Disposition of a download. `attachment`: a job's HTML must never run as a page of the platform."""
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}"


def _signature(grant: Grant, key: SecretBytes) -> str:
    # Lengths before texts: no two different grants give the same bytes.
    fields = [grant.method, grant.key, str(grant.expires_at_unix_s), str(grant.size_bytes), grant.sha256, grant.name]
    message = "".join(f"{len(field)}:{field}" for field in fields)
    return hmac.new(key.get_secret_value(), message.encode(), sha256).hexdigest()
