"""A handler that takes a session: inbox row, what it writes and what it publishes are one transaction, on each database."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from tenacity import wait_fixed
from tests.unit.sql.databases import Database

from msgbus import Bus, Context, Drop, Reject, Retry, SyncContext, Topic
from msgbus.batch import Batch
from msgbus.errors import ConfigurationError
from msgbus.stores import MemoryStore
from msgbus.stores.sql import SqlStore
from msgbus.testing.stage import Seen, eventually


class Order(BaseModel):
    id: str


class Paid(BaseModel):
    id: str


ORDERS = Topic("orders", Order)
PAID = Topic("paid", Paid)
FAST = Retry(attempts=4, wait=wait_fixed(0.01))


class Shop:
    """A bus on a database with a table of effects, and a name of a broker in memory for others to join."""

    def __init__(self, place: Database, store: SqlStore) -> None:
        self.place = place
        self.store = store
        self.url = f"memory://{place.prefix}"
        self.bus = Bus(self.url, service="shop", store=store, retry=FAST)
        self.effect = text(f"INSERT INTO {place.prefix}effects VALUES (:id)")

    async def effects(self) -> Counter[str]:
        async with self.store.engine.connect() as connection:
            return Counter((await connection.execute(text(f"SELECT id FROM {self.place.prefix}effects"))).scalars())

    async def inbox(self) -> list[Any]:
        async with self.store.engine.connect() as connection:
            return list((await connection.execute(select(self.store.tables.inbox))).all())


@asynccontextmanager
async def opened(place: Database, **options: Any) -> AsyncGenerator[Shop, None]:
    async with place.opened(**options) as store:
        async with store.engine.begin() as connection:
            await connection.execute(text(f"CREATE TABLE {place.prefix}effects (id VARCHAR(50))"))
        yield Shop(place, store)


@pytest.fixture
async def shop(place: Database) -> AsyncGenerator[Shop, None]:
    async with opened(place) as made:
        yield made


async def test_one_transaction(shop: Shop) -> None:
    """What the handler writes, publishes and returns is committed with the inbox row, and then sent, with correlation."""
    paid: Seen[tuple[str, str | None, str]] = Seen()

    @shop.bus.subscribe(ORDERS, publish_to=PAID)
    async def pay(order: Order, session: AsyncSession, context: Context) -> Paid:
        await session.execute(shop.effect, {"id": order.id})
        receipt = await context.publish(PAID, Paid(id="by hand"))
        assert receipt.state == "stored"
        return Paid(id=order.id)

    @shop.bus.subscribe(PAID, name="watch")
    async def watch(message: Paid, context: Context) -> None:
        await paid.add((message.id, context.causation_id, context.correlation_id))

    async with shop.bus.running():
        receipt = await shop.bus.publish(ORDERS, Order(id="1"))
        found = await paid.wait_for(2)
        assert sorted(found) == [("1", receipt.id, receipt.id), ("by hand", receipt.id, receipt.id)]
        assert await shop.effects() == {"1": 1}
        (row,) = [row for row in await shop.inbox() if row.message_id == receipt.id]
        assert (row.consumer, row.state) == ("orders.shop", 1)
        assert shop.bus.health().status == "ok"


async def test_a_failed_run_leaves_nothing(shop: Shop) -> None:
    """A run that fails is rolled back, whole, and the next one is the first to have an effect. A rejected message leaves nothing either."""
    runs = Counter[str]()
    done: Seen[str] = Seen()

    @shop.bus.subscribe(ORDERS)
    async def pay(order: Order, session: AsyncSession, context: Context) -> None:
        runs[order.id] += 1
        await session.execute(shop.effect, {"id": order.id})
        await context.publish(PAID, Paid(id=order.id))
        if order.id == "reject":
            raise Reject("never")
        if order.id == "drop":
            raise Drop("nothing to do")
        if runs[order.id] < 3:
            raise ValueError("not yet")

    @shop.bus.subscribe(PAID, name="watch")
    async def watch(message: Paid) -> None:
        await done.add(message.id)

    async with shop.bus.running():
        for name in ("reject", "drop", "retry"):
            await shop.bus.publish(ORDERS, Order(id=name))
        assert sorted(await done.wait_for(2)) == ["drop", "retry"]
        (runner, _) = shop.bus.runners
        await eventually(lambda: runner.counts["dead"] == 1)  # on SQLite, which has one writer, the others may come first
        assert await shop.effects() == {"retry": 1, "drop": 1}
        assert runs == {"reject": 1, "drop": 1, "retry": 3}
        assert [letter.reason async for letter in shop.bus.dead_letters("orders", group="shop").list()] == ["rejected"]


async def test_sixty_messages_four_times_each_at_once(shop: Shop) -> None:
    """Of 240 deliveries of 60 messages, many at once, each message has its effect once, and the others are counted as repeated."""
    bus = Bus(shop.url, service="shop", store=shop.store, retry=Retry(attempts=50, wait=wait_fixed(0.05)))

    @bus.subscribe(ORDERS, concurrency=12)
    async def pay(order: Order, session: AsyncSession) -> None:
        await session.execute(shop.effect, {"id": order.id})
        await asyncio.sleep(0.001)  # its work

    async with bus.running():
        await asyncio.gather(*(bus.publish(ORDERS, Order(id=str(n % 60)), idempotency_key=f"k{n % 60}") for n in range(240)))
        (runner,) = bus.runners
        await eventually(lambda: runner.counts["done"] == 240, 30, "240 done")
        assert runner.counts["repeated"] == 180
    assert await shop.effects() == Counter({str(n): 1 for n in range(60)})


async def test_another_body_under_a_known_key_is_dead(shop: Shop) -> None:
    """The second is no duplicate and no new effect: someone has made a mistake."""
    seen: Seen[str] = Seen()

    @shop.bus.subscribe(ORDERS)
    async def pay(order: Order, session: AsyncSession) -> None:
        await seen.add(order.id)

    async with shop.bus.running():
        await shop.bus.publish(ORDERS, Order(id="1"), idempotency_key="k")
        await seen.wait_for(1)
        await shop.bus.publish(ORDERS, Order(id="2"), idempotency_key="k")
        (runner,) = shop.bus.runners
        await eventually(lambda: runner.counts["dead"] == 1)
        assert [letter.reason async for letter in shop.bus.dead_letters("orders", group="shop").list()] == ["idempotency_conflict"]
    assert seen.items == ["1"]


async def test_what_a_handler_flushes_wrongly_is_its_own_failure(shop: Shop) -> None:
    """An error of the handler's statement counts as an attempt and ends as a dead letter, not as a database that is away."""

    @shop.bus.subscribe(ORDERS)
    async def pay(order: Order, session: AsyncSession) -> None:
        await session.execute(text("SELECT nothing FROM nowhere"))

    async with shop.bus.running():
        await shop.bus.publish(ORDERS, Order(id="1"))
        (runner,) = shop.bus.runners
        await eventually(lambda: runner.counts["dead"] == 1)
        (letter,) = [letter async for letter in shop.bus.dead_letters("orders", group="shop").list()]
        assert (letter.reason, letter.attempts) == ("exhausted", 4)
    assert await shop.inbox() == []


