"""Middleware and idempotency, through a bus on the memory broker."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from pydantic import BaseModel
from tenacity import wait_none

from msgbus import Batch, Bus, Context, Drop, Dropped, Envelope, Middleware, Outcome, Reject, Retry, Topic
from msgbus.contract.idempotency import Claim
from msgbus.errors import PublishRejected, StoreError
from msgbus.middleware.idempotency import FIRST_LOOK, look_again
from msgbus.stores import MemoryStore
from msgbus.testing.stage import Seen, eventually

Next = Callable[[Context], Awaitable[Outcome]]


class Order(BaseModel):
    n: int


orders = Topic("orders", Order)
QUICK = Retry(attempts=3, wait=wait_none())


class Notes(Middleware):
    """Writes down what it sees, under a name."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen

    async def consume(self, context: Context, call_next: Next, /) -> Outcome:
        self.seen.append(f"{self.name} in")
        try:
            outcome = await call_next(context)
        except Exception as error:
            self.seen.append(f"{self.name} {type(error).__name__}")
            raise
        self.seen.append(f"{self.name} {type(outcome).__name__}")
        return outcome


async def test_the_first_middleware_is_the_outermost() -> None:
    """Around a handler the bus's middleware is entered first to last, and left the other way round."""
    seen: list[str] = []
    bus = Bus("memory://", service="shop", middleware=[Notes("a", seen), Notes("b", seen)])
    done: Seen[int] = Seen()

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        seen.append("handler")
        await done.add(order.n)

    async with bus.running():
        await bus.publish(orders, Order(n=1))
        await done.wait_for(1)
    assert seen == ["a in", "b in", "handler", "b Done", "a Done"]


async def test_errors_pass_through_and_words_arrive_as_outcomes() -> None:
    """A handler's exception is seen as it is; Reject and Drop are no errors: middleware sees what they mean."""
    seen: list[str] = []
    bus = Bus("memory://", service="shop", middleware=[Notes("m", seen)], retry=Retry.none())
    done: Seen[int] = Seen()

    @bus.subscribe(orders, concurrency=1)
    async def handle(order: Order) -> None:
        await done.add(order.n)
        if order.n == 1:
            raise Drop("nothing to do")
        if order.n == 2:
            raise Reject("never")
        if order.n == 3:
            raise KeyError("a bug")

    async with bus.running():
        for n in range(1, 4):
            await bus.publish(orders, Order(n=n))
        await done.wait_for(3)
        letters = bus.dead_letters("orders", group="shop")
        await eventually(lambda: len(seen) == 6)
    async with bus:
        reasons = [letter.reason async for letter in letters.list()]
    assert seen == ["m in", "m Dropped", "m in", "m Dead", "m in", "m KeyError"]
    assert reasons == ["rejected", "exhausted"]


async def test_a_middleware_may_answer_itself() -> None:
    """What a middleware returns in place of calling on is the outcome."""

    class OnlyEven(Middleware):
        async def consume(self, context: Context, call_next: Next, /) -> Outcome:
            if b'"n":1' in context.envelope.body:
                return Dropped("odd")
            return await call_next(context)

    bus = Bus("memory://", service="shop", middleware=[OnlyEven()])
    done: Seen[int] = Seen()

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        await done.add(order.n)

    async with bus.running():
        await bus.publish(orders, Order(n=1))
        await bus.publish(orders, Order(n=2))
        await done.wait_for(1)
        await eventually(lambda: bus.health().subscriptions[0].counts.get("dropped") == 1)
    assert done.items == [2]


async def test_a_forgotten_return_is_a_failure() -> None:
    """A middleware that returns nothing does not settle the message by accident: it is retried, then a dead letter that says why."""

    class Forgetful(Middleware):
        async def consume(self, context: Context, call_next: Next, /) -> Outcome:
            await call_next(context)
            return None  # type: ignore[return-value]  # pyright: ignore[reportReturnType]  the mistake under test

    bus = Bus("memory://", service="shop", middleware=[Forgetful()], retry=QUICK)
    done: Seen[int] = Seen()

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        await done.add(order.n)

    async with bus.running():
        await bus.publish(orders, Order(n=1))
        await eventually(lambda: bus.health().subscriptions[0].counts.get("dead") == 1)
        letters = [letter async for letter in bus.dead_letters(orders, group="shop").list()]
    assert done.items == [1, 1, 1]
    assert "middleware returned None" in letters[0].error


