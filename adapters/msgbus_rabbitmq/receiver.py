"""Receivers: what all have, and all that a group without order needs. Deliveries are buffered; the broker's prefetch is the window."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from aiormq import Channel, spec
from aiormq import exceptions as client
from aiormq.abc import DeliveredMessage

from msgbus.contract.adapter import Received, Receiver, ReceiverSpec, Tenure
from msgbus.errors import BrokerError, BrokerUnavailable
from msgbus_rabbitmq.errors import calling
from msgbus_rabbitmq.link import AT_ONCE, CLOSE, Asking, Link, give_back
from msgbus_rabbitmq.names import Layout, exchange
from msgbus_rabbitmq.wire import envelope_of

ACK_AFTER = 0.005
"""Seconds that an ack may wait for others to travel with it: fewer than half a window."""
IDLE = 0.5
"""Seconds without a `receive` after which what is buffered goes back: the core asks again within as many."""


class Hold:
    """One channel's deliveries, from its opening to its end. What is settled goes out in batches, in the right order.

    A tag belongs to its channel: after its end a word about it is moot (R2). `shard`: the queue of a shard, where only the channel's end
    gives back in order.
    """

    def __init__(self, receiver: RabbitReceiver, shard: str | None = None) -> None:
        self.tenure = Tenure()
        self.unsettled: dict[int, bool] = {}
        """In the order of the tags: whether somebody had it before."""
        self.out: set[int] = set()
        """What was handed out and has no word yet."""
        self.idle = asyncio.Event()
        """Set when the last of `out` has had its word, and that is written; or when the channel is over."""
        self._receiver = receiver
        self._shard = shard
        self._aside: set[int] = set()
        self._came = False
        self._words = 0
        self._over = True  # until it is open; the core writes into tenures too
        self._channel: Channel
        self._acked: list[int] = []
        self._returned: list[int] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, link: Link) -> None:
        """Each consumer gets a prefetch of the window."""
        self._channel = channel = await link.channel()
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)
        channel.closing.add_done_callback(self._on_close)  # pyright: ignore[reportUnknownMemberType]  # aiormq does not say of what
        async with calling("consuming"):
            await channel.basic_qos(prefetch_count=self._receiver.window if self._shard is None else self._receiver.spec.window)
        self._over = False

    async def consume(self, queue: str) -> str:
        """The consumer's tag, new each time: one that the broker has cancelled may still be taken (R12)."""
        async with calling(f"consuming {queue!r}"):
            return (await self._channel.basic_consume(queue, self._on_message)).consumer_tag or ""

    async def cancel(self, tag: str) -> None:
        """When it returns, all that came by this consumer has been delivered."""
        if not self._over:
            async with calling("cancelling a consumer"):
                await self._channel.basic_cancel(tag)

    async def _catch_up(self) -> None:
        """When it returns, the broker has had every ack and nack, and what it gave for them is here. What is published then may come, too.

        A consumer more on the same queue is accepted after the acks before it, and then waits as the last; what the first one was given
        until then is here one question later.
        """
        await self._channel.basic_consume(self._shard or "", self._on_message)
        await self._channel.basic_qos(prefetch_count=1)

    async def set_aside(self) -> None:
        """All but the first is given back once, and is here again: what happens from now on counts for the first alone. For a death is one
        delivery and one acquisition, and these have two."""
        async with calling("setting messages aside"):
            await self._catch_up()
            await self._write_soon()
        await self._have_again(list(self.unsettled)[1:])
        self._aside = {tag for tag, again in list(self.unsettled.items())[1:] if again}

    async def _have_again(self, tags: Sequence[int]) -> None:
        """Gives these back, the last of what is un-settled, and has them again, in order: one delivery and two acquisitions each.

        Where the window has room, what is published just then may be given to us before what we gave back, and would be before it at the
        channel's end, too. So that is given back as well, and comes behind it, until nothing has come between: when the window is full at
        the latest.
        """
        mark = max(tags, default=0)
        while tags:
            async with calling("having messages again", CLOSE):
                multiple = len(tags) == len(self.unsettled)
                for tag in tags:
                    if self.unsettled.pop(tag, None) is not None and not multiple:  # else a handler that still runs has settled it
                        await self._channel.basic_nack(tag, wait=False)
                if multiple:
                    await self._channel.basic_nack(mark, multiple=True, wait=False)
                elif len(tags) > AT_ONCE:
                    await self._catch_up()  # with the first of them: now all others are under way
                await self._catch_up()
            again = max((tag for tag, before in self.unsettled.items() if tag > mark and before), default=0)
            tags = [tag for tag, before in self.unsettled.items() if mark < tag < again and not before]

    async def _on_message(self, message: DeliveredMessage) -> None:
        """Only notes it: what the client runs here it cancels when the link is lost (R1)."""
        if not self._over:
            self._came = True
            self.unsettled[message.delivery_tag or 0] = bool(message.redelivered)
            self._receiver.on_delivery(self, message)

    async def _on_cancel(self, frame: spec.Basic.Cancel) -> None:
        self._end("the broker cancelled the consumer: its queue is gone, or its consumer_timeout is over")

    def _on_close(self, _: object) -> None:
        self._end("the link to the broker, or the channel, was lost")

    def _end(self, why: str) -> None:
        if not self._over:
            self._over = self.tenure.lost = True
            self._receiver.stale_acks += len(self._acked)
            self.idle.set()
            self._receiver.on_lost(why)

    def ack(self, tag: int) -> bool:
        """False: it was settled before."""
        if tag not in self.unsettled:
            return False
        del self.unsettled[tag]
        self.out.discard(tag)
        if self._over:
            self._receiver.stale_acks += 1
        else:
            self._acked.append(tag)
            if 2 * len(self._acked) >= self._receiver.window:
                _ = self._write_soon()
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(ACK_AFTER, self._write_soon)
        return True

    async def give_back(self, tag: int) -> None:
        """When it returns, the broker will have it before any later word. Twice is once."""
        if tag in self.unsettled:
            del self.unsettled[tag]
            self.out.discard(tag)
            if not self._over:
                self._returned.append(tag)
                await asyncio.shield(self._write_soon())

    async def keep(self, tag: int) -> bool:
        """It will not be settled by who had it, and goes back with the rest, by the end of the channel. Twice is once: False."""
        if tag not in self.out or self._over:
            return False
        self.out.discard(tag)
        await asyncio.shield(self._write_soon())
        return True

    def _write_soon(self) -> asyncio.Task[None]:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="msgbus rabbitmq settling")
        return self._writing

    async def _write(self) -> None:
        """One ack for all up to the lowest un-settled one, and one each above it (M14), none for what is settled: that would end the
        channel. What is given back goes first: the ack for all must not be for it. Waits for no drain of the socket."""
        while (self._acked or self._returned) and not self._over:
            returned, self._returned = self._returned, []
            acked, self._acked = self._acked, []
            lowest = next(iter(self.unsettled), None)
            up_to = max((tag for tag in acked if lowest is None or tag < lowest), default=0)
            acks = [up_to] * bool(up_to) + [tag for tag in acked if tag > up_to]
            self._words += len(returned) + len(acks)
            try:
                for tag in returned:
                    await self._channel.basic_nack(tag, wait=False)
                for tag in acks:
                    await self._channel.basic_ack(tag, multiple=tag == up_to, wait=False)
            except (client.AMQPError, client.ChannelInvalidStateError):
                self._acked += acked  # too late, all of them
                self._end("the channel was closed")
        if not self.out:
            self.idle.set()

    async def close(self) -> None:
        """Tells what is settled, gives the rest back in order, and closes the channel. Each call is bounded."""
        with suppress(BrokerError):
            async with calling("closing a channel", CLOSE):
                await self._write_soon()
            if not self._over and self._came and self._shard is not None:
                await self._say_all()
            if not self._over:
                self._over = True
                async with calling("closing a channel", CLOSE):
                    if self._shard is None:
                        await give_back(self._channel, self._receiver.consumed if self._words > AT_ONCE else ())
                    await self._channel.close()
        self._over = self.tenure.lost = True
        self.idle.set()

    async def _say_all(self) -> None:
        """Every ack is heard. Then, so that the channel's end will be no death of what is un-settled, it is had again where the window is
        full or somebody had some of it before; elsewhere one death alone makes no suspect, and these rounds could only harm the order.
        What was set aside has gone back already; before 4.3 no deaths are counted."""
        async with calling("closing a channel", CLOSE):
            await self._catch_up()
            await self._write_soon()
        full = len(self.unsettled) >= self._receiver.spec.window
        aside = self._aside if next(iter(self.unsettled), None) in self._aside else ()
        tags = [tag for tag in self.unsettled if tag not in aside]
        if self._receiver.terms.modern and (full or any(self.unsettled[tag] for tag in tags)):
            await self._have_again(tags)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a receiver works with. `ask` is of the same connection as its own channels; `modern`: RabbitMQ 4.3, which counts deaths and
    nothing else; `closed` is told the end."""

    link: Link
    ask: Asking
    layout: Layout
    modern: bool
    closed: Callable[[RabbitReceiver], None]


class RabbitReceiver(Receiver):
    """Of a group without order."""

    lends = True
    """Whether what nobody asks for goes back after a while (a breaker is open, a subscription is paused, a pull side rests)."""

    def __init__(self, terms: Terms, spec: ReceiverSpec) -> None:
        self.terms = terms
        self.spec = spec
        self.window = 1 if spec.quarantine else spec.window
        self.hold = Hold(self)
        self.holds: Collection[Hold] = (self.hold,)
        self.draining = False
        self.lost: str | None = None
        self.changed = asyncio.Event()
        self.tags: list[str] = []
        self.consumed: list[str] = []
        self.work: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.buffer: deque[tuple[Hold, DeliveredMessage]] = deque()
        self._consuming = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None
        self._closed = self._asking = False
        self._left = 0.0
        self._turning: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Consumes. Raises `BrokerUnavailable`, also where there is no such queue."""
        await self.turn(self.begin())
        if self.lends:
            self.work = self._loop.create_task(self._watch(), name="msgbus rabbitmq watching")

    async def begin(self) -> None:
        """The calls of `open`."""
        self.consumed = await self.queues()
        await self.hold.open(self.terms.link)
        await self._consume()

    async def queues(self) -> list[str]:
        """Those that it consumes."""
        layout = self.terms.layout
        return [layout.queue(self.spec.group or "", part) for part in layout.parts_of(self.spec.priority)]

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """From the buffer; waits where it is empty."""
        self._asking = True
        try:
            if self.lends and not self.tags and not self.draining:  # it was let go
                await self.turn(self._consume())
            return await self._receive(limit, self._loop.time() + timeout)
        finally:
            self._asking = False
            self._left = self._loop.time()

    async def _receive(self, limit: int, deadline: float) -> list[Received]:
        while True:
            if self.lost is not None or self._closed:  # by the adapter perhaps: who drains it itself asks no more
                raise BrokerUnavailable(f"receiving from {self.spec.topic!r}: {self.lost or 'the receiver is closed'}")
            if self.draining:
                return []
            room = min(limit, len(self.buffer), self.window - sum([len(hold.out) for hold in self.holds]))
            if room > 0:
                return [self._hand_out(*self.buffer.popleft()) for _ in range(room)]
            self.changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.changed.wait()
            except TimeoutError:
                return []

    def ack(self, received: Received) -> None:
        """Acks travel together: see `Hold`."""
        hold, tag = received.token
        if hold.ack(tag) and self.buffer:
            self.changed.set()

    async def release(self, received: Received) -> None:
        """Back to the head of the queue."""
        hold, tag = received.token
        await hold.give_back(tag)

    async def drain(self) -> None:
        """Cancels the consumers, then gives back what was buffered."""
        if not self.draining:
            self.stop()
            await self.turn(self._let_go())

    async def close(self) -> None:
        """Whoever closes it first does; others wait for that. All that is left goes back at once, and so in order."""
        if self._closing is None:
            self._closing = self._loop.create_task(self.end(), name="msgbus rabbitmq closing")
        await asyncio.shield(self._closing)  # as in `turn`

    async def end(self) -> None:
        """The calls of `close`."""
        self._closed = True
        self.stop()
        if self.work is not None:
            self.work.cancel()
        await asyncio.gather(*(task for task in (self.work, self._turning) if task is not None), return_exceptions=True)
        if self.lends:
            with suppress(BrokerError):  # what is lost is given back already
                await self._cancel()
        await asyncio.gather(*(hold.close() for hold in list(self.holds)))
        self.terms.closed(self)

    def turn(self, work: Coroutine[object, object, None]) -> asyncio.Future[None]:
        """A call that is cut off ends its channel, and what is un-settled counts as a death; a word on it after that ends the connection,
        and others' work with it. So our caller's end is not its end."""

        async def one_at_a_time() -> None:
            async with self._consuming:
                await work

        self._turning = self._loop.create_task(one_at_a_time(), name="msgbus rabbitmq consuming")
        return asyncio.shield(self._turning)

    def stop(self) -> None:
        """Hands out no more."""
        self.draining = True
        self.changed.set()

    async def _consume(self) -> None:
        if not self.tags:
            self.tags = [await self.hold.consume(queue) for queue in self.consumed]

    async def _cancel(self) -> None:
        tags, self.tags = self.tags, []
        for tag in tags:
            await self.hold.cancel(tag)

    async def _let_go(self) -> None:
        """Peers may have what was not handed out."""
        await self._cancel()
        while self.buffer:
            hold, message = self.buffer.popleft()
            await hold.give_back(message.delivery_tag or 0)

    async def _watch(self) -> None:
        while self.lost is None:
            await asyncio.sleep(IDLE)
            if self.buffer and not self._asking and self._loop.time() - self._left >= IDLE:
                with suppress(BrokerError):
                    await self.turn(self._let_go())

    def on_delivery(self, hold: Hold, message: DeliveredMessage) -> None:
        """Called by the hold."""
        self.buffer.append((hold, message))
        self.changed.set()

    def on_lost(self, why: str) -> None:
        """Called by the hold when the channel, or a consumer, ends without us."""
        self.lost = self.lost or why
        self.changed.set()

    def _hand_out(self, hold: Hold, message: DeliveredMessage) -> Received:
        headers = message.header.properties.headers or {}
        own = message.exchange == "" or ".g:." in (message.routing_key or "")
        envelope = envelope_of(self.spec.topic, self.spec.group if own else None, message.body, message.header.properties)
        crashes = self.deaths(headers) if headers and self.terms.modern else 0
        hold.out.add(tag := message.delivery_tag or 0)
        return Received(envelope, (hold, tag), hold.tenure, crashes, message)

    def deaths(self, headers: Mapping[str, object]) -> int:
        """What is given back is not among them: it goes by nack."""
        return number_of(headers, "x-delivery-count")


