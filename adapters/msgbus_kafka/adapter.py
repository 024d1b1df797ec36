"""The adapter: URL and settings, opening and closing, sending, and who does the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from msgbus.contract.adapter import (
    Adapter,
    AdapterSettings,
    Capability,
    Depth,
    Limits,
    Receiver,
    ReceiverSpec,
    SendOutcome,
    TopicSpec,
)
from msgbus.contract.address import DEAD_GROUP
from msgbus.contract.envelope import HEADROOM, Envelope
from msgbus.errors import (
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    MessageTooLarge,
    MsgbusError,
    NotFound,
    PublishRejected,
    UnsupportedFeature,
)
from msgbus_kafka.cluster import Cluster
from msgbus_kafka.dead import DeadReceiver, Log, envelopes
from msgbus_kafka.names import SOON, group_id, is_dead, stream
from msgbus_kafka.operations import Operations
from msgbus_kafka.receiver import KafkaReceiver
from msgbus_kafka.records import dead_headers, dead_key, headers_of, key_of, partition_of
from msgbus_kafka.sender import Outgoing, Sender
from msgbus_kafka.topology import Topology
from msgbus_kafka.url import Place, read_url

MAX_DELAY = 120.0
"""Seconds. A log of mixed delays is read far ahead of what is due: so far that none is late by more."""
RUN = 16
"""Messages without a key that go to one partition together, when a call has many."""
CLOSE = 1.0
_HEADERS = 48 * 1024
"""Bytes of a record beside its body that the topic's limit has room for."""


