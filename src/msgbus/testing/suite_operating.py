"""Conformance: operations. C13 of the contract, and what operators ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest

from msgbus.bus import Bus
from msgbus.contract.adapter import (
    Adapter,
    Capability,
    Depth,
    HasDepth,
    HasGroups,
    Purgeable,
    ReceiverSpec,
    Replayable,
    TopicSpec,
)
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import Envelope, new_id
from msgbus.errors import BrokerUnavailable, NotFound, Reject, TopologyMismatch
from msgbus.retry import Retry
from msgbus.testing.faults import FaultyAdapter
from msgbus.testing.stage import Order, Seen, Stage, conformance, eventually, patient, take
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)


@conformance()
async def depth_and_lag(stage: Stage) -> None:
    """What is left of a group: what waits, what is handed out, what is delayed; nothing where all is settled; `NotFound` for others."""
    observer = await stage.open_adapter()
    if not isinstance(observer, HasDepth):
        pytest.skip("the adapter lacks the optional protocol HasDepth")
    adapter = await stage.open_adapter()
    spec = stage.receiver_spec(window=2)
    topic = stage.name("orders")
    await adapter.declare([stage.topic_spec()], [spec, stage.receiver_spec(group="others")])
    with pytest.raises(NotFound):
        await observer.depth(topic, "nobody")
    assert await adapter.send([stage.envelope() for _ in range(5)], timeout=patient(5)) == [None] * 5
    await depth_becomes(observer, topic, "workers", lambda depth: depth.ready == 5 and depth.in_flight in (0, None))
    receiver = await stage.receiver(adapter, spec)
    first, second = await take(receiver, 2)
    await depth_becomes(observer, topic, "workers", lambda depth: depth.in_flight is None or (depth.in_flight == 2 and depth.ready == 3))
    receiver.ack(first)
    await depth_becomes(observer, topic, "workers", lambda depth: depth.ready is None or depth.ready + (depth.in_flight or 0) <= 4)
    receiver.ack(second)
    for _ in range(3):
        receiver.ack((await take(receiver, 1))[0])
    await depth_becomes(observer, topic, "workers", lambda depth: depth.ready in (0, None) and depth.in_flight in (0, None))
    await depth_becomes(observer, topic, "others", lambda depth: depth.ready == 5)
    if Capability.DELAY in adapter.capabilities:
        assert await adapter.send([stage.envelope(group="workers", delay=60.0)], timeout=patient(5)) == [None]
        await depth_becomes(observer, topic, "workers", lambda depth: depth.delayed in (1, None) and depth.ready in (0, None))


@conformance()
async def purge(stage: Stage) -> None:
    """C2: a purge discards what waits for one group, says how much it was, and leaves alone what is handed out and every other group."""
    operator = await stage.open_adapter()
    if not isinstance(operator, Purgeable):
        pytest.skip("the adapter lacks the optional protocol Purgeable")
    adapter = await stage.open_adapter()
    spec = stage.receiver_spec(window=1)
    topic = stage.name("orders")
    others = stage.receiver_spec(group="others", window=10)
    await adapter.declare([stage.topic_spec()], [spec, others])
    with pytest.raises(NotFound):
        await operator.purge(topic, "nobody")
    sent = [stage.envelope() for _ in range(5)]
    assert await adapter.send(sent, timeout=patient(5)) == [None] * 5
    receiver = await stage.receiver(adapter, spec)
    in_hand = (await take(receiver, 1))[0]
    assert await operator.purge(topic, "workers") == 4
    assert await operator.purge(topic, "workers") == 0
    receiver.ack(in_hand)
    later = stage.envelope()
    assert await adapter.send([later], timeout=patient(5)) == [None]
    assert (await take(receiver, 1))[0].envelope.id == later.id, "what was purged does not come, what is sent later does"
    all_of_it = await take(await stage.receiver(adapter, others), 6)
    assert {received.envelope.id for received in all_of_it} == {envelope.id for envelope in [*sent, later]}


@conformance(seconds=60)
async def purge_while_at_work(stage: Stage) -> None:
    """C2: a purge of a group at work frees it at once, however much waited: what is sent after it does not queue behind what is gone."""
    operator = await stage.open_adapter()
    if not isinstance(operator, Purgeable):
        pytest.skip("the adapter lacks the optional protocol Purgeable")
    bus = stage.bus()
    begun: Seen[int] = Seen()
    may_end = asyncio.Event()

    @bus.subscribe(ORDERS, concurrency=2)
    async def handle(order: Order) -> None:
        await begun.add(order.n)
        await may_end.wait()

    await stage.start(bus)
    assert await bus.publish_many(ORDERS, [Order(n=n) for n in range(2000)]) == 2000
    await begun.wait_for(2)
    assert await operator.purge(stage.name("orders"), "suite") >= 1800
    may_end.set()
    assert await bus.publish_many(ORDERS, [Order(n=n) for n in range(2000, 2020)]) == 20
    await eventually(lambda: {*range(2000, 2020)} <= {*begun.items}, 10, "what was sent after the purge")
    assert len(begun.items) <= 120, "all but what was handed out is gone"


@conformance(needs=Capability.RETAIN | Capability.SHARDS, seconds=60)
async def replay_while_at_work(stage: Stage) -> None:
    """C4: a group at work gets a topic's history again, once, each key in order, and then what came meanwhile; no link is lost by it."""
    operator = await stage.open_adapter()
    if not isinstance(operator, Replayable):
        pytest.skip("the adapter lacks the optional protocol Replayable")
    kept = Topic("kept", Order, key="id", retain=timedelta(hours=1), shards=3)
    worker, seen = await stage.collect(kept, concurrency=4)
    orders = [Order(n=n, id=f"k{n % 5}") for n in range(150)]
    await worker.bus.publish_many(kept, orders[:100])
    await seen.wait_for(100)
    await asyncio.sleep(0.5)  # acks may take their time; an operator takes more
    assert await operator.replay(stage.name("kept"), "suite", 0.0) == 100
    await worker.bus.publish_many(kept, orders[100:])
    await seen.wait_for(250, 20)
    for key in {order.id for order in orders}:
        again = [order.n for order in seen.items[100:] if order.id == key]
        assert again == [order.n for order in orders if order.id == key]
    assert worker.bus.health().subscriptions[0].last_error is None


