"""Dead letters: a compacted topic of one partition, a key a death; a tombstone means settled. Read without a group, by anyone at once.

A contiguous head could not settle one by one in any order. So whoever reads goes through the log once, noting which letters live, hands
those out, and then what comes; tombstones that others write meanwhile are heeded as they come.
"""

from __future__ import annotations

import asyncio

from aiokafka import TopicPartition

from msgbus.contract.adapter import AdapterSettings, Received, ReceiverSpec
from msgbus.contract.envelope import Envelope
from msgbus_kafka.cluster import BEGINNING, CLOSE, END, Cluster
from msgbus_kafka.errors import CLIENT_ERRORS, translate
from msgbus_kafka.partition import Partition
from msgbus_kafka.receiver import KafkaReceiver, consumer_of, stop
from msgbus_kafka.records import Record, read_dead
from msgbus_kafka.sender import Sender

SCAN_DEADLINE = 60.0
_ANY = 2**63


async def living(cluster: Cluster, topic: str) -> tuple[list[Record], int]:
    """The letters of a dead topic that are not settled, oldest first, and the offset up to which that is so."""
    place = TopicPartition(topic, 0)
    position, end = [(await cluster.offsets({place: moment}))[place] for moment in (BEGINNING, END)]
    live: dict[bytes, Record] = {}
    consumer = consumer_of(cluster)
    try:
        async with asyncio.timeout(SCAN_DEADLINE):
            await consumer.start()
            consumer.assign([place])
            consumer.seek(place, position)
            while position < end:
                for record in (await consumer.getmany(place, timeout_ms=200)).get(place, ()):
                    key = record.key or b""
                    live.pop(key, None)
                    if record.value is not None and record.offset < end:
                        live[key] = record
                position = await consumer.position(place)
    except CLIENT_ERRORS as error:
        raise translate(error, f"reading dead letters of {topic!r}") from error
    finally:
        await stop(consumer)
    return [*live.values()], end


class DeadReceiver(KafkaReceiver):
    """Hands out what lives of a group's dead letters. Several at once hand out the same ones."""

    def __init__(self, spec: ReceiverSpec, cluster: Cluster, settings: AdapterSettings, peers: set[KafkaReceiver], sender: Sender) -> None:
        super().__init__(spec, cluster, settings, peers)
        self._sender = sender
        self._ack_window = _ANY  # nothing is committed: what is settled is settled, whatever lies before it
        self._offsets: dict[bytes, int] = {}
        self._settled: list[bytes] = []

    async def _begin(self) -> None:
        letters, end = await living(self._cluster, self._stream)
        place = TopicPartition(self._stream, 0)
        self._consumer.assign([place])
        self._consumer.seek(place, end)
        self._partitions[place] = partition = Partition(place, 0)
        self._keep(partition, letters, 0.0)
        partition.position = end

    def _read(self, partition: Partition, record: Record) -> tuple[Envelope, float] | None:
        key = record.key or b""
        before = self._offsets.pop(key, -1)
        if before not in partition.held:  # settled by others, or the same letter once more
            partition.unsettled.pop(before, None)
        if record.value is None:
            return None
        self._offsets[key] = record.offset
        return read_dead(record, self._spec.topic), 0.0

    def ack(self, received: Received) -> None:
        """A tombstone, written with others within a twentieth of a second."""
        partition, offset = received.token
        if offset in partition.unsettled and not partition.tenure.lost:
            self._settled.append(received.native.key or b"")  # type: ignore[attr-defined]  # a record
        super().ack(received)

    def in_hand(self, topic: str) -> int:
        """How many of a topic's letters are handed out here."""
        return self._held() if topic == self._stream else 0

    async def _settle(self) -> None:
        if keys := [*self._settled]:
            left = await self._sender.bury(self._spec.topic, keys, CLOSE)
            self._settled[: len(keys)] = left
            if left:
                self._dirty.set()

    async def _end(self) -> None:
        await self._settle()
        await super()._end()
