"""The pull side of a broker whose longest delay is shorter than a wait: the message goes round until its time has come."""

from __future__ import annotations

import time
from datetime import timedelta

from msgbus import Retry, Topic
from msgbus.contract.adapter import HasDepth
from msgbus.testing.stage import Broker, Order, Waits, opened
from msgbus.testing.suite_retrying import ShortDelays

ORDERS = Topic("orders", Order)


async def test_a_long_wait_is_kept_and_its_rounds_are_no_attempts() -> None:
    """A retry after 0.5 s, where the broker delays by a tenth of a second at most, is not handed out before, and is the second attempt."""
    async with opened(Broker("memory://")) as stage:
        adapter = ShortDelays(stage.new_adapter())
        bus = stage.bus(adapter=adapter, retry=Retry(attempts=6, wait=Waits(lambda _: 0.0)))
        async with bus, bus.consumer(ORDERS, group="billing", window=1) as consumer:
            await bus.publish(ORDERS, Order(n=1))
            (first,) = await consumer.receive()
            failed_at = time.time()
            await first.retry(timedelta(seconds=0.5))
            (second,) = await consumer.receive()
            assert time.time() - failed_at >= 0.5
            assert second.message.n == 1
            assert (first.context.attempt, second.context.attempt) == (1, 2)
            await second.ack()
        async with bus:
            assert isinstance(adapter.real, HasDepth)
            depth = await adapter.real.depth(stage.namespace + "orders", "billing")
            assert (depth.ready, depth.in_flight, depth.delayed) == (0, 0, 0)
