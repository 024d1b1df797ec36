"""Topics and groups at the broker: how they stand, how they are made, and what is dropped of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from msgbus.contract.adapter import AdapterSettings, ReceiverSpec, TopicSpec
from msgbus.contract.address import DEAD_GROUP
from msgbus.errors import BrokerUnavailable, TopologyMismatch
from msgbus_redis import scripts
from msgbus_redis.connections import CALL_TIMEOUT, Command, Links
from msgbus_redis.names import Layout, own

log = logging.getLogger("msgbus.redis")


class Topology:
    """Of one open adapter."""

    def __init__(self, links: Links, settings: AdapterSettings) -> None:
        self.links = links
        self.settings = settings
        self._layouts: dict[str, Layout] = {}
        self._trimmed: dict[tuple[str, str | None], float] = {}

    async def layout(self, topic: str, timeout: float = CALL_TIMEOUT) -> Layout:
        """How a topic stands, as a sender must know it: one that nobody declared gets one stream, for good. Raises `BrokerError`."""
        if topic not in self._layouts:
            meta = Layout(topic).key("meta")
            pinned, asked = ("HSETNX", meta, "shards", 1), ("HGETALL", meta)
            _, flat = await self.links.run(meta, pinned, asked, what=f"topic {topic!r}", timeout=timeout)
            self._layouts[topic] = Layout.read(topic, flat)
        return self._layouts[topic]

    async def find(self, topic: str) -> Layout | None:
        """How a topic stands just now; None where it does not."""
        meta = Layout(topic).key("meta")
        (flat,) = await self.links.run(meta, ("HGETALL", meta), what=f"topic {topic!r}")
        return Layout.read(topic, flat) if flat else None

    async def groups(self, layout: Layout) -> list[str]:
        """Sorted; none where there is no stream."""
        (answer,) = await self.links.ask(layout.base, ("XINFO", "GROUPS", layout.parts()[0]), what=f"groups of {layout.topic!r}")
        return [] if isinstance(answer, Exception) else sorted(flat[1].decode() for flat in answer)

    async def declare(self, spec: TopicSpec, create: bool) -> Layout:
        """What is there stays as it is, but that a topic without a key takes one. `TopologyMismatch` where it differs."""
        where = f"topic {spec.name!r}"
        wanted = Layout.of(spec, self.settings.shards)
        await self._check_kinds(where, {wanted.key("meta"): "hash", wanted.base: "stream"})
        commands = self._topic_commands(spec) if create else []
        asked = ("HEXISTS", wanted.key("meta"), "declared"), ("HGETALL", wanted.key("meta"))
        *_, declared, flat = await self.links.run(wanted.key("meta"), *commands, *asked, what=where)
        if not declared:
            raise TopologyMismatch(where, "a topic", "none")
        layout = Layout.read(spec.name, flat)
        compared = ["kind", "priorities"] + ["shards"] * (spec.shards is not None) + ["retain"] * (spec.retain is not None)
        for what in compared:
            expected, found = getattr(wanted, what), getattr(layout, what)
            if expected != found:
                raise TopologyMismatch(where, f"{what} {expected}", f"{what} {found}")
        self._layouts[spec.name] = layout
        return layout

    async def declare_group(self, layout: Layout, group: str, start: str, *, create: bool = True, again: bool = False) -> None:
        """Of all the topic's streams. `again`: it had vanished, and begins at the beginning, so that what was sent since is not missed."""
        what = f"group {group!r} of topic {layout.topic!r}"
        streams = layout.streams(group)
        if not create:
            replies = await self.links.ask(layout.base, *(("XINFO", "GROUPS", stream) for stream in streams), what=what)
            if any(isinstance(reply, Exception) or group.encode() not in [flat[1] for flat in reply] for reply in replies):
                raise TopologyMismatch(what, "a group", "none")
            return
        await self._check_kinds(what, dict.fromkeys(streams, "stream"))
        since, first = ("0", False) if again else await self._since(layout, group, start)
        trim = [self._trim(layout, None)] * first  # what is too old for it may be there yet
        for reply in await self.links.ask(layout.base, *trim, *_group_commands(layout, group, since), what=what):
            if isinstance(reply, Exception) and "BUSYGROUP" not in str(reply):
                raise BrokerUnavailable(f"{what}: {reply}") from reply

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], empty: bool) -> list[Command]:
        """What makes all that, as the broker stands now, or as if it were `empty`."""
        commands = [command for spec in topics for command in self._topic_commands(spec)]
        specs = {spec.name: spec for spec in topics}
        groups = [(spec.topic, spec.group, spec.start) for spec in receivers if spec.group is not None]
        groups += [(spec.name, DEAD_GROUP, "earliest") for spec in topics if spec.kind == "dead"]
        for topic, group, start in groups:
            layout = (None if empty else await self.find(topic)) or Layout.of(specs[topic], self.settings.shards)
            since = (await self._since(layout, group, start))[0] if not empty else "0" if start == "earliest" else "$"
            commands += _group_commands(layout, group, since)
        return commands

    def _topic_commands(self, spec: TopicSpec) -> list[Command]:
        layout = Layout.of(spec, self.settings.shards)
        facts = {"shards": layout.shards, "kind": spec.kind, "priorities": int(spec.priorities), "declared": 1}
        facts |= {} if spec.retain is None else {"retain": layout.retain}
        keyed = ("HSET", layout.key("meta"), "keyed", 1) if spec.keyed else ("HSETNX", layout.key("meta"), "keyed", 0)
        return [*(("HSETNX", layout.key("meta"), name, value) for name, value in facts.items()), keyed]

    async def _since(self, layout: Layout, group: str, start: str) -> tuple[str, bool]:
        """Where a group begins, and whether it is the topic's first: that one gets what was kept for it, a later one what is retained."""
        asked = ("HMGET", layout.key("meta"), f"g:{group}", "had"), ("TIME",)
        (known, had), (second, _) = await self.links.run(layout.base, *asked, what=f"group {group!r} of topic {layout.topic!r}")
        first = not known and not had and layout.kind != "dead"
        if known or layout.kind == "dead" or (start == "earliest" and first):
            return "0", first
        return str(int(second) * 1000 - layout.retain) if start == "earliest" and layout.retain else "$", first

    async def revive(self, layout: Layout, group: str) -> None:
        """A group has vanished under its receiver. Dropped by an operator: `BrokerUnavailable`. By a FLUSHALL, a DEL: it is made again."""
        what = f"group {group!r} of topic {layout.topic!r}"
        (dropped,) = await self.links.run(layout.base, ("HEXISTS", layout.key("meta"), f"d:{group}"), what=what)
        if dropped:
            raise BrokerUnavailable(f"{what} was dropped")
        await self.declare_group(layout, group, "earliest", again=True)
        log.error("data loss suspected: %s had vanished, and was made again", what)

    async def drop_group(self, layout: Layout, group: str) -> bool:
        """With all that it alone had. Its receivers must not make it again."""
        parts = layout.parts()
        mine = [own(part, what, group) for part in parts for what in ("retry", "lease", "members")]
        noted = (
            ("HSET", layout.key("meta"), f"d:{group}", 1),
            ("HDEL", layout.key("meta"), f"g:{group}"),
            ("DEL", *mine, layout.key("delayed", group)),
        )
        dropped = [("XGROUP", "DESTROY", part, group) for part in parts]
        replies = await self.links.ask(layout.base, *noted, *dropped, self._trim(layout, None), what=f"dropping group {group!r}")
        return 1 in replies[len(noted) : -1]

    async def _check_kinds(self, what: str, wanted: Mapping[str, str]) -> None:
        found = await self.links.run(next(iter(wanted)), *(("TYPE", key) for key in wanted), what=what)
        for (key, kind), actual in zip(wanted.items(), found, strict=True):
            if actual.decode() not in ("none", kind):
                raise TopologyMismatch(f"{what}: key {key!r}", f"a {kind}", f"a {actual.decode()}")

    def _trim(self, layout: Layout, group: str | None) -> Command:
        """Drops from a topic's streams, and a group's own, what all groups are done with, and what is too old."""
        streams = layout.parts() if group is None else layout.streams(group)
        old = self.settings.dead_letter_retention if layout.kind == "dead" else None
        first, lag = int(self.settings.first_group_retention * 1000), int(self.settings.lease * 1000)
        arguments = [0 if group is None else len(streams) // 2, first, lag, "" if old is None else int(old * 1000)]
        return scripts.call(scripts.TRIM, [layout.key("meta"), layout.key("private"), *streams], arguments)

    def trims(self, layout: Layout, group: str | None, every: float) -> list[Command]:
        """That, if it was not done here for `every` seconds."""
        now = time.monotonic()
        if now - self._trimmed.get((layout.topic, group), 0.0) < every:
            return []
        self._trimmed[layout.topic, group] = now
        return [self._trim(layout, group)]


def _group_commands(layout: Layout, group: str, since: str) -> list[Command]:
    streams = [("XGROUP", "CREATE", key, group, since, "MKSTREAM") for key in layout.parts()]
    streams += [("XGROUP", "CREATE", own(part, "retry", group), group, "0", "MKSTREAM") for part in layout.parts()]
    return [*streams, ("HSET", layout.key("meta"), f"g:{group}", 1, "had", 1), ("HDEL", layout.key("meta"), f"d:{group}")]