class KafkaAdapter(Adapter):
    """Apache Kafka. Also `HasDepth`, `Peekable`, `Purgeable`, `Replayable`, `HasGroups`."""

    schemes: ClassVar[tuple[str, ...]] = ("kafka", "kafkas")
    name: ClassVar[str] = "kafka"

    def __init__(self, place: Place, settings: AdapterSettings | None = None) -> None:
        self._place = place
        self._settings = settings or AdapterSettings()
        self._options: dict[str, Any] = {}
        self._cluster: Cluster | None = None
        self._sender: Sender | None = None
        self._receivers: set[KafkaReceiver | DeadReceiver] = set()
        self._leaders: dict[str, list[int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = 0
        self._body = 1048588 - _HEADERS

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """`kafka://[user:password@]host:9092[,host:9092…]`; `kafkas://` with TLS. Options: see the package's README."""
        place, settings = read_url(url, options, settings)
        return cls(place, settings)

    def __repr__(self) -> str:
        return f"<KafkaAdapter {self._place.shown} {'closed' if self._cluster is None else 'open'}>"

    @property
    def capabilities(self) -> Capability:
        """All of them."""
        return ~Capability.NONE

    @property
    def limits(self) -> Limits:
        """A body as large as the brokers' `message.max.bytes` leaves room for; two minutes of delay; any time un-settled."""
        return Limits(body=self._body, delay=MAX_DELAY)

    # ------------------------------------------------------------ opening and closing

    async def open(self) -> None:
        """Connects. An open adapter stays as it is; one whose event loop was closed under it is as after a crash."""
        loop = asyncio.get_running_loop()
        if self._cluster is not None:
            if self._loop is loop:
                return
            self._receivers.clear()  # their sockets and tasks ended with the loop
        self._loop = loop
        self._options = self._place.client_options()
        cluster = Cluster(self._options)
        try:
            await cluster.open(self._place.shown)
            self._check_durability(cluster)
        except BaseException:
            cluster.abort()
            raise
        self._body = cluster.max_bytes - _HEADERS
        self._leaders = {}
        self._sender = Sender(self._options, self._forget)
        self._cluster = cluster

    def _check_durability(self, cluster: Cluster) -> None:
        if self._settings.durability == "replicated" and cluster.nodes < 2:
            raise UnsupportedFeature("durability 'replicated'", "a Kafka cluster of one broker", "a cluster of three brokers")
        if self._settings.require_durable and self._settings.durability == "broker" and cluster.default_replication < 2:
            raise ConfigurationError(
                f"require_durable: {self._place.shown} keeps one copy of new topics (default.replication.factor 1) and does not flush: "
                "set durability=replicated, or default.replication.factor on the brokers"
            )

    async def close(self) -> None:
        """Closes every receiver, then the connections."""
        cluster, self._cluster = self._cluster, None
        sender, self._sender = self._sender, None
        try:
            await asyncio.gather(*(receiver.close() for receiver in list(self._receivers)), return_exceptions=True)
        finally:
            if sender is not None:
                await sender.close(CLOSE)
            if cluster is not None:
                await cluster.close(CLOSE)

    def abandon(self) -> None:
        """What the death of the process would do to its connections, for tests: they end without a word."""
        for receiver in list(self._receivers):
            receiver.abandon()
        if self._sender is not None:
            self._sender.abort()
        if self._cluster is not None:
            self._cluster.abort()
        self._cluster = self._sender = None

    async def ping(self) -> None:
        """A request for metadata."""
        await self._opened().ping()

    def _opened(self) -> Cluster:
        if self._cluster is None:
            raise BrokerUnavailable("the Kafka adapter is not open")
        return self._cluster

    # ------------------------------------------------------------ declaring

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """As the contract says. A topic brings its `.soon`, a group its own; a new topic has as many partitions as shards."""
        cluster = self._opened()
        await Topology(cluster, self._settings, self._place.replication).declare(topics, receivers, create)

    async def shards(self, topic: str) -> int | None:
        """The partitions of a topic that is there: Kafka does not know whether its records have keys."""
        found = await self._opened().leaders([topic])
        return len(found[topic]) if topic in found and not is_dead(topic) else None

    # ------------------------------------------------------------ sending

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """None: in all in-sync replicas. One produce request a broker that leads; what was not written to it is `BrokerUnavailable`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        sender = self._sender
        if sender is None:
            return [BrokerUnavailable("the Kafka adapter is not open") for _ in envelopes]
        outcomes: list[SendOutcome] = [None] * len(envelopes)
        names = [_destination(envelope) for envelope in envelopes]
        if not self._leaders.keys() >= set(names):
            problem = await self._look_up({*names} - self._leaders.keys(), envelopes, deadline)
            if problem is not None:
                return [problem for _ in envelopes]
        now = time.time()
        outgoing: dict[tuple[int, str, int], list[Outgoing]] = {}
        spread = _Spread(self._turn, len(envelopes))
        self._turn += 1
        for number, (envelope, name) in enumerate(zip(envelopes, names, strict=True)):
            leaders = self._leaders.get(name)
            if leaders is None:
                outcomes[number] = PublishRejected(f"message {envelope.id!r}: there is no Kafka topic {name!r}; declare it first")
                continue
            dead = is_dead(envelope.topic)
            room = self._body + (HEADROOM if dead or envelope.group is not None else 0)
            if len(envelope.body) > room:
                outcomes[number] = MessageTooLarge(
                    f"message {envelope.id!r}: a body of {len(envelope.body)} bytes; Kafka takes {room} here"
                )
                continue
            if envelope.delay > MAX_DELAY:
                outcomes[number] = PublishRejected(f"message {envelope.id!r}: a delay of {envelope.delay:g} s; at most {MAX_DELAY:g} s")
                continue
            if len(leaders) == 1:
                partition = 0
            elif envelope.key is not None:
                partition = partition_of(envelope.key, len(leaders))
            else:
                partition = spread.next() % len(leaders)
            leader = leaders[partition]
            if leader < 0:
                self._forget(name)
                outcomes[number] = BrokerUnavailable(f"message {envelope.id!r}: partition {partition} of {name!r} has no leader")
                continue
            key = dead_key(envelope) if dead else key_of(envelope)
            headers = dead_headers(envelope, now) if dead else headers_of(envelope, now)
            outgoing.setdefault((leader, name, partition), []).append(Outgoing(number, envelope.id, key, envelope.body, headers))
        if outgoing:
            await sender.send(outgoing, deadline, outcomes.__setitem__)
        return outcomes

    async def _look_up(self, names: set[str], envelopes: Sequence[Envelope], deadline: float) -> SendOutcome:
        """Who leads these topics, and whether the groups that are sent to exist. Their topics may outlive them for a moment."""
        try:
            async with asyncio.timeout_at(deadline):
                cluster = self._opened()
                found = await cluster.leaders(names)
                for envelope in envelopes:
                    name = _destination(envelope)
                    if envelope.group is not None and name in found and not await cluster.committed(name.removesuffix(SOON)):
                        del found[name]
        except TimeoutError:
            return BrokerUnavailable("Kafka did not say in time who leads")
        except MsgbusError as error:
            return error if isinstance(error, BrokerError) else PublishRejected(str(error))
        self._leaders.update(found)
        return None

    def _forget(self, name: str) -> None:
        self._leaders.pop(name, None)

    async def _bury(self, topic: str, keys: Sequence[bytes]) -> list[bytes]:
        """Tombstones of dead letters; the keys that have none yet."""
        try:
            led = await self._opened().leaders([topic])
            sender = self._sender
            if topic not in led or sender is None:
                return list(keys)
        except MsgbusError:
            return list(keys)
        left: list[bytes] = []

        def tell(number: int, outcome: SendOutcome) -> None:
            if outcome is not None:
                left.append(keys[number])

        tombstones = [Outgoing(number, "", key, None, []) for number, key in enumerate(keys)]
        await sender.send({(led[topic][0], topic, 0): tombstones}, asyncio.get_running_loop().time() + CLOSE, tell)
        return left

    # ------------------------------------------------------------ receiving

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """`BrokerUnavailable` too where topic or group were not declared, or the group was dropped. A group is joined in the background."""
        cluster = self._opened()
        if is_dead(spec.topic) and spec.group == DEAD_GROUP:
            log = await self._log(cluster, spec.topic)
            dead = DeadReceiver(spec, log, self._bury, self._receivers.discard)
            self._receivers.add(dead)
            return dead
        if spec.group is not None and not await cluster.committed(group_id(spec.topic, spec.group, spec.priority)):
            raise BrokerUnavailable(f"Kafka has no group {spec.group!r} of topic {spec.topic!r}: declare it first")
        receiver = KafkaReceiver(spec, cluster, self._settings, self._options, self._place.instance, self._receivers.discard)
        self._receivers.add(receiver)
        try:
            await receiver.open()
        except BaseException:
            self._receivers.discard(receiver)
            raise
        return receiver

    async def _log(self, cluster: Cluster, topic: str) -> Log:
        if topic not in await cluster.leaders([topic]):
            raise BrokerUnavailable(f"there is no Kafka topic {topic!r}: declare it first")
        log = Log(topic, cluster, self._options)
        await log.open()
        return log

    # ------------------------------------------------------------ operating

    async def explain(self) -> Mapping[str, str]:
        """Facts of this cluster."""
        cluster = self._opened()
        return {
            "broker": f"Kafka at {self._place.shown}, {cluster.nodes} brokers",
            "durability": f"acks=all; new topics have {cluster.default_replication} replicas, and no fsync before the confirm",
            "body": f"at most {self._body} bytes",
            "delay": f"at most {MAX_DELAY:g} s, by the clocks of the workers; a key's order is not kept over it",
            "retention": "without retain= a topic keeps what the broker's log.retention says, read or not",
            "groups": "a group that stays away longer than the broker's offsets.retention.minutes is forgotten",
        }

    async def depth(self, topic: str, group: str) -> Depth:
        """Approximate. `NotFound` where there is no such group."""
        cluster = self._opened()
        if not is_dead(topic):
            return await self._operations(cluster).depth(topic, group)
        log = await self._existing_log(cluster, topic)
        await log.close()
        return Depth(len(log.live), None, 0, approximate=True)

    async def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """Oldest first. `NotFound` where there is no such group."""
        cluster = self._opened()
        if not is_dead(topic):
            async for envelope in self._operations(cluster).peek(topic, group):
                yield envelope
            return
        log = await self._existing_log(cluster, topic)
        try:
            async for envelope in envelopes(log):
                yield envelope
        finally:
            await log.close()

    async def purge(self, topic: str, group: str) -> int:
        """Discards what waits in the topic; what is delayed or handed out stays. `NotFound` where there is no such group."""
        cluster = self._opened()
        if not is_dead(topic):
            return await self._operations(cluster).purge(topic, group)
        log = await self._existing_log(cluster, topic)
        await log.close()
        left = await self._bury(topic, list(log.live))
        if left:
            raise BrokerUnavailable(f"{len(left)} dead letters of {topic!r} could not be purged")
        return len(log.live)

    async def replay(self, topic: str, group: str, since: float) -> int:
        """By time stamps. `NotFound` where there is no such group."""
        return await self._operations(self._opened()).replay(topic, group, since)

    async def groups(self, topic: str) -> Sequence[str]:
        """Sorted. None where there is no such topic."""
        cluster = self._opened()
        if is_dead(topic):
            return [DEAD_GROUP] if topic in await cluster.leaders([topic]) else []
        return await self._operations(cluster).groups(topic)

    async def drop_group(self, topic: str, group: str) -> bool:
        """Its members learn of it at their next heartbeat."""
        for level in ("normal", "high", "low"):
            self._forget(stream(f"{topic}.{group}", level) + SOON)
        return await self._operations(self._opened()).drop(topic, group)

    def _operations(self, cluster: Cluster) -> Operations:
        return Operations(cluster, lambda: self._options)

    async def _existing_log(self, cluster: Cluster, topic: str) -> Log:
        if topic not in await cluster.leaders([topic]):
            raise NotFound(f"there is no Kafka topic {topic!r}")
        return await self._log(cluster, topic)


class _Spread:
    """Partitions for messages without a key: by turns, and where a call has many, several together, so that batches are full."""

    def __init__(self, turn: int, messages: int) -> None:
        self._turn = turn
        self._run = RUN if messages >= 2 * RUN else 1
        self._left = self._run

    def next(self) -> int:
        if not self._left:
            self._turn += 1
            self._left = self._run
        self._left -= 1
        return self._turn


def _destination(envelope: Envelope) -> str:
    """The Kafka topic of an envelope."""
    if envelope.group is not None:
        return group_id(envelope.topic, envelope.group, envelope.priority) + SOON
    if is_dead(envelope.topic):
        return envelope.topic
    base = stream(envelope.topic, envelope.priority)
    return base + SOON if envelope.delay > 0 else base
