"""A handler runs in a context of its own inside its worker's task: nothing of it shows in the next one, and cancelling reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from tenacity import wait_fixed

from msgbus import Batch, Bus, Retry, SyncContext, Topic
from msgbus.contract.envelope import Envelope
from msgbus.inbound.isolation import isolated
from msgbus.publishing import handling
from msgbus.testing.stage import Seen

T = TypeVar("T")

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
ENVELOPE = Envelope("1", "orders", b"", {})


class Watched:
    """How often the coroutine began to wait, and ended after that."""

    def __init__(self) -> None:
        self.waits = 0
        self.ends = 0

    def waited(self) -> None:
        self.waits += 1

    def ended(self) -> None:
        self.ends += 1

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await isolated(coroutine, ENVELOPE, self.waited, self.ended)


async def test_the_result_and_what_it_sets() -> None:
    """The result is handed on; what it sets it sees, before and after it waited, and nobody else does."""

    async def handler() -> tuple[str, str | None]:
        tenant.set("a")
        await asyncio.sleep(0)
        assert tenant.get() == "a"
        await asyncio.sleep(0.001)  # a wait that takes a turn of the loop's clock
        current = handling.get()
        return tenant.get(), None if current is None else current.id

    tenant.set("outside")
    watched = Watched()
    assert await watched.run(handler()) == ("a", "1")
    assert tenant.get() == "outside"
    assert handling.get() is None
    assert (watched.waits, watched.ends) == (1, 1)


async def test_one_that_never_waits_runs_without_a_switch() -> None:
    """Nothing else runs meanwhile, and nobody is told of a wait."""

    async def handler() -> int:
        return 7

    others: list[int] = []
    asyncio.get_running_loop().call_soon(others.append, 1)
    watched = Watched()
    assert await watched.run(handler()) == 7
    assert others == []
    assert (watched.waits, watched.ends) == (0, 0)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), asyncio.CancelledError(), TimeoutError(), KeyError()])
async def test_what_it_raises_is_raised(waits: bool, error: BaseException) -> None:
    """As it is, whether it waited or not."""

    async def handler() -> None:
        if waits:
            await asyncio.sleep(0)
        raise error

    watched = Watched()
    with pytest.raises(type(error)) as raised:
        await watched.run(handler())
    assert raised.value is error
    assert watched.waits == watched.ends == int(waits)


async def test_cancelling_the_task_cancels_it_and_it_may_clean_up() -> None:
    """CancelledError arrives where it waits; it can wait again while it ends; its context is still its own."""
    cleaned: list[str] = []

    async def handler() -> None:
        tenant.set("a")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cleaned.append(tenant.get())
            raise

    watched = Watched()
    task = asyncio.create_task(watched.run(handler()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == ["a"]
    assert watched.ends == 1


async def test_timeouts_task_groups_and_shields_work_inside() -> None:
    """What asyncio binds to the current task works as in a task of its own."""

    async def handler() -> list[str]:
        tenant.set("a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(3600)
        found: list[str] = []

        async def child() -> None:
            found.append(tenant.get())

        async with asyncio.TaskGroup() as group:
            group.create_task(child())
        found.append(await asyncio.shield(asyncio.create_task(asyncio.sleep(0, "shielded"))))
        found.append(await asyncio.to_thread(tenant.get))
        return found

    assert await Watched().run(handler()) == ["a", "shielded", "a"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=8))
def test_many_at_once_never_see_each_other(plans: list[list[int]]) -> None:
    """However they interleave: each sees its own value at each step."""

    async def handler(number: int, pauses: list[int]) -> None:
        assert tenant.get() == "nobody"
        for step, pause in enumerate(pauses):
            tenant.set(f"{number}.{step}")
            for _ in range(pause):
                await asyncio.sleep(0)
            assert tenant.get() == f"{number}.{step}"

    async def scenario() -> None:
        await asyncio.gather(*(Watched().run(handler(number, pauses)) for number, pauses in enumerate(plans)))
        assert tenant.get() == "nobody"

    asyncio.run(scenario())


class Order(BaseModel):
    id: str


orders = Topic("orders", Order)


@pytest.mark.parametrize("kind", ["async", "waiting", "sync", "failing", "batch"])
async def test_a_message_never_sees_what_another_one_set(kind: str) -> None:
    """Through the bus, with one worker and with many: every handler starts with the context of the bus."""
    seen: Seen[str] = Seen()
    loop = asyncio.get_running_loop()
    for concurrency in (1, 8):
        bus = Bus("memory://", service="shop")
        before = len(seen.items)

        async def handle(order: Order) -> None:
            found = tenant.get()
            tenant.set(order.id)
            if kind == "waiting":
                await asyncio.sleep(0.001)  # its work
            await seen.add(found if tenant.get() == order.id else "lost")
            if kind == "failing" and len(seen.items) % 3:
                raise ValueError(order.id)

        async def handle_batch(batch: list[Order]) -> None:
            for _ in batch:
                await seen.add(tenant.get())
            tenant.set(batch[0].id)

        def handle_in_thread(order: Order, context: SyncContext) -> None:
            found = tenant.get()
            tenant.set(order.id)
            asyncio.run_coroutine_threadsafe(seen.add(found), loop).result()

        retry = Retry(attempts=9, wait=wait_fixed(0))
        if kind == "sync":
            bus.subscribe(orders, concurrency=concurrency)(handle_in_thread)
        elif kind == "batch":
            bus.subscribe(orders, concurrency=concurrency, batch=Batch(5))(handle_batch)
        else:
            bus.subscribe(orders, concurrency=concurrency, retry=retry)(handle)
        async with bus.running():
            await bus.publish_many(orders, (Order(id=str(number)) for number in range(40)))
            await seen.wait_for(before + 40)
    assert set(seen.items) == {"nobody"}
