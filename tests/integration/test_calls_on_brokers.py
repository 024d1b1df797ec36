"""A message's path through the core stays short on every broker: the counts and limits are those of `tests/unit/test_calls.py`.

Published here by many callers at once, as in a service under load: what they share is counted once for all of them.
"""

from __future__ import annotations

import asyncio
import uuid

import pytest
from tests.brokers import Server
from tests.unit.test_calls import MESSAGES, MOST_CLASSES, MOST_IN, MOST_OUT, Calls, Order, order

from msgbus import Bus, Topic

pytestmark = [pytest.mark.parametrize("key", [None, "id"], ids=["unkeyed", "keyed"]), pytest.mark.timeout(180)]


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker(name)) for name in names])


CALLERS = 256


def fresh_topic(key: str | None) -> Topic[Order]:
    return Topic(f"calls-{uuid.uuid4().hex}", Order, key=key)


@on("redis", "rabbitmq", "kafka")
async def test_the_way_out(name: str, key: str | None, running: Server) -> None:
    """Publishing a message calls at most 12 functions of ours, of at most 6 classes."""
    topic, calls = fresh_topic(key), Calls()
    numbers = iter(range(MESSAGES))

    async with Bus(running.url, service="shop") as bus:
        await bus.publish(topic, order(0))  # makes the topic's writer

        async def publish() -> None:
            for number in numbers:
                await bus.publish(topic, order(number))

        with calls.counting():
            await asyncio.gather(*(publish() for _ in range(CALLERS)))
    assert calls.a_message() <= MOST_OUT, f"{name}: {calls}"
    assert len(calls.on_the_path()) <= MOST_CLASSES, f"{name}: {calls}"


@on("redis", "rabbitmq", "kafka")
async def test_the_way_in(name: str, key: str | None, running: Server) -> None:
    """Handling a message, from receive to ack, with the default middleware, calls at most 20 functions of ours, of at most 6 classes."""
    topic, calls = fresh_topic(key), Calls()
    bus = Bus(running.url, service="shop")
    left = MESSAGES
    begun, done = asyncio.Event(), asyncio.Event()

    @bus.subscribe(topic)
    async def handle(_: Order) -> None:
        nonlocal left
        left -= 1
        begun.set()
        if not left:
            done.set()

    async with bus:
        async with bus.consumer(topic, group="shop"):
            pass  # the group is there first: its backlog need not be moved to it
        await bus.publish_many(topic, map(order, range(MESSAGES)))
    async with asyncio.timeout(150), bus.running():
        await begun.wait()  # a group's first message may take seconds to come
        counted = left
        with calls.counting():
            await done.wait()
    assert counted > MESSAGES * 0.9, f"{name}: handled before we could count: {MESSAGES - counted}"
    share = MESSAGES / counted
    assert calls.a_message() * share <= MOST_IN, f"{name}: {calls}"
    assert len(calls.on_the_path()) <= MOST_CLASSES, f"{name}: {calls}"
