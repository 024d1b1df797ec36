"""Sending: many messages under way on one channel with confirms, an outcome each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

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


class Sender:
    """`layout_of` asks the broker how a topic stands, None where it does not; `delays` makes the levels of the delays exist."""

    def __init__(
        self, link: Link, max_body: int, layout_of: Callable[[str], Awaitable[Layout | None]], delays: Callable[[], Awaitable[None]]
    ) -> None:
        self._link = link
        self._max_body = max_body
        self._layout_of = layout_of
        self._delays = delays
        self._layouts: dict[str, Layout] = {}
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._under_way: Counter[Channel] = Counter()

    def know(self, layout: Layout) -> None:
        """Of a topic that was declared here."""
        self._layouts[layout.topic] = layout

    def forget(self, topic: str) -> None:
        """What is there of it has changed."""
        self._layouts.pop(topic, None)

    async def send(self, envelopes: Sequence[Envelope], timeout: float) -> list[SendOutcome]:
        """As `Adapter.send`."""
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                channel = await self._prepare(envelopes)
        except TimeoutError:
            return [BrokerUnavailable("no connection in time") for _ in envelopes]
        except MsgbusError as error:
            problem = error if isinstance(error, BrokerError) else BrokerUnavailable(str(error))
            return [problem for _ in envelopes]
        now = time.time()
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        under_way: dict[asyncio.Task[object], int] = {}
        loop = asyncio.get_running_loop()
        for number, envelope in enumerate(envelopes):
            route = self._route(envelope)
            if not isinstance(route, tuple):
                outcomes[number] = route
                continue
            exchange, key, lasting = route
            publishing = channel.basic_publish(
                envelope.body,
                exchange=exchange,
                routing_key=key,
                properties=properties_of(envelope, lasting, now),
                mandatory=True,
                wait=False,
            )
            under_way[loop.create_task(publishing)] = number
        if under_way:
            await self._confirm(channel, envelopes, under_way, outcomes, deadline - loop.time())
        return outcomes

    async def _prepare(self, envelopes: Sequence[Envelope]) -> Channel:
        """A channel, and all that must be known: a message to an exchange that is not there would end the channel for its mates (R21)."""
        for topic in {envelope.topic for envelope in envelopes} - self._layouts.keys():
            layout = await self._layout_of(topic)
            if layout is not None:
                self.know(layout)
        if any(envelope.delay > 0 for envelope in envelopes):
            await self._delays()
        async with self._opening:
            for channel in [channel for channel, count in self._under_way.items() if channel is not self._channel and not count]:
                del self._under_way[channel]
                await channel.close()
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._link.channel(confirms=True)
            return self._channel

    def _route(self, envelope: Envelope) -> tuple[str, str, bool] | SendOutcome:
        """Exchange, routing key, and whether the broker must keep it beyond its expiry."""
        layout = self._layouts.get(envelope.topic)
        own = envelope.group is not None
        if layout is None:
            return PublishRejected(f"message {envelope.id!r}: RabbitMQ has no topic {envelope.topic!r}; declare it first")
        room = self._max_body + (HEADROOM if layout.dead or own else 0)
        if len(envelope.body) > room:
            return MessageTooLarge(f"message {envelope.id!r}: a body of {len(envelope.body)} bytes; RabbitMQ takes {room} here")
        part = layout.part_of(envelope)
        queue = layout.queue(envelope.group, part) if envelope.group is not None else ""
        if envelope.delay > 0:  # an expiration would let it out of its level too early
            return (*names.delayed(envelope.delay, names.to_queue(queue) if own else names.to_topic(envelope.topic, part)), True)
        return ("", queue, layout.dead) if own else (names.exchange(envelope.topic), part, layout.dead)

    async def _confirm(
        self,
        channel: Channel,
        envelopes: Sequence[Envelope],
        under_way: Mapping[asyncio.Task[object], int],
        outcomes: list[SendOutcome],
        timeout: float,
    ) -> None:
        self._under_way[channel] += len(under_way)
        alone = self._under_way[channel] == 1
        try:
            await asyncio.wait(under_way, timeout=max(timeout, 0))
        finally:
            self._under_way[channel] -= len(under_way)
            for task in under_way:
                task.cancel()  # the message may be stored all the same
        for task, number in under_way.items():
            id_ = envelopes[number].id
            if not task.done() or task.cancelled():  # the client's word for a link that was lost, or nothing in time
                outcomes[number] = PublishUnknown(id_, "no answer in time, or the link was lost")
            elif (error := task.exception()) is not None:
                outcomes[number] = send_error(error, id_, alone)
                if isinstance(error, client.DeliveryError) and not isinstance(error, client.PublishError) and channel is self._channel:
                    self._channel = None  # a channel that was refused once is refused for ever on 3.10 (R19)
        if channel.is_closed:
            self._layouts.clear()  # perhaps since an exchange is gone
