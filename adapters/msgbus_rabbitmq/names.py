"""What stands at the broker for a topic and its groups, and how a message is routed there. Pure.

A topic is an exchange of its name, of type topic; a routing key's last word is the part. A group is a queue a part. A colon, which no
name of a topic or group holds, marks what is msgbus's own.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property

from pamqp.common import FieldTable

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import PRIORITIES, Envelope, Priority

LEVELS = 28
"""Level i of the delays holds a message for 2^i ticks."""
TICK = 0.1
LONGEST_DELAY = (2**LEVELS - 1) * TICK
DUE = "msgbus.delay.due"
LOST = "msgbus.delay.lost"
QUORUM: FieldTable = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
"""Arguments of every queue that keeps something. At the limit a message is destroyed, unset is 20 and -1 is 1 on some versions (R14)."""

_KINDS = re.compile(r"msgbus\.(plain|levels|dead|p[1-9][0-9]*)")
_FALLING: FieldTable = {**QUORUM, "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
"""Of the levels. Only so does nothing get lost on the way down (a classic queue lost 4,000 of 4,000 when the broker was killed)."""


@dataclass(frozen=True)
class Layout:
    """Which parts a topic has. `kind`: "plain", "levels" (priorities), "dead", or "p8": as many shards."""

    topic: str
    kind: str

    @classmethod
    def of(cls, spec: TopicSpec, shards: int) -> Layout:
        """What a spec asks for. `shards`: how many a keyed topic gets that does not say."""
        number = spec.shards or (shards if spec.keyed else 1)
        keyed = f"p{number}" if spec.keyed or number > 1 else "plain"
        return cls(spec.name, "dead" if spec.kind == "dead" else "levels" if spec.priorities else keyed)

    @classmethod
    def parse(cls, topic: str, text: str) -> Layout | None:
        """From `text`; None: nobody's layout of ours."""
        found = _KINDS.fullmatch(text)
        return cls(topic, found[1]) if found is not None else None

    @property
    def text(self) -> str:
        """As it is stored at the broker."""
        return f"msgbus.{self.kind}"

    @property
    def said(self) -> str:
        """For people."""
        return f"{self.shards} shards" if self.shards else f"kind {self.kind!r}"

    @cached_property
    def shards(self) -> int:
        """0: it is not keyed."""
        return int(self.kind[1:]) if self.kind[1:].isdigit() else 0

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """All of them."""
        return PRIORITIES if self.kind == "levels" else tuple(f"p{shard}" for shard in range(self.shards)) or ("normal",)

    def parts_of(self, level: Priority) -> tuple[str, ...]:
        """Those that a receiver of this level takes."""
        return (level,) if self.kind == "levels" else self.parts

    def part_of(self, envelope: Envelope) -> str:
        """Where a message goes."""
        if self.shards:
            return f"p{shard_of(envelope.key, self.shards)}"
        return envelope.priority if self.kind == "levels" else "normal"

    def queue(self, group: str, part: str) -> str:
        """Of a group."""
        return f"{self.topic}.{group}" if part == "normal" else f"{self.topic}.{group}.{part}"

    def queues(self, group: str) -> list[str]:
        """All of a group's."""
        return [self.queue(group, part) for part in self.parts]

    def arguments(self, dead_letter_retention: float | None) -> FieldTable:
        """Of a group's queues."""
        if self.kind == "dead" and dead_letter_retention is not None:
            return {**QUORUM, "x-message-ttl": milliseconds(dead_letter_retention)}
        return {**QUORUM, "x-single-active-consumer": True} if self.shards else QUORUM

    def pattern(self, part: str) -> str:
        """What binds a queue to the topic: from the left may stand the bits of a delay; a sole part takes whatever others publish."""
        return f"#.{part}" if len(self.parts) > 1 or self.shards else "#"


def milliseconds(seconds: float) -> int:
    """As the broker takes a TTL: at most 49 days."""
    return min(round(seconds * 1000), 2**32 - 1)


def meta(topic: str) -> str:
    """The exchange that says a topic's layout. Its name is short, for the broker cuts the answer in which it is read."""
    return f"msgbus.{hashlib.sha256(topic.encode()).hexdigest()[:16]}"


def exchange(name: str) -> str:
    """Of a topic, or of what is unclaimed of it. AMQP has 127 characters for the name of an exchange, half of a queue's."""
    return name if len(name) <= 127 else f"{name[:94]}:{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def unclaimed(topic: str) -> str:
    """What keeps a topic's messages until its first group is there: the exchange for what has nowhere to go, and its queue."""
    return f"{topic}:unclaimed"


def registry(topic: str) -> str:
    """The queue whose messages are the names of a topic's groups: no question of AMQP lists queues."""
    return f"{topic}:groups"


def lock(topic: str) -> str:
    """An exclusive queue that one process at a time can have."""
    return f"{topic}:lock"


def member(topic: str, group: str, number: int | None = None) -> str:
    """The queue that an ordered group's members consume, which counts them; with a number: the exclusive one that a member holds."""
    return f"{topic}.{group}.member" if number is None else f"{topic}.{group}.member.{number}"


def to_topic(topic: str, part: str = "*") -> str:
    """The words behind the bits of a delay; no name begins with a word that ends in a colon."""
    return f"t:.{topic}.{part}"


def to_queue(queue: str) -> str:
    """The same, to one group."""
    return f"g:.{queue}"


def delayed(delay: float, destination: str) -> tuple[str, str]:
    """Exchange and routing key: it enters at the level of its highest bit."""
    ticks = min(max(math.ceil(round(delay / TICK, 6)), 1), 2**LEVELS - 1)
    return level(ticks.bit_length() - 1), ".".join(f"{ticks:0{LEVELS}b}") + "." + destination


def level(number: int) -> str:
    """The exchange, and the queue, of a level of the delays; below the last is what is due."""
    return f"msgbus.delay.{number:02}" if number >= 0 else DUE


def level_arguments(number: int) -> FieldTable:
    """Of a level's queue."""
    return {**_FALLING, "x-message-ttl": round(2**number * TICK * 1000), "x-dead-letter-exchange": level(number - 1)}
