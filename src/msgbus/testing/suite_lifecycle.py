"""Conformance: lifecycle and operations. C10, C11 and C13 of the contract, what operators ask for, and what is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from msgbus.bus import Bus
from msgbus.context import Context
from msgbus.contract.adapter import (
    Adapter,
    Capability,
    Depth,
    HasDepth,
    HasGroups,
    Purgeable,
    Received,
    ReceiverSpec,
    Tenure,
    TopicSpec,
)
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.contract.envelope import Envelope, new_id
from msgbus.errors import BrokerUnavailable, ConfigurationError, InvalidName, NotFound, Reject, TopologyMismatch, UnsupportedFeature
from msgbus.retry import Retry
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import Order, Seen, Stage, conformance, eventually, patient, take
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
KEYED = Topic("orders", Order, key="id")
SOON = timedelta(seconds=0.3)

# ---------------------------------------------------------------- stopping


@conformance()
async def graceful_drain_finishes_inflight(stage: Stage) -> None:
    """C10: a stop lets what runs finish and be acked, starts nothing more, and leaves the rest to the group; in an ordered group too."""
    publisher = await stage.publisher()
    adapter = await stage.open_adapter()
    ordered = Topic("ordered", Order, key="id")
    for topic in (ORDERS, ordered) if Capability.SHARDS in adapter.capabilities else (ORDERS,):
        bus = stage.bus()
        begun: Seen[int] = Seen()
        ended: Seen[int] = Seen()
        go = asyncio.Event()

        @bus.subscribe(topic, concurrency=2, window=20)
        async def handle(order: Order, begun: Seen[int] = begun, ended: Seen[int] = ended, go: asyncio.Event = go) -> None:
            await begun.add(order.n)
            await go.wait()
            await ended.add(order.n)

        await publish(publisher, 6, topic)
        worker = await stage.start(bus)
        await begun.wait_for(2)
        stopping = asyncio.create_task(worker.stop())
        await eventually(lambda: [runner.state for runner in bus.runners] == ["draining"], what="the drain")  # noqa: B023  at once
        assert not stopping.done(), "it waits for what runs"
        go.set()
        await stopping
        assert len(begun.items) == 2, "nothing was started after the stop"
        assert sorted(ended.items) == sorted(begun.items), "what ran was finished"
        rest = await handled_by_another(stage, publisher, 4, topic)
        assert sorted(rest) == sorted({*range(6)} - {*ended.items}), "what was finished was acked, and nothing else"


@conformance()
async def drain_gives_back_what_was_not_started(stage: Stage) -> None:
    """C10: a drain gives back what was fetched and not started, not counted as an attempt; what was handed out can still be
    settled."""
    bus = stage.bus()
    begun: Seen[int] = Seen()
    go = asyncio.Event()

    @bus.subscribe(ORDERS, concurrency=1, window=10)
    async def handle(order: Order) -> None:
        await begun.add(order.n)
        await go.wait()

    publisher = await stage.publisher()
    await publish(publisher, 8)
    worker = await stage.start(bus)
    await begun.wait_for(1)
    stopping = asyncio.create_task(worker.stop())
    peer = stage.bus()
    given: Seen[tuple[int, int]] = Seen()

    @peer.subscribe(ORDERS)
    async def take_over(order: Order, context: Context) -> None:
        await given.add((order.n, context.attempt))

    await stage.start(peer)
    await eventually(lambda: [runner.state for runner in bus.runners] == ["draining"], what="the drain")
    go.set()
    await stopping
    await given.wait_for(7)
    assert len(begun.items) == 1, "nothing was started after the stop"
    assert sorted(given.items) == [(n, 1) for n in range(8) if n != begun.items[0]]

    adapter = await stage.open_adapter()
    spec = stage.receiver_spec("parcels", window=4)
    await adapter.declare([stage.topic_spec("parcels")], [spec])
    sent = [stage.envelope("parcels") for _ in range(8)]
    assert await adapter.send(sent, timeout=patient(5)) == [None] * 8
    draining = await stage.receiver(adapter, spec)
    first, second, *_ = await take(draining, 4)
    await draining.drain()
    await draining.drain()  # twice is once
    assert await draining.receive(4, 0.1) == [], "a receiver that drains hands out nothing more"
    draining.ack(first)
    await draining.release(second)
    await draining.close()
    other = await stage.receiver(await stage.open_adapter(), stage.receiver_spec("parcels", window=8))
    left = {received.envelope.id for received in await take(other, 7)}
    assert left == {envelope.id for envelope in sent} - {first.envelope.id}


class FaultyTenures(FaultyReceiver):
    """Hands out each message by a tenure of its own, which the test takes away."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        batch = await super().receive(limit, timeout)
        for received in batch:
            received.tenure = Tenure()
        return batch


