"""What things are called at the broker: the keys of a topic. All of them carry one hash tag, the topic's that dead letters came from.

`{orders}` is the stream of a topic with one shard, `{orders}:p3` a shard, `{orders}:high` a priority; what a group alone has ends in
its name. The dead letters of the group `billing` are the topic `{orders}.billing.dead`.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import PRIORITIES, Envelope, Priority


def base(topic: str) -> str:
    """What every key of a topic begins with. A topic that ends in `.dead` is a group's, beside the topic it belongs to."""
    if topic.endswith(".dead"):
        source, dot, rest = topic.removesuffix(".dead").rpartition(".")
        if dot:
            return f"{{{source}}}.{rest}.dead"
    return f"{{{topic}}}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a topic stands at the broker."""

    topic: str
    shards: int
    keyed: bool
    priorities: bool
    retain: float | None
    kind: str

    @classmethod
    def of(cls, spec: TopicSpec, default: int) -> Layout:
        """How a topic stands once it is declared where nothing was. `default`: shards of a keyed one that says no number."""
        shards = spec.shards or (max(default, 1) if spec.keyed else 1)
        return cls(spec.name, shards, spec.keyed, spec.priorities, spec.retain, spec.kind)

    @classmethod
    def read(cls, topic: str, flat: list[bytes]) -> Layout:
        """From the topic's hash, as the broker answers it. `ValueError` where it is not ours."""
        meta = dict(zip(flat[::2], flat[1::2], strict=True))
        retain = meta.get(b"retain")
        try:
            shards = int(meta[b"shards"])
        except KeyError:
            raise ValueError("a hash that says no number of shards") from None
        return cls(
            topic,
            max(shards, 1),
            meta.get(b"keyed") == b"1",
            meta.get(b"priorities") == b"1",
            int(retain) / 1000 if retain else None,
            meta.get(b"kind", b"work").decode(),
        )

    @property
    def base(self) -> str:
        """What every key begins with."""
        return base(self.topic)

    def part(self, envelope: Envelope) -> str:
        """The stream that an envelope goes to."""
        if self.shards > 1:
            return f"{self.base}:p{shard_of(envelope.key, self.shards)}"
        return self.level(envelope.priority) if self.priorities else self.base

    def level(self, priority: Priority) -> str:
        """The stream of a priority; the normal one is the plain name."""
        return self.base if priority == "normal" else f"{self.base}:{priority}"

    def parts(self, priority: Priority | None = None) -> list[str]:
        """The streams of the topic; with a priority, those of its level."""
        if self.shards > 1:
            return [f"{self.base}:p{shard}" for shard in range(self.shards)]
        if not self.priorities:
            return [self.base]
        return [self.level(priority)] if priority is not None else [self.level(each) for each in PRIORITIES]


def meta(topic: str) -> str:
    """The hash that says what a topic is."""
    return f"{base(topic)}:meta"


def seen(topic: str) -> str:
    """Ids that were sent of late: a prefix."""
    return f"{base(topic)}:pub:"


def delayed(topic: str, group: str | None) -> str:
    """What waits for its time: of all groups, or of one."""
    return f"{base(topic)}:delayed" if group is None else f"{base(topic)}:delayed:{group}"


def retry(part: str, group: str) -> str:
    """The stream of a part that is a group's own."""
    return f"{part}:retry:{group}"


def lease(part: str, group: str) -> str:
    """Whose the part is, in an ordered group."""
    return f"{part}:lease:{group}"


def members(part: str, group: str) -> str:
    """Who shares the parts of an ordered group; `part` is the first of them."""
    return f"{part}:members:{group}"


def private(topic: str) -> str:
    """Private readers that are there."""
    return f"{base(topic)}:private"
