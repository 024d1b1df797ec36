"""A receiver: aiokafka's consumer read on demand, and what it read handed out and settled a partition.

No task polls: aiokafka fetches ahead by itself. Nor is a partition ever paused: one that has its `ack_window` un-settled is left out of
what is asked for, so there is nothing for a rebalance to forget.

What is here is all that a private receiver needs. A group's (`membership`) and that of dead letters (`dead`) get their partitions, and
settle, in ways of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from msgbus.contract.adapter import AdapterSettings, Received, Receiver, ReceiverSpec
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_kafka.cluster import BEGINNING, END, Cluster, abort, bootstrap_whole, closed, places_of
from msgbus_kafka.errors import CLIENT_ERRORS, translate
from msgbus_kafka.names import SOON, stream
from msgbus_kafka.partition import Partition
from msgbus_kafka.records import Record, read

log = logging.getLogger("msgbus.kafka")

SETTLE_EVERY = 0.05
"""Seconds that an ack may wait for others to travel with it."""
TEND_EVERY = 1.0
CALL_DEADLINE = 3.0
LAST_COMMIT_DEADLINE = 0.6
GOODBYE_DEADLINE = 0.3
STOP_DEADLINE = 0.6
FETCH_WAIT = 100
"""Milliseconds that a fetch waits at the broker; also how long a partition that was left out may wait to be fetched again."""


def consumer_of(cluster: Cluster, **more: Any) -> AIOKafkaConsumer:
    """A consumer that commits nothing by itself. `more`: of aiokafka's many arguments, each with a type of its own."""
    more |= {"enable_auto_commit": False, "auto_offset_reset": "none", "fetch_max_wait_ms": FETCH_WAIT}
    consumer = AIOKafkaConsumer(**cluster.options, **more, max_partition_fetch_bytes=2 * cluster.max_bytes + 65536)
    bootstrap_whole(vars(consumer)["_client"])
    return consumer


async def stop(consumer: AIOKafkaConsumer) -> bool:
    """Ends a consumer in bounded time; False: it did not say goodbye."""
    try:
        return await closed(vars(consumer)["_client"], consumer.stop(), STOP_DEADLINE)
    finally:
        abandon(consumer)


def abandon(consumer: Any) -> None:
    """Ends a consumer at once, without a word to the brokers. Any: parts of it are meant that have no public name."""
    consumer._closed = True  # noqa: SLF001  or its __del__ complains
    abort(*(getattr(consumer, part, None) for part in ("_coordinator", "_fetcher", "_client")))