@conformance()
async def lost_tenure_is_not_started(stage: Stage) -> None:
    """C4, C11: what waits here is not started once our hold on it is lost: it is delivered again, to whoever has it then."""
    faulty = FaultyAdapter(stage.new_adapter())
    faulty.make_receiver = FaultyTenures
    bus = stage.bus(adapter=faulty)
    begun: Seen[int] = Seen()
    go = asyncio.Event()

    @bus.subscribe(ORDERS, concurrency=1, window=3)
    async def handle(order: Order) -> None:
        await begun.add(order.n)
        await go.wait()

    publisher = await stage.publisher()
    await publish(publisher, 3)
    worker = await stage.start(bus)
    await begun.wait_for(1)
    await eventually(lambda: sum(len(receiver.received) for receiver in faulty.receivers) == 3, what="all three to be fetched")
    held = [received for receiver in faulty.receivers for received in receiver.received]
    lost = next(received for received in held if Order.model_validate_json(received.envelope.body).n != begun.items[0])
    lost_number = Order.model_validate_json(lost.envelope.body).n
    lost.tenure.lost = True
    go.set()
    await begun.wait_for(2)
    await worker.stop()
    assert lost_number not in begun.items
    assert lost.envelope.id not in [id for receiver in faulty.receivers for id in receiver.acked]
    assert await handled_by_another(stage, publisher, 1) == [lost_number]


@conformance()
async def drain_timeout_cancels_unacked(stage: Stage) -> None:
    """C10: what still runs after `drain_timeout` is cancelled and goes back, its attempt not counted; a stop is over in time."""
    bus = stage.bus(settings=stage.settings(drain_timeout=SOON, close_timeout=timedelta(seconds=patient(4))))
    begun: Seen[int] = Seen()
    cancelled: list[int] = []

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await begun.add(order.n)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(order.n)
            raise

    worker = await stage.start(bus)
    publisher = await stage.publisher()
    await publish(publisher, 2)
    await begun.wait_for(2)
    loop = asyncio.get_running_loop()
    before = loop.time()
    await worker.stop()
    took = loop.time() - before
    assert took >= SOON.total_seconds() - 0.05, "they had their time"
    assert took <= SOON.total_seconds() + patient(4), "drain_timeout and close_timeout bound a stop"
    assert sorted(cancelled) == [0, 1]
    successor = stage.bus()
    again: Seen[tuple[int, int]] = Seen()

    @successor.subscribe(ORDERS)
    async def handle_again(order: Order, context: Context) -> None:
        await again.add((order.n, context.attempt))

    await stage.start(successor)
    assert sorted(await again.wait_for(2)) == [(0, 1), (1, 1)]


@conformance()
async def stop_is_idempotent(stage: Stage) -> None:
    """C10: stopping twice, or what does not run, changes nothing; a receiver and an adapter can be closed twice; a bus that was left
    can be entered again."""
    bus = stage.bus()
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    bus.stop()  # it does not run
    publisher = await stage.publisher()
    for n in range(2):
        running = asyncio.create_task(bus.run())
        await publisher.publish(ORDERS, Order(n=n))
        await seen.wait_for(n + 1)
        bus.stop()
        bus.stop()
        for runner in bus.runners:
            runner.stop()
        await running
        bus.stop()
    worker = await stage.start(bus)
    await publisher.publish(ORDERS, Order(n=2))
    await seen.wait_for(3)
    await asyncio.gather(worker.stop(), worker.stop())
    await worker.stop()
    assert seen.items == [0, 1, 2]

    adapter = stage.new_adapter()
    await adapter.close()  # it was never open
    await adapter.open()
    spec = stage.receiver_spec("parcels")
    await adapter.declare([stage.topic_spec("parcels")], [spec])
    receiver = await adapter.open_receiver(spec)
    for _ in range(2):
        await receiver.drain()
    for _ in range(2):
        await receiver.close()
    for _ in range(2):
        await adapter.close()
    await receiver.close()
    await adapter.open()
    await adapter.ping()
    await adapter.close()
    with pytest.raises(BrokerUnavailable):
        await adapter.ping()


