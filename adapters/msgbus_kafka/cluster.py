"""The administrative side: one connection, one method a kind of request, each under a deadline, none repeated.

aiokafka's admin client keeps its connection to itself and raises what one of several answers says; commits for a group that nobody
consumes, which this adapter needs, it does not have. So requests go by `AIOKafkaClient`, the library's own base of all its clients.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaClient, TopicPartition
from aiokafka.protocol.admin import (
    CreateTopicsRequest,
    DeleteGroupsRequest,
    DeleteTopicsRequest,
    DescribeConfigsRequest,
    DescribeGroupsRequest,
    ListGroupsRequest,
)
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from msgbus.errors import BrokerUnavailable, MsgbusError, TopologyMismatch
from msgbus_kafka.errors import CLIENT_ERRORS, for_code, translate

DEADLINE = 10.0
"""Seconds that one request may take."""
END, BEGINNING = -1, -2
"""Moments that ListOffsets knows beside milliseconds since the epoch."""
EXISTS, UNKNOWN_TOPIC, UNKNOWN_MEMBER, NON_EMPTY, NO_SUCH_GROUP = 36, 3, 25, 68, 69
_MOVED = (14, 15, 16)  # the coordinator is loading, away or another one
_TOPIC, _BROKER = 2, 4  # kinds of resource that have a configuration
_DYNAMIC_TOPIC_CONFIG = 1
_CHOSEN: list[tuple[int, list[int]]] = []  # the broker chooses where replicas are
_LOOK_AGAIN = 0.02

Committed = Mapping[TopicPartition, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class NewTopic:
    """A topic to be created."""

    name: str
    partitions: int
    replication: int
    configs: Mapping[str, str]


class Cluster:
    """An open connection to the brokers. Every method raises msgbus's errors."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._client = AIOKafkaClient(**options, request_timeout_ms=int(DEADLINE * 1000))
        self._coordinators: dict[str, int] = {}
        self.nodes = 0
        self.default_replication = 1
        self.max_bytes = 1048588

    async def open(self, shown: str) -> None:
        """Connects, and reads what the brokers' configuration says."""
        try:
            async with asyncio.timeout(DEADLINE):
                await self._client.bootstrap()
                nodes = [broker.nodeId for broker in self._client.cluster.brokers()]
                self.nodes = len(nodes)
                response = await self._client.send(nodes[0], DescribeConfigsRequest([(_BROKER, str(nodes[0]), None)]))
        except CLIENT_ERRORS as error:
            raise translate(error, f"connecting to {shown}") from error
        for _, _, _, _, entries in response.resources:
            values = {name: value for name, value, *_ in entries}
            self.max_bytes = int(values.get("message.max.bytes") or self.max_bytes)
            self.default_replication = int(values.get("default.replication.factor") or 1)

    async def close(self, seconds: float) -> None:
        """Bounded in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._client.close()
        except CLIENT_ERRORS:
            abort_client(self._client)

    def abort(self) -> None:
        """Ends the connection as the death of the process would."""
        abort_client(self._client)

    async def ping(self) -> None:
        """One round trip."""
        await self._ask(MetadataRequest([]), "ping")

    async def _ask(self, request: Any, doing: str, node: int | None = None) -> Any:
        try:
            async with asyncio.timeout(DEADLINE):
                if node is None:
                    node = self._client.get_random_node()
                if node is None:
                    raise BrokerUnavailable(f"{doing}: no broker is known")
                return await self._client.send(node, request)
        except CLIENT_ERRORS as error:
            raise translate(error, doing) from error

    # ------------------------------------------------------------ topics

    async def leaders(self, topics: Iterable[str]) -> dict[str, list[int]]:
        """Of those that exist: the node that leads each partition; -1 where none does just now. Creates nothing."""
        wanted = list(dict.fromkeys(topics))
        if not wanted:
            return {}
        response = await self._ask(MetadataRequest(wanted, allow_auto_topic_creation=False), "reading topics")
        found: dict[str, list[int]] = {}
        for code, topic, _, partitions in response.topics:
            if code not in (0, UNKNOWN_TOPIC, 5, 17):  # not there, no leader yet, a name that cannot be
                raise for_code(code, f"topic {topic!r}")
            if partitions:
                by_number = {partition: leader for _, partition, leader, *_ in partitions}
                found[topic] = [by_number.get(number, -1) for number in range(max(by_number) + 1)]
        return found

    async def create(self, topics: Sequence[NewTopic]) -> None:
        """Creates them, and returns when their partitions have leaders. One that is there already is left as it is."""
        request = CreateTopicsRequest(
            [(topic.name, topic.partitions, topic.replication, _CHOSEN, list(topic.configs.items())) for topic in topics],
            int(DEADLINE * 1000),
            False,
        )
        response = await self._ask(request, "creating topics", self._controller())
        for topic, code, *said in response.topic_errors:
            if code not in (0, EXISTS):
                raise for_code(code, f"creating Kafka topic {topic!r}" + (f" ({said[0]})" if said and said[0] else ""))
        names = {topic.name for topic in topics}
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    if await self._answers(names):
                        return
                    await asyncio.sleep(_LOOK_AGAIN)
        except TimeoutError:
            raise BrokerUnavailable(f"new Kafka topics have no leader yet: {', '.join(sorted(names))}") from None

    async def _answers(self, topics: set[str]) -> bool:
        """Whether all of their partitions do: a broker is named as a leader a moment before it knows of it."""
        led = await self.leaders(topics)
        if led.keys() != topics:
            return False
        try:
            await self.offsets({TopicPartition(topic, number): BEGINNING for topic in topics for number in range(len(led[topic]))})
        except BrokerUnavailable:
            return False
        return True

    async def delete(self, topics: Sequence[str]) -> None:
        """Deletes them; those that are not there are no error."""
        response = await self._ask(DeleteTopicsRequest(list(topics), int(DEADLINE * 1000)), "deleting topics", self._controller())
        for topic, code, *_ in response.topic_error_codes:
            if code not in (0, UNKNOWN_TOPIC):
                raise for_code(code, f"deleting Kafka topic {topic!r}")

    async def configs(self, topics: Sequence[str]) -> dict[str, dict[str, str]]:
        """What was set on each topic itself, not by the broker's defaults."""
        response = await self._ask(DescribeConfigsRequest([(_TOPIC, topic, None) for topic in topics]), "reading configurations")
        found: dict[str, dict[str, str]] = {}
        for code, _, _, topic, entries in response.resources:
            if code == 0:
                found[topic] = {name: value for name, value, _, source, *_ in entries if source == _DYNAMIC_TOPIC_CONFIG}
        return found

    async def offsets(self, moments: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """The offset of each moment: `END`, `BEGINNING`, or the first record from then on (the end where there is none)."""
        led = await self.leaders({tp.topic for tp in moments})
        by_node: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for tp, moment in moments.items():
            leaders = led.get(tp.topic, [])
            if tp.partition >= len(leaders) or leaders[tp.partition] < 0:
                raise BrokerUnavailable(f"Kafka topic {tp.topic!r} has no leader for partition {tp.partition}")
            by_node[leaders[tp.partition]][tp.topic].append((tp.partition, moment))
        found: dict[TopicPartition, int] = {}
        for node, topics in by_node.items():
            response = await self._ask(OffsetRequest(-1, 0, list(topics.items())), "reading offsets", node)
            for topic, partitions in response.topics:
                for partition, code, _, offset in partitions:
                    if code:
                        raise for_code(code, f"offsets of Kafka topic {topic!r}")
                    found[TopicPartition(topic, partition)] = offset
        if after := {tp: END for tp, offset in found.items() if offset < 0}:
            found.update(await self.offsets(after))
        return found

    # ------------------------------------------------------------ groups

    async def committed(self, group: str) -> Committed:
        """Offset and metadata of every partition that the group has committed."""
        response = await self._coordinate(group, OffsetFetchRequest(group, None), f"reading the offsets of group {group!r}")
        self._check(group, response.error_code)
        found: dict[TopicPartition, tuple[int, str]] = {}
        for topic, partitions in response.topics:
            for partition, offset, metadata, code in partitions:
                self._check(group, code)
                if offset >= 0:
                    found[TopicPartition(topic, partition)] = (offset, metadata or "")
        return found

    async def commit(self, group: str, offsets: Committed) -> bool:
        """Commits for a group that has no members. False: it has."""
        topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for tp, (offset, metadata) in offsets.items():
            topics[tp.topic].append((tp.partition, offset, metadata))
        request = OffsetCommitRequest(group, -1, "", -1, list(topics.items()))
        response = await self._coordinate(group, request, f"committing for group {group!r}")
        for _, partitions in response.topics:
            for _, code in partitions:
                if code == UNKNOWN_MEMBER:
                    return False
                self._check(group, code)
        return True

    async def members(self, group: str) -> list[str]:
        """The ids of those who consume as the group just now."""
        response = await self._coordinate(group, DescribeGroupsRequest([group], False), f"reading the members of group {group!r}")
        found: list[str] = []
        for code, _, _, _, _, members, *_ in response.groups:
            if code != NO_SUCH_GROUP:
                self._check(group, code)
                found += [member[0] for member in members]
        return found

    async def dismiss(self, group: str, member: str) -> None:
        """Makes a member leave; it learns of it at its next heartbeat."""
        await self._coordinate(group, LeaveGroupRequest(group, member), f"dismissing a member of group {group!r}")

    async def forget(self, group: str) -> bool:
        """Deletes a group without members. False: there was none. Raises `BrokerUnavailable` while it has members."""
        response = await self._coordinate(group, DeleteGroupsRequest([group]), f"deleting group {group!r}")
        (_, code) = response.results[0]
        if code == NO_SUCH_GROUP:
            return False
        if code == NON_EMPTY:
            raise BrokerUnavailable(f"group {group!r} has members that came back just now")
        self._check(group, code)
        return True

    async def groups(self, prefix: str) -> list[str]:
        """The ids of all groups that begin so."""
        found: set[str] = set()
        for broker in list(self._client.cluster.brokers()):
            response = await self._ask(ListGroupsRequest(), "listing groups", broker.nodeId)
            if response.error_code:
                raise for_code(response.error_code, "listing groups")
            found.update(group for group, _ in response.groups if group.startswith(prefix))
        return sorted(found)

    async def _coordinate(self, group: str, request: Any, doing: str) -> Any:
        node = self._coordinators.get(group)
        if node is None:
            try:
                async with asyncio.timeout(DEADLINE):
                    node = await self._client.coordinator_lookup(0, group)
            except CLIENT_ERRORS as error:
                raise translate(error, doing) from error
            if len(self._coordinators) > 10_000:
                self._coordinators.clear()
            self._coordinators[group] = node
        try:
            return await self._ask(request, doing, node)
        except MsgbusError:
            self._coordinators.pop(group, None)
            raise

    def _check(self, group: str, code: int) -> None:
        if code:
            if code in _MOVED:
                self._coordinators.pop(group, None)
            raise for_code(code, f"group {group!r}")

    def _controller(self) -> int | None:
        controller = self._client.cluster.controller
        return None if controller is None else controller.nodeId


def missing(resource: str, wanted: str) -> TopologyMismatch:
    """The error for what is not there."""
    return TopologyMismatch(resource, wanted, "none")


def abort_client(client: Any) -> None:
    """Ends a client's task and sockets at once, without a word to the brokers: there is no public way to do so."""
    synchronizing = getattr(client, "_sync_task", None)
    if synchronizing is not None:
        synchronizing.cancel()
    for connection in list(getattr(client, "_conns", {}).values()):
        connection.close()
