"""What things are called at RabbitMQ, where a message goes, and what an envelope is on the wire."""

from __future__ import annotations

import pytest
from aiormq import spec
from hypothesis import given
from hypothesis import strategies as st
from pamqp.common import FieldTable

from msgbus.contract.adapter import TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus_rabbitmq import names
from msgbus_rabbitmq.names import Layout
from msgbus_rabbitmq.wire import envelope_of, properties_of

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,40}", fullmatch=True)
HEADER = NAMES.filter(lambda name: not name.lower().startswith(("msgbus-", "ce-", "content-")))


@pytest.mark.parametrize(
    ("asked", "kind", "parts"),
    [
        (TopicSpec("t"), "plain", ("normal",)),
        (TopicSpec("t", priorities=True), "levels", ("high", "normal", "low")),
        (TopicSpec("t", keyed=True), "p8", tuple(f"p{n}" for n in range(8))),
        (TopicSpec("t", keyed=True, shards=1), "p1", ("p0",)),
        (TopicSpec("t", shards=1), "plain", ("normal",)),
        (TopicSpec("t.g.dead", kind="dead"), "dead", ("normal",)),
    ],
)
def test_a_layout_is_read_as_it_was_stored(asked: TopicSpec, kind: str, parts: tuple[str, ...]) -> None:
    """By its text alone."""
    layout = Layout.of(asked, 8)
    assert (layout.kind, layout.parts) == (kind, parts)
    assert Layout.parse(asked.name, layout.text) == layout
    assert Layout.parse(asked.name, "orders.unclaimed") is None


@given(st.floats(0.001, names.LONGEST_DELAY))
def test_a_delay_is_the_sum_of_its_levels_and_never_too_short(delay: float) -> None:
    """It enters at its highest level; each 1 behind that is a level that holds it; rounded up by less than two ticks."""
    entry, key = names.delayed(delay, "g:.orders.billing")
    bits, destination = key.split(".g:.")
    assert destination == "orders.billing"
    number = int(bits.replace(".", ""), 2)
    assert entry == names.level(number.bit_length() - 1)
    assert -1e-6 <= number * names.TICK - delay < 2 * names.TICK
    assert len(key) <= 255


def test_the_longest_routing_key_fits() -> None:
    """255 bytes, for the longest names of a topic and a group."""
    layout = Layout("t" * 120, "p1000")
    _, key = names.delayed(1.0, names.to_queue(layout.queue("g" * 60, "p999")))
    assert len(key) <= 255


@given(
    id_=TEXT,
    body=st.binary(max_size=50),
    key=st.none() | TEXT,
    headers=st.dictionaries(HEADER | st.sampled_from(["CC", "BCC", "x-death", "x-delivery-count", "cloudEvents_id", "cloudEvents"]), TEXT),
    expires_at=st.none() | st.floats(0, 1e11),
)
def test_an_envelope_comes_back_as_it_was_sent(
    id_: str, body: bytes, key: str | None, headers: dict[str, str], expires_at: float | None
) -> None:
    """Through the bytes of the protocol, also with headers that RabbitMQ would act upon."""
    sent = Envelope(id_, "t", body, {**headers, "ce-type": "Order", "content-type": "application/json"}, key, None, "low", 0.0, expires_at)
    properties = properties_of(sent, lasting=False, now=0.0)
    table = properties.headers or {}
    assert not {"CC", "BCC", "x-death", "x-delivery-count"} & table.keys()
    wire = properties.marshal()
    read = spec.Basic.Properties()
    read.unmarshal(int.from_bytes(wire[:2], "big"), wire[2:])
    got = envelope_of("t", None, body, read)
    assert (got.id, got.key, got.priority, got.expires_at) == (id_, key, "low", expires_at)
    assert dict(got.headers) == dict(sent.headers)


def test_what_others_publish_is_taken() -> None:
    """Their id, headers as text, and none of the broker's own; without an id a new one each time."""
    headers: FieldTable = {"n": 1, "b": b"\xff", "none": None, "x-death": [], "x-delivery-count": 3, "deep": {"a": 1}}
    got = envelope_of("t", None, b"{}", spec.Basic.Properties(headers=headers, message_id="theirs"))
    assert (got.id, got.headers["n"], got.headers["none"]) == ("theirs", "1", "")
    assert not {"x-death", "x-delivery-count"} & got.headers.keys()
    nameless = [envelope_of("t", None, b"{}", spec.Basic.Properties()).id for _ in range(2)]
    assert nameless[0] != nameless[1]
