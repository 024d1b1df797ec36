"""Where things are: a topic, a group of it, and the shard of a key. Pure functions, the same on every broker."""

from __future__ import annotations

import zlib

DEAD_GROUP = "keeper"
"""The one group of a dead-letter destination, declared with it, so that a dead letter always has somewhere to be."""


def shard_of(key: str | None, shards: int) -> int:
    """The shard of a keyed topic that a key goes to: crc32 of its UTF-8, so that other languages agree. No key: shard 0.

    Kafka decides by its own partitioner instead.
    """
    return zlib.crc32(key.encode()) % shards if key is not None and shards > 1 else 0


def dead_topic(topic: str, group: str) -> str:
    """The destination of a group's dead letters: a topic of its own, which no user's topic can be called."""
    return f"{topic}.{group}.dead"
