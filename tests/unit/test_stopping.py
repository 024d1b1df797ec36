"""Stopping while something else is going on: starting, waiting for a broker that does not answer, handlers that will not end."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from pydantic import BaseModel

from msgbus import Bus, Topic
from msgbus.contract.adapter import Receiver, ReceiverSpec
from msgbus.errors import ConfigurationError
from msgbus.settings import Settings
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import eventually
from msgbus_memory import MemoryAdapter


class Order(BaseModel):
    n: int = 0


orders = Topic("orders", Order)
SECONDS = Settings(drain_timeout=timedelta(seconds=0.5), close_timeout=timedelta(seconds=1))


class Silent(FaultyAdapter):
    """Once `silent`, no call on it or its receivers is ever answered."""

    def __init__(self) -> None:
        super().__init__(MemoryAdapter())
        self.silent = False
        self.make_receiver = SilentReceiver

    async def answer(self) -> None:
        """Never comes, once silent."""
        if self.silent:
            await asyncio.Event().wait()

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        await self.answer()
        return await super().open_receiver(spec)

    async def close(self) -> None:
        await self.answer()
        await super().close()


class SilentReceiver(FaultyReceiver):
    async def drain(self) -> None:
        await self._answer()
        await super().drain()

    async def close(self) -> None:
        await self._answer()
        await super().close()

    async def _answer(self) -> None:
        assert isinstance(self.adapter, Silent)
        await self.adapter.answer()


@pytest.mark.parametrize("broadcast", [False, True])
async def test_a_broker_that_opens_no_receiver_does_not_hold_up_a_stop(broadcast: bool) -> None:
    """Stopped while a receiver is being opened, `run()` ends at once."""
    adapter = Silent()
    bus = Bus(adapter=adapter, service="shop", settings=SECONDS)
    asked = asyncio.Event()

    @bus.subscribe(orders, broadcast=broadcast)
    async def handle(order: Order) -> None: ...

    async def never(spec: ReceiverSpec) -> Receiver:
        asked.set()
        return await asyncio.Future[Receiver]()

    adapter.open_receiver = never  # type: ignore[method-assign]
    running = asyncio.create_task(bus.run())
    await asked.wait()
    bus.stop()
    async with asyncio.timeout(1.5):
        await running


async def test_shutting_down_takes_no_longer_than_its_two_timeouts() -> None:
    """A broker that answers nothing any more, and handlers that will not be cancelled: `drain_timeout` and `close_timeout`, no more."""
    adapter = Silent()
    bus = Bus(adapter=adapter, service="shop", settings=SECONDS)
    started = asyncio.Event()
    enough = asyncio.Event()

    @bus.subscribe(orders, concurrency=2)
    async def handle(order: Order) -> None:
        started.set()
        while not enough.is_set():
            try:
                await enough.wait()
            except asyncio.CancelledError:
                continue

    running = asyncio.create_task(bus.run())
    loop = asyncio.get_running_loop()
    await eventually(lambda: bool(bus.runners))
    for n in range(10):
        await bus.publish(orders, Order(n=n))
    await started.wait()
    adapter.silent = True
    begun = loop.time()
    bus.stop()
    await running
    took = loop.time() - begun
    enough.set()
    await asyncio.sleep(0.01)  # what was left behind ends with the test
    assert took < 0.5 + 1.0 + 0.2


async def test_stop_while_it_is_still_connecting() -> None:
    """`stop()` counts from the moment that `run()` was called: it ends once it is through with connecting."""
    adapter = FaultyAdapter(MemoryAdapter())
    adapter.away = True
    bus = Bus(adapter=adapter, service="shop", settings=SECONDS)

    @bus.subscribe(orders)
    async def handle(order: Order) -> None: ...

    running = asyncio.create_task(bus.run())
    await asyncio.sleep(0.05)  # it tries to connect
    bus.stop()
    adapter.away = False
    async with asyncio.timeout(5):
        await running


async def test_a_bus_is_entered_by_one_at_a_time() -> None:
    """Entering a bus that is just being entered is refused, as entering it twice is; nothing of the first entry is lost."""

    class Slow(FaultyAdapter):
        async def open(self) -> None:
            await asyncio.sleep(0.05)  # long enough for another to enter
            await super().open()

    bus = Bus(adapter=Slow(MemoryAdapter()), service="shop", settings=SECONDS)
    before = asyncio.all_tasks()
    first = asyncio.create_task(bus.__aenter__())
    await asyncio.sleep(0)
    for second in (bus, bus.running()):
        with pytest.raises(ConfigurationError, match="entered already"):
            async with second:
                pass
    await first
    await bus.publish(orders, Order())
    await bus.__aexit__(None, None, None)
    assert asyncio.all_tasks() == before


def test_stop_after_its_event_loop_was_closed() -> None:
    """Nothing runs any more, so nothing happens: who stops it from a thread or at exit need not know."""
    bus = Bus("memory://", service="shop")
    loop = asyncio.new_event_loop()
    running = bus.running()
    loop.run_until_complete(running.__aenter__())
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.wait(left))
    loop.close()
    bus.stop()
