"""What things are called at the broker: the keys of a topic. All of them carry one hash tag, the topic's that dead letters came from.

`{orders}` is the stream of a topic with one shard, `{orders}:p3` a shard, `{orders}:high` a priority; what a group alone has ends in
its name. The dead letters of the group `billing` are the topic `{orders}.billing.dead`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import PRIORITIES, Envelope, Priority
from msgbus.errors import TopologyMismatch


@lru_cache(10_000)  # asked for each message
def base(topic: str) -> str:
    """What every key of a topic begins with. A topic that ends in `.dead` is a group's, beside the topic it belongs to."""
    source, dot, group = topic.removesuffix(".dead").rpartition(".")
    return f"{{{source}}}.{group}.dead" if dot and topic.endswith(".dead") else f"{{{topic}}}"


def own(key: str, what: str, group: str) -> str:
    """What a group alone has of a topic, or of one of its streams: `retry`, `lease`, `members`, `delayed`."""
    return f"{key}:{what}:{group}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a topic stands at the broker. `retain` in milliseconds; 0: nothing is kept."""

    topic: str
    shards: int = 1
    keyed: bool = False
    priorities: bool = False
    retain: int = 0
    kind: str = "work"

    @classmethod
    def of(cls, spec: TopicSpec, default: int) -> Layout:
        """How a topic stands once it is declared where nothing was. `default`: shards of a keyed one that says no number."""
        shards = spec.shards or (max(default, 1) if spec.keyed else 1)
        return cls(spec.name, shards, spec.keyed, spec.priorities, int((spec.retain or 0) * 1000), spec.kind)

    @classmethod
    def read(cls, topic: str, flat: list[bytes]) -> Layout:
        """From the topic's hash, as the broker answers it. `TopologyMismatch` where it is not ours."""
        facts = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
        if "shards" not in facts:
            raise TopologyMismatch(f"topic {topic!r}: key {cls(topic).key('meta')!r}", "a topic's hash", "one that says no shards")
        flags = facts.get("keyed") == "1", facts.get("priorities") == "1"
        return cls(topic, max(int(facts["shards"]), 1), *flags, int(facts.get("retain", 0)), facts.get("kind", "work"))

    @property
    def base(self) -> str:
        """What every key begins with."""
        return base(self.topic)

    def key(self, what: str, group: str | None = None) -> str:
        """`meta`: the hash that says what the topic is. `delayed`: what waits for its time, of all groups or of one. `pub:`: before an
        id, that it was sent of late. `private`: that there are private readers."""
        return f"{self.base}:{what}" if group is None else own(self.base, what, group)

    def part(self, envelope: Envelope) -> str:
        """The stream that an envelope goes to."""
        if self.shards > 1:
            return f"{self.base}:p{shard_of(envelope.key, self.shards)}"
        return self._level(envelope.priority) if self.priorities else self.base

    def parts(self, priority: Priority | None = None) -> list[str]:
        """The streams of the topic; with a priority, those of its level."""
        if self.shards > 1:
            return [f"{self.base}:p{shard}" for shard in range(self.shards)]
        if not self.priorities:
            return [self.base]
        return [self._level(level) for level in PRIORITIES if priority in (None, level)]

    def streams(self, group: str) -> list[str]:
        """The topic's, then those that are the group's own."""
        parts = self.parts()
        return [*parts, *(own(part, "retry", group) for part in parts)]

    def _level(self, priority: Priority) -> str:
        return self.base if priority == "normal" else f"{self.base}:{priority}"
