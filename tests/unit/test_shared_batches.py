"""A batch whose members share one call: what a middleware or a cancellation does to one of them must not hold up the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from pydantic import BaseModel
from tenacity import wait_none

from msgbus import Batch, Bus, Context, Middleware, Outcome, Retry, SyncContext, Topic
from msgbus.stores import MemoryStore
from msgbus.testing.stage import Seen

Next = Callable[[Context], Awaitable[Outcome]]


class Order(BaseModel):
    n: int


orders = Topic("orders", Order)
copies = Topic("copies", Order)
QUICK = Retry(attempts=3, wait=wait_none())
THREE = Batch(size=3, wait=timedelta(seconds=5))


class Again(Middleware):
    """Calls the handler a second time when it fails."""

    async def consume(self, context: Context, call_next: Next, /) -> Outcome:
        try:
            return await call_next(context)
        except ValueError:
            return await call_next(context)


class Impatient(Middleware):
    """Gives the first member's first run little time, and lets the others be late."""

    async def consume(self, context: Context, call_next: Next, /) -> Outcome:
        if context.attempt > 1:
            return await call_next(context)
        if context.headers["n"] == "0":
            async with asyncio.timeout(0.05):
                return await call_next(context)
        await asyncio.sleep(0.3)  # the first one has given up by then
        return await call_next(context)


async def run_three(bus: Bus, seen: Seen[int]) -> list[int]:
    """Publishes three messages; what was handled, once it was all three."""
    async with bus.running():
        for n in range(3):
            await bus.publish(orders, Order(n=n), headers={"n": str(n)})
        return await seen.wait_until(lambda items: {0, 1, 2} <= set(items), 5, "all three")


async def test_a_batch_that_is_cancelled_by_others_is_run_again() -> None:
    """A handler's own CancelledError is a failure like any other, with middleware around the members too."""
    bus = Bus("memory://", service="shop", store=MemoryStore(), retry=QUICK)
    seen: Seen[int] = Seen()
    runs = 0

    @bus.subscribe(orders, batch=THREE, concurrency=1)
    async def handle(batch: list[Order]) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise asyncio.CancelledError
        for order in batch:
            await seen.add(order.n)

    assert sorted(await run_three(bus, seen)) == [0, 1, 2]


async def test_a_middleware_cannot_call_a_batchs_handler_twice() -> None:
    """The members share one call: a second `call_next` fails at once, and the retry policy runs the handler again."""
    bus = Bus("memory://", service="shop", middleware=[Again()], retry=QUICK)
    seen: Seen[int] = Seen()
    runs = 0

    @bus.subscribe(orders, batch=THREE, concurrency=1)
    async def handle(batch: list[Order]) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ValueError
        for order in batch:
            await seen.add(order.n)

    assert sorted(await run_three(bus, seen)) == [0, 1, 2]


async def test_a_member_whose_middleware_gave_up_takes_no_part() -> None:
    """A middleware's time-out before the call is that member's failure alone: the handler is called with the others."""
    bus = Bus("memory://", service="shop", middleware=[Impatient()], retry=QUICK)
    seen: Seen[int] = Seen()

    @bus.subscribe(orders, batch=Batch(size=3, wait=timedelta(seconds=0.3)), concurrency=1)
    async def handle(batch: list[Order]) -> None:
        for order in batch:
            await seen.add(order.n)

    assert await run_three(bus, seen) == [1, 2, 0]


async def test_what_a_sync_batch_publishes_is_caused_by_the_member_it_came_from() -> None:
    """Each `SyncContext` of a batch carries on its own message's causation, not the first one's."""
    bus = Bus("memory://", service="shop")
    ids: dict[int, str] = {}
    causes: dict[int, str | None] = {}
    seen: Seen[int] = Seen()

    @bus.subscribe(orders, batch=THREE, concurrency=1)
    def handle(batch: list[Order], contexts: list[SyncContext]) -> None:
        for order, context in zip(batch, contexts, strict=True):
            ids[order.n] = context.id
            context.publish(copies, order)

    @bus.subscribe(copies)
    async def look(order: Order, context: Context) -> None:
        causes[order.n] = context.causation_id
        await seen.add(order.n)

    await run_three(bus, seen)
    assert causes == ids
