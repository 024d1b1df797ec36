"""Conformance: groups. C2 of the contract: who gets what, and from when on."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

from tenacity import wait_fixed

from msgbus.context import Context
from msgbus.contract.adapter import Capability
from msgbus.retry import Retry
from msgbus.testing.stage import QUIET, Order, Seen, Stage, Worker, conformance, patient, take
from msgbus.testing.steps import LONG, numbers_of, send_numbered
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
AT_ONCE = wait_fixed(0)


@conformance(seconds=90)
async def concurrent_consumers_share_group(stage: Stage) -> None:
    """C2: the processes of a group share one copy of the topic: all have a part of the work, and none of it is done twice."""
    seen: Seen[tuple[str, int]] = Seen()
    both = asyncio.Event()

    async def start(process: str) -> Worker:
        bus = stage.bus()

        @bus.subscribe(ORDERS, concurrency=1, window=1)
        async def handle(order: Order) -> None:
            await seen.add((process, order.n))
            if order.n < 0:
                await both.wait()

        return await stage.start(bus)

    workers = [await start("first"), await start("second")]
    publisher = await stage.publisher()
    warming = 0
    async with asyncio.timeout(patient(LONG)):
        while {process for process, _ in seen.items} != {"first", "second"}:  # each has one in hand, so a third waits
            warming += 1
            await publisher.publish(ORDERS, Order(n=-warming))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await seen.wait_for(warming)
    both.set()
    await seen.wait_for(warming, LONG)
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(100)])
    await seen.wait_for(warming + 100, LONG)
    for worker in workers:
        await worker.stop()
    assert sorted(n for _, n in seen.items) == list(range(-warming, 0)) + list(range(100))


@conformance(seconds=60)
async def groups_each_get_all(stage: Stage) -> None:
    """C2: every group gets every message, once."""
    groups = ("first", "second", "third")
    seen = [(await stage.collect(ORDERS, service=group))[1] for group in groups]
    publisher = await stage.publisher()
    for n in range(20):
        await publisher.publish(ORDERS, Order(n=n))
    for items in seen:
        await items.wait_for(20, LONG)
        assert sorted(order.n for order in items.items) == list(range(20))


@conformance(seconds=60)
async def one_groups_retry_and_dead_letter_leave_other_groups_alone(stage: Stage) -> None:
    """C2: what fails in one group is retried and given up in that group alone: another sees the message once, as a first run, and has no
    dead letter of it."""
    bus = stage.bus(service="failing", retry=Retry(attempts=6, wait=AT_ONCE))  # more runs than are made without a copy
    runs: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def fail(order: Order, context: Context) -> None:
        if order.n == 1:
            await runs.add(context.attempt)
            raise ValueError("always")

    await stage.start(bus)
    healthy = stage.bus(service="healthy")
    seen: Seen[tuple[int, int]] = Seen()

    @healthy.subscribe(ORDERS)
    async def handle(order: Order, context: Context) -> None:
        await seen.add((order.n, context.attempt))

    await stage.start(healthy)
    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order(n=1))
    await runs.wait_for(6, LONG)
    [letter] = await stage.dead_letters(1, group="failing")
    assert await stage.dead_letters(0, group="healthy") == []
    await publisher.publish(ORDERS, Order(n=2))
    await seen.wait_until(lambda items: (2, 1) in items)
    assert seen.items == [(1, 1), (2, 1)]
    assert runs.items == [1, 2, 3, 4, 5, 6]
    assert letter.record["group"] == "failing"


@conformance(seconds=60)
async def multi_topic_no_leak(stage: Stage) -> None:
    """C2: a handler gets its own topic's messages and no others, however alike the names are, in one process and one group."""
    names = ("orders", "orders-eu", "orders.eu", "orders.eu.west", "order", "Orders", "eu.orders")
    topics = [Topic(name, Order) for name in names]
    bus = stage.bus()
    seen: Seen[tuple[str, str]] = Seen()

    async def handle(order: Order, context: Context) -> None:
        await seen.add((context.topic, order.text))

    for topic in topics:
        bus.subscribe(topic)(handle)
    await stage.start(bus)
    publisher = await stage.publisher()
    for topic in topics:
        await publisher.publish_many(topic, [Order(text=topic.name)] * 3)
    await seen.wait_for(3 * len(topics), LONG)
    assert sorted(seen.items) == sorted((name, name) for name in names * 3)


