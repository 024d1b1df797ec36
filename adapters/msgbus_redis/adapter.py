"""The adapter: URL and settings, opening and closing, and what operators ask for."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from redis import exceptions as client

from msgbus.contract.adapter import Adapter, AdapterSettings, Capability, Depth, Limits, Receiver, ReceiverSpec, SendOutcome, TopicSpec
from msgbus.contract.address import DEAD_GROUP
from msgbus.contract.envelope import Envelope
from msgbus.contract.options import Read, boolean, durability, positive, read_options, seconds
from msgbus.errors import BrokerUnavailable, ConfigurationError, NotFound, UnsupportedFeature
from msgbus_redis import scripts
from msgbus_redis.connections import Command, Links, Place
from msgbus_redis.errors import call_error
from msgbus_redis.export import shell
from msgbus_redis.names import Layout
from msgbus_redis.receiver import RedisReceiver
from msgbus_redis.sending import SEEN_FOR, Sender
from msgbus_redis.topology import Topology
from msgbus_redis.wire import envelope_of

MAX_BODY = 1024 * 1024
OLDEST = (6, 2)
"""The first version that can trim by id and look for idle pending entries."""
SHORTEST_LEASE = 1.0


class RedisAdapter(Adapter):
    """Redis Streams. Also `HasDepth`, `Peekable`, `Purgeable`, `Replayable`, `HasGroups`, `Exportable`; receivers of groups forward."""

    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss", "redis+sentinel", "redis+cluster")
    name: ClassVar[str] = "redis"

    def __init__(self, place: Place, settings: AdapterSettings, *, max_body: int = MAX_BODY, replicas: int = 1) -> None:
        self.place = place
        """Where it is, and how one gets in."""
        self._settings = settings
        self._max_body = max_body
        self._replicas = replicas
        self._sender: Sender | None = None
        self._receivers: set[RedisReceiver] = set()
        self._facts: dict[str, str] = {}
        self._left_behind: dict[tuple[str, str | None, str], list[str]] = {}
        """The names of receivers that could not give back what they had: the next one of this process goes on with it, uncounted."""

    @classmethod
    def from_url(cls, url: str, options: Mapping[str, str], settings: AdapterSettings) -> Self:
        """Options: the settings that mean something here, `max_body`, `replicas`, for TLS `tls` and redis-py's `ssl_…`, `sentinel_…`."""
        place = Place.from_url(url)
        read = read_options(str(place), options, _OPTIONS)
        own = {name: read.pop(name) for name in ("max_body", "replicas") if name in read}
        secure: dict[str, Any] = {name: read.pop(name) for name in list(read) if name.startswith("ssl_")}
        if read.pop("tls", False) or place.kind == "rediss":
            secure["ssl"] = True
        elif secure:
            raise ConfigurationError(f"options {', '.join(secure)} of {place}: they need rediss://, or tls=true with several hosts")
        sentinel = {own: read.pop(name) for own, name in _SENTINEL.items() if name in read}
        if sentinel and place.kind != "sentinel":
            raise ConfigurationError(f"options sentinel_… of {place}: they need redis+sentinel://")
        settings = replace(settings, **read)
        if settings.lease < SHORTEST_LEASE:
            raise ConfigurationError(f"lease of {settings.lease:g} s at {place}: at least {SHORTEST_LEASE:g} s")
        place = replace(place, options={**place.options, **secure}, sentinel={**place.sentinel, **sentinel})
        return cls(place, settings, **own)

    def __repr__(self) -> str:
        return f"<RedisAdapter {self.place} {'closed' if self._sender is None else 'open'}>"

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
        if self._sender is not None:
            return
        self._check_files()
        links = Links(self.place)
        try:
            (info,) = await links.run("{}", ("INFO",), what=f"Redis at {self.place}")
            self._facts = dict(re.findall(r"(?m)^(\w+):(.*?)\r?$", info.decode("utf-8", "replace")))
            self._check_server()
            if self._settings.durability == "fsync":
                (answer,) = await links.call("{}", ("WAITAOF", 1, 0, 1))
                if isinstance(answer, Exception):
                    raise UnsupportedFeature("durability 'fsync'", f"Redis {self._version}", "Redis 7.2 or newer, with appendonly yes")
        except BaseException as error:
            await links.close()
            if isinstance(error, client.RedisError | OSError):
                raise call_error(error, f"Redis at {self.place}") from error
            raise
        self._sender = Sender(Topology(links, self._settings), self._max_body, self._replicas)

    @property
    def _version(self) -> str:
        return self._facts.get("valkey_version") or self._facts.get("redis_version", "?")

    def _check_files(self) -> None:
        for name, path in self.place.options.items():
            if name in _FILES and not os.path.isfile(path):  # the client would not say which
                raise ConfigurationError(f"option {name!r} of {self.place}: there is no file {path!r}")

    def _check_server(self) -> None:
        numbers = tuple(int(part) for part in re.findall(r"\d+", self._facts.get("redis_version", ""))[:2])
        if numbers and numbers < OLDEST:
            raise ConfigurationError(f"Redis {self._version} at {self.place}: msgbus needs 6.2 or newer")
        risks = self._risks()
        if self._settings.require_durable and risks:
            raise ConfigurationError(f"require_durable: Redis at {self.place} may lose what it confirmed: {'; '.join(risks)}")

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
        """Closes every receiver: what they held goes back, uncounted. Cut off, it ends the connections at once."""
        sender, self._sender = self._sender, None
        if sender is not None:
            try:
                await asyncio.gather(*(receiver.close() for receiver in list(self._receivers)))
                await sender.topology.links.close()
            finally:
                sender.topology.links.abort()

    def abandon(self) -> None:
        """What kill -9 of the process would do to its connections, for tests: nothing is flushed, acked or given back."""
        for receiver in list(self._receivers):
            receiver.abandon()
        if self._sender is not None:
            self._sender.topology.links.abort()

    async def ping(self) -> None:
        """One round trip, or `BrokerUnavailable`."""
        await self._run("{}", ("PING",), what=f"Redis at {self.place}")

    @property
    def _topology(self) -> Topology:
        if self._sender is None:
            raise BrokerUnavailable("the Redis adapter is not open")
        return self._sender.topology

    async def _run(self, key: str, *commands: Command, what: str) -> list[Any]:
        return await self._topology.links.run(key, *commands, what=what)

    # ------------------------------------------------------------ the contract's words

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        """As the contract says. A topic that stands without a key takes one, and keeps its shards."""
        topology = self._topology
        for spec in topics:
            if spec.native:
                raise ConfigurationError(f"topic {spec.name!r}: native option {next(iter(spec.native))!r}: the Redis adapter knows none")
        named = {spec.topic: TopicSpec(spec.topic) for spec in receivers} | {spec.name: spec for spec in topics}
        layouts = {name: await topology.declare(spec, create) for name, spec in named.items()}
        for spec in topics:
            if spec.kind == "dead":
                await topology.declare_group(layouts[spec.name], DEAD_GROUP, "earliest", create=create)
        for receiver in receivers:
            if receiver.group is not None:
                await topology.declare_group(layouts[receiver.topic], receiver.group, receiver.start, create=create)

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """A shell script for redis-cli that runs what `declare` runs."""
        topology = Topology(Links(self.place), self._settings) if self._sender is None else self._topology
        return shell(await topology.export(topics, receivers, empty=self._sender is None))

    async def shards(self, topic: str) -> int | None:
        """None where the topic is not keyed, or not there."""
        layout = await self._topology.find(topic)
        return layout.shards if layout is not None and layout.keyed else None

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        """As the contract says. An id that was sent to the topic within about the last two minutes is stored once."""
        if self._sender is None:
            return [BrokerUnavailable("the Redis adapter is not open") for _ in envelopes]
        return await self._sender.send(envelopes, timeout)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        """Each receiver has a connection of its own, where it waits for what is new."""
        topology, sender = self._topology, self._sender
        layout = await topology.find(spec.topic)
        if sender is None or layout is None or (spec.group is not None and spec.group not in await topology.groups(layout)):
            raise BrokerUnavailable(f"Redis has no topic {spec.topic!r} with a group {spec.group!r}: declare it first")
        names = self._left_behind.setdefault((spec.topic, spec.group, spec.priority), [])
        sleeper = await topology.links.link(layout.base)

        def closed(receiver: RedisReceiver) -> None:
            self._receivers.discard(receiver)
            if not receiver.left:
                names.append(receiver.me)

        made = RedisReceiver(sender, sleeper, layout, spec, names.pop() if names else os.urandom(8).hex(), closed)
        self._receivers.add(made)
        try:
            await made.start()
        except BaseException:
            await made.close()
            raise
        return made

    # ------------------------------------------------------------ operating

    async def explain(self) -> Mapping[str, str]:
        """What the server is, and what it may lose."""
        kind = "Valkey" if self._facts.get("server_name") == "valkey" else "Redis"
        fsync = {"broker": "when the server has them in memory", "fsync": "when they are in its append-only file"}
        when = fsync.get(self._settings.durability, f"when {self._replicas} replicas have them")
        return {
            "broker": f"{kind} {self._version} at {self.place}",
            "durability": f"messages are confirmed {when}; {'; '.join(self._risks()) or 'it keeps an append-only file'}",
            "lease": f"what a dead process held comes to another after {self._settings.lease:g} s",
            "duplicates": f"a second send of an id is recognised for {SEEN_FOR:g} s",
            "body": f"at most {self._max_body} bytes",
        }

    async def depth(self, topic: str, group: str) -> Depth:
        """`ready` may be approximate where entries were deleted by others. `NotFound` where there is no such group."""
        layout, ready, in_flight, _ = await self._look(topic, group, "look")
        counts = [("ZCARD", layout.key("delayed", each)) for each in (None, group)]
        delayed = await self._run(layout.base, *counts, what=f"depth of {topic!r}")
        return Depth(ready, in_flight, sum(delayed), approximate=True)

    async def peek(self, topic: str, group: str) -> AsyncIterator[Envelope]:
        """What waits, oldest first within each stream. `NotFound` where there is no such group."""
        layout, _, _, waiting = await self._look(topic, group, "look")
        for stream, (last, *back) in zip(layout.streams(group), waiting, strict=True):
            own = None if stream in layout.parts() else group
            ranges = [(id_, id_) for id_ in back] + [(b"(" + last, b"+")]
            while ranges:
                start, end = ranges.pop(0)
                command = ("XRANGE", stream, start, end, "COUNT", 100)
                (entries,) = await self._run(layout.base, command, what=f"peeking at {topic!r}")
                for id_, flat in entries:
                    yield envelope_of(topic, own, stream, id_, flat)
                if len(entries) == 100:
                    ranges.append((b"(" + entries[-1][0], end))

    async def purge(self, topic: str, group: str) -> int:
        """Discards what is ready; what is delayed or handed out stays. `NotFound`: there is no such group."""
        return (await self._look(topic, group, "purge"))[1]

    async def replay(self, topic: str, group: str, since: float) -> int:
        """What waits is counted, not doubled; what is handed out comes again. `NotFound`: there is no such group."""
        layout, *_ = await self._look(topic, group, "look")
        return (await self._look(topic, group, "replay", int(since * 1000)))[1] if layout.retain else 0

    async def groups(self, topic: str) -> Sequence[str]:
        """Sorted; none where there is no such topic."""
        layout = await self._topology.find(topic)
        return await self._topology.groups(layout) if layout is not None else []

    async def drop_group(self, topic: str, group: str) -> bool:
        """Also frees what only this group held; a group of the same name that is declared again is a later group."""
        layout = await self._topology.find(topic)
        return layout is not None and await self._topology.drop_group(layout, group)

    async def _look(self, topic: str, group: str, verb: str, since: int = 0) -> tuple[Layout, int, int, list[Any]]:
        layout = await self._topology.find(topic) or Layout(topic)
        streams = layout.parts() if verb == "replay" else layout.streams(group)
        command = scripts.call(scripts.GROUP, streams, [verb, group, since])
        (answer,) = await self._run(layout.base, command, what=f"group {group!r} of {topic!r}")
        if not answer:
            raise NotFound(f"Redis has no group {group!r} of topic {topic!r}")
        return layout, *answer


_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL = {"username": "sentinel_user", "password": "sentinel_password"}
_OPTIONS: dict[str, Read] = {
    "dead_letter_retention": seconds,
    "durability": durability,
    "first_group_retention": seconds,
    "lease": seconds,
    "max_body": positive,
    "replicas": positive,
    "require_durable": boolean,
    "sentinel_password": str,
    "sentinel_user": str,
    "shards": positive,
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_check_hostname": boolean,
    "ssl_keyfile": str,
    "tls": boolean,
}