@conformance(needs=Capability.RETAIN)
async def replay_passes_nothing_over(stage: Stage) -> None:
    """C2: what waits and is older than where a replay begins, though that be in the future, is delivered as it would have been."""
    operator = await stage.open_adapter()
    if not isinstance(operator, Replayable):
        pytest.skip("the adapter lacks the optional protocol Replayable")
    topic, spec = stage.name("orders"), stage.receiver_spec(window=10)
    await operator.declare([replace(stage.topic_spec(), retain=3600.0)], [spec])
    with pytest.raises(NotFound):
        await operator.replay(topic, "nobody", 0.0)
    sent = [stage.envelope() for _ in range(4)]
    assert await operator.send(sent[:2], timeout=patient(5)) == [None] * 2
    assert await operator.replay(topic, "workers", time.time() + 60) == 0
    assert await operator.send(sent[2:], timeout=patient(5)) == [None] * 2
    taken = await take(await stage.receiver(operator, spec), 4)
    assert {received.envelope.id for received in taken} == {envelope.id for envelope in sent}


@conformance()
async def health_reports_down_and_recovers(stage: Stage) -> None:
    """C11: health says that the broker is away, and why, and is well again without a word from the program; a publish meanwhile waits."""
    faulty = FaultyAdapter(stage.new_adapter())
    bus = stage.bus(adapter=faulty, settings=stage.settings(heartbeat=timedelta(seconds=0.1)))
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    worker = await stage.start(bus)
    await eventually(lambda: bus.health().status == "ok", what="health to be ok")
    assert bus.health().problems == ()
    faulty.away = True
    await eventually(lambda: bus.health().status == "down", what="health to say that the broker is away")
    await eventually(lambda: any(problem.startswith("broker:") for problem in bus.health().problems), what="the broker as a problem")
    await eventually(lambda: bus.health().subscriptions[0].state == "waiting for broker", what="the subscription to wait for it")
    assert bus.health().live, "a restart would not help"
    waiting = asyncio.create_task(bus.publish(ORDERS, Order(n=1)))
    faulty.away = False
    assert (await waiting).state == "confirmed"
    await seen.wait_for(1)
    await eventually(lambda: bus.health().status == "ok", what="health to be ok again")
    assert bus.health().subscriptions[0].state == "running"
    await worker.stop()


