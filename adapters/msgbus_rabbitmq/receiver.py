"""Receivers: what all have, and all that a group without order needs. Deliveries are buffered; the broker's prefetch is the window."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass

from aiormq.abc import DeliveredMessage

from msgbus.contract.adapter import Received, Receiver, ReceiverSpec
from msgbus.errors import BrokerError, BrokerUnavailable
from msgbus_rabbitmq import names
from msgbus_rabbitmq.hold import Hold
from msgbus_rabbitmq.link import Asking, Link
from msgbus_rabbitmq.names import Layout
from msgbus_rabbitmq.wire import envelope_of

IDLE = 0.5
"""Seconds without a `receive` after which what is buffered goes back: the core asks again within as many."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a receiver works with. `ask` is of the same connection as its own channels; `modern`: RabbitMQ 4.3, which counts deaths and
    nothing else; `taken`: the members' numbers that this process has; `closed` is told the end."""

    link: Link
    ask: Asking
    layout: Layout
    spec: ReceiverSpec
    modern: bool
    taken: set[str]
    closed: Callable[[RabbitReceiver], None]


class RabbitReceiver(Receiver):
    """Of a group without order."""

    lends = True
    """Whether what nobody asks for goes back after a while."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.spec = terms.spec
        self.hold = self.new_hold()
        self.draining = False
        self.lost: str | None = None
        self._buffer: deque[tuple[Hold, DeliveredMessage]] = deque()
        self.changed = asyncio.Event()
        self._closing = asyncio.Lock()
        self._closed = False
        self._tags: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._asking = False
        self._left = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._turning: asyncio.Task[None] | None = None

    def new_hold(self) -> Hold:
        """One that delivers here."""
        return Hold(self.spec.window, self.on_delivery, self.on_lost)

    async def open(self) -> None:
        """Consumes. Raises `BrokerUnavailable`, also where there is no such queue."""
        self._queues = await self.queues()
        await self.hold.open(self.terms.link)
        await self._consume()

    async def _consume(self) -> None:
        self._tags = [await self.hold.consume(queue) for queue in self._queues]

    async def queues(self) -> list[str]:
        """Those that it consumes."""
        layout = self.terms.layout
        return [layout.queue(self.spec.group or "", part) for part in layout.parts_of(self.spec.priority)]

    # ------------------------------------------------------------ the contract

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """From the buffer; waits where it is empty."""
        self._asking = True
        try:
            if self._turning is not None:
                await asyncio.shield(self._turning)
                if not self._tags and not self.draining:
                    await self._turn(self._consume())
                self._turning = None
            return await self._receive(limit, self._loop.time() + timeout)
        finally:
            self._asking = False
            self._left = self._loop.time()
            self._look_later()

    async def _receive(self, limit: int, deadline: float) -> list[Received]:
        while True:
            if self.lost is not None or self._closed:  # by the adapter perhaps: who drains it itself asks no more
                raise BrokerUnavailable(f"receiving from {self.spec.topic!r}: {self.lost or 'the receiver is closed'}")
            if self.draining:
                return []
            buffered = len(self._buffer)
            room = min(limit, buffered, self.spec.window - len(self.hold.unsettled) + buffered)
            if room > 0:
                return [self._hand_out(*self._buffer.popleft()) for _ in range(room)]
            self.changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.changed.wait()
            except TimeoutError:
                return []

    def ack(self, received: Received) -> None:
        """Acks travel together: see `Hold`."""
        hold, tag = received.token
        if hold.ack(tag) and self._buffer:
            self.changed.set()

    async def release(self, received: Received) -> None:
        """Back to the head of the queue."""
        hold, tag = received.token
        await hold.give_back(tag)

    async def drain(self) -> None:
        """Cancels the consumers, then gives back what was buffered."""
        if not self.draining:
            self.stop()
            await self._turn(self._let_go())

    async def close(self) -> None:
        """Whoever closes it first does; others wait for that."""
        async with self._closing:
            if not self._closed:
                self._closed = True
                self.stop()
                if self._timer is not None:
                    self._timer.cancel()
                if self._turning is not None:
                    await asyncio.wait([self._turning])
                await self.end()
                self.terms.closed(self)

    @property
    def stale_acks(self) -> int:  # type: ignore[override]  # counted where the channel is
        """Those of all channels."""
        return self.hold.stale

    # ------------------------------------------------------------ inside

    def _turn(self, work: Coroutine[object, object, None]) -> asyncio.Future[None]:
        """A call that is cut off ends its channel, and what is un-settled counts as a death: so our caller's end is not its end."""
        before = self._turning

        async def one_after_the_other() -> None:
            if before is not None:
                await asyncio.wait([before])
            await work

        self._turning = self._loop.create_task(one_after_the_other(), name="msgbus rabbitmq consuming")
        return asyncio.shield(self._turning)

    def stop(self) -> None:
        """Hands out no more."""
        self.draining = True
        self.changed.set()

    async def end(self) -> None:
        """The last of `close`: all that is left goes back at once, and so in order."""
        with suppress(BrokerError):  # what is lost is given back already
            await self._cancel()
        await self.hold.close()

    async def _cancel(self) -> None:
        tags, self._tags = self._tags, []
        for tag in tags:
            await self.hold.cancel(tag)

    async def _let_go(self) -> None:
        """Peers may have what was not handed out."""
        await self._cancel()
        while self._buffer:
            hold, message = self._buffer.popleft()
            await hold.give_back(message.delivery_tag or 0)

    def _look_later(self) -> None:
        if self.lends and self._buffer and self._timer is None and not self.draining:
            self._timer = self._loop.call_later(IDLE, self._look)

    def _look(self) -> None:
        """Whoever does not ask (its breaker is open, it is paused, a pull side that rests) keeps nothing from its peers."""
        self._timer = None
        if self._loop.time() - self._left < IDLE or self._asking:
            self._look_later()
        elif self._buffer and self._turning is None and self.lost is None and not self.draining:
            _ = self._turn(self._let_go())

    def on_delivery(self, hold: Hold, message: DeliveredMessage) -> None:
        """Called by the hold."""
        self._buffer.append((hold, message))
        self.changed.set()
        if not self._asking:
            self._look_later()

    def on_lost(self, why: str) -> None:
        """Called by the hold."""
        self.lost = self.lost or why
        self.changed.set()

    def _hand_out(self, hold: Hold, message: DeliveredMessage) -> Received:
        headers = message.header.properties.headers or {}
        own = message.exchange == "" or ".g:." in (message.routing_key or "")
        envelope = envelope_of(self.spec.topic, self.spec.group if own else None, message.body, message.header.properties)
        crashes = self.deaths(headers) if headers and self.terms.modern else 0
        return Received(envelope, (hold, message.delivery_tag or 0), hold.tenure, crashes, message)

    def deaths(self, headers: Mapping[str, object]) -> int:
        """What is given back is not among them: it goes by nack."""
        return number_of(headers, "x-delivery-count")


def number_of(headers: Mapping[str, object], name: str) -> int:
    """A header of the broker's."""
    value = headers.get(name, 0)
    return value if isinstance(value, int) else 0


class PrivateReceiver(RabbitReceiver):
    """A queue that is this connection's alone, and ends with it. Quorum queues can be neither (R20), and nothing in it must last."""

    lends = False

    async def queues(self) -> list[str]:
        """Made here."""
        layout = self.terms.layout
        name = f"{layout.topic}:private.{os.urandom(8).hex()}"
        async with self.terms.ask(f"a private queue of {layout.topic!r}") as channel:
            await channel.queue_declare(name, exclusive=True)
            for part in layout.parts_of(self.spec.priority):
                await channel.queue_bind(name, names.exchange(layout.topic), layout.pattern(part))
        return [name]
