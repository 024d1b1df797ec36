"""The adapter: URL and settings, opening and closing, declaring, and what operators ask for."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import ClassVar, Self, cast

from redis import exceptions as client

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
from msgbus.contract.envelope import Envelope
from msgbus.contract.options import Read, boolean, durability, positive, read_options, seconds
from msgbus.errors import BrokerUnavailable, ConfigurationError, NotFound, TopologyMismatch, UnsupportedFeature
from msgbus_redis import names, scripts
from msgbus_redis.connections import CALL_TIMEOUT, Command, Link, Links, Place, script
from msgbus_redis.errors import call_error, is_group_gone
from msgbus_redis.exclusive import ExclusiveReceiver
from msgbus_redis.export import shell
from msgbus_redis.names import Layout
from msgbus_redis.private import PrivateReceiver
from msgbus_redis.receiver import RedisReceiver
from msgbus_redis.sending import SEEN_FOR, Sender, trim
from msgbus_redis.services import Services, declare_group
from msgbus_redis.sharing import SharedReceiver
from msgbus_redis.wire import envelope_of

MAX_BODY = 1024 * 1024
OLDEST = (6, 2)
"""The first version that can trim by id and look for idle pending entries."""
SHORTEST_LEASE = 1.0


class RedisAdapter(Adapter):
    """Redis Streams. Also `HasDepth`, `Peekable`, `Purgeable`, `Replayable`, `HasGroups`, `Exportable`; receivers of groups forward."""

    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss", "redis+sentinel", "redis+cluster")
    name: ClassVar[str] = "redis"

    def __init__(self, place: Place, settings: AdapterSettings | None = None, *, max_body: int = MAX_BODY, replicas: int = 1) -> None:
        self._place = place
        self._settings = settings or AdapterSettings()
        self._max_body = max_body
        self._replicas = replicas
        self._instance = os.urandom(6).hex()  # names this process among the consumers of a group; a lost link does not change it
        self._numbers = count()
        self._links: Links | None = None
        self._sender: Sender | None = None
        self._services: Services | None = None
        self._receivers: set[RedisReceiver] = set()
        self._names: dict[tuple[str, str], set[str]] = {}
        self._tokens: dict[tuple[str, str, str], list[str]] = {}
        self._facts: dict[str, str] = {}

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """Options: the settings that mean something here, `max_body`, `replicas`, and for TLS `tls` and redis-py's `ssl_…`."""
        place = Place.from_url(url)
        read = read_options(str(place), options, _OPTIONS)
        own = {name: read.pop(name) for name in ("max_body", "replicas") if name in read}
        secure = {name: read.pop(name) for name in list(read) if name.startswith("ssl_")}
        if read.pop("tls", False):
            secure["tls"] = True
        if secure and place.scheme != "rediss" and not secure.get("tls"):
            raise ConfigurationError(f"options {', '.join(secure)} of {place}: they need rediss://, or tls=true with several hosts")
        place = replace(place, options={**place.options, **secure})
        settings = replace(settings, **read)
        if settings.lease < SHORTEST_LEASE:
            raise ConfigurationError(f"lease of {settings.lease:g} s at {place}: at least {SHORTEST_LEASE:g} s")
        return cls(place, settings, **own)

    def __repr__(self) -> str:
        return f"<RedisAdapter {self._place} {'closed' if self._links is None else 'open'}>"

    @property
    def capabilities(self) -> Capability:
        """All; `DURABLE` where the server keeps an append-only file."""
        return ~Capability.NONE if self._facts.get("aof_enabled", "1") == "1" else ~Capability.DURABLE

    @property
    def limits(self) -> Limits:
        """Any delay, and any time un-settled: leases are renewed."""
        return Limits(body=self._max_body)

    # ------------------------------------------------------------ opening and closing

    async def open(self) -> None:
        """Connects, and looks at what the server is: its version, and whether it keeps what it confirms."""
        if self._links is not None:
            return
        links = Links(self._place)
        try:
            (info,) = await links.run("{}", ("INFO",), what=f"Redis at {self._place}")
            self._facts = _facts(info)
            self._check_server()
            if self._settings.durability == "fsync":
                (answer,) = await links.call("{}", ("WAITAOF", 0, 0, 1))
                if isinstance(answer, Exception):
                    raise UnsupportedFeature("durability 'fsync'", f"Redis {self._version}", "Redis 7.2 or newer, with appendonly yes")
        except BaseException as error:
            await links.close()
            if isinstance(error, client.RedisError | OSError | TimeoutError):
                raise call_error(error, f"Redis at {self._place}") from error
            raise
        sender = Sender(links, self._settings, self._max_body, self._replicas)
        services = Services(links, sender, self._settings)
        services.lost_tokens = self._tokens
        self._links, self._sender, self._services = links, sender, services

    @property
    def _version(self) -> str:
        return self._facts.get("valkey_version") or self._facts.get("redis_version", "?")

    def _check_server(self) -> None:
        numbers = tuple(int(part) for part in re.findall(r"\d+", self._facts.get("redis_version", ""))[:2])
        if numbers and numbers < OLDEST:
            raise ConfigurationError(f"Redis {self._version} at {self._place}: msgbus needs 6.2 or newer")
        risks = self._risks()
        if self._settings.require_durable and risks:
            raise ConfigurationError(f"require_durable: Redis at {self._place} may lose what it confirmed: {'; '.join(risks)}")

    def _risks(self) -> list[str]:
        risks: list[str] = []
        if self._facts.get("aof_enabled", "1") != "1":
            risks.append("appendonly is off, so a crash loses what was sent since the last snapshot (set appendonly yes)")
        policy = self._facts.get("maxmemory_policy", "noeviction")
        if policy.startswith("allkeys"):
            risks.append(f"maxmemory-policy {policy} deletes streams when memory is short (set noeviction)")
        elif policy.startswith("volatile"):
            risks.append(f"maxmemory-policy {policy} may delete the leases of ordered groups when memory is short (set noeviction)")
        return risks

    async def close(self) -> None:
        """Closes every receiver: what they held goes back, uncounted."""
        links, self._links = self._links, None
        self._sender = self._services = None
        if links is not None:
            await asyncio.gather(*(receiver.close() for receiver in list(self._receivers)))
            await links.close()

    def abandon(self) -> None:
        """What kill -9 of the process would do to its connections, for tests: nothing is flushed, acked or given back."""
        if self._links is not None:
            for receiver in list(self._receivers):
                receiver.abandon()
            self._links.abort()

    async def ping(self) -> None:
        """One round trip, or `BrokerUnavailable`."""
        await self._open.run("{}", ("PING",), what=f"Redis at {self._place}")

    @property
    def _open(self) -> Links:
        if self._links is None:
            raise BrokerUnavailable("the Redis adapter is not open")
        return self._links

    @property
    def _served(self) -> Services:
        if self._services is None:
            raise BrokerUnavailable("the Redis adapter is not open")
        return self._services

    # ------------------------------------------------------------ declaring

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """As the contract says. A topic that stands without a key takes one, and keeps its shards."""
        self._served  # noqa: B018  it must be open
        for spec in topics:
            for option in spec.native:
                raise ConfigurationError(f"topic {spec.name!r}: native option {option!r}: the Redis adapter knows none")
        for spec in topics:
            layout = await self._declare_topic(spec, create)
            if spec.kind == "dead":
                await self._declare_group(layout, DEAD_GROUP, "earliest", create)
        named = {spec.name for spec in topics}
        for receiver in receivers:
            layout = (
                await self._layout(receiver.topic)
                if receiver.topic in named
                else await self._declare_topic(TopicSpec(receiver.topic), create)
            )
            if receiver.group is not None:
                await self._declare_group(layout, receiver.group, receiver.start, create)

    async def _declare_topic(self, spec: TopicSpec, create: bool) -> Layout:
        where = f"topic {spec.name!r}"
        key = names.meta(spec.name)
        (answer,) = await self._open.run(key, self._topic_command(spec, create), what=where)
        self._check_answer(answer, where, "a topic")
        try:
            layout = Layout.read(spec.name, answer[1:])
        except ValueError as error:
            raise TopologyMismatch(f"{where}: key {key!r}", "the facts of a topic", str(error)) from None
        if layout.kind != spec.kind:
            raise TopologyMismatch(where, f"kind {spec.kind!r}", f"kind {layout.kind!r}")
        if layout.priorities != spec.priorities:
            raise TopologyMismatch(where, _priorities(spec.priorities), _priorities(layout.priorities))
        if spec.shards is not None and layout.shards != spec.shards:
            raise TopologyMismatch(where, f"{spec.shards} shards", f"{layout.shards}")
        if spec.retain is not None and (layout.retain is None or abs(layout.retain - spec.retain) > 0.001):
            raise TopologyMismatch(where, f"retain {spec.retain:g} s", f"{layout.retain or 0:g} s")
        self._served.sender.know(layout)
        return layout

    def _topic_command(self, spec: TopicSpec, create: bool) -> Command:
        retain = "" if spec.retain is None else int(spec.retain * 1000)
        shards = "" if spec.shards is None else spec.shards
        arguments = [int(create), spec.kind, int(spec.keyed), shards, max(self._settings.shards, 1), int(spec.priorities), retain]
        return script(scripts.DECLARE, [names.meta(spec.name), names.base(spec.name)], arguments)

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """A shell script for redis-cli that runs what `declare` runs."""
        steps = [(f"topic {spec.name}", self._topic_command(spec, create=True)) for spec in topics]
        specs = {spec.name: spec for spec in topics}
        groups = [(spec.topic, spec.group, spec.start) for spec in receivers if spec.group is not None]
        groups += [(spec.name, DEAD_GROUP, "earliest") for spec in topics if spec.kind == "dead"]
        for topic, group, start in groups:
            there = await self._known(topic) if self._links is not None else None
            layout = there or Layout.of(specs[topic], self._settings.shards)
            steps.append((f"group {group} of {topic}", declare_group(layout, group, start, "create", self._settings)))
        return shell(steps)

    async def _declare_group(self, layout: Layout, group: str, start: str, create: bool) -> None:
        what = f"group {group!r} of topic {layout.topic!r}"
        command = declare_group(layout, group, start, "create" if create else "check", self._settings)
        (answer,) = await self._open.run(layout.base, command, what=what)
        self._check_answer(answer, what, "a group")

    @staticmethod
    def _check_answer(answer: Sequence[bytes], where: str, expected: str) -> None:
        if answer[0] == b"missing":
            raise TopologyMismatch(where, expected, "none")
        if answer[0] == b"kind":
            key, wanted, found = (part.decode() for part in answer[1:4])
            raise TopologyMismatch(f"{where}: key {key!r}", f"a {wanted}", f"a {found}")

    async def _layout(self, topic: str) -> Layout:
        return await self._served.sender.layout(topic, CALL_TIMEOUT)

    async def _known(self, topic: str) -> Layout | None:
        """How a topic stands at the broker; None where it does not."""
        key = names.meta(topic)
        (flat,) = await self._open.run(key, ("HGETALL", key), what=f"topic {topic!r}")
        if not flat:
            return None
        try:
            return Layout.read(topic, flat)
        except ValueError:
            return None

    async def shards(self, topic: str) -> int | None:
        """None where the topic is not keyed, or not there."""
        layout = await self._known(topic)
        return layout.shards if layout is not None and layout.keyed else None

    # ------------------------------------------------------------ sending and receiving

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """As the contract says. An id that was sent to the topic within about the last two minutes is stored once."""
        if self._sender is None:
            return [BrokerUnavailable("the Redis adapter is not open") for _ in envelopes]
        return await self._sender.send(envelopes, timeout)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """Each receiver has a connection of its own, since its reads wait at the server."""
        services = self._served
        layout = await self._known(spec.topic)
        if layout is None:
            raise BrokerUnavailable(f"Redis has no topic {spec.topic!r}: declare it first")
        if spec.group is not None:
            await self._find_group(layout, spec.group)
        link = await services.links.link(layout.base)
        try:
            receiver = await self._make(services, link, layout, spec)
        except BaseException:
            services.links.drop(link)
            raise
        self._receivers.add(receiver)
        receiver.start()
        return receiver

    async def _make(self, services: Services, link: Link, layout: Layout, spec: ReceiverSpec) -> RedisReceiver:
        if spec.group is None:
            private = PrivateReceiver(services, link, layout, spec, self._receivers.discard)
            await private.prepare()
            return private
        if spec.exclusive:
            exclusive = ExclusiveReceiver(services, link, layout, spec, self._receivers.discard)
            exclusive.prepare(f"{self._instance}-{next(self._numbers)}", spec.group)
            return exclusive
        taken = self._names.setdefault((spec.topic, spec.group), set())
        consumer = next(name for number in count() if (name := f"{self._instance}-{number}") not in taken)

        def closed(receiver: RedisReceiver) -> None:
            taken.discard(consumer)
            self._receivers.discard(receiver)

        shared = SharedReceiver(services, link, layout, spec, closed)
        shared.prepare(consumer, spec.group)
        taken.add(consumer)
        return shared

    async def _find_group(self, layout: Layout, group: str) -> None:
        if group not in await self._groups(layout):
            raise BrokerUnavailable(f"topic {layout.topic!r} has no group {group!r}: declare it first")

    # ------------------------------------------------------------ operating

    async def explain(self) -> Mapping[str, str]:
        """What the server is, and what it may lose."""
        facts = self._facts
        kind = "Valkey" if facts.get("server_name") == "valkey" else "Redis"
        risks = self._risks()
        fsync = {"broker": "when the server has them in memory", "fsync": "when they are in its append-only file"}
        when = fsync.get(self._settings.durability, f"when {self._replicas} replicas have them")
        return {
            "broker": f"{kind} {self._version} at {self._place}",
            "durability": f"messages are confirmed {when}; " + ("; ".join(risks) if risks else "it keeps an append-only file"),
            "lease": f"what a dead process held comes to another after {self._settings.lease:g} s",
            "duplicates": f"a second send of an id is recognised for {SEEN_FOR:g} s",
            "body": f"at most {self._max_body} bytes",
        }

    async def depth(self, topic: str, group: str) -> Depth:
        """`ready` may be approximate where entries were deleted by others. `NotFound` where there is no such group."""
        layout = await self._there(topic, group)
        keys = [names.delayed(topic, group), names.delayed(topic, None), *self._streams(layout, group)]
        (answer,) = await self._open.run(layout.base, script(scripts.DEPTH, keys, [group]), what=f"depth of {topic!r}")
        if not answer:
            raise self._no_group(topic, group)
        ready, in_flight, delayed = answer
        return Depth(ready, in_flight, delayed, approximate=True)

    async def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """What waits, oldest first within each stream. `NotFound` where there is no such group."""
        layout = await self._there(topic, group)
        streams = self._streams(layout, group)
        (answer,) = await self._open.run(layout.base, script(scripts.WAITING, streams, [group]), what=f"peeking at {topic!r}")
        if not answer:
            raise self._no_group(topic, group)
        for number, (stream, (last, *back)) in enumerate(zip(streams, answer, strict=True)):
            own = group if number >= len(streams) // 2 else None
            for id_ in back:
                (entries,) = await self._open.run(layout.base, ("XRANGE", stream, id_, id_), what=f"peeking at {topic!r}")
                for entry_id, flat in entries:
                    yield envelope_of(topic, own, stream, entry_id, flat)
            start = b"(" + last
            while True:
                (entries,) = await self._open.run(layout.base, ("XRANGE", stream, start, "+", "COUNT", 100), what=f"peeking at {topic!r}")
                for entry_id, flat in entries:
                    yield envelope_of(topic, own, stream, entry_id, flat)
                if len(entries) < 100:
                    break
                start = b"(" + entries[-1][0]

    async def purge(self, topic: str, group: str) -> int:
        """Discards what is ready; what is delayed or handed out stays. `NotFound`: there is no such group."""
        layout = await self._there(topic, group)
        (answer,) = await self._open.run(
            layout.base, script(scripts.PURGE, self._streams(layout, group), [group]), what=f"purging {topic!r}"
        )
        if answer < 0:
            raise self._no_group(topic, group)
        return int(answer)

    async def replay(self, topic: str, group: str, since: float) -> int:
        """What waits is counted, not doubled; what is handed out comes again. `NotFound`: there is no such group."""
        layout = await self._there(topic, group)
        keys = [names.meta(topic), *layout.parts()]
        (answer,) = await self._open.run(layout.base, script(scripts.REPLAY, keys, [group, int(since * 1000)]), what=f"replaying {topic!r}")
        if answer < 0:
            raise self._no_group(topic, group)
        return int(answer)

    async def groups(self, topic: str) -> Sequence[str]:
        """Sorted; none where there is no such topic."""
        layout = await self._known(topic)
        return sorted(await self._groups(layout)) if layout is not None else []

    async def drop_group(self, topic: str, group: str) -> bool:
        """Also frees what only this group held; a group of the same name that is declared again is a later group."""
        layout = await self._known(topic)
        if layout is None:
            return False
        parts = layout.parts()
        own = [names.retry(part, group) for part in parts] + [names.lease(part, group) for part in parts]
        own += [names.members(part, group) for part in parts] + [names.delayed(topic, group)]
        command = script(scripts.DROP_GROUP, [names.meta(topic), *parts, *own], [group, len(parts)])
        dropped, _ = await self._open.run(layout.base, command, trim(layout, None, self._settings), what=f"dropping {group!r}")
        return bool(dropped)

    async def _groups(self, layout: Layout) -> list[str]:
        try:
            (answer,) = await self._open.run(layout.base, ("XINFO", "GROUPS", layout.parts()[0]), what=f"groups of {layout.topic!r}")
        except BrokerUnavailable as error:
            if error.__cause__ is not None and is_group_gone(error.__cause__):
                return []
            raise
        return [cast(bytes, flat[1]).decode() for flat in answer]

    def _streams(self, layout: Layout, group: str) -> list[str]:
        parts = layout.parts()
        return [*parts, *(names.retry(part, group) for part in parts)]

    async def _there(self, topic: str, group: str) -> Layout:
        layout = await self._known(topic)
        if layout is None:
            raise self._no_group(topic, group)
        return layout

    @staticmethod
    def _no_group(topic: str, group: str) -> NotFound:
        return NotFound(f"Redis has no group {group!r} of topic {topic!r}")


def _facts(info: bytes) -> dict[str, str]:
    """What INFO says."""
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines() if not line.startswith("#"))
    return {name: value for name, colon, value in lines if colon}


def _priorities(there: bool) -> str:
    return "priorities" if there else "no priorities"


_OPTIONS: dict[str, Read] = {
    "dead_letter_retention": seconds,
    "durability": durability,
    "first_group_retention": seconds,
    "lease": seconds,
    "max_body": positive,
    "replicas": positive,
    "require_durable": boolean,
    "shards": positive,
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_check_hostname": boolean,
    "ssl_keyfile": str,
    "tls": boolean,
}
