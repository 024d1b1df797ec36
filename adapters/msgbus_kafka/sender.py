"""Producing: one request a broker and call, `acks=all`, one answer a partition, nothing queued and nothing repeated.

aiokafka's producer repeats by itself until its own time is over, cannot say whether a message ever reached a socket, and with idempotence
never gives up. Here a request is written once: what was not written is known not to be stored, what has no answer is unknown, and no
batch outlives its call to be stored after its outcome was told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from msgbus.contract.adapter import SendOutcome
from msgbus.errors import BrokerError, BrokerUnavailable, PublishUnknown
from msgbus_kafka.cluster import abort_client
from msgbus_kafka.errors import CLIENT_ERRORS, produced, translate
from msgbus_kafka.records import Headers

BATCH = 512 * 1024
"""Bytes of one batch; what is larger alone goes alone."""
TOO_LARGE = 10

Tell = Callable[[int, SendOutcome], None]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be produced. `number` names it in its outcome."""

    number: int
    message_id: str
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(frozen=True, slots=True)
class _Batch:
    topic: str
    partition: int
    members: Sequence[Outgoing]
    written: bytes


class Sender:
    """The connection for producing, made at the first call and again when it was given up."""

    def __init__(self, options: Mapping[str, Any], forget: Callable[[str], None]) -> None:
        self._options = options
        self._forget = forget
        self._client: AIOKafkaClient | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    async def send(self, outgoing: Mapping[tuple[int, str, int], Sequence[Outgoing]], deadline: float, tell: Tell) -> None:
        """Produces records by (leader, topic, partition), and tells the outcome of each that is not stored by `deadline` (loop time)."""
        now = int(time.time() * 1000)
        rest = {place: list(records) for place, records in outgoing.items()}
        while rest:  # one round, but for what does not fit into a batch: that follows, so that order holds
            by_node: dict[int, list[_Batch]] = {}
            for (node, topic, partition), records in list(rest.items()):
                count, written = _write(records, now)
                by_node.setdefault(node, []).append(_Batch(topic, partition, records[:count], written))
                del records[:count]
                if not records:
                    del rest[node, topic, partition]
            if len(by_node) == 1:
                ((node, batches),) = by_node.items()
                await self._produce(node, batches, deadline, tell)
            else:
                await asyncio.gather(*(self._produce(node, batches, deadline, tell) for node, batches in by_node.items()))

    async def _produce(self, node: int, batches: Sequence[_Batch], deadline: float, tell: Tell) -> None:
        loop = asyncio.get_running_loop()
        client: AIOKafkaClient | None = None
        try:
            async with asyncio.timeout_at(deadline):
                client = await self._connected()
                if not await client.ready(node):
                    raise ConnectionError(f"no connection to Kafka node {node}")
        except CLIENT_ERRORS as error:
            if isinstance(error, TimeoutError) and client is not None:
                self._give_up(client)
            problem = translate(error, "connecting to produce")
            for record in _members(batches):
                tell(record.number, problem if isinstance(problem, BrokerError) else BrokerUnavailable(str(problem)))
            return
        topics: dict[str, list[tuple[int, bytes]]] = {}
        for batch in batches:
            topics.setdefault(batch.topic, []).append((batch.partition, batch.written))
        patience = max(1, int((deadline - loop.time()) * 1000))
        try:
            async with asyncio.timeout_at(deadline):
                response = await client.send(node, ProduceRequest(None, -1, patience, list(topics.items())))
        except CLIENT_ERRORS as error:
            if isinstance(error, TimeoutError):  # a link that is dead may never say so
                self._give_up(client)
            said = "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
            for record in _members(batches):
                tell(record.number, PublishUnknown(record.message_id, said))
            return
        codes = {(topic, partition): code for topic, partitions in response.topics for partition, code, *_ in partitions}
        for batch in batches:
            code = codes.get((batch.topic, batch.partition), -1)
            if code == TOO_LARGE and len(batch.members) > 1:  # the topic takes less than a batch: nothing of it is stored
                for record in batch.members:
                    alone = _Batch(batch.topic, batch.partition, [record], _write([record], int(time.time() * 1000))[1])
                    await self._produce(node, [alone], deadline, tell)
            elif code:
                self._forget(batch.topic)
                for record in batch.members:
                    tell(record.number, produced(code, record.message_id, batch.topic))

    async def _connected(self) -> AIOKafkaClient:
        async with self._connecting:
            if self._closed:
                raise ConnectionError("the Kafka adapter is closed")
            if self._client is None:
                client = AIOKafkaClient(**self._options)
                try:
                    await client.bootstrap()
                except BaseException:
                    abort_client(client)
                    raise
                self._client = client
            return self._client

    def _give_up(self, client: AIOKafkaClient) -> None:
        if self._client is client:
            self._client = None
        abort_client(client)

    async def close(self, seconds: float) -> None:
        """Bounded in time; what has no answer yet is unknown."""
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            try:
                async with asyncio.timeout(seconds):
                    await client.close()
            except CLIENT_ERRORS:
                abort_client(client)

    def abort(self) -> None:
        """As the death of the process would."""
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            abort_client(client)


def _members(batches: Sequence[_Batch]) -> list[Outgoing]:
    return [record for batch in batches for record in batch.members]


def _write(records: Sequence[Outgoing], now: int) -> tuple[int, bytes]:
    """How many records fit into the batch, and the batch."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=0, batch_size=BATCH
    )
    count = 0
    for record in records:
        if builder.append(count, now, record.key, record.value, record.headers) is None:
            break
        count += 1
    return count, builder.build()
