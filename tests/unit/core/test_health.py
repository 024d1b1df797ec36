"""Health: what it says of a broker that is well, however much there is to look at."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import pytest

from msgbus import Bus, Topic
from msgbus.contract.adapter import AdapterSettings
from msgbus.health import Monitor
from msgbus.settings import Settings
from msgbus.testing.stage import eventually
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


class Watchful(MemoryAdapter):
    """Knows of something that someone should look at, of the broker and of each group."""

    full = True

    async def warnings(self, groups: Sequence[tuple[str, str]]) -> Sequence[str]:
        return [f"{group} of {topic} falls behind" for topic, group in groups] or ["the disk is nearly full"] * self.full


async def test_what_an_adapter_warns_of_is_degraded(caplog: pytest.LogCaptureFixture) -> None:
    """Of the broker as long as it lasts, and of each group that is handled; each is logged once."""
    adapter = Watchful.from_url("memory://", {}, AdapterSettings(heartbeat=0.1))
    bus = Bus(adapter=adapter, service="shop", settings=Settings(heartbeat=timedelta(seconds=0.1)))

    @bus.subscribe(Topic("orders", int))
    async def handle(order: int) -> None: ...

    async with bus.running():
        await eventually(lambda: len(bus.health().problems) == 2, 10)
        health = bus.health()
        assert (health.status, health.problems) == ("degraded", ("the disk is nearly full", "shop of orders falls behind"))
        adapter.full = False
        await eventually(lambda: bus.health().problems == ("shop of orders falls behind",), 10)
    assert [record.message for record in caplog.records if "broker: " in record.message] == [
        "broker: the disk is nearly full",
        "broker: shop of orders falls behind",
    ]


async def test_what_has_not_happened_is_counted_as_zero() -> None:
    """Who exports the counts need not ask which of them there are yet."""
    bus = Bus("memory://", service="shop")

    @bus.subscribe(Topic("orders", int))
    async def handle(order: int) -> None: ...

    async with bus.running():
        counts = bus.health().subscriptions[0].counts
    assert counts == dict.fromkeys(("done", "repeated", "dropped", "dead", "retried", "failed", "expired", "released", "stale_acks"), 0)
