"""Conformance: refusals. What a broker cannot keep is refused, at start or at the call, with what to do instead."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from msgbus.bus import Bus
from msgbus.contract.adapter import (
    Adapter,
    Capability,
)
from msgbus.errors import ConfigurationError, InvalidName, TopologyMismatch, UnsupportedFeature
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import Order, Stage, conformance
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
KEYED = Topic("orders", Order, key="id")


REFUSED_AT_START = Capability.BROADCAST | Capability.PRIORITIES | Capability.SHARDS | Capability.RETAIN


def ask_for(flag: Capability, bus: Bus) -> None:
    """Registers on a bus what only an adapter with this capability can keep."""
    topic = ORDERS
    if flag is Capability.PRIORITIES:
        topic = Topic("orders", Order, priorities=True)
    elif flag is Capability.SHARDS:
        topic = KEYED
    elif flag is Capability.RETAIN:
        topic = Topic("orders", Order, retain=timedelta(hours=1))

    async def handler_that_asks(order: Order) -> None: ...

    if flag is Capability.BROADCAST:
        bus.subscribe(topic, broadcast=True)(handler_that_asks)
    else:
        bus.subscribe(topic, group="workers")(handler_that_asks)


async def is_refused_at_start(stage: Stage, flag: Capability, adapter: Adapter) -> None:
    """A bus that needs the capability does not start: the error says what, who and what instead, and nothing was declared."""
    bus = stage.bus(adapter=adapter)
    ask_for(flag, bus)
    with pytest.raises(UnsupportedFeature) as caught:
        await stage.start(bus)
    error = caught.value
    assert "handler_that_asks" in error.feature or "'orders'" in error.feature, "it names the place"
    assert error.adapter == adapter.name
    assert error.alternative
    assert error.alternative in str(error)
    if flag is Capability.SHARDS:
        async with stage.bus(adapter=adapter) as pulling:
            with pytest.raises(UnsupportedFeature, match="'orders'"):
                await pulling.consumer(KEYED, group="workers").__aenter__()
    check = stage.bus(settings=stage.settings(topology="check"))
    ask_for(Capability.NONE, check)
    with pytest.raises(TopologyMismatch):
        await stage.start(check)


async def is_refused_at_the_call(publisher: Bus, delay: timedelta) -> None:
    """A delay that the broker cannot keep raises on who asks for it, whichever way it is said, and nothing is sent."""
    with pytest.raises(UnsupportedFeature) as caught:
        await publisher.publish(ORDERS, Order(), delay=delay)
    assert caught.value.alternative
    with pytest.raises(UnsupportedFeature) as caught:
        await publisher.publish(ORDERS, Order(), deliver_at=datetime.now(UTC) + delay + timedelta(seconds=5))
    assert caught.value.alternative


@conformance()
async def unsupported_feature_fails_at_declare(stage: Stage) -> None:
    """No option is ever ignored: what the broker in use cannot do is refused when the bus is entered, naming the place and the
    alternative, and nothing is declared; what is asked of a single message is refused at the call."""
    for flag in REFUSED_AT_START:
        adapter = FaultyAdapter(stage.new_adapter())
        adapter.hidden = flag
        await is_refused_at_start(stage, flag, adapter)
    adapter = FaultyAdapter(stage.new_adapter())
    adapter.hidden = Capability.DELAY
    publisher = await stage.entered(stage.bus(adapter=adapter))
    await is_refused_at_the_call(publisher, timedelta(seconds=1))
    with pytest.raises(UnsupportedFeature) as caught:
        await publisher.publish(ORDERS, Order(), priority="high")
    assert "priorities=True" in caught.value.alternative
    assert adapter.sent == []
    await publisher.publish(ORDERS, Order())
    assert len(adapter.sent) == 1, "the bus is as good as before"


async def only_where_not_claimed(stage: Stage, flag: Capability) -> None:
    """Skips the test where there is nothing to refuse."""
    if flag in (await stage.open_adapter()).capabilities:
        pytest.skip(f"the adapter claims {flag.name}: there is nothing to refuse")


@conformance()
async def broadcast_refused_with_alternative(stage: Stage) -> None:
    """Where BROADCAST is not claimed, `broadcast=True` is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.BROADCAST)
    await is_refused_at_start(stage, Capability.BROADCAST, stage.new_adapter())


@conformance()
async def priorities_refused_with_alternative(stage: Stage) -> None:
    """Where PRIORITIES is not claimed, a topic with priorities is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.PRIORITIES)
    await is_refused_at_start(stage, Capability.PRIORITIES, stage.new_adapter())


@conformance()
async def ordering_refused_with_alternative(stage: Stage) -> None:
    """Where SHARDS is not claimed, ordered handling is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.SHARDS)
    await is_refused_at_start(stage, Capability.SHARDS, stage.new_adapter())


@conformance()
async def retain_refused_with_alternative(stage: Stage) -> None:
    """Where RETAIN is not claimed, a topic that is to keep history is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.RETAIN)
    await is_refused_at_start(stage, Capability.RETAIN, stage.new_adapter())


@conformance()
async def delay_refused_with_alternative(stage: Stage) -> None:
    """A delay, or one longer than the broker keeps, is refused at the call, with what to do instead."""
    adapter = await stage.open_adapter()
    longest = adapter.limits.delay if Capability.DELAY in adapter.capabilities else 0.0
    if longest is None:
        pytest.skip("the adapter claims DELAY of any length: there is nothing to refuse")
    await is_refused_at_the_call(await stage.publisher(), timedelta(seconds=longest + 1))


@conformance()
async def durability_refused_with_alternative(stage: Stage) -> None:
    """Where DURABLE is not claimed, a stronger durability is refused at start, with what to do instead, and so is a program that
    must not lose what was confirmed."""
    await only_where_not_claimed(stage, Capability.DURABLE)
    for durability in ("fsync", "replicated"):
        with pytest.raises(UnsupportedFeature) as caught:
            await stage.entered(stage.bus(settings=stage.settings(durability=durability)))
        assert caught.value.alternative
    with pytest.raises(ConfigurationError):
        await stage.entered(stage.bus(settings=stage.settings(require_durable=True)))


@conformance()
async def patterns_refused_with_alternative(stage: Stage) -> None:
    """On every broker a pattern is no topic: refused where it is subscribed, with what to do instead, and at the call where it is
    published."""
    bus = stage.bus()
    for pattern in ("orders.*", "#", "orders.#"):
        with pytest.raises(UnsupportedFeature) as caught:

            @bus.subscribe(pattern)
            async def handler_of_many(order: Order) -> None: ...

        assert pattern in caught.value.feature
        assert caught.value.alternative
    publisher = await stage.publisher()
    with pytest.raises(InvalidName):
        await publisher.publish("orders.*", {})
