"""Publishing to the outbox: rows of the user's own transaction, on each database and kind of session."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import create_engine, event, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from tests.unit.sql.databases import Database

from msgbus import Bus, Envelope, Middleware, Topic
from msgbus.contract.address import shard_of
from msgbus.errors import ConfigurationError, EncodeError, InvalidHeader, MessageTooLarge, OutboxError, PublishManyError, PublishRejected
from msgbus.stores import MemoryStore
from msgbus.stores.sql import SqlStore
from msgbus.stores.sql.schema import SHARDS


class Order(BaseModel):
    id: str
    note: str = ""


ORDERS = Topic("orders", Order, key="id")
AUDIT = Topic("audit", Order)


@pytest.fixture
async def store(place: Database) -> AsyncGenerator[SqlStore, None]:
    async with place.opened() as opened:
        yield opened


@pytest.fixture
def bus(store: SqlStore) -> Bus:
    return Bus("memory://", service="shop", store=store)


async def rows(store: SqlStore) -> list[Any]:
    """What is committed, in order."""
    async with store.engine.connect() as connection:
        return list((await connection.execute(select(store.tables.outbox).order_by("id"))).all())


async def test_a_row_is_what_the_transaction_makes_of_it(store: SqlStore, place: Database, bus: Bus) -> None:
    """Committed it is there, whole; rolled back it is not; a savepoint takes back its own."""
    async with place.sessions(store.engine)() as session:
        async with session.begin():
            receipt = await bus.outbox(session).publish(ORDERS, Order(id="ä1"), headers={"tenant": "é"}, expires_in=timedelta(days=1))
        assert (receipt.topic, receipt.state) == ("orders", "stored")
        async with session.begin() as transaction:
            await bus.outbox(session).publish(ORDERS, Order(id="2"))
            await transaction.rollback()
        async with session.begin():
            outbox = bus.outbox(session)
            await outbox.publish(AUDIT, Order(id="3"))
            savepoint = await session.begin_nested()
            await outbox.publish(AUDIT, Order(id="4"))
            await savepoint.rollback()
            await outbox.publish(AUDIT, Order(id="5"))
    found = await rows(store)
    assert [row.topic for row in found] == ["orders", "audit", "audit"]
    assert [Order.model_validate_json(row.payload).id for row in found] == ["ä1", "3", "5"]
    first, second, _ = found
    assert (first.message_id, first.key, first.content_type, first.status, first.attempts) == (receipt.id, "ä1", "application/json", 0, 0)
    assert first.shard == shard_of("ä1", SHARDS)
    assert (second.key, 0 <= second.shard < SHARDS) == (None, True)
    assert first.created_at == first.available_at
    assert first.expires_at > first.created_at


async def test_delays_of_any_length(store: SqlStore, place: Database, bus: Bus) -> None:
    """`available_at` is the database's clock and the delay, however long."""
    async with place.sessions(store.engine)() as session, session.begin():
        await bus.outbox(session).publish(AUDIT, Order(id="1"), delay=timedelta(days=4000))
    (row,) = await rows(store)
    assert row.available_at - row.created_at == 4000 * 86_400_000


async def test_the_same_id_is_the_same_message(store: SqlStore, place: Database, bus: Bus) -> None:
    """A second row of an id is not made, and is no error; ids that differ in case or a space at the end are two."""
    async with place.sessions(store.engine)() as session:
        for _ in range(2):
            async with session.begin():
                await bus.outbox(session).publish(AUDIT, Order(id="1"), id="a")
                await bus.outbox(session).publish(AUDIT, Order(id="1"), id="A")
                await bus.outbox(session).publish(AUDIT, Order(id="1"), id="a ")
    assert [row.message_id for row in await rows(store)] == ["a", "A", "a "]


async def test_many(store: SqlStore, place: Database, bus: Bus) -> None:
    """`publish_many` keeps the order, also of an async iterable; a bad message leaves those before it in the transaction."""

    async def stream() -> AsyncGenerator[Order, None]:
        for number in range(600):
            yield Order(id=str(number))

    async with place.sessions(store.engine)() as session, session.begin():
        outbox = bus.outbox(session)
        assert await outbox.publish_many(ORDERS, stream()) == 600
        assert await outbox.publish_many(ORDERS, []) == 0
        bad: Any = [Order(id="x"), "no order", Order(id="y")]
        with pytest.raises(PublishManyError) as failure:
            await outbox.publish_many(ORDERS, bad)
        assert (failure.value.confirmed, failure.value.first_unconfirmed) == (1, 1)
    assert [row.key for row in await rows(store)] == [*map(str, range(600)), "x"]