@conformance(needs=Capability.SHARDS)
async def topology_mismatch_fails_start(stage: Stage) -> None:
    """C13: what stands at the broker and differs fails the start, naming resource, what was expected and what was found; nothing is
    altered."""
    first = stage.bus()
    seen: Seen[int] = Seen()

    @first.subscribe(Topic("orders", Order, key="id", shards=3))
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    worker = await stage.start(first)
    other = stage.bus()

    @other.subscribe(Topic("orders", Order, key="id", shards=5))
    async def handle_otherwise(order: Order) -> None: ...

    with pytest.raises(TopologyMismatch) as caught:
        await stage.start(other)
    assert stage.name("orders") in caught.value.resource
    assert "5" in caught.value.expected
    assert "3" in caught.value.actual
    publisher = stage.bus(service="publisher")
    async with publisher:
        with pytest.raises(TopologyMismatch):
            await publisher.publish(Topic("orders", Order, key="id", shards=5), Order(n=0))
    async with stage.bus(service="publisher") as publisher:
        await publisher.publish("orders", {"n": 0})  # under the plain name: as the broker has it
    await seen.wait_for(1)
    await worker.stop()
    adapter = await stage.open_adapter()
    assert await adapter.shards(stage.name("orders")) == 3


@conformance()
async def topology_check_declares_nothing_and_names_what_is_missing(stage: Stage) -> None:
    """C13: `topology=check` declares nothing and fails the start with the name of what is missing; where all is there it works."""
    check = stage.settings(topology="check")

    def service(**options: object) -> tuple[Bus, Seen[int]]:
        bus = stage.bus(**options)  # type: ignore[arg-type]  # settings, or nothing
        seen: Seen[int] = Seen()

        @bus.subscribe(ORDERS)
        async def handle(order: Order) -> None:
            await seen.add(order.n)

        return bus, seen

    for _ in range(2):  # the first one has not declared it
        with pytest.raises(TopologyMismatch) as caught:
            await stage.start(service(settings=check)[0])
        assert stage.name("orders") in caught.value.resource
    await (await stage.publisher()).publish(ORDERS, Order(n=0))  # the topic alone, without the group
    for _ in range(2):
        with pytest.raises(TopologyMismatch) as caught:
            await stage.start(service(settings=check)[0])
        assert "orders" in caught.value.resource
    worker = await stage.start(service()[0])
    await worker.stop()
    bus, seen = service(settings=check)
    await stage.start(bus)
    await bus.publish(ORDERS, Order(n=1))
    await seen.wait_until(lambda items: 1 in items, what="the message")


@conformance(needs=Capability.BROADCAST)
async def broadcast_each_instance(stage: Stage) -> None:
    """C2: `broadcast=True` means every running instance, from now on: none gets what came before it ran, and none leaves a group
    behind."""

    def instance() -> tuple[Bus, Seen[int]]:
        bus = stage.bus()
        seen: Seen[int] = Seen()

        @bus.subscribe(ORDERS, broadcast=True)
        async def handle(order: Order) -> None:
            await seen.add(order.n)

        return bus, seen

    publisher = await stage.publisher()
    await publisher.publish(ORDERS, Order(n=0))
    first_bus, first = instance()
    second_bus, second = instance()
    first_worker = await stage.start(first_bus)
    second_worker = await stage.start(second_bus)
    await publisher.publish(ORDERS, Order(n=1))
    await first.wait_for(1)
    await second.wait_for(1)
    await first_worker.stop()
    await publisher.publish(ORDERS, Order(n=2))
    await second.wait_for(2)
    first_worker = await stage.start(first_bus)
    await publisher.publish(ORDERS, Order(n=3))
    await first.wait_until(lambda items: 3 in items, what="what came after it was back")
    await second.wait_for(3)
    await first_worker.stop()
    await second_worker.stop()
    assert first.items == [1, 3], "nothing from before it ran, nothing from while it was away"
    assert second.items == [1, 2, 3]
    adapter = await stage.open_adapter()
    if isinstance(adapter, HasGroups):
        assert list(await adapter.groups(stage.name("orders"))) == []


class NamesSeen(FaultyAdapter):
    """Notes every topic name that the core hands to an adapter."""

    def __init__(self, real: Adapter) -> None:
        super().__init__(real)
        self.names: set[str] = set()

    async def declare(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec], *, create: bool = True) -> None:
        self.names.update(spec.name for spec in topics)
        self.names.update(spec.topic for spec in receivers)
        await super().declare(topics, receivers, create=create)

    def fault(self, envelope: Envelope) -> None:
        """No fault: every envelope, sent or forwarded, comes by here."""
        self.names.add(envelope.topic)


