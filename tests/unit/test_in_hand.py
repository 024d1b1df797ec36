"""What becomes of messages between their arrival and their run: expiry, pauses, shards that change hands, lost links."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from pydantic import BaseModel
from tenacity import wait_fixed

from msgbus import Batch, Bus, Retry, Topic
from msgbus.contract.adapter import AdapterSettings, HasDepth, Received, SendOutcome
from msgbus.contract.envelope import PRIORITIES, Envelope
from msgbus.errors import BrokerUnavailable, PublishRejected
from msgbus.inbound.ready import share_of_window
from msgbus.settings import Settings
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import Seen, eventually
from msgbus_memory import MemoryAdapter


class Order(BaseModel):
    n: int = 0
    key: str = "a"


orders = Topic("orders", Order)
keyed = Topic("keyed", Order, key="key", shards=2)
SECONDS = Settings(drain_timeout=timedelta(seconds=5), close_timeout=timedelta(seconds=1))


async def test_what_expires_behind_another_of_its_key_is_not_handled() -> None:
    """A message that expires in hand, before its first run, is settled and counted as one that had expired when it came."""
    bus = Bus("memory://", service="shop", settings=SECONDS)
    seen: Seen[int] = Seen()

    @bus.subscribe(keyed)
    async def handle(order: Order) -> None:
        if order.n == 0:
            await asyncio.sleep(0.2)  # its work
        await seen.add(order.n)

    async with bus.running():
        await bus.publish(keyed, Order(n=0))
        await bus.publish(keyed, Order(n=1), expires_in=timedelta(seconds=0.1))
        await bus.publish(keyed, Order(n=2))
        assert await seen.wait_for(2) == [0, 2]
        assert bus.health().subscriptions[0].counts["expired"] == 1


async def test_health_says_when_one_keys_failure_has_filled_the_window() -> None:
    """Behind a failed message its key's others wait: when they are the whole window nothing is taken, and health says so."""
    bus = Bus("memory://", service="shop", settings=SECONDS, retry=Retry(wait=wait_fixed(60)))

    @bus.subscribe(keyed, concurrency=2, window=4)
    async def handle(order: Order) -> None:
        raise ValueError

    async with bus.running():
        for n in range(8):
            await bus.publish(keyed, Order(n=n))
        await eventually(lambda: bus.health().subscriptions[0].intake_stopped)
        assert bus.health().status == "degraded"