async def test_a_deadlock_is_run_again_uncounted(shop: Shop) -> None:
    """What the database asks to run again is run again in process; no attempt is counted."""
    if shop.place.url.get_backend_name() != "postgresql":
        pytest.skip("PostgreSQL makes one on demand")
    attempts: Seen[int] = Seen()
    failures = [True, True]

    @shop.bus.subscribe(ORDERS)
    async def pay(order: Order, session: AsyncSession, context: Context) -> None:
        await session.execute(shop.effect, {"id": order.id})
        await attempts.add(context.attempt)
        if failures:
            failures.pop()
            await session.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40P01'; END $$"))

    async with shop.bus.running():
        await shop.bus.publish(ORDERS, Order(id="1"))
        assert await attempts.wait_for(3) == [1, 1, 1]
        (runner,) = shop.bus.runners
        await eventually(lambda: runner.counts["done"] == 1)
    assert await shop.effects() == {"1": 1}


async def test_sync_handlers_have_a_session_too(place: Database) -> None:
    """A handler in a thread takes a `Session`; what it writes, publishes and returns is one transaction as well."""
    sessions = place.sync_sessions()
    paid: Seen[str] = Seen()
    runs = Counter[str]()
    async with opened(place, sync_sessions=sessions) as shop:

        @shop.bus.subscribe(ORDERS, publish_to=PAID)
        def pay(order: Order, session: Session, context: SyncContext) -> Paid:
            runs[order.id] += 1
            session.execute(shop.effect, {"id": order.id})
            assert context.publish(PAID, Paid(id=f"{order.id} by hand")).state == "stored"
            if runs[order.id] == 1:
                raise ValueError("not yet")
            return Paid(id=order.id)

        @shop.bus.subscribe(PAID, name="watch")
        async def watch(message: Paid) -> None:
            await paid.add(message.id)

        async with shop.bus.running():
            await asyncio.gather(*(shop.bus.publish(ORDERS, Order(id=str(n))) for n in range(5)))
            found = await paid.wait_for(10)
        assert sorted(found) == sorted([str(n) for n in range(5)] + [f"{n} by hand" for n in range(5)])
        assert await shop.effects() == Counter({str(n): 1 for n in range(5)})
    sessions.kw["bind"].dispose()


