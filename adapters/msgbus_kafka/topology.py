"""What must be at the broker: topics and groups compared with what is there, made where they are missing, never altered."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from aiokafka import TopicPartition

from msgbus.contract.adapter import AdapterSettings, ReceiverSpec, TopicSpec
from msgbus.contract.envelope import PRIORITIES, Priority, check_group
from msgbus.errors import ConfigurationError, InvalidName, TopologyMismatch
from msgbus_kafka.cluster import BEGINNING, END, Cluster, NewTopic, places_of
from msgbus_kafka.export import shell
from msgbus_kafka.names import SOON, group_id, history_id, stream
from msgbus_kafka.partition import Mark

RETENTION = "retention.ms"
CLEANUP = "cleanup.policy"
MAX_BYTES = "max.message.bytes"
REPLICATION = "replication_factor"
AT_ONCE = 20
"""Topics that one request creates: it has a deadline, whatever their number."""


class Topology:
    """Declares for one adapter."""

    def __init__(self, cluster: Cluster, settings: AdapterSettings, replication: int | None) -> None:
        self._cluster = cluster
        self._settings = settings
        self._replication = replication

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], create: bool) -> None:
        """As `Adapter.declare`."""
        specs = {spec.name: spec for spec in topics}
        names = dict.fromkeys([*specs, *(spec.topic for spec in receivers)])
        found = await self._cluster.leaders(stream(name, level) + end for name in names for level in PRIORITIES for end in ("", SOON))
        for name in names:  # a topic that somebody else declares is as it is
            specs.setdefault(name, TopicSpec(name, priorities=stream(name, "high") in found))
        configs = await self._cluster.configs(
            [name for name, spec in specs.items() if name in found and (spec.kind == "dead" or spec.retain)]
        )
        for spec in specs.values():
            if spec.name in found:
                _compare(spec, found, configs.get(spec.name, {}))
        wanted, groups = self._plan(specs, receivers, found)
        found |= await self._cluster.leaders(wanted)
        new = [made for name, made in wanted.items() if name not in found]
        if new and not create:
            raise _missing(new[0][1])
        for done in range(0, len(new), AT_ONCE):
            await self._cluster.create([topic for topic, _ in new[done : done + AT_ONCE]])
        for spec, group, level, start in groups:
            await self._declare_group(spec.name, group, level, start, create)

    def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        """What `declare` makes where nothing is yet, for Kafka's own tools."""
        wanted, groups = self._plan({spec.name: spec for spec in topics}, receivers, {})
        starts = [(group_id(spec.name, group, level), stream(spec.name, level), start, spec.retain) for spec, group, level, start in groups]
        return shell([topic for topic, _ in wanted.values()], starts)

    def _plan(
        self, specs: Mapping[str, TopicSpec], receivers: Sequence[ReceiverSpec], found: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, tuple[NewTopic, str]], Sequence[tuple[TopicSpec, str, str, str]]]:
        """The topics by their names, with what each is to people, and the groups: of which topic and priority, and where they start."""
        groups = [
            (specs[receiver.topic], receiver.group, level, receiver.start)
            for receiver in receivers
            if receiver.group is not None and specs[receiver.topic].kind == "work"
            for level in _levels(specs[receiver.topic])
        ]
        topics = [topic for spec in specs.values() for topic in self._topics_of(spec, len(found.get(spec.name, ())))]
        wanted = {topic.name: (topic, f"topic {topic.name!r}") for topic in topics}
        for spec, group, level, _ in groups:
            name = group_id(spec.name, group, level) + SOON
            wanted[name] = self._soon(name, {}), f"group {group!r} of topic {spec.name!r} (Kafka topic {name!r})"
        return wanted, groups

    # ------------------------------------------------------------ topics

    def _topics_of(self, spec: TopicSpec, partitions: int) -> list[NewTopic]:
        if spec.kind == "dead":
            configs = {CLEANUP: "compact", MAX_BYTES: str(2 * self._cluster.max_bytes)}
            if self._settings.dead_letter_retention is not None:
                configs |= {CLEANUP: "compact,delete", RETENTION: _milliseconds(self._settings.dead_letter_retention)}
            return [self._new(spec.name, 1, configs)]
        native = dict(spec.native)
        replication = native.pop(REPLICATION, None)
        for name, value in native.items():
            if "." not in name or not isinstance(value, str):
                raise ConfigurationError(f"topic {spec.name!r}: native option {name!r}={value!r}: {_NATIVE}")
        if replication is not None and not (isinstance(replication, int) and replication >= 1):
            raise ConfigurationError(f"topic {spec.name!r}: native option {REPLICATION!r}={replication!r}: {_NATIVE}")
        kept = {} if spec.retain is None else {RETENTION: _milliseconds(spec.retain)}
        configs = kept | {name: str(value) for name, value in native.items()}
        bases = [stream(spec.name, level) for level in _levels(spec)]
        partitions = partitions or spec.shards or self._settings.shards
        return [*(self._new(base, partitions, configs, replication) for base in bases), *(self._soon(base + SOON, kept) for base in bases)]

    def _soon(self, name: str, configs: Mapping[str, str]) -> NewTopic:
        """One partition: what is in it is due within two minutes."""
        return self._new(name, 1, {**configs, MAX_BYTES: str(2 * self._cluster.max_bytes)})

    def _new(self, name: str, partitions: int, configs: Mapping[str, str], replication: int | None = None) -> NewTopic:
        replication = replication or self._replication
        if self._settings.durability == "replicated":
            replication = replication or min(3, len(self._cluster.nodes) or 3)
            configs = {"min.insync.replicas": "2", **configs}
        return NewTopic(name, partitions, replication or self._cluster.default_replication, configs)

    # ------------------------------------------------------------ groups

    async def _declare_group(self, topic: str, group: str, level: str, start: str, create: bool) -> None:
        """Commits where a new group starts, so that it misses nothing from now on, whenever its first receiver comes."""
        base, name = stream(topic, level), group_id(topic, group, level)
        committed = await self._cluster.committed(name)
        if any(place.topic == base for place in committed):
            return  # partitions that were added since are read from their beginning
        if not create:
            raise _missing(f"group {group!r} of topic {topic!r}")
        others = {*await groups_of(self._cluster, topic)} - {group}  # its own other priorities may have been declared before this one
        first = not others and not await self._cluster.committed(history_id(base))
        since = END if start == "latest" else BEGINNING if first else await self._kept_since(base)
        led = await self._cluster.leaders([base, base + SOON, name + SOON])
        places = places_of({found: range(len(leaders)) for found, leaders in led.items()})
        offsets = await self._cluster.offsets({place: END if place.topic == name + SOON else since for place in places})
        # If someone consumes as this group already, it was declared meanwhile.
        await self._cluster.commit(name, {place: (offset, Mark().text()) for place, offset in offsets.items()})
        if first:
            await note_history(self._cluster, base)

    async def _kept_since(self, base: str) -> int:
        """From when on a later group gets a topic's history: from now on, unless the topic says that it retains it."""
        retain = (await self._cluster.configs([base])).get(base, {}).get(RETENTION)
        if retain is None:
            return END
        return max(0, int(time.time() * 1000) - int(retain)) if int(retain) >= 0 else BEGINNING


