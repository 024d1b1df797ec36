"""Steps that tests of several modules of the suite take."""

from __future__ import annotations

from typing import Any

from tenacity import wait_fixed

from msgbus.bus import Bus
from msgbus.contract.adapter import Adapter, Capability, Received, Receiver
from msgbus.health import SubscriptionHealth
from msgbus.testing.stage import Order, Stage
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
KEYED = Topic("keyed", Order, key="id")

SEND_TIMEOUT = 10.0
LONG = 30.0
"""Seconds that a redelivery, or joining a group, may take on the slowest broker."""
QUICK = wait_fixed(0.01)
EARLY = 0.005
"""Seconds that clocks read in milliseconds may differ by."""


async def send_numbered(stage: Stage, adapter: Adapter, count: int, topic: str = "orders", start: int = 0) -> None:
    """Messages `start`, `start` + 1, ... as bodies, confirmed."""
    envelopes = [stage.envelope(topic, b"%d" % n) for n in range(start, start + count)]
    assert await adapter.send(envelopes, timeout=SEND_TIMEOUT) == [None] * count


async def declared(stage: Stage, **receiver: Any) -> tuple[Adapter, Receiver]:
    """An adapter with a topic and a group of it, and a receiver."""
    adapter = await stage.open_adapter()
    spec = stage.receiver_spec(**receiver)
    await adapter.declare([stage.topic_spec()], [spec])
    return adapter, await stage.receiver(adapter, spec)


def numbers_of(taken: list[Received]) -> list[int]:
    """What `send_numbered` wrote, in order."""
    return sorted(int(received.envelope.body) for received in taken)


def state_of(bus: Bus) -> SubscriptionHealth:
    """The health of a bus's one subscription."""
    (health,) = bus.health().subscriptions
    return health


def counted(bus: Bus, what: str) -> int:
    """How often its one subscription did it since it started."""
    return state_of(bus).counts.get(what, 0)


async def topics_of(stage: Stage) -> list[Topic[Order]]:
    """An unordered topic, and an ordered one where the broker has them: the clause holds for both."""
    capabilities = (await stage.open_adapter()).capabilities
    return [ORDERS, KEYED] if Capability.SHARDS in capabilities else [ORDERS]