@conformance(seconds=120)
async def start_stop_100_times_no_leak(stage: Stage) -> None:
    """C10: a service that starts, works and stops leaves no task, thread, file or socket behind, however often it does so."""
    bus = stage.bus()
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    in_threads: list[int] = []

    @bus.subscribe(ORDERS, group="threads", concurrency=2)
    def handle_in_a_thread(order: Order) -> None:
        in_threads.append(order.n)

    async def live_and_die(n: int) -> None:
        """Once with a bus that is entered again, once with one that is new."""
        async with bus.running():
            async with stage.bus(service="publisher") as publisher:
                await publisher.publish(ORDERS, Order(n=n))
            await seen.wait_for(n + 1)
            await eventually(lambda: len(in_threads) == n + 1, what="the handler in a thread")

    settle_in = 2
    for n in range(settle_in):
        await live_and_die(n)
    gc.collect()
    before = belongings()
    for n in range(settle_in, settle_in + stage.broker.many):
        await live_and_die(n)
    gc.collect()
    await eventually(lambda: belongings() <= before, seconds=2.0, what=f"{belongings()} to be {before} again")
    assert seen.items == in_threads == [*range(settle_in + stage.broker.many)]


class Belongings(dict[str, int]):
    """How much of each kind a process has; `<=`: of no kind more."""

    def __le__(self, other: Belongings) -> bool:
        return all(count <= other.get(kind, 0) for kind, count in self.items())


def belongings() -> Belongings:
    """What this process has open just now. Files and sockets only where /proc says."""
    # asyncio's own threads, which look up names, are kept for the loop's life, and as many as it was ever in need of.
    threads = sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
    counts = Belongings(tasks=len(asyncio.all_tasks()), threads=threads)
    try:
        descriptors = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return counts
    counts["files"] = len(descriptors)
    counts["sockets"] = 0
    for descriptor in descriptors:
        try:
            counts["sockets"] += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
        except FileNotFoundError:  # the descriptor of the listing itself
            counts["files"] -= 1
    return counts


# ---------------------------------------------------------------- operating


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


# ---------------------------------------------------------------- what must be there where it is claimed


_CHILD = """
import asyncio, json, sys
from msgbus import Bus, Topic
from msgbus.settings import Settings
from msgbus.testing.stage import Order

async def main():
    given = json.load(sys.stdin)
    async with Bus(service="child", settings=Settings(**given["settings"])) as bus:
        await bus.publish(Topic("orders", Order), Order(n=given["n"]))

asyncio.run(main())
"""


