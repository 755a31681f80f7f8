"""The SDK against a scripted HTTP server: retries, refresh, streams that break, transfers that lie."""

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dantegpu.sdk import (
    AsyncDante,
    ConnectionProblem,
    Dante,
    DanteError,
    InvalidAnswer,
    NotFound,
    Tokens,
    TransferProblem,
    Unauthenticated,
    Unavailable,
)
from dantegpu.sdk.protocol import EventDecoder, MemorySession, Retries, ServerEvent
from dantegpu.sdk.results import safe_target

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_ID = "job_01h455vb4pex5vsknk084sn02q"

type Answer = tuple[int, dict[str, str], bytes]
CUT: Answer = (0, {}, b"")
"""The connection is closed without an answer."""
DONE: Answer = (200, {}, b"")
type Script = Callable[["Asked"], Answer]


class Asked:
    """One request as the server saw it."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.method = handler.command
        self.path, _, self.query = handler.path.partition("?")
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.body = handler.rfile.read(int(self.headers.get("content-length", "0")))


class Server:
    """Answers what `script` says, in order of arrival, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.script: Script = lambda asked: (404, {}, b"")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                asked = Asked(self)
                outer.asked.append(asked)
                status, headers, body = outer.script(asked)
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def as_json(body: object, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json"} | headers, json.dumps(body).encode()


def a_problem(status: int, code: str, **headers: str) -> Answer:
    body = {"type": "t", "code": code, "title": "T", "status": status, "detail": f"told: {code}", "request_id": "req_1"}
    return as_json(body, status, **headers)


WALLET = {"team_id": "t", "balance_udgpu": 5, "held_udgpu": 0, "available_udgpu": 5, "earned_udgpu": 0}


def a_job(**fields: object) -> dict[str, object]:
    return {
        "id": JOB_ID, "team_id": "t", "user_id": "u", "name": "", "spec": {"commands": ["x"]}, "state": "QUEUED",
        "epoch": 0, "cost_udgpu": 0, "settled": False, "created_at": "2026-11-23T20:00:00Z", **fields,
    }  # fmt: skip


def an_event(seq: int, state: str = "RUNNING") -> bytes:
    data = {"job_id": JOB_ID, "seq": seq, "state": state, "type": "running", "occurred_at": "2026-11-23T20:00:00Z"}
    return f"id: {seq}\nevent: job\ndata: {json.dumps(data)}\n\n".encode()


def a_stream(*parts: bytes) -> Answer:
    return 200, {"Content-Type": "text/event-stream"}, b"".join(parts)


END = b"event: end\ndata: {}\n\n"


def test_the_sync_client_is_what_the_async_one_says():
    done = subprocess.run(
        [sys.executable, "scripts/unasync.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_answer_is_read_as_its_model(server: Server):
    server.script = lambda asked: as_json(WALLET)
    with Dante(server.url, api_key="dante_k") as client:
        assert client.wallet.get().balance_udgpu == 5
    assert server.asked[0].headers["authorization"] == "Bearer dante_k"


async def test_the_async_client_does_the_same(server: Server):
    server.script = lambda asked: as_json(WALLET)
    async with AsyncDante(server.url, api_key="dante_k") as client:
        first, second = await asyncio.gather(client.wallet.get(), client.wallet.get())
    assert first == second


def test_a_refusal_is_an_error_with_the_platforms_words(server: Server):
    server.script = lambda asked: a_problem(404, "job-not-found")
    with Dante(server.url) as client, pytest.raises(NotFound, match="told: job-not-found") as caught:
        client.jobs.get(JOB_ID)
    assert (caught.value.code, caught.value.status) == ("job-not-found", 404)
    assert len(server.asked) == 1


def test_a_part_that_is_down_is_waited_for_as_long_as_it_asks(server: Server):
    answers = iter([a_problem(503, "unavailable", **{"Retry-After": "0"}), as_json(WALLET)])
    server.script = lambda asked: next(answers)
    told: list[str] = []
    with Dante(server.url, on_wait=told.append) as client:
        client.wallet.get()
    assert len(told) == 1
    assert "told: unavailable" in told[0]


def test_waiting_ends(server: Server):
    server.script = lambda asked: a_problem(503, "unavailable")
    with Dante(server.url, retry_seconds=0.2) as client, pytest.raises(Unavailable):
        client.wallet.get()
    assert len(server.asked) > 1


def test_a_creating_request_is_repeated_under_the_same_key(server: Server):
    answers = iter([CUT, as_json(a_job(), 201)])
    server.script = lambda asked: next(answers)
    with Dante(server.url) as client:
        assert client.jobs.submit({"commands": ["x"]}).id == JOB_ID
    keys = [asked.headers["idempotency-key"] for asked in server.asked]
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_two_creating_requests_have_two_keys(server: Server):
    server.script = lambda asked: as_json(a_job(), 201)
    with Dante(server.url) as client:
        client.jobs.submit({"commands": ["x"]})
        client.jobs.submit({"commands": ["x"]})
    assert len({asked.headers["idempotency-key"] for asked in server.asked}) == 2


def test_an_address_where_nobody_answers_is_told_soon():
    with (
        Dante("http://127.0.0.1:1", retry_seconds=0.1) as client,
        pytest.raises(ConnectionProblem, match=r"127\.0\.0\.1:1"),
    ):
        client.wallet.get()


def test_something_that_is_no_platform_is_told(server: Server):
    server.script = lambda asked: (200, {"Content-Type": "text/html"}, b"<html>welcome</html>")
    with Dante(server.url) as client, pytest.raises(InvalidAnswer, match="is it a DanteGPU platform"):
        client.wallet.get()


@pytest.mark.parametrize("url", ["", "localhost:8400", "ftp://x", "/path"])
def test_a_wrong_address_is_told(url: str):
    with pytest.raises(DanteError, match="no address of a platform"):
        Dante(url)


def test_passwords_are_sent_and_not_shown(server: Server):
    server.script = lambda asked: a_problem(401, "wrong-credentials")
    with Dante(server.url) as client, pytest.raises(Unauthenticated) as caught:
        client.auth.login("ada@example.org", "correct horse")
    assert json.loads(server.asked[0].body)["password"] == "correct horse"
    assert "correct horse" not in repr(caught.value)


def refreshing(asked: Asked) -> Answer:
    """A platform on which only `a2` is valid, and `r1` may be refreshed once."""
    if asked.path == "/v1/auth/refresh":
        assert json.loads(asked.body)["refresh_token"] == "r1"
        return as_json({"access_token": "a2", "expires_in_seconds": 600, "refresh_token": "r2"})
    valid = asked.headers["authorization"] == "Bearer a2"
    return as_json(WALLET) if valid else a_problem(401, "token-expired")


def test_an_expired_token_is_renewed_and_the_request_repeated(server: Server):
    server.script = refreshing
    session = MemorySession(Tokens("a1", "r1"))
    with Dante(server.url, session=session) as client:
        client.wallet.get()
    assert session.tokens == Tokens("a2", "r2")


async def test_requests_that_meet_an_expired_token_together_renew_it_once(server: Server):
    server.script = refreshing
    async with AsyncDante(server.url, session=MemorySession(Tokens("a1", "r1"))) as client:
        await asyncio.gather(*(client.wallet.get() for _ in range(5)))
    assert [asked.path for asked in server.asked].count("/v1/auth/refresh") == 1


def test_a_session_that_has_ended_is_an_error_and_no_loop(server: Server):
    server.script = lambda asked: a_problem(401, "session-ended")
    with Dante(server.url, session=MemorySession(Tokens("a1", "r1"))) as client, pytest.raises(Unauthenticated):
        client.wallet.get()
    assert [asked.path for asked in server.asked] == ["/v1/wallet", "/v1/auth/refresh"]


def test_a_broken_stream_goes_on_where_it_was(server: Server):
    answers = iter([
        a_stream(b"retry: 1000\n\n", an_event(1), an_event(2)),
        CUT,
        a_problem(503, "unavailable", **{"Retry-After": "0"}),
        a_stream(an_event(2), an_event(3, "SUCCEEDED"), END),
    ])  # fmt: skip
    server.script = lambda asked: next(answers)
    told: list[str] = []
    with Dante(server.url, on_wait=told.append) as client:
        assert [event.seq for event in client.jobs.events(JOB_ID, follow=True)] == [1, 2, 3]
    assert [asked.headers.get("last-event-id") for asked in server.asked] == [None, "2", "2", "2"]
    assert told


def test_a_stream_that_ends_is_not_opened_again(server: Server):
    server.script = lambda asked: a_stream(an_event(1), END)
    with Dante(server.url) as client:
        list(client.jobs.events(JOB_ID, follow=True))
    assert len(server.asked) == 1


def test_a_log_is_bytes_in_pieces(server: Server):
    log = bytes(range(256)) * 10_000

    def script(asked: Asked) -> Answer:
        query = dict(item.split("=") for item in asked.query.split("&"))
        offset, limit = int(query["offset"]), int(query["limit_bytes"])
        headers = {"x-log-epoch": "2", "x-log-offset": str(offset), "x-log-size": str(len(log))}
        return 200, headers, log[offset : offset + limit]

    server.script = script
    with Dante(server.url) as client:
        pieces = list(client.jobs.logs(JOB_ID))
    assert b"".join(piece.data for piece in pieces) == log
    assert len(pieces) > 1
    assert {piece.epoch for piece in pieces} == {2}


def test_an_upload_that_the_platform_has_is_not_sent(server: Server):
    digest = hashlib.sha256(b"content").hexdigest()
    server.script = lambda asked: as_json({"uploads": [{"sha256": digest, "exists": True}]}, 201)
    with Dante(server.url) as client:
        assert client.uploads.put(b"content").sha256 == digest
    assert [asked.method for asked in server.asked] == ["POST"]


def test_an_upload_that_is_cut_is_sent_again_without_our_credentials(server: Server, tmp_path: Path):
    (tmp_path / "a").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    puts = iter([CUT, DONE])

    def script(asked: Asked) -> Answer:
        if asked.method == "PUT":
            return next(puts)
        return as_json({"uploads": [{"sha256": digest, "exists": False, "url": f"{server.url}/put"}]}, 201)

    server.script = script
    with Dante(server.url, api_key="dante_k") as client:
        assert client.uploads.put(tmp_path / "a").size_bytes == 7
    sent = [asked for asked in server.asked if asked.method == "PUT"]
    assert [asked.body for asked in sent] == [b"content", b"content"]
    assert "authorization" not in sent[0].headers


def results_of(server: Server, path: str, listed: bytes, stored: bytes) -> Script:
    entry = {"path": path, "size_bytes": len(listed), "sha256": hashlib.sha256(listed).hexdigest()}

    def script(asked: Asked) -> Answer:
        if asked.path == "/stored":
            return 200, {}, stored
        return as_json(
            {"job_id": JOB_ID, "epoch": 1, "complete": True, "files": [{**entry, "url": f"{server.url}/stored"}]}
        )

    return script


def test_results_are_fetched_into_their_folders(server: Server, tmp_path: Path):
    server.script = results_of(server, "a/b.txt", b"hello", b"hello")
    with Dante(server.url) as client:
        assert client.jobs.download(JOB_ID, tmp_path / "out") == [tmp_path / "out" / "a" / "b.txt"]
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"hello"


@pytest.mark.parametrize("stored", [b"hellO", b"hell", b"hello and more"])
def test_a_result_that_is_not_what_was_announced_never_appears(server: Server, tmp_path: Path, stored: bytes):
    server.script = results_of(server, "b.txt", b"hello", stored)
    with Dante(server.url) as client, pytest.raises(TransferProblem, match=r"b\.txt is damaged"):
        client.jobs.download(JOB_ID, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a/./b", "a\0b"])
def test_a_result_cannot_leave_its_folder(server: Server, tmp_path: Path, path: str):
    server.script = results_of(server, path, b"hello", b"hello")
    with Dante(server.url) as client, pytest.raises(TransferProblem, match="nothing was written"):
        client.jobs.download(JOB_ID, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_does_not_follow_a_link_out_of_its_folder(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path)
    with pytest.raises(TransferProblem, match="through a link"):
        safe_target(tmp_path / "out", "a/x")


def test_waiting_for_a_job_has_an_end(server: Server):
    server.script = lambda asked: as_json(a_job())
    with Dante(server.url) as client, pytest.raises(TimeoutError, match="still QUEUED"):
        client.jobs.wait(JOB_ID, timeout_seconds=0.0)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_from_any_pieces(size: int):
    text = b": note\r\n\r\nid: 1\r\nevent: job\r\ndata: a\r\ndata: b\r\n\r\nid:2\ndata\n\n"
    decoder = EventDecoder()
    events = [event for start in range(0, len(text), size) for event in decoder.feed(text[start : start + size])]
    assert events == [ServerEvent("job", "a\nb", "1"), ServerEvent("message", "", "2")]


def test_pauses_grow_are_bounded_and_end():
    retries = Retries(for_seconds=60)
    pauses = [retries.next_pause_seconds(now) for now in (0.0, 1.0, 2.0, 10.0, 20.0, 59.99)]
    assert all(pause is not None and 0 < pause <= 5 for pause in pauses)
    assert retries.next_pause_seconds(60.0) is None
    retries.succeeded()
    assert retries.next_pause_seconds(61.0) is not None
