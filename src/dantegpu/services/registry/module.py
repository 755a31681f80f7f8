"""Wiring of provider-registry-service."""

from pathlib import Path

from dantegpu.contracts.gen.dante.v1 import registry_pb2_grpc
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.migrate import Migrations
from dantegpu.kit.outbox import Outbox
from dantegpu.services.registry.consumers import Heartbeats
from dantegpu.services.registry.rpc import RegistryRpc
from dantegpu.services.registry.service import RegistryService
from dantegpu.services.registry.settings import RegistrySettings

SCHEMA = "registry"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


def build(deps: Deps, settings: RegistrySettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    outbox = Outbox(db, deps.bus, deps.clock)
    service = RegistryService(db, outbox, deps.clock, settings)
    return Service(
        name=settings.service_name,
        components=[Migrations(dsn, SCHEMA, MIGRATIONS), db, outbox, Heartbeats(deps.bus, service, settings)],
        register_rpc=lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryRpc(db, service), server
        ),
        checks={"database": db.ready, "nats": deps.bus.ready},
    )
