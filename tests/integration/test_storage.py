"""storage-service: who may move which bytes, and what a presigned URL allows."""

import asyncio
import hashlib
import os
import resource
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from dantegpu.contracts.gen.dante.v1 import storage_pb2 as pb
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.kit.actor import ANONYMOUS, Actor
from dantegpu.kit.errors import RemoteError, ServiceError
from dantegpu.kit.rpc import call
from dantegpu.services.storage.errors import DiskFull
from dantegpu.services.storage.settings import StorageSettings
from dantegpu.services.storage.store.base import Grant
from dantegpu.services.storage.store.s3 import S3Config, presigned, presigned_at
from tests.fixtures.actors import a_machine, a_member, an_operator
from tests.fixtures.storage import StorageClient, StorageReplica, sha256_of

TIMEOUT_SECONDS = 20.0


def a_key(name: str = "model.npz") -> str:
    return f"results/{JobId.new()}/1/{name}"


async def refused(awaitable: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await awaitable
    return caught.value


async def put(url: str, data: bytes, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(verify=False) as http:
        return await http.put(url, content=data, headers=headers)


async def get(url: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(verify=False) as http:
        return await http.get(url, headers=headers)


# --- blobs ------------------------------------------------------------------------------------------------------------


async def test_a_blob_is_uploaded_once_per_team(storage: StorageClient):
    team, other, data = TeamId.new(), TeamId.new(), b"a packed folder"
    [upload] = await storage.prepare(team, data)
    assert (upload.exists, upload.sha256) == (False, sha256_of(data))
    assert await storage.stat_blobs(team, data) == [-1]
    assert (await put(upload.url, data)).status_code == 200
    [again, new] = await storage.prepare(team, data, b"another")
    assert (again.exists, again.url, new.exists) == (True, "", False)
    assert await storage.stat_blobs(team, data, b"another") == [len(data), -1]
    assert await storage.stat_blobs(other, data) == [-1]
    assert not (await storage.prepare(other, data))[0].exists


@pytest.mark.parametrize(
    ("sha256", "size_bytes", "type_"),
    [
        ("ab", 1, "invalid-argument"),
        ("A" * 64, 1, "invalid-argument"),
        ("../" + "a" * 61, 1, "invalid-argument"),
        ("a" * 64, -1, "invalid-argument"),
        ("a" * 64, (10 << 30) + 1, "object-too-large"),
    ],
)
async def test_an_impossible_blob_is_refused(storage: StorageClient, sha256: str, size_bytes: int, type_: str):
    request = pb.PrepareUploadsRequest(blobs=[pb.BlobWant(sha256=sha256, size_bytes=size_bytes)])
    error = await refused(call(storage.stub.PrepareUploads, request, actor=a_member(TeamId.new())))
    assert error.remote_type == type_


async def test_viewers_and_strangers_prepare_no_uploads(storage: StorageClient):
    team = TeamId.new()
    assert (await refused(storage.prepare(team, b"x", actor=a_member(team, "viewer")))).remote_type == "forbidden"
    assert (await refused(storage.prepare(team, b"x", actor=ANONYMOUS))).remote_type == "unauthenticated"


@pytest.mark.parametrize("actor", [a_member(TeamId.new()), an_operator(), a_machine(TeamId.new()), ANONYMOUS])
async def test_only_services_touch_objects_by_key(storage: StorageClient, actor: Actor):
    key = a_key()
    calls = [
        storage.put(key, b"x", actor=actor),
        storage.get(key, actor=actor),
        storage.size(key, actor=actor),
        storage.presign(pb.Presign(method=pb.Presign.GET, key=key), actor=actor),
        storage.stat_blobs(TeamId.new(), b"x", actor=actor),
    ]
    assert {(await refused(each)).remote_type for each in calls} == {"forbidden"}


async def test_objects_by_key_have_bounds(storage: StorageClient):
    key = a_key()
    await storage.put(key, b"0123456789")
    assert await storage.get(key, 2, 3) == pb.GetObjectResponse(data=b"234", size_bytes=10)
    assert await storage.get(key, 20, 3) == pb.GetObjectResponse(size_bytes=10)
    assert await storage.get(a_key()) == pb.GetObjectResponse(size_bytes=-1)
    assert [await storage.size(key), await storage.size(a_key())] == [10, -1]
    assert (await refused(storage.get(key, -1))).remote_type == "invalid-argument"
    assert (await refused(storage.put(key, b"x" * ((16 << 20) + 1)))).remote_type == "object-too-large"
    assert (await refused(storage.put("results/../x/y", b"x"))).remote_type == "invalid-object-key"
    nothing = pb.Presign(key=key)
    assert (await refused(storage.presign(nothing))).remote_type == "invalid-argument"
    escape = pb.Presign(method=pb.Presign.GET, key="results/../../secrets/storage-url.key")
    assert (await refused(storage.presign(escape))).remote_type == "invalid-object-key"


# --- presigned URLs ---------------------------------------------------------------------------------------------------


async def test_a_url_is_over_after_its_time(storage: StorageClient):
    key, data = a_key(), b"model"
    upload, download = await storage.put_url(key, data), await storage.get_url(key)
    storage.clock.advance(899)
    assert (await put(upload, data)).status_code == 200
    assert (await get(download)).content == data
    storage.clock.advance(1)
    for response in (await put(upload, data), await get(download)):
        assert response.status_code == 403
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "url-expired"


def _altered(url: str) -> list[str]:
    """The URL with each of its parts changed, one at a time, and its expiry given twice."""
    parts = urlsplit(url)
    pairs = [pair.split("=", 1) for pair in parts.query.split("&")]
    front = url.split("?", maxsplit=1)[0]
    changed = [
        front + "?" + "&".join(f"{n}={_other(v) if i == number else v}" for i, (n, v) in enumerate(pairs))
        for number in range(len(pairs))
    ]
    missing = [front + "?" + "&".join(f"{n}={v}" for n, v in pairs if n != name) for name, _ in pairs]
    return [*changed, *missing, url + "&e=99999999999", f"{front}x?{parts.query}", front, f"{front}?e=%00&s=%ff&m=x"]


def _other(value: str) -> str:
    return ("1" if value[:1] != "1" else "2") + value[1:]


async def test_an_altered_or_forged_url_is_refused(storage: StorageClient):
    key, data = a_key(), b"model"
    upload = await storage.put_url(key, data)
    for url in _altered(upload):
        response = await put(url, data)
        assert (response.status_code, response.json()["code"]) == (403, "url-refused"), url
    assert await storage.size(key) == -1
    await storage.put(key, data)
    for url in _altered(await storage.get_url(key, "name.bin")):
        assert (await get(url)).status_code == 403, url


async def test_urls_of_another_key_file_are_forged(storage_replica: StorageReplica, tmp_path: Path):
    async with storage_replica() as storage:
        url = urlsplit(await storage.get_url(a_key()))
    async with storage_replica(secrets_dir=tmp_path / "elsewhere") as other:
        response = await get(f"http://127.0.0.1:{other.http_port}{url.path}?{url.query}")
        assert (response.status_code, response.json()["code"]) == (403, "url-refused")


async def test_urls_outlive_a_restart_and_their_key_is_private(storage_replica: StorageReplica, tmp_path: Path):
    key = a_key()
    async with storage_replica() as storage:
        await storage.put(key, b"x")
        url = urlsplit(await storage.get_url(key))
    mode = stat.S_IMODE((tmp_path / "secrets" / "storage-url.key").stat().st_mode)
    assert mode == 0o600
    async with storage_replica() as storage:
        assert (await get(f"http://127.0.0.1:{storage.http_port}{url.path}?{url.query}")).content == b"x"


async def test_other_content_of_the_right_length_is_refused_and_invisible(storage: StorageClient):
    key = a_key()
    url = await storage.put_url(key, b"what was announced")
    response = await put(url, b"what was not said!")
    assert (response.status_code, response.json()["code"]) == (422, "digest-mismatch")
    assert (await storage.size(key), storage.files()) == (-1, [])
    await storage.put(key, b"what was there before")
    assert (await put(url, b"what was not said!")).status_code == 422
    assert (await storage.get(key)).data == b"what was there before"


async def test_too_much_is_refused_before_it_is_sent_and_while_it_is(storage: StorageClient):
    url = await storage.put_url(a_key(), b"12345")
    announced = await put(url, b"123456")
    assert (announced.status_code, announced.json()["code"]) == (413, "object-too-large")

    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"123"

    async with httpx.AsyncClient(verify=False) as http:
        assert (await http.put(url, content=unannounced())).status_code == 413
    assert storage.files() == []


async def test_a_refused_upload_leaves_the_connection_usable(storage: StorageClient):
    key, data = a_key(), b"x" * 200_000
    url = await storage.put_url(key, data)
    async with httpx.AsyncClient(verify=False) as http:
        assert (await http.put(url, content=data + b"y")).status_code == 413
        assert (await http.put(url, content=data)).status_code == 200


async def test_an_upload_that_is_cut_off_leaves_nothing(storage: StorageClient):
    key, data = a_key(), os.urandom(3 << 20)
    url = urlsplit(await storage.put_url(key, data))
    reader, writer = await asyncio.open_connection("127.0.0.1", storage.http_port)
    head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data[:-1])
    await writer.drain()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not storage.files():  # it is being written
            await asyncio.sleep(0.005)
        writer.transport.abort()
        while storage.files():
            await asyncio.sleep(0.005)
    assert await storage.size(key) == -1
    with suppress(ConnectionError):
        await reader.read()


async def test_an_upload_that_stalls_is_ended(storage_replica: StorageReplica):
    async with storage_replica(idle_seconds=0.2) as storage:
        url = urlsplit(await storage.put_url(a_key(), b"x" * 100))
        reader, writer = await asyncio.open_connection("127.0.0.1", storage.http_port)
        writer.write(f"PUT {url.path}?{url.query} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nxxx".encode())
        async with asyncio.timeout(TIMEOUT_SECONDS):
            answer = await reader.read()
        assert b" 408 " in answer.splitlines()[0]
        assert b"upload-idle" in answer
        assert storage.files() == []
        writer.close()


async def test_what_a_crash_left_of_uploads_is_swept_at_the_next_start(storage_replica: StorageReplica, tmp_path: Path):
    incoming = tmp_path / "objects" / "incoming"
    incoming.mkdir(parents=True)
    (incoming / "abandoned").write_bytes(b"half of")
    async with storage_replica() as storage:
        assert storage.files() == []


async def test_more_uploads_than_there_are_places_wait_outside(storage_replica: StorageReplica):
    async with storage_replica(uploads_max=1) as storage:
        first, second = a_key(), a_key()
        url = urlsplit(await storage.put_url(first, b"xx"))
        _, writer = await asyncio.open_connection("127.0.0.1", storage.http_port)
        writer.write(f"PUT {url.path}?{url.query} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nx".encode())
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not storage.files():
                await asyncio.sleep(0.005)
        response = await put(await storage.put_url(second, b"y"), b"y")
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        writer.write(b"x")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while await storage.size(first) != 2:
                await asyncio.sleep(0.005)
        assert (await put(await storage.put_url(second, b"y"), b"y")).status_code == 200
        writer.close()


async def test_a_file_and_a_folder_of_one_name_are_refused(storage: StorageClient):
    key = a_key("a")
    await storage.put(key, b"x")
    below = f"{key}/b"
    assert (await refused(storage.put(below, b"y"))).remote_type == "invalid-object-key"
    response = await put(await storage.put_url(below, b"y"), b"y")
    assert (response.status_code, response.json()["code"]) == (422, "invalid-object-key")
    assert await storage.size(below) == -1


async def test_downloads_answer_head_ranges_and_hide_from_browsers(storage: StorageClient):
    key, data = a_key("page.html"), bytes(range(100))
    await storage.put(key, data)
    url = await storage.get_url(key)
    async with httpx.AsyncClient(verify=False) as http:
        head = await http.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "100", b"")
    assert head.headers["content-disposition"] == "attachment; filename*=UTF-8''page.html"
    assert head.headers["x-content-type-options"] == "nosniff"
    assert head.headers["content-type"] == "application/octet-stream"
    ranges = {
        "bytes=-5": (206, data[95:]),
        "bytes=0-0": (206, data[:1]),
        "bytes=0-99": (206, data),
        "bytes=90-500": (206, data[90:]),
        "bytes=100-": (416, b""),
        "bytes=-0": (416, b""),
        "bytes=5-4": (200, data),
        "bytes=0-1,5-6": (200, data),
        "bytes=" + "9" * 5000 + "-": (200, data),
        "lines=1-2": (200, data),
    }
    for header, expected in ranges.items():
        response = await get(url, range=header)
        assert (response.status_code, response.content) == expected, header
    conditional = await get(url, range="bytes=0-0", **{"if-range": '"etag"'})
    assert conditional.status_code == 200


async def test_nothing_but_presigned_urls_is_served(storage: StorageClient):
    front = f"http://127.0.0.1:{storage.http_port}"
    async with httpx.AsyncClient(verify=False) as http:
        assert (await http.get(f"{front}/")).status_code == 404
        assert (await http.get(f"{front}/o/blobs/%2e%2e/%2e%2e/etc/passwd")).status_code == 403
        assert (await http.request("DELETE", await storage.get_url(a_key()))).status_code == 405


# --- the disk ---------------------------------------------------------------------------------------------------------


async def test_a_full_disk_is_507_and_says_so_before_the_upload(storage_replica: StorageReplica):
    async with storage_replica(free_bytes_min=1 << 60) as storage:
        key = a_key()
        response = await put(await storage.put_url(key, b"x"), b"x")
        assert (response.status_code, response.json()["code"]) == (507, "disk-full")
        assert "retry-after" in response.headers
        with pytest.raises(ServiceError) as caught:
            await storage.put(key, b"x")
        assert isinstance(caught.value, RemoteError)
        assert caught.value.remote_type == DiskFull.type
        assert await storage.size(key) == -1


async def test_a_disk_that_fills_up_in_mid_upload_is_507_and_nothing_stays(storage: StorageClient):
    key, data = a_key(), b"x" * (3 << 20)
    url = await storage.put_url(key, data)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so a file that would get larger is EFBIG, as with a full quota.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    try:
        response = await put(url, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (response.status_code, response.json()["code"]) == (507, "disk-full")
    assert (await storage.size(key), storage.files()) == (-1, [])
    assert (await put(url, data)).status_code == 200


async def test_a_large_upload_is_stored_as_it_came(storage: StorageClient):
    key, data = a_key(), os.urandom(5 << 20)
    url = await storage.put_url(key, data)

    async def in_odd_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 77_777):
            yield data[start : start + 77_777]

    async with httpx.AsyncClient(verify=False) as http:
        response = await http.put(url, content=in_odd_pieces(), headers={"content-length": str(len(data))})
    assert (response.status_code, response.headers["etag"]) == (200, f'"{sha256_of(data)}"')
    assert hashlib.sha256((await get(await storage.get_url(key))).content).hexdigest() == sha256_of(data)


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_a_presigned_s3_url_is_the_one_of_amazons_example():
    """Amazon S3 API Reference, "Authenticating Requests: Using Query Parameters", its worked example."""
    config = S3Config(
        "https://examplebucket.s3.amazonaws.com", "", "us-east-1", "AKIAIOSFODNN7EXAMPLE",
        SecretStr("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    )  # fmt: skip
    now = datetime(2013, 5, 24, tzinfo=UTC)
    grant = Grant("GET", "test.txt", int(now.timestamp()) + 86400)
    url = presigned_at(config, grant, now, "/test.txt")
    assert url.endswith("X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")


def test_a_presigned_s3_put_binds_the_length():
    config = S3Config("http://127.0.0.1:9000", "bucket", "us-east-1", "id", SecretStr("secret"))
    now = datetime(2026, 1, 1, tzinfo=UTC)
    grants = [Grant("PUT", "blobs/t/x", int(now.timestamp()) + 900, size) for size in (10, 11)]
    first, second = (presigned(config, grant, now) for grant in grants)
    assert "X-Amz-SignedHeaders=content-length%3Bhost" in first
    assert first.split("X-Amz-Signature")[0] == second.split("X-Amz-Signature")[0]
    assert first != second


def test_settings_that_lack_something_are_refused_by_name():
    with pytest.raises(ValidationError, match="s3_bucket"):
        StorageSettings(store="s3", s3_endpoint="http://127.0.0.1:9000")
    with pytest.raises(ValidationError, match="public_url"):
        StorageSettings(public_listen="127.0.0.1:0")
    with pytest.raises(ValidationError, match="url_seconds"):
        StorageSettings(url_seconds=901)