async def test_a_publish_middleware_that_sends_nothing_confirms_nothing() -> None:
    """Returning without call_next is PublishRejected at the publisher, for publish and publish_many alike."""

    class Swallows(Middleware):
        async def publish(self, envelope: Envelope, call_next: Callable[[Envelope], Awaitable[None]], /) -> None:
            if b'"n":1' not in envelope.body:
                await call_next(envelope)

    async with Bus("memory://", service="shop", middleware=[Swallows()]) as bus:
        receipt = await bus.publish(orders, Order(n=2))
        assert receipt.state == "confirmed"
        with pytest.raises(PublishRejected, match="call_next"):
            await bus.publish(orders, Order(n=1))
        async with bus.consumer(orders, group="all") as consumer:
            first = await consumer.receive(10, timeout=timedelta(seconds=5))
    assert [delivery.message.n for delivery in first] == [2]


async def test_each_member_of_a_batch_passes_middleware_on_its_own() -> None:
    """A batch is one call of the handler, and as many deliveries: one may be dropped on the way, the others share the call."""
    seen: list[str] = []

    class DropsThree(Middleware):
        async def consume(self, context: Context, call_next: Next, /) -> Outcome:
            seen.append(context.id)
            return Dropped("three") if b'"n":3' in context.envelope.body else await call_next(context)

    bus = Bus("memory://", service="shop", middleware=[DropsThree()])
    batches: Seen[list[int]] = Seen()

    @bus.subscribe(orders, batch=Batch(size=5, wait=timedelta(seconds=5)), concurrency=1)
    async def handle(batch: list[Order], contexts: list[Context]) -> None:
        assert len(batch) == len(contexts)
        await batches.add([order.n for order in batch])

    async with bus.running():
        ids = [(await bus.publish(orders, Order(n=n))).id for n in range(5)]
        await batches.wait_for(1)
    assert batches.items == [[0, 1, 2, 4]]
    assert sorted(seen) == sorted(ids)


# ---------------------------------------------------------------- idempotency


async def test_the_same_effect_happens_once() -> None:
    """Two messages with one idempotency key and body: one run; both are settled."""
    bus = Bus("memory://", service="shop", store=MemoryStore())
    runs: Seen[int] = Seen()

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        await runs.add(order.n)

    async with bus.running():
        for _ in range(3):
            await bus.publish(orders, Order(n=1), idempotency_key="pay-1")
        await bus.publish(orders, Order(n=2))
        await eventually(lambda: bus.health().subscriptions[0].counts.get("done") == 4)
    assert sorted(runs.items) == [1, 2]


async def test_each_group_has_its_own_effect() -> None:
    """The key is a group's: two handlers of one message both run."""
    bus = Bus("memory://", service="shop", store=MemoryStore())
    runs: Seen[str] = Seen()

    @bus.subscribe(orders)
    async def bill(order: Order) -> None:
        await runs.add("bill")

    @bus.subscribe(orders, name="audit")
    async def audit(order: Order) -> None:
        await runs.add("audit")

    async with bus.running():
        await bus.publish(orders, Order(n=1))
        await runs.wait_for(2)
    assert sorted(runs.items) == ["audit", "bill"]


async def test_one_key_with_two_bodies_is_a_conflict() -> None:
    """The second body under a key is not run: a dead letter says so."""
    bus = Bus("memory://", service="shop", store=MemoryStore())
    runs: Seen[int] = Seen()

    @bus.subscribe(orders, concurrency=1)
    async def handle(order: Order) -> None:
        await runs.add(order.n)

    async with bus.running():
        await bus.publish(orders, Order(n=1), idempotency_key="k")
        await bus.publish(orders, Order(n=2), idempotency_key="k")
        await eventually(lambda: bus.health().subscriptions[0].counts.get("dead") == 1)
        letters = [letter async for letter in bus.dead_letters(orders, group="shop").list()]
    assert runs.items == [1]
    assert [(letter.reason, letter.attempts) for letter in letters] == [("idempotency_conflict", 0)]


