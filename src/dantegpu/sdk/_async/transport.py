"""HTTP with one platform: credentials, retries, problems and live streams."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Self
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from dantegpu import __version__
from dantegpu.contracts.rest.accounts import Refresh
from dantegpu.contracts.rest.accounts import Tokens as NewTokens
from dantegpu.contracts.rest.base import Problem
from dantegpu.sdk.errors import ApiError, ConnectionProblem, DanteError, InvalidAnswer, TransferProblem, Unauthenticated
from dantegpu.sdk.protocol import (
    FIRST_CONTACT_SECONDS,
    RETRIED_STATUSES,
    STREAM_SILENCE_SECONDS,
    EventDecoder,
    OnWait,
    Retries,
    ServerEvent,
    Session,
    Tokens,
    api_error,
    event_text,
)

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_STREAM_TIMEOUT = httpx.Timeout(STREAM_SILENCE_SECONDS, connect=5.0)

type Params = Mapping[str, str | int | list[str] | None]


class AsyncTransport:
    """Sends requests and tries them again.

    Every request may be repeated: GET, PUT and DELETE are idempotent, the POSTs that create carry an Idempotency-Key,
    the other POSTs (stop, pause, refresh within its grace) say where things should be, not what to add.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        session: Session | None,
        team_id: str | None,
        retry_seconds: float,
        on_wait: OnWait,
        http_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise DanteError(f"{url!r} is no address of a platform; it looks like http://127.0.0.1:8400")
        self.url = url.rstrip("/")
        self.session = session
        self._api_key = api_key
        self._team_id = team_id
        self._retry_seconds = retry_seconds
        self._on_wait = on_wait
        self._answered = False
        self._refreshing = asyncio.Lock()
        headers = {"User-Agent": f"dantegpu-python/{__version__}"}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=_TIMEOUT,
            transport=http_transport,
            trust_env=False,
            verify=_uses_tls(self.url),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def call[T: BaseModel](
        self,
        answer: type[T],
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: Params | None = None,
        idempotency_key: str | None = None,
        anonymous: bool = False,
    ) -> T:
        """One request, read as `answer`. Raises the errors of `dantegpu.sdk.errors`."""
        content = await self.send(
            method, path, body=body, params=params, idempotency_key=idempotency_key, anonymous=anonymous
        )
        try:
            return answer.model_validate_json(content)
        except ValidationError as error:
            raise InvalidAnswer(
                f"{self.url} answered {method} {path} with something else than a {answer.__name__}: "
                f"{error.error_count()} problems, the first: {error.errors()[0]['msg']}; "
                "is it a DanteGPU platform, and of a version that this client knows?"
            ) from error

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: Params | None = None,
        idempotency_key: str | None = None,
        anonymous: bool = False,
    ) -> bytes:
        """One request, its answer's bytes."""
        response = await self._send(method, path, body, params, idempotency_key, anonymous)
        return response.content

    async def fetch(self, path: str, *, params: Params | None = None) -> tuple[Mapping[str, str], bytes]:
        """GET, as headers and bytes."""
        response = await self._send("GET", path, None, params, None, False)
        return response.headers, response.content

    async def _send(
        self,
        method: str,
        path: str,
        body: BaseModel | None,
        params: Params | None,
        idempotency_key: str | None,
        anonymous: bool,
    ) -> httpx.Response:
        content = None if body is None else json.dumps(body.model_dump(exclude_none=True), default=_reveal).encode()
        headers = {"Content-Type": "application/json"} if content is not None else {}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        retries = Retries(self._retry_seconds)
        refreshed = anonymous
        while True:
            tokens = None if anonymous else self._tokens()
            auth = {} if anonymous else self._authorization(tokens)
            try:
                response = await self._http.request(
                    method, path, content=content, params=_present(params), headers=headers | auth
                )
            except httpx.TransportError as error:
                await self.pause_or_raise(retries, error)
                continue
            self._answered = True
            if response.status_code < 400:
                return response
            problem = api_error(response.status_code, response.content, path, response.headers.get("Retry-After"))
            if isinstance(problem, Unauthenticated) and not refreshed and tokens is not None:
                await self._refresh(tokens)
                refreshed = True
                continue
            if response.status_code not in RETRIED_STATUSES:
                raise problem
            await self.pause_or_raise(retries, problem)

    async def stream(
        self, path: str, *, params: Params | None = None, last_event_id: str | None = None
    ) -> AsyncGenerator[ServerEvent]:
        """Follow a stream of server-sent events until its `end` event; opened again where it broke off."""
        retries = Retries(self._retry_seconds)
        refreshed = False
        while True:
            tokens = self._tokens()
            try:
                async with aclosing(self._connect(path, params, last_event_id, tokens)) as events:
                    async for event in events:
                        retries.succeeded()
                        if event.id is not None:
                            last_event_id = event.id
                        if event.event == "end":
                            return
                        if event.event == "error":
                            raise InvalidAnswer(event_text(event.data))
                        yield event
                # The server closed it without an `end`: it is stopping, or it bounds the length of a stream.
                await self._pause(retries, "the platform closed the stream", ConnectionProblem(self.url, "closed"))
            except httpx.TransportError as error:
                await self.pause_or_raise(retries, error)
            except Unauthenticated as error:
                if refreshed or tokens is None:
                    raise error
                await self._refresh(tokens)
                refreshed = True
            except ApiError as error:
                if error.status not in RETRIED_STATUSES:
                    raise
                await self.pause_or_raise(retries, error)

    async def _connect(
        self, path: str, params: Params | None, last_event_id: str | None, tokens: Tokens | None
    ) -> AsyncGenerator[ServerEvent]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"} | self._authorization(tokens)
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        decoder = EventDecoder()
        async with self._http.stream(
            "GET", path, params=_present(params), headers=headers, timeout=_STREAM_TIMEOUT
        ) as response:
            self._answered = True
            if response.status_code >= 400:
                body = await response.aread()
                raise api_error(response.status_code, body, path, response.headers.get("Retry-After"))
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise InvalidAnswer(f"{self.url}{path} does not answer with a stream of events")
            async for data in response.aiter_bytes():
                for event in decoder.feed(data):
                    yield event

    async def pause_or_raise(self, retries: Retries, error: httpx.TransportError | ApiError) -> None:
        """Wait before the next try and say so; raises `error` in the SDK's words when it has lasted too long."""
        if isinstance(error, ApiError):
            await self._pause(retries, f"{error}", error)
            return
        detail = str(error) or type(error).__name__
        await self._pause(retries, f"{self.url} does not answer", ConnectionProblem(self.url, detail))

    async def _pause(self, retries: Retries, what: str, last: DanteError) -> None:
        if not self._answered:
            retries.for_seconds = min(retries.for_seconds, FIRST_CONTACT_SECONDS)
        asked = last.retry_after_seconds if isinstance(last, ApiError) else None
        pause_seconds = retries.next_pause_seconds(time.monotonic(), asked)
        if pause_seconds is None:
            raise last
        if self._answered:
            self._on_wait(f"{what}; trying again for up to {retries.for_seconds:.0f} s")
        await asyncio.sleep(pause_seconds)

    def _tokens(self) -> Tokens | None:
        return None if self._api_key or self.session is None else self.session.load()

    def _authorization(self, tokens: Tokens | None) -> dict[str, str]:
        bearer = self._api_key or (tokens.access_token if tokens else None)
        return {"Authorization": f"Bearer {bearer}"} if bearer else {}

    async def _refresh(self, seen: Tokens) -> None:
        """Get new tokens unless another task or process has done so since `seen` was read."""
        session = self.session
        if session is None:
            return
        async with self._refreshing:
            with session.exclusive():
                current = session.load()
                if current is None or current.access_token != seen.access_token:
                    return
                session.store(await self._renewed(current))

    async def switch_team(self, team_id: str) -> None:
        """Tokens that act for another team of the user's. Raises DanteError for an API key: it has one team."""
        session = self.session
        if self._api_key or session is None:
            raise DanteError("an API key acts for its own team only; log in to switch")
        async with self._refreshing:
            with session.exclusive():
                current = session.load()
                if current is None:
                    raise DanteError(f"not logged in at {self.url}")
                self._team_id = team_id
                session.store(await self._renewed(current))

    async def _renewed(self, current: Tokens) -> Tokens:
        body = Refresh(refresh_token=SecretStr(current.refresh_token), team_id=self._team_id or "")
        answer = await self.call(NewTokens, "POST", "/v1/auth/refresh", body=body, anonymous=True)
        return Tokens(answer.access_token, answer.refresh_token)

    async def put_bytes(self, url: str, chunks: AsyncGenerator[bytes], size_bytes: int) -> None:
        """Send bytes to a presigned URL. Raises httpx.TransportError, or TransferProblem when they are refused."""
        headers = {"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"}
        async with httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False, verify=_uses_tls(url)) as http:
            response = await http.put(url, content=chunks, headers=headers)
        if response.status_code >= 400:
            raise TransferProblem(_refusal("the upload", response.status_code, response.content), refused=True)

    async def get_bytes(self, url: str) -> AsyncGenerator[bytes]:
        """Fetch a presigned URL. Raises httpx.TransportError, or TransferProblem when it is refused."""
        async with (
            httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False, verify=_uses_tls(url)) as http,
            http.stream("GET", url) as response,
        ):
            if response.status_code >= 400:
                body = await response.aread()
                raise TransferProblem(_refusal("the download", response.status_code, body), refused=True)
            async for data in response.aiter_bytes():
                yield data

    def new_retries(self) -> Retries:
        return Retries(self._retry_seconds)


def _uses_tls(url: str) -> bool:
    """Loading the certificates of all authorities takes longer than most requests; plain http needs none.

    No redirect is ever followed, so a client for http:// never gets to speak TLS.
    """
    return urlsplit(url).scheme != "http"


def _refusal(what: str, status: int, body: bytes) -> str:
    """The store's own words when it is the platform's; another one's answer (S3: XML) as it is, cut."""
    try:
        said = Problem.model_validate_json(body).detail
    except ValidationError:
        said = f"HTTP {status} {body[:200].decode(errors='replace').strip()}"
    return f"storage refused {what}: {said}".rstrip()


def _present(params: Params | None) -> dict[str, str | int | list[str]]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _reveal(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    raise TypeError(f"{type(value).__name__} in a request body")
