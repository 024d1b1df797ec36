"""The adapter: URL and settings, opening and closing, and who does the rest."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import ClassVar, Self, cast

from msgbus.contract.adapter import Adapter, AdapterSettings, Capability, Depth, Limits, Receiver, ReceiverSpec, SendOutcome, TopicSpec
from msgbus.contract.address import DEAD_GROUP
from msgbus.contract.envelope import Envelope
from msgbus.contract.logs import quieten
from msgbus.errors import BrokerUnavailable, NotFound, UnsupportedFeature
from msgbus_rabbitmq import names
from msgbus_rabbitmq.export import Notebook
from msgbus_rabbitmq.keyed import KeyedReceiver
from msgbus_rabbitmq.link import Asking, Link
from msgbus_rabbitmq.receiver import PrivateReceiver, RabbitReceiver, Terms
from msgbus_rabbitmq.sender import Sender
from msgbus_rabbitmq.topology import Topology
from msgbus_rabbitmq.url import Place, read_url
from msgbus_rabbitmq.wire import envelope_of

MODERN = (4, 3)
"""From here on the broker counts deaths and nothing else."""


class Connected:
    """What an open adapter has."""

    def __init__(self, place: Place, settings: AdapterSettings) -> None:
        purposes = "publishing", "consuming", "asking"
        self.links = self.publishing, self.consuming, asking = [Link(place, settings.heartbeat, purpose) for purpose in purposes]
        self.ask = Asking(asking)
        self.ask_consuming = Asking(self.consuming)
        self.topology = Topology(self.ask, asking, settings)
        self.sender = Sender(self.publishing, place.max_body, self.topology.layout, self.topology.make_delays)
        self.receivers: set[RabbitReceiver] = set()

    async def close(self) -> None:
        """Receivers, then connections. Cut off, it ends them at once: what receivers still say has nobody to hear it."""
        try:
            await asyncio.gather(*(receiver.close() for receiver in list(self.receivers)), return_exceptions=True)
            await asyncio.gather(*(link.close() for link in self.links))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends the connections, for good."""
        for link in self.links:
            link.end()


