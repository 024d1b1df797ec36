"""The writer: model → envelope. What an envelope says, and where its key comes from."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum, StrEnum
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from msgbus import PublishOptions, Topic
from msgbus.codecs import codec_for
from msgbus.contract.adapter import Capability, Limits
from msgbus.contract.envelope import HEADROOM, Envelope, parse_utc
from msgbus.errors import EncodeError, InvalidHeader, InvalidName, MessageTooLarge, UnsupportedFeature
from msgbus.outbound.writer import Writer
from msgbus.publishing import handling


class Order(BaseModel):
    id: str
    amount: int = 1


class Anything(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    key: Any = None


class Reading(TypedDict):
    sensor: str


def writer(
    topic: Topic[Any], *, limits: Limits | None = None, capabilities: Capability = ~Capability.NONE, namespace: str = ""
) -> Writer[Any]:
    return Writer(
        topic,
        codec_for(topic.model, topic.content_type),
        namespace=namespace,
        source="shop",
        adapter_name="memory",
        limits=limits or Limits(body=1_000_000),
        capabilities=capabilities,
    )


orders = Topic("orders", Order, key="id", version=3)


def test_an_envelope_is_a_cloudevent() -> None:
    """Id, name with the namespace, body, key; type with the version, source, time; and nothing else."""
    before = time.time()
    envelope = writer(orders, namespace="staging.").write(Order(id="7"))
    published = parse_utc(envelope.headers["ce-time"])
    assert published is not None
    assert before - 0.001 <= published.timestamp() <= time.time()
    assert (envelope.topic, envelope.body, envelope.key, envelope.group) == ("staging.orders", b'{"id":"7","amount":1}', "7", None)
    assert len(envelope.id) == 32
    assert {name: value for name, value in envelope.headers.items() if name != "ce-time"} == {
        "content-type": "application/json",
        "ce-specversion": "1.0",
        "ce-type": "Order.v3",
        "ce-source": "shop",
    }


def test_every_envelope_has_headers_and_an_id_of_its_own() -> None:
    """Nothing of one message shows in the next."""
    one = writer(orders)
    first = one.write(Order(id="1"), {"headers": {"a": "b"}, "idempotency_key": "x"})
    second = one.write(Order(id="1"))
    assert first.id != second.id
    assert "a" not in second.headers
    assert "ce-idempotencykey" not in second.headers


@pytest.mark.parametrize(
    ("model", "content_type", "ce_type", "expected"),
    [
        (Order, None, "Order.v1", "application/json"),
        (Order, "application/vnd.shop+json", "Order.v1", "application/vnd.shop+json"),
        (bytes, None, "things.v1", "application/octet-stream"),
        (bytes, "image/png", "things.v1", "image/png"),
        (list[int], None, "things.v1", "application/json"),
        (dict, None, "things.v1", "application/json"),
        (Order | None, None, "things.v1", "application/json"),
        (Reading, None, "Reading.v1", "application/json"),
    ],
)
def test_type_and_content_type(model: Any, content_type: str | None, ce_type: str, expected: str) -> None:
    """The type is the model's name, or the topic's where the model is no class of the user's."""
    messages: dict[Any, Any] = {Order: Order(id="1"), bytes: b"x", Reading: {"sensor": "s"}, dict: {}}
    message = messages.get(model, [1] if model == list[int] else None)
    headers = writer(Topic("things", model, content_type=content_type)).write(message).headers
    assert (headers["ce-type"], headers["content-type"]) == (ce_type, expected)


class Word(Enum):
    A = "a"
    ONE = 1
    HALF = 0.5


class Text(StrEnum):
    A = "a"


class Number(IntEnum):
    ONE = 1


one_uuid = uuid.uuid4()


