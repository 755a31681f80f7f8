"""Calls between services mean the same through gRPC's socket and within one process."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast, override

import pytest

from dantegpu.contracts.gen.dante.v1 import billing_pb2, billing_pb2_grpc
from dantegpu.domain.ids import TeamId
from dantegpu.kit import rpc
from dantegpu.kit.actor import SERVICE, Actor, current_actor
from dantegpu.kit.errors import ErrorStatus, RemoteError, ServiceError, Unavailable, status_of, type_of
from dantegpu.kit.local_rpc import LocalServices
from dantegpu.kit.telemetry import current_request_id, set_request_id

type Stub = billing_pb2_grpc.BillingServiceStub


class Refused(ServiceError):
    """A refusal with parameters."""

    type = "wallet-full"
    status = ErrorStatus.PRECONDITION


class Wallets(billing_pb2_grpc.BillingServiceServicer):
    """Answers who asked, or does what the team's name says."""

    def __init__(self) -> None:
        self.asked: list[billing_pb2.GetWalletRequest] = []
        self.request_ids: list[str] = []
        self.actors: list[Actor] = []
        self.cancelled = asyncio.Event()

    @override
    async def GetWallet(self, request: billing_pb2.GetWalletRequest, context: Any) -> billing_pb2.GetWalletResponse:
        self.asked.append(request)
        self.actors.append(current_actor())
        self.request_ids.append(current_request_id())
        match request.team_id:
            case "refused":
                raise Refused("a wallet holds at most 5", limit="5")
            case "broken":
                raise RuntimeError("a bug")
            case "slow":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case _:
                set_request_id("the callee's own")
        return billing_pb2.GetWalletResponse(wallet=billing_pb2.Wallet(team_id=request.team_id))


@pytest.fixture
def wallets() -> Wallets:
    return Wallets()  # pyright: ignore[reportAbstractUsage] - the others are not called


@pytest.fixture(params=["gRPC", "local"])
async def stub(request: pytest.FixtureRequest, wallets: Wallets) -> AsyncIterator[Stub]:
    def register(server: Any) -> None:
        billing_pb2_grpc.add_BillingServiceServicer_to_server(wallets, server)

    server = rpc.Server("127.0.0.1:0", [register])
    await server.start()
    local = LocalServices()
    register(local)
    channels = rpc.Channels(
        {"billing-payment-service": f"127.0.0.1:{server.port}"},
        {"billing-payment-service": cast(Any, local)} if request.param == "local" else {},
    )
    yield billing_pb2_grpc.BillingServiceStub(channels.to("billing-payment-service"))
    await channels.stop()
    await server.stop()


async def ask(stub: Stub, team: str, **options: Any) -> billing_pb2.GetWalletResponse:
    return await rpc.call(stub.GetWallet, billing_pb2.GetWalletRequest(team_id=team), **options)


async def test_the_callee_hears_who_asks_and_the_callers_request_id_stays_its_own(stub: Stub, wallets: Wallets):
    set_request_id("req of the caller")
    somebody = Actor(SERVICE.kind, team_id=TeamId.new())
    answer = await ask(stub, "blue", actor=somebody)
    assert answer.wallet.team_id == "blue"
    assert [actor.team_id for actor in wallets.actors] == [somebody.team_id]
    assert wallets.request_ids == ["req of the caller"]
    assert current_request_id() == "req of the caller"


async def test_a_refusal_arrives_with_its_type_status_text_and_parameters(stub: Stub):
    with pytest.raises(RemoteError) as caught:
        await ask(stub, "refused")
    assert (type_of(caught.value), status_of(caught.value)) == ("wallet-full", ErrorStatus.PRECONDITION)
    assert (caught.value.message, caught.value.params) == ("a wallet holds at most 5", {"limit": "5"})


async def test_a_bug_of_the_callee_is_an_internal_error_of_the_call(stub: Stub):
    with pytest.raises(RemoteError, match="internal error") as caught:
        await ask(stub, "broken")
    assert status_of(caught.value) is ErrorStatus.INTERNAL


async def test_who_does_not_answer_in_time_is_unavailable_and_is_told_to_stop(stub: Stub, wallets: Wallets):
    with pytest.raises(Unavailable):
        await ask(stub, "slow", timeout_seconds=0.05)
    async with asyncio.timeout(10):
        await wallets.cancelled.wait()


async def test_a_caller_that_is_cancelled_cancels_the_call(stub: Stub, wallets: Wallets):
    asking = asyncio.create_task(ask(stub, "slow"))
    async with asyncio.timeout(10):
        while not wallets.asked:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await wallets.cancelled.wait()


async def test_neither_side_sees_what_the_other_does_to_its_message(stub: Stub, wallets: Wallets):
    request = billing_pb2.GetWalletRequest(team_id="blue")
    await rpc.call(stub.GetWallet, request)
    wallets.asked[0].team_id = "red"
    assert request.team_id == "blue"
