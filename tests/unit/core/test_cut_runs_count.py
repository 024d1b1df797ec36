"""A drain that cuts a handler off does not forget the runs that ended before: `attempts` holds over restarts."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import BaseModel
from tenacity import wait_none

from msgbus import Bus, Context, Retry, Topic
from msgbus.settings import Settings
from msgbus.testing.stage import Seen, eventually


class Order(BaseModel):
    n: int


orders = Topic("orders", Order)


async def test_runs_before_the_one_that_was_cut_off_count() -> None:
    """Two failed runs, then a run that a shutdown cancels: the next process begins with run 3, and the third failure is the last."""
    runs: Seen[int] = Seen()
    hang = True

    def service() -> Bus:
        bus = Bus(
            "memory://cut-runs-count",
            service="shop",
            settings=Settings(drain_timeout=timedelta(0)),
            retry=Retry(attempts=3, wait=wait_none()),
        )

        @bus.subscribe(orders)
        async def handle(order: Order, context: Context) -> None:
            await runs.add(context.attempt)
            if context.attempt == 3 and hang:
                await asyncio.Event().wait()
            raise ValueError("no")

        return bus

    async with service().running() as bus:
        await bus.publish(orders, Order(n=1))
        await runs.wait_for(3)
    assert runs.items == [1, 2, 3]
    hang = False
    async with service().running() as bus:
        await eventually(lambda: bus.health().subscriptions[0].counts.get("dead") == 1)
        letters = [letter async for letter in bus.dead_letters(orders, group="shop").list()]
    assert runs.items == [1, 2, 3, 3]
    assert [letter.attempts for letter in letters] == [3]
