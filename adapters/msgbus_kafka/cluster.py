"""The connection to the brokers: one method a kind of request, each under a deadline, none repeated.

aiokafka's admin client keeps its connection to itself, and commits for a group that nobody consumes, which this adapter needs, it does
not have; its producer repeats by itself and cannot say what never reached a socket. So requests go by `AIOKafkaClient`, the library's
own base of all its clients.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, cast

from aiokafka import AIOKafkaClient, TopicPartition
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import KafkaConnectionError, for_code
from aiokafka.protocol import admin
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.protocol.produce import ProduceRequest

from msgbus.errors import BrokerUnavailable, MsgbusError
from msgbus_kafka.errors import CLIENT_ERRORS, translate

DEADLINE = 10.0
"""Seconds that one request may take."""
CLOSE = 1.0
END, BEGINNING = -1, -2
"""Moments that ListOffsets knows beside milliseconds since the epoch."""
EXISTS, UNKNOWN_TOPIC, UNKNOWN_MEMBER, NOT_OURS_TO_SEE, NON_EMPTY, NO_SUCH_GROUP = 36, 3, 25, 31, 68, 69
_ABSENT = (UNKNOWN_TOPIC, 5, 9, 17, 72)  # not there, no leader or replica yet, a name that cannot be
_TOPIC, _BROKER = 2, 4  # kinds of resource that have a configuration
_CHOSEN: list[tuple[int, list[int]]] = []  # the broker chooses where replicas are
_PRODUCING = "produce"  # has a socket a broker to itself

_RIGHTS: Mapping[type, str] = {
    admin.CreateTopicsRequest: "Create",
    admin.DeleteTopicsRequest: "Delete",
    admin.DeleteGroupsRequest: "Delete",
    admin.DescribeConfigsRequest: "DescribeConfigs",
    OffsetCommitRequest: "Read",
    LeaveGroupRequest: "Read",
}
"""What an ACL must give for a request; Describe for the others."""

_HANGS_UP = ", which hangs up (kafkas:// is for a port with TLS, kafka:// for one without; some want a user, or our certificate)"

Committed = Mapping[TopicPartition, tuple[int, str]]
Answer = dict[str, Any]  # Any: a response of Kafka's protocol, its fields by their names


class NewTopic(NamedTuple):
    """A topic to be created."""

    name: str
    partitions: int
    replication: int
    configs: Mapping[str, str]


class Cluster:
    """Every method but `produce` raises msgbus's errors. `options`: keyword arguments of every client of aiokafka, each of its own type."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._client = AIOKafkaClient(**options, request_timeout_ms=int(DEADLINE * 1000))
        bootstrap_whole(self._client)
        self._coordinators: dict[str, int] = {}
        self.nodes: list[int] = []
        self.default_replication = 1
        self.max_bytes = 1048588
        self.sessions = 0.0, 0.0
        """How short and how long a member's `session_timeout` may be, in seconds, as far as the brokers say."""

    async def open(self, shown: str) -> None:
        """Connects, and reads what the brokers' configuration says."""
        try:
            async with asyncio.timeout(DEADLINE):
                await self._client.bootstrap()
        except CLIENT_ERRORS as error:
            reason = await self._refusal() or error
            doing = f"connecting to {shown}"
            if isinstance(reason, KafkaConnectionError | ConnectionResetError):
                doing += _HANGS_UP
            raise translate(reason, doing) from reason
        self.nodes = [broker.nodeId for broker in self._client.cluster.brokers()]
        node = self.nodes[0]
        request = admin.DescribeConfigsRequest([(_BROKER, str(node), None)])
        (configs,) = (await self._configs(request, range(9), node, (NOT_OURS_TO_SEE,))).values()
        self.max_bytes = int(configs.get("message.max.bytes", self.max_bytes))
        self.default_replication = int(configs.get("default.replication.factor", -1))  # the brokers know it
        least, most = configs.get("group.min.session.timeout.ms"), configs.get("group.max.session.timeout.ms")
        self.sessions = int(least or 0) / 1000, int(most or 2**31 - 1) / 1000

    async def _refusal(self) -> Exception | None:
        """Why the first of the brokers does not let us in: the client tells that to its log alone."""
        options = {**self.options}
        host, port, _ = collect_hosts(options.pop("bootstrap_servers"))[0]
        try:
            async with asyncio.timeout(DEADLINE):
                (await create_conn(host, port, **options)).close()
        except CLIENT_ERRORS as error:
            return error
        return None

    async def close(self) -> None:
        """Bounded in time."""
        await closed(self._client, self._client.close(), CLOSE)
        self.abort()

    def abort(self) -> None:
        """Ends the connection as the death of the process would."""
        abort(self._client)

    def drop(self, node: int | None = None) -> None:
        """Ends the links to a broker, or all: one that is dead may never say so. The next call makes another."""
        connections = vars(self._client)["_conns"]
        for key in [key for key in connections if node in (None, key[0])]:
            connections.pop(key).close()

    async def ping(self) -> None:
        """One round trip."""
        await self._ask(MetadataRequest([]), "ping")

    async def _ask(self, request: object, doing: str, node: int | None = None, tolerate: Sequence[int] = ()) -> Answer:
        try:
            async with asyncio.timeout(DEADLINE):
                answer: Answer = (await self._client.send(self._client.get_random_node() if node is None else node, request)).to_object()
            for failed in _failures(answer):
                if failed["error_code"] not in tolerate:
                    raise for_code(failed["error_code"])(": ".join(filter(None, (failed["where"], failed.get("error_message")))))
        except CLIENT_ERRORS as error:
            raise translate(error, doing, _RIGHTS.get(type(request), "Describe")) from error
        return answer

    # ------------------------------------------------------------ topics

    async def leaders(self, topics: Iterable[str]) -> dict[str, list[int]]:
        """Of those that exist: the node that leads each partition; -1 where none does just now. Creates nothing."""
        answer = await self._ask(MetadataRequest([*topics], allow_auto_topic_creation=False), "reading topics", tolerate=_ABSENT)
        return {
            topic["topic"]: [partition["leader"] for partition in sorted(topic["partitions"], key=itemgetter("partition"))]
            for topic in answer["topics"]
            if topic["partitions"]
        }

    async def create(self, topics: Sequence[NewTopic]) -> None:
        """Creates them, and returns when their partitions answer. One that is there already is left as it is."""
        wanted = [(topic.name, topic.partitions, topic.replication, _CHOSEN, [*topic.configs.items()]) for topic in topics]
        doing = f"creating Kafka topics {', '.join(topic.name for topic in topics)}"
        await self._ask(admin.CreateTopicsRequest(wanted, int(DEADLINE * 1000), False), doing, self._controller(), (EXISTS,))
        beginnings = dict.fromkeys(places_of({topic.name: range(topic.partitions) for topic in topics}), BEGINNING)
        until = asyncio.get_running_loop().time() + DEADLINE
        while True:  # a broker is named as a leader a moment before it knows of it
            try:
                await self.offsets(beginnings)
            except BrokerUnavailable:
                if asyncio.get_running_loop().time() > until:
                    raise
                await asyncio.sleep(0.02)
            else:
                return

    async def delete(self, topics: Sequence[str]) -> None:
        """Deletes them; those that are not there are no error."""
        request = admin.DeleteTopicsRequest([*topics], int(DEADLINE * 1000))
        await self._ask(request, f"deleting Kafka topics {', '.join(topics)}", self._controller(), (UNKNOWN_TOPIC,))

    async def configs(self, topics: Sequence[str], *, defaults: bool = False) -> dict[str, dict[str, str]]:
        """What was set on each topic itself; with `defaults` what holds for it, whoever said so."""
        request = admin.DescribeConfigsRequest([(_TOPIC, topic, None) for topic in topics])
        return await self._configs(request, range(1, 7) if defaults else (1,))

    async def _configs(
        self, request: object, sources: Sequence[int], node: int | None = None, tolerate: Sequence[int] = (UNKNOWN_TOPIC,)
    ) -> dict[str, dict[str, str]]:
        answer = await self._ask(request, "reading configurations", node, tolerate)
        return {
            resource["resource_name"]: {
                entry["config_names"]: entry["config_value"] for entry in resource["config_entries"] if entry["config_source"] in sources
            }
            for resource in answer["resources"]
        }

    async def offsets(self, moments: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """The offset of each moment: `END`, `BEGINNING`, or the first record from then on (the end where there is none)."""
        led = await self.leaders({place.topic for place in moments})
        asked: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for place, moment in moments.items():
            leader = dict(enumerate(led.get(place.topic, ()))).get(place.partition, -1)
            asked[leader][place.topic].append((place.partition, moment))
        found: dict[TopicPartition, int] = {}
        for node, topics in asked.items():
            answer = await self._ask(OffsetRequest(-1, 0, [*topics.items()]), f"reading offsets of {', '.join(topics)}", node)
            found.update((place, partition["offset"]) for place, partition in _by_place(answer))
        if after := {place: END for place, offset in found.items() if offset < 0}:
            found.update(await self.offsets(after))
        return found

    async def produce(self, node: int, batches: Mapping[TopicPartition, bytes], deadline: float) -> dict[TopicPartition, int | Exception]:
        """Writes batches, once. Of each the broker's error code, 0 where it is stored, or an error: `BrokerUnavailable` where nothing
        was written to a socket; any other leaves it unknown. `deadline` in the loop's time."""
        topics: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
        for place, batch in batches.items():
            topics[place.topic].append((place.partition, batch))
        patience = min(max(1, int((deadline - asyncio.get_running_loop().time()) * 1000)), 2**31 - 1)
        problem: Exception = BrokerUnavailable(f"no connection to Kafka node {node}")
        written = False
        try:
            async with asyncio.timeout_at(deadline):
                if await self._client.ready(node, group=_PRODUCING):
                    written = True
                    answer = await self._client.send(node, ProduceRequest(None, -1, patience, [*topics.items()]), group=_PRODUCING)
                    return {TopicPartition(topic, number): code for topic, found in answer.topics for number, code, *_ in found}
        except CLIENT_ERRORS as error:
            problem = error if written else problem
            if isinstance(error, TimeoutError):
                self.drop(node)
        return dict.fromkeys(batches, problem)

    # ------------------------------------------------------------ groups

    async def committed(self, group: str, places: Iterable[TopicPartition] | None = None) -> Committed:
        """Offset and metadata of every partition that the group has committed; or of these, as far as it has."""
        asked: dict[str, list[int]] = defaultdict(list)
        for place in places or ():
            asked[place.topic].append(place.partition)
        request = OffsetFetchRequest(group, None if places is None else [*asked.items()])
        answer = await self._coordinate(group, request, "reading the offsets")
        return {place: (found["offset"], found["metadata"] or "") for place, found in _by_place(answer) if found["offset"] >= 0}

    async def commit(self, group: str, offsets: Committed, generation: int = -1, member: str = "") -> bool:
        """Commits for a member, or for a group that has none. False: it is no member any more, or the group has some."""
        topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for place, (offset, metadata) in offsets.items():
            topics[place.topic].append((place.partition, offset, metadata))
        request = OffsetCommitRequest(group, generation, member, -1, [*topics.items()])
        return not any(_failures(await self._coordinate(group, request, "committing", (UNKNOWN_MEMBER,))))

    async def members(self, group: str) -> list[str]:
        """The ids of those who consume as the group just now."""
        answer = await self._coordinate(group, admin.DescribeGroupsRequest([group], False), "reading the members", (NO_SUCH_GROUP,))
        return [member["member_id"] for described in answer["groups"] for member in described["members"]]

    async def dismiss(self, group: str, member: str) -> None:
        """Makes a member leave; it learns of it at its next heartbeat."""
        await self._coordinate(group, LeaveGroupRequest(group, member), "dismissing a member", (UNKNOWN_MEMBER,))

    async def forget(self, group: str) -> bool:
        """Deletes a group; one that is not there is no error. False: it has members."""
        answer = await self._coordinate(group, admin.DeleteGroupsRequest([group]), "deleting", (NO_SUCH_GROUP, NON_EMPTY))
        return all(failed["error_code"] != NON_EMPTY for failed in _failures(answer))

    async def groups(self, prefix: str) -> list[str]:
        """The ids of all groups that begin so."""
        answers = [await self._ask(admin.ListGroupsRequest(), "listing groups", broker.nodeId) for broker in self._client.cluster.brokers()]
        return sorted({found["group"] for answer in answers for found in answer["groups"] if found["group"].startswith(prefix)})

    async def _coordinate(self, group: str, request: object, doing: str, tolerate: Sequence[int] = ()) -> Answer:
        doing = f"{doing} of group {group!r}"
        try:
            if group not in self._coordinators:
                async with asyncio.timeout(DEADLINE):
                    self._coordinators[group] = await self._client.coordinator_lookup(0, group)
            return await self._ask(request, doing, self._coordinators[group], tolerate)
        except MsgbusError:  # it may be another by now
            self._coordinators.pop(group, None)
            raise
        except CLIENT_ERRORS as error:
            raise translate(error, doing, "Describe") from error

    def _controller(self) -> int | None:
        controller = self._client.cluster.controller
        return None if controller is None else controller.nodeId


def places_of(partitions: Mapping[str, Iterable[int]]) -> list[TopicPartition]:
    """The partitions of topics, by their numbers."""
    return [TopicPartition(topic, number) for topic, numbers in partitions.items() for number in numbers]


async def ended(ending: Coroutine[Any, Any, None], seconds: float) -> bool:
    """Whether it comes to its end in time. What it raises stays in it: aiokafka lets its own tasks' `CancelledError` out."""
    task = asyncio.create_task(ending)
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.done() and not task.cancelled() and task.exception() is None
    finally:
        task.cancel()


async def closed(client: object, ending: Coroutine[Any, Any, None], seconds: float) -> bool:
    """As `ended`, of what closes a client: its sockets are closed then in any case."""
    connections = [*vars(client)["_conns"].values()]
    try:
        return await ended(ending, seconds)
    finally:
        for connection in connections:
            _cut(connection)


def bootstrap_whole(client: Any) -> None:
    """Whoever is cancelled while the client makes its first connection: the client comes to the end of that, which closes it, and is ended
    then. By itself it would forget the connection. Any: this replaces a method."""
    bootstrap = client.bootstrap

    async def whole() -> None:
        task = asyncio.create_task(bootstrap())
        try:
            await asyncio.shield(task)
        finally:
            if not task.done():
                task.add_done_callback(lambda _: abort(client))

    client.bootstrap = whole


def abort(*owners: object) -> None:
    """Ends the tasks and sockets of parts of the client library at once, without a word to the brokers: there is no public way to."""
    for owner in filter(None, owners):
        parts = vars(owner)
        closing = parts.get("_closing")  # a coordinator that waits for a task of its own loses its cancellation to that
        if closing is not None and not closing.done():
            closing.set_result(None)
        for value in [*parts.values(), *parts.get("_pending_tasks", ())]:
            if isinstance(value, asyncio.Task):
                value.cancel()
        if "_conns" in parts:
            connections, parts["_conns"] = parts["_conns"], _Ended()
            for connection in list(connections.values()):
                _cut(connection)


def _cut(connection: Any) -> None:
    """Closes its socket now, also after its `close`: TLS takes leave, which may outlive the event loop. Any: that is private."""
    connection.close()
    transport: asyncio.WriteTransport | None = connection._protocol._transport  # noqa: SLF001  None: it is closed
    if transport is not None:
        transport.abort()


class _Ended(dict[object, Any]):
    """Of a client that has ended: what a call that was under way connects after that is closed at once. Any: the client's connections."""

    def __setitem__(self, key: object, connection: Any) -> None:
        super().__setitem__(key, connection)
        _cut(connection)


def _failures(answer: Answer, where: str = "") -> Iterator[Answer]:
    """All that has an error code, at any depth: of lists of structures, as the protocol is. With the topic or other thing it is about."""
    where = answer.get("topic") or answer.get("resource_name") or where
    if answer.get("error_code"):
        yield {**answer, "where": where}
    for value in answer.values():
        for part in cast("list[object]", value) if isinstance(value, list) else ():
            if isinstance(part, dict):
                yield from _failures(cast(Answer, part), where)


def _by_place(answer: Answer) -> Iterator[tuple[TopicPartition, Answer]]:
    for topic in answer["topics"]:
        for partition in topic["partitions"]:
            yield TopicPartition(topic["topic"], partition["partition"]), partition
