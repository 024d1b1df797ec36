"""What operators ask for: how much is left, a look at it, purging, replaying, listing and dropping groups.

Nobody but its members may commit for a group that is at work. So what concerns one is written as an order: a commit of a group that nobody
joins, which the receivers look at twice a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from msgbus.contract.adapter import Depth
from msgbus.contract.envelope import Envelope, Priority
from msgbus.errors import BrokerUnavailable, NotFound
from msgbus_kafka.cluster import BEGINNING, END, Cluster, Committed
from msgbus_kafka.errors import CLIENT_ERRORS, translate
from msgbus_kafka.names import SOON, group_id, history_id, levels, orders_id, stream
from msgbus_kafka.receiver import COMMIT_EVERY, ORDERS_EVERY, STOP_DEADLINE, abort_consumer
from msgbus_kafka.records import Record, read
from msgbus_kafka.topology import RETENTION, groups_of
from msgbus_kafka.tracking import Mark, read_mark

NOTED = COMMIT_EVERY * 3
"""Seconds after which what a receiver handed out is in its commits."""
SEEN = ORDERS_EVERY + 0.2
"""Seconds after which every receiver has seen an order."""
_DISMISSALS = 5


class Operations:
    """Works on groups of one adapter's cluster."""

    def __init__(self, cluster: Cluster, options: Callable[[], Mapping[str, Any]]) -> None:
        self._cluster = cluster
        self._options = options

    async def depth(self, topic: str, group: str) -> Depth:
        """`ready` is the distance from the committed heads to the ends; what is in hand is not told apart."""
        ready = delayed = 0
        for level, committed in (await self._committed(topic, group)).items():
            base = stream(topic, level)
            for place, (offset, end) in (await self._left(committed)).items():
                if place.topic == base:
                    ready += end - offset
                else:
                    delayed += end - offset
        return Depth(ready, None, delayed, approximate=True)

    async def purge(self, topic: str, group: str) -> int:
        """Discards what was not handed out. Of a group that is at work its receivers do so: it takes a second."""
        purged = 0
        for level, _ in (await self._committed(topic, group)).items():
            purged += await self._purge(stream(topic, level), group_id(topic, group, level))
        return purged

    async def _purge(self, base: str, group: str) -> int:
        at_work = bool(await self._cluster.members(group))
        if at_work:
            await asyncio.sleep(NOTED)
        orders = await self._cluster.committed(orders_id(group))
        committed = await self._cluster.committed(group)
        count = 0
        ends: dict[TopicPartition, tuple[int, str]] = {}
        heads: dict[TopicPartition, tuple[int, str]] = {}
        for place, (offset, end) in (await self._left(committed)).items():
            if place.topic == base:
                upto = max(offset, read_mark(committed[place][1]).upto, orders[place][0] if place in orders else 0)
                count += max(0, end - upto)
                ends[place] = (end, "purge")
                heads[place] = (end, Mark(replayed=read_mark(committed[place][1]).replayed).text())
        if not at_work and await self._cluster.commit(group, heads):
            return count
        await self._cluster.commit(orders_id(group), ends)
        await asyncio.sleep(SEEN)
        return count

    async def replay(self, topic: str, group: str, since: float) -> int:
        """From the first record that is as young, by its time stamp. 0 where the topic was not told to retain anything."""
        replayed = 0
        for level, committed in (await self._committed(topic, group)).items():
            base = stream(topic, level)
            if RETENTION not in (await self._cluster.configs([base])).get(base, {}):
                continue
            replayed += await self._replay(base, group_id(topic, group, level), committed, since)
        return replayed

    async def _replay(self, base: str, group: str, committed: Committed, since: float) -> int:
        places = [place for place in committed if place.topic in (base, base + SOON)]
        starts = await self._cluster.offsets(dict.fromkeys(places, max(0, int(since * 1000))))
        ends = await self._cluster.offsets(dict.fromkeys(places, END))
        order = uuid.uuid4().hex
        heads = {place: (starts[place], Mark(replayed=order).text()) for place in places}
        if await self._cluster.members(group) or not await self._cluster.commit(group, heads):
            await self._cluster.commit(orders_id(group), {place: (starts[place], order) for place in places})
            await asyncio.sleep(SEEN)
        return sum(max(0, ends[place] - starts[place]) for place in places)

    async def groups(self, topic: str) -> list[str]:
        """Those that were declared."""
        return await groups_of(self._cluster, topic)

    async def drop(self, topic: str, group: str) -> bool:
        """Dismisses the members, forgets what the group has done, and deletes its own topics. Its dead letters stay."""
        found = False
        for level in levels(True):
            name = group_id(topic, group, level)
            if level != "normal" and not await self._cluster.committed(name):
                continue
            found = await self._drop(stream(topic, level), name) or found
        return found

    async def _drop(self, base: str, group: str) -> bool:
        there = bool(await self._cluster.committed(group))
        for attempt in range(_DISMISSALS):
            for member in await self._cluster.members(group):
                await self._cluster.dismiss(group, member)
            try:
                await self._cluster.forget(group)
                break
            except BrokerUnavailable:  # one of them was back before the group was gone
                if attempt == _DISMISSALS - 1:
                    raise
        if there:  # the topic has had a group, also when this was the last one
            await self._cluster.commit(history_id(base), {TopicPartition(base + SOON, 0): (0, "had a group")})
            await self._cluster.forget(orders_id(group))
            await self._cluster.delete([group + SOON])
        return there

    async def peek(self, topic: str, group: str) -> AsyncGenerator[Envelope, None]:
        """What waits behind what was handed out, by its time stamps. Reads all of it before the first comes out of it."""
        await self._committed(topic, group)  # raises before anything waits
        await asyncio.sleep(NOTED)
        waiting: list[tuple[int, int, Envelope]] = []
        for level, committed in (await self._committed(topic, group)).items():
            base, name = stream(topic, level), group_id(topic, group, level)
            orders = await self._cluster.committed(orders_id(name))
            bounds: dict[TopicPartition, tuple[int, int]] = {}
            for place, (offset, end) in (await self._left(committed)).items():
                start = max(offset, read_mark(committed[place][1]).upto)
                if place in orders and orders[place][1] == "purge":
                    start = max(start, orders[place][0])
                if start < end:
                    bounds[place] = (start, end)
            now = time.time()
            for record in await self._between(bounds):
                own = group if record.topic == name + SOON else None
                envelope, due_at = read(record, topic, own, level)
                if record.topic == base or due_at <= now:
                    waiting.append((record.timestamp, len(waiting), envelope))
        for _, _, envelope in sorted(waiting, key=lambda found: found[:2]):
            yield envelope

    async def _between(self, bounds: Mapping[TopicPartition, tuple[int, int]]) -> list[Record]:
        if not bounds:
            return []
        consumer = AIOKafkaConsumer(**self._options(), enable_auto_commit=False, max_partition_fetch_bytes=2 * self._cluster.max_bytes)
        found: list[Record] = []
        try:
            async with asyncio.timeout(60.0):
                await consumer.start()
                consumer.assign(list(bounds))
                for place, (start, _) in bounds.items():
                    consumer.seek(place, start)
                left = dict(bounds)
                while left:
                    for place, records in (await consumer.getmany(*left, timeout_ms=200)).items():
                        found += [record for record in records if record.offset < bounds[place][1]]
                    for place in list(left):
                        if await consumer.position(place) >= bounds[place][1]:
                            del left[place]
        except CLIENT_ERRORS as error:
            raise translate(error, "looking at what waits") from error
        finally:
            with contextlib.suppress(*CLIENT_ERRORS):
                async with asyncio.timeout(STOP_DEADLINE):
                    await consumer.stop()
            abort_consumer(consumer)
        return found

    async def _left(self, committed: Committed) -> dict[TopicPartition, tuple[int, int]]:
        """Head and end of each partition; where retention went beyond a head, the log's own beginning."""
        ends = await self._cluster.offsets(dict.fromkeys(committed, END))
        starts = await self._cluster.offsets(dict.fromkeys(committed, BEGINNING))
        return {place: (max(offset, starts[place]), ends[place]) for place, (offset, _) in committed.items()}

    async def _committed(self, topic: str, group: str) -> dict[Priority, Committed]:
        """Of each priority that the group has. `NotFound` where there is no such group."""
        found: dict[Priority, Committed] = {}
        for level in levels(True):
            committed = await self._cluster.committed(group_id(topic, group, level))
            if committed:
                led = await self._cluster.leaders({place.topic for place in committed})
                found[level] = {place: commit for place, commit in committed.items() if place.topic in led}
        if not found:
            raise NotFound(f"Kafka has no group {group!r} of topic {topic!r}")
        return found