async def test_idempotency_without_a_session(shop: Shop) -> None:
    """A handler that takes none has the store's claims: one run a key."""
    seen: Seen[str] = Seen()

    @shop.bus.subscribe(ORDERS)
    async def pay(order: Order) -> None:
        await seen.add(order.id)

    async with shop.bus.running():
        (runner,) = shop.bus.runners
        wanted = 0

        def is_done() -> bool:
            return runner.counts["done"] == wanted

        for name in ("1", "1", "2"):
            await shop.bus.publish(ORDERS, Order(id=name), idempotency_key=name)
            wanted += 1
            await eventually(is_done)
        assert shop.bus.health().subscriptions[0].counts["repeated"] == 1
    assert sorted(seen.items) == ["1", "2"]


async def test_every_instance_of_a_broadcast_runs(shop: Shop) -> None:
    """What one instance has done is nothing to another, though they share a store."""
    seen: Seen[str] = Seen()

    async def note(order: Order) -> None:
        await seen.add(order.id)

    buses = [Bus(shop.url, service="shop", store=shop.store) for _ in range(2)]
    for bus in buses:
        bus.subscribe(ORDERS, broadcast=True)(note)
    async with buses[0].running(), buses[1].running():
        await buses[0].publish(ORDERS, Order(id="1"))
        assert await seen.wait_for(2) == ["1", "1"]


async def test_refused_at_start(shop: Shop) -> None:
    """What could not be kept is refused when the bus is entered, with the place and the way out."""

    async def takes(order: Order, session: AsyncSession) -> None: ...
    def takes_sync(order: Order, session: Session) -> None: ...
    async def takes_wrong(order: Order, session: Session) -> None: ...
    async def takes_batch(orders: list[Order], session: AsyncSession) -> None: ...

    async def refused(handler: Any, words: str, store: Any = shop.store, **options: Any) -> None:
        bus = Bus("memory://", service="shop", store=store)
        bus.subscribe(ORDERS, **options)(handler)
        with pytest.raises(ConfigurationError, match=words):
            await bus.__aenter__()

    await refused(takes, "SqlStore", None)
    await refused(takes, "SqlStore", MemoryStore())
    await refused(takes, "SqlStore", idempotency=False)
    await refused(takes, r"concurrency is 31, but .* holds 30", concurrency=31)
    await refused(takes, "broadcast", broadcast=True)
    await refused(takes, "another store", None, idempotency=shop.store)
    await refused(takes_sync, "sync_sessions")
    await refused(takes_wrong, "takes one AsyncSession")
    await refused(takes_batch, "a batch handler takes none", batch=Batch(size=2))


async def test_missing_tables_are_refused_at_start(place: Database) -> None:
    """A bus does not run without its tables, and names the way to make them."""
    engine = place.engine()
    store = SqlStore(place.sessions(engine), tables=place.store(engine).tables)
    try:
        with pytest.raises(ConfigurationError, match=r"outbox is missing.*create_tables=True"):
            async with Bus("memory://", store=store).running():
                pass
    finally:
        await engine.dispose()


async def test_a_database_that_is_away_runs_nothing(place: Database) -> None:
    """Fail closed: no run, no attempt counted, health says so; when it is back the effect happens once."""
    if place.url.get_backend_name() == "sqlite":
        pytest.skip("a file is never away")
    async with opened(place) as shop:
        away = True
        seen: Seen[int] = Seen()

        def connect(dialect: Any, record: Any, cargs: Any, cparams: Any) -> None:
            if away:
                cparams["port"] = 1  # nobody listens there

        from sqlalchemy import event

        event.listen(shop.store.engine.sync_engine, "do_connect", connect)
        await shop.store.engine.dispose()

        @shop.bus.subscribe(ORDERS)
        async def pay(order: Order, session: AsyncSession, context: Context) -> None:
            await session.execute(shop.effect, {"id": order.id})
            await seen.add(context.attempt)

        async with shop.bus.running():
            await shop.bus.publish(ORDERS, Order(id="1"), expires_in=timedelta(minutes=1))
            await eventually(lambda: any("database is away" in problem for problem in shop.bus.health().problems))
            assert seen.items == []
            away = False
            assert await seen.wait_for(1, 20) == [1]
            await eventually(lambda: shop.bus.health().status == "ok")
        assert await shop.effects() == {"1": 1}


def test_only_what_the_database_asks_for_is_repeated(tmp_path: Any) -> None:
    """Deadlocks and serialisation failures of every driver, wrapped or not; nothing else."""
    from msgbus.errors import StoreError
    from msgbus.stores.sql.errors import is_transient

    class State(Exception):
        def __init__(self, state: str) -> None:
            self.sqlstate = state

    class Number(Exception):
        pass

    Number.__module__ = "pymysql.err"
    for inner, expected in (
        (State("40001"), True),
        (State("40P01"), True),
        (State("23505"), False),
        (Number(1213, "deadlock"), True),
        (Number(1062, "duplicate"), False),
        (ValueError(1213), False),
    ):
        wrapped = StoreError("away")
        wrapped.__cause__ = DBAPIError("SELECT 1", {}, inner)
        assert is_transient(inner) is expected
        assert is_transient(wrapped) is expected