async def test_what_is_wrong_harms_no_transaction(store: SqlStore, place: Database, bus: Bus) -> None:
    """A message that cannot be sent is refused at the call, and the transaction goes on."""
    wrong: list[tuple[type[Exception], Callable[[Any], Awaitable[object]]]] = [
        (EncodeError, lambda outbox: outbox.publish(AUDIT, "no order")),
        (MessageTooLarge, lambda outbox: outbox.publish(AUDIT, Order(id="1", note="x" * 30_000_000))),
        (InvalidHeader, lambda outbox: outbox.publish(AUDIT, Order(id="1"), headers={"ce-id": "1"})),
        (ValueError, lambda outbox: outbox.publish(AUDIT, Order(id="1"), delay=timedelta(seconds=-1))),
        (TypeError, lambda outbox: outbox.publish_many(AUDIT, [], id="1")),
        (TypeError, lambda outbox: outbox.publish(AUDIT, Order(id="1"), colour="red")),
        (ConfigurationError, lambda outbox: outbox.publish(Topic("audit", Order, key="note"), Order(id="1"))),
        (OutboxError, lambda outbox: outbox.publish(Topic("odd", Order, native={"memory": {"x": object()}}), Order(id="1"))),
    ]
    async with place.sessions(store.engine)() as session, session.begin():
        outbox = bus.outbox(session)
        await outbox.publish(AUDIT, Order(id="1"))
        for error, call in wrong:
            with pytest.raises(error):
                await call(outbox)
        await outbox.publish(AUDIT, Order(id="2"))
    assert len(await rows(store)) == 2


async def test_without_a_transaction_nothing_is_stored(store: SqlStore, place: Database, bus: Bus) -> None:
    """A session that has not begun, or has ended, is refused, and begins nothing."""
    async with place.sessions(store.engine)() as session:
        outbox = bus.outbox(session)
        with pytest.raises(OutboxError, match=r"session\.begin\(\)"):
            await outbox.publish(AUDIT, Order(id="1"))
        assert not session.in_transaction()
        async with session.begin():
            await outbox.publish(AUDIT, Order(id="2"))
        with pytest.raises(OutboxError):
            await outbox.publish(AUDIT, Order(id="3"))
    assert len(await rows(store)) == 1


async def test_autocommit_is_no_transaction(store: SqlStore, place: Database, bus: Bus) -> None:
    """Where each statement commits itself a rollback would take back nothing: it is refused, and what else was written is as it was."""
    count = select(func.count()).select_from(store.tables.inbox)
    row = {"consumer": "c", "state": 0, "fingerprint": "", "created_at": 0, "expires_at": 2**60}
    engine = place.engine().execution_options(isolation_level="AUTOCOMMIT")
    made_so = create_async_engine(place._with(0), isolation_level="AUTOCOMMIT")
    plain = create_engine(place._with(1), isolation_level="AUTOCOMMIT")
    try:
        for number, one in enumerate((engine, made_so)):
            async with place.sessions(one)() as session, session.begin():
                await session.execute(insert(store.tables.inbox).values(message_id=f"s{number}", **row))
                with pytest.raises(OutboxError, match="AUTOCOMMIT"):
                    await bus.outbox(session).publish(AUDIT, Order(id="1"))
            async with one.begin() as connection:
                with pytest.raises(OutboxError, match="AUTOCOMMIT"):
                    await bus.outbox(connection).publish_many(AUDIT, [Order(id="1")])
                assert (await connection.execute(count)).scalar_one() == number + 1
        with Session(plain) as sync_session, sync_session.begin():
            with pytest.raises(OutboxError, match="AUTOCOMMIT"):
                bus.outbox(sync_session).publish(AUDIT, Order(id="1"))
            assert sync_session.execute(count).scalar_one() == 2
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await SqlStore(place.sessions(made_so), tables=store.tables).open()
    finally:
        await engine.dispose()
        await made_so.dispose()
        plain.dispose()
    assert await rows(store) == []


