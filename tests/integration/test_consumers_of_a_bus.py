"""Several pull consumers of one ordered group on one bus, so on one connection: they share its shards out as processes do."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from pydantic import BaseModel
from tests.brokers import Server

from msgbus import Bus, Topic
from msgbus.consumer import Consumer

pytestmark = pytest.mark.timeout(180)

CONSUMERS, KEYS, EACH = 4, 32, 5


class Step(BaseModel):
    key: str
    number: int


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker(name)) for name in ("redis", "rabbitmq", "kafka")])
async def test_no_shard_is_left_unread(name: str, running: Server) -> None:
    """Between them they get everything, the steps of a key in order, though all of them begin at the same moment."""
    topic = Topic(f"shared-{uuid4().hex[:10]}", Step, key="key")
    steps: defaultdict[str, list[int]] = defaultdict(list)
    async with Bus(running.url, service="shop") as bus, AsyncExitStack() as stack:
        consumers = [await stack.enter_async_context(bus.consumer(topic, group="workers")) for _ in range(CONSUMERS)]

        async def consume(consumer: Consumer[Step]) -> None:
            async for delivery in consumer:
                steps[delivery.message.key].append(delivery.message.number)
                await delivery.ack()
                if sum(map(len, steps.values())) == KEYS * EACH:
                    done.set()

        done = asyncio.Event()
        tasks = [asyncio.create_task(consume(consumer)) for consumer in consumers]
        try:
            await bus.publish_many(topic, [Step(key=f"key{key}", number=number) for number in range(EACH) for key in range(KEYS)])
            async with asyncio.timeout(40):
                await done.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    assert {key: list(range(EACH)) for key in (f"key{number}" for number in range(KEYS))} == steps
