"""Producing: one request a broker and call, `acks=all`, one answer a partition, nothing queued and nothing repeated.

aiokafka's producer repeats by itself until its own time is over, cannot say whether a message ever reached a socket, and with idempotence
never gives up. Here a request is written once: what was not written is known not to be stored, what has no answer is unknown, and no
batch outlives its call to be stored after its outcome was told.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from aiokafka import TopicPartition
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from msgbus.contract.adapter import SendOutcome
from msgbus.contract.envelope import HEADROOM, Envelope
from msgbus.errors import BrokerError, BrokerUnavailable, MessageTooLarge, MsgbusError, PublishRejected, PublishUnknown
from msgbus_kafka.cluster import Cluster, places_of
from msgbus_kafka.errors import produced
from msgbus_kafka.names import SOON, destination, is_dead
from msgbus_kafka.records import Headers, dead_headers, dead_key, headers_of, key_of, partition_of

MAX_DELAY = 120.0
"""Seconds. A log of mixed delays is read far ahead of what is due: so far that none is late by more."""
BATCH = 512 * 1024
"""Bytes of one batch; what is larger alone goes alone."""
RUN = 16
"""Messages without a key that go to one partition together, when a call has many."""
TOO_LARGE = 10


Outgoing = tuple[int, str, bytes | None, bytes | None, Headers]
"""A record to be produced: the number of its outcome, its message's id, key, value, headers. A plain tuple: one is made a message."""


