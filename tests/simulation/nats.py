"""nats-server for the simulation, behind the client that kit/bus.py uses: core subjects, streams, durable consumers.

Bus and its consumers run unchanged. Messages take time, may come twice or out of order, and wait while a line is cut;
streams deliver again what was not acknowledged.
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

from nats.errors import ConnectionClosedError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from nats.js.errors import NotFoundError, ServiceUnavailableError

from tests.simulation.loop import Process, SimLoop, current_process
from tests.simulation.scenario import Fault

ACK_WAIT_SECONDS = 8.0
DUPLICATE_WINDOW_SECONDS = 30.0
NOTICED_AFTER_SECONDS = 1.5
"""How soon a client knows that a broken connection is broken."""


@dataclass(slots=True)
class Weather:
    """How messages fare. Chances are per message."""

    latency_seconds: tuple[float, float] = (0.0002, 0.004)
    late_chance: float = 0.0
    late_seconds: float = 3.0
    twice_chance: float = 0.0
    lost_ack_chance: float = 0.0


@dataclass(slots=True)
class SimMsg:
    """What kit/bus.py needs of nats.aio.msg.Msg."""

    subject: str
    data: bytes
    reply: str = ""
    headers: Mapping[str, str] | None = None
    pending: "_Pending | None" = None
    consumer: "_Durable | None" = None
    client: "SimClient | None" = None

    async def ack(self) -> None:
        if self.consumer is not None and self.pending is not None and self._reaches_the_server():
            self.consumer.acked(self.pending)

    async def nak(self, delay: float | None = None) -> None:
        if self.consumer is not None and self.pending is not None and self._reaches_the_server():
            self.consumer.refused(self.pending, delay or 0.0)

    def _reaches_the_server(self) -> bool:
        if self.client is None:
            return False
        self.client.check_alive()
        return self.client.online and not self.client.cut


class SimSubscription:
    """One client's interest in a subject."""

    def __init__(
        self, client: "SimClient", subject: str, queue: str, callback: Callable[[Any], Awaitable[None]]
    ) -> None:
        self.client = client
        self.subject = subject
        self.queue = queue
        self.active = True
        self._callback = callback
        self._inbox: deque[SimMsg] = deque()
        self._reading = False

    async def unsubscribe(self) -> None:
        self.client.forget(self)

    async def drain(self) -> None:
        self.client.forget(self)

    def receive(self, message: SimMsg) -> None:
        """Handlers of a subscription run one after the other, in the client's process."""
        if self.client.process_dead:
            return
        self._inbox.append(message)
        if not self._reading:
            self._reading = True
            self.client.spawn(self._read())

    async def _read(self) -> None:
        while self._inbox:
            await self._callback(self._inbox.popleft())
        self._reading = False


@dataclass(slots=True)
class _Pending:
    sequence: int
    message: SimMsg
    done: bool = False
    delivered: bool = False
    redeliver_at: Any = None


class _Durable:
    """A durable push consumer: hands each message to one of the subscriptions bound to it until it is acknowledged."""

    def __init__(self, broker: "SimNats", stream: "_Stream") -> None:
        self._broker = broker
        self._stream = stream
        self.bound: list[SimSubscription] = []
        self._turn = 0

    def offer(self, pending: _Pending) -> None:
        """Deliver it now, or again when nobody has acknowledged it in time."""
        if pending.done or self._stream.gone:
            return
        loop = self._broker.loop
        pending.redeliver_at = loop.later(ACK_WAIT_SECONDS, self.offer, pending)
        reachable = [sub for sub in self.bound if sub.active and sub.client.online]
        pending.delivered = bool(reachable)
        if reachable:
            self._turn += 1
            chosen = reachable[self._turn % len(reachable)]
            original = pending.message
            message = SimMsg(original.subject, original.data, "$JS.ACK", original.headers, pending, self, chosen.client)
            self._broker.deliver(chosen, message)

    def offer_undelivered(self) -> None:
        """Somebody is there again."""
        for pending in self._stream.waiting():
            if not pending.delivered:
                if pending.redeliver_at is not None:
                    pending.redeliver_at.cancel()
                self.offer(pending)

    def bind(self, subscription: SimSubscription) -> None:
        self.bound.append(subscription)
        for pending in self._stream.waiting():
            if pending.redeliver_at is not None:
                pending.redeliver_at.cancel()
            self.offer(pending)

    def acked(self, pending: _Pending) -> None:
        if not self._broker.up or self._stream.gone:
            return
        pending.done = True
        self._stream.forget(pending)
        if pending.redeliver_at is not None:
            pending.redeliver_at.cancel()

    def refused(self, pending: _Pending, delay_seconds: float) -> None:
        if not pending.done and not self._stream.gone:
            if pending.redeliver_at is not None:
                pending.redeliver_at.cancel()
            pending.redeliver_at = self._broker.loop.later(delay_seconds, self.offer, pending)


