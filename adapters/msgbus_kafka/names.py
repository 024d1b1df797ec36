"""How an address is spelled at the broker. Pure functions; the words at the end are refused as ends of users' names, so none collides.

`orders` is the topic itself, as other programs see it; `orders.high` and `orders.low` its other priorities. A group of it consumes under
the group id `orders.billing`, and has `orders.billing.soon` for what comes to it alone: retries and redrives. `orders.soon` holds what is
published with a delay. `orders.billing.dead` is the group's dead letters.
"""

from __future__ import annotations

from msgbus.contract.envelope import Envelope

SOON = ".soon"
DEAD = ".dead"


def stream(topic: str, level: str = "normal") -> str:
    """The Kafka topic of one priority of a topic."""
    return topic if level == "normal" else f"{topic}.{level}"


def group_id(topic: str, group: str, level: str = "normal") -> str:
    """The consumer group of one priority of a group."""
    return stream(f"{topic}.{group}", level)


def orders_id(group: str) -> str:
    """A consumer group that nobody joins: what operators commit there, a group's receivers carry out."""
    return f"{group}.member"


def history_id(topic: str) -> str:
    """A consumer group that nobody joins: a commit there says that the topic has had a group."""
    return topic + SOON


def is_dead(topic: str) -> bool:
    """Whether a name is that of a group's dead letters."""
    return topic.endswith(DEAD)


def destination(envelope: Envelope) -> str:
    """The Kafka topic that an envelope goes to."""
    topic = envelope.topic
    if envelope.group is not None:
        return group_id(topic, envelope.group, envelope.priority) + SOON
    if is_dead(topic):
        return topic
    base = topic if envelope.priority == "normal" else stream(topic, envelope.priority)
    return base + SOON if envelope.delay > 0 else base
