"""Objects in S3 or anything that speaks its protocol.

Its presigned URLs bind key, method, time and a PUT's length. The store does not know our digests: whoever reads an
input or a result by its SHA-256 checks it (daemon and SDK do).
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from pydantic import SecretStr

from dantegpu.domain.clock import Clock
from dantegpu.kit.errors import Unavailable
from dantegpu.services.storage.signing import disposition
from dantegpu.services.storage.store.base import Grant, check_key

if TYPE_CHECKING:
    from obstore.store import S3Store

PARALLEL_REQUESTS = 16
_PROBE_KEY = "dante-ready"


@dataclass(frozen=True, slots=True)
class S3Config:
    """Where the bucket is. `endpoint` is the URL in front of `/<bucket>/<key>`; path-style requests."""

    endpoint: str
    bucket: str
    region: str
    access_key_id: str
    secret_access_key: SecretStr
    timeout_seconds: float = 20.0


class S3ObjectStore:
    """Component over one bucket."""

    def __init__(self, config: S3Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._parallel = asyncio.Semaphore(PARALLEL_REQUESTS)
        self._opened: S3Store | None = None

    async def start(self) -> None:
        # Imported late: with the embedded store nobody pays for it.
        from obstore.store import S3Store

        config = self._config
        self._opened = S3Store(
            config.bucket,
            endpoint=config.endpoint,
            region=config.region,
            access_key_id=config.access_key_id,
            secret_access_key=config.secret_access_key.get_secret_value(),
            client_options={
                "allow_http": config.endpoint.startswith("http://"),
                "timeout": f"{config.timeout_seconds:g}s",
            },
            retry_config={"max_retries": 3},
        )

    async def stop(self) -> None:
        self._opened = None

    @property
    def _store(self) -> "S3Store":
        if self._opened is None:
            raise AssertionError("the store has not started")
        return self._opened

    async def ready(self) -> None:
        await self._size_bytes(_PROBE_KEY)

    async def sizes_bytes(self, keys: Sequence[str]) -> list[int | None]:
        return await asyncio.gather(*(self._size_bytes(check_key(key)) for key in keys))

    async def _size_bytes(self, key: str) -> int | None:
        import obstore

        async with self._parallel:
            try:
                with _store_errors():
                    return (await obstore.head_async(self._store, key))["size"]
            except FileNotFoundError:
                return None

    async def delete(self, keys: Sequence[str]) -> None:
        import obstore

        paths = [check_key(key) for key in keys]
        if paths:
            with contextlib.suppress(FileNotFoundError), _store_errors():
                await obstore.delete_async(self._store, paths)

    async def write(self, key: str, data: bytes) -> None:
        import obstore

        with _store_errors():
            await obstore.put_async(self._store, check_key(key), data, use_multipart=False)

    async def read(self, key: str, offset: int, length: int) -> tuple[bytes, int] | None:
        import obstore

        size_bytes = await self._size_bytes(check_key(key))
        if size_bytes is None:
            return None
        end = min(offset + length, size_bytes)
        if offset >= end:
            return b"", size_bytes
        try:
            with _store_errors():
                return bytes(await obstore.get_range_async(self._store, key, start=offset, end=end)), size_bytes
        except FileNotFoundError:
            return None

    def url(self, grant: Grant) -> str:
        return presigned(self._config, grant, self._clock.now())


def presigned(config: S3Config, grant: Grant, now: datetime) -> str:
    """A presigned S3 URL. Unlike obstore's own it can bind a PUT's length (Content-Length is a signed header) and give
    a GET its download name.

    Source: "Authenticating Requests: Using Query Parameters (AWS Signature Version 4)", Amazon S3 API Reference.
    """
    prefix = urlsplit(config.endpoint).path.rstrip("/")
    return presigned_at(config, grant, now, f"{prefix}/{quote(config.bucket)}/{quote(grant.key)}")


def presigned_at(config: S3Config, grant: Grant, now: datetime, path: str) -> str:
    """The same for an object whose URL has this path, percent-encoded."""
    endpoint = urlsplit(config.endpoint)
    time = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{time[:8]}/{config.region}/s3/aws4_request"
    headers = {"host": endpoint.netloc}
    if grant.method == "PUT":
        headers["content-length"] = str(grant.size_bytes)
    signed_headers = ";".join(sorted(headers))
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{config.access_key_id}/{scope}",
        "X-Amz-Date": time,
        "X-Amz-Expires": str(grant.expires_at_unix_s - int(now.timestamp())),
        "X-Amz-SignedHeaders": signed_headers,
    }
    if grant.method == "GET" and grant.name:
        query["response-content-disposition"] = disposition(grant.name)
    query_text = _query(query)
    canonical = "\n".join([
        grant.method,
        path,
        query_text,
        *(f"{name}:{headers[name]}" for name in sorted(headers)),
        "",
        signed_headers,
        "UNSIGNED-PAYLOAD",
    ])  # fmt: skip
    to_sign = "\n".join(["AWS4-HMAC-SHA256", time, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = b"AWS4" + config.secret_access_key.get_secret_value().encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    return f"{endpoint.scheme}://{endpoint.netloc}{path}?{query_text}&X-Amz-Signature={signature}"


def _query(values: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='')}={quote(values[name], safe='')}" for name in sorted(values))


@contextmanager
def _store_errors() -> Generator[None]:
    """What obstore raises, in our words. FileNotFoundError passes."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError:
        raise
    except (exceptions.BaseError, OSError) as error:
        # Its text may name the endpoint; it never holds the secret key.
        raise Unavailable("the object store", type(error).__name__) from error
