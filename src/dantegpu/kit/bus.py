"""NATS: publish, request, subscribe, JetStream streams and batch consumers. A message only wakes somebody up."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import structlog
from google.protobuf.message import DecodeError, Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import Error as JetStreamError
from nats.js.errors import NotFoundError

from dantegpu.contracts.subjects import STREAMS, Stream, is_own_inbox
from dantegpu.kit.errors import ServiceError, Unavailable
from dantegpu.kit.lifecycle import Pace, Tasks

log = structlog.get_logger(__name__)

ACK_WAIT_SECONDS = 30
DUPLICATE_WINDOW_SECONDS = 120
MAX_ACK_PENDING = 20_000
PUBLISH_TIMEOUT_SECONDS = 5.0
CLOSE_TIMEOUT_SECONDS = 5.0
FIRST_CONNECT_SECONDS = 10.0
RECONNECT_WAIT_SECONDS = 0.2
STREAM_CHECK_SECONDS = 5.0
"""How soon a stream or consumer that vanished (the store was deleted) is made again."""

type Credentials = Path | Callable[[], tuple[str, str]]
"""A creds file, or a function that gives (user JWT, seed): called at each connect, so renewed JWTs are picked up."""


class Bus:
    """One connection to NATS, shared by everything in the process. Reconnects for ever."""

    def __init__(
        self,
        url: str,
        credentials: Credentials | None,
        *,
        name: str,
        inbox_prefix: str = "_INBOX",
        streams: Sequence[Stream] = STREAMS,
    ) -> None:
        self.url = url
        self._credentials = credentials
        self._name = name
        self._inbox_prefix = inbox_prefix
        self._streams = streams
        self._client = Client()
        self._tasks = Tasks(f"bus {name}")
        self._consumers: list[_Consumer] = []
        self._on_reconnect: list[Callable[[], None]] = []
        self._repairing = asyncio.Lock()
        self._started = False

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect. Raises Unavailable when no server answers within a few seconds."""
        if self._started:
            return
        self._started = True
        options: dict[str, Any] = {}
        if isinstance(self._credentials, Path):
            options["user_credentials"] = str(self._credentials)
        elif self._credentials is not None:
            options |= _jwt_callbacks(self._credentials)
        try:
            # The client itself would try for ever, also the first time.
            async with asyncio.timeout(FIRST_CONNECT_SECONDS):
                await self._client.connect(
                    self.url,
                    name=self._name,
                    inbox_prefix=self._inbox_prefix.encode(),
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=cast(
                        int, RECONNECT_WAIT_SECONDS
                    ),  # nats-py sleeps this long; its annotation is too narrow
                    connect_timeout=3,
                    allow_reconnect=True,
                    error_cb=self._on_error,
                    reconnected_cb=self._reconnected,
                    **options,
                )
        except (OSError, NatsError, TimeoutError) as error:
            self._started = False
            detail = str(error) or f"tried for {FIRST_CONNECT_SECONDS:.0f} s"
            raise Unavailable(f"NATS at {self.url}", detail) from error
        if self._streams:
            await self._ensure_streams()
            self._tasks.loop(self._watch_streams, "streams")

    async def stop(self) -> None:
        await self._tasks.stop()
        if self._started and not self._client.is_closed:
            # Waited for from outside: while the client is reconnecting, its close() ends with a CancelledError that
            # nobody asked for.
            closing = asyncio.ensure_future(self._client.close())
            await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_SECONDS)
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    async def ready(self) -> None:
        """Raises Unavailable while the connection is down."""
        if not self._client.is_connected:
            raise Unavailable("NATS")

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self._on_reconnect.append(callback)

    # --- core ---------------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, message: Message | bytes) -> None:
        """Fire and forget; lost when nobody listens or the connection is down."""
        payload = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            await self._client.publish(subject, payload)
        except NatsError as error:
            raise Unavailable("NATS", str(error)) from error

    async def request[R: Message](
        self, subject: str, message: Message, reply_type: type[R], *, timeout_seconds: float
    ) -> R:
        """Raises Unavailable when nobody answers in time."""
        try:
            reply = await self._client.request(subject, message.SerializeToString(), timeout=timeout_seconds)
        except (NoRespondersError, TimeoutError, NatsError) as error:
            raise Unavailable(subject, str(error) or type(error).__name__) from error
        result = reply_type()
        result.ParseFromString(reply.data)
        return result

    async def subscribe(
        self, subject: str, handler: Callable[[Msg], Awaitable[None]], *, queue: str = ""
    ) -> Subscription:
        """Call `handler` for each message; with `queue`, one of the subscribers of that name gets it.

        Handlers run one after the other; one that has to wait for something spawns a task of its own.
        """

        async def guarded(message: Msg) -> None:
            try:
                await handler(message)
            except (ServiceError, ValueError, DecodeError) as error:
                log.warning("message_refused", subject=message.subject, error=str(error))
            except Exception:
                log.exception("message_handler_crashed", subject=message.subject)

        return await self._client.subscribe(subject, queue=queue, cb=guarded)

    async def flush(self) -> None:
        """Wait until the server has everything that was sent, subscriptions too. Raises Unavailable."""
        try:
            await flush(self._client)
        except (NatsError, TimeoutError) as error:
            raise Unavailable("NATS", str(error)) from error

    async def respond(self, message: Msg, reply: Message) -> None:
        """Answer a machine, and nobody else.

        NATS lets a client name any subject for the answer, and this connection may publish everywhere: a machine would
        have us speak for it to other machines, or to JetStream's management.
        """
        if is_own_inbox(message.subject, message.reply):
            await self.publish(message.reply, reply)
        else:
            log.warning("reply_subject_refused", subject=message.subject, reply_to=message.reply[:200])

    # --- JetStream ----------------------------------------------------------------------------------------------------

    @cached_property
    def _js(self) -> JetStreamContext:
        return self._client.jetstream(timeout=PUBLISH_TIMEOUT_SECONDS)

    async def publish_stream(self, subject: str, payload: bytes, message_id: str) -> None:
        """Publish and wait until JetStream has acknowledged. Raises Unavailable otherwise."""
        try:
            await self._js.publish(subject, payload, headers={"Nats-Msg-Id": message_id})
        except (NatsError, JetStreamError, TimeoutError) as error:
            raise Unavailable("NATS JetStream", str(error) or type(error).__name__) from error

    async def consume(
        self,
        stream: Stream,
        durable: str,
        handler: Callable[[Sequence[Msg]], Awaitable[None]],
        *,
        max_batch: int = 1000,
    ) -> "Consuming":
        """Hand what arrives on `stream` to `handler`, in batches, acknowledging each after the handler returned.

        The first message goes at once; what arrives meanwhile is the next batch. When the handler raises, the batch is
        handed out again after a moment.
        """
        consumer = _Consumer(stream, durable, handler, max_batch)
        await self._bind(consumer)
        self._consumers.append(consumer)
        task = self._tasks.loop(consumer.drain, f"consume {stream.name}")
        return Consuming(self, consumer, task)

    async def end_consumer(self, consumer: "_Consumer", task: asyncio.Task[None]) -> None:
        self._consumers.remove(consumer)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if consumer.subscription is not None:
            await self._drained(consumer.subscription)
            await consumer.give_back()

    async def _drained(self, subscription: Subscription) -> None:
        """End a subscription after what the server has sent on it was taken in."""
        if self._client.is_connected:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                    await subscription.drain()
                return
            except (NatsError, TimeoutError) as error:
                log.warning("subscription_not_drained", bus=self._name, error=repr(error))
        # Also while disconnected: the client would subscribe again, and nobody would read what it gets.
        await unsubscribe(subscription)

    async def _bind(self, consumer: "_Consumer") -> None:
        config = ConsumerConfig(
            durable_name=consumer.durable,
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_SECONDS,
            max_ack_pending=MAX_ACK_PENDING,
        )
        consumer.subscription = await self._js.subscribe(
            consumer.stream.subjects[0],
            queue=consumer.durable,
            durable=consumer.durable,
            stream=consumer.stream.name,
            cb=consumer.receive,
            manual_ack=True,
            config=config,
            pending_msgs_limit=MAX_ACK_PENDING * 2,
        )

    async def _ensure_streams(self) -> None:
        for stream in self._streams:
            config = StreamConfig(
                name=stream.name,
                subjects=list(stream.subjects),
                retention=RetentionPolicy.WORK_QUEUE if stream.work_queue else RetentionPolicy.LIMITS,
                storage=StorageType.FILE,
                max_age=stream.max_age.total_seconds(),
                max_bytes=stream.max_bytes,
                duplicate_window=DUPLICATE_WINDOW_SECONDS,
            )
            try:
                await self._js.stream_info(stream.name)
            except NotFoundError:
                await self._js.add_stream(config)
                log.info("stream_created", stream=stream.name)

    async def _watch_streams(self) -> None:
        await asyncio.sleep(STREAM_CHECK_SECONDS)
        if self._client.is_connected:
            await self._repair()

    async def _repair(self) -> None:
        async with self._repairing:  # after a reconnect and by the clock at the same time: it would bind twice
            await self._ensure_streams()
            for consumer in self._consumers:
                try:
                    await self._js.consumer_info(consumer.stream.name, consumer.durable)
                except NotFoundError:
                    log.warning("consumer_recreated", stream=consumer.stream.name, durable=consumer.durable)
                    await unsubscribe(consumer.subscription)
                    await self._bind(consumer)

    async def _on_error(self, error: Exception) -> None:
        log.warning("nats_error", bus=self._name, error=str(error) or type(error).__name__)

    async def _reconnected(self) -> None:
        log.info("nats_reconnected", bus=self._name)
        for callback in self._on_reconnect:
            callback()
        if self._streams:
            self._tasks.spawn(self._repair(), "repair after reconnect")


