"""Wiring of auth-service."""

from pathlib import Path

from dantegpu.contracts.gen.dante.v1.auth_pb2_grpc import add_AuthServiceServicer_to_server
from dantegpu.kit.db import Database
from dantegpu.kit.deps import Deps
from dantegpu.kit.lifecycle import Service
from dantegpu.kit.migrate import Migrations
from dantegpu.services.auth.audit import AuditLog
from dantegpu.services.auth.passwords import Passwords
from dantegpu.services.auth.rpc import AuthRpc
from dantegpu.services.auth.secrets import Secrets
from dantegpu.services.auth.service.accounts import Accounts
from dantegpu.services.auth.service.api_keys import ApiKeys
from dantegpu.services.auth.service.machines import Machines
from dantegpu.services.auth.service.teams import Teams
from dantegpu.services.auth.settings import AuthSettings
from dantegpu.services.auth.signing import SigningKeys
from dantegpu.services.auth.throttle import LoginThrottle
from dantegpu.services.auth.upkeep import Upkeep

SCHEMA = "auth"
MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


def build(deps: Deps, settings: AuthSettings) -> Service:
    dsn = settings.database_url.get_secret_value()
    clock = deps.clock
    db = Database(dsn, SCHEMA, max_size=settings.database_pool_max_size)
    secrets = Secrets(settings)
    audit = AuditLog(secrets, clock)
    keys = SigningKeys(db, secrets, clock, settings)
    accounts = Accounts(secrets, keys, Passwords(), LoginThrottle(settings), audit, clock, settings)
    rpc = AuthRpc(
        db,
        secrets,
        keys,
        accounts,
        Teams(audit, clock, settings),
        ApiKeys(audit, clock, settings),
        Machines(secrets, audit, clock, settings),
    )
    return Service(
        name=settings.service_name,
        components=[
            Migrations(dsn, SCHEMA, MIGRATIONS),
            db,
            secrets,
            keys,
            Upkeep(db, keys, clock, settings.upkeep_interval_seconds),
        ],
        register_rpc=lambda server: add_AuthServiceServicer_to_server(rpc, server),
        checks={"database": db.ready},
    )