async def test_a_failed_run_gives_its_key_up() -> None:
    """A handler that fails is retried: its claim does not stand in its own way."""
    bus = Bus("memory://", service="shop", store=MemoryStore(), retry=QUICK)
    runs: Seen[int] = Seen()

    @bus.subscribe(orders)
    async def handle(order: Order, context: Context) -> None:
        await runs.add(context.attempt)
        if context.attempt < 3:
            raise ValueError("not yet")

    async with bus.running():
        await bus.publish(orders, Order(n=1))
        await eventually(lambda: bus.health().subscriptions[0].counts.get("done") == 1)
    assert runs.items == [1, 2, 3]


async def test_what_is_in_progress_elsewhere_waits_and_does_not_count() -> None:
    """A second message with a key whose handler still runs is not run beside it, and found done soon after, long before the claim's
    lease of a minute is over; no attempt is used up."""
    bus = Bus("memory://", service="shop", store=MemoryStore(), retry=Retry.none())
    runs: Seen[int] = Seen()
    go_on = asyncio.Event()

    @bus.subscribe(orders)
    async def handle(order: Order) -> None:
        await runs.add(order.n)
        await go_on.wait()

    async with bus.running():
        await bus.publish(orders, Order(n=1), idempotency_key="k")
        await runs.wait_for(1)
        await bus.publish(orders, Order(n=1), idempotency_key="k")
        await eventually(lambda: bus.health().subscriptions[0].counts.get("retried") == 1)
        assert bus.health().subscriptions[0].counts["dead"] == 0
        go_on.set()
        await eventually(lambda: bus.health().subscriptions[0].counts.get("done") == 2)
    assert runs.items == [1]


@pytest.mark.parametrize("lease", [2.0, 60.0, 3600.0])
@pytest.mark.parametrize("seed", range(20))
def test_looks_grow_further_apart(lease: float, seed: int) -> None:
    """Whoever waits for a key looks again soon, then seldom: whenever the other run ends, that is seen after at most as long again; the end
    of the lease is not passed by; and a claim made with a longer lease is not asked all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msgbus.middleware.idempotency.random", random.Random(seed))
        now, looks = 0.0, 0
        while now < lease:
            delay = look_again(lease - now, lease).delay
            assert FIRST_LOOK <= delay <= max(FIRST_LOOK, min(now, lease - now))
            now, looks = now + delay, looks + 1
        assert now <= lease + FIRST_LOOK
        assert looks <= 4 * math.log2(lease / FIRST_LOOK)
        assert lease / 2 <= look_again(lease * 10, lease).delay <= lease


async def test_while_the_store_is_away_nothing_is_run() -> None:
    """It fails closed: no run, no attempt used up; when the store is back the message is run once."""

    class Flaky(MemoryStore):
        away = True

        async def begin(self, group: str, key: str, fingerprint: str, lease: float) -> Claim:
            if self.away:
                raise StoreError("the store is away")
            return await super().begin(group, key, fingerprint, lease)

    store = Flaky()
    bus = Bus("memory://", service="shop", store=store, retry=Retry.none())
    runs: Seen[int] = Seen()

    @bus.subscribe(orders)
    async def handle(order: Order, context: Context) -> None:
        await runs.add(context.attempt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msgbus.middleware.idempotency.STORE_AWAY", 0.02)
        async with bus.running():
            await bus.publish(orders, Order(n=1))
            await eventually(lambda: (bus.health().subscriptions[0].counts.get("failed") or 0) >= 2)
            assert not runs.items
            store.away = False
            await eventually(lambda: bus.health().subscriptions[0].counts.get("done") == 1)
    assert runs.items == [1]


async def test_idempotency_false_turns_it_off() -> None:
    """A subscription may opt out of the bus's store."""
    bus = Bus("memory://", service="shop", store=MemoryStore())
    runs: Seen[int] = Seen()

    @bus.subscribe(orders, idempotency=False)
    async def handle(order: Order) -> None:
        await runs.add(order.n)

    async with bus.running():
        await bus.publish(orders, Order(n=1), idempotency_key="k")
        await bus.publish(orders, Order(n=1), idempotency_key="k")
        await runs.wait_for(2)