async def publish_in_another_process(stage: Stage, n: int) -> None:
    """A process of its own publishes one order, and has ended when this returns."""
    settings = stage.settings().model_dump(mode="json") | {"url": stage.broker.url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _, complaint = await process.communicate(json.dumps({"settings": settings, "n": n}).encode())
    assert process.returncode == 0, complaint.decode()


@conformance(needs=Capability.SHARED)
async def processes_share_the_broker(stage: Stage) -> None:
    """What an adapter that claims SHARED promises: what another process publishes is handled here."""
    bus = stage.bus()
    seen: Seen[int] = Seen()

    @bus.subscribe(ORDERS)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    await stage.start(bus)
    await publish_in_another_process(stage, 1)
    await seen.wait_for(1)


@conformance(needs=Capability.DURABLE, seconds=120)
async def confirmed_outlives_its_process_and_a_restart(stage: Stage) -> None:
    """C1, what an adapter that claims DURABLE promises: what was confirmed is there when its publisher's process has ended and the
    broker was started again."""
    async with stage.bus(service="publisher") as publisher:
        await publisher.publish(ORDERS, Order(n=0))
    await publish_in_another_process(stage, 1)
    seen: Seen[int] = Seen()

    def consuming() -> Bus:
        bus = stage.bus()

        @bus.subscribe(ORDERS)
        async def handle(order: Order) -> None:
            await seen.add(order.n)

        return bus

    worker = await stage.start(consuming())
    await seen.wait_for(2)
    await worker.stop()
    async with stage.bus(service="publisher") as publisher:
        await publisher.publish(ORDERS, Order(n=2))
    await stage.broker.restart()
    await stage.start(consuming())
    await seen.wait_until(lambda items: 2 in items, seconds=30, what="what was confirmed before the restart")


# ---------------------------------------------------------------- what is refused

REFUSED_AT_START = Capability.BROADCAST | Capability.PRIORITIES | Capability.SHARDS | Capability.RETAIN


def ask_for(flag: Capability, bus: Bus) -> None:
    """Registers on a bus what only an adapter with this capability can keep."""
    topic = ORDERS
    if flag is Capability.PRIORITIES:
        topic = Topic("orders", Order, priorities=True)
    elif flag is Capability.SHARDS:
        topic = KEYED
    elif flag is Capability.RETAIN:
        topic = Topic("orders", Order, retain=timedelta(hours=1))

    async def handler_that_asks(order: Order) -> None: ...

    if flag is Capability.BROADCAST:
        bus.subscribe(topic, broadcast=True)(handler_that_asks)
    else:
        bus.subscribe(topic, group="workers")(handler_that_asks)


async def is_refused_at_start(stage: Stage, flag: Capability, adapter: Adapter) -> None:
    """A bus that needs the capability does not start: the error says what, who and what instead, and nothing was declared."""
    bus = stage.bus(adapter=adapter)
    ask_for(flag, bus)
    with pytest.raises(UnsupportedFeature) as caught:
        await stage.start(bus)
    error = caught.value
    assert "handler_that_asks" in error.feature or "'orders'" in error.feature, "it names the place"
    assert error.adapter == adapter.name
    assert error.alternative
    assert error.alternative in str(error)
    if flag is Capability.SHARDS:
        async with stage.bus(adapter=adapter) as pulling:
            with pytest.raises(UnsupportedFeature, match="'orders'"):
                await pulling.consumer(KEYED, group="workers").__aenter__()
    check = stage.bus(settings=stage.settings(topology="check"))
    ask_for(Capability.NONE, check)
    with pytest.raises(TopologyMismatch):
        await stage.start(check)


async def is_refused_at_the_call(publisher: Bus, delay: timedelta) -> None:
    """A delay that the broker cannot keep raises on who asks for it, whichever way it is said, and nothing is sent."""
    with pytest.raises(UnsupportedFeature) as caught:
        await publisher.publish(ORDERS, Order(), delay=delay)
    assert caught.value.alternative
    with pytest.raises(UnsupportedFeature) as caught:
        await publisher.publish(ORDERS, Order(), deliver_at=datetime.now(UTC) + delay + timedelta(seconds=5))
    assert caught.value.alternative


@conformance()
async def unsupported_feature_fails_at_declare(stage: Stage) -> None:
    """No option is ever ignored: what the broker in use cannot do is refused when the bus is entered, naming the place and the
    alternative, and nothing is declared; what is asked of a single message is refused at the call."""
    for flag in REFUSED_AT_START:
        adapter = FaultyAdapter(stage.new_adapter())
        adapter.hidden = flag
        await is_refused_at_start(stage, flag, adapter)
    adapter = FaultyAdapter(stage.new_adapter())
    adapter.hidden = Capability.DELAY
    publisher = await stage.entered(stage.bus(adapter=adapter))
    await is_refused_at_the_call(publisher, timedelta(seconds=1))
    with pytest.raises(UnsupportedFeature) as caught:
        await publisher.publish(ORDERS, Order(), priority="high")
    assert "priorities=True" in caught.value.alternative
    assert adapter.sent == []
    await publisher.publish(ORDERS, Order())
    assert len(adapter.sent) == 1, "the bus is as good as before"


async def only_where_not_claimed(stage: Stage, flag: Capability) -> None:
    """Skips the test where there is nothing to refuse."""
    if flag in (await stage.open_adapter()).capabilities:
        pytest.skip(f"the adapter claims {flag.name}: there is nothing to refuse")


@conformance()
async def broadcast_refused_with_alternative(stage: Stage) -> None:
    """Where BROADCAST is not claimed, `broadcast=True` is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.BROADCAST)
    await is_refused_at_start(stage, Capability.BROADCAST, stage.new_adapter())


@conformance()
async def priorities_refused_with_alternative(stage: Stage) -> None:
    """Where PRIORITIES is not claimed, a topic with priorities is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.PRIORITIES)
    await is_refused_at_start(stage, Capability.PRIORITIES, stage.new_adapter())


