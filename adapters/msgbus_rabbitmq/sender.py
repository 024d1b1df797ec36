"""Sending: many messages under way on one channel with confirms, an outcome each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence

from aiormq import Channel
from aiormq import exceptions as client

from msgbus.contract.adapter import SendOutcome
from msgbus.contract.envelope import HEADROOM, Envelope
from msgbus.errors import BrokerError, BrokerUnavailable, MessageTooLarge, MsgbusError, PublishRejected, PublishUnknown
from msgbus_rabbitmq import names
from msgbus_rabbitmq.errors import send_error
from msgbus_rabbitmq.link import Link
from msgbus_rabbitmq.names import Layout
from msgbus_rabbitmq.wire import properties_of

LayoutOf = Callable[[str], Awaitable[Layout | None]]


class Sender:
    """`layout_of` asks the broker how a topic stands, None where it does not; `delays` makes the levels of the delays exist."""

    def __init__(self, link: Link, max_body: int, layout_of: LayoutOf, delays: Callable[[], Awaitable[None]]) -> None:
        self._link = link
        self._max_body = max_body
        self._layout_of = layout_of
        self._delays = delays
        self.layouts: dict[str, Layout] = {}
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._under_way: Counter[Channel] = Counter()

    async def send(self, envelopes: Sequence[Envelope], timeout: float) -> list[SendOutcome]:
        """As `Adapter.send`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                channel = await self._prepare(envelopes)
        except (MsgbusError, TimeoutError) as error:
            problem = error if isinstance(error, BrokerError) else BrokerUnavailable(str(error) or "no connection in time")
            return [problem for _ in envelopes]
        now = time.time()
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        under_way: dict[asyncio.Task[object], int] = {}
        for number, envelope in enumerate(envelopes):
            route = self._route(envelope)
            if not isinstance(route, tuple):
                outcomes[number] = route
                continue
            exchange, key, lasting = route
            properties = properties_of(envelope, lasting, now)
            publishing = channel.basic_publish(
                envelope.body, exchange=exchange, routing_key=key, properties=properties, mandatory=True, wait=False
            )
            under_way[loop.create_task(publishing)] = number
        if under_way:
            alone = await self._wait(channel, under_way.keys(), deadline - loop.time())
            for task, number in under_way.items():
                outcomes[number] = self._outcome(channel, task, envelopes[number].id, alone)
        if channel.is_closed:
            self.layouts.clear()  # perhaps since an exchange is gone
        return outcomes

    async def _prepare(self, envelopes: Sequence[Envelope]) -> Channel:
        """A channel, and all that must be known: a message to an exchange that is not there would end the channel for its mates (R21)."""
        for topic in {envelope.topic for envelope in envelopes} - self.layouts.keys():
            layout = await self._layout_of(topic)
            if layout is not None:
                self.layouts[topic] = layout
        if any(envelope.delay > 0 for envelope in envelopes):
            await self._delays()
        async with self._opening:
            for channel in [one for one, count in self._under_way.items() if one is not self._channel and not count]:
                del self._under_way[channel]
                await channel.close()
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._link.channel(confirms=True)
            return self._channel

    def _route(self, envelope: Envelope) -> tuple[str, str, bool] | SendOutcome:
        """Exchange, routing key, and whether the broker must keep it beyond its expiry."""
        layout = self.layouts.get(envelope.topic)
        if layout is None:
            return PublishRejected(f"message {envelope.id!r}: RabbitMQ has no topic {envelope.topic!r}; declare it first")
        dead, part = layout.kind == "dead", layout.part_of(envelope)
        room = self._max_body + (HEADROOM if dead or envelope.group is not None else 0)
        if len(envelope.body) > room:
            return MessageTooLarge(f"message {envelope.id!r}: a body of {len(envelope.body)} bytes; RabbitMQ takes {room} here")
        queue = layout.queue(envelope.group, part) if envelope.group is not None else None
        if envelope.delay > 0:  # an expiration would let it out of its level too early
            return (*names.delayed(envelope.delay, names.to_queue(queue) if queue else names.to_topic(envelope.topic, part)), True)
        return ("", queue, dead) if queue else (names.exchange(envelope.topic), part, dead)

    async def _wait(self, channel: Channel, tasks: Collection[asyncio.Task[object]], timeout: float) -> bool:
        """Until all have an answer, or the time is over. Whether a sole message was under way on the channel."""
        count = len(tasks)
        self._under_way[channel] += count
        alone = self._under_way[channel] == 1
        try:
            await asyncio.wait(tasks, timeout=max(timeout, 0))
        finally:
            self._under_way[channel] -= count
            for task in tasks:
                task.cancel()  # the message may be stored all the same
        return alone

    def _outcome(self, channel: Channel, task: asyncio.Task[object], id_: str, alone: bool) -> SendOutcome:
        if not task.done() or task.cancelled():  # cancelled: the client's word for a link that was lost
            return PublishUnknown(id_, "no answer in time, or the link was lost")
        error = task.exception()
        if isinstance(error, client.DeliveryError) and not isinstance(error, client.PublishError) and channel is self._channel:
            self._channel = None  # a channel that was refused once is refused for ever on 3.10 (R19)
        return None if error is None else send_error(error, id_, alone)
