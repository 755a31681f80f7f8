"""The machine's line to the platform: one NATS connection, renewed credentials, requests and reports.

A connection that stays down is built anew: NATS clients give up for good when the server says that a credential has
expired, and a machine must come back by itself whatever happened.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import structlog
from nats.aio.msg import Msg

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.daemon.enrol import EnrolmentRefused, GatewayUnreachable, Identity
from dantegpu.kit.bus import Bus
from dantegpu.kit.errors import Unavailable
from dantegpu.kit.lifecycle import Tasks

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_SECONDS = 5.0
LOGS_TIMEOUT_SECONDS = 10.0
CHECK_SECONDS = 2.0
REBUILD_AFTER_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 15.0


class Link:
    """Component. Connects in the background, however long the platform is away."""

    def __init__(self, identity: Identity, nats_url: str) -> None:
        self._identity = identity
        self._nats_url = nats_url
        self._on_desired: Callable[[machine_pb2.DesiredState], Awaitable[None]] = _ignore
        self._on_up: Callable[[], None] = _nothing
        self._bus: Bus | None = None
        self._tasks = Tasks("link")

    async def start(
        self, on_desired: Callable[[machine_pb2.DesiredState], Awaitable[None]], on_up: Callable[[], None]
    ) -> None:
        """`on_desired` gets each push; `on_up` is called whenever the connection is there (again)."""
        self._on_desired, self._on_up = on_desired, on_up
        self._tasks.loop(self._keep, "keep")

    async def stop(self) -> None:
        await self._tasks.stop()
        await self._drop()

    @property
    def connected(self) -> bool:
        return self._bus is not None and self._bus.connected

    @property
    def _up(self) -> Bus:
        if self._bus is None:
            raise Unavailable("NATS", "not connected yet")
        return self._bus

    # --- what the machine says ----------------------------------------------------------------------------------------

    async def sync(self, request: machine_pb2.SyncRequest) -> machine_pb2.DesiredState:
        subject = subjects.machine_sync(self._identity.machine_id)
        return await self._up.request(
            subject, request, machine_pb2.DesiredState, timeout_seconds=REQUEST_TIMEOUT_SECONDS
        )

    async def urls(self, request: machine_pb2.UrlsRequest) -> machine_pb2.UrlsReply:
        subject = subjects.machine_urls(self._identity.machine_id)
        return await self._up.request(subject, request, machine_pb2.UrlsReply, timeout_seconds=REQUEST_TIMEOUT_SECONDS)

    async def logs(self, request: machine_pb2.LogAppend) -> machine_pb2.LogAppended:
        subject = subjects.machine_logs(self._identity.machine_id)
        return await self._up.request(subject, request, machine_pb2.LogAppended, timeout_seconds=LOGS_TIMEOUT_SECONDS)

    async def report(self, statuses: Sequence[machine_pb2.AttemptStatus]) -> None:
        """Raises Unavailable when JetStream did not take it; the next sync tells the same."""
        report = machine_pb2.Report(machine_id=str(self._identity.machine_id), attempts=statuses)
        first = statuses[0]
        message_id = f"{first.attempt_id}.{first.seq}.{len(statuses)}"
        subject = subjects.machine_report(self._identity.machine_id)
        await self._up.publish_stream(subject, report.SerializeToString(), message_id)

    async def metrics(self, report: machine_pb2.MetricsReport) -> None:
        await self._up.publish(subjects.machine_metrics(self._identity.machine_id), report)

    async def heartbeat(self, heartbeat: machine_pb2.Heartbeat) -> None:
        await self._up.publish(subjects.machine_heartbeat(self._identity.machine_id), heartbeat)

    # --- keeping it up ------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Connect, then watch; returns when the connection has to be built anew."""
        await self._renew_if_due()
        pause_seconds = FIRST_PAUSE_SECONDS
        while not await self._connect():
            # Jitter: thousands of machines come back at the same moment when the platform does.
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.5))
            pause_seconds = min(MAX_PAUSE_SECONDS, pause_seconds * 2)
            await self._renew_if_due()
        down_seconds = 0.0
        while down_seconds < REBUILD_AFTER_SECONDS:
            await asyncio.sleep(CHECK_SECONDS)
            down_seconds = 0.0 if self.connected else down_seconds + CHECK_SECONDS
            await self._renew_if_due()
        log.warning("connection_rebuilt", down_seconds=down_seconds)
        await self._drop()

    async def _connect(self) -> bool:
        machine_id = self._identity.machine_id
        bus = Bus(
            self._nats_url or self._identity.nats_url,
            self._identity.credentials,
            name=f"machine {machine_id}",
            inbox_prefix=subjects.machine_inbox_prefix(machine_id),
            streams=(),
        )
        try:
            await bus.start()
            await bus.subscribe(subjects.machine_desired(machine_id), self._desired)
        except Unavailable as error:
            log.info("platform_unreachable", error=error.message)
            await bus.stop()
            return False
        bus.on_reconnect(self._on_up)
        self._bus = bus
        log.info("connected", machine_id=str(machine_id))
        self._on_up()
        return True

    async def _desired(self, message: Msg) -> None:
        await self._on_desired(machine_pb2.DesiredState.FromString(message.data))

    async def _renew_if_due(self) -> None:
        if not self._identity.renewal_due:
            return
        try:
            await self._identity.renew()
        except (GatewayUnreachable, EnrolmentRefused) as error:
            log.warning("credential_not_renewed", error=str(error), expired=self._identity.expired)

    async def _drop(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.stop()


async def _ignore(state: machine_pb2.DesiredState) -> None:
    del state


def _nothing() -> None:
    return
