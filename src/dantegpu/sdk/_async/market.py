"""Machines, offers, wallets, and what the operator may do."""

from dantegpu.contracts.rest.accounts import CreateJoinToken, JoinToken, TeamPage
from dantegpu.contracts.rest.billing import Credit, EntryPage, LedgerCheck, Wallet
from dantegpu.contracts.rest.jobs import JobPage
from dantegpu.contracts.rest.machines import Ask, Machine, MachinePage, OfferPage, Quarantine, Quarantines, SetAsk
from dantegpu.sdk._async.transport import AsyncTransport
from dantegpu.sdk.protocol import new_idempotency_key


class AsyncMachinesApi:
    """`client.machines`: your team's machines as a provider."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self, *, cursor: str | None = None, limit: int = 100) -> MachinePage:
        """One page of your team's machines."""
        params = {"cursor": cursor, "limit": limit}
        return await self._transport.call(MachinePage, "GET", "/v1/machines", params=params)

    async def get(self, machine_id: str) -> Machine:
        """One machine of your team."""
        return await self._transport.call(Machine, "GET", f"/v1/machines/{machine_id}")

    async def pause(self, machine_id: str) -> Machine:
        """Take no new jobs; running ones go on."""
        return await self._intend(machine_id, "pause")

    async def resume(self, machine_id: str) -> Machine:
        """Take jobs again."""
        return await self._intend(machine_id, "resume")

    async def drain(self, machine_id: str) -> Machine:
        """Take no new jobs and hand the running ones back."""
        return await self._intend(machine_id, "drain")

    async def leave(self, machine_id: str) -> Machine:
        """Leave the platform for good."""
        return await self._intend(machine_id, "leave")

    async def _intend(self, machine_id: str, verb: str) -> Machine:
        return await self._transport.call(Machine, "POST", f"/v1/machines/{machine_id}/{verb}")

    async def set_ask(
        self, machine_id: str, *, per_gpu_hour_udgpu: int | None = None, per_cpu_hour_udgpu: int | None = None
    ) -> Ask:
        """Set a machine's prices; None keeps one as it is. Running jobs keep the price they were placed at."""
        body = SetAsk(price_udgpu_per_gpu_hour=per_gpu_hour_udgpu, price_udgpu_per_cpu_hour=per_cpu_hour_udgpu)
        return await self._transport.call(Ask, "PUT", f"/v1/machines/{machine_id}/ask", body=body)

    async def create_join_token(self, *, expires_in_seconds: int = 3600, max_uses: int = 1) -> JoinToken:
        """A token with which a machine joins your team; shown only now."""
        body = CreateJoinToken(expires_in_seconds=expires_in_seconds, max_uses=max_uses)
        return await self._transport.call(
            JoinToken, "POST", "/v1/join-tokens", body=body, idempotency_key=new_idempotency_key()
        )


class AsyncOffersApi:
    """`client.offers`: what can be rented."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def list(self, *, gpu: str | None = None, cursor: str | None = None, limit: int = 100) -> OfferPage:
        """One page of offers, cheapest first; `gpu` is a GPU spec such as RTX4090:2."""
        params = {"gpu": gpu, "cursor": cursor, "limit": limit}
        return await self._transport.call(OfferPage, "GET", "/v1/offers", params=params)


class AsyncWalletApi:
    """`client.wallet`: your team's money, in micro-$dGPU."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def get(self) -> Wallet:
        """Balance, what is held for running jobs, and what is left."""
        return await self._transport.call(Wallet, "GET", "/v1/wallet")

    async def entries(self, *, cursor: str | None = None, limit: int = 100) -> EntryPage:
        """One page of the wallet's entries, newest first."""
        params = {"cursor": cursor, "limit": limit}
        return await self._transport.call(EntryPage, "GET", "/v1/wallet/entries", params=params)


class AsyncAdminApi:
    """`client.admin`: for the platform's operator."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def credit(
        self, team_id: str, amount_udgpu: int, *, text: str = "", idempotency_key: str | None = None
    ) -> Wallet:
        """Give a team money; its wallet afterwards. Give your own key when a crash may make you repeat it."""
        body = Credit(team_id=team_id, amount_udgpu=amount_udgpu, text=text)
        key = idempotency_key or new_idempotency_key()
        return await self._transport.call(Wallet, "POST", "/v1/admin/credits", body=body, idempotency_key=key)

    async def ledger(self) -> LedgerCheck:
        """Re-sum the whole ledger."""
        return await self._transport.call(LedgerCheck, "GET", "/v1/admin/ledger")

    async def teams(self, *, cursor: str | None = None, limit: int = 100) -> TeamPage:
        """One page of all teams."""
        params = {"cursor": cursor, "limit": limit}
        return await self._transport.call(TeamPage, "GET", "/v1/admin/teams", params=params)

    async def quarantines(self) -> list[Quarantine]:
        """Machines that get no new work for a while, and why."""
        return (await self._transport.call(Quarantines, "GET", "/v1/admin/quarantines")).quarantines

    async def release_machine(self, machine_id: str) -> list[Quarantine]:
        """End a machine's quarantine; the one that was ended."""
        path = f"/v1/admin/machines/{machine_id}/release"
        return (await self._transport.call(Quarantines, "POST", path)).quarantines

    async def jobs(self, *, cursor: str | None = None, limit: int = 100) -> JobPage:
        """One page of the jobs of all teams, newest first."""
        params = {"cursor": cursor, "limit": limit}
        return await self._transport.call(JobPage, "GET", "/v1/admin/jobs", params=params)
