"""Wiring of billing-payment-service."""

from pathlib import Path

from dantegpu.contracts.gen.dante.v1.billing_pb2_grpc import add_BillingServiceServicer_to_server
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.migrate import Migrations
from dantegpu.kit.outbox import Outbox
from dantegpu.services.billing.rpc import BillingRpc
from dantegpu.services.billing.service import Billing
from dantegpu.services.billing.settings import BillingSettings

SCHEMA = "billing"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


def build(deps: Deps, settings: BillingSettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    outbox = Outbox(db, deps.bus, deps.clock)
    billing = Billing(
        outbox,
        deps.clock,
        fee_basis_points=settings.platform_fee_basis_points,
        max_credit_udgpu=settings.max_credit_udgpu,
    )
    return Service(
        name=settings.service_name,
        components=[Migrations(dsn, SCHEMA, MIGRATIONS), db, outbox],
        register_rpc=lambda server: add_BillingServiceServicer_to_server(
            BillingRpc(db, billing, holds_wait_for_disk=settings.holds_wait_for_disk), server
        ),
        checks={"database": db.ready, "nats": deps.bus.ready},
    )