@dataclass(slots=True)
class _Stream:
    subjects: tuple[str, ...]
    keeps: bool
    messages: dict[int, _Pending] = field(default_factory=dict[int, _Pending])
    known_ids: dict[str, float] = field(default_factory=dict[str, float])
    consumers: dict[str, _Durable] = field(default_factory=dict[str, _Durable])
    gone: bool = False

    def waiting(self) -> list[_Pending]:
        return [pending for pending in self.messages.values() if not pending.done]

    def forget(self, pending: _Pending) -> None:
        self.messages.pop(pending.sequence, None)


@lru_cache(maxsize=20_000)
def matches(pattern: str, subject: str) -> bool:
    """NATS's wildcards."""
    if pattern == subject:
        return True
    wanted, parts = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(parts) >= len(wanted) and all(w in ("*", p) for w, p in zip(wanted[:-1], parts, strict=False))
    return len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


class SimNats:
    """The server."""

    def __init__(self, loop: SimLoop, random: Random, happened: Counter[str]) -> None:
        self.loop = loop
        self.random = random
        self.happened = happened
        self.weather = Weather()
        self.up = True
        self.clients: list[SimClient] = []
        self.streams: dict[str, _Stream] = {}
        self._subscriptions: dict[str, dict[SimSubscription, None]] = {}
        """By subject."""
        self._sequences = itertools.count(1)
        self.inboxes = itertools.count(1)

    # --- faults -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """The server goes away: every connection breaks, what was in flight is lost."""
        self.up = False
        for client in list(self.clients):
            client.broken()

    def start(self, *, empty: bool) -> None:
        """It comes back; `empty`: somebody deleted its store."""
        if empty:
            for stream in self.streams.values():
                stream.gone = True
            self.streams.clear()
        self.up = True
        for client in list(self.clients):
            client.reconnect_soon()

    # --- messages -----------------------------------------------------------------------------------------------------

    def delay_seconds(self) -> float:
        low, high = self.weather.latency_seconds
        delay = low + (high - low) * self.random.random()
        if self.weather.late_chance and self.random.random() < self.weather.late_chance:
            delay += self.weather.late_seconds * self.random.random()
            self.happened[Fault.MESSAGES_LATE] += 1
        return delay

    def publish(self, subject: str, data: bytes, reply: str = "") -> int:
        """At the server now; how many core subscriptions it goes to."""
        chosen: list[SimSubscription] = []
        groups: dict[str, list[SimSubscription]] = {}
        for pattern, subscriptions in self._subscriptions.items():
            if matches(pattern, subject):
                for subscription in subscriptions:
                    if subscription.client.online:
                        members = groups.setdefault(subscription.queue, []) if subscription.queue else chosen
                        members.append(subscription)
        chosen += [members[0] if len(members) == 1 else self.random.choice(members) for members in groups.values()]
        for subscription in chosen:
            self.deliver(subscription, SimMsg(subject, data, reply))
        return len(chosen)

    def add(self, subscription: SimSubscription) -> None:
        self._subscriptions.setdefault(subscription.subject, {})[subscription] = None

    def remove(self, subscription: SimSubscription) -> None:
        same = self._subscriptions[subscription.subject]
        del same[subscription]
        if not same:
            del self._subscriptions[subscription.subject]

    def store(self, subject: str, data: bytes, message_id: str) -> None:
        """Raises NotFoundError when no stream wants it."""
        stream = next(
            (s for s in self.streams.values() if any(matches(pattern, subject) for pattern in s.subjects)), None
        )
        if stream is None:
            raise NotFoundError
        now = self.loop.time()
        if now - stream.known_ids.get(message_id, -DUPLICATE_WINDOW_SECONDS) >= DUPLICATE_WINDOW_SECONDS:
            stream.known_ids[message_id] = now
            if not stream.keeps:
                pending = _Pending(next(self._sequences), SimMsg(subject, data, headers={"Nats-Msg-Id": message_id}))
                stream.messages[pending.sequence] = pending
                for consumer in stream.consumers.values():
                    consumer.offer(pending)
            self.publish(subject, data)

    def deliver(self, subscription: SimSubscription, message: SimMsg) -> None:
        copies = 2 if self.weather.twice_chance and self.random.random() < self.weather.twice_chance else 1
        self.happened[Fault.MESSAGES_TWICE] += copies - 1
        for _ in range(copies):
            self.loop.later(self.delay_seconds(), subscription.client.arrive, subscription, message)


