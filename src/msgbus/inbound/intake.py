"""Intake: the open receivers of a subscription, one a priority level, and the pumps that fill its window from them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgbus.contract.adapter import Adapter, Capability, ReceiverSpec
from msgbus.contract.envelope import PRIORITIES
from msgbus.errors import BrokerError
from msgbus.inbound.carrying import Carrier
from msgbus.inbound.hand import Hand, resolve
from msgbus.inbound.job import Source
from msgbus.inbound.plan import Plan
from msgbus.inbound.ready import share_of_window
from msgbus.inbound.suspects import Suspects

log = logging.getLogger("msgbus")

POLL = 0.5
"""Seconds that a receive waits: also how soon a shard that others wait for is noticed."""


class _Turn(Exception):
    """A quarantine begins or ends: no error, but the receivers are to be opened in another way."""


class Intake:
    """Of one subscription. Opened and closed for every session: a lost link or a quarantine ends one."""

    def __init__(
        self, plan: Plan, adapter: Adapter, hand: Hand, carrier: Carrier, suspects: Suspects, after_batch: Callable[[], None]
    ) -> None:
        self._plan = plan
        self._adapter = adapter
        self._hand = hand
        self._carrier = carrier
        self._suspects = suspects
        self._after_batch = after_batch
        self._sources: list[Source] = []
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        """A receiver a level. Raises `BrokerError`; what was opened by then is closed by `close`."""
        plan, quarantine = self._plan, self._suspects.quarantine
        levels = PRIORITIES if plan.topic.priorities else ("normal",)
        window = plan.window - len(levels) + 1  # a place is kept for each other level
        most = 1 if quarantine else window
        for level in levels:
            share = most if len(levels) == 1 or quarantine else share_of_window(level, plan.window)
            spec = ReceiverSpec(
                topic=plan.physical,
                group=plan.group,
                window=window,
                priority=level,
                start=plan.start,
                exclusive=plan.exclusive and Capability.SHARDS in self._adapter.capabilities,
                quarantine=quarantine,
            )
            receiver = await self._adapter.open_receiver(spec)
            self._sources.append(Source(receiver, level, most, share, self._hand.ready.level(level)))
        for place, source in enumerate(self._sources):
            source.siblings = (*self._sources[place + 1 :], *self._sources[:place])

    async def run_until(self, stopping: asyncio.Event) -> BrokerError | None:
        """Fills the window until `stopping`, or until the receivers must be opened in another way (None), or the link is lost (why)."""
        pumps = [self._loop.create_task(self._pump(source), name=f"msgbus {self._plan.name} {source.level}") for source in self._sources]
        stopped = self._loop.create_task(stopping.wait(), name=f"msgbus {self._plan.name} stopping")
        try:
            await asyncio.wait([*pumps, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in [*pumps, stopped]:
                task.cancel()
            await asyncio.wait([*pumps, stopped])
        lost: BrokerError | None = None
        for pump in pumps:
            result = None if pump.cancelled() else pump.exception()
            if isinstance(result, BrokerError):
                lost = result
            elif isinstance(result, Exception) and not isinstance(result, _Turn):
                raise result
        return lost

    async def drain(self) -> None:
        """The receivers fetch no more."""
        for source in self._sources:
            await self._carrier.bounded(source.receiver.drain())

    async def close(self) -> None:
        """Closes the receivers; what they had handed out and not settled returns to the group."""
        sources, self._sources = self._sources, []
        for source in sources:
            source.closed = True
            self._hand.ack_again(source)
        await asyncio.gather(*(self._carrier.bounded(source.receiver.close()) for source in sources))
        for source in sources:
            self._hand.counts["stale_acks"] += source.receiver.stale_acks

    def look_again(self) -> None:
        """Something changed that the pumps may wait for."""
        for source in self._sources:
            if source.room is not None:
                resolve(source.room, True)

    # ------------------------------------------------------------ inside

    async def _pump(self, source: Source) -> None:
        hand = self._hand
        while True:
            room = self._room(source) if source.siblings else source.window - source.held
            if not hand.takes(source, room):
                await self._wait_for_room(source)
                self._hurry_what_others_wait_for()
                while not hand.limit and (jobs := hand.take_draining()):  # paused: what is ready must not hold it up either
                    for job in jobs:
                        await self._carrier.put_back(job)
                continue
            source.asked = min(room, hand.limit) if hand.limit < self._plan.concurrency else room
            try:
                batch = await source.receiver.receive(source.asked, POLL)
            finally:
                source.asked = 0
            source.active = bool(batch)
            if self._suspects.turn(source, self._sources, batch):
                log.warning("%s: %s", self._plan.name, _TURNS[self._suspects.quarantine])
                if hand.lanes is None:  # an ordered group's batch goes back in order when its receiver closes
                    await asyncio.gather(*(self._carrier.bounded(source.receiver.release(received)) for received in batch))
                raise _Turn
            now = time.time()
            for received in batch:
                hand.accept(source, received, now)
            if hand.waiting:
                self._hurry_what_others_wait_for()
            if batch:
                self._after_batch()
            elif source.siblings:
                await self._let_siblings_look(source)

    def _room(self, source: Source) -> int:
        """How many more it may hold beside other levels. One without messages lends its share of the window, less one place, to those that
        have some."""
        held = source.held + sum(other.held for other in source.siblings)
        if self._suspects.quarantine:
            return 0 if held or any(other.asked for other in source.siblings) else 1
        room = self._plan.window - held - sum(_kept_for(other) for other in source.siblings)
        return room if source.active else min(room, 1)

    async def _let_siblings_look(self, source: Source) -> None:
        """It has nothing: the places that it asked for are another level's, the next one's first."""
        for other in source.siblings:
            if other.room is not None:
                resolve(other.room, True)
        await asyncio.sleep(0)

    async def _wait_for_room(self, source: Source) -> None:
        source.room = self._loop.create_future()
        timer = self._loop.call_later(POLL, resolve, source.room, False)
        try:
            await source.room
        finally:
            timer.cancel()
            source.room = None

    def _hurry_what_others_wait_for(self) -> None:
        """A retry that waits here must not hold up the hand-over of its shard."""
        for job in [job for job in self._hand.waiting if job.received.tenure.draining]:
            self._hand.due(job)


def _kept_for(source: Source) -> int:
    """Places of the window that other levels must leave to this one."""
    return max(source.asked, (source.share if source.active else 1) - source.held, 0)


_TURNS = {
    True: "messages came that were in hand when processes died: one at a time until they are through",
    False: "the quarantine is over",
}
