"""Envelope ↔ Kafka record: CloudEvents' Kafka binding (`ce_…`, the record's key is the partition key), msgbus's headers as they are.

What others produced is tolerated: any bytes in keys and headers (kept as surrogates, and written back as the same bytes), a header twice
(the last one counts), headers and bodies that are null, no headers at all (the id is then made of topic, partition and offset).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from aiokafka.partitioner import murmur2

from msgbus.contract.envelope import CE, PRIORITIES, Envelope, Priority

Headers = list[tuple[str, bytes | None]]

ID = "ce_id"
KEY = "ce_partitionkey"
EXPIRES_AT = "msgbus-expires-at"
DUE_AT = "msgbus-due-at"
PRIORITY = "msgbus-priority"
_USERS = "msgbus-header-"  # in front of a user's header that would be taken for an attribute
_DEAD_AT = "msgbus-dlq-dead-at"
_LEVELS: dict[bytes, Priority] = {level.encode(): level for level in PRIORITIES}


class Record(Protocol):
    """What is read of a consumed record."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


@lru_cache(maxsize=4096)
def _written(name: str) -> str:
    if name.startswith(CE):
        return "ce_" + name[len(CE) :]
    return _USERS + name if name.startswith(("ce_", _USERS)) else name


@lru_cache(maxsize=4096)
def _read(name: str) -> str:
    return CE + name[3:] if name.startswith("ce_") else name.removeprefix(_USERS)


@lru_cache(maxsize=16384)
def partition_of(key: str, partitions: int) -> int:
    """Where a key goes: as the Java client's default partitioner decides."""
    return int((murmur2(_bytes(key)) & 0x7FFFFFFF) % partitions)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(value: bytes | None) -> str:
    return "" if value is None else value.decode("utf-8", "surrogateescape")


def key_of(envelope: Envelope) -> bytes | None:
    """The record's key."""
    return None if envelope.key is None else _bytes(envelope.key)


def headers_of(envelope: Envelope, now: float) -> Headers:
    """The record's headers; `now` is added to the delay."""
    headers: Headers = [(_written(name), value.encode("utf-8", "surrogateescape")) for name, value in envelope.headers.items()]
    headers.append((ID, _bytes(envelope.id)))
    if envelope.expires_at is not None:
        headers.append((EXPIRES_AT, repr(envelope.expires_at).encode()))
    if envelope.delay > 0:
        headers.append((DUE_AT, repr(now + envelope.delay).encode()))
    return headers


def dead_key(envelope: Envelope) -> bytes:
    """The key of a dead letter: one death's. By the id alone, the tombstone of one that was redriven could end the letter of its next
    death, written before it; a letter that is sent twice has the same key twice, and is one."""
    return _bytes(f"{envelope.id} {envelope.headers.get(_DEAD_AT, '')}")


def dead_headers(envelope: Envelope, now: float) -> Headers:
    """The headers of a dead letter, whose key is not its message's."""
    headers = [*headers_of(envelope, now), (PRIORITY, envelope.priority.encode())]
    if envelope.key is not None:
        headers.append((KEY, _bytes(envelope.key)))
    return headers


def read(record: Record, topic: str, group: str | None, priority: Priority) -> tuple[Envelope, float]:
    """The envelope of a record of a topic or of a group's own way, and the moment it is due: 0.0 at once."""
    headers: dict[str, str] = {}
    for name, value in record.headers:
        headers[_read(name)] = "" if value is None else value.decode("utf-8", "surrogateescape")
    message_id = headers.pop("ce-id", "") or f"{record.topic}/{record.partition}/{record.offset}"
    headers.pop("ce-partitionkey", None)
    expires_at = _moment(headers.pop(EXPIRES_AT)) if EXPIRES_AT in headers else None
    due_at = _moment(headers.pop(DUE_AT)) or 0.0 if DUE_AT in headers else 0.0
    key = None if record.key is None else record.key.decode("utf-8", "surrogateescape")
    return Envelope(message_id, topic, record.value or b"", headers, key, group, priority, 0.0, expires_at), due_at


def read_dead(record: Record, topic: str) -> Envelope:
    """The envelope of a dead letter, which says its own priority, and its message's key."""
    own = dict(record.headers)
    found, _ = read(record, topic, None, _LEVELS.get(own.get(PRIORITY) or b"", "normal"))
    headers = {name: value for name, value in found.headers.items() if name != PRIORITY}
    key = _text(own[KEY]) if KEY in own else None
    return Envelope(found.id, topic, found.body, headers, key, None, found.priority, 0.0, found.expires_at)


def _moment(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