class SimClient:
    """What kit/bus.py needs of nats.aio.client.Client. Belongs to the process that makes it."""

    def __init__(self, broker: SimNats) -> None:
        self._broker = broker
        self._process = current_process()
        self._subscriptions: list[SimSubscription] = []
        self._reconnected: Callable[[], Awaitable[None]] | None = None
        self._open = False
        self._inbox_prefix = "_INBOX"
        self._buffer: list[Callable[[], None]] = []
        self.cut = False
        """The line is cut without a word: both ends send into the void, and what they sent may come when it is back."""
        self._inward: list[tuple[SimSubscription, SimMsg]] = []
        self._outward: list[Callable[[], None]] = []
        self.is_connected = False

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        return not self._open

    @property
    def online(self) -> bool:
        """Whether the server believes that this client is there."""
        return self._open and self.is_connected and not self.process_dead

    @property
    def process_dead(self) -> bool:
        return self._process is not None and not self._process.alive

    @property
    def owner(self) -> str:
        return self._process.name if self._process is not None else ""

    def belongs_to(self, process: Process) -> bool:
        return self._process is process

    def spawn(self, work: Any) -> None:
        if self._process is not None:
            self._process.spawn(work)
        else:
            self._broker.loop.create_task(work)

    def broken(self) -> None:
        """The connection is gone; the client notices soon and tries again."""
        if self.is_connected:
            self.is_connected = False
            self._inward.clear()
            self._outward.clear()
            self.reconnect_soon()

    def reconnect_soon(self) -> None:
        self._broker.loop.later(NOTICED_AFTER_SECONDS * (0.5 + self._broker.random.random()), self._reconnect)

    def _reconnect(self) -> None:
        if not self._open or self.is_connected or self.process_dead:
            return
        if not self._broker.up or self.cut:
            self.reconnect_soon()
            return
        self.is_connected = True
        waiting, self._buffer = self._buffer, []
        for send in waiting:
            self._broker.loop.later(self._broker.delay_seconds(), send)
        if self._reconnected is not None:
            self.spawn(self._reconnected())
        for stream in self._broker.streams.values():
            for consumer in stream.consumers.values():
                consumer.offer_undelivered()

    def heal(self, *, keep: bool) -> None:
        """The line is back. `keep`: what was sent meanwhile arrives late; else the connection has to be made anew."""
        self.cut = False
        inward, self._inward = self._inward, []
        outward, self._outward = self._outward, []
        if not keep:
            self.broken()
            return
        for subscription, message in inward:
            self._broker.loop.later(self._broker.delay_seconds(), self.arrive, subscription, message)
        for send in outward:
            self._broker.loop.later(self._broker.delay_seconds(), send)

    def arrive(self, subscription: SimSubscription, message: SimMsg) -> None:
        if self.cut:
            self._inward.append((subscription, message))
        elif self.online and subscription.active:
            subscription.receive(message)

    # --- the client's interface ---------------------------------------------------------------------------------------

    async def connect(self, url: str, **options: Any) -> None:
        self.check_alive()
        await asyncio.sleep(self._broker.delay_seconds())
        if not self._broker.up or self.cut:
            raise OSError("connection refused")
        self._inbox_prefix = options["inbox_prefix"].decode()
        self._reconnected = options["reconnected_cb"]
        self._open = self.is_connected = True
        self._broker.clients.append(self)

    async def close(self) -> None:
        self._open = self.is_connected = False
        for subscription in list(self._subscriptions):
            self.forget(subscription)
        if self in self._broker.clients:
            self._broker.clients.remove(self)

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        self._send(lambda: self._at_server(lambda: self._broker.publish(subject, payload, reply)))

    def _at_server(self, work: Callable[[], Any]) -> None:
        if self._broker.up:
            work()

    def _send(self, send: Callable[[], None]) -> None:
        self.check_alive()
        if not self._open:
            raise ConnectionClosedError
        if not self.is_connected:
            self._buffer.append(send)
        elif self.cut:
            self._outward.append(send)
        else:
            self._broker.loop.later(self._broker.delay_seconds(), send)

    async def request(self, subject: str, payload: bytes, timeout: float = 0.5) -> SimMsg:
        answer: asyncio.Future[SimMsg] = asyncio.get_running_loop().create_future()

        async def answered(message: Any) -> None:
            if not answer.done():
                answer.set_result(message)

        inbox = f"{self._inbox_prefix}.{next(self._broker.inboxes)}"
        subscription = await self.subscribe(inbox, cb=answered)

        def ask() -> None:
            if not self._broker.publish(subject, payload, inbox) and not answer.done():
                answer.set_exception(NoRespondersError())

        self._send(lambda: self._at_server(ask))
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise NatsTimeout from None
        finally:
            self.forget(subscription)

    def forget(self, subscription: SimSubscription) -> None:
        if subscription.active:
            subscription.active = False
            if subscription in self._subscriptions:  # not one of a stream's consumer
                self._subscriptions.remove(subscription)
                self._broker.remove(subscription)

    async def subscribe(
        self, subject: str, queue: str = "", cb: Callable[[Any], Awaitable[None]] | None = None
    ) -> SimSubscription:
        assert cb is not None
        self.check_alive()
        subscription = SimSubscription(self, subject, queue, cb)
        self._subscriptions.append(subscription)
        self._broker.add(subscription)
        return subscription

    async def flush(self, timeout: float = 10) -> None:
        await asyncio.sleep(self._broker.delay_seconds())

    def jetstream(self, **options: Any) -> "SimJetStream":
        return SimJetStream(self, self._broker, options.get("timeout", 5.0))

    def check_alive(self) -> None:
        """Raises ProcessKilled when its process dies here."""
        if self._process is not None:
            self._process.failpoint()

    def send_stream(self, subject: str, payload: bytes, message_id: str, answer: "asyncio.Future[None]") -> None:
        """Publish to a stream; `answer` is resolved when the server's word arrives."""

        def stored() -> None:
            try:
                self._broker.store(subject, payload, message_id)
            except NotFoundError as error:
                self._answer_later(answer, error)
            else:
                self._answer_later(answer, None)

        self._send(lambda: self._at_server(stored))

    def _answer_later(self, answer: "asyncio.Future[None]", error: Exception | None) -> None:
        broker = self._broker
        if broker.weather.lost_ack_chance and broker.random.random() < broker.weather.lost_ack_chance:
            broker.happened[Fault.ACKS_LOST] += 1
            return

        def tell() -> None:
            if answer.done() or not self.online or self.cut:
                return
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)

        broker.loop.later(broker.delay_seconds(), tell)