class KafkaReceiver(Receiver):
    """A private one, of what is sent from now on. Made, then opened, by `KafkaAdapter.open_receiver`; among `peers` until it is closed."""

    def __init__(self, spec: ReceiverSpec, cluster: Cluster, settings: AdapterSettings, peers: set[KafkaReceiver], **consumer: Any) -> None:
        self.stale_acks = 0
        self._spec = spec
        self._cluster = cluster
        self._settings = settings
        self._consumer = consumer_of(cluster, **consumer)
        self._peers = peers
        self._loop = asyncio.get_running_loop()
        self._stream = stream(spec.topic, spec.priority)
        self._window = 1 if spec.quarantine else max(spec.window, 1)
        self._ack_window = max(settings.ack_window, self._window)
        self._partitions: dict[TopicPartition, Partition] = {}
        self._had_a_turn: set[TopicPartition] = set()  # since all had one
        self._interrupted = False  # by tenures that changed: the core looks at them when `receive` returns
        self._crowded = False  # there is no room in the window
        self._suspended = False  # nothing is handed out, for partitions come and go
        self._stopped = False  # it drains, or is closed
        self._closed = False
        self._drained = False  # it drained before it was closed: what was in hand then went back
        self._failure: MsgbusError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._dirty = asyncio.Event()
        self._tending: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what the kinds do in their own ways

    async def _begin(self) -> None:
        """Gets partitions; the consumer is started."""
        await self._assign(END, self._stream, self._stream + SOON)

    async def _settle(self) -> None:
        """Settles what was acked. Comes soon after that, and now and then. Here nothing is ever settled."""

    async def _end(self) -> None:
        """Settles the last acks and stops the consumer."""
        await stop(self._consumer)

    async def _prepare(self) -> None:
        """Comes before each look for messages."""

    async def _may_go(self, taken: Sequence[Received]) -> bool:
        """Whether what was taken may be handed out now. Else, and where it raises, it is given back."""
        return True

    def _read(self, partition: Partition, record: Record) -> tuple[Envelope, float] | None:
        """The envelope of a record, and when it is due; None: it is nothing to us."""
        return read(record, self._spec.topic, self._spec.group if partition.own else None, self._spec.priority)

    # ------------------------------------------------------------ opening

    async def open(self) -> None:
        """Connects; a group is joined in the background. Closes what it opened where it fails."""
        self._peers.add(self)
        try:
            async with asyncio.timeout(CALL_DEADLINE + self._settings.session_timeout):
                await self._consumer.start()
                await self._begin()
        except BaseException as error:
            self.abandon()
            if isinstance(error, CLIENT_ERRORS):
                raise translate(error, f"opening a receiver of {self._spec.topic!r}") from error
            raise
        self._tending = self._loop.create_task(self._tend(), name=f"msgbus kafka settles {self._spec.topic} {self._spec.group}")

    async def _tend(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TEND_EVERY):
                    await self._dirty.wait()
            await asyncio.sleep(SETTLE_EVERY)
            self._dirty.clear()
            await self._settle()

    async def _assign(self, moment: int, *topics: str) -> None:
        led = await self._cluster.leaders(topics)
        if topics[0] not in led:
            raise BrokerUnavailable(f"there is no Kafka topic {topics[0]!r}: declare it first")
        places = places_of({topic: range(len(leaders)) for topic, leaders in led.items()})
        offsets = await self._cluster.offsets(dict.fromkeys(places, moment))
        self._consumer.assign(places)
        for place, offset in offsets.items():
            self._consumer.seek(place, offset)
            self._partitions[place] = Partition(place, offset)

    # ------------------------------------------------------------ receiving

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """As the contract says. An empty list comes early where partitions are about to be taken from us: the core looks at its tenures."""
        deadline = self._loop.time() + timeout
        while True:
            if self._failure is not None:
                await self.close()
                raise self._failure
            if self._stopped or self._interrupted:
                self._interrupted = False
                return []
            await self._prepare()
            room = min(limit, self._window - self._held())
            self._crowded = room <= 0
            if room > 0 and not self._suspended:
                await self._fetch(room)
                if (taken := self._take(room)) and await self._may_go(taken):
                    return taken
            left = deadline - self._loop.time()
            if left <= 0:
                return []
            if self._failure is None:
                await self._wait(left)

    def _held(self) -> int:
        return sum(len(partition.held) for partition in self._partitions.values())

    async def _fetch(self, room: int) -> None:
        """Reads what the consumer has fetched, where less is ready than there is room. Never waits, so cancelling it loses nothing."""
        now, wanted, places = time.time(), room, list[TopicPartition]()
        for place, partition in self._partitions.items():
            while partition.later and partition.later[0][0] <= now:
                partition.ready.append(heappop(partition.later)[2])
            if not partition.tenure.draining:
                wanted -= len(partition.ready)
                if partition.position - partition.head() < self._ack_window:
                    places.append(place)
        try:
            if wanted > 0 and places:
                await self._read_in_turn(places, wanted, now)
        except OffsetOutOfRangeError as error:
            await self._go_on(error.args[0])
        except CLIENT_ERRORS as error:
            self._fail(translate(error, f"receiving from {self._spec.topic!r}"))

    async def _go_on(self, lost: Mapping[TopicPartition, int]) -> None:
        """Where the log begins now: Kafka has deleted what is old, whoever has not read it; or it is another log, and all of it is new."""
        for place, start in (await self._cluster.offsets(dict.fromkeys(lost, BEGINNING))).items():
            position, partition = lost[place], self._partitions.get(place)
            if partition is None or self._suspended:  # a rebalance came between; whoever has it now is told again
                continue
            what = f"{start - position} messages of" if start > position else "what there was of"
            log.error("data loss suspected: %s %s are gone that %r had not read", what, place, self._spec.group or "a broadcast")
            if start >= position:
                partition.position = start
            else:
                self._lose([partition])
                self._partitions[place] = Partition(place, start, partition.own, replayed=partition.replayed, upto=start)
            self._consumer.seek(place, start)
            self._dirty.set()
        self._interrupted = True  # what came meanwhile, from others too, woke nobody

    async def _read_in_turn(self, places: Sequence[TopicPartition], wanted: int, now: float) -> None:
        """A share of each partition, then of the next: aiokafka by itself empties one, thousands of records, before it looks at another,
        and only that one's keys would be at work."""
        share = max(1, wanted // len(places))
        while wanted > 0:
            asked = [place for place in places if place not in self._had_a_turn]
            found = await self._consumer.getmany(*asked, timeout_ms=0, max_records=min(share, wanted)) if asked else {}
            for place, records in found.items():
                self._keep(self._partitions[place], records, now)
                self._had_a_turn.add(place)
                wanted -= len(records)
            if not found:
                if not self._had_a_turn:
                    return
                if len(self._had_a_turn) == 1:  # nobody else has any
                    share = wanted
                self._had_a_turn.clear()

    def _keep(self, partition: Partition, records: Sequence[Record], now: float) -> None:
        tenure, suspects, unsettled, ready = partition.tenure, partition.suspects, partition.unsettled, partition.ready
        for record in records:
            offset = record.offset
            if offset < partition.position:
                continue
            partition.position = offset + 1
            if partition.settled and partition.passes(offset):
                continue
            found = self._read(partition, record)
            if found is None:
                continue
            envelope, due_at = found
            received = Received(envelope, (partition, offset), tenure, partition.deaths(offset) if suspects else 0, record)
            unsettled[offset] = received
            if due_at > now:
                heappush(partition.later, (due_at, offset, received))
            else:
                ready.append(received)
        self._dirty.set()

    def _take(self, room: int) -> list[Received]:
        """As they came, as far as the time stamps of what is first in each partition say it."""
        taken: list[Received] = []
        waiting = [partition for partition in self._partitions.values() if partition.ready and not partition.tenure.draining]
        if len(waiting) > 1:
            waiting.sort(key=lambda partition: partition.ready[0].native.timestamp)  # type: ignore[attr-defined]  # a record
        for partition in waiting:
            ready, held = partition.ready, partition.held
            while ready and len(taken) < room:
                received = ready.popleft()
                offset: int = received.token[1]
                if offset not in partition.unsettled:
                    continue
                held.add(offset)
                if offset >= partition.upto:
                    partition.upto = offset + 1
                taken.append(received)
        return taken

    async def _wait(self, timeout: float) -> None:
        """Until anything happens: a fetch that came in, room, something that is due."""
        if self._interrupted:
            return
        due = min((partition.later[0][0] for partition in self._partitions.values() if partition.later), default=float("inf"))
        self._waiter = waiter = vars(self._consumer)["_fetcher"]._create_fetch_waiter()  # noqa: SLF001  of what is private, the least
        try:
            await asyncio.wait({waiter}, timeout=min(timeout, max(0.0, due - time.time()) + 0.001))
            if waiter.done() and waiter.exception() is not None:
                self._fail(translate(waiter.exception(), f"receiving from {self._spec.topic!r}"))
        finally:
            self._waiter = None
            waiter.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: MsgbusError) -> None:
        self._failure = self._failure or error
        self._wake()

    # ------------------------------------------------------------ settling

    def ack(self, received: Received) -> None:
        """Settled with others within a twentieth of a second."""
        partition, offset = received.token
        if partition.unsettled.pop(offset, None) is None:
            return
        if partition.tenure.lost:
            self.stale_acks += 1
            return
        self._let_go(partition, offset)
        self._dirty.set()

    async def release(self, received: Received) -> None:
        """Back to this receiver's own queue: nobody else may read the partition. Nothing waits."""
        partition, offset = received.token
        if offset in partition.held and not partition.tenure.lost:
            if not self._stopped:
                ready = partition.ready
                ready.appendleft(received)
                if len(ready) > 1 and ready[1].token[1] < offset:
                    partition.ready = deque(sorted(ready, key=lambda one: one.token[1]))
            self._let_go(partition, offset)
            self._wake()

    def _let_go(self, partition: Partition, offset: int) -> None:
        partition.held.discard(offset)
        if self._crowded:
            self._wake()

    def _lose(self, partitions: Iterable[Partition]) -> None:
        for partition in list(partitions):
            partition.tenure.lost = True
            self._partitions.pop(partition.place, None)
            self._interrupted = True
        self._wake()

    # ------------------------------------------------------------ the end

    async def drain(self) -> None:
        """Hands out nothing more. The partitions stay ours until `close`: what runs can still be settled."""
        self._stopped = True
        self._wake()

    async def close(self) -> None:
        """Settles what was acked; a group is left, so that a peer has the partitions at once."""
        if self._closed:
            return
        self._drained = self._stopped
        self._closed = self._stopped = True
        self._peers.discard(self)
        try:
            if self._tending is not None:
                self._tending.cancel()
                await asyncio.wait({self._tending})
            await self._end()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """What the death of the process would do: the sockets close, nothing is settled, nobody leaves."""
        if not self._closed:
            self._fail(BrokerUnavailable("the Kafka adapter was abandoned"))
            self._closed = self._stopped = True
            self._peers.discard(self)
        if self._tending is not None:
            self._tending.cancel()
        self._lose(self._partitions.values())
        abandon(self._consumer)
