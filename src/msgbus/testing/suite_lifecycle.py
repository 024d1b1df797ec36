"""Conformance: lifecycle. C10 and C11 of the contract: stopping, starting again, and what outlives a process."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest

from msgbus.bus import Bus
from msgbus.context import Context
from msgbus.contract.adapter import (
    Capability,
    Received,
    Tenure,
)
from msgbus.errors import BrokerUnavailable
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import Order, Seen, Stage, conformance, eventually, patient, take
from msgbus.topic import Topic

ORDERS = Topic("orders", Order)
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
