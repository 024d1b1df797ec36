"""A scene: one point on one database and one broker: its tables, its processes, and all that is stored at the broker."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from redis.asyncio import Redis
from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from tests.brokers import Unavailable, server
from tests.conftest import missing
from tests.crash.worker import GROUP, LOOSE, RESULTS, STEPS, Step, Terms
from tests.processes import Hired, hire
from tests.unit.sql.databases import SERVERS, Database

from msgbus import Bus, Topic
from msgbus.contract.adapter import Adapter, HasDepth, Receiver, ReceiverSpec, TopicSpec
from msgbus.contract.address import dead_topic
from msgbus.contract.envelope import DEAD, Envelope
from msgbus.errors import BrokerUnavailable
from msgbus.outbound.writer import topic_spec
from msgbus.runtime import dead_receiver, dead_spec
from msgbus.stores.sql import SqlStore
from msgbus.testing.stage import QUIET, Stage, take
from msgbus_redis.names import base
from msgbus_redis.wire import fields_of

LEASE, SESSION, HEARTBEAT, DRAIN = 2.0, 6.0, 2.0, 5.0
"""Seconds: what the processes are told. Kafka takes no shorter session."""
AUDIT = "audit"
TOPICS: tuple[Topic[Any], ...] = (STEPS, LOOSE, RESULTS)  # Any: of a model each
_NUMBER = {"postgresql": "BIGSERIAL", "mysql": "BIGINT AUTO_INCREMENT", "sqlite": "INTEGER"}
BATCH = [Step(key="a", n=1), Step(key="a", n=2), Step(key="a", n=3), Step(key="b", n=1), Step(n=1), Step(n=2)]
"""What one transaction writes where nothing else is said: rows with keys, several of one, and rows without."""


@dataclass(frozen=True, slots=True)
class Copy:
    """An envelope that the broker has stored: `ts` by this machine's clock, when it was seen."""

    ts: float
    topic: str
    id: str
    body: bytes
    headers: Mapping[str, str]


