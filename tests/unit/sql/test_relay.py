"""The relay: what is committed is sent, of a key in order, whatever fails between database and broker."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import select, update
from tests.unit.sql.databases import Database

from msgbus import Bus, Topic
from msgbus.contract.adapter import SendOutcome, TopicSpec
from msgbus.contract.envelope import Envelope
from msgbus.contract.outbox import Claimed, Refusal
from msgbus.errors import BrokerUnavailable, MessageTooLarge, PublishRejected, PublishUnknown, StoreError, TopologyMismatch
from msgbus.outbound.relay import ATTEMPTS, Relay
from msgbus.stores.sql import SqlStore
from msgbus.testing.stage import Seen, eventually


class Order(BaseModel):
    id: str
    n: int = 0


ORDERS = Topic("orders", Order, key="id", shards=3)
LOOSE = Topic("loose", Order)
LONG = 60.0


@pytest.fixture
async def store(place: Database) -> AsyncGenerator[SqlStore, None]:
    async with place.opened() as opened:
        yield opened


async def write(store: SqlStore, *orders: Order, topic: Topic[Order] = ORDERS, **options: Any) -> None:
    """Rows, committed."""
    bus = Bus("memory://", store=store)
    async with store.engine.begin() as connection:
        for order in orders:
            await bus.outbox(connection).publish(topic, order, **options)


class Broker:
    """What a relay delivers to: keeps what it took; `outcomes` of the next deliveries, by message number, are decided by the test."""

    def __init__(self) -> None:
        self.taken: list[Order] = []
        self.ids: list[str] = []
        self.declared: list[TopicSpec] = []
        self.refuse: dict[int, list[Exception]] = defaultdict(list)

    async def deliver(self, envelopes: Sequence[Envelope], deadline: float) -> list[SendOutcome]:
        assert len({envelope.key for envelope in envelopes if envelope.key is not None}) == sum(e.key is not None for e in envelopes)
        outcomes: list[Any] = []
        for envelope in envelopes:
            order = Order.model_validate_json(envelope.body)
            outcome = self.refuse[order.n].pop(0) if self.refuse[order.n] else None
            if outcome is None or isinstance(outcome, PublishUnknown):
                self.taken.append(order)
                self.ids.append(envelope.id)
            outcomes.append(outcome)
        return outcomes

    async def declare(self, topic: TopicSpec) -> None:
        self.declared.append(topic)

    def relay(self, store: SqlStore, lease: float = LONG) -> Relay:
        return Relay(store, self.deliver, self.declare, publish_timeout=5, lease=lease)

    @property
    def numbers(self) -> list[int]:
        return [order.n for order in self.taken]


async def drained(relay: Relay) -> None:
    """Rounds until nothing is due."""
    while await relay.round():
        pass


async def due_now(store: SqlStore) -> None:
    """The time that rows wait for another try is over."""
    async with store.engine.begin() as connection:
        await connection.execute(update(store.tables.outbox).values(available_at=0))


async def statuses(store: SqlStore) -> list[tuple[int, int]]:
    async with store.engine.connect() as connection:
        outbox = store.tables.outbox
        return [(row.status, row.attempts) for row in await connection.execute(select(outbox).order_by(outbox.c.id))]


async def test_what_is_committed_is_sent_once_whole_and_in_order(store: SqlStore) -> None:
    """Every row is sent once, its topic declared as the program has it; of a key in the order of the rows; then nothing is due."""
    await write(store, *(Order(id=str(n % 3), n=n) for n in range(30)), headers={"tenant": "a"})
    await write(store, *(Order(id="x", n=n) for n in range(100, 110)), topic=LOOSE)
    broker = Broker()
    relay = broker.relay(store)
    await drained(relay)
    assert sorted(broker.numbers) == [*range(30), *range(100, 110)]
    for key in range(3):
        assert [n for n in broker.numbers if n < 100 and n % 3 == key] == [n for n in range(30) if n % 3 == key]
    assert {(spec.name, spec.keyed, spec.shards) for spec in broker.declared} == {("orders", True, 3), ("loose", False, None)}
    assert len(broker.declared) == 2
    assert await statuses(store) == [(1, 0)] * 40
    assert (await store.claim(100, LONG)) == Claimed("")


async def test_a_row_is_one_relays_until_its_lease_is_over(store: SqlStore) -> None:
    """What is claimed nobody else gets; after the lease somebody does; the first one's late word changes nothing."""
    await write(store, Order(id="k", n=1), Order(id="k", n=2))
    await write(store, Order(id="x", n=3), topic=LOOSE)
    first = await store.claim(100, 0.3)
    assert [row.envelope.id for row in (await store.claim(100, LONG)).rows] == []
    second = Claimed("")
    async with asyncio.timeout(10):
        while len(second.rows) < 3:
            if second.token:
                await store.settle(second, [], {})
            second = await store.claim(100, LONG)
    assert {row.id for row in second.rows} == {row.id for row in first.rows}
    assert await store.settle(first, [row.id for row in first.rows], {}) == 3
    assert await statuses(store) == [(0, 0)] * 3
    assert await store.settle(second, [row.id for row in second.rows], {}) == 0
    assert await statuses(store) == [(1, 0)] * 3


