"""Envelopes as Kafka records, and the records of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msgbus.contract.envelope import Envelope
from msgbus_kafka.records import dead_headers, dead_key, headers_of, key_of, partition_of, read, read_dead


@dataclass
class Record:
    """A consumed record."""

    key: bytes | None = None
    value: bytes | None = b"{}"
    headers: Sequence[tuple[str, bytes | None]] = field(default_factory=list[tuple[str, bytes | None]])
    topic: str = "orders"
    partition: int = 3
    offset: int = 7
    timestamp: int = 0


ORDER = Envelope(
    "id-1",
    "orders",
    b"{}",
    {"ce-type": "Order.v1", "content-type": "application/json", "tenant": "a", "ce_mine": "b", "msgbus-attempt": "2"},
    key="ä",
    expires_at=1e9,
)


def test_an_envelope_is_an_event_in_kafkas_binding() -> None:
    """`ce_…`, `content-type`, the record's key; msgbus's and the user's headers as they are, but one that would be an attribute."""
    headers = dict(headers_of(ORDER, 0.0))
    assert headers["ce_id"] == b"id-1"
    assert headers["ce_type"] == b"Order.v1"
    assert headers["content-type"] == b"application/json"
    assert headers["tenant"] == b"a"
    assert headers["msgbus-attempt"] == b"2"
    assert "ce_mine" not in headers
    assert key_of(ORDER) == "ä".encode()
    envelope, due_at = read(Record(key_of(ORDER), ORDER.body, headers_of(ORDER, 0.0)), "orders", None, "normal")
    assert due_at == 0.0
    assert all(getattr(envelope, name) == getattr(ORDER, name) for name in Envelope.__slots__)
    later, due_at = read(Record(None, b"", headers_of(replace(ORDER, delay=2.5), 1000.0)), "orders", "workers", "high")
    assert (due_at, later.group, later.priority, later.delay) == (1002.5, "workers", "high", 0.0)


def test_a_dead_letter_keeps_key_and_priority_of_its_message() -> None:
    """The record's own key is the death's: two deaths of one message are two letters, one that is sent twice is one."""
    letter = replace(ORDER, topic="orders.workers.dead", priority="low", headers={**ORDER.headers, "msgbus-dlq-dead-at": "now"})
    assert dead_key(letter) == dead_key(replace(letter))
    assert dead_key(letter) != dead_key(replace(letter, headers={"msgbus-dlq-dead-at": "later"}))
    envelope = read_dead(Record(dead_key(letter), letter.body, dead_headers(letter, 0.0)), letter.topic)
    assert all(getattr(envelope, name) == getattr(letter, name) for name in Envelope.__slots__)


def test_what_others_produce_is_tolerated() -> None:
    """No headers, a null body, bytes that are no UTF-8, a header twice or null; written again it is the same bytes."""
    envelope, _ = read(Record(None, None), "orders", None, "normal")
    assert (envelope.id, envelope.body, envelope.key, envelope.headers) == ("orders/3/7", b"", None, {})
    strange = Record(b"\xff\x00", b"\xfe", [("a", b"1"), ("a", b"\xff"), ("b", None), ("msgbus-due-at", b"x"), ("ce_id", b"")])
    envelope, due_at = read(strange, "orders", None, "normal")
    assert due_at == 0.0
    assert envelope.id == "orders/3/7"
    assert key_of(envelope) == b"\xff\x00"
    assert dict(headers_of(envelope, 0.0))["a"] == b"\xff"
    assert envelope.headers["b"] == ""


@given(st.binary(max_size=30), st.lists(st.tuples(st.text(max_size=10), st.none() | st.binary(max_size=20)), max_size=6))
def test_any_record_can_be_read_and_written_again(key: bytes, headers: list[tuple[str, bytes | None]]) -> None:
    envelope, _ = read(Record(key, b"", headers), "orders", None, "normal")
    again, _ = read(Record(key_of(envelope), b"", headers_of(envelope, 0.0)), "orders", None, "normal")
    assert (again.id, again.key) == (envelope.id, envelope.key)
    assert again.headers == envelope.headers


@pytest.mark.parametrize(
    ("key", "hashed"),
    [("21", -973932308), ("foobar", -790332482), ("a-little-bit-long-string", -985981536), ("abc", 479470107)],
)
def test_a_key_goes_where_javas_producer_puts_it(key: str, hashed: int) -> None:
    """The vectors are those of Kafka's own tests of `Utils.murmur2`."""
    for partitions in (1, 3, 8, 50):
        assert partition_of(key, partitions) == (hashed & 0x7FFFFFFF) % partitions