class Scene:
    """Use as a context manager. Times are seconds of the machine's clock, which databases in containers share."""

    def __init__(self, stage: Stage, database: Database, place: tuple[str, str], directory: Path, redis: str) -> None:
        self.database = database
        self.broker = place[1]
        self.copies: list[Copy] = []
        """Everything that was stored on the three topics, each copy, in the order of its topic."""
        self._stage = stage
        self._directory = directory
        self._redis = redis
        self.url = stage.broker.url
        """Of the broker."""
        self._hired: list[Hired] = []
        self._closing = contextlib.AsyncExitStack()
        self._adapter: Adapter | None = None
        self._store: SqlStore | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        self._store = await self._closing.enter_async_context(self.database.opened())
        number = _NUMBER[self.database.url.get_backend_name()]
        async with self.engine.begin() as connection:
            for name in ("business", "effects"):
                await connection.execute(
                    text(f"CREATE TABLE {self.database.prefix}{name} (n {number} PRIMARY KEY, message_id VARCHAR(50))")
                )
        adapter = self._adapter = await self._stage.open_adapter()
        await self._declare([self._spec(topic) for topic in TOPICS], [self._receiver(topic, group) for topic, group in _groups()])
        for topic in TOPICS:
            receiver = await self._stage.receiver(adapter, self._receiver(topic, AUDIT))
            self._tasks.append(asyncio.create_task(self._audit(topic, receiver)))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hired in self._hired:
            await hired.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._closing.aclose()

    async def _declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> None:
        """As the core does: a broker that has just started may have to be asked again."""
        assert self._adapter is not None
        deadline = time.monotonic() + 30
        while True:
            try:
                return await self._adapter.declare(topics, receivers)
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)  # then it tries again

    async def _audit(self, topic: Topic[Any], receiver: Receiver) -> None:
        while True:
            for received in await receiver.receive(100, 1.0):
                envelope = received.envelope
                self.copies.append(Copy(time.time(), topic.name, envelope.id, envelope.body, envelope.headers))
                receiver.ack(received)

    def _spec(self, topic: Topic[Any]) -> TopicSpec:
        return topic_spec(topic, self._stage.namespace, "")

    def _receiver(self, topic: Topic[Any], group: str) -> ReceiverSpec:
        return ReceiverSpec(self._stage.name(topic.name), group, window=200, exclusive=topic.key is not None)

    # ------------------------------------------------------------ processes

    async def hire(
        self, pid: str, *, lease: float = LEASE, url: str | None = None, **terms: Any
    ) -> Hired:  # Any: pydantic checks them, here and below
        """A process, connected. `terms` are of `Terms`."""
        given = {
            "pid": pid,
            "path": str(self._directory / f"{pid}.jsonl"),
            "database": self.database.async_url,
            "prefix": self.database.prefix,
            "redis": self._redis,
        }
        settings = {
            "URL": url or self.url,
            "NAMESPACE": self._stage.namespace,
            "LEASE": str(lease),
            "HEARTBEAT": str(HEARTBEAT),
            "SESSION_TIMEOUT": str(SESSION),
            "DRAIN_TIMEOUT": str(DRAIN),
        }
        hired = await hire(pid, "tests.crash.worker", Terms.model_validate(given | terms).model_dump_json(), self._directory, settings)
        self._hired.append(hired)
        return await hired.up()

    async def dies(self, pid: str, **terms: Any) -> None:
        """A process that dies at the point that `terms` name; returns when it is gone."""
        await (await self.hire(pid, **terms)).died(30)
        assert self.events(pid, "tripped"), f"{pid} died elsewhere"

    async def stop(self, hired: Hired) -> None:
        """By SIGTERM."""
        await hired.stop(DRAIN + 8)

    def events(self, pid: str, what: str) -> list[dict[str, Any]]:
        """What a process has noted, oldest first."""
        path = self._directory / f"{pid}.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [found for found in map(json.loads, lines) if found["what"] == what]

    def runs(self, *pids: str) -> Counter[str]:
        """How often handlers began, by the message's id, in these processes."""
        return Counter(event["id"] for pid in pids for event in self.events(pid, "run"))

    def sends(self, *pids: str) -> Counter[str]:
        """How often ids were given to an adapter for one of the topics, by these processes."""
        topics = {self._stage.name(topic.name) for topic in (STEPS, LOOSE)}
        given = [pair for pid in pids for event in self.events(pid, "send") for pair in zip(event["ids"], event["topics"], strict=True)]
        return Counter(id for id, topic in given if topic in topics)

    async def until(self, true: Callable[[], object], seconds: float, what: str) -> None:
        """Looks until it is so; `true` may be async. Fails after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (await found if inspect.isawaitable(found := true()) else found):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds:g} s for {what}; stored: {Counter(copy.id for copy in self.copies)}")
            await asyncio.sleep(0.01)

    # ------------------------------------------------------------ the broker

    async def publish(self, *steps: Step, bus: Bus | None = None) -> None:
        """Straight to the broker, under their ids."""
        bus = bus or await self._stage.publisher()
        for step in steps:
            await bus.publish(STEPS if step.key else LOOSE, step, id=step.id)

    def stored(self, *topics: Topic[Any]) -> Counter[str]:
        """How many copies of each id were stored, so far."""
        names = [topic.name for topic in topics or (STEPS, LOOSE)]
        return Counter(copy.id for copy in self.copies if copy.topic in names)

    def order(self, key: str) -> list[int]:
        """The copies of a key, as they were stored."""
        steps = [Step.model_validate_json(copy.body) for copy in self.copies if copy.topic == STEPS.name]
        return [step.n for step in steps if step.key == key]

    async def comes(self, expected: Counter[str], seconds: float = 30.0, *topics: Topic[Any]) -> None:
        """So many copies of each id are stored, and then no more: nothing is left to be seen, and a moment later it is still so."""
        await self.until(lambda: self.stored(*topics) >= expected, seconds, f"{dict(expected)}")
        await self.quiet()
        assert self.stored(*topics) == expected

    async def quiet(self) -> None:
        """Everything that the broker has is seen."""
        for topic in TOPICS:
            await self.all_settled(topic, AUDIT)
        await asyncio.sleep(QUIET)

    async def all_settled(self, topic: Topic[Any], group: str, seconds: float = 30.0) -> None:
        """The broker has nothing left of a topic for a group, neither ready, nor handed out, nor for later."""
        adapter: object = self._adapter
        assert isinstance(adapter, HasDepth)
        deadline = time.monotonic() + seconds
        while True:
            depth = await adapter.depth(self._stage.name(topic.name), group)
            if not ((depth.ready or 0) + (depth.in_flight or 0) + (depth.delayed or 0)):
                return
            if time.monotonic() > deadline:
                pytest.fail(f"{group} has not settled {topic.name} after {seconds:g} s: {depth}")
            await asyncio.sleep(0.02)  # then it looks again

    async def send(self, *envelopes: Envelope) -> None:
        """As they are."""
        assert self._adapter is not None
        assert await self._adapter.send(envelopes, timeout=10) == [None] * len(envelopes)

    async def dead_letters(self, topic: Topic[Any], count: int) -> list[Envelope]:
        """So many dead letters of the service, as they lie there; they stay."""
        adapter, name = self._adapter, self._stage.name(topic.name)
        assert adapter is not None
        await self._declare([dead_spec(name, GROUP)], [])
        receiver = await adapter.open_receiver(dead_receiver(name, GROUP, window=count + 1))
        try:
            taken = await take(receiver, count)
            assert not await receiver.receive(1, QUIET), f"more than {count} dead letters"
        finally:
            await receiver.close()
        return [received.envelope for received in taken]

    async def store_each(self, envelopes: Sequence[Envelope]) -> None:
        """At once, and one by one however alike they are: where the broker recognises an id that it had a moment ago, past that."""
        if self.broker != "redis":
            # Each in a call of its own: Kafka keeps what is sent in one together, for one process.
            await asyncio.gather(*(self.send(envelope) for envelope in envelopes))
            return
        async with Redis.from_url(self.url) as client, client.pipeline(transaction=True) as together:
            for envelope in envelopes:
                names, values = fields_of(envelope)
                _ = together.xadd(base(envelope.topic), dict(zip(names, values, strict=True)))
            await together.execute()

    def envelope_of(self, step: Step) -> Envelope:
        """As a publisher would send it: with the headers of what was published last."""
        topic = STEPS if step.key else LOOSE
        headers = [copy.headers for copy in self.copies if copy.topic == topic.name][-1]
        return Envelope(step.id, self._stage.name(topic.name), step.model_dump_json().encode(), headers, step.key or None)

    def dead_letter_of(self, step: Step) -> Envelope:
        """What a copy of a message would have become, had it been given up: from its copy that was stored."""
        (copy,) = [copy for copy in self.copies if copy.id == step.id]
        topic = STEPS if step.key else LOOSE
        name = self._stage.name(topic.name)
        record = {"reason": "rejected", "topic": name, "group": GROUP}
        return Envelope(
            step.id, dead_topic(name, GROUP), copy.body, {**copy.headers, **{DEAD + what: said for what, said in record.items()}}, step.key
        )

    async def redrives(self) -> Bus:
        """An entered bus, for its dead letters."""
        return await self._stage.publisher()

    # ------------------------------------------------------------ the database

    @property
    def engine(self) -> AsyncEngine:
        """The test's own."""
        return self.store.engine

    @property
    def store(self) -> SqlStore:
        """The test's own, of the same tables."""
        assert self._store is not None
        return self._store

    async def rows(self) -> Sequence[Row[Any]]:  # Any: the columns, here and below
        """Of the outbox, by id."""
        outbox = self.store.tables.outbox
        async with self.engine.connect() as connection:
            return (await connection.execute(select(outbox).order_by(outbox.c.id))).all()

    async def leases(self) -> Sequence[Row[Any]]:
        """The shards that a relay holds just now."""
        shards = self.store.tables.shards
        async with self.engine.connect() as connection:
            return (await connection.execute(select(shards).where(shards.c.lease_until > time.time() * 1000))).all()

    async def inbox(self) -> Sequence[Row[Any]]:
        """What the inbox remembers."""
        async with self.engine.connect() as connection:
            return (await connection.execute(select(self.store.tables.inbox))).all()

    async def ids(self, table: str) -> list[str]:
        """What `business` or `effects` holds, in the order of writing."""
        async with self.engine.connect() as connection:
            return list((await connection.execute(text(f"SELECT message_id FROM {self.database.prefix}{table} ORDER BY n"))).scalars())

    @contextlib.asynccontextmanager
    async def without_database(self) -> AsyncGenerator[None, None]:
        """The server is killed, and started again in the end. SQLite has none: somebody else has locked the whole file."""
        name = self.database.url.get_backend_name()
        if name == "sqlite":
            with contextlib.closing(sqlite3.connect(self.database.url.database or "", timeout=30, isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                yield
            return
        running = server(SERVERS[name])
        try:
            await asyncio.to_thread(running.kill)
        except Unavailable as why:
            missing(str(why))
        try:
            await self.engine.dispose()
            yield
        finally:
            await asyncio.to_thread(running.start)


def _groups() -> list[tuple[Topic[Any], str]]:
    """All that is published is kept for these from the beginning."""
    return [(topic, AUDIT) for topic in TOPICS] + [(STEPS, GROUP), (LOOSE, GROUP)]
