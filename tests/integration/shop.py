"""The program of the operators' tests: one ordered topic with a group that gives up what is negative, and a topic that it publishes to."""

from __future__ import annotations

from pydantic import BaseModel

from msgbus import Bus, Reject, Topic
from msgbus.testing.stage import Seen


class Order(BaseModel):
    """What is bought."""

    customer: str
    n: int


orders = Topic("orders", Order, key="customer")
bills = Topic("bills", Order)


def shop(seen: Seen[int] | None = None) -> Bus:
    """The program; its handler notes what it has seen."""
    bus = Bus(service="billing")

    @bus.subscribe(orders, publish_to=bills)
    async def invoice(order: Order) -> Order:
        if order.n < 0:
            raise Reject("nothing is bought")
        if seen is not None:
            await seen.add(order.n)
        return order

    return bus