class RabbitAdapter(Adapter):
    """RabbitMQ, by quorum queues. Also `HasDepth`, `Peekable`, `Purgeable`, `HasGroups`, `HasWarnings`, `Exportable`."""

    schemes: ClassVar[tuple[str, ...]] = ("amqp", "amqps")
    name: ClassVar[str] = "rabbitmq"

    def __init__(self, place: Place, settings: AdapterSettings | None = None) -> None:
        self._place = place
        self._settings = settings or AdapterSettings()
        self._connected: Connected | None = None
        self._version: tuple[int, ...] = MODERN

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """`amqp://[user:password@]host[:5672][,host…][/vhost]`; `amqps://` with TLS. Options: see the package's README."""
        place, settings = read_url(url, options, settings)
        return cls(place, settings)

    def __repr__(self) -> str:
        return f"<RabbitAdapter {self._place.shown} {'closed' if self._connected is None else 'open'}>"

    @property
    def capabilities(self) -> Capability:
        """All but `RETAIN`; `CRASH_COUNT` from 4.3 on, for before the broker counts what was only given back."""
        lacks = Capability.RETAIN if self._version >= MODERN else Capability.RETAIN | Capability.CRASH_COUNT
        return ~Capability.NONE & ~lacks

    @property
    def limits(self) -> Limits:
        """310 days of delay; un-settled as long as the broker's `consumer_timeout` says."""
        return Limits(body=self._place.max_body, delay=names.LONGEST_DELAY, unsettled=self._place.consumer_timeout)

    # ------------------------------------------------------------ opening and closing

    async def open(self) -> None:
        """Makes three connections: for publishing, consuming, asking."""
        if self._connected is not None:
            return
        quieten("aiormq")
        connected = Connected(self._place, self._settings)
        try:
            connections = [await link.connection() for link in connected.links]
        except BaseException:
            await connected.close()
            raise
        version = (connections[0].server_properties or {}).get("version", "")
        self._version = tuple(int(part) for part in re.findall(r"\d+", str(version))[:2]) or MODERN
        self._connected = connected

    async def close(self) -> None:
        """Closes every receiver, then the connections."""
        connected, self._connected = self._connected, None
        if connected is not None:
            await connected.close()

    def abandon(self) -> None:
        """What kill -9 of the process would do to its connections, for tests: nothing is flushed, acked or given back."""
        if self._connected is not None:
            self._connected.abandon()

    async def ping(self) -> None:
        """One round trip, or `BrokerUnavailable`."""
        async with self._open.ask("ping") as channel:
            await channel.basic_qos(prefetch_count=0)  # asks for no right

    async def warnings(self, groups: Sequence[tuple[str, str]]) -> Sequence[str]:
        """An alarm, from the first publish on that meets it."""
        if groups or not await self._open.publishing.stopped_reading():
            return ()
        return ("RabbitMQ takes no messages: it is short of memory or disk. Publishes wait until its alarm is over; handlers go on",)

    @property
    def _open(self) -> Connected:
        if self._connected is None:
            raise BrokerUnavailable("the RabbitMQ adapter is not open")
        return self._connected

    # ------------------------------------------------------------ declaring

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """As the contract says. A topic that stands without a key cannot take one."""
        connected = self._open
        specs = {receiver.topic: TopicSpec(receiver.topic) for receiver in receivers} | {spec.name: spec for spec in topics}
        layouts = {name: await connected.topology.declare_topic(spec, create) for name, spec in specs.items()}
        connected.sender.layouts.update(layouts)
        for layout in layouts.values():
            if layout.kind == "dead":
                await connected.topology.declare_group(layout, DEAD_GROUP, "earliest", create)
        for receiver in receivers:
            if receiver.group is not None:
                await connected.topology.declare_group(layouts[receiver.topic], receiver.group, receiver.start, create)

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """Definitions for `rabbitmqctl import_definitions`: what `declare` makes on an empty broker, and the delays."""
        notebook = Notebook(self._place.vhost)
        topology = Topology(cast(Asking, notebook), Link(self._place, 0, "nothing"), self._settings)  # it has all that is asked for here
        await topology.make_delays()
        layouts = {spec.name: await topology.declare_topic(spec, create=True) for spec in topics}
        groups = [(receiver.topic, receiver.group) for receiver in receivers if receiver.group is not None]
        for topic, group in [*((spec.name, DEAD_GROUP) for spec in topics if spec.kind == "dead"), *groups]:
            await topology.declare_group(layouts[topic], group, "latest", create=True)  # nothing is there to be moved
        return notebook.text()

    async def shards(self, topic: str) -> int | None:
        """None where the topic is not keyed, or not there."""
        layout = await self._open.topology.layout(topic)
        return layout.shards or None if layout is not None else None

    # ------------------------------------------------------------ sending and receiving

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """None: written by a majority of the queue's replicas, of each queue that it went to."""
        if self._connected is None:
            return [BrokerUnavailable("the RabbitMQ adapter is not open") for _ in envelopes]
        return await self._connected.sender.send(envelopes, timeout)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """A channel of its own on the connection for consuming."""
        connected = self._open
        layout = await connected.topology.layout(spec.topic)
        if layout is None:
            raise BrokerUnavailable(f"RabbitMQ has no topic {spec.topic!r}: declare it first")
        if spec.group is None:
            await connected.topology.keep_for_the_first(spec.topic)
        kind = PrivateReceiver if spec.group is None else KeyedReceiver if layout.shards else RabbitReceiver
        terms = Terms(connected.consuming, connected.ask_consuming, layout, self._version >= MODERN, connected.receivers.discard)
        receiver = kind(terms, spec)
        connected.receivers.add(receiver)
        try:
            await receiver.open()
        except BaseException:
            await receiver.close()
            raise
        return receiver

    # ------------------------------------------------------------ operating

    async def explain(self) -> Mapping[str, str]:
        """Facts of this broker."""
        version, place = ".".join(map(str, self._version)), self._place
        lost = await self._open.topology.count(names.LOST)
        facts = {
            "broker": f"RabbitMQ {version} at {place.shown}",
            "durability": "quorum queues: a confirm means on the disks of a majority of a queue's nodes, how many AMQP does not say",
            "body": f"at most {place.max_body} bytes",
            "un-settled": f"a message comes again after {place.consumer_timeout:g} s (option consumer_timeout, as the broker has it)",
        }
        if self._version < MODERN:
            facts["before 4.3"] = "deaths of processes are not counted"
        if lost:
            facts["lost delays"] = f"{lost} messages in {names.LOST} were due for a group that is gone"
        return facts

    async def depth(self, topic: str, group: str) -> Depth:
        """What is ready. `NotFound` where there is no such group."""
        topology = self._open.topology
        layout = await topology.there(topic, group)
        return Depth(sum([await topology.count(queue) or 0 for queue in layout.queues(group)]), None, None)

    async def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """Oldest first within each queue. A keyed topic's cannot be looked at. `NotFound`: there is no such group."""
        topology = self._open.topology
        layout = await topology.there(topic, group)
        if layout.shards:  # the broker refuses it, and ends the connection
            raise UnsupportedFeature(f"looking into the keyed topic {topic!r}", "RabbitMQ", "its depth, or a receiver")
        for queue in layout.queues(group):
            async for message in topology.waiting(queue):
                own = group if message.exchange == "" else None
                yield envelope_of(topic, own, message.body, message.header.properties)

    async def purge(self, topic: str, group: str) -> int:
        """Discards what is ready; what is delayed or handed out stays. `NotFound`: there is no such group."""
        return await self._open.topology.purge(topic, group)

    async def groups(self, topic: str) -> Sequence[str]:
        """Sorted; none where there is no such topic."""
        return await self._open.topology.groups(topic)

    async def drop_group(self, topic: str, group: str) -> bool:
        """Its receivers learn of it at once. What is delayed for it goes to `msgbus.delay.lost` when it is due."""
        try:
            await self._open.topology.drop_group(topic, group)
        except NotFound:
            return False
        return True