@conformance()
async def namespace_prefixes_every_name(stage: Stage) -> None:
    """C13: a namespace is in front of every name at the broker, dead letters included, so environments that share one do not meet."""
    adapter = NamesSeen(stage.new_adapter())
    seen: Seen[int] = Seen()

    def service(namespace: str, adapter: Adapter | None, into: Seen[int]) -> Bus:
        bus = stage.bus(adapter=adapter, settings=stage.settings(namespace=namespace), retry=Retry.none())

        @bus.subscribe(ORDERS)
        async def handle(order: Order) -> None:
            await into.add(order.n)
            if order.n < 0:
                raise Reject("never")

        return bus

    ours = service(stage.namespace, adapter, seen)
    theirs_seen: Seen[int] = Seen()
    theirs = service(stage.namespace + "other.", None, theirs_seen)
    await stage.start(ours)
    await stage.start(theirs)
    await ours.publish(ORDERS, Order(n=1))
    await ours.publish(ORDERS, Order(n=-1))
    await seen.wait_for(2)
    letters = ours.dead_letters("orders", group="suite")
    await counted(letters.count, 1)
    assert await letters.redrive() == 1
    await seen.wait_for(3)
    await counted(letters.count, 1)
    async with ours.consumer(ORDERS, group="puller") as consumer:
        await ours.publish(ORDERS, Order(n=2))
        for delivery in await consumer.receive(10, timedelta(seconds=patient(10))):
            await delivery.ack()
    await theirs.publish(ORDERS, Order(n=7))
    await theirs_seen.wait_for(1)
    await seen.wait_until(lambda items: 2 in items, what="our own")
    assert theirs_seen.items == [7]
    assert 7 not in seen.items
    assert {name for name in adapter.names if not name.startswith(stage.namespace)} == set()
    assert {stage.name("orders"), stage.name("orders.suite.dead")} <= adapter.names


@conformance()
async def dropped_group_frees_what_it_held(stage: Stage) -> None:
    """C2: a dropped group is forgotten with all that it held, dead letters aside, and its receivers learn of it; others keep theirs;
    declared again it is a later group."""
    operator = await stage.open_adapter()
    if not isinstance(operator, HasGroups):
        pytest.skip("the adapter lacks the optional protocol HasGroups")
    adapter = await stage.open_adapter()
    topic = stage.name("orders")
    workers, others = stage.receiver_spec(window=2), stage.receiver_spec(group="others", window=10)
    dead = TopicSpec(dead_topic(topic, "workers"), kind="dead")
    await adapter.declare([stage.topic_spec(), dead], [workers, others])
    sent = [stage.envelope() for _ in range(5)]
    letter = Envelope(new_id(), dead.name, b"{}", {})
    assert await adapter.send([*sent, letter], timeout=patient(5)) == [None] * 6
    receiver = await stage.receiver(adapter, workers)
    await take(receiver, 2)
    assert sorted(await operator.groups(topic)) == ["others", "workers"]
    assert await operator.drop_group(topic, "workers") is True
    assert await operator.drop_group(topic, "workers") is False
    assert list(await operator.groups(topic)) == ["others"]
    with pytest.raises(BrokerUnavailable):
        await take(receiver, 4)
    if isinstance(operator, HasDepth):
        with pytest.raises(NotFound):
            await operator.depth(topic, "workers")
    await adapter.declare([stage.topic_spec()], [workers])
    later = stage.envelope()
    assert await adapter.send([later], timeout=patient(5)) == [None]
    again = await take(await stage.receiver(adapter, workers), 1)
    assert again[0].envelope.id == later.id, "nothing of what it held before comes again"
    kept = await take(await stage.receiver(adapter, others), 6)
    assert {received.envelope.id for received in kept} == {envelope.id for envelope in [*sent, later]}
    letters = await take(await stage.receiver(adapter, ReceiverSpec(dead.name, DEAD_GROUP)), 1)
    assert letters[0].envelope.id == letter.id


# ---------------------------------------------------------------- in common


async def depth_becomes(adapter: HasDepth, topic: str, group: str, right: Callable[[Depth], bool], seconds: float = 5.0) -> None:
    """Returns once the depth is right; what a broker counts may lag behind."""
    deadline = time.monotonic() + patient(seconds)
    while not right(depth := await adapter.depth(topic, group)):
        assert time.monotonic() < deadline, f"the depth of {topic} for {group} stays {depth}"
        await asyncio.sleep(0.02)


async def counted(count: Callable[[], Awaitable[int | None]], expected: int, seconds: float = 10.0) -> None:
    """Returns once there are so many, or where the broker cannot say."""
    deadline = time.monotonic() + patient(seconds)
    while (found := await count()) not in (expected, None):
        assert time.monotonic() < deadline, f"there are {found}, not {expected}"
        await asyncio.sleep(0.02)
