"""A pull consumer in the hands of several tasks, and one that is left while it is in use."""

from __future__ import annotations

import asyncio
import gc
from datetime import timedelta

import pytest
from pydantic import BaseModel

from msgbus import Bus, Topic
from msgbus.contract.adapter import HasDepth
from msgbus.errors import ConfigurationError, DecodeError
from msgbus.testing.stage import Seen


class Order(BaseModel):
    n: int


orders = Topic("orders", Order)


async def test_tasks_share_a_consumer() -> None:
    """Several tasks may receive from one consumer: each gets its share, and none waits for ever."""
    seen: Seen[tuple[str, int]] = Seen()

    async with Bus("memory://") as bus, bus.consumer(orders, group="g") as consumer:

        async def take(name: str) -> None:
            for delivery in await consumer.receive():
                await delivery.ack()
                await seen.add((name, delivery.message.n))

        tasks = [asyncio.create_task(take(name)) for name in "abc"]
        await asyncio.sleep(0.05)  # all of them wait
        for n in range(3):
            await bus.publish(orders, Order(n=n))
        await seen.wait_for(3, 5)
        await asyncio.gather(*tasks)
    assert sorted(name for name, _ in seen.items) == ["a", "b", "c"]


async def test_a_timeout_holds_while_another_task_receives() -> None:
    """A task that waits for its turn waits no longer than it said."""
    async with Bus("memory://") as bus, bus.consumer(orders, group="g") as consumer:
        other = asyncio.create_task(consumer.receive())
        await asyncio.sleep(0.05)  # it has its turn
        async with asyncio.timeout(0.5):
            assert await consumer.receive(timeout=timedelta(seconds=0.1)) == []
        other.cancel()


async def test_who_waits_when_a_consumer_is_left_is_told_so() -> None:
    """No receiver is opened behind a consumer that was left: what comes then is nobody's until somebody asks for it."""
    async with Bus("memory://") as bus:
        consumer = bus.consumer(orders, group="g")
        async with consumer:
            waiting = asyncio.create_task(consumer.receive())
            await asyncio.sleep(0.05)  # it waits for a message
        with pytest.raises(ConfigurationError, match="not entered"):
            async with asyncio.timeout(5):
                await waiting
        await bus.publish(orders, Order(n=1))
        adapter = bus.runtime.adapter
        assert isinstance(adapter, HasDepth)
        assert (await adapter.depth("orders", "g")).ready == 1


async def test_a_body_that_is_looked_at_too_late_costs_only_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Read after the consumer was left, a body that does not fit cannot be made a dead letter any more: it comes again."""
    caught: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))
    anything = Topic("orders", dict[str, str])
    bus = Bus("memory://late")
    async with Bus("memory://late") as feed:
        await feed.publish(anything, {"n": "x"})
    async with bus:
        async with bus.consumer(orders, group="g") as consumer:
            (delivery,) = await consumer.receive()
        with pytest.raises(DecodeError):
            _ = delivery.message
        await asyncio.sleep(0.01)  # what goes on in the background ends
        gc.collect()
    assert "could not be moved" in caplog.text
    assert not caught
