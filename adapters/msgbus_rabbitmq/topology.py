"""What stands at the broker: declaring topics and groups, reading how they stand, giving a first group what came before it, dropping.

AMQP lists nothing. So a topic's layout is the alternate exchange of an exchange that serves nothing else (a declaration that differs is
refused with the value that is there), and the names of its groups are messages in a queue.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager, suppress

from aiormq import Channel
from aiormq import spec as amqp
from aiormq.abc import DeliveredMessage
from pamqp.common import FieldTable

from msgbus.contract.adapter import AdapterSettings, TopicSpec
from msgbus.contract.address import DEAD_GROUP
from msgbus.errors import BrokerError, BrokerUnavailable, ConfigurationError, NotFound, TopologyMismatch, UnsupportedFeature
from msgbus_rabbitmq import names
from msgbus_rabbitmq.errors import calling, is_locked, is_missing
from msgbus_rabbitmq.link import AT_ONCE, Asking, Link, give_back
from msgbus_rabbitmq.names import Layout
from msgbus_rabbitmq.wire import MOVED

BATCH = 256
_CURRENT = re.compile(r"current is (?:the value )?'([^']*)'")
_PATIENCE = 0.05
"""Seconds after which an empty queue is looked at again: what was routed to it before may still be on its way."""


class Topology:
    """Of one open adapter."""

    def __init__(self, ask: Asking, link: Link, settings: AdapterSettings) -> None:
        self._ask = ask
        self._link = link
        self._settings = settings
        self._turn = asyncio.Lock()
        self._delays_there = False

    # ------------------------------------------------------------ topics

    async def layout(self, topic: str, guess: str = "?") -> Layout | None:
        """How a topic stands; None where it does not. `guess`, where it is right, spares the broker's log a refusal."""
        name, where = names.meta(topic), f"topic {topic!r}"
        said = guess
        try:
            async with self._ask(where) as channel:
                await channel.exchange_declare(name, passive=True)
                await _exchange(channel, name, "direct", guess)
        except BrokerUnavailable as error:
            if is_missing(error):
                return None
            raise
        except TopologyMismatch as error:
            found = _CURRENT.search(error.actual)
            said = found[1] if found is not None else error.actual
        layout = Layout.parse(topic, said)
        if layout is None:
            raise TopologyMismatch(f"{where}: exchange {name!r}", "the layout of a topic", said)
        return layout

    async def declare_topic(self, spec: TopicSpec, create: bool) -> Layout:
        """Raises `TopologyMismatch` where it stands otherwise, or where it is missing and must not be made."""
        where, default = f"topic {spec.name!r}", max(self._settings.shards, 1)
        if spec.retain is not None:
            raise UnsupportedFeature(f"retain= of {where}", "RabbitMQ", "Kafka or Redis, which keep a topic's history")
        for option in spec.native:
            raise ConfigurationError(f"{where}: native option {option!r}: the RabbitMQ adapter knows none")
        layout = await self.layout(spec.name, Layout.of(spec, default).text)
        if create:
            layout = await self._make(layout or Layout.of(spec, default), fresh=layout is None)
        elif layout is None:
            raise TopologyMismatch(where, "a topic", "none")
        wanted = Layout.of(spec, layout.shards or default)
        if wanted != layout and not (wanted.kind == "plain" and layout.shards and spec.shards is None):
            raise TopologyMismatch(where, wanted.said, layout.said)
        return layout

    async def _make(self, layout: Layout, fresh: bool) -> Layout:
        """All that a topic needs; its layout last, for that says that all is there."""
        topic, kept, dead = layout.topic, names.unclaimed(layout.topic), layout.kind == "dead"
        own, aside = names.exchange(topic), names.exchange(kept)
        async with self._ask(f"topic {topic!r}") as channel:
            # What is due for a queue that is gone is kept aside: it would stop its level of the delays for everybody.
            await _exchange(channel, names.LOST, "fanout")
            await _queue(channel, names.LOST, names.QUORUM, (names.LOST, ""))
            await _exchange(channel, names.DUE, "topic", names.LOST)
            if not dead:
                await _exchange(channel, aside, "fanout")
                await _queue(channel, names.registry(topic), names.QUORUM)
                if fresh:
                    ttl = names.milliseconds(self._settings.first_group_retention)
                    await _queue(channel, kept, {**names.QUORUM, "x-message-ttl": ttl}, (aside, ""))
            await _exchange(channel, own, "topic", None if dead else aside)
            await channel.exchange_bind(own, names.DUE, f"#.{names.to_topic(topic)}")
        try:
            async with self._ask(f"topic {topic!r}") as channel:
                await _exchange(channel, names.meta(topic), "direct", layout.text)
        except TopologyMismatch:  # another process was faster, and made it otherwise
            return await self.layout(topic) or layout
        return layout

    # ------------------------------------------------------------ groups

    async def count(self, queue: str) -> int | None:
        """How many messages are ready; None where there is no such queue."""
        try:
            async with self._ask(f"queue {queue!r}") as channel:
                return (await channel.queue_declare(queue, passive=True)).message_count or 0
        except BrokerUnavailable as error:
            if is_missing(error):
                return None
            raise

    async def _has(self, layout: Layout, group: str) -> bool:
        """Whether it is wholly there: its queues are made in order, and deleted in the other one."""
        return await self.count(layout.queues(group)[-1]) is not None

    async def declare_group(self, layout: Layout, group: str, start: str, create: bool) -> None:
        """Afterwards it misses nothing. The first group of a topic is given what was kept for it, unless it starts at the latest."""
        topic, where, kept = layout.topic, f"group {group!r} of topic {layout.topic!r}", names.unclaimed(layout.topic)
        if not create:
            for queue in layout.queues(group):
                if await self.count(queue) is None:
                    raise TopologyMismatch(f"{where}: queue {queue!r}", "a queue", "none")
            known = layout.kind == "dead" or group in await self.groups(topic)  # definitions hold no messages: its name may be missing
        else:
            known = layout.kind == "dead" or await self._has(layout, group)
        if not known:
            async with self._ask(where) as channel:
                await _store(channel, names.registry(topic), group.encode(), amqp.Basic.Properties())
        for part, queue in zip(layout.parts, layout.queues(group), strict=True) if create else ():
            async with self._ask(where) as channel:  # a block each: it has a deadline, however many shards and however far the broker
                arguments = layout.arguments(self._settings.dead_letter_retention)
                await _queue(
                    channel, queue, arguments, (names.exchange(topic), layout.pattern(part)), (names.DUE, f"#.{names.to_queue(queue)}")
                )
        if layout.kind != "dead" and await self.count(kept) is not None:
            async with self._locked(topic):
                if start == "earliest":
                    await self._move(layout, group, kept)
                if create:
                    async with self._ask(f"queue {kept!r}") as channel:
                        await channel.queue_delete(kept)

    async def keep_for_the_first(self, topic: str) -> None:
        """A private receiver takes messages and is no group: what nobody has claimed is kept beside it."""
        if await self.count(names.unclaimed(topic)) is not None:
            async with self._ask(f"topic {topic!r}") as channel:
                await channel.queue_bind(names.unclaimed(topic), names.exchange(topic), "#")

    async def _move(self, layout: Layout, group: str, kept: str) -> None:
        """From what was kept to the group's queues, confirmed there before it is acked here: a batch at a time, for as long as it takes.
        The channel's end gives back in order what it had of the rest."""
        queues = {part: layout.queue(group, part) for part in layout.parts}
        channel = await self._link.channel(confirms=True)
        quiet = 0
        try:
            async with calling(f"queue {kept!r}"):
                await channel.basic_qos(prefetch_count=BATCH)
            while quiet < 2 and (ready := await self.count(kept)) is not None:
                async with calling(f"queue {kept!r}"):
                    batch = await _take(channel, kept, min(ready, BATCH))
                    stores: list[Coroutine[object, object, None]] = []
                    for message in batch:
                        properties = message.header.properties
                        properties.headers = {**(properties.headers or {}), MOVED: "1"}
                        queue = queues.get((message.routing_key or "").rpartition(".")[2], queues[layout.parts[0]])
                        stores.append(_store(channel, queue, message.body, properties))
                    await asyncio.gather(*stores)
                    if batch:
                        await channel.basic_ack(batch[-1].delivery_tag or 0, multiple=True)
                quiet = 0 if batch else quiet + 1
                if quiet:
                    await asyncio.sleep(_PATIENCE)
        finally:
            with suppress(BrokerError):
                async with calling(f"queue {kept!r}"):
                    await channel.close()

    @asynccontextmanager
    async def _locked(self, topic: str) -> AsyncGenerator[None, None]:
        """One at a time: a process has an exclusive queue meanwhile, which says nothing within the process."""
        where, name = f"lock of topic {topic!r}", names.lock(topic)
        async with self._turn:
            while True:  # who has it works for us, and its end ends the lock
                try:
                    async with self._ask(where) as channel:
                        await channel.queue_declare(name, exclusive=True)
                    break
                except BrokerUnavailable as error:
                    if not is_locked(error):
                        raise
                    await asyncio.sleep(_PATIENCE)
            try:
                yield
            finally:
                with suppress(BrokerError):  # a lost link ends the lock too; and who was cancelled must see that
                    async with self._ask(where) as channel:
                        await channel.queue_delete(name)

    async def groups(self, topic: str) -> list[str]:
        """Sorted; none where there is no such topic."""
        layout = await self.layout(topic)
        if layout is None or layout.kind == "dead":
            return [] if layout is None else [DEAD_GROUP]
        async with self._locked(topic):
            found = {message.body.decode() async for message in self.waiting(names.registry(topic))}
        return sorted([group for group in found if await self._has(layout, group)])

    async def there(self, topic: str, group: str) -> Layout:
        """The layout of a topic that has this group, or `NotFound`."""
        layout = await self.layout(topic)
        if layout is None or not await self._has(layout, group):
            raise NotFound(f"RabbitMQ has no group {group!r} of topic {topic!r}")
        return layout

    async def drop_group(self, topic: str, group: str) -> None:
        """Or `NotFound`."""
        queues = (await self.there(topic, group)).queues(group)
        async with self._ask(f"group {group!r} of topic {topic!r}") as channel:
            for queue in reversed(queues):
                await channel.queue_delete(queue)

    async def purge(self, topic: str, group: str) -> int:
        """What is ready. Or `NotFound`."""
        queues = (await self.there(topic, group)).queues(group)
        async with self._ask(f"purging {group!r} of topic {topic!r}") as channel:
            return sum([(await channel.queue_purge(queue)).message_count or 0 for queue in queues])

    async def waiting(self, queue: str) -> AsyncGenerator[DeliveredMessage, None]:
        """What is ready in a queue, oldest first. Held while one looks, then given back uncounted, before the channel's end."""
        channel, got = await self._link.channel(), 0
        try:
            while True:
                async with calling(f"peeking at {queue!r}"):
                    batch = await _get(channel, queue, BATCH)
                got += len(batch)
                for message in batch:
                    yield message
                if not batch:
                    break
        finally:
            with suppress(BrokerError):  # a call that was cancelled has ended the channel, and who was cancelled must see that
                async with calling(f"peeking at {queue!r}"):
                    await channel.basic_nack(0, multiple=True, wait=False)  # one each, to the queue
                    if got > AT_ONCE:
                        await give_back(channel, [queue, queue])  # the second one's answer comes when all of them are applied
                    await channel.close()

    async def make_delays(self) -> None:
        """The levels, from the lowest up, so that the last says that all are there: 28 exchanges and queues, once a virtual host."""
        if self._delays_there:
            return
        if await self.count(names.level(names.LEVELS - 1)) is None:
            for number in range(names.LEVELS):
                name, before = names.level(number), "*." * (names.LEVELS - 1 - number)
                async with self._ask(f"delays: {name!r}") as channel:
                    await _exchange(channel, name, "topic")
                    await channel.exchange_bind(names.level(number - 1), name, f"{before}0.#")
                    await _queue(channel, name, names.level_arguments(number), (name, f"{before}1.#"))
        self._delays_there = True