async def groups_of(cluster: Cluster, topic: str) -> list[str]:
    """The groups of a topic that were declared: those with commits."""
    prefix = topic + "."
    names = [name.removeprefix(prefix) for name in await cluster.groups(prefix)]
    return [name for name in names if _is_group(name) and await cluster.committed(group_id(topic, name))]


async def note_history(cluster: Cluster, base: str) -> None:
    """The topic has had a group."""
    await cluster.commit(history_id(base), {TopicPartition(base + SOON, 0): (0, "had a group")})


_NATIVE = f"{REPLICATION} takes an int, any other is a configuration of a Kafka topic (min.insync.replicas, ...) and takes text"


def _compare(spec: TopicSpec, found: Mapping[str, Sequence[int]], configs: Mapping[str, str]) -> None:
    def expect(expected: str, actual: str, holds: bool) -> None:
        if not holds:
            raise TopologyMismatch(f"topic {spec.name!r}", expected, actual)

    there, partitions = stream(spec.name, "high") in found, len(found[spec.name])
    cleanup, kept = configs.get(CLEANUP, "the broker's default"), configs.get(RETENTION, "the broker's default")
    if spec.kind == "dead":
        expect(f"{CLEANUP} with compact, for dead letters", cleanup, "compact" in cleanup)
        return
    expect("priorities" if spec.priorities else "no priorities", "priorities" if there else "no priorities", there == spec.priorities)
    expect(f"{spec.shards} shards", f"{partitions} partitions", spec.shards in (None, partitions))
    if spec.retain is not None:
        expect(f"{RETENTION} {_milliseconds(spec.retain)}", kept, kept == _milliseconds(spec.retain))


def _missing(resource: str) -> TopologyMismatch:
    return TopologyMismatch(resource, "a group" if resource.startswith("group") else "a topic", "none")


def _levels(spec: TopicSpec) -> Sequence[Priority]:
    return PRIORITIES if spec.priorities else ("normal",)


def _is_group(name: str) -> bool:
    try:
        return bool(check_group(name))
    except InvalidName:
        return False


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
