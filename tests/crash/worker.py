"""A process of the crash tests: a small service on a broker and a database, which dies, or stands still, at a named point.

`python -m tests.crash.worker TERMS`: `TERMS` is JSON; the broker and the settings come from `MSGBUS_…` variables. Says "up" on its
standard output when it is at work, drains on SIGTERM. What happens in it is lines of a file, each one write, so a death loses none.

The product has no part in this: the points are what anyone can see of it from outside, SQLAlchemy's events, and a store and an adapter
that pass everything on to the real ones.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from msgbus import Bus, Context, Reject, RetryLater, Topic
from msgbus.contract.adapter import Adapter, Forwarding, Received, Receiver, ReceiverSpec, SendOutcome
from msgbus.contract.envelope import Envelope
from msgbus.contract.outbox import Claimed, Refusal
from msgbus.settings import load
from msgbus.stores.sql import SqlStore, make_outbox_tables
from msgbus.testing.faults import FaultyAdapter
from msgbus.urls import adapter_from_url
from msgbus_redis import RedisStore

GROUP = "shop"

Where = Literal[
    "nowhere",
    "commit",  # of a transaction that wrote to `business` or `effects`: all is done but the COMMIT
    "committed",  # of a session, which has just ended
    "send",  # envelopes are about to be given to the adapter
    "settle",  # what was sent is about to be marked
    "clean",  # rows were deleted, and the transaction goes on
    "remember",  # the inbox row is about to be inserted
    "complete",  # a claim is about to become an effect that is remembered
    "ack",  # the adapter is about to be told that a message is settled
    "forwarded",  # the adapter has stored a copy and acked its original, in one step
]


class Step(BaseModel):
    """A message: the n-th step of a key, and what its handler is to do."""

    key: str = ""
    n: int = 0
    do: Literal["succeed", "reject", "later"] = "succeed"
    seconds: float = 0.0
    """How long a run takes."""

    @property
    def id(self) -> str:
        """Of the message."""
        return f"{self.key or 'loose'}-{self.n}"


class Result(BaseModel):
    """What a run of the handler comes to: no two runs have the same."""

    id: str
    nonce: str


STEPS = Topic("steps", Step, key="key", shards=2)
LOOSE = Topic("loose", Step)
RESULTS = Topic("results", Result)


class Terms(BaseModel):
    """What a process is to be. `write`: what it commits when it is up. `store` None: it runs no handlers."""

    pid: str
    path: str
    database: str
    prefix: str
    at: Where = "nowhere"
    having: str = ""
    """Of `send`: the envelope that must be among them."""
    nth: int = 1
    then: Literal["die", "stand still"] = "die"
    write: Sequence[Step] = ()
    store: Literal["sql", "redis"] | None = None
    redis: str = ""
    willing: bool = True
    """The handler does what the message says; else it succeeds."""
    concurrency: int = 8
    window: int = 16


class Trip:
    """The point at which this process ends, and the file where it says what it did."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._left = terms.nth
        self._file = os.open(terms.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, **facts: object) -> None:
        """A line of the file, with the time."""
        os.write(self._file, json.dumps({"ts": time.time(), "pid": self._terms.pid, "what": what, **facts}).encode() + b"\n")

    def at(self, where: Where) -> None:
        """The process is at this point. If it is the one, it is killed here, or stopped until somebody lets it go on."""
        if where != self._terms.at:
            return
        self._left -= 1
        if self._left == 0:
            self.note("tripped", where=where)
            os.kill(os.getpid(), signal.SIGKILL if self._terms.then == "die" else signal.SIGSTOP)


# ------------------------------------------------------------ the seams


class TrippingAdapter(FaultyAdapter):
    """Passes everything on, by way of the points."""

    def __init__(self, real: Adapter, trip: Trip, having: str) -> None:
        super().__init__(real)
        self.trip = trip
        self.having = having

    async def send(self, envelopes: Sequence[Envelope], *, timeout: float) -> list[SendOutcome]:
        if not self.having or self.having in [envelope.id for envelope in envelopes]:
            self.trip.at("send")
        self.trip.note("send", ids=[envelope.id for envelope in envelopes], topics=[envelope.topic for envelope in envelopes])
        for envelope in envelopes:
            if envelope.group is not None:
                self.trip.note("again", id=envelope.id)
        return await self.real.send(envelopes, timeout=timeout)

    async def open_receiver(self, spec: ReceiverSpec) -> Receiver:
        real = await self.real.open_receiver(spec)
        return ForwardingReceiver(real, self.trip) if isinstance(real, Forwarding) else TrippingReceiver(real, self.trip)


class TrippingReceiver(Receiver):
    """Passes everything on, by way of the points."""

    def __init__(self, real: Receiver, trip: Trip) -> None:
        self.real = real
        self.trip = trip

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        batch = await self.real.receive(limit, timeout)
        for received in batch:
            self.trip.note("received", id=received.envelope.id)
        return batch

    def ack(self, received: Received) -> None:
        self.trip.at("ack")
        self.trip.note("ack", id=received.envelope.id)
        self.real.ack(received)
        self.stale_acks = self.real.stale_acks

    async def release(self, received: Received) -> None:
        await self.real.release(received)

    async def drain(self) -> None:
        await self.real.drain()

    async def close(self) -> None:
        await self.real.close()


class ForwardingReceiver(TrippingReceiver):
    """Of a broker that stores a copy and acks its original in one step."""

    async def forward(self, received: Received, envelope: Envelope, *, timeout: float) -> SendOutcome:
        assert isinstance(self.real, Forwarding)
        outcome = await self.real.forward(received, envelope, timeout=timeout)
        self.trip.at("forwarded")
        if outcome is None:
            self.trip.note("ack", id=received.envelope.id)
            if envelope.group is not None:
                self.trip.note("again", id=envelope.id)
        return outcome


