"""The pull side of a topic with priorities: every level is delivered, the high first, none starved; what is taken is never lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta

import pytest
from pydantic import BaseModel

from msgbus import Bus, Topic
from msgbus.errors import TopologyMismatch

SOON = timedelta(seconds=5)


class Order(BaseModel):
    level: str
    n: int = 0


orders = Topic("orders", Order, priorities=True)


async def test_every_level_is_delivered() -> None:
    """C2 holds for each priority: a consumer gets high, normal and low messages."""
    async with Bus("memory://", service="shop") as bus, bus.consumer(orders, group="export") as consumer:
        await bus.publish(orders, Order(level="low"), priority="low")
        await bus.publish(orders, Order(level="normal"))
        await bus.publish(orders, Order(level="high"), priority="high")
        got = [(await consumer.receive(timeout=SOON))[0] for _ in range(3)]
        for delivery in got:
            await delivery.ack()
        assert {delivery.message.level for delivery in got} == {"low", "normal", "high"}
        assert await consumer.receive(timeout=timedelta(0)) == []


async def test_high_goes_first_and_low_does_not_starve() -> None:
    """While every level has messages, 13 deliveries are about 8 high, 4 normal and 1 low."""
    async with Bus("memory://", service="shop") as bus, bus.consumer(orders, group="export", window=26) as consumer:
        await bus.publish_many(orders, [Order(level="low")] * 100, priority="low")
        await bus.publish_many(orders, [Order(level="normal")] * 100)
        await bus.publish_many(orders, [Order(level="high")] * 100, priority="high")
        seen: Counter[str] = Counter()
        for _ in range(13 * 5):
            (delivery,) = await consumer.receive(timeout=SOON)
            seen[delivery.message.level] += 1
            await delivery.ack()
        assert seen == {"high": 40, "normal": 20, "low": 5}


async def test_a_message_that_comes_while_it_waits_is_delivered_on_any_level() -> None:
    """A waiting receive returns for whichever level has something first."""
    async with Bus("memory://", service="shop") as bus, bus.consumer(orders, group="export") as consumer:
        for level in ("low", "high", "normal"):
            waiting = asyncio.create_task(consumer.receive(5, timeout=SOON))
            await asyncio.sleep(0)
            await bus.publish(orders, Order(level=level), priority=level)
            (delivery,) = await waiting
            assert delivery.message.level == level
            await delivery.ack()


async def test_cancelling_a_receive_loses_nothing() -> None:
    """What came in the moment of cancelling is handed out by the next receive."""
    async with Bus("memory://", service="shop") as bus, bus.consumer(orders, group="export") as consumer:
        for n in range(30):
            waiting = asyncio.create_task(consumer.receive(2, timeout=SOON))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            await bus.publish(orders, Order(level="x", n=n), priority=("high", "normal", "low")[n % 3])
            waiting.cancel()
            (result,) = await asyncio.gather(waiting, return_exceptions=True)
            if isinstance(result, BaseException):
                result = await consumer.receive(2, timeout=SOON)
            assert [delivery.message.n for delivery in result] == [n]
            await result[0].ack()


async def test_a_topic_whose_declaration_failed_is_forgotten() -> None:
    """The right Topic can be published after a wrong one of its name was refused by the broker."""
    right, wrong = Topic("keyed", Order, key="level", shards=4), Topic("keyed", Order, key="level", shards=8)
    async with Bus("memory://declared", service="a") as first, Bus("memory://declared", service="b") as second:
        await first.publish(right, Order(level="a"))
        with pytest.raises(TopologyMismatch):
            await second.publish(wrong, Order(level="a"))
        await second.publish(right, Order(level="a"))
