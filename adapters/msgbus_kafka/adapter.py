"""The adapter: URL and settings, opening and closing, and who does the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import ClassVar, Self

from msgbus.contract.adapter import Adapter, AdapterSettings, Capability, Depth, Limits, Receiver, ReceiverSpec, SendOutcome, TopicSpec
from msgbus.contract.address import DEAD_GROUP
from msgbus.contract.envelope import Envelope
from msgbus.contract.logs import quieten
from msgbus.errors import BrokerUnavailable, ConfigurationError, UnsupportedFeature
from msgbus_kafka.cluster import Cluster
from msgbus_kafka.dead import DeadReceiver
from msgbus_kafka.membership import GroupReceiver
from msgbus_kafka.names import group_id, is_dead
from msgbus_kafka.operations import Operations
from msgbus_kafka.receiver import KafkaReceiver
from msgbus_kafka.sender import MAX_DELAY, Sender
from msgbus_kafka.topology import Topology
from msgbus_kafka.url import Place, read_url

_HEADERS = 48 * 1024
"""Bytes of a record beside its body that the topic's limit has room for."""


class KafkaAdapter(Adapter):
    """Apache Kafka. Also `HasDepth`, `Peekable`, `Purgeable`, `Replayable`, `HasGroups`, `HasWarnings`, `Exportable`."""

    schemes: ClassVar[tuple[str, ...]] = ("kafka", "kafkas")
    name: ClassVar[str] = "kafka"

    def __init__(self, place: Place, settings: AdapterSettings | None = None) -> None:
        self._place = place
        self._settings = settings or AdapterSettings()
        self._opened: Operations | None = None
        self._receivers: set[KafkaReceiver] = set()
        self._body = 1048588 - _HEADERS

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """`kafka://[user:password@]host:9092[,host:9092…]`; `kafkas://` with TLS. Options: see docs/brokers/kafka.md."""
        return cls(*read_url(url, options, settings))

    def __repr__(self) -> str:
        return f"<KafkaAdapter {self._place.shown} {'closed' if self._opened is None else 'open'}>"

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
        if self._opened is not None:
            if self._opened.loop is asyncio.get_running_loop():
                return
            self._receivers.clear()  # their sockets and tasks ended with the loop
        quieten("aiokafka")
        cluster = Cluster(self._place.client_options())
        try:
            await cluster.open(self._place.shown)
            least, most = cluster.sessions
            if not least <= self._settings.session_timeout <= most:
                raise ConfigurationError(
                    f"session_timeout of {self._settings.session_timeout:g} s at {self._place.shown}: "
                    f"the brokers allow {least:g} to {most:g} s (group.min.session.timeout.ms, group.max.session.timeout.ms)"
                )
            if self._settings.durability == "replicated" and len(cluster.nodes) < 2:
                raise UnsupportedFeature("durability 'replicated'", "a Kafka cluster of one broker", "a cluster of three brokers")
            if self._settings.require_durable and self._settings.durability == "broker" and cluster.default_replication < 2:
                raise ConfigurationError(
                    f"require_durable: {self._place.shown} keeps one copy of new topics (default.replication.factor 1) and does not flush: "
                    "set durability=replicated, or default.replication.factor on the brokers"
                )
        except BaseException:
            cluster.abort()
            raise
        self._body = cluster.max_bytes - _HEADERS
        self._opened = Operations(cluster, Sender(cluster, self._body))

    async def close(self) -> None:
        """Closes every receiver, then the connections."""
        opened = self._opened
        try:
            await asyncio.gather(*(receiver.close() for receiver in [*self._receivers]), return_exceptions=True)
        finally:
            self._opened = None
            if opened is not None:
                await opened.cluster.close()

    def abandon(self) -> None:
        """What the death of the process would do to its connections, for tests: they end without a word."""
        for receiver in [*self._receivers]:
            receiver.abandon()
        if self._opened is not None:
            self._opened.cluster.abort()
        self._opened = None

    def _open(self) -> Operations:
        if self._opened is None:
            raise BrokerUnavailable("the Kafka adapter is not open")
        return self._opened

    async def ping(self) -> None:
        """A request for metadata."""
        await self._open().cluster.ping()

    async def warnings(self, groups: Sequence[tuple[str, str]]) -> Sequence[str]:
        """Of groups that are about to lose messages, for Kafka deletes also what nobody has read."""
        return [warning for topic, group in groups for warning in await self._open().overdue(topic, group)]

    # ------------------------------------------------------------ declaring, sending, receiving

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """As the contract says. A topic brings its `.soon`, a group its own; a new topic has as many partitions as shards."""
        await self._topology(self._open().cluster).declare(topics, receivers, create)

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """A shell script for Kafka's own tools. Replicas and largest message are as the brokers say, once it is open."""
        cluster = self._opened.cluster if self._opened is not None else Cluster(self._place.client_options())
        return self._topology(cluster).export(topics, receivers)

    def _topology(self, cluster: Cluster) -> Topology:
        return Topology(cluster, self._settings, self._place.options.get("replication"))

    async def shards(self, topic: str) -> int | None:
        """The partitions of a topic that is there: Kafka does not know whether its records have keys."""
        found = await self._open().cluster.leaders([topic])
        return len(found[topic]) if topic in found and not is_dead(topic) else None

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """None: in all in-sync replicas. One produce request a broker that leads; what was not written to it is `BrokerUnavailable`."""
        if self._opened is None:
            return [BrokerUnavailable("the Kafka adapter is not open") for _ in envelopes]
        return await self._opened.sender.send(envelopes, timeout)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """`BrokerUnavailable` too where topic or group were not declared, or the group was dropped. A group is joined in the background."""
        opened = self._open()
        cluster, settings, peers = opened.cluster, self._settings, self._receivers
        receiver: KafkaReceiver
        if is_dead(spec.topic) and spec.group == DEAD_GROUP:
            receiver = DeadReceiver(spec, cluster, settings, peers, opened.sender)
        elif spec.group is None:
            receiver = KafkaReceiver(spec, cluster, settings, peers)
        elif await cluster.committed(group_id(spec.topic, spec.group, spec.priority)):
            receiver = GroupReceiver(spec, cluster, settings, peers, self._place.options.get("instance"))
        else:
            raise BrokerUnavailable(f"Kafka has no group {spec.group!r} of topic {spec.topic!r}: declare it first")
        await receiver.open()
        return receiver

    # ------------------------------------------------------------ operating

    async def explain(self) -> Mapping[str, str]:
        """Facts of this cluster."""
        cluster = self._open().cluster
        return {
            "broker": f"Kafka at {self._place.shown}, {len(cluster.nodes)} brokers",
            "durability": f"acks=all; new topics have {cluster.default_replication} replicas, and no fsync before the confirm",
            "body": f"at most {self._body} bytes",
            "delay": f"at most {MAX_DELAY:g} s, by the clocks of the workers; a key's order is not kept over it",
            "retention": "without retain= a topic keeps what the broker's log.retention says, read or not, also for a first group",
            "groups": "a group that stays away longer than the broker's offsets.retention.minutes is forgotten",
        }

    async def depth(self, topic: str, group: str) -> Depth:
        """Approximate; of dead letters, what this adapter has handed out is `in_flight`."""
        opened = self._open()
        if not is_dead(topic):
            return await opened.depth(topic, group)
        held = sum(receiver.in_hand(topic) for receiver in self._receivers if isinstance(receiver, DeadReceiver))
        return Depth(max(0, len(await opened.letters(topic)) - held), held, 0, approximate=True)

    def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """Oldest first."""
        return self._open().peek(topic, group)

    async def purge(self, topic: str, group: str) -> int:
        """Discards what waits in the topic; what is delayed or handed out stays."""
        return await self._open().purge(topic, group)

    async def replay(self, topic: str, group: str, since: float) -> int:
        """By time stamps."""
        return await self._open().replay(topic, group, since)

    async def groups(self, topic: str) -> Sequence[str]:
        """Sorted. None where there is no such topic."""
        return await self._open().groups(topic)

    async def drop_group(self, topic: str, group: str) -> bool:
        """Its members learn of it at their next heartbeat."""
        return await self._open().drop(topic, group)
