"""A hold: one channel's deliveries, from its opening to its end. What is settled goes out in batches, in the right order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from aiormq import Channel, spec
from aiormq import exceptions as client
from aiormq.abc import DeliveredMessage

from msgbus.contract.adapter import Tenure
from msgbus.errors import BrokerError
from msgbus_rabbitmq.errors import calling
from msgbus_rabbitmq.link import CLOSE, Link


class Hold:
    """`deliver(hold, message)` is called for each delivery, `lost(why)` when the channel, or a consumer, ends without us.

    A tag belongs to its channel: after the hold is lost a word about it is moot (R2).
    """

    def __init__(self, window: int, deliver: Callable[[Hold, DeliveredMessage], None], lost: Callable[[str], None]) -> None:
        self.tenure = Tenure()
        self._over = True  # until it is open; the core writes into tenures too
        self.unsettled: dict[int, None] = {}  # in the order of the tags
        self.idle = asyncio.Event()
        self.stale = 0
        self._window = window
        self._deliver = deliver
        self._lost = lost
        self._channel: Channel
        self._acked: list[int] = []
        self._returned: list[int] = []
        self._writing: asyncio.Task[None] | None = None

    async def open(self, link: Link) -> None:
        """Each consumer gets a prefetch of the window."""
        self._channel = channel = await link.channel()
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)
        channel.closing.add_done_callback(self._on_close)  # pyright: ignore[reportUnknownMemberType]  # aiormq does not say of what
        async with calling("consuming"):
            await channel.basic_qos(prefetch_count=self._window)
        self._over = False

    async def consume(self, queue: str, priority: int | None = None) -> str:
        """The consumer's tag, new each time: one that the broker has cancelled may still be taken (R12)."""
        async with calling(f"consuming {queue!r}"):
            answer = await self._channel.basic_consume(
                queue, self._on_message, arguments=None if priority is None else {"x-priority": priority}
            )
            return answer.consumer_tag or ""

    async def cancel(self, tag: str) -> None:
        """When it returns, all that came by this consumer has been delivered."""
        if not self._over:
            async with calling("cancelling a consumer"):
                await self._channel.basic_cancel(tag)

    # ------------------------------------------------------------ coming in

    async def _on_message(self, message: DeliveredMessage) -> None:
        """Only notes it: what the client runs here it cancels when the link is lost (R1)."""
        if not self._over:
            self.unsettled[message.delivery_tag or 0] = None
            self._deliver(self, message)

    async def _on_cancel(self, frame: spec.Basic.Cancel) -> None:
        self._end("the broker cancelled the consumer: its queue is gone, or its consumer_timeout is over")

    def _on_close(self, _: object) -> None:
        self._end("the link to the broker, or the channel, was lost")

    def _end(self, why: str) -> None:
        if not self._over:
            self._over = self.tenure.lost = True
            self.stale += len(self._acked)
            self.idle.set()
            self._lost(why)

    # ------------------------------------------------------------ settling

    def ack(self, tag: int) -> bool:
        """False: it was settled before."""
        if tag not in self.unsettled:
            return False
        del self.unsettled[tag]
        if self._over:
            self.stale += 1
        else:
            self._acked.append(tag)
            _ = self._write_soon()
        return True

    async def give_back(self, tag: int) -> bool:
        """False: it was settled before. When it returns, the broker will have it before any later word."""
        if tag not in self.unsettled:
            return False
        del self.unsettled[tag]
        if not self._over:
            self._returned.append(tag)
            await asyncio.shield(self._write_soon())
        return True

    def _write_soon(self) -> asyncio.Task[None]:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="msgbus rabbitmq settling")
        return self._writing

    async def _write(self) -> None:
        """One ack for all up to the lowest un-settled one, and one each above it (M14), none for what is settled: that would end
        the channel. What is given back goes first: the ack for all must not be for it. Waits for no drain of the socket."""
        while (self._acked or self._returned) and not self._over:
            returned, self._returned = self._returned, []
            acked, self._acked = self._acked, []
            lowest = next(iter(self.unsettled), None)
            up_to = max((tag for tag in acked if lowest is None or tag < lowest), default=0)
            try:
                for tag in returned:
                    await self._channel.basic_nack(tag, wait=False)
                if up_to:
                    await self._channel.basic_ack(up_to, multiple=True, wait=False)
                for tag in acked:
                    if tag > up_to:
                        await self._channel.basic_ack(tag, wait=False)
            except (client.AMQPError, client.ChannelInvalidStateError):
                self._acked += acked  # too late, all of them
                self._end("the channel was closed")
        if not self.unsettled:
            self.idle.set()

    async def close(self) -> None:
        """Tells what is settled, gives the rest back in order, and closes the channel. Bounded."""
        with suppress(BrokerError):
            async with calling("closing a channel", CLOSE):
                await self._write_soon()
                if not self._over:
                    self._over = True
                    await self._channel.basic_nack(0, multiple=True, wait=False)
                    await self._channel.close()
        self._over = self.tenure.lost = True
