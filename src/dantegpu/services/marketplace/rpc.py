"""agora-marketplace's gRPC door. The registry is asked before the transaction opens, never inside it."""

from typing import TYPE_CHECKING, Any, override

from dantegpu.contracts.gen.dante.v1 import marketplace_pb2 as pb
from dantegpu.contracts.gen.dante.v1.marketplace_pb2_grpc import MarketplaceServiceServicer
from dantegpu.domain.ids import MachineId
from dantegpu.kit.actor import current_actor
from dantegpu.kit.db import Database
from dantegpu.services.marketplace.service import Marketplace, Offer, ask_to_proto
from dantegpu.services.marketplace.store import Prices

if TYPE_CHECKING:
    from grpc import aio

    type Context = aio.ServicerContext[Any, Any]


class MarketplaceRpc(MarketplaceServiceServicer):
    def __init__(self, db: Database, marketplace: Marketplace) -> None:
        self._db = db
        self._marketplace = marketplace

    @override
    async def SetAsk(self, request: pb.SetAskRequest, context: "Context") -> pb.SetAskResponse:
        machine_id = MachineId.parse(request.machine_id)
        team_id = await self._marketplace.own_machine_team(current_actor(), machine_id)
        async with self._db.transaction() as tx:
            row = await self._marketplace.set_ask(
                tx,
                machine_id,
                team_id,
                gpu_udgpu=request.price_udgpu_per_gpu_hour if request.HasField("price_udgpu_per_gpu_hour") else None,
                cpu_udgpu=request.price_udgpu_per_cpu_hour if request.HasField("price_udgpu_per_cpu_hour") else None,
            )
        return pb.SetAskResponse(ask=ask_to_proto(row))

    @override
    async def ListAsks(self, request: pb.ListAsksRequest, context: "Context") -> pb.ListAsksResponse:
        machine_ids = [MachineId.parse(text) for text in request.machine_ids]
        async with self._db.transaction() as tx:
            rows, without = await self._marketplace.list_asks(tx, current_actor(), machine_ids)
        default = self._marketplace.default
        asks = [ask_to_proto(row) for row in rows] + [_default_ask(default, str(machine_id)) for machine_id in without]
        return pb.ListAsksResponse(asks=asks, default_ask=_default_ask(default))

    @override
    async def ListOffers(self, request: pb.ListOffersRequest, context: "Context") -> pb.ListOffersResponse:
        machines = await self._marketplace.find_machines(current_actor(), request.gpu)
        async with self._db.transaction() as tx:
            page = await self._marketplace.offers(tx, machines, request.page.limit, request.page.cursor)
        return pb.ListOffersResponse(offers=map(_offer, page.offers), next_cursor=page.next_cursor)


def _default_ask(prices: Prices, machine_id: str = "", team_id: str = "") -> pb.Ask:
    return pb.Ask(
        machine_id=machine_id,
        team_id=team_id,
        price_udgpu_per_gpu_hour=prices.gpu_udgpu,
        price_udgpu_per_cpu_hour=prices.cpu_udgpu,
    )


def _offer(offer: Offer) -> pb.Offer:
    ask = ask_to_proto(offer.ask) if offer.ask else _default_ask(offer.prices, offer.machine.id, offer.machine.team_id)
    return pb.Offer(machine=offer.machine, ask=ask, rentable=offer.rentable)
