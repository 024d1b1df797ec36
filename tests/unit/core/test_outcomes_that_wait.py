"""What is decided of a message and cannot be carried out yet stops the intake: whatever else waited before it."""

from __future__ import annotations

from msgbus import Reject, Retry, Topic
from msgbus.contract.envelope import Envelope
from msgbus.errors import PublishRejected
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import Broker, Order, Seen, Waits, eventually, opened
from msgbus.testing.suite_retrying import ShortDelays
from msgbus_memory import MemoryAdapter

ORDERS = Topic("orders", Order)


def refuse_dead_letters(envelope: Envelope) -> PublishRejected | None:
    """A broker that has no room for dead letters."""
    return PublishRejected("a test") if envelope.topic.endswith(".dead") else None


async def test_after_a_wait_that_went_round() -> None:
    """A retry that waits longer than the broker's longest delay comes back early and is sent round: that is no outcome left undone, so
    the first dead letter that cannot be stored afterwards still stops the intake, and the intake goes on once it is stored."""
    async with opened(Broker("memory://")) as stage:
        faulty: FaultyAdapter = ShortDelays(MemoryAdapter())
        bus = stage.bus(adapter=faulty, retry=Retry(attempts=6, wait=Waits(lambda attempt: 0.3 if attempt == 4 else 0.001)))
        runs: Seen[int] = Seen()

        @bus.subscribe(ORDERS)
        async def handle(order: Order) -> None:
            await runs.add(order.n)
            if order.text == "reject":
                raise Reject("never")
            if runs.items.count(order.n) < 5:
                raise ValueError("not yet")

        await stage.start(bus)
        await bus.publish(ORDERS, Order(n=1))
        await runs.wait_for(5)
        faulty.on_send = refuse_dead_letters
        await bus.publish(ORDERS, Order(n=2, text="reject"))
        await runs.wait_for(6)
        await eventually(lambda: bus.health().subscriptions[0].intake_stopped, what="the end of the intake")
        faulty.on_send = None
        await eventually(lambda: not bus.health().subscriptions[0].intake_stopped, what="the intake")
        assert bus.health().subscriptions[0].counts["dead"] == 1