# ---------------------------------------------------------------- history


@conformance(seconds=60)
async def first_group_gets_what_came_before_it(stage: Stage) -> None:
    """C2: the topic's first group gets what was confirmed before it, while it was being declared, and after: nothing falls between."""
    publisher = await stage.publisher()
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(20)])
    declared = asyncio.Event()

    async def keep_publishing() -> int:
        n = 20
        while not declared.is_set() or n < 40:
            await publisher.publish(ORDERS, Order(n=n))
            n += 1
            await asyncio.sleep(0.001)
        return n

    publishing = asyncio.create_task(keep_publishing())
    _, seen = await stage.collect(ORDERS)
    declared.set()
    count = await publishing
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(count, count + 20)])
    await seen.wait_until(lambda items: {order.n for order in items} == set(range(count + 20)), LONG, f"all of {count + 20}")


@conformance(needs=Capability.RETAIN, seconds=60)
async def retained_topic_gives_history_to_a_later_group(stage: Stage) -> None:
    """C2: where the topic says `retain=`, a later group starts at its history, though another is done with it; one that starts at the
    latest does not."""
    kept = Topic("kept", Order, retain=timedelta(hours=1))
    _, first = await stage.collect(kept, service="first")
    publisher = await stage.publisher()
    await publisher.publish_many(kept, [Order(n=n) for n in range(5)])
    await first.wait_for(5, LONG)
    _, later = await stage.collect(kept, service="later")
    _, latest = await stage.collect(kept, service="latest", start="latest")
    await later.wait_for(5, LONG)
    await publisher.publish_many(kept, [Order(n=n) for n in range(5, 10)])
    for seen, wanted in ((first, range(10)), (later, range(10)), (latest, range(5, 10))):
        await seen.wait_for(len(wanted), LONG)
        assert sorted(order.n for order in seen.items) == list(wanted)


@conformance(seconds=60)
async def group_misses_nothing_after_it_was_declared(stage: Stage) -> None:
    """C2: a group that was declared once gets everything that is confirmed from then on, also while none of its processes is there."""
    adapter = await stage.open_adapter()
    specs = [stage.receiver_spec(group="first", window=100), stage.receiver_spec(group="second", window=100)]
    await adapter.declare([stage.topic_spec()], specs[:1])
    await adapter.declare([stage.topic_spec()], specs[1:])  # a later group: nothing is kept for it but what follows
    await send_numbered(stage, adapter, 20)
    for spec in specs:
        receiver = await stage.receiver(adapter, spec)
        taken = await take(receiver, 20, LONG)
        assert numbers_of(taken) == list(range(20))
        for received in taken:
            receiver.ack(received)
        await receiver.close()
    await send_numbered(stage, adapter, 20, start=20)
    await adapter.close()
    await adapter.open()
    await adapter.declare([stage.topic_spec()], specs)
    for spec in specs:
        receiver = await stage.receiver(adapter, spec)
        taken = await take(receiver, 20, LONG)
        taken += await receiver.receive(10, patient(QUIET))
        assert numbers_of(taken) == list(range(20, 40))


