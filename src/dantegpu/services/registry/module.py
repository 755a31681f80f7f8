"""Wiring of provider-registry-service."""

from pathlib import Path

from dantegpu.contracts.gen.dante.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.migrate import Migrations
from dantegpu.kit.outbox import Outbox
from dantegpu.services.registry.consumers import HeartbeatConsumer
from dantegpu.services.registry.rpc import RegistryRpc
from dantegpu.services.registry.service.liveness import Liveness
from dantegpu.services.registry.service.machines import Machines
from dantegpu.services.registry.settings import RegistrySettings

SCHEMA = "registry"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


def build(deps: Deps, settings: RegistrySettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    outbox = Outbox(db, deps.bus, deps.clock)
    machines = Machines(outbox, deps.clock)
    liveness = Liveness(db, outbox, deps.clock, settings)
    return Service(
        name=settings.service_name,
        components=[
            Migrations(dsn, SCHEMA, MIGRATIONS),
            db,
            outbox,
            HeartbeatConsumer(deps.bus, liveness, settings.sweep_interval_seconds),
        ],
        register_rpc=lambda server: add_RegistryServiceServicer_to_server(RegistryRpc(db, machines), server),
        checks={"database": db.ready, "nats": deps.bus.ready},
    )