async def flush(client: Client) -> None:
    """Wait until the server has everything that this client sent before, its subscriptions too.

    The client writes its ping ahead of what its flusher has not written yet, so the first answer can come before the
    server has seen a subscription; the second ping is written after it.
    """
    await client.flush()
    await client.flush()


async def unsubscribe(subscription: Subscription) -> None:
    """End a subscription; one that has ended with its connection is fine."""
    with contextlib.suppress(NatsError):
        await subscription.unsubscribe()


class Consuming:
    """A running consumer. close() leaves the durable's place in the stream for whoever consumes next."""

    def __init__(self, bus: Bus, consumer: "_Consumer", task: asyncio.Task[None]) -> None:
        self._bus = bus
        self._consumer = consumer
        self._task = task

    async def close(self) -> None:
        await self._bus.end_consumer(self._consumer, self._task)


class _Consumer:
    def __init__(
        self, stream: Stream, durable: str, handler: Callable[[Sequence[Msg]], Awaitable[None]], max_batch: int
    ) -> None:
        self.stream = stream
        self.durable = durable
        self.subscription: Any = None
        self._handler = handler
        self._max_batch = max_batch
        self._pace = Pace(0.0)
        # Bounded: while the handler fails for long, JetStream hands the same messages out again and again.
        self._queue: asyncio.Queue[Msg] = asyncio.Queue(MAX_ACK_PENDING)

    async def receive(self, message: Msg) -> None:
        await self._queue.put(message)

    async def give_back(self) -> None:
        """Let the next reader of the stream have what this one took and did not come to."""
        await _give_back([self._queue.get_nowait() for _ in range(self._queue.qsize())], delay_seconds=None)

    async def drain(self) -> None:
        batch = [await self._queue.get()]
        while len(batch) < self._max_batch and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        self._pace.begin()
        try:
            await self._handler(batch)
        except BaseException:
            # A cancellation must get through all the same.
            await _give_back(batch, delay_seconds=1.0)
            raise
        for message in batch:
            await message.ack()
        await self._pace.rest()


async def _give_back(messages: Sequence[Msg], delay_seconds: float | None) -> None:
    """Have JetStream hand the messages out again soon; if it cannot be told, it does so after ack_wait."""
    with contextlib.suppress(NatsError):
        for message in messages:
            await message.nak(delay=delay_seconds)


def _jwt_callbacks(credentials: Callable[[], tuple[str, str]]) -> dict[str, Any]:
    import nkeys

    def user_jwt() -> bytes:
        return credentials()[0].encode()

    def sign(nonce: str) -> bytes:
        import base64

        key = nkeys.from_seed(credentials()[1].encode())
        return base64.b64encode(key.sign(nonce.encode()))

    return {"user_jwt_cb": user_jwt, "signature_cb": sign}
