"""Envelope ↔ AMQP message: CloudEvents' AMQP binding (`cloudEvents_…`), msgbus's headers as they are.

`content-type` is the property. The property `message_id` is fresh a send, since a return is charged by it (R6); the envelope's id is a
header. What others published is tolerated: headers that are no text, none at all, an id that is missing.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

from aiormq import spec
from pamqp.common import FieldTable

from msgbus.contract.envelope import CE, CONTENT_TYPE, MAX_ID, PRIORITIES, Envelope, Priority

ID = "cloudEvents_id"
KEY = "cloudEvents_partitionkey"
EXPIRES_AT = "msgbus-expires-at"
PRIORITY = "msgbus-priority"
MOVED = "msgbus-moved"
"""Marks what a first group was given of what came before it: it came by the group's queue, and yet not by the group's own way."""
_CE = "cloudEvents_"
_BROKERS = re.compile(r"x-(?:delivery-count|acquired-count|death|(?:first|last)-death-.*|opt-.*)|B?CC")
_LEVELS: dict[str, Priority] = {level: level for level in PRIORITIES}
_SHORT = 255  # bytes of a property


@lru_cache(maxsize=4096)
def _written(name: str) -> str:
    """A user's header that would be taken for an attribute, or for the broker's (CC publishes to more queues), stands behind a colon."""
    if name.startswith(CE):
        return _CE + name[len(CE) :]
    return ":" + name if name.startswith("cloudEvents") or _BROKERS.fullmatch(name) else name


@lru_cache(maxsize=4096)
def _read(name: str) -> str | None:
    if name.startswith(("cloudEvents_", "cloudEvents:")):
        return CE + name[len(_CE) :]
    return None if _BROKERS.fullmatch(name) else name.removeprefix(":")


def properties_of(envelope: Envelope, lasting: bool, now: float) -> spec.Basic.Properties:
    """`lasting`: the broker must not drop it when it expires; the core looks at that in any case."""
    headers: FieldTable = {ID: envelope.id}
    content_type: str | None = None
    for name, value in envelope.headers.items():
        if name == CONTENT_TYPE and len(value.encode()) <= _SHORT:
            content_type = value
        else:
            headers[_written(name)] = value
    if envelope.key is not None:
        headers[KEY] = envelope.key
    expiration: str | None = None
    if envelope.expires_at is not None:
        headers[EXPIRES_AT] = repr(envelope.expires_at)
        if not lasting:
            expiration = str(min(max(round((envelope.expires_at - now) * 1000), 0), 2**32 - 1))
    if envelope.priority != "normal":
        headers[PRIORITY] = envelope.priority
    return spec.Basic.Properties(
        content_type=content_type,
        headers=headers,
        delivery_mode=2,  # a transient message does not outlive the broker (R17)
        expiration=expiration,
        message_id=os.urandom(16).hex(),
    )


def envelope_of(topic: str, group: str | None, body: bytes, properties: spec.Basic.Properties) -> Envelope:
    """`group`: where it came by this group's own way, past the topic's exchange."""
    table: dict[str, object] = dict(properties.headers or {})
    if table.pop(MOVED, None) is not None:
        group = None
    # Of others: their id if they have one. A made one is new at each delivery, or two messages with the same bytes would be one.
    id_ = _text(table.pop(ID, table.pop("cloudEvents:id", properties.message_id)))
    key = _text(table.pop(KEY)) if KEY in table else None
    expires_at = _moment(table.pop(EXPIRES_AT, None))
    priority = _LEVELS.get(_text(table.pop(PRIORITY, None)), "normal")
    headers = {name: _text(value) for raw, value in table.items() if (name := _read(raw)) is not None}
    if properties.content_type:
        headers[CONTENT_TYPE] = properties.content_type
    if not 1 <= len(id_) <= MAX_ID:
        id_ = os.urandom(16).hex()
    return Envelope(id_, topic, body, headers, key, group, priority, 0.0, expires_at)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    return "" if value is None else str(value)


def _moment(value: object) -> float | None:
    try:
        return float(_text(value))
    except ValueError:
        return None