class TrippingStore(SqlStore):
    """Notes what a relay asks for, and how it ended."""

    trip: Trip

    async def claim(self, limit: int, lease: float) -> Claimed:
        with self._noted("claim"):
            claimed = await super().claim(limit, lease)
        if claimed.rows:
            self.trip.note("claimed", ids=[row.envelope.id for row in claimed.rows], token=claimed.token)
        return claimed

    async def settle(self, claimed: Claimed, sent: Sequence[int], refused: Mapping[int, Refusal]) -> int:
        if sent:
            self.trip.at("settle")
        with self._noted("settle"):
            lost = await super().settle(claimed, sent, refused)
        self.trip.note("settled", sent=len(sent), lost=lost)
        return lost

    def _noted(self, what: str) -> Any:  # Any: a context manager
        trip = self.trip

        class Noting:
            def __enter__(self) -> None: ...

            def __exit__(self, kind: object, error: object, trace: object) -> None:
                trip.note(what, failed=error is not None)

        return Noting()


class TrippingRedisStore(RedisStore):
    """As it is, by way of the point before a claim becomes an effect."""

    trip: Trip

    async def complete(self, group: str, key: str, token: str, result: bytes | None, ttl: float) -> bool:
        self.trip.at("complete")
        return await super().complete(group, key, token, result, ttl)


def listen(engine: AsyncEngine, trip: Trip, prefix: str) -> None:
    """SQLAlchemy's events, as points."""
    wrote = "crash wrote"

    def before(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith((f"INSERT INTO {prefix}business", f"INSERT INTO {prefix}effects")):
            connection.info[wrote] = True
        if statement.startswith(f"INSERT INTO {prefix}inbox"):
            trip.at("remember")

    def after(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(f"DELETE FROM {prefix}outbox"):
            trip.at("clean")

    def commit(connection: Connection) -> None:
        if connection.info.pop(wrote, False):
            trip.at("commit")

    def rollback(connection: Connection) -> None:
        connection.info.pop(wrote, None)

    for name, function in (("before_cursor_execute", before), ("after_cursor_execute", after), ("commit", commit), ("rollback", rollback)):
        event.listen(engine.sync_engine, name, function)
    event.listen(Session, "after_commit", lambda _: trip.at("committed"))


# ------------------------------------------------------------ the service


def bus_of(terms: Terms, trip: Trip) -> Bus:
    """The service: a handler on both topics, where it has a store for one, and what it writes when it is up."""
    engine = create_async_engine(terms.database, pool_size=2 * terms.concurrency + 2)
    listen(engine, trip, terms.prefix)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    sql = TrippingStore(sessions, tables=make_outbox_tables(prefix=terms.prefix))
    sql.trip = trip
    effect = text(f"INSERT INTO {terms.prefix}effects (message_id) VALUES (:id)")

    async def work(step: Step, context: Context) -> Result:
        trip.note("run", id=context.id, attempt=context.attempt)
        await asyncio.sleep(step.seconds)
        if terms.willing and step.do == "reject":
            raise Reject("it is told to")
        if terms.willing and step.do == "later" and context.attempt == 1:
            raise RetryLater(timedelta(seconds=6))
        return Result(id=step.id, nonce=uuid.uuid4().hex)

    async def in_session(step: Step, session: AsyncSession, context: Context) -> Result:
        result = await work(step, context)
        await session.execute(effect, {"id": step.id})
        return result

    async def alone(step: Step, context: Context) -> Result:
        result = await work(step, context)
        async with engine.begin() as connection:
            await connection.execute(effect, {"id": step.id})
        return result

    async def write(bus: Bus) -> None:
        async with sessions() as session, session.begin():
            for step in terms.write:
                await session.execute(text(f"INSERT INTO {terms.prefix}business (message_id) VALUES (:id)"), {"id": step.id})
                await bus.outbox(session).publish(STEPS if step.key else LOOSE, step, id=step.id)
        trip.note("written")

    async def watch(bus: Bus) -> None:
        said: tuple[str, tuple[str, ...]] | None = None
        while True:
            health = bus.health()
            if said != (said := (health.status, health.problems)):
                trip.note("health", status=said[0], problems=said[1])
            await asyncio.sleep(0.02)  # then it looks again

    @asynccontextmanager
    async def lifespan(bus: Bus) -> AsyncIterator[None]:
        print("up", flush=True)
        tasks = [asyncio.create_task(watch(bus)), *([asyncio.create_task(write(bus))] if terms.write else [])]
        yield
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    store: SqlStore | RedisStore = sql
    if terms.store == "redis":
        store = redis = TrippingRedisStore(terms.redis, prefix=f"{terms.prefix}:")
        redis.trip = trip
    settings = load()
    assert settings.url is not None  # it was started with one
    adapter = TrippingAdapter(adapter_from_url(settings.url.get_secret_value(), settings.for_adapter()), trip, terms.having)
    bus = Bus(adapter=adapter, settings=settings, service=GROUP, store=store, lifespan=lifespan)
    if terms.store is not None:
        for topic in (STEPS, LOOSE):
            handler = in_session if terms.store == "sql" else alone
            bus.subscribe(topic, publish_to=RESULTS, concurrency=terms.concurrency, window=terms.window)(handler)
    return bus


async def main(terms: Terms) -> None:
    """At work until SIGTERM."""
    await bus_of(terms, Trip(terms)).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(main(Terms.model_validate_json(sys.argv[1])))
