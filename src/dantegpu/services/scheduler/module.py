"""Wiring of scheduler-orchestrator-service."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from dantegpu.contracts.gen.dante.v1 import (
    billing_pb2_grpc,
    jobs_pb2_grpc,
    marketplace_pb2_grpc,
    registry_pb2_grpc,
    storage_pb2_grpc,
)
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lease import Leadership
from dantegpu.kit.lifecycle import MAX_RESTART_DELAY_SECONDS, Service
from dantegpu.kit.migrate import Migrations
from dantegpu.kit.outbox import Outbox
from dantegpu.services.scheduler.consumers import MachineConsumers
from dantegpu.services.scheduler.rpc import JobRpc
from dantegpu.services.scheduler.service.arrays import Arrays
from dantegpu.services.scheduler.service.intake import Intake
from dantegpu.services.scheduler.service.inventory import Inventory
from dantegpu.services.scheduler.service.lifetimes import Lifetimes
from dantegpu.services.scheduler.service.machines import Dispatcher, Machines
from dantegpu.services.scheduler.service.placement import PlacementLeader
from dantegpu.services.scheduler.service.quarantines import Quarantines
from dantegpu.services.scheduler.service.schedules import Schedules
from dantegpu.services.scheduler.service.settlement import Settlement
from dantegpu.services.scheduler.service.timers import Timers
from dantegpu.services.scheduler.service.transitions import Wakeups
from dantegpu.services.scheduler.service.upkeep import Upkeep
from dantegpu.services.scheduler.settings import SchedulerSettings

log = structlog.get_logger(__name__)

SCHEMA = "scheduler"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


async def _keep(part: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a part of the leader's work until cancelled; when it crashes, only that part starts again."""
    while True:
        try:
            await run()
        except Exception:
            log.exception("leaders_part_crashed", part=part)
            await asyncio.sleep(MAX_RESTART_DELAY_SECONDS)


def build(deps: Deps, settings: SchedulerSettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    outbox = Outbox(db, deps.bus, deps.clock)
    registry = registry_pb2_grpc.RegistryServiceStub(deps.channels.to("provider-registry-service"))
    marketplace = marketplace_pb2_grpc.MarketplaceServiceStub(deps.channels.to("agora-marketplace"))
    billing = billing_pb2_grpc.BillingServiceStub(deps.channels.to("billing-payment-service"))
    storage = storage_pb2_grpc.StorageServiceStub(deps.channels.to("storage-service"))

    wakeups = Wakeups()
    inventory = Inventory(registry, marketplace, deps.bus, settings.inventory_refresh_seconds)
    machines = Machines(db, inventory, registry, storage, outbox, wakeups, deps.clock, settings)
    dispatcher = Dispatcher(machines, deps.bus)
    settlement = Settlement(db, billing, outbox, wakeups, deps.clock, settings)
    timers = Timers(db, outbox, wakeups, deps.clock, settings)
    placement = PlacementLeader(db, deps.bus, inventory, billing, outbox, wakeups, deps.clock, settings)
    intake = Intake(db, inventory, storage, outbox, wakeups, deps.clock, settings)
    schedules = Schedules(db, intake, deps.clock, settings)
    quarantines = Quarantines(db, inventory, deps.clock, settings)
    arrays = Arrays(db, outbox, wakeups, deps.clock, settings, placement.take)
    upkeep = Upkeep(db, storage, deps.clock, settings)
    lifetimes = Lifetimes(db, outbox, wakeups, deps.clock, settings, placement.take)
    wakeups.machines = dispatcher.notify
    wakeups.opened = dispatcher.opened
    wakeups.folded = dispatcher.folded
    wakeups.settlement = settlement.notify
    wakeups.placement = placement.notify
    wakeups.submitted = placement.submitted
    wakeups.ended = placement.ended
    wakeups.arrays = arrays.notify
    wakeups.dropped = placement.drop_ended

    parts = {
        "timers": timers.run, "settlement": settlement.run, "arrays": arrays.run, "lifetimes": lifetimes.run,
        "quarantines": quarantines.lead, "upkeep": upkeep.run, "schedules": schedules.run,
    }  # fmt: skip

    async def lead(_epoch: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(placement.lead(), name="placement")
            for name, run in parts.items():
                tasks.create_task(_keep(name, run), name=name)

    leadership = Leadership(db, "placement", lead)
    placement.leadership = leadership
    placement.room.leadership = leadership
    arrays.leadership = leadership
    lifetimes.leadership = leadership
    schedules.leadership = leadership
    quarantines.leadership = leadership
    return Service(
        name=settings.service_name,
        components=[
            Migrations(dsn, SCHEMA, MIGRATIONS),
            db,
            outbox,
            inventory,
            quarantines,
            dispatcher,
            MachineConsumers(deps.bus, machines),
            leadership,
        ],
        register_rpc=lambda server: jobs_pb2_grpc.add_JobServiceServicer_to_server(
            JobRpc(db, intake, schedules, quarantines), server
        ),
        checks={"database": db.ready, "nats": deps.bus.ready, "inventory": inventory.ready},
    )