@pytest.mark.parametrize(
    ("found", "key"),
    [
        ("a", "a"), (None, None), (7, "7"), (-1, "-1"), (one_uuid, str(one_uuid)), (Word.A, "a"), (Word.ONE, "1"), (Text.A, "a"),
        (Number.ONE, "1"), ("ключ", "ключ"), ("x" * 255, "x" * 255),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["field", "function"])
def test_a_key_has_one_text(found: Any, key: str | None, way: str) -> None:
    """Text, numbers, UUIDs and enums of them; from a field or a function; None is no key."""
    topic = Topic("t", Anything, key="key" if way == "field" else lambda message: message.key)
    written = writer(topic).write(Anything.model_construct(key=found)).key
    assert written == key
    assert written is None or type(written) is str


@pytest.mark.parametrize("found", [0.5, True, b"a", ("a",), ["a"], {"a": 1}, Word.HALF, datetime(2030, 1, 1, tzinfo=UTC)])
@pytest.mark.parametrize("way", ["field", "function"])
def test_a_key_without_one_text_is_refused(found: Any, way: str) -> None:
    """Floats, bools, bytes, dates: other languages write them otherwise, and a key's order would be lost."""
    topic = Topic("t", Anything, key="key" if way == "field" else lambda message: message.key)
    with pytest.raises(EncodeError, match=r"key of topic 't'.*a function that returns text"):
        writer(topic).write(Anything(key=found))


@pytest.mark.parametrize("found", ["", "x" * 256, "a\nb", "é" * 128])
def test_a_key_that_brokers_do_not_hold_is_refused(found: str) -> None:
    """Also where the message has it, not the option."""
    with pytest.raises(InvalidName, match=r"^key"):
        writer(orders).write(Order(id=found))


def test_the_key_of_a_typeddict_and_of_bytes() -> None:
    """A TypedDict's field by its name; bytes by a function."""
    assert writer(Topic("r", Reading, key="sensor")).write({"sensor": "s"}).key == "s"
    assert writer(Topic("b", bytes, key=lambda body: body[:1].decode())).write(b"xyz").key == "x"


def test_options_are_in_the_envelope() -> None:
    """Each where it belongs; the user's headers never cover ours."""
    now = time.time()
    options: PublishOptions = {
        "id": "mine",
        "key": "k",
        "idempotency_key": "i",
        "headers": {"tenant": "a"},
        "delay": timedelta(seconds=5),
        "expires_in": timedelta(minutes=1),
    }
    envelope = writer(orders).write(Order(id="1"), options)
    assert (envelope.id, envelope.key, envelope.delay) == ("mine", "k", 5.0)
    assert envelope.expires_at == pytest.approx(now + 60, abs=1)
    assert envelope.headers["tenant"] == "a"
    assert envelope.headers["ce-idempotencykey"] == "i"
    nothing: PublishOptions = {"id": None, "key": None, "idempotency_key": None, "delay": None, "deliver_at": None, "expires_in": None}
    envelope = writer(orders).write(Order(id="1"), nothing)
    assert (len(envelope.id), envelope.key, envelope.delay, envelope.expires_at) == (32, "1", 0.0, None)


@pytest.mark.parametrize(("ahead", "delay"), [(timedelta(hours=1), 3600), (timedelta(seconds=-5), 0), (timedelta(days=-365), 0)])
def test_deliver_at_is_a_delay_from_now(ahead: timedelta, delay: float) -> None:
    """A moment that has passed is now; another time zone is the same moment."""
    moment = datetime.now(UTC) + ahead
    for zoned in (moment, moment.astimezone()):
        assert writer(orders).write(Order(id="1"), {"deliver_at": zoned}).delay == pytest.approx(delay, abs=1)


def test_the_limits_are_the_brokers_less_the_room_for_a_record() -> None:
    """A body of exactly so many bytes passes, one more does not; a delay as long as the broker keeps passes, a longer one does not."""
    topic = Topic("raw", bytes)
    one = writer(topic, limits=Limits(body=HEADROOM + 100, delay=60.0))
    one.write(b"x" * 100)
    with pytest.raises(MessageTooLarge, match=r"101 bytes.*'raw'.*at most 100 on memory"):
        one.write(b"x" * 101)
    one.write(b"x", {"delay": timedelta(seconds=60)})
    with pytest.raises(UnsupportedFeature, match=r"0:01:00\.100000 .*memory \(at most 0:01:00\).*a shorter delay"):
        one.write(b"x", {"delay": timedelta(seconds=60.1)})
    with pytest.raises(UnsupportedFeature, match=r"999999999 days, .*memory \(at most 0:01:00\)"):
        one.write(b"x", {"delay": timedelta.max})
    without = writer(topic, capabilities=Capability.NONE)
    without.write(b"x", {"delay": timedelta(0)})
    with pytest.raises(UnsupportedFeature, match=r"memory \(none\)"):
        without.write(b"x", {"delay": timedelta(microseconds=1)})


def test_what_is_published_while_a_message_is_handled_follows_from_it() -> None:
    """Causation is the message; correlation is the conversation's, handed on."""
    first = Envelope("first", "orders", b"", {})
    later = Envelope("later", "orders", b"", {"ce-correlationid": "first"})
    for cause, correlation in ((first, "first"), (later, "first")):
        token = handling.set(cause)
        try:
            headers = writer(orders).write(Order(id="1"), {"headers": {"a": "b"}}).headers
        finally:
            handling.reset(token)
        assert (headers["ce-correlationid"], headers["ce-causationid"]) == (correlation, cause.id)
    assert "ce-correlationid" not in writer(orders).write(Order(id="1")).headers


def test_a_content_encoding_is_for_bytes_alone() -> None:
    """JSON travels as it is: a header that says otherwise would make every consumer give it up."""
    with pytest.raises(InvalidHeader, match="content-encoding"):
        writer(orders).write(Order(id="1"), {"headers": {"Content-Encoding": "gzip"}})
    raw = Topic("raw", bytes)
    assert writer(raw).write(b"\x1f", {"headers": {"content-encoding": "gzip"}}).headers["content-encoding"] == "gzip"