async def test_transactions_begun_by_hand_are_transactions(place: Database) -> None:
    """SQLAlchemy's way to have SQLite's savepoints right, a driver that begins nothing by itself and a BEGIN by hand, is no autocommit."""
    if place.url.get_backend_name() != "sqlite":
        pytest.skip("of SQLite alone")
    async with place.opened() as store:
        engine = place.engine()

        @event.listens_for(engine.sync_engine, "connect")
        def connect(connection: Any, record: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN")

        bus = Bus("memory://", service="shop", store=store)
        async with place.sessions(engine)() as session:
            async with session.begin():
                savepoint = await session.begin_nested()
                await bus.outbox(session).publish(AUDIT, Order(id="1"))
                await savepoint.rollback()
                await bus.outbox(session).publish(AUDIT, Order(id="2"))
            async with session.begin() as transaction:
                await bus.outbox(session).publish(AUDIT, Order(id="3"))
                await transaction.rollback()
        await engine.dispose()
        assert [Order.model_validate_json(row.payload).id for row in await rows(store)] == ["2"]


async def test_a_session_that_must_be_rolled_back_first(store: SqlStore, place: Database, bus: Bus) -> None:
    """Where a statement that failed has aborted the transaction, a publish says so as an `OutboxError`; afterwards it works again."""
    if place.url.get_backend_name() != "postgresql":
        pytest.skip("elsewhere a failed statement aborts nothing")
    async with place.sessions(store.engine)() as session:
        async with session.begin() as transaction:
            with pytest.raises(SQLAlchemyError):
                await session.execute(text("SELECT nothing FROM nowhere"))
            with pytest.raises(OutboxError, match="aborted"):
                await bus.outbox(session).publish(AUDIT, Order(id="1"))
            await transaction.rollback()
        async with session.begin():
            await bus.outbox(session).publish(AUDIT, Order(id="2"))
    assert [Order.model_validate_json(row.payload).id for row in await rows(store)] == ["2"]


async def test_missing_tables_harm_no_transaction(place: Database) -> None:
    """Without its table, or a column of it, a publish says what is missing, and the transaction can still commit."""
    engine = place.engine()
    try:
        store = place.store(engine)
        bus = Bus("memory://", store=store)
        async with place.sessions(engine)() as session:
            async with session.begin():
                await session.execute(text(f"CREATE TABLE {place.prefix}mine (n INTEGER)"))
            async with session.begin():
                await session.execute(text(f"INSERT INTO {place.prefix}mine VALUES (1)"))
                with pytest.raises(OutboxError, match=f"table {place.prefix}outbox is missing"):
                    await bus.outbox(session).publish(AUDIT, Order(id="1"))
            assert (await session.execute(text(f"SELECT count(*) FROM {place.prefix}mine"))).scalar_one() == 1
            await session.rollback()
            await store.create_tables()
            async with session.begin():
                await session.execute(text(f"ALTER TABLE {place.prefix}outbox DROP COLUMN last_error"))
            async with session.begin():
                with pytest.raises(OutboxError, match="last_error is missing"):
                    await bus.outbox(session).publish(AUDIT, Order(id="1"))
    finally:
        await engine.dispose()


async def test_another_database_is_refused(store: SqlStore, bus: Bus, place: Database) -> None:
    """A row where no relay looks would never be sent; another engine of the same database is fine; what is no session is refused."""
    other = create_async_engine("sqlite+aiosqlite://")
    same = place.engine()
    try:
        async with other.connect() as connection:
            with pytest.raises(OutboxError, match="never be sent"):
                bus.outbox(connection)
        async with same.begin() as connection:
            await bus.outbox(connection).publish(AUDIT, Order(id="1"))
    finally:
        await other.dispose()
        await same.dispose()
    nothing: Any = object()
    with pytest.raises(OutboxError, match="AsyncSession"):
        bus.outbox(nothing)
    with pytest.raises(OutboxError, match="no engine"):
        bus.outbox(Session())
    assert len(await rows(store)) == 1


async def test_only_a_transactional_store_has_an_outbox(store: SqlStore, place: Database) -> None:
    """With another store, or none, `bus.outbox` says what to write."""
    async with place.sessions(store.engine)() as session:
        for bus in (Bus("memory://"), Bus("memory://", store=MemoryStore())):
            with pytest.raises(ConfigurationError, match="SqlStore"):
                bus.outbox(session)


async def test_plain_calls(store: SqlStore, place: Database, bus: Bus) -> None:
    """A synchronous session, and a connection, take the same rows by plain calls."""
    engine = create_engine(place._with(1))
    bad: Any = "no order"
    with Session(engine) as session, session.begin():
        outbox = bus.outbox(session)
        assert outbox.publish(ORDERS, Order(id="1")).state == "stored"
        assert outbox.publish_many(ORDERS, (Order(id=str(number)) for number in range(2, 5))) == 3
        with pytest.raises(PublishManyError):
            outbox.publish_many(ORDERS, [Order(id="5"), bad])
    with engine.begin() as connection:
        bus.outbox(connection).publish("notes", {"any": "json"}, key="6")
    with engine.connect() as connection, pytest.raises(OutboxError):
        bus.outbox(connection).publish(ORDERS, Order(id="7"))
    engine.dispose()
    assert [row.key for row in await rows(store)] == ["1", "2", "3", "4", "5", "6"]


class Stamp(Middleware):
    """Marks what passes; drops what is called so."""

    async def publish(self, envelope: Envelope, call_next: Callable[[Envelope], Awaitable[None]], /) -> None:
        if b"drop" not in envelope.body:
            await call_next(Envelope(envelope.id, envelope.topic, envelope.body, {**envelope.headers, "stamp": "1"}, envelope.key))


async def test_publish_middleware_sees_what_is_written(store: SqlStore, place: Database) -> None:
    """It runs when a message is written, in sync sessions too; what it does not hand on is refused."""
    bus = Bus("memory://", store=store, middleware=[Stamp()])
    async with place.sessions(store.engine)() as session, session.begin():
        await bus.outbox(session).publish(AUDIT, Order(id="1"))
        with pytest.raises(PublishRejected):
            await bus.outbox(session).publish(AUDIT, Order(id="drop"))
    plain_sessions = place.sync_sessions()
    with plain_sessions() as plain, plain.begin():
        bus.outbox(plain).publish(AUDIT, Order(id="2"))
    plain_sessions.kw["bind"].dispose()
    found = await rows(store)
    assert ['"stamp": "1"' in row.headers for row in found] == [True, True]
