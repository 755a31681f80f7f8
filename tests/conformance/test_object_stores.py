"""What every object store has to do, whichever it is: one suite, run on each adapter."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretBytes

from dantegpu.domain.clock import SystemClock
from dantegpu.domain.ids import JobId, TeamId
from dantegpu.kit.http import HttpServer
from dantegpu.kit.lifecycle import HttpApp
from dantegpu.services.storage.errors import InvalidKey
from dantegpu.services.storage.rest import StorageHttp
from dantegpu.services.storage.store.base import Grant, ObjectStore
from dantegpu.services.storage.store.embedded import EmbeddedStore
from dantegpu.services.storage.store.s3 import S3ObjectStore
from tests.fixtures.s3 import an_s3_bucket

KEY = SecretBytes(b"k" * 32)
BAD_KEYS = [
    "",
    "blobs",
    "blobs/team",
    "secrets/storage-url.key/x",
    "/etc/passwd/x",
    "blobs/../../etc/passwd",
    "blobs/team/..",
    "blobs/team/./x",
    "blobs//x",
    "blobs/team/x/",
    "blobs/team/a\nb",
    "blobs/team/a\0b",
    f"blobs/team/{'x' * 256}",
    f"results/job/{'/'.join(['x' * 200] * 6)}",
]


@pytest.fixture(params=["embedded", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    async with AsyncExitStack() as stack:
        made: ObjectStore
        if request.param == "s3":
            made = S3ObjectStore(await stack.enter_async_context(an_s3_bucket()), SystemClock())
        else:
            made = await _embedded(tmp_path, stack)
        await made.start()
        stack.push_async_callback(made.stop)
        yield made


async def _embedded(folder: Path, stack: AsyncExitStack) -> EmbeddedStore:
    apps: list[StorageHttp] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await apps[0](scope, receive, send)

    server = HttpServer(HttpApp(app, "127.0.0.1:0"), "storage")
    await server.start()
    stack.push_async_callback(server.stop)
    store = EmbeddedStore(folder, 0, server.url, KEY)
    apps.append(StorageHttp(store, KEY, SystemClock(), uploads_max=8, idle_seconds=10))
    return store


def a_key(name: str = "out/model.npz") -> str:
    return f"results/{JobId.new()}/1/{name}"


def in_a_minute() -> int:
    return int(SystemClock().now().timestamp()) + 60


def put_grant(key: str, data: bytes) -> Grant:
    return Grant("PUT", key, in_a_minute(), len(data), hashlib.sha256(data).hexdigest())


async def read_all(store: ObjectStore, key: str) -> bytes | None:
    found = await store.read(key, 0, 1 << 20)
    return found[0] if found else None


async def test_what_was_written_is_read_back_whole_and_in_parts(store: ObjectStore):
    key, data = f"logs/{JobId.new()}/1/0", bytes(range(256)) * 40
    assert (await store.sizes_bytes([key]), await store.read(key, 0, 10)) == ([None], None)
    await store.write(key, data)
    assert await store.read(key, 0, 1 << 20) == (data, len(data))
    assert await store.read(key, 250, 12) == (data[250:262], len(data))
    assert await store.read(key, len(data) - 3, 12) == (data[-3:], len(data))
    assert await store.read(key, len(data) + 5, 12) == (b"", len(data))
    await store.ready()


async def test_writing_again_replaces_the_whole_object(store: ObjectStore):
    key = a_key()
    await store.write(key, b"first and longer")
    await store.write(key, b"second")
    assert await read_all(store, key) == b"second"


async def test_what_was_deleted_is_gone_and_what_is_beside_it_stays(store: ObjectStore):
    prefix = f"checkpoints/{JobId.new()}"
    kept, gone = f"{prefix}/2/0", [f"{prefix}/1/0", f"{prefix}/1/1"]
    await store.write(kept, b"kept")
    await store.write(gone[0], b"gone")
    for _ in range(2):
        await store.delete(gone)
        assert await store.sizes_bytes([kept, *gone]) == [4, None, None]
    await store.write(gone[1], b"again")
    assert await store.sizes_bytes(gone) == [None, 5]
    with pytest.raises(InvalidKey):
        await store.delete(["../x"])


async def test_an_empty_object_is_there(store: ObjectStore):
    key = a_key("empty")
    await store.write(key, b"")
    assert await store.read(key, 0, 10) == (b"", 0)
    assert await store.sizes_bytes([key, a_key()]) == [0, None]


@pytest.mark.parametrize("name", ["a b/ü#?%2F&=+.txt", "模型.npz", "'quoted\" name", "a\\b", ".hidden", "..."])
async def test_names_with_odd_characters_stay_what_they_are(store: ObjectStore, name: str):
    key, data = a_key(name), name.encode()
    async with httpx.AsyncClient(verify=False) as http:
        assert (await http.put(store.url(put_grant(key, data)), content=data)).status_code == 200
        assert await read_all(store, key) == data
        assert (await http.get(store.url(Grant("GET", key, in_a_minute())))).content == data


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_a_key_that_could_leave_its_prefix_is_refused(store: ObjectStore, key: str):
    attempts: list[Callable[[], Any]] = [
        lambda: store.write(key, b"x"),
        lambda: store.read(key, 0, 1),
        lambda: store.sizes_bytes([key]),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidKey):
            await attempt()


async def test_a_put_url_takes_exactly_the_announced_length(store: ObjectStore):
    key, data = f"blobs/{TeamId.new()}/{'a' * 64}", b"x" * 5000
    url = store.url(put_grant(key, data))
    async with httpx.AsyncClient(verify=False) as http:
        for wrong in (data[:-1], data + b"y", b""):
            assert 400 <= (await http.put(url, content=wrong)).status_code < 500
            assert await store.sizes_bytes([key]) == [None]
        for _ in range(2):
            assert (await http.put(url, content=data)).status_code == 200
        assert await store.read(key, 0, 1 << 20) == (data, len(data))


async def test_a_url_is_for_one_method_and_one_key(store: ObjectStore):
    key, other, data = a_key(), a_key(), b"mine"
    await store.write(key, data)
    await store.write(other, b"other's")
    get, put = store.url(Grant("GET", key, in_a_minute())), store.url(put_grant(key, data))
    async with httpx.AsyncClient(verify=False) as http:
        assert (await http.put(get, content=b"evil")).status_code == 403
        assert (await http.get(put)).status_code == 403
        assert (await http.get(get.replace(key.split("/")[1], other.split("/")[1]))).status_code == 403
        assert (await http.get(get.split("?")[0])).status_code == 403
        assert (await http.get(get)).content == data
    assert (await read_all(store, key), await read_all(store, other)) == (data, b"other's")


async def test_a_download_has_ranges_and_its_name(store: ObjectStore):
    key, data = a_key(), bytes(range(200))
    await store.write(key, data)
    url = store.url(Grant("GET", key, in_a_minute(), name="modèle.npz"))
    async with httpx.AsyncClient(verify=False) as http:
        whole = await http.get(url)
        part = await http.get(url, headers={"range": "bytes=10-19"})
        tail = await http.get(url, headers={"range": "bytes=190-"})
        beyond = await http.get(url, headers={"range": "bytes=500-600"})
    assert (whole.status_code, whole.content, whole.headers["content-length"]) == (200, data, "200")
    assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''mod%C3%A8le.npz"
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, data[10:20], "bytes 10-19/200")
    assert (tail.content, beyond.status_code) == (data[190:], 416)


async def test_a_missing_object_is_404(store: ObjectStore):
    async with httpx.AsyncClient(verify=False) as http:
        assert (await http.get(store.url(Grant("GET", a_key(), in_a_minute())))).status_code == 404