async def test_a_handler_that_cancels_its_own_task_costs_nobody_else_anything() -> None:
    """A cancellation that a handler leaves behind reaches neither its worker nor the next message."""
    bus = Bus("memory://", service="shop", settings=SECONDS)
    seen: Seen[int] = Seen()

    @bus.subscribe(orders, concurrency=1)
    async def handle(order: Order) -> None:
        await seen.add(order.n)
        if order.n < 3 and (task := asyncio.current_task()) is not None:
            task.cancel()

    async with bus.running():
        for n in range(5):
            await bus.publish(orders, Order(n=n))
        assert await seen.wait_for(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("topic", [orders, keyed])
async def test_a_stop_does_not_wait_for_the_rest_of_a_batch(topic: Topic[Order]) -> None:
    """A batch that still waits for members when it is told to stop has not begun: it goes back at once."""
    bus = Bus("memory://", service="shop", settings=SECONDS)

    @bus.subscribe(topic, batch=Batch(size=10, wait=timedelta(seconds=60)), concurrency=1)
    async def handle(batch: list[Order]) -> None: ...

    async with asyncio.timeout(2):
        async with bus.running():
            await bus.publish(topic, Order())
            await eventually(lambda: bus.runners[0].running)
        async with bus:
            adapter = bus.runtime.adapter
            assert isinstance(adapter, HasDepth)
            assert (await adapter.depth(topic.name, "shop")).ready == 1


async def test_a_paused_batch_is_handled_after_the_pause() -> None:
    """What a batch had gathered when it was paused is not started, and comes when it is resumed."""
    bus = Bus("memory://", service="shop", settings=SECONDS)
    seen: Seen[int] = Seen()

    @bus.subscribe(keyed, batch=Batch(size=2, wait=timedelta(seconds=60)), concurrency=1)
    async def handle(batch: list[Order]) -> None:
        for order in batch:
            await seen.add(order.n)

    async with bus.running():
        await bus.publish(keyed, Order(n=0, key="a"))
        await eventually(lambda: bus.runners[0].running)
        bus.pause("handle")
        await eventually(lambda: not bus.runners[0].running)
        assert not seen.items
        bus.resume("handle")
        await bus.publish(keyed, Order(n=1, key="b"))
        assert sorted(await seen.wait_for(2)) == [0, 1]


async def test_a_paused_process_hands_its_shards_over() -> None:
    """Another process of an ordered group gets its share of the shards, and what is in them, although this one is paused."""
    seen: Seen[int] = Seen()
    buses = [Bus("memory://hand-over", service="shop", settings=SECONDS) for _ in range(2)]
    for bus in buses:

        @bus.subscribe(keyed)
        async def handle(order: Order) -> None:
            await seen.add(order.n)

    paused, other = buses
    async with paused.running():
        await asyncio.sleep(0.05)  # it waits for messages: those that come now are in its hand when it is paused
        for n in range(20):
            await paused.publish(keyed, Order(n=n, key=str(n)))
        paused.pause("handle")
        await asyncio.sleep(0)
        async with other.running():
            await seen.wait_for(5, 5)
            paused.resume("handle")
            await seen.wait_for(20)
    assert sorted(seen.items) == list(range(20))


async def test_a_retry_that_goes_back_slowly_keeps_no_worker_asleep() -> None:
    """While a pause's last copy is still on its way, what comes after the pause is handled."""
    confirm = asyncio.Event()
    asked = asyncio.Event()

    class Slow(FaultyReceiver):
        async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
            asked.set()
            await confirm.wait()
            return await super().forward(received, envelope, timeout=timeout)

    adapter = FaultyAdapter(MemoryAdapter())
    adapter.make_receiver = Slow
    bus = Bus(adapter=adapter, service="shop", settings=SECONDS, retry=Retry(wait=wait_fixed(0.2)))
    seen: Seen[int] = Seen()
    runs = 0

    @bus.subscribe(orders, concurrency=1)
    async def handle(order: Order) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError
        await seen.add(order.n)

    async with bus.running():
        await bus.publish(orders, Order(n=0))
        await eventually(lambda: bus.runners[0].waiting)
        bus.pause("handle")
        await asked.wait()
        bus.resume("handle")
        await bus.publish(orders, Order(n=1))
        assert await seen.wait_for(1, 3) == [1]
        confirm.set()
        assert await seen.wait_for(2) == [1, 0]


async def test_nothing_new_is_taken_while_a_dead_letter_cannot_be_stored() -> None:
    """Not between the tries to store it, and not during one either."""

    class Full(FaultyReceiver):
        async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> PublishRejected | None:
            tries.append(len(seen))
            if len(tries) > 1:
                await more.wait()
            return PublishRejected("full")

    adapter = FaultyAdapter(MemoryAdapter())
    adapter.make_receiver = Full
    tries: list[int] = []
    more = asyncio.Event()
    seen: list[int] = []
    bus = Bus(adapter=adapter, service="shop", settings=SECONDS, retry=Retry.none())

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        seen.append(order.n)
        raise ValueError

    async with bus.running():
        await bus.publish(orders, Order(n=0))
        await eventually(lambda: len(tries) == 2, what="a second try, which takes long")
        await bus.publish(orders, Order(n=1))
        await asyncio.sleep(0.7)  # longer than it takes a look at what may be taken
        assert seen == [0]
        more.set()


async def test_what_comes_again_in_parts_after_a_lost_link_keeps_its_order() -> None:
    """A message that was in its key's lane when the link was lost does not start before the one in front of it came again."""
    lost = asyncio.Event()
    rest = asyncio.Event()

    class Parts(FaultyReceiver):
        """The first is lost on demand; the second brings key `a` later than the others."""

        async def receive(self, limit: int, timeout: float) -> list[Received]:
            first = self is self.adapter.receivers[0]
            if first and lost.is_set():
                raise BrokerUnavailable("lost (a test)")
            if not hasattr(self, "late"):
                self.late: list[Received] = []
            if not first and rest.is_set() and self.late:
                late, self.late = self.late, []
                return late
            batch = await super().receive(limit, min(timeout, 0.02))
            if first:
                return batch
            self.late += [received for received in batch if received.envelope.key == "a"]
            return [received for received in batch if received.envelope.key != "a"]

    adapter = FaultyAdapter(MemoryAdapter())
    adapter.make_receiver = Parts
    bus = Bus(adapter=adapter, service="shop", settings=SECONDS)
    seen: Seen[tuple[str, int]] = Seen()
    go_on = {"x": asyncio.Event(), "c": asyncio.Event()}
    begun: Seen[str] = Seen()

    @bus.subscribe(keyed, concurrency=1, window=16)
    async def handle(order: Order) -> None:
        await begun.add(order.key)
        if order.key in go_on:
            await go_on[order.key].wait()
        await seen.add((order.key, order.n))

    async with bus.running():
        for key, n in (("x", 0), ("a", 1), ("a", 2), ("a", 3), ("c", 0)):
            await bus.publish(keyed, Order(n=n, key=key))
        await begun.wait_for(1)
        await eventually(lambda: len(adapter.receivers[0].received) == 5)
        lost.set()
        await eventually(lambda: len(adapter.receivers) == 2 and len(adapter.receivers[1].received) == 5)
        go_on["x"].set()
        await begun.wait_until(lambda keys: "c" in keys)
        rest.set()
        await eventually(lambda: not getattr(adapter.receivers[1], "late", None))
        go_on["c"].set()
        items = await seen.wait_until(lambda items: ("a", 3) in items and ("a", 1) in items)
    assert [n for key, n in items if key == "a"] == [1, 2, 3]


@pytest.mark.parametrize("window", range(3, 200))
def test_the_levels_share_the_window_and_no_more(window: int) -> None:
    """Together the priority levels hold what the window says, each at least one."""
    shares = [share_of_window(level, window) for level in PRIORITIES]
    assert sum(shares) == window
    assert min(shares) >= 1


async def test_a_level_alone_uses_all_slots() -> None:
    """Shares are what a level is sure of, not a bound: where only low messages come, as many run at once as without priorities."""
    mails = Topic("mails", int, priorities=True)
    bus = Bus("memory://", service="post")
    running: set[int] = set()
    full, go_on = asyncio.Event(), asyncio.Event()

    @bus.subscribe(mails, concurrency=16)
    async def send(mail: int) -> None:
        running.add(mail)
        if len(running) == 16:
            full.set()
        await go_on.wait()

    async with bus.running():
        await bus.publish_many(mails, range(100), priority="low")
        async with asyncio.timeout(5):
            await full.wait()
        await bus.publish(mails, 1000, priority="high")
        go_on.set()
        await eventually(lambda: 1000 in running)


@pytest.mark.parametrize("window", [3, 4, 7, 32])
async def test_levels_together_never_hold_more_than_the_window(window: int) -> None:
    """Whatever comes on which level, the messages handed out and not settled are at most the window, and every one is handled."""
    mails = Topic("mails", int, priorities=True)
    adapter = FaultyAdapter(MemoryAdapter.from_url("memory://", {}, AdapterSettings()))
    bus = Bus(adapter=adapter, service="post")
    most = 0
    seen: set[int] = set()

    @bus.subscribe(mails, concurrency=min(window, 4), window=window)
    async def send(mail: int) -> None:
        nonlocal most
        held = sum(len(receiver.received) - len(receiver.acked) for receiver in adapter.receivers)
        most = max(most, held)
        await asyncio.sleep(0)
        seen.add(mail)

    async with bus.running():
        for number in range(300):
            await bus.publish(mails, number, priority=("low", "low", "low", "normal", "high")[number * 7 % 5])
        await eventually(lambda: len(seen) == 300, what="all of them")
    assert 0 < most <= window
