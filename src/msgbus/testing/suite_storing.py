"""Conformance: effects exactly once, by an inbox and an outbox in a database beside the broker. Needs `msgbus[sql]` and aiosqlite."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from msgbus.context import Context
from msgbus.publishing import Publishes
from msgbus.testing.stage import Order, Seen, Stage, conformance
from msgbus.topic import Topic

if TYPE_CHECKING:
    from msgbus.stores.sql import SqlStore

ORDERS = Topic("orders", Order)
NOTES = Topic("notes", Order, key="id")


def _sqlalchemy() -> Any:  # Any: a module that may not be there
    """SQLAlchemy's asyncio side; the test is skipped where it, or the driver, is not there."""
    for needed in ("sqlalchemy", "aiosqlite"):
        pytest.importorskip(needed, reason='needs pip install "msgbus[sql]" aiosqlite')
    return pytest.importorskip("sqlalchemy.ext.asyncio")


async def _make_store() -> AsyncGenerator[SqlStore, None]:
    """A store on a database of its own."""
    from msgbus.stores.sql import SqlStore

    sql = _sqlalchemy()
    with tempfile.TemporaryDirectory() as place:
        engine = sql.create_async_engine(f"sqlite+aiosqlite:///{Path(place) / 'suite.db'}", pool_size=20)
        try:
            store = SqlStore(sql.async_sessionmaker(engine), create_tables=True)
            await store.open()
            yield store
        finally:
            await engine.dispose()


_database = asynccontextmanager(_make_store)


@conformance()
async def inbox_effect_once(stage: Stage) -> None:
    """A message that comes twice, also to two processes at once and after a failed run, has its effect once: what its handler published
    with its session is sent once."""
    session_class = _sqlalchemy().AsyncSession
    notes: Seen[str] = Seen()
    failed: set[str] = set()
    async with _database() as store:

        async def handle(order: Order, context: Context, session: Any) -> None:
            await context.publish(NOTES, Order(id=order.id))
            if order.n == 0 and order.id not in failed:
                failed.add(order.id)
                raise ValueError("the first run fails (a test)")

        async def note(order: Order) -> None:
            await notes.add(order.id)

        handle.__annotations__["session"] = session_class
        workers: list[Any] = []
        for _ in range(2):
            bus = stage.bus(store=store)
            bus.subscribe(ORDERS, concurrency=4)(handle)
            bus.subscribe(NOTES, name="notes", idempotency=False)(note)
            workers.append(await stage.start(bus))
        publisher = await stage.publisher()
        for _ in range(2):
            await asyncio.gather(*(publisher.publish(ORDERS, Order(id=f"{n}", n=n % 3), idempotency_key=f"{n}") for n in range(9)))
        await notes.wait_for(9, 20)
        await publisher.publish(ORDERS, Order(id="last", n=1))
        await notes.wait_until(lambda items: "last" in items, 20)
        for worker in workers:
            await worker.stop()
        assert sorted(notes.items) == sorted([*map(str, range(9)), "last"])


@conformance()
async def outbox_atomic_commit_and_rollback(stage: Stage) -> None:
    """What a transaction published is sent when it commits, in order a key; of one that is rolled back nothing is."""
    sql = _sqlalchemy()
    notes: Seen[int] = Seen()
    async with _database() as store:
        bus = stage.bus(store=store)

        async def note(order: Order) -> None:
            await notes.add(order.n)

        bus.subscribe(NOTES)(note)
        worker = await stage.start(bus)
        async with sql.AsyncSession(store.engine) as session:
            for n in range(6):
                await session.begin()
                outbox = cast(Publishes, bus.outbox(session))  # the session is of a module that may not be there
                await outbox.publish(NOTES, Order(id="k", n=n))
                await (session.rollback() if n % 2 else session.commit())
        await notes.wait_for(3, 20)
        await worker.stop()
        assert notes.items == [0, 2, 4]
