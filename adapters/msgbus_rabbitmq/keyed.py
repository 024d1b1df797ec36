"""Receivers of keyed topics: each queue has one active consumer, every member of the group consumes all, and they share out who is active.

From 4.3 on a consumer with a higher priority becomes the active one when what the other has in hand is settled. A member's number is that
of the exclusive queue it holds, and their count is the number of consumers of one more queue; shard s belongs to the member s modulo
the count. Who is to have a shard consumes it anew with the time as its priority, so that the last one to claim it has it. Before 4.3 a
shard changes hands only when its consumer ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count

from aiormq.abc import DeliveredMessage

from msgbus.contract.adapter import ReceiverSpec
from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_rabbitmq import names
from msgbus_rabbitmq.errors import is_locked
from msgbus_rabbitmq.receiver import Hold, RabbitReceiver, Terms, number_of

log = logging.getLogger("msgbus.rabbitmq")

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
        self._shares: set[int] = set()
        self._one: asyncio.Event | None = None

    async def open(self) -> None:
        """Consumes all shards; in quarantine one after the other."""
        if self.spec.quarantine:
            self.work = asyncio.create_task(self._one_by_one(), name="msgbus rabbitmq quarantine")
            return
        await self.hold.open(self.terms.link)
        if self.terms.modern:
            await self._take_number(count())
            async with self.terms.ask(f"queue {self._crowd!r}") as channel:
                await channel.queue_declare(self._crowd, durable=True, auto_delete=True)
            await self.hold.consume(self._crowd)
            self._shares = await self._share()
        self.tags = [await self.hold.consume(queue, self._priority(shard)) for shard, queue in enumerate(await self.queues())]
        if self.terms.modern:
            self.work = asyncio.create_task(self._take_part(), name="msgbus rabbitmq shares")

    def _priority(self, shard: int) -> int | None:
        return None if not self.terms.modern else time.time_ns() // 1_000_000 if shard in self._shares else 0

    def deaths(self, headers: Mapping[str, object]) -> int:
        """A close in good order counts too, as the order of the queue allows no other way to give back. But it is a nack and then the end
        of the channel, so that it counts one delivery and two acquisitions; a death counts one of each."""
        return max(2 * number_of(headers, "x-delivery-count") - number_of(headers, "x-acquired-count"), 0)

    async def drain(self) -> None:
        """What was not handed out goes back in `close`, by the end of the channel: a cancelled consumer's messages would come after those
        that a standby is given at once (C10)."""
        self.stop()

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
            await self._take_number(range(self._number))
        return {shard for shard in range(self.terms.layout.shards) if shard % members == self._number % members}

    async def _take_part(self) -> None:
        while self.lost is None:
            await asyncio.sleep(TICK)
            try:
                await self.turn(self._claim())
            except MsgbusError as error:
                log.debug("shares of %s: %s", self.spec.topic, error)

    async def _claim(self) -> None:
        """What this member should have and has not, as members come and go."""
        share = await self._share()
        claims, self._shares = share - self._shares, share
        queues = await self.queues()
        for shard in claims:
            before, self.tags[shard] = self.tags[shard], await self.hold.consume(queues[shard], self._priority(shard))
            await self.hold.cancel(before)  # only now: were it the active one, a standby would be given what comes after its messages

    # ------------------------------------------------------------ quarantine

    async def _one_by_one(self) -> None:
        """One message of one shard at a time, each on a channel of its own, whose end gives back in order what came behind it. With more
        in hand a death would count for the neighbours too."""
        try:
            while self.lost is None and not self.draining:
                came = False
                for queue in await self.queues():
                    async with self.terms.ask(f"queue {queue!r}") as channel:
                        ready = (await channel.queue_declare(queue, passive=True)).message_count
                    if ready and not self.draining:
                        came = await self._take_one(queue) or came
                if not came:
                    await asyncio.sleep(LOOK / 3)
        except MsgbusError as error:
            self.on_lost(str(error))

    async def _take_one(self, queue: str) -> bool:
        """Whether one came; returns when it is settled."""
        self.hold, self._one = Hold(self), asyncio.Event()
        await self.hold.open(self.terms.link)
        await self.hold.consume(queue)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK):
                await self._one.wait()
            await self.hold.idle.wait()
        if self.lost is None:
            await self.hold.close()
        return self._one.is_set()

    def on_delivery(self, hold: Hold, message: DeliveredMessage) -> None:
        """In quarantine the first alone."""
        if self._one is None or not self._one.is_set():
            super().on_delivery(hold, message)
        if self._one is not None:
            self._one.set()
