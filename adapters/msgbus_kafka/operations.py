"""What operators ask for: how much is left, a look at it, purging, replaying, listing and dropping groups.

Nobody but its members may commit for a group that is at work. So what concerns one is written as an order: a commit of a group that nobody
joins, which the receivers look at twice a second.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from aiokafka import TopicPartition

from msgbus.contract.adapter import Depth
from msgbus.contract.address import DEAD_GROUP
from msgbus.contract.envelope import PRIORITIES, Envelope, Priority
from msgbus.errors import AuthenticationFailed, BrokerUnavailable, NotFound, UnsupportedFeature
from msgbus_kafka.cluster import BEGINNING, CLOSE, END, Cluster, Committed
from msgbus_kafka.dead import living
from msgbus_kafka.membership import ORDERS_EVERY, PURGE
from msgbus_kafka.names import SOON, group_id, is_dead, orders_id, stream
from msgbus_kafka.partition import Mark, read_mark
from msgbus_kafka.receiver import SETTLE_EVERY
from msgbus_kafka.records import Record, read_dead
from msgbus_kafka.sender import Sender
from msgbus_kafka.topology import RETENTION, groups_of, note_history

NOTED = SETTLE_EVERY * 3
"""Seconds after which what a receiver handed out is in its commits."""
SEEN = ORDERS_EVERY + 0.2
"""Seconds after which every receiver has seen an order."""
_DISMISSALS = 5


class Operations:
    """Works on groups of one open adapter's cluster. Raises `NotFound` where there is no such group."""

    def __init__(self, cluster: Cluster, sender: Sender) -> None:
        self.cluster = cluster
        self.sender = sender
        self.loop = asyncio.get_running_loop()

    async def depth(self, topic: str, group: str) -> Depth:
        """`ready` is the distance from the committed heads to the ends; what is in hand is not told apart."""
        counts = {True: 0, False: 0}
        for level, committed in (await self._committed(topic, group)).items():
            for place, (head, end) in (await self._left(committed)).items():
                counts[place.topic == stream(topic, level)] += end - head
        return Depth(counts[True], None, counts[False], approximate=True)

    async def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """Of dead letters, oldest first; of nothing else, for which Kafka has tools."""
        if not is_dead(topic):
            raise UnsupportedFeature("looking at what waits in a group", "Kafka", "kafka-console-consumer.sh, which takes nothing")
        for letter in await self.letters(topic):
            yield read_dead(letter, topic)

    async def purge(self, topic: str, group: str) -> int:
        """Discards what was not handed out. Of a group that is at work its receivers do so: it takes a second."""
        if is_dead(topic):
            keys = [letter.key or b"" for letter in await self.letters(topic)]
            if left := await self.sender.bury(topic, keys, CLOSE):
                raise BrokerUnavailable(f"{len(left)} dead letters of {topic!r} could not be purged")
            return len(keys)
        purged = 0
        for level in await self._committed(topic, group):
            name = group_id(topic, group, level)
            at_work = bool(await self.cluster.members(name))
            if at_work:
                await asyncio.sleep(NOTED)
            orders, committed = await self.cluster.committed(orders_id(name)), await self.cluster.committed(name)
            heads: dict[TopicPartition, tuple[int, str]] = {}
            for place, (head, end) in (await self._left(committed)).items():
                if place.topic == stream(topic, level):
                    before = orders[place][0] if place in orders and orders[place][1] == PURGE else 0
                    purged += max(0, end - max(head, read_mark(committed[place][1]).upto, before))
                    heads[place] = (end, Mark(replayed=read_mark(committed[place][1]).replayed).text())
            await self._commit(name, heads, PURGE, at_work)
        return purged

    async def replay(self, topic: str, group: str, since: float) -> int:
        """From the first record that is as young, by its time stamp. 0 where the topic was not told to retain anything."""
        replayed = 0
        for level, committed in (await self._committed(topic, group)).items():
            base, name, order = stream(topic, level), group_id(topic, group, level), uuid.uuid4().hex
            if RETENTION not in (await self.cluster.configs([base])).get(base, {}):
                continue
            places = [place for place in committed if place.topic in (base, base + SOON)]
            starts = await self.cluster.offsets(dict.fromkeys(places, max(0, int(since * 1000))))
            ends = await self.cluster.offsets(dict.fromkeys(places, END))
            replayed += sum(max(0, ends[place] - start) for place, start in starts.items())
            heads = {place: (min(start, committed[place][0]), Mark(replayed=order).text()) for place, start in starts.items()}
            await self._commit(name, heads, order, bool(await self.cluster.members(name)))
        return replayed

    async def _commit(self, name: str, heads: Committed, order: str, at_work: bool) -> None:
        """Orders a group that works to move, and moves one that rests; there too the order must not be an older one."""
        await self.cluster.commit(orders_id(name), {place: (offset, order) for place, (offset, _) in heads.items()})
        if at_work or not await self.cluster.commit(name, heads):
            await asyncio.sleep(SEEN)

    async def overdue(self, topic: str, group: str) -> list[str]:
        """A warning a level whose oldest un-settled message is older than half of what Kafka keeps. None where we may not look."""
        found: list[str] = []
        with suppress(NotFound, AuthenticationFailed):
            for level, committed in (await self._committed(topic, group)).items():
                base = stream(topic, level)
                heads = {place: head for place, (head, _) in committed.items() if place.topic == base}
                kept = int((await self.cluster.configs([base], defaults=True)).get(base, {}).get(RETENTION, -1))
                if kept < 0:
                    continue
                recent = await self.cluster.offsets(dict.fromkeys(heads, max(0, int(time.time() * 1000 - kept / 2))))
                if any(recent[place] > head for place, head in heads.items()):
                    found.append(
                        f"messages of {base!r} wait for {group!r} for more than half of the {kept / 1000:g} s after which Kafka deletes "
                        f"them, done or not ({RETENTION}): give the group more processes, or the topic a longer retain="
                    )
        return found

    async def groups(self, topic: str) -> Sequence[str]:
        """Those that were declared, sorted."""
        if is_dead(topic):
            return [DEAD_GROUP] if topic in await self.cluster.leaders([topic]) else []
        return await groups_of(self.cluster, topic)

    async def drop(self, topic: str, group: str) -> bool:
        """Dismisses the members, forgets what the group has done, and deletes its own topics. Its dead letters stay."""
        found = False
        for level in PRIORITIES:
            name = group_id(topic, group, level)
            if not await self.cluster.committed(name):
                continue
            found = True
            for _ in range(_DISMISSALS):
                for member in await self.cluster.members(name):
                    await self.cluster.dismiss(name, member)
                if await self.cluster.forget(name):
                    break
            else:
                raise BrokerUnavailable(f"group {name!r} has members that come back again and again")
            await note_history(self.cluster, stream(topic, level))  # also when this was its last group
            await self.cluster.forget(orders_id(name))
            await self.cluster.delete([name + SOON])
            self.sender.forget(name + SOON)
        return found

    async def letters(self, topic: str) -> Sequence[Record]:
        """The dead letters that are not settled, oldest first."""
        if topic not in await self.cluster.leaders([topic]):
            raise NotFound(f"there is no Kafka topic {topic!r}")
        return (await living(self.cluster, topic))[0]

    async def _left(self, committed: Committed) -> dict[TopicPartition, tuple[int, int]]:
        """Head and end of each partition; where retention went beyond a head, the log's own beginning."""
        ends = await self.cluster.offsets(dict.fromkeys(committed, END))
        starts = await self.cluster.offsets(dict.fromkeys(committed, BEGINNING))
        return {place: (max(head, starts[place]), ends[place]) for place, (head, _) in committed.items()}

    async def _committed(self, topic: str, group: str) -> dict[Priority, Committed]:
        """Of each priority that the group has, as far as its topics are there."""
        found: dict[Priority, Committed] = {}
        for level in PRIORITIES:
            if committed := await self.cluster.committed(group_id(topic, group, level)):
                led = await self.cluster.leaders({place.topic for place in committed})
                found[level] = {place: commit for place, commit in committed.items() if place.topic in led}
        if not found:
            raise NotFound(f"Kafka has no group {group!r} of topic {topic!r}")
        return found
