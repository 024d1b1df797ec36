"""Dead letters: a compacted topic of one partition, a key a death; a tombstone means settled. Read without a group, by anyone at once.

A contiguous head could not settle one by one in any order. So whoever reads first goes through the log once, noting which letters live, and
then hands those out; tombstones that others write meanwhile are heeded as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from msgbus.contract.adapter import Received, Receiver, ReceiverSpec, Tenure
from msgbus.contract.envelope import Envelope
from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_kafka.cluster import BEGINNING, END, Cluster
from msgbus_kafka.errors import CLIENT_ERRORS, translate
from msgbus_kafka.receiver import FETCH_WAIT, STOP_DEADLINE, abort_consumer
from msgbus_kafka.records import Record, read

SETTLE_EVERY = 0.05
"""Seconds that an ack may wait for others to be written with it."""
SCAN_DEADLINE = 60.0
_BATCH = 500

Bury = Callable[[str, Sequence[bytes]], Awaitable[list[bytes]]]
"""Writes tombstones for keys of a dead topic; returns the keys that it could not write them for."""


class Log:
    """A consumer of one topic without a group, and the letters of it that live. `async with` it."""

    def __init__(self, topic: str, cluster: Cluster, options: Mapping[str, Any]) -> None:
        self.topic = topic
        self.live: dict[bytes, int] = {}
        """Key → offset of every letter that is not settled, oldest first."""
        self._cluster = cluster
        self._place = TopicPartition(topic, 0)
        self._end = 0
        self._consumer = AIOKafkaConsumer(
            **options,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT,
            max_partition_fetch_bytes=4 * cluster.max_bytes,
        )

    async def open(self) -> None:
        """Connects and notes what lives; afterwards it reads from the beginning."""
        offsets = await self._cluster.offsets({self._place: BEGINNING})
        self._end = (await self._cluster.offsets({self._place: END}))[self._place]
        try:
            async with asyncio.timeout(SCAN_DEADLINE):
                await self._consumer.start()
                self._consumer.assign([self._place])
                self._consumer.seek(self._place, offsets[self._place])
                while await self._consumer.position(self._place) < self._end:
                    for record in await self._fetch(_BATCH, 1.0):
                        self._note(record)
                self._consumer.seek(self._place, offsets[self._place])
        except CLIENT_ERRORS as error:
            self.abort()
            raise translate(error, f"reading dead letters of {self.topic!r}") from error
        except BaseException:
            self.abort()
            raise

    async def _fetch(self, records: int, timeout: float) -> list[Record]:
        found = await self._consumer.getmany(self._place, timeout_ms=int(timeout * 1000), max_records=records)
        return [record for batch in found.values() for record in batch]

    def _note(self, record: Record) -> bool:
        """Whether a record is a letter; keeps count of those that live."""
        key = record.key or b""
        self.live.pop(key, None)
        if record.value is None:
            return False
        self.live[key] = record.offset
        return True

    async def letters(self, records: int, timeout: float) -> list[Record]:
        """The next letters that live, none where there are none within the time."""
        try:
            fetched = await self._fetch(records, timeout)
        except CLIENT_ERRORS as error:
            raise translate(error, f"reading dead letters of {self.topic!r}") from error
        found: list[Record] = []
        for record in fetched:
            if record.offset < self._end:
                if record.value is not None and self.live.get(record.key or b"") == record.offset:
                    found.append(record)
            elif self._note(record):
                found.append(record)
        return found

    async def read_all(self) -> AsyncGenerator[Record, None]:
        """Every letter that lived when it was opened, oldest first."""
        left = set(self.live.values())
        while left:
            for record in await self.letters(_BATCH, 1.0):
                if record.offset in left:
                    left.discard(record.offset)
                    yield record
            left &= set(self.live.values())

    async def close(self) -> None:
        """Bounded in time."""
        with contextlib.suppress(*CLIENT_ERRORS):
            async with asyncio.timeout(STOP_DEADLINE):
                await self._consumer.stop()
        self.abort()

    def abort(self) -> None:
        """At once."""
        abort_consumer(self._consumer)


class DeadReceiver(Receiver):
    """Hands out what lives of a group's dead letters. Several at once hand out the same ones."""

    def __init__(self, spec: ReceiverSpec, log: Log, bury: Bury, on_close: Callable[[DeadReceiver], None]) -> None:
        self.stale_acks = 0
        self._spec = spec
        self._log = log
        self._bury = bury
        self._on_close = on_close
        self._tenure = Tenure()
        self._ready: deque[Received] = deque()
        self._held: dict[bytes, Received] = {}
        self._settled: list[bytes] = []
        self._stopped = False
        self._closed = False
        self._changed = asyncio.Event()
        self._dirty = asyncio.Event()
        self._failure: MsgbusError | None = None
        self._settling = asyncio.get_running_loop().create_task(self._settle(), name=f"msgbus kafka dead {spec.topic}")

    def __repr__(self) -> str:
        return f"<DeadReceiver topic={self._spec.topic!r} held={len(self._held)} {'closed' if self._closed else 'open'}>"

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        """As the contract says."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            if self._failure is not None:
                raise self._failure
            if self._stopped:
                return []
            self._changed.clear()
            room = min(limit, self._spec.window - len(self._held))
            taken: list[Received] = []
            while room > len(taken) and self._ready:
                taken.append(self._ready.popleft())
            if taken:
                self._held.update((received.token, received) for received in taken)
                return taken
            left = deadline - loop.time()
            if left <= 0:
                return []
            if room > 0:
                await self._read(room, min(left, 0.1))
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait()

    async def _read(self, room: int, timeout: float) -> None:
        for record in await self._log.letters(room, timeout):
            envelope, _ = read(record, self._spec.topic, None, None)
            self._ready.append(Received(envelope, record.key or b"", self._tenure, 0, record))

    def ack(self, received: Received) -> None:
        """A tombstone, written with others within a twentieth of a second."""
        if self._held.pop(received.token, None) is None:
            self.stale_acks += self._closed
            return
        self._settled.append(received.token)
        self._dirty.set()
        self._changed.set()

    async def release(self, received: Received) -> None:
        """Back to this receiver's own queue; another one has it anyway."""
        if self._held.pop(received.token, None) is not None:
            self._ready.appendleft(received)
            self._changed.set()

    async def _settle(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(SETTLE_EVERY)
            self._dirty.clear()
            await self._write()

    async def _write(self) -> None:
        keys, self._settled = self._settled, []
        try:
            left = await self._bury(self._log.topic, keys)
        except BaseException:
            self._settled = keys + self._settled
            raise
        if left:
            self._settled = left + self._settled
            self._dirty.set()

    async def drain(self) -> None:
        """Hands out nothing more."""
        self._stopped = True
        self._changed.set()

    async def close(self) -> None:
        """Writes the tombstones that are due, once."""
        if self._closed:
            return
        self._closed = self._stopped = True
        self._on_close(self)
        self._changed.set()
        self._tenure.lost = True
        self._settling.cancel()
        await asyncio.wait({self._settling})
        try:
            if self._settled:
                await self._write()
        finally:
            self._held.clear()
            await self._log.close()

    def abandon(self) -> None:
        """What the death of the process would do."""
        self._failure = BrokerUnavailable("the Kafka adapter was abandoned")
        self._tenure.lost = True
        self._stopped = True
        if not self._closed:
            self._closed = True
            self._on_close(self)
        self._settling.cancel()
        self._log.abort()
        self._changed.set()


async def envelopes(log: Log) -> AsyncIterator[Envelope]:
    """What lives, oldest first."""
    async for record in log.read_all():
        yield read(record, log.topic, None, None)[0]
