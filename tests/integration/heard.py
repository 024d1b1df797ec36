"""A program with its logging as it comes: publishes all the time, and says on stdout what it has seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from pydantic import BaseModel

from msgbus import Bus, Topic
from msgbus.errors import BrokerError


class Order(BaseModel):
    """What is bought."""

    n: int


orders = Topic("orders", Order)


@asynccontextmanager
async def publishing(bus: Bus) -> AsyncGenerator[None, None]:
    """While the bus runs."""

    async def publish() -> None:
        while True:
            with suppress(BrokerError):
                await bus.publish(orders, Order(n=0))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(publish())
    yield
    task.cancel()


bus = Bus(service="heard", lifespan=publishing)


@bus.subscribe(orders)
async def hear(order: Order) -> None:
    print(f"seen {order.n}", flush=True)


if __name__ == "__main__":
    asyncio.run(bus.run())
