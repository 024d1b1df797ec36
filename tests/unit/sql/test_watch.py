"""What health says of an outbox: nobody relays it, rows are parked, its database is away; and what a relay does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import event, update
from sqlalchemy.exc import DisconnectionError
from tests.unit.sql.databases import Database

from msgbus import Bus, Topic
from msgbus.contract.outbox import NOBODY, Refusal
from msgbus.stores.sql import SqlStore
from msgbus.testing.stage import Seen, eventually


class Order(BaseModel):
    id: str


ORDERS = Topic("orders", Order, key="id")


@pytest.fixture
async def store(place: Database) -> AsyncGenerator[SqlStore, None]:
    async with place.opened() as opened:
        yield opened


async def write(store: SqlStore, bus: Bus, *ids: str) -> None:
    async with store.engine.begin() as connection:
        for one in ids:
            await bus.outbox(connection).publish(ORDERS, Order(id=one))


async def age(store: SqlStore, seconds: float) -> None:
    """All that has happened has happened so much earlier."""
    earlier = round(seconds * 1000)
    outbox, shards = store.tables.outbox, store.tables.shards
    async with store.engine.begin() as connection:
        await connection.execute(update(outbox).values(available_at=outbox.c.available_at - earlier))
        await connection.execute(update(shards).where(shards.c.lease_until > 0).values(lease_until=shards.c.lease_until - earlier))


async def test_a_process_that_only_publishes_says_when_nobody_relays(store: SqlStore, place: Database) -> None:
    """Rows that are due for long, while no relay takes any, are a problem that says what to run; a relay at work ends it."""
    bus = Bus(f"memory://{place.prefix}", service="web", store=store)
    async with bus:
        watch = bus.runtime.watch
        assert watch is not None
        await write(store, bus, "1")
        await watch.look()
        assert bus.health().status == "ok"
        await age(store, NOBODY + 10)
        await watch.look()
        (problem,) = bus.health().problems
        assert bus.health().status == "degraded"
        assert "nobody relays this store: a row is due for 4" in problem
        assert "none ever has" in problem
        assert "msgbus outbox relay" in problem
        claimed = await store.claim(10, 60.0)
        await watch.look()
        assert bus.health().problems == ()  # one has it in its hands
        await store.settle(claimed, [], {})
        await watch.look()
        assert bus.health().problems == ()
        await age(store, NOBODY + 10)
        await watch.look()
        assert "the last one did 4" in bus.health().problems[0]
        async with Bus(f"memory://{place.prefix}", service="worker", store=store).running():
            await eventually(lambda: bus.health().status == "ok", 15)  # the next look, by itself
    found = await store.glance()
    assert (found.parked, found.oldest) == (0, None)
    assert found.idle is not None
    assert found.idle < NOBODY


async def test_parked_rows_are_seen_by_every_process(store: SqlStore, place: Database) -> None:
    """Also by one that does not relay them."""
    bus = Bus(f"memory://{place.prefix}", service="web", store=store)
    async with bus:
        assert bus.runtime.watch is not None
        await write(store, bus, "1")
        claimed = await store.claim(10, 60.0)
        await store.settle(claimed, [], {claimed.rows[0].id: Refusal("no", None)})
        await bus.runtime.watch.look()
        assert bus.health().problems == ("outbox: 1 messages are parked: msgbus outbox status shows them",)


async def test_while_the_database_is_away_nothing_is_lost_and_nobody_runs_hot(place: Database) -> None:
    """A relay tries again with growing pauses, says so, and sends each row once when the database is back; so says who only publishes."""
    if place.url.get_backend_name() == "sqlite":
        pytest.skip("a file is never away")
    async with place.opened() as store, place.opened() as near:
        away = False
        tries = 0

        def connect(dialect: Any, record: Any, cargs: Any, cparams: Any) -> None:
            nonlocal tries
            tries += 1
            if away:
                cparams["port"] = 1  # nobody listens there

        def use(driver: Any, record: Any, proxy: Any) -> None:
            if away:
                raise DisconnectionError("the link is lost (a test)")

        event.listen(store.engine.sync_engine, "do_connect", connect)
        event.listen(store.engine.sync_engine, "checkout", use)
        seen: Seen[str] = Seen()
        bus = Bus(f"memory://{place.prefix}", service="worker", store=store)
        web = Bus(f"memory://{place.prefix}", service="web", store=store)

        @bus.subscribe(ORDERS, idempotency=False)
        async def note(order: Order) -> None:
            await seen.add(order.id)

        async with web, bus.running():
            await write(store, web, "1", "2")
            assert sorted(await seen.wait_for(2)) == ["1", "2"]
            away = True
            await eventually(lambda: any("database is away" in problem for problem in bus.health().problems), 15)
            await write(near, Bus("memory://", store=near), "3", "4")
            tries = 0
            await asyncio.wait([asyncio.create_task(asyncio.Event().wait(), name="two seconds")], timeout=2)
            assert tries <= 12
            assert len(seen.items) == 2
            assert web.runtime.watch is not None
            await web.runtime.watch.look()
            assert "database is away" in web.health().problems[0]
            away = False
            assert sorted(await seen.wait_for(4, 20)) == ["1", "2", "3", "4"]
            await eventually(lambda: bus.health().status == "ok", 20)
