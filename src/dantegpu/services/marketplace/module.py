"""Wiring of agora-marketplace."""

from pathlib import Path

from dantegpu.contracts.gen.dante.v1.marketplace_pb2_grpc import add_MarketplaceServiceServicer_to_server
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.migrate import Migrations
from dantegpu.kit.outbox import Outbox
from dantegpu.services.marketplace.rpc import MarketplaceRpc
from dantegpu.services.marketplace.service import Marketplace
from dantegpu.services.marketplace.settings import MarketplaceSettings
from dantegpu.services.marketplace.store import Prices

SCHEMA = "marketplace"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


def build(deps: Deps, settings: MarketplaceSettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    outbox = Outbox(db, deps.bus, deps.clock)
    marketplace = Marketplace(
        outbox,
        deps.clock,
        deps.channels,
        default=Prices(settings.default_price_udgpu_per_gpu_hour, settings.default_price_udgpu_per_cpu_hour),
        max_price_udgpu_per_hour=settings.max_price_udgpu_per_hour,
    )
    return Service(
        name=settings.service_name,
        components=[Migrations(dsn, SCHEMA, MIGRATIONS), db, outbox],
        register_rpc=lambda server: add_MarketplaceServiceServicer_to_server(MarketplaceRpc(db, marketplace), server),
        checks={"database": db.ready, "nats": deps.bus.ready},
    )
