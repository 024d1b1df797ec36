"""The record of a death: what it says must travel on every broker, and cost little while it is kept."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import BaseModel

from msgbus import Bus, Reject, Topic
from msgbus.contract.adapter import Peekable
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import DEAD, Envelope


class Order(BaseModel):
    number: int


orders = Topic("orders", Order)


async def dead_letters(reason: str, count: int = 1) -> list[Envelope]:
    """The dead letters of a handler that rejects everything with this reason, as the broker keeps them."""
    bus = Bus("memory://", service="shop")
    last = asyncio.Event()

    @bus.subscribe(orders)
    async def refuse(order: Order) -> None:
        if order.number == count - 1:
            last.set()
        raise Reject(reason)

    async with asyncio.timeout(5), bus.running():
        await bus.publish_many(orders, [Order(number=number) for number in range(count)])
        await last.wait()
    async with bus:  # the drain has seen to it that what ran is settled
        adapter = bus.runtime.adapter
        assert isinstance(adapter, Peekable)
        return [envelope async for envelope in adapter.peek(dead_topic("orders", "shop"), DEAD_GROUP)]


@pytest.mark.parametrize(
    ("reason", "recorded"),
    [
        ("no such customer", "no such customer"),
        ("two\nlines,\ta tab", "two lines, a tab"),
        ("bell\x07 and\x00 zero", "bell and zero"),
        ("grün ist größer ✓", "grün ist größer ✓"),
        ("a lone \ud800 surrogate", "a lone  surrogate"),
        ("x" * 2000, "x" * 1024),
        ("é" * 1000, "é" * 512),
        ("\x07" + "x" * 2000, "x" * 1024),
    ],
)
async def test_the_reason_is_one_printable_line(reason: str, recorded: str) -> None:
    """Line breaks become spaces, control characters go, and it has at most 1,024 bytes of UTF-8, no half character at the end."""
    (letter,) = await dead_letters(reason)
    assert letter.headers[DEAD + "error-message"] == recorded


async def test_the_names_in_a_record_are_shared() -> None:
    """Thousands of dead letters hold each name of the record once, not thousands of times."""
    first, second = await dead_letters("no", count=2)
    names = [sorted((name for name in letter.headers if name.startswith(DEAD)), key=str) for letter in (first, second)]
    assert len(names[0]) == 15
    assert all(one is other for one, other in zip(*names, strict=True))
