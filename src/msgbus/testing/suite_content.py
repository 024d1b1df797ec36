"""Conformance: content. What arrives is what was sent: bodies, models, headers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

from msgbus.context import Context
from msgbus.contract.envelope import MAX_HEADER_NAME, MAX_HEADER_VALUE, MAX_HEADERS
from msgbus.errors import InvalidHeader
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import Order, Seen, Stage, conformance, patient
from msgbus.testing.steps import LONG
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
BLOBS = Topic("blobs", bytes)


class Price(BaseModel):
    """A model with fields that JSON has no type for."""

    id: UUID
    amount: Decimal
    at: datetime
    note: str | None = None


@dataclass
class Point:
    """A dataclass as a message."""

    x: int
    y: float


class Address(TypedDict):
    """A TypedDict as a message."""

    street: str
    number: int


@conformance(seconds=60)
async def roundtrip_all_content_types(stage: Stage) -> None:
    """C2: what a handler is given equals what was published, whatever the topic's model is (a pydantic model, a dataclass, a TypedDict, a
    list, a union, plain text, bytes) and whatever content type it travels as."""
    price = Price(id=UUID(int=7), amount=Decimal("0.10"), at=datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC))
    cases: list[tuple[Topic[Any], Any, str]] = [
        (Topic("prices", Price), price, "application/json"),
        (Topic("points", Point), Point(-1, 0.1), "application/json"),
        (Topic("addresses", Address), Address(street="Straße", number=2**53 + 1), "application/json"),
        (Topic("lists", list[int]), [1, 2, 3], "application/json"),
        (Topic("unions", int | str | None), "text", "application/json"),  # pyright: ignore[reportArgumentType]
        (Topic("texts", str), "ünïcödé \U0001f600 \u0000 \n", "application/json"),
        (Topic("typed", Order, content_type="application/vnd.shop.order+json"), Order(n=1), "application/vnd.shop.order+json"),
        (Topic("images", bytes, content_type="image/png"), b"\x89PNG\r\n", "image/png"),
        (Topic("octets", bytes), b"\x00\x01", "application/octet-stream"),
    ]
    bus = stage.bus()
    seen: Seen[tuple[str, Any, str | None]] = Seen()

    async def handle(message: Any, context: Context) -> None:
        await seen.add((context.topic, message, context.envelope.headers.get("content-type")))

    for topic, _, _ in cases:
        bus.subscribe(topic)(handle)
    await stage.start(bus)
    publisher = await stage.publisher()
    for topic, message, _ in cases:
        await publisher.publish(topic, message)
    await seen.wait_for(len(cases), LONG)
    assert sorted(seen.items, key=lambda item: item[0]) == sorted(
        [(topic.name, message, content_type) for topic, message, content_type in cases], key=lambda item: item[0]
    )


@conformance()
async def roundtrip_empty_body(stage: Stage) -> None:
    """C2: a message without a byte is a message: it arrives, once, as empty as it was; a group whose model it does not fit keeps it as a
    dead letter."""
    empties = Topic("empties", bytes, content_type="application/json")
    worker, seen = await stage.collect(empties)
    bus = stage.bus(service="other")

    @bus.subscribe("empties")
    async def handle(order: Order) -> None:
        await seen.add(b"an order was made of nothing")

    other = await stage.start(bus)
    publisher = await stage.publisher()
    await publisher.publish(empties, b"")
    await seen.wait_for(1)
    [letter] = await stage.dead_letters(1, "empties", group="other")
    await worker.stop()
    await other.stop()
    assert seen.items == [b""]
    assert (letter.reason, letter.body) == ("invalid", b"")


@conformance()
async def roundtrip_non_utf8_body(stage: Stage) -> None:
    """C2: a body is bytes: every one of the 256, in any order, arrives as it was sent."""
    _, seen = await stage.collect(BLOBS)
    publisher = await stage.publisher()
    bodies = [bytes(range(256)), b"\xff\xfe\x00", b"\xc3\x28", b"\x00", b"\r\n\r\n", b"\x1f\x8b\x08", bytes(reversed(range(256))) * 300]
    for body in bodies:
        await publisher.publish(BLOBS, body)
    await seen.wait_for(len(bodies))
    assert sorted(seen.items) == sorted(bodies)


@conformance()
async def headers_roundtrip_types_and_unicode(stage: Stage) -> None:
    """C2: headers are text by name: any UTF-8, empty, 8 KiB long, 64 of them, with names of any legal character and length; a handler reads
    them as they were given, beside id, key and the facts of the message. What is no text is refused before it is sent."""
    bus = stage.bus()
    seen: Seen[Context] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await seen.add(context)

    await stage.start(bus)
    adapter = FaultyAdapter(stage.new_adapter())
    publisher = await stage.entered(stage.bus(adapter=adapter, service="publisher"))
    headers = {
        "plain": "text",
        "empty": "",
        "Mixed-Case_and.dots": "1.0",
        "unicode": "ünïcödé ☃ \U0001f600 עברית",
        "number": "42",
        "spaces": "  two  spaces  ",
        "json": '{"a": [1, null]}',
        "percent": "%41 %",
        "n" * MAX_HEADER_NAME: "a long name",
        "long": "x" * MAX_HEADER_VALUE,
    }
    headers |= {f"more-{n}": str(n) for n in range(MAX_HEADERS - len(headers))}
    published: Any = datetime.now(UTC)
    receipt = await publisher.publish(ORDERS, Order(), headers=headers, id="id ☃/1", key="ключ 1", idempotency_key="once ☃")
    await seen.wait_for(1)
    [context] = seen.items
    assert context.headers == headers
    assert context.id == receipt.id == "id ☃/1"
    assert (context.key, context.idempotency_key, context.correlation_id) == ("ключ 1", "once ☃", "id ☃/1")
    assert (context.topic, context.group, context.attempt) == ("orders", "suite", 1)
    assert abs(context.published_at - published) < timedelta(seconds=patient(10))

    sent = len(adapter.sent)
    for value in (42, 1.5, float("nan"), None, b"bytes", ["list"], {"a": "b"}, True, "line\nbreak", "nul\x00", "\ud800"):
        with pytest.raises(InvalidHeader, match="bad-header"):
            await publisher.publish(ORDERS, Order(), headers={"bad-header": cast(str, value)})
    for name in ("", "with space", "ünïcode", "n" * (MAX_HEADER_NAME + 1), "msgbus-attempt", "ce-id"):
        with pytest.raises(InvalidHeader):
            await publisher.publish(ORDERS, Order(), headers={name: "value"})
    assert len(adapter.sent) == sent
