"""The client."""

from typing import Self

import httpx

from dantegpu.contracts.rest.platform import PlatformStatus
from dantegpu.sdk._async.accounts import AsyncAuthApi, AsyncKeysApi, AsyncTeamsApi
from dantegpu.sdk._async.jobs import AsyncJobsApi
from dantegpu.sdk._async.market import AsyncAdminApi, AsyncMachinesApi, AsyncOffersApi, AsyncWalletApi
from dantegpu.sdk._async.schedules import AsyncSchedulesApi
from dantegpu.sdk._async.transport import AsyncTransport
from dantegpu.sdk._async.uploads import AsyncUploadsApi
from dantegpu.sdk.protocol import DEFAULT_URL, RETRY_SECONDS, OnWait, Session, no_wait_text


class AsyncDante:
    """One platform, seen as one user.

    Give an `api_key`, or a `session` that holds tokens, or neither and call `auth.login`. A platform that is down or
    busy is waited for up to `retry_seconds`; `on_wait` hears in words what for. `team_id` is the team to act for when
    tokens are renewed; an API key has its own.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        session: Session | None = None,
        team_id: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        on_wait: OnWait = no_wait_text,
        http_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._transport = AsyncTransport(
            url,
            api_key=api_key,
            session=session,
            team_id=team_id,
            retry_seconds=retry_seconds,
            on_wait=on_wait,
            http_transport=http_transport,
        )
        self.auth = AsyncAuthApi(self._transport)
        self.teams = AsyncTeamsApi(self._transport)
        self.keys = AsyncKeysApi(self._transport)
        self.jobs = AsyncJobsApi(self._transport)
        self.schedules = AsyncSchedulesApi(self._transport)
        self.uploads = AsyncUploadsApi(self._transport)
        self.machines = AsyncMachinesApi(self._transport)
        self.offers = AsyncOffersApi(self._transport)
        self.wallet = AsyncWalletApi(self._transport)
        self.admin = AsyncAdminApi(self._transport)

    @property
    def url(self) -> str:
        """The platform's address."""
        return self._transport.url

    async def status(self) -> PlatformStatus:
        """Which parts of the platform answer."""
        return await self._transport.call(PlatformStatus, "GET", "/v1/status")

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
