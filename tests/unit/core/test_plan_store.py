"""Which idempotency store a subscription gets."""

from __future__ import annotations

from typing_extensions import Unpack

from msgbus import Bus
from msgbus.contract.idempotency import IdempotencyStore
from msgbus.router import SubscribeOptions
from msgbus.stores import MemoryStore


async def store_of(bus: Bus, **options: Unpack[SubscribeOptions]) -> IdempotencyStore | None:
    @bus.subscribe("orders", **options)
    async def handle(order: dict[str, int]) -> None: ...

    async with bus:
        return bus.plans[0].store


async def test_a_subscription_has_the_store_it_names_though_that_is_still_empty() -> None:
    """An empty MemoryStore has the length 0, and is a store all the same: idempotency is on."""
    own = MemoryStore()
    assert await store_of(Bus("memory://", service="shop"), idempotency=own) is own


async def test_without_a_word_it_has_the_bus_s_and_with_false_none() -> None:
    """The bus's store, empty or not, is the default; False is none."""
    shared = MemoryStore()
    assert await store_of(Bus("memory://", service="shop", store=shared)) is shared
    assert await store_of(Bus("memory://", service="shop", store=shared), idempotency=False) is None
