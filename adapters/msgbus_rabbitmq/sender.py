"""Sending: many messages under way on one channel with confirms, an outcome each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from aiormq import Channel, spec
from aiormq import exceptions as client
from aiormq.abc import ChannelFrame, ConfirmationFrameType
from pamqp.body import ContentBody
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from msgbus.contract.adapter import SendOutcome
from msgbus.contract.envelope import HEADROOM, Envelope
from msgbus.errors import BrokerError, BrokerUnavailable, MessageTooLarge, MsgbusError, PublishRejected, PublishUnknown
from msgbus_rabbitmq import names
from msgbus_rabbitmq.errors import calling, send_error
from msgbus_rabbitmq.link import CLOSE, Link
from msgbus_rabbitmq.names import Layout
from msgbus_rabbitmq.wire import properties_of

LayoutOf = Callable[[str], Awaitable[Layout | None]]

Confirm = asyncio.Future[ConfirmationFrameType]


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
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        under_way = await self._write(channel, envelopes, outcomes, deadline)
        if under_way:
            alone = await self._wait(channel, under_way.values(), deadline - loop.time())
            for id_, (confirm, number) in under_way.items():
                channel.message_id_delivery_tag.pop(id_, None)
                outcomes[number] = self._outcome(channel, confirm, envelopes[number].id, alone)
        if channel.is_closed:
            self.layouts.clear()  # perhaps since an exchange is gone
        return outcomes

    async def _write(
        self, channel: Channel, envelopes: Sequence[Envelope], outcomes: list[SendOutcome], deadline: float
    ) -> dict[str, tuple[Confirm, int]]:
        """What `Channel.basic_publish` does, but in one piece: by itself each message costs a task and a call of the system.

        The id that the broker would return a message with → what confirms it, and its place among the envelopes.
        """
        pieces: list[bytes] = []
        places: dict[str, int] = {}
        now = time.time()
        for number, envelope in enumerate(envelopes):
            route = self._route(envelope)
            if not isinstance(route, tuple):
                outcomes[number] = route
                continue
            exchange, key, lasting = route
            properties = properties_of(envelope, lasting, now)
            try:
                pieces.append(_frames(channel, exchange, key, properties, envelope.body))
            except (ValueError, TypeError) as error:
                outcomes[number] = PublishRejected(f"message {envelope.id!r} cannot be written: {error}")
                continue
            places[properties.message_id or ""] = number
        under_way: dict[str, tuple[Confirm, int]] = {}
        inside: Any = channel  # Any: aiormq does not say what its queue and its futures hold
        try:
            async with asyncio.timeout_at(deadline), channel.lock:
                if pieces and not channel.is_closed:
                    await inside.write_queue.put(ChannelFrame(b"".join(pieces), should_close=False))
                    for id_, number in places.items():  # at once, so that tags are given before anything is written
                        channel.delivery_tag += 1
                        confirm: Confirm = inside.create_future()
                        inside.confirmations[channel.delivery_tag] = confirm
                        channel.message_id_delivery_tag[id_] = channel.delivery_tag
                        under_way[id_] = confirm, number
        except TimeoutError:
            pass  # said below
        if not under_way:
            for number in places.values():
                outcomes[number] = BrokerUnavailable(
                    f"message {envelopes[number].id!r} was not sent: the channel is closed, or does not write"
                )
        return under_way

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
                with suppress(BrokerError):  # it has ended already
                    async with calling("closing a channel", CLOSE):
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

    async def _wait(self, channel: Channel, confirms: Collection[tuple[Confirm, int]], timeout: float) -> bool:
        """Until all have an answer, or the time is over. Whether a sole message was under way on the channel."""
        count = len(confirms)
        self._under_way[channel] += count
        alone = self._under_way[channel] == 1
        try:
            await asyncio.wait([confirm for confirm, _ in confirms], timeout=max(timeout, 0))
        finally:
            self._under_way[channel] -= count
            for confirm, _ in confirms:
                confirm.cancel()  # the message may be stored all the same
        return alone

    def _outcome(self, channel: Channel, confirm: Confirm, id_: str, alone: bool) -> SendOutcome:
        if not confirm.done() or confirm.cancelled():  # cancelled: the client's word for a link that was lost
            return PublishUnknown(id_, "no answer in time, or the link was lost")
        error = confirm.exception()
        if isinstance(error, client.DeliveryError) and not isinstance(error, client.PublishError) and channel is self._channel:
            self._channel = None  # a channel that was refused once is refused for ever on 3.10 (R19)
        return None if error is None else send_error(error, id_, alone)


def _frames(channel: Channel, exchange: str, key: str, properties: spec.Basic.Properties, body: bytes) -> bytes:
    """Of one message."""
    number, size = channel.number, channel.max_content_size
    contents = [marshal(ContentBody(body[start : start + size]), number) for start in range(0, len(body), size)]
    return b"".join(
        (_publish(number, exchange, key), marshal(ContentHeader(properties=properties, body_size=len(body)), number), *contents)
    )


@lru_cache(maxsize=1024)
def _publish(number: int, exchange: str, key: str) -> bytes:
    return marshal(spec.Basic.Publish(exchange=exchange, routing_key=key, mandatory=True), number)
