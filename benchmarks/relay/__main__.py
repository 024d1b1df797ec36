"""`python -m benchmarks.relay WHAT DATABASE BROKER COUNT WORD`: one run, a process of its own. Prints what it found as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from sqlalchemy import MetaData, bindparam, insert, make_url, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.throughput.measuring import PATIENCE, Order, Took, order
from benchmarks.throughput.with_msgbus import GROUP, declare, versions, waiting
from msgbus import Bus, Topic
from msgbus.contract.adapter import Purgeable
from msgbus.contract.envelope import second_digits
from msgbus.outbound.relay import Relay
from msgbus.running import make_relay
from msgbus.stores.sql import SqlStore, make_outbox_tables
from msgbus.stores.sql.schema import SHARDS

DRIVERS = {"postgresql": "asyncpg", "mysql": "aiomysql", "sqlite": "aiosqlite"}
LONE = 30
"""Lone rows, of which the median counts."""


@asynccontextmanager
async def opened(database: str, prefix: str) -> AsyncGenerator[SqlStore, None]:
    """A store on tables of this prefix, which are made."""
    url = make_url(database)
    engine = create_async_engine(url.set(drivername=f"{url.get_backend_name()}+{DRIVERS[url.get_backend_name()]}"))
    try:
        store = SqlStore(async_sessionmaker(engine), tables=make_outbox_tables(MetaData(), prefix=prefix), create_tables=True)
        await store.open()
        yield store
    finally:
        await engine.dispose()


async def drop(database: str, broker: str, count: int, prefix: str) -> dict[str, Any]:  # Any: JSON, here and below
    """The tables are gone."""
    async with opened(database, prefix) as store, store.engine.begin() as connection:
        await connection.run_sync(store.tables.metadata.drop_all)
    return {}


def topic(word: str) -> Topic[Order]:
    """One that nobody has used."""
    return Topic(f"bench-{uuid.uuid4().hex[:12]}", Order, key="customer" if word == "keyed" else None)


async def publish_many(database: str, broker: str, count: int, word: str) -> dict[str, Any]:
    """The messages go to the broker, without a database."""
    bus, orders = Bus(broker, service=GROUP), topic(word)
    async with bus:
        await declare(bus, orders)
        messages = [order(number) for number in range(count)]
        start = Took.until_now()
        await bus.publish_many(orders, messages)
        took = Took.until_now(start)
        await check(bus, orders, count)
    return asdict(took)


async def relay(database: str, broker: str, count: int, word: str) -> dict[str, Any]:
    """The same messages, which are rows of the database."""
    prefix, orders = f"b{uuid.uuid4().hex[:8]}_", topic(word)
    try:
        async with opened(database, prefix) as store:
            bus = Bus(broker, service=GROUP, store=store)
            async with bus:
                await declare(bus, orders)
                await write(bus, store, orders, count)
                took = await relayed(bus, count)
                await check(bus, orders, count)
                facts = {**await versions(bus), "SQLAlchemy": version("SQLAlchemy")}
            status = await store.status()
            if (status.due, status.sent) != (0, count):
                raise RuntimeError(f"of {count} rows {status.sent} are sent, {status.due} are due")
            async with store.engine.connect() as connection:
                facts["database"] = f"{store.engine.dialect.name} {connection.dialect.server_version_info}"  # type: ignore[attr-defined]  # every dialect's here
    finally:
        await drop(database, broker, 0, prefix)
    return {**asdict(took), "versions": "; ".join(f"{name} {value}" for name, value in facts.items())}


async def fill(database: str, broker: str, count: int, prefix: str) -> dict[str, Any]:
    """So many rows that were sent within the last hours."""
    async with opened(database, prefix) as store:
        bus, orders = Bus(broker, service=GROUP, store=store), topic("keyed")
        async with store.engine.begin() as connection:
            await bus.outbox(connection).publish(orders, order(0))
            (one,) = (await connection.execute(store.tables.outbox.select())).mappings()
            await connection.execute(store.tables.outbox.delete())
        fixed = {name: value for name, value in one.items() if name not in ("id", "message_id", "key", "shard", "sent_at")}
        numbered = insert(store.tables.outbox).values({**fixed, "status": 1, "sent_at": bindparam("at")})
        for start in range(0, count, 10_000):
            chunk = [
                {
                    "message_id": second_digits((fixed["created_at"] - (count - number)) // 1000) + os.urandom(12).hex(),
                    "key": f"k{number % 977}" if number % 2 else None,
                    "shard": number % SHARDS,
                    "at": fixed["created_at"] - (count - number),
                }
                for number in range(start, start + 10_000)
            ]
            async with store.engine.begin() as connection:
                await connection.execute(numbered, chunk)
        if store.engine.dialect.name == "postgresql":  # which a database that has come to so many rows in time has done by itself
            async with store.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                await connection.execute(text(f"VACUUM ANALYZE {store.tables.outbox.name}"))
    return {}


async def pending(database: str, broker: str, count: int, prefix: str) -> dict[str, Any]:
    """Seconds a row: without keys, with keys, and alone."""
    async with opened(database, prefix) as store:
        bus = Bus(broker, service=GROUP, store=store)
        async with bus:
            found: dict[str, float] = {}
            for name, word in (("together", "loose"), ("keyed", "keyed")):
                orders = topic(word)
                await declare(bus, orders)
                await write(bus, store, orders, count)
                found[name] = (await relayed(bus, count)).seconds / count
                await check(bus, orders, count)
            orders, lone = topic("loose"), await make_relay(bus.runtime)
            await declare(bus, orders)
            assert lone is not None  # the store has an outbox
            found["lone"] = statistics.median([await alone(bus, store, orders, lone.round) for _ in range(LONE)])
            await check(bus, orders, LONE)
            return found


async def alone(bus: Bus, store: SqlStore, orders: Topic[Order], one_round: Callable[[], Awaitable[int]]) -> float:
    """Seconds that a round takes that finds one row."""
    await write(bus, store, orders, 1)
    start = time.perf_counter()
    if await one_round() != 1:
        raise RuntimeError("the row was not sent")
    return time.perf_counter() - start


async def write(bus: Bus, store: SqlStore, orders: Topic[Order], count: int) -> None:
    """Rows, committed."""
    async with store.engine.begin() as connection:
        await bus.outbox(connection).publish_many(orders, map(order, range(count)))


async def relayed(bus: Bus, count: int) -> Took:
    """How long a relay takes for rows that are due: until the last one is marked."""
    relaying: Relay | None = await make_relay(bus.runtime)
    assert relaying is not None  # the store has an outbox
    start = Took.until_now()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
        tasks.create_task(relaying.run())
        while relaying.sent < count:  # noqa: ASYNC110 a relay counts, and tells nobody
            await asyncio.sleep(0.002)
        relaying.stop()  # it returns when what is under way is marked
    return Took.until_now(start)


async def check(bus: Bus, orders: Topic[Order], count: int) -> None:
    """All of them are at the broker, once; they are taken away."""
    there = await waiting(bus, orders)
    if there != count:
        raise RuntimeError(f"{there} of {count} messages are at the broker")
    adapter = bus.runtime.adapter
    if isinstance(adapter, Purgeable):
        await adapter.purge(orders.name, GROUP)


def main() -> None:
    """Runs what the command line names."""
    what, database, broker, count, word = sys.argv[1:]
    runs = {"publish_many": publish_many, "relay": relay, "fill": fill, "pending": pending, "drop": drop}
    print(json.dumps(asyncio.run(runs[what](database, broker, int(count), word))))


if __name__ == "__main__":
    main()
