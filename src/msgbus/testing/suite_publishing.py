"""Conformance: publishing. C1 of the contract: what a returned, a raised and a cancelled publish mean."""

from __future__ import annotations

from msgbus.testing.stage import Order, Seen, Stage, conformance
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)


@conformance()
async def publish_returns_after_confirm(stage: Stage) -> None:
    """C1: when `publish` returns, the message is kept: a process that dies right after it loses nothing."""
    bus = stage.bus()
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    worker = await stage.start(bus)
    publisher = stage.bus(service="publisher")
    async with publisher:
        receipt = await publisher.publish(ORDERS, Order(n=1))
        assert receipt.state == "confirmed"
        adapter = publisher.given_adapter
        assert adapter is not None
        await stage.broker.crash(adapter)
    await seen.wait_for(1)
    await worker.stop()
    assert seen.items == [1]
