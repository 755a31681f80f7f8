"""NATS edge of the scheduler: what machines send."""

from collections.abc import Awaitable, Callable, Sequence

import structlog
from google.protobuf.message import Message
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from dantegpu.contracts import subjects
from dantegpu.contracts.gen.dante.v1 import machine_pb2
from dantegpu.domain.ids import InvalidId
from dantegpu.kit.bus import Bus, Consuming, unsubscribe
from dantegpu.kit.errors import ServiceError
from dantegpu.kit.lifecycle import Tasks
from dantegpu.services.scheduler.service.machines import Machines, decode_reports

log = structlog.get_logger(__name__)

QUEUE_GROUP = "scheduler"
MAX_CONCURRENT = 64
"""Requests of machines being answered at once; the rest waits in the NATS client, whose queue is bounded."""


class MachineConsumers:
    """Component: syncs and URL requests by request/reply, reports from their stream."""

    def __init__(self, bus: Bus, machines: Machines) -> None:
        self._bus = bus
        self._machines = machines
        self._tasks = Tasks("machine requests")
        self._running = 0
        self._subscriptions: list[Subscription] = []
        self._consuming: Consuming | None = None

    async def start(self) -> None:
        self._subscriptions = [
            await self._bus.subscribe(subjects.ALL_SYNCS, self._sync, queue=QUEUE_GROUP),
            await self._bus.subscribe(subjects.ALL_URLS, self._urls, queue=QUEUE_GROUP),
        ]
        self._consuming = await self._bus.consume(subjects.REPORTS, subjects.REPORTS_CONSUMER, self._reports)

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await unsubscribe(subscription)
        self._subscriptions.clear()
        if self._consuming is not None:
            await self._consuming.close()
            self._consuming = None
        await self._tasks.stop()

    async def _reports(self, messages: Sequence[Msg]) -> None:
        await self._machines.fold(decode_reports(messages))

    async def _sync(self, message: Msg) -> None:
        machine_id = subjects.machine_of(message.subject)
        request = machine_pb2.SyncRequest.FromString(message.data)
        await self._answer(message, lambda: self._machines.sync(machine_id, request), _no_sync)

    async def _urls(self, message: Msg) -> None:
        machine_id = subjects.machine_of(message.subject)
        request = machine_pb2.UrlsRequest.FromString(message.data)
        await self._answer(message, lambda: self._machines.urls(machine_id, request), _no_urls)

    async def _answer[R: Message](
        self, message: Msg, work: Callable[[], Awaitable[R]], failed: Callable[[str], R]
    ) -> None:
        """Answer in a task of its own, so that one slow answer does not hold up other machines."""

        async def run() -> None:
            try:
                reply = await work()
            except ServiceError as error:
                log.warning("machine_request_failed", subject=message.subject, error=error.message)
                reply = failed("unavailable")
            except InvalidId as error:
                reply = failed(f"refused: {error}")
            finally:
                self._running -= 1
            await self._bus.respond(message, reply)

        self._running += 1
        if self._running > MAX_CONCURRENT:
            await run()
        else:
            self._tasks.spawn(run(), "request")


def _no_sync(problem: str) -> machine_pb2.DesiredState:
    return machine_pb2.DesiredState(error=problem)


def _no_urls(problem: str) -> machine_pb2.UrlsReply:
    return machine_pb2.UrlsReply(error=problem)