@conformance(seconds=60)
async def latest_group_gets_only_new(stage: Stage) -> None:
    """C2: a group that starts at the latest gets what is published after its declaration, all of it, and nothing from before: not even when
    it is the topic's first."""
    publisher = await stage.publisher()
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5)])
    adapter = await stage.open_adapter()
    spec = stage.receiver_spec(group="latest", start="latest")
    await adapter.declare([stage.topic_spec()], [spec])
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5, 10)])  # declared, and nobody is there yet
    await adapter.declare([stage.topic_spec()], [spec])  # a second time changes nothing
    _, seen = await stage.collect(ORDERS, service="latest", start="latest")
    await seen.wait_for(5, LONG)
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(10, 15)])
    await seen.wait_until(lambda items: {order.n for order in items} >= set(range(5, 15)), LONG, "all that is new")
    assert sorted(order.n for order in seen.items) == list(range(5, 15))


@conformance(seconds=60)
async def later_group_starts_at_its_declaration(stage: Stage) -> None:
    """C2: a topic's second group, without `retain=`, starts where it is declared, though it asks for the earliest: what others have, or
    have not yet, handled before is not for it."""
    publisher = await stage.publisher()
    _, first = await stage.collect(ORDERS, service="first")
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5)])
    await first.wait_for(5, LONG)
    adapter = await stage.open_adapter()
    await adapter.declare([stage.topic_spec()], [stage.receiver_spec(group="idle")])
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(5, 10)])  # the group "idle" has them before it
    _, later = await stage.collect(ORDERS, service="later", start="earliest")
    await publisher.publish_many(ORDERS, [Order(n=n) for n in range(10, 15)])
    await later.wait_until(lambda items: {order.n for order in items} >= set(range(10, 15)), LONG, "all that is new")
    await first.wait_for(15, LONG)
    assert sorted(order.n for order in later.items) == list(range(10, 15))
    assert sorted(order.n for order in first.items) == list(range(15))


@conformance(needs=Capability.SHARDS, seconds=90)
async def plain_name_takes_the_brokers_shards(stage: Stage) -> None:
    """C4: a bus that knows a topic by its plain name, or without key or shards, takes those that the broker has: its handlers are ordered
    as anyone's, and what it publishes with a key goes where that key's messages are."""
    sharded = Topic("orders", Order, key="id", shards=4)
    publisher = await stage.publisher()
    await publisher.publish(sharded, Order(id="key-0", n=-1))
    adapter = await stage.open_adapter()
    assert await adapter.shards(stage.name("orders")) == 4

    bus = stage.bus()
    seen: Seen[tuple[str, int]] = Seen()
    running: set[str] = set()
    overlaps: list[Order] = []

    @bus.subscribe("orders", concurrency=8)
    async def handle(order: Order) -> None:
        if order.id in running:
            overlaps.append(order)
        running.add(order.id)
        await asyncio.sleep(0.001 if order.n % 3 else 0.003)
        running.discard(order.id)
        await seen.add((order.id, order.n))

    worker = await stage.start(bus)
    assert [plan.ordered for plan in worker.bus.plans] == [True]
    plain = await stage.entered(stage.bus(service="plain"))
    raw = await stage.entered(stage.bus(service="raw"))
    other = await stage.entered(stage.bus(service="other"))
    feed = Topic("orders", bytes, content_type="application/json")
    keyed = Topic("orders", Order, key="id")
    for n in range(0, 80, 4):
        for key in ("key-0", "key-1", "key-2"):
            order = Order(id=key, n=n)
            await publisher.publish(sharded, order)
            await plain.publish("orders", order.model_copy(update={"n": n + 1}), key=key)
            await raw.publish(feed, order.model_copy(update={"n": n + 2}).model_dump_json().encode(), key=key)
            await other.publish(keyed, order.model_copy(update={"n": n + 3}))
    await seen.wait_for(241, LONG)
    assert overlaps == [], "two runs of one key at once"
    for key in ("key-0", "key-1", "key-2"):
        numbers = list(dict.fromkeys(n for found, n in seen.items if found == key and n >= 0))
        assert numbers == list(range(80))
    assert await adapter.shards(stage.name("orders")) == 4