class SimJetStream:
    """What kit/bus.py needs of JetStreamContext."""

    def __init__(self, client: SimClient, broker: SimNats, timeout_seconds: float) -> None:
        self._client = client
        self._broker = broker
        self._timeout_seconds = timeout_seconds

    async def publish(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client.send_stream(subject, payload, headers["Nats-Msg-Id"], answer)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await answer
        except TimeoutError:
            raise NatsTimeout from None

    async def _reach(self) -> None:
        if not self._broker.up or not self._client.is_connected or self._client.cut:
            raise ServiceUnavailableError

    async def stream_info(self, name: str) -> object:
        await self._reach()
        if name not in self._broker.streams:
            raise NotFoundError
        return name

    async def add_stream(self, config: Any) -> None:
        await self._reach()
        keeps = config.retention.value == "limits"
        self._broker.streams.setdefault(config.name, _Stream(tuple(config.subjects), keeps))

    async def consumer_info(self, stream: str, durable: str) -> object:
        await self._reach()
        found = self._broker.streams.get(stream)
        if found is None or durable not in found.consumers:
            raise NotFoundError
        return durable

    async def subscribe(self, subject: str, **options: Any) -> SimSubscription:
        await self._reach()
        stream = self._broker.streams.get(options["stream"])
        if stream is None:
            raise NotFoundError
        consumer = stream.consumers.setdefault(options["durable"], _Durable(self._broker, stream))
        subscription = SimSubscription(self._client, subject, options["queue"], options["cb"])
        consumer.bind(subscription)
        return subscription
