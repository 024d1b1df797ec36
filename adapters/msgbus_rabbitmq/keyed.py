"""Receivers of keyed topics: a queue a shard with one active consumer, and the group's members share the shards out.

A member's number is that of the exclusive queue it holds, and their count is the number of consumers of one more queue; shard s belongs to
the member s modulo the count. A member consumes its own shards alone, each on a channel of its own, whose end gives back in order. One that
is another's now is left when what was handed out of it is settled; the other waits meanwhile, as the queue's next consumer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from itertools import count

from aiormq.abc import DeliveredMessage

from msgbus.contract.adapter import Received, ReceiverSpec
from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_rabbitmq import names
from msgbus_rabbitmq.errors import is_locked
from msgbus_rabbitmq.receiver import Hold, RabbitReceiver, Terms, number_of

TICK = 0.5
"""Seconds between two looks at who is there."""
LOOK = 0.3
"""Seconds that a message which is ready may take to come; longer, and another member has the shard."""


class KeyedReceiver(RabbitReceiver):
    """Of a group of a keyed topic."""

    lends = False

    def __init__(self, terms: Terms, spec: ReceiverSpec) -> None:
        super().__init__(terms, spec)
        self._crowd = names.member(spec.topic, spec.group or "")
        self._number = 0
        self._holds_number: str | None = None
        self._mine: dict[int, Hold] = {}
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._one: asyncio.Future[DeliveredMessage] | None = None
        self.holds = self._mine.values()

    async def open(self) -> None:
        """Consumes its share; in quarantine all shards, one after the other."""
        if self.spec.quarantine:
            self.work = asyncio.create_task(self._one_by_one(), name="msgbus rabbitmq quarantine")
            return
        await super().open()
        self.work = asyncio.create_task(self._take_part(), name="msgbus rabbitmq shares")

    async def begin(self) -> None:
        """Among the members."""
        await self.hold.open(self.terms.link)
        async with self.terms.link.numbering:
            await self._take_number(count())
        async with self.terms.ask(f"queue {self._crowd!r}") as channel:
            await channel.queue_declare(self._crowd, durable=True, auto_delete=True)
        await self.hold.consume(self._crowd)
        await self._adjust()

    def deaths(self, headers: Mapping[str, object]) -> int:
        """A close in good order counts too, as the order of the queue allows no other way to give back. But it is a nack, upon which the
        message comes at once again, and then the end of the channel: one delivery and two acquisitions; a death counts one of each."""
        return max(2 * number_of(headers, "x-delivery-count") - number_of(headers, "x-acquired-count"), 0)

    async def release(self, received: Received) -> None:
        """It is the next of its shard again, here; others get it when the shard is theirs. A nack would put it behind what waits here."""
        hold, tag = received.token
        if await hold.keep(tag) and not hold.tenure.draining and self._one is None:
            assert isinstance(received.native, DeliveredMessage)  # the core hands back what it was handed
            behind = (place for place, (other, one) in enumerate(self.buffer) if other is hold and (one.delivery_tag or 0) > tag)
            self.buffer.insert(next(behind, len(self.buffer)), (hold, received.native))
            self.changed.set()

    async def drain(self) -> None:
        """Is no member any more. What was not handed out goes back in `close`, by the end of the channel: a cancelled consumer's messages
        would come after those that a standby is given at once (C10)."""
        if not self.draining:
            self.stop()
            await self.turn(self.hold.close())

    async def end(self) -> None:
        """Each shard goes back in order."""
        await super().end()
        await self.hold.close()
        await asyncio.gather(*self._leaving.values())

    # ------------------------------------------------------------ who has what

    async def _take_number(self, numbers: Iterable[int]) -> None:
        """The first that is free: a queue of this connection's, without a consumer of this process. It ends with ours."""
        for number in numbers:
            name = names.member(self.spec.topic, self.spec.group or "", number)
            try:
                async with self.terms.ask(f"queue {name!r}") as channel:
                    taken = (await channel.queue_declare(name, exclusive=True, auto_delete=True)).consumer_count
            except BrokerUnavailable as error:
                if not is_locked(error):
                    raise
                taken = 1
            if not taken:
                before, self._holds_number = self._holds_number, await self.hold.consume(name)
                self._number = number
                if before is not None:
                    await self.hold.cancel(before)
                return

    async def _share(self) -> set[int]:
        """The shards that this member should have."""
        async with self.terms.ask(f"queue {self._crowd!r}") as channel:
            members = max((await channel.queue_declare(self._crowd, passive=True)).consumer_count or 0, 1)
        if self._number >= members:  # one before it has left
            async with self.terms.link.numbering:
                await self._take_number(range(self._number))
        return {shard for shard in range(self.terms.layout.shards) if shard % members == self._number % members}

    async def _take_part(self) -> None:
        try:
            while self.lost is None and not self.draining:
                await asyncio.sleep(TICK)
                await self.turn(self._adjust())
        except MsgbusError as error:
            self.on_lost(str(error))

    async def _adjust(self) -> None:
        """Takes what this member should have and has not, and leaves what it has and should not have, as members come and go."""
        if self.draining:
            return
        share, queues = await self._share(), await self.queues()
        for shard in self._mine.keys() - share - self._leaving.keys():
            _ = self._start_leaving(shard)
        await _all([self._enter(shard, queues[shard]) for shard in sorted(share - self._mine.keys())])

    async def _enter(self, shard: int, queue: str) -> None:
        self._mine[shard] = hold = Hold(self, queue)
        await hold.open(self.terms.link)
        await hold.consume(queue)

    def _start_leaving(self, shard: int) -> asyncio.Task[None]:
        self._leaving[shard] = task = asyncio.create_task(self._leave(shard), name="msgbus rabbitmq leaving a shard")
        return task

    async def _leave(self, shard: int) -> None:
        """Nothing of it is begun any more; what runs may end."""
        hold = self._mine[shard]
        hold.tenure.draining = True
        for entry in [entry for entry in self.buffer if entry[0] is hold]:
            self.buffer.remove(entry)
        hold.idle.clear()
        if hold.out:
            await hold.idle.wait()
        await hold.close()
        del self._mine[shard], self._leaving[shard]

    # ------------------------------------------------------------ quarantine

    async def _one_by_one(self) -> None:
        """One message of one shard at a time, each on a channel of its own."""
        try:
            while self.lost is None and not self.draining:
                came = False
                for shard, queue in enumerate(await self.queues()):
                    async with self.terms.ask(f"queue {queue!r}") as channel:
                        ready = (await channel.queue_declare(queue, passive=True)).message_count
                    if ready and not self.draining:
                        came = await self._take_one(shard, queue) or came
                if not came:
                    await asyncio.sleep(LOOK / 3)
        except MsgbusError as error:
            self.on_lost(str(error))

    async def _take_one(self, shard: int, queue: str) -> bool:
        """Whether one came; returns when it is settled. What else the window holds is taken with it, and set aside: the broker puts what
        comes back behind what came back before, so only who has all of that gives back in order."""
        self._one = self._loop.create_future()
        await self.turn(self._enter(shard, queue))
        hold = self._mine[shard]
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK):
                await asyncio.shield(self._one)
            await self.turn(hold.set_aside())
            hold.idle.clear()
            if not hold.tenure.lost:
                super().on_delivery(hold, self._one.result())
                await hold.idle.wait()
        await asyncio.shield(self._start_leaving(shard))
        return self._one.done()

    def on_delivery(self, hold: Hold, message: DeliveredMessage) -> None:
        """In quarantine only the first is noted; of a shard that is being left nothing."""
        if self._one is not None:
            if not self._one.done():
                self._one.set_result(message)
        elif not hold.tenure.draining:
            super().on_delivery(hold, message)


async def _all(calls: list[Coroutine[object, object, None]]) -> None:
    """Waits for all, also where one fails: a call that is cut off leaves a consumer behind."""
    for error in await asyncio.gather(*calls, return_exceptions=True):
        if error is not None:
            raise error
