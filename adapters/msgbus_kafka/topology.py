"""What must be at the broker: topics and groups compared with what is there, made where they are missing, never altered."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from aiokafka import TopicPartition

from msgbus.contract.adapter import AdapterSettings, ReceiverSpec, TopicSpec
from msgbus.contract.envelope import check_group
from msgbus.errors import ConfigurationError, InvalidName, TopologyMismatch
from msgbus_kafka.cluster import BEGINNING, END, Cluster, NewTopic, missing
from msgbus_kafka.names import SOON, Levels, group_id, history_id, levels, stream
from msgbus_kafka.tracking import Mark

RETENTION = "retention.ms"
CLEANUP = "cleanup.policy"
MAX_BYTES = "max.message.bytes"
MIN_REPLICAS = "min.insync.replicas"
REPLICATION = "replication_factor"
_DEAD = "compact"
_REPLICAS = 3


class Topology:
    """Declares for one adapter."""

    def __init__(self, cluster: Cluster, settings: AdapterSettings, replication: int | None) -> None:
        self._cluster = cluster
        self._settings = settings
        self._replication = replication
        self._priorities: dict[str, bool] = {}

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], create: bool) -> None:
        """As `Adapter.declare`."""
        specs = {spec.name: spec for spec in topics}
        loose = [spec.topic for spec in receivers if spec.topic not in specs]
        names = [stream(name, level) for name in (*specs, *loose) for level in levels(True)]
        found = await self._cluster.leaders([*names, *(name + SOON for name in names)])
        for name in loose:
            if name not in found and not create:
                raise missing(f"topic {name!r}", "a topic")
            specs[name] = TopicSpec(name, priorities=stream(name, "high") in found)
        to_check = [name for name, spec in specs.items() if name in found and (spec.kind == "dead" or spec.retain is not None)]
        configs = await self._cluster.configs(to_check) if to_check else {}
        wanted: list[NewTopic] = []
        for spec in specs.values():
            self._compare(spec, found, configs.get(spec.name, {}))
            wanted += self._wanted(spec, found)
            self._priorities[spec.name] = spec.priorities
        groups = {(spec.topic, spec.group): spec for spec in receivers if spec.group is not None and specs[spec.topic].kind == "work"}
        own = [group_id(topic, group, level) + SOON for topic, group in groups for level in self._levels(topic)]
        have = await self._cluster.leaders(own)
        wanted += [self._soon(name, {}) for name in own if name not in have]
        new = [topic for topic in wanted if topic.name not in found and topic.name not in have]
        if new and not create:
            name = new[0].name
            if name in own:
                topic, group = next((topic, group) for topic, group in groups if name.startswith(group_id(topic, group)))
                raise missing(f"group {group!r} of topic {topic!r} (Kafka topic {name!r})", "a group")
            raise missing(f"topic {name!r}", "a topic")
        if new:
            await self._cluster.create(new)
        for (topic, group), receiver in groups.items():
            for level in self._levels(topic):
                await self._declare_group(topic, group, stream(topic, level), group_id(topic, group, level), receiver.start, create)

    def _levels(self, topic: str) -> Levels:
        return levels(self._priorities[topic])

    # ------------------------------------------------------------ topics

    def _compare(self, spec: TopicSpec, found: Mapping[str, Sequence[int]], configs: Mapping[str, str]) -> None:
        here = found.get(spec.name)
        if here is None:
            return
        resource = f"topic {spec.name!r}"
        if spec.kind == "dead":
            if _DEAD not in configs.get(CLEANUP, ""):
                raise TopologyMismatch(resource, f"{CLEANUP} with {_DEAD}, for dead letters", configs.get(CLEANUP, "the broker's default"))
            return
        there = stream(spec.name, "high") in found
        if there != spec.priorities:
            raise TopologyMismatch(resource, _said(spec.priorities), _said(there))
        if spec.shards is not None and spec.shards != len(here):
            raise TopologyMismatch(resource, f"{spec.shards} shards", f"{len(here)} partitions")
        if spec.retain is not None and configs.get(RETENTION) != _milliseconds(spec.retain):
            raise TopologyMismatch(resource, f"{RETENTION} {_milliseconds(spec.retain)}", configs.get(RETENTION, "the broker's default"))

    def _wanted(self, spec: TopicSpec, found: Mapping[str, Sequence[int]]) -> list[NewTopic]:
        if spec.kind == "dead":
            configs = {CLEANUP: _DEAD, MAX_BYTES: str(2 * self._cluster.max_bytes)}
            if self._settings.dead_letter_retention is not None:
                configs[CLEANUP] += ",delete"
                configs[RETENTION] = _milliseconds(self._settings.dead_letter_retention)
            return [self._new(spec.name, 1, configs, None)]
        configs, replication = _native(spec)
        kept = {} if spec.retain is None else {RETENTION: _milliseconds(spec.retain)}
        partitions = len(found.get(spec.name, ())) or spec.shards or self._settings.shards
        wanted: list[NewTopic] = []
        for level in levels(spec.priorities):
            name = stream(spec.name, level)
            wanted.append(self._new(name, partitions, {**kept, **configs}, replication))
            wanted.append(self._soon(name + SOON, kept))
        return wanted

    def _soon(self, name: str, configs: Mapping[str, str]) -> NewTopic:
        """One partition: what is in it is due within two minutes."""
        return self._new(name, 1, {**configs, MAX_BYTES: str(2 * self._cluster.max_bytes)}, None)

    def _new(self, name: str, partitions: int, configs: Mapping[str, str], replication: int | None) -> NewTopic:
        replication = replication or self._replication
        if self._settings.durability == "replicated":
            replication = replication or min(_REPLICAS, self._cluster.nodes)
            configs = {MIN_REPLICAS: "2", **configs}
        return NewTopic(name, partitions, replication or self._cluster.default_replication, configs)

    # ------------------------------------------------------------ groups

    async def _declare_group(self, topic: str, group: str, base: str, group_id: str, start: str, create: bool) -> None:
        """Commits where a new group starts, so that it misses nothing from now on, whenever its first receiver comes."""
        committed = await self._cluster.committed(group_id)
        if not create and not committed:
            raise missing(f"group {group!r} of topic {topic!r}", "a group")
        led = await self._cluster.leaders([base, base + SOON, group_id + SOON])
        places = {TopicPartition(name, number): name for name, leaders in led.items() for number in range(len(leaders))}
        if any(place.topic == base for place in committed):
            return  # partitions that were added since are read from their beginning
        history = history_id(base)
        first = not await self._cluster.committed(history) and not await groups_of(self._cluster, topic)
        since = await self._start(base, start, first)
        moments = {place: END if name == group_id + SOON else since for place, name in places.items()}
        offsets = await self._cluster.offsets(moments)
        text = Mark().text()
        # If someone consumes as this group already, it was declared meanwhile.
        await self._cluster.commit(group_id, {place: (offset, text) for place, offset in offsets.items()})
        if first:
            await self._cluster.commit(history, {TopicPartition(base + SOON, 0): (0, "had a group")})

    async def _start(self, base: str, start: str, first: bool) -> int:
        """A topic's first group gets what is there; a later one what is kept where the topic says so; else from now on."""
        if start == "latest":
            return END
        if first:
            return BEGINNING
        retain = (await self._cluster.configs([base])).get(base, {}).get(RETENTION)
        if retain is None:
            return END
        return max(0, int(time.time() * 1000) - int(retain)) if int(retain) >= 0 else BEGINNING


async def groups_of(cluster: Cluster, topic: str) -> list[str]:
    """The groups of a topic that were declared: those with commits."""
    prefix = topic + "."
    names = [name.removeprefix(prefix) for name in await cluster.groups(prefix)]
    return [name for name in names if _is_group(name) and await cluster.committed(group_id(topic, name))]


def _is_group(name: str) -> bool:
    try:
        check_group(name)
    except InvalidName:
        return False
    return True


def _native(spec: TopicSpec) -> tuple[dict[str, str], int | None]:
    """`Topic(native={"kafka": …})`: configurations of the Kafka topic when it is created, and `replication_factor`."""
    configs: dict[str, str] = {}
    replication: int | None = None
    for name, value in spec.native.items():
        if name == REPLICATION and isinstance(value, int) and value >= 1:
            replication = value
        elif name != REPLICATION and "." in name and isinstance(value, str):
            configs[name] = value
        else:
            raise ConfigurationError(
                f"topic {spec.name!r}: native option {name!r}={value!r}: {REPLICATION} takes an int, "
                "any other is a configuration of a Kafka topic (min.insync.replicas, ...) and takes text"
            )
    return configs, replication


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _said(priorities: bool) -> str:
    return "priorities" if priorities else "no priorities"
