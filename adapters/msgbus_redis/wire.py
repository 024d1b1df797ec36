"""Envelope ↔ the fields of a stream's entry.

`data` is the body; CloudEvents attributes are `ce_…`; every other header is a field of its own name, behind `h:` where it would be
taken for one of these. An entry that others added is tolerated: what has no `ce_id` gets the broker's id, and without `data` the
body is a JSON object of the fields.
"""

from __future__ import annotations

import json

from msgbus.contract.envelope import CE, CONTENT_TYPE, MAX_ID, Envelope, Priority

BODY = b"data"
ID = b"ce_id"
KEY = b"ce_partitionkey"
_EXPIRES = b"msgbus-expires-at"
_PRIORITY = b"msgbus-priority"
_CONTENT_TYPE = b"ce_datacontenttype"
_LIMIT = 10_000

_fields: dict[str, bytes] = {CONTENT_TYPE: _CONTENT_TYPE}
_headers: dict[bytes, str] = {_CONTENT_TYPE: CONTENT_TYPE}
_PRIORITIES: dict[bytes, Priority] = {b"high": "high", b"normal": "normal", b"low": "low"}


def fields_of(envelope: Envelope) -> list[bytes | str]:
    """Names and values by turns."""
    flat: list[bytes | str] = [ID, envelope.id, BODY, envelope.body]
    if envelope.key is not None:
        flat += (KEY, envelope.key)
    if envelope.expires_at is not None:
        flat += (_EXPIRES, repr(envelope.expires_at))
    if envelope.priority != "normal":
        flat += (_PRIORITY, envelope.priority)
    for name, value in envelope.headers.items():
        flat += (_fields.get(name) or _field(name), value)
    return flat


def envelope_of(topic: str, group: str | None, stream: str, entry_id: bytes, flat: list[bytes]) -> Envelope:
    """Tolerates whatever others wrote."""
    id_ = key = expires = body = None
    priority: Priority = "normal"
    headers: dict[str, str] = {}
    try:
        names = iter(flat)
        for name in names:
            value = next(names)
            if name == BODY:
                body = value
            elif name == ID:
                id_ = value.decode()
            elif name == KEY:
                key = value.decode()
            elif name == _EXPIRES:
                expires = float(value)
            elif name == _PRIORITY:
                priority = _PRIORITIES[value]
            else:
                headers[_headers.get(name) or _header(name)] = value.decode()
    except (ValueError, KeyError):  # bytes that are no UTF-8 (a ValueError), a time that is no number: nobody's envelope of ours
        return _foreign(topic, group, stream, entry_id, flat)
    if id_ is None or body is None or not 1 <= len(id_) <= MAX_ID:
        return _foreign(topic, group, stream, entry_id, flat)
    return Envelope(id_, topic, body, headers, key, group, priority, 0.0, expires)


def _foreign(topic: str, group: str | None, stream: str, entry_id: bytes, flat: list[bytes]) -> Envelope:
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    text = {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}
    id_, key = text.get("ce_id", ""), text.get("ce_partitionkey")
    body = fields.get(BODY)
    headers = {_headers.get(name) or _header(name): text[name.decode("utf-8", "replace")] for name in fields if name not in (BODY, ID, KEY)}
    if body is None:
        body = json.dumps({name: value for name, value in text.items() if not name.startswith("ce_")}).encode()
        headers = {name: value for name, value in headers.items() if name.startswith(CE)} | {CONTENT_TYPE: "application/json"}
    if not 1 <= len(id_) <= MAX_ID:
        id_ = f"{stream}/{entry_id.decode()}"[-MAX_ID:]
    return Envelope(id_, topic, body, headers, key if key and len(key) <= MAX_ID else None, group)


def _field(name: str) -> bytes:
    if name.startswith(CE):
        field = b"ce_" + name[len(CE) :].encode()
    elif name == "data" or name.startswith("ce_"):
        field = b"h:" + name.encode()
    else:
        field = name.encode()
    if len(_fields) < _LIMIT:
        _fields[name] = field
    return field


def _header(field: bytes) -> str:
    name = field.decode("utf-8", "replace")
    if name.startswith("ce_"):
        name = CE + name[3:]
    elif name.startswith("h:"):
        name = name[2:]
    if len(_headers) < _LIMIT:
        _headers[field] = name
    return name
