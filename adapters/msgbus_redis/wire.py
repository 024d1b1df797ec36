"""Envelope ↔ the fields of a stream's entry.

`data` is the body; CloudEvents attributes are `ce_…`; every other header is a field of its own name, behind `h:` where it would be
taken for one of these. An entry that others added is tolerated: what has no `ce_id` gets the broker's id, and without `data` the
body is a JSON object of the fields.
"""

from __future__ import annotations

import json
from functools import lru_cache

from msgbus.contract.envelope import CE, CONTENT_TYPE, MAX_ID, Envelope, Priority

BODY = b"data"
ID = b"ce_id"
KEY = b"ce_partitionkey"
_EXPIRES = b"msgbus-expires-at"
_PRIORITY = b"msgbus-priority"
_PRIORITIES: dict[bytes, Priority] = {b"high": "high", b"normal": "normal", b"low": "low"}


def fields_of(envelope: Envelope) -> tuple[tuple[bytes, ...], list[bytes | str]]:
    """Names, the id's first, and values. Envelopes with the same headers have the very same names."""
    headers, key, expires_at, priority = envelope.headers, envelope.key, envelope.expires_at, envelope.priority
    names = _names(key is not None, expires_at is not None, priority != "normal", *headers)
    values: list[bytes | str] = [envelope.id, envelope.body, *headers.values()]
    if key is not None:
        values.append(key)
    if expires_at is not None:
        values.append(repr(expires_at))
    if priority != "normal":
        values.append(priority)
    return names, values


@lru_cache(10_000)
def _names(keyed: bool, expires: bool, ranked: bool, *headers: str) -> tuple[bytes, ...]:
    own = (KEY,) * keyed + (_EXPIRES,) * expires + (_PRIORITY,) * ranked
    return ID, BODY, *map(_field, headers), *own


def envelope_of(topic: str, group: str | None, stream: str, entry_id: bytes, flat: list[bytes]) -> Envelope:
    """Tolerates whatever others wrote."""
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    try:
        id_, body = fields.pop(ID).decode(), fields.pop(BODY)
        key, expires, priority = fields.pop(KEY, None), fields.pop(_EXPIRES, None), _PRIORITIES[fields.pop(_PRIORITY, b"normal")]
        headers = {_header(name): value.decode() for name, value in fields.items()}
        if 1 <= len(id_) <= MAX_ID:
            moment = None if expires is None else float(expires)
            return Envelope(id_, topic, body, headers, None if key is None else key.decode(), group, priority, 0.0, moment)
    except (ValueError, KeyError):  # bytes that are no UTF-8 (a ValueError), a time that is no number: nobody's envelope of ours
        pass
    return _foreign(topic, group, stream, entry_id, flat)


def _foreign(topic: str, group: str | None, stream: str, entry_id: bytes, flat: list[bytes]) -> Envelope:
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    text = {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}
    id_, key = text.get("ce_id", ""), text.get("ce_partitionkey")
    body = fields.get(BODY)
    headers = {_header(name): text[name.decode("utf-8", "replace")] for name in fields if name not in (BODY, ID, KEY)}
    if body is None:
        body = json.dumps({name: value for name, value in text.items() if not name.startswith("ce_")}).encode()
        headers = {name: value for name, value in headers.items() if name.startswith(CE)} | {CONTENT_TYPE: "application/json"}
    if not 1 <= len(id_) <= MAX_ID:
        id_ = f"{stream}/{entry_id.decode()}"[-MAX_ID:]
    return Envelope(id_, topic, body, headers, key if key and len(key) <= MAX_ID else None, group)


def _field(name: str) -> bytes:
    if name.startswith(CE):
        return b"ce_" + name[len(CE) :].encode()
    if name == CONTENT_TYPE:
        return b"ce_datacontenttype"
    return (f"h:{name}" if name == "data" or name.startswith("ce_") else name).encode()


@lru_cache(10_000)
def _header(field: bytes) -> str:
    name = field.decode("utf-8", "replace")
    if name == "ce_datacontenttype":
        return CONTENT_TYPE
    return CE + name[3:] if name.startswith("ce_") else name.removeprefix("h:")