async def test_what_was_not_sent_is_given_back_at_once(store: SqlStore) -> None:
    """A relay that settles nothing holds nothing."""
    await write(store, Order(id="k", n=1))
    await write(store, Order(id="x", n=2), topic=LOOSE)
    claimed = await store.claim(100, LONG)
    await store.settle(claimed, [], {})
    assert len((await store.claim(100, LONG)).rows) == 2


async def test_a_refused_row_blocks_its_key_alone_until_it_is_parked_and_after(store: SqlStore) -> None:
    """Refused rows wait with back-off and are parked in the end; those behind them of their key wait, others go on; a retry frees them."""
    await write(store, Order(id="a", n=1), Order(id="a", n=2), Order(id="b", n=3))
    await write(store, Order(id="x", n=4), Order(id="x", n=5), topic=LOOSE)
    broker = Broker()
    broker.refuse[1] = [PublishRejected("no") for _ in range(ATTEMPTS)]
    broker.refuse[4] = [MessageTooLarge("never")]
    relay = broker.relay(store)
    for attempt in range(1, ATTEMPTS + 1):
        await drained(relay)
        assert sorted(broker.numbers) == [3, 5]
        assert (await statuses(store))[0] == (2 if attempt == ATTEMPTS else 0, attempt)
        if attempt < ATTEMPTS:
            await due_now(store)
    status = await store.status()
    assert (status.due, status.parked, status.sent) == (1, 2, 2)
    assert [(row["topic"], row["attempts"]) for row in status.parked_rows] == [("orders", ATTEMPTS), ("loose", 1)]
    assert "PublishRejected: no" in str(status.parked_rows[0]["last_error"])
    assert (await store.glance()).problems() == ["2 messages are parked: msgbus outbox status shows them"]
    first = status.parked_rows[0]["id"]
    assert isinstance(first, int)
    assert await store.retry([first]) == 1
    await drained(relay)
    assert broker.numbers[2:] == [1, 2]
    assert await store.retry() == 1
    await drained(relay)
    assert broker.numbers[4:] == [4]


async def test_what_may_be_stored_is_sent_again_before_what_follows_it(store: SqlStore) -> None:
    """After an unknown outcome the same id is sent again, and no later row of its key before; nothing is counted."""
    await write(store, *(Order(id="k", n=n) for n in range(1, 4)))
    broker = Broker()
    broker.refuse[1] = [BrokerUnavailable("away"), PublishUnknown("1", "no answer")]
    relay = broker.relay(store)
    for said in ("away", "no answer"):
        assert await relay.round() == 0
        assert said in str(relay.problem)
    await drained(relay)
    assert broker.numbers == [1, 1, 2, 3]
    assert broker.ids[0] == broker.ids[1]
    assert relay.problem is None
    assert await statuses(store) == [(1, 0)] * 3


async def test_a_topic_that_cannot_be_declared_waits_for_a_person(store: SqlStore) -> None:
    """What the broker has and what the program says differ: counted like a refusal, other topics go on."""
    await write(store, Order(id="k", n=1))
    await write(store, Order(id="x", n=2), topic=LOOSE)
    broker = Broker()

    async def declare(topic: TopicSpec) -> None:
        if topic.name == "orders":
            raise TopologyMismatch("topic 'orders'", "3 shards", "8")

    await drained(Relay(store, broker.deliver, declare, publish_timeout=5, lease=LONG))
    assert broker.numbers == [2]
    assert await statuses(store) == [(0, 1), (1, 0)]


async def test_nothing_is_sent_with_hardly_any_time_left(store: SqlStore) -> None:
    """A broker that is slow to declare takes the time of a round: its rows are the next one's, and are not sent with a confirm that nobody
    could wait for."""
    await write(store, Order(id="k", n=1))
    broker = Broker()

    async def declare(topic: TopicSpec) -> None:
        await asyncio.sleep(0.7)  # more than a round has for it

    relay = Relay(store, broker.deliver, declare, publish_timeout=5, lease=3)
    assert await relay.round() == 0
    assert broker.numbers == []
    assert await relay.round() == 1
    assert broker.numbers == [1]


async def test_delayed_and_expired_rows(store: SqlStore) -> None:
    """A delayed row is not sent before its time, nor does it hold up its key; an expired one is not sent at all."""
    await write(store, Order(id="k", n=1), delay=timedelta(days=30))
    await write(store, Order(id="k", n=2), expires_in=timedelta(milliseconds=1))
    await write(store, Order(id="k", n=3))
    await asyncio.sleep(0.02)  # the expired one's time
    broker = Broker()
    relay = broker.relay(store)
    await drained(relay)
    assert broker.numbers == [3]
    status = await store.status()
    assert (status.due, status.delayed, status.sent) == (0, 1, 2)
    await due_now(store)
    await drained(relay)
    assert broker.numbers == [3, 1]