@conformance()
async def ordering_refused_with_alternative(stage: Stage) -> None:
    """Where SHARDS is not claimed, ordered handling is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.SHARDS)
    await is_refused_at_start(stage, Capability.SHARDS, stage.new_adapter())


@conformance()
async def retain_refused_with_alternative(stage: Stage) -> None:
    """Where RETAIN is not claimed, a topic that is to keep history is refused at start, with what to do instead."""
    await only_where_not_claimed(stage, Capability.RETAIN)
    await is_refused_at_start(stage, Capability.RETAIN, stage.new_adapter())


@conformance()
async def delay_refused_with_alternative(stage: Stage) -> None:
    """A delay, or one longer than the broker keeps, is refused at the call, with what to do instead."""
    adapter = await stage.open_adapter()
    longest = adapter.limits.delay if Capability.DELAY in adapter.capabilities else 0.0
    if longest is None:
        pytest.skip("the adapter claims DELAY of any length: there is nothing to refuse")
    await is_refused_at_the_call(await stage.publisher(), timedelta(seconds=longest + 1))


@conformance()
async def durability_refused_with_alternative(stage: Stage) -> None:
    """Where DURABLE is not claimed, a stronger durability is refused at start, with what to do instead, and so is a program that
    must not lose what was confirmed."""
    await only_where_not_claimed(stage, Capability.DURABLE)
    for durability in ("fsync", "replicated"):
        with pytest.raises(UnsupportedFeature) as caught:
            await stage.entered(stage.bus(settings=stage.settings(durability=durability)))
        assert caught.value.alternative
    with pytest.raises(ConfigurationError):
        await stage.entered(stage.bus(settings=stage.settings(require_durable=True)))


@conformance()
async def patterns_refused_with_alternative(stage: Stage) -> None:
    """On every broker a pattern is no topic: refused where it is subscribed, with what to do instead, and at the call where it is
    published."""
    bus = stage.bus()
    for pattern in ("orders.*", "#", "orders.#"):
        with pytest.raises(UnsupportedFeature) as caught:

            @bus.subscribe(pattern)
            async def handler_of_many(order: Order) -> None: ...

        assert pattern in caught.value.feature
        assert caught.value.alternative
    publisher = await stage.publisher()
    with pytest.raises(InvalidName):
        await publisher.publish("orders.*", {})


# ---------------------------------------------------------------- in common


async def publish(publisher: Bus, count: int, topic: Topic[Order] = ORDERS) -> None:
    """Orders 0 to `count`, each with a key of its own, confirmed."""
    for n in range(count):
        await publisher.publish(topic, Order(id=f"key{n}", n=n))


async def handled_by_another(stage: Stage, publisher: Bus, until: int, topic: Topic[Order] = ORDERS) -> list[int]:
    """What another process of the group handles: at least so many, and what comes until it sees a message that is sent after them."""
    bus = stage.bus()
    seen: Seen[int] = Seen()

    @bus.subscribe(topic)
    async def handle(order: Order) -> None:
        await seen.add(order.n)

    worker = await stage.start(bus)
    await seen.wait_for(until)
    await publisher.publish(topic, Order(n=-1))
    await seen.wait_until(lambda items: -1 in items, what="the last message")
    await worker.stop()
    return [n for n in seen.items if n != -1]


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