def number_of(headers: Mapping[str, object], name: str) -> int:
    """A header of the broker's."""
    value = headers.get(name)
    return value if isinstance(value, int) else 0


class PrivateReceiver(RabbitReceiver):
    """A queue that is this connection's alone, and ends with it. Quorum queues can be neither (R20), and nothing in it must last."""

    lends = False

    async def queues(self) -> list[str]:
        """Made here."""
        layout = self.terms.layout
        name = f"{layout.topic}:private.{os.urandom(8).hex()}"
        async with self.terms.ask(f"a private queue of {layout.topic!r}") as channel:
            await channel.queue_declare(name, exclusive=True, auto_delete=True)
            for part in layout.parts_of(self.spec.priority):
                await channel.queue_bind(name, exchange(layout.topic), layout.pattern(part))
        return [name]

    async def end(self) -> None:
        """Unbound first: what is on its way to a queue that ends is nacked, and its publisher would not know what became of it."""
        queues, self.consumed = self.consumed, []
        with suppress(BrokerError):
            for name in queues if self.lost is None else ():
                async with self.terms.ask(f"queue {name!r}") as channel:
                    for part in self.terms.layout.parts_of(self.spec.priority):
                        await channel.queue_unbind(name, exchange(self.spec.topic), self.terms.layout.pattern(part))
        await super().end()
