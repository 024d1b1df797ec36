"""How a relay hears of a commit in another process: by PostgreSQL's LISTEN at once, elsewhere by looking again."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from tests.unit.sql.databases import Database

from msgbus import Bus, Topic
from msgbus.outbound import relay
from msgbus.stores.sql import SqlStore, listening
from msgbus.testing.stage import Seen


class Order(BaseModel):
    id: str


ORDERS = Topic("orders", Order)


async def write(store: SqlStore, one: str) -> None:
    """By a bus that is not entered, as another process would."""
    async with store.engine.begin() as connection:
        await Bus("memory://", store=store).outbox(connection).publish(ORDERS, Order(id=one))


@pytest.fixture(params=["asyncpg", "psycopg"])
async def store(request: pytest.FixtureRequest, place: Database) -> AsyncGenerator[SqlStore, None]:
    """A relay's, by each of PostgreSQL's drivers."""
    if place.url.get_backend_name() != "postgresql":
        pytest.skip("of PostgreSQL alone")
    engine = create_async_engine(place.url.set(drivername=f"postgresql+{request.param}"))
    made = place.store(engine)
    await made.open()
    yield made
    await engine.dispose()


async def test_a_commit_elsewhere_is_heard_of_at_once(store: SqlStore, place: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the relay would not look by itself for minutes; also after the connection that listens was lost."""
    monkeypatch.setattr(relay, "FIRST_POLL", 1000.0)
    monkeypatch.setattr(relay, "LONGEST_POLL", 1000.0)
    monkeypatch.setattr(listening, "RECONNECT", 0.1)
    seen: Seen[str] = Seen()
    bus = Bus(f"memory://{place.prefix}", service="s", store=store)

    @bus.subscribe(ORDERS, idempotency=False)
    async def note(order: Order) -> None:
        await seen.add(order.id)

    async with place.opened() as near, bus.running():
        for number in range(1, 4):
            await write(near, str(number))
            assert await seen.wait_for(number, 10) == [str(one) for one in range(1, number + 1)]
        listens = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND query LIKE :channel")
        async with near.engine.begin() as connection:
            assert (await connection.execute(listens, {"channel": f"%{near.tables.outbox.name}%"})).all() == [(True,)]
        await write(near, "4")
        assert await seen.wait_for(4, 10) == ["1", "2", "3", "4"]
        await write(near, "5")
        assert await seen.wait_for(5, 10) == ["1", "2", "3", "4", "5"]


async def test_where_nobody_tells_it_a_relay_looks_again(place: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other databases, and on PostgreSQL with another driver or where LISTEN is not to be had: within the longest poll."""
    monkeypatch.setattr(listening, "_WAYS", {})
    seen: Seen[str] = Seen()
    async with place.opened() as store, place.opened() as near:
        bus = Bus(f"memory://{place.prefix}", service="s", store=store)

        @bus.subscribe(ORDERS, idempotency=False)
        async def note(order: Order) -> None:
            await seen.add(order.id)

        async with bus.running():
            for number in range(1, 4):
                await write(near, str(number))
                assert await seen.wait_for(number, 10) == [str(one) for one in range(1, number + 1)]