async def test_old_rows_are_deleted(store: SqlStore) -> None:
    """What was sent long ago, and inbox rows whose time is over, are deleted, a bounded number a time; nothing else is."""
    await write(store, *(Order(id=str(n), n=n) for n in range(5)))
    await drained(Broker().relay(store))
    await write(store, Order(id="6"))
    await store.begin("g", "old", "f", 0.001)
    await store.begin("g", "new", "f", LONG)
    await asyncio.sleep(0.02)  # the old one's time
    assert await store.clean(LONG) == 1
    assert await store.clean(0) == 5
    assert await store.clean(0) == 0
    assert await statuses(store) == [(0, 0)]


async def test_a_relay_drains_and_wakes_by_itself(store: SqlStore, place: Database) -> None:
    """In a running bus a commit is heard of at once, at the latest by the next look; leaving the bus ends the relay."""
    seen: Seen[int] = Seen()
    bus = Bus(f"memory://{place.prefix}", service="s", store=store)

    @bus.subscribe(ORDERS)
    async def note(order: Order) -> None:
        await seen.add(order.n)

    async with bus.running():
        for n in range(5):
            async with place.sessions(store.engine)() as session, session.begin():
                await bus.outbox(session).publish(ORDERS, Order(id="k", n=n))
            assert await seen.wait_for(n + 1, 5) == [*range(n + 1)]
        await eventually(lambda: bus.health().status == "ok")
    assert [task.get_name() for task in asyncio.all_tasks() if "outbox" in task.get_name()] == []


class Away(SqlStore):
    """A store whose database goes away between the publish and the mark."""

    failures = 0

    async def settle(self, claimed: Claimed, sent: Sequence[int], refused: Any) -> int:
        if sent and self.failures:
            self.failures -= 1
            raise StoreError("away (a test)")
        return await super().settle(claimed, sent, refused)


async def test_a_database_away_after_the_publish(place: Database, store: SqlStore) -> None:
    """The mark is tried again while the lease lasts; after it the rows are sent again, with the same ids, and nothing is lost."""
    await write(store, Order(id="k", n=1), Order(id="k", n=2))
    broken = Away(place.sessions(store.engine), tables=store.tables)
    broken.failures = 2
    broker = Broker()
    await drained(broker.relay(broken))
    assert broker.numbers == [1, 2]
    await write(store, Order(id="k", n=3))
    broken.failures = 1000
    with pytest.raises(StoreError):
        await broker.relay(broken, lease=2).round()  # time enough to publish, on a slow machine too
    assert broker.numbers == [1, 2, 3]
    relay = broker.relay(store)
    async with asyncio.timeout(10):
        while len(broker.numbers) == 3:
            await relay.round()
    assert broker.numbers == [1, 2, 3, 3]
    assert len(set(broker.ids)) == 3


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_fails_nothing_is_lost_and_every_key_has_its_order(place: Database, seed: int) -> None:
    """Three relays side by side, a broker that refuses, answers nothing or is away, relays that die before they mark: every row is sent
    at least once, and the first sends of a key are in the order of its rows."""
    draw = random.Random(seed)
    keys, rows = 12, 120
    async with place.opened() as store, place.opened() as second, place.opened() as third:
        await write(store, *(Order(id=str(draw.randrange(keys)), n=n) for n in range(rows)))
        broker = Broker()

        def outcome() -> Exception | None:
            return draw.choice([None] * 12 + [PublishUnknown("?", "x"), BrokerUnavailable("x"), PublishRejected("x")])

        broker.refuse = defaultdict(list, {n: [found for found in [outcome()] if found is not None] for n in range(rows)})

        async def work(mine: SqlStore) -> None:
            relay = broker.relay(mine, lease=1.0)
            while len(set(broker.numbers)) < rows:
                if draw.random() < 0.1:  # this one dies between the publish and the mark
                    claimed = await mine.claim(20, 1.0)
                    await relay._send(claimed.rows, asyncio.get_running_loop().time() + 1, [], {})
                else:
                    await relay.round()
                    await asyncio.sleep(draw.random() * 0.05)

        async with asyncio.timeout(50), asyncio.TaskGroup() as group:
            for mine in (store, second, third):
                group.create_task(work(mine))
    first: dict[str, list[int]] = defaultdict(list)
    for order in broker.taken:
        if order.n not in first[order.id]:
            first[order.id].append(order.n)
    assert {key: sorted(numbers) for key, numbers in first.items()} == dict(first)
    assert sum(map(len, first.values())) == rows


async def test_refusals_are_marked_with_their_reason(store: SqlStore) -> None:
    """A reason of any length fits."""
    await write(store, Order(id="x", n=1), topic=LOOSE)
    claimed = await store.claim(10, LONG)
    (row,) = claimed.rows
    assert await store.settle(claimed, [], {row.id: Refusal("é" * 5000, None)}) == 0
    (parked,) = (await store.status()).parked_rows
    assert str(parked["last_error"]).startswith("éé")
