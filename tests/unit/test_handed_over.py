"""A shard that others wait for while one of its messages waits here for its next run."""

from __future__ import annotations

import asyncio

from tenacity import wait_fixed

from msgbus import Bus, Context, Retry, Topic
from msgbus.contract.adapter import AdapterSettings, Received, Tenure
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.urls import adapter_from_url

WORK = Topic("work", int)


class ATenureEach(FaultyReceiver):
    """Hands out each message by a tenure of its own, which the test wants back."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        batch = await super().receive(limit, timeout)
        for received in batch:
            received.tenure = Tenure()
        return batch


async def test_attempts_go_along() -> None:
    """A message without a key that has failed and goes back, because its shard is wanted elsewhere, keeps the count of its attempts."""
    adapter = FaultyAdapter(adapter_from_url("memory://", AdapterSettings()))
    adapter.make_receiver = ATenureEach
    bus = Bus(adapter=adapter, service="worker", retry=Retry(attempts=5, wait=wait_fixed(4)))
    attempts: asyncio.Queue[int] = asyncio.Queue()

    @bus.subscribe(WORK)
    async def work(number: int, context: Context) -> None:
        attempts.put_nowait(context.attempt)
        if context.attempt < 3:
            raise ValueError("not yet")

    async with bus.running(), asyncio.timeout(10):
        await bus.publish(WORK, 1)
        for attempt in (1, 2):
            assert await attempts.get() == attempt
            adapter.receivers[0].received[-1].tenure.draining = True
        assert await attempts.get() == 3
