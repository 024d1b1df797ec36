"""Health: what it says of a broker that is well, however much there is to look at."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgbus import Bus, Topic
from msgbus.contract.adapter import AdapterSettings
from msgbus.health import Monitor
from msgbus_memory import MemoryAdapter


class Slow(MemoryAdapter):
    """Takes its time to say which groups a topic has, as brokers across a network do."""

    async def groups(self, topic: str) -> Sequence[str]:
        await asyncio.sleep(0.02)  # the network
        return await super().groups(topic)


async def test_many_topics_do_not_make_a_broker_look_away() -> None:
    """Looking which topics nobody claims may take longer than a ping; each answer shows that the broker is there."""
    adapter = Slow.from_url("memory://", {}, AdapterSettings())
    topics = [f"orders.{number}" for number in range(30)]
    async with Bus(adapter=adapter, service="shop") as bus:
        for name in topics:
            await bus.publish(name, 1)
        monitor = Monitor(adapter, 0.2, lambda: topics)
        running = asyncio.create_task(monitor.run())
        async with asyncio.timeout(10):
            while not monitor.unclaimed:
                assert monitor.problem is None
                await asyncio.sleep(0.01)
        running.cancel()
    assert list(monitor.unclaimed) == topics


async def test_what_has_not_happened_is_counted_as_zero() -> None:
    """Who exports the counts need not ask which of them there are yet."""
    bus = Bus("memory://", service="shop")

    @bus.subscribe(Topic("orders", int))
    async def handle(order: int) -> None: ...

    async with bus.running():
        counts = bus.health().subscriptions[0].counts
    assert counts == dict.fromkeys(("done", "repeated", "dropped", "dead", "retried", "failed", "expired", "released", "stale_acks"), 0)