async def _exchange(channel: Channel, name: str, kind: str, alternate: str | None = None) -> None:
    arguments: FieldTable = {} if alternate is None else {"alternate-exchange": alternate}
    await channel.exchange_declare(name, exchange_type=kind, durable=True, arguments=arguments)


async def _queue(channel: Channel, name: str, arguments: FieldTable, *bindings: tuple[str, str]) -> None:
    await channel.queue_declare(name, durable=True, arguments=arguments)
    for exchange, pattern in bindings:
        await channel.queue_bind(name, exchange, pattern)


async def _store(channel: Channel, queue: str, body: bytes, properties: amqp.Basic.Properties) -> None:
    properties.message_id, properties.delivery_mode = None, 2  # the client makes an id (R6)
    await channel.basic_publish(body, routing_key=queue, properties=properties, mandatory=True)


async def _take(channel: Channel, queue: str, count: int) -> list[DeliveredMessage]:
    """About `count`, the oldest, un-settled: faster than one by one. None is on its way when it returns."""
    came: list[DeliveredMessage] = []
    enough = asyncio.Event()

    async def take(message: DeliveredMessage) -> None:
        came.append(message)
        if len(came) >= count:
            enough.set()

    if count:
        tag = (await channel.basic_consume(queue, take)).consumer_tag or ""
        with suppress(TimeoutError):  # some may have expired
            async with asyncio.timeout(1):
                await enough.wait()
        await channel.basic_cancel(tag)
    return came


async def _get(channel: Channel, queue: str, most: int) -> list[DeliveredMessage]:
    batch: list[DeliveredMessage] = []
    while len(batch) < most and isinstance((message := await channel.basic_get(queue)).delivery, amqp.Basic.GetOk):
        batch.append(message)
    return batch