class Sender:
    """Sends for one open adapter. `body`: bytes that a message may have."""

    def __init__(self, cluster: Cluster, body: int) -> None:
        self._cluster = cluster
        self._body = body
        self._turn = 0
        self._leaders: dict[str, list[int]] = {}
        """Of each topic that was looked up, the node that leads each partition."""
        self._places: dict[str, list[TopicPartition]] = {}

    async def send(self, envelopes: Sequence[Envelope], timeout: float) -> list[SendOutcome]:
        """As `Adapter.send`."""
        deadline = asyncio.get_running_loop().time() + timeout
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        names = [destination(envelope) for envelope in envelopes]
        if not self._leaders.keys() >= set(names):
            problem = await self._look_up(dict(zip(names, envelopes, strict=True)), deadline)
            if problem is not None:
                return [problem for _ in envelopes]
        now = time.time()
        self._turn += 1
        together = RUN if len(envelopes) >= 2 * RUN else 1
        queues: dict[TopicPartition, list[Outgoing]] = defaultdict(list)
        for number, (envelope, name) in enumerate(zip(envelopes, names, strict=True)):
            dead = is_dead(envelope.topic)
            room = self._body + (HEADROOM if dead or envelope.group is not None else 0)
            places = self._places.get(name)
            if places is None or len(envelope.body) > room or envelope.delay > MAX_DELAY:
                outcomes[number] = _refusal(envelope, name, places is not None, room)
                continue
            if envelope.key is not None:
                place = places[partition_of(envelope.key, len(places))]
            else:
                place = places[(self._turn + number // together) % len(places)]
            key, headers = (dead_key(envelope), dead_headers(envelope, now)) if dead else (key_of(envelope), headers_of(envelope, now))
            queues[place].append((number, envelope.id, key, envelope.body, headers))
        await self._produce(queues, outcomes, deadline)
        return outcomes

    async def bury(self, topic: str, keys: Sequence[bytes], timeout: float) -> list[bytes]:
        """Writes tombstones of dead letters; returns the keys that it could not write them for."""
        outcomes: list[SendOutcome] = [None] * len(keys)
        deadline = asyncio.get_running_loop().time() + timeout
        queue: list[Outgoing] = [(number, "", key, None, []) for number, key in enumerate(keys)]
        try:
            self._led(await self._cluster.leaders([topic]))
        except MsgbusError:
            return [*keys]
        await self._produce({TopicPartition(topic, 0): queue}, outcomes, deadline)
        return [key for key, outcome in zip(keys, outcomes, strict=True) if outcome is not None]

    def forget(self, name: str) -> None:
        """The topic may be gone, or led by another broker."""
        self._leaders.pop(name, None)
        self._places.pop(name, None)

    def _led(self, found: Mapping[str, list[int]]) -> None:
        self._leaders.update(found)
        self._places.update({name: places_of({name: range(len(nodes))}) for name, nodes in found.items()})

    async def _look_up(self, wanted: dict[str, Envelope], deadline: float) -> SendOutcome:
        """Who leads these topics, and whether the groups that are sent to exist: their topics may outlive them for a moment."""
        try:
            async with asyncio.timeout_at(deadline):
                found = await self._cluster.leaders(wanted)
                for name, envelope in wanted.items():
                    if envelope.group is not None and name in found and not await self._cluster.committed(name.removesuffix(SOON)):
                        del found[name]
        except TimeoutError:
            self._cluster.drop()
            return BrokerUnavailable("Kafka did not say in time who leads")
        except MsgbusError as error:
            return error if isinstance(error, BrokerError) else PublishRejected(str(error))
        self._led(found)
        return None

    async def _produce(self, queues: dict[TopicPartition, list[Outgoing]], outcomes: list[SendOutcome], deadline: float) -> None:
        """In rounds, of which there is one where everything fits into a batch a partition."""
        alone: set[TopicPartition] = set()
        while queues:
            counts: dict[TopicPartition, int] = {}
            by_node: dict[int, dict[TopicPartition, bytes]] = defaultdict(dict)
            for place, queue in queues.items():
                leaders = self._leaders.get(place.topic) or [-1] * (place.partition + 1)
                counts[place], by_node[leaders[place.partition]][place] = _batch(queue[:1] if place in alone else queue)
            answers = [self._cluster.produce(node, batches, deadline) for node, batches in by_node.items()]
            results = await asyncio.gather(*answers) if len(answers) > 1 else [await answers[0]]
            for place, answer in [found for result in results for found in result.items()]:
                queue, count = queues[place], counts[place]
                if answer == TOO_LARGE and count > 1:  # the topic takes less than a batch: nothing of it is stored
                    alone.add(place)
                    continue
                if answer:
                    if isinstance(answer, int | BrokerUnavailable):  # another may lead it now
                        self.forget(place.topic)
                    for number, message_id, *_ in queue[:count]:
                        outcomes[number] = _problem(answer, message_id, place.topic)
                    if not isinstance(outcomes[queue[0][0]], MessageTooLarge | PublishRejected):  # what comes behind must not overtake it
                        for number, message_id, *_ in queue[count:]:
                            outcomes[number] = BrokerUnavailable(f"message {message_id!r}: one before it was not confirmed")
                        count = len(queue)
                del queue[:count]
                if not queue:
                    del queues[place]


def _refusal(envelope: Envelope, name: str, known: bool, room: int) -> SendOutcome:
    """Why it is not sent."""
    if not known:
        return PublishRejected(f"message {envelope.id!r}: there is no Kafka topic {name!r}; declare it first")
    if len(envelope.body) > room:
        return MessageTooLarge(f"message {envelope.id!r}: a body of {len(envelope.body)} bytes; Kafka takes {room} here")
    return PublishRejected(f"message {envelope.id!r}: a delay of {envelope.delay:g} s; at most {MAX_DELAY:g} s")


def _problem(answer: int | Exception, message_id: str, topic: str) -> SendOutcome:
    if isinstance(answer, int):
        return produced(answer, message_id, topic)
    if isinstance(answer, BrokerUnavailable):
        return answer
    said = "no answer in time" if isinstance(answer, TimeoutError) else f"{type(answer).__name__}: {answer}"
    return PublishUnknown(message_id, said)


def _batch(records: Sequence[Outgoing]) -> tuple[int, bytes]:
    """How many of the records fit into one batch, and the batch."""
    now = int(time.time() * 1000)
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=0, batch_size=BATCH
    )
    count = 0
    for _, _, key, value, headers in records:
        if builder.append(count, now, key, value, headers) is None:
            break
        count += 1
    return count, builder.build()
