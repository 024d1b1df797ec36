"""What the suite of all brokers does not ask of RabbitMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from tests.brokers import Server
from tests.torture.proxy import proxy_before

from msgbus.contract.adapter import AdapterSettings, Received, Receiver, ReceiverSpec, TopicSpec
from msgbus.contract.envelope import Envelope, new_id
from msgbus.errors import BrokerUnavailable, PublishUnknown
from msgbus.testing.stage import eventually
from msgbus.urls import adapter_from_url
from msgbus_rabbitmq import RabbitAdapter

pytestmark = [pytest.mark.broker("rabbitmq"), pytest.mark.timeout(180)]


@pytest.fixture
async def adapter(running: Server) -> AsyncIterator[RabbitAdapter]:
    """An open one."""
    adapter = adapter_from_url(running.url, AdapterSettings())
    assert isinstance(adapter, RabbitAdapter)
    await adapter.open()
    yield adapter
    await adapter.close()


async def taken(receiver: Receiver, count: int) -> list[Received]:
    """The next `count` messages, un-settled."""
    found: list[Received] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await receiver.receive(count - len(found), 1.0)
    return found


def numbered(topic: str, numbers: range) -> list[Envelope]:
    """Messages of one key, with a number each."""
    return [Envelope(new_id(), topic, b"%d" % number, {}, key="key") for number in numbers]


def numbers(batch: list[Received]) -> list[int]:
    """Those of a batch."""
    return [int(received.envelope.body) for received in batch]


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_first_group_is_given_a_large_backlog(adapter: RabbitAdapter, keyed: bool) -> None:
    """10,000 messages that were published before there was a group all come to the first one, once and in order."""
    topic, count = f"t{new_id()}", 10_000
    await adapter.declare([TopicSpec(topic, keyed=keyed)], [])
    for start in range(0, count, 500):
        assert not any(await adapter.send(numbered(topic, range(start, start + 500)), timeout=30))
    spec = ReceiverSpec(topic, "group", window=500, exclusive=keyed)
    await adapter.declare([], [spec])
    receiver, found = await adapter.open_receiver(spec), list[int]()
    while len(found) < count:
        batch = await taken(receiver, 500)
        found += numbers(batch)
        for received in batch:
            receiver.ack(received)
    assert found == list(range(count))
    assert await receiver.receive(1, 0.5) == []


async def test_who_is_cancelled_sees_it(adapter: RabbitAdapter) -> None:
    """A call that is cancelled ends as cancelled, whatever it was asking the broker, and the next one is answered."""
    topic = f"t{new_id()}"
    await adapter.declare([TopicSpec(topic)], [ReceiverSpec(topic, "group")])
    for tries in range(60):
        asking = asyncio.create_task(adapter.groups(topic))
        await asyncio.wait([asking], timeout=tries / 1000)
        if asking.cancel():
            await asyncio.wait([asking], timeout=10)
            assert asking.cancelled()
    assert await adapter.groups(topic) == ["group"]


@pytest.mark.parametrize("kind", ["group", "keyed", "private"])
async def test_who_is_cancelled_harms_nobody(adapter: RabbitAdapter, kind: str) -> None:
    """Whoever is cut off while it opens or closes a receiver, or asks, leaves no channel behind, and others their connection."""
    topic, busy = f"t{new_id()}", f"t{new_id()}"
    spec = ReceiverSpec(topic, None if kind == "private" else "group", exclusive=kind == "keyed")
    await adapter.declare([TopicSpec(topic, keyed=kind == "keyed", shards=2), TopicSpec(busy)], [ReceiverSpec(topic, "group")])
    await adapter.declare([], [ReceiverSpec(busy, "group")])
    neighbour = await adapter.open_receiver(ReceiverSpec(busy, "group"))

    async def passing() -> None:
        receiver = await adapter.open_receiver(spec)
        await receiver.close()
        await adapter.declare([TopicSpec(busy)], [])

    for tries in range(40):
        task = asyncio.create_task(passing())
        await asyncio.wait([task], timeout=tries * 0.0008)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert await neighbour.receive(1, 0.005) == []
    assert adapter._connected is not None
    receivers = adapter._connected.receivers
    await eventually(lambda: receivers == {neighbour}, 20, "receivers to be closed in their own time")
    await adapter.declare([TopicSpec(busy)], [])
    channels = [len((await link.connection()).channels) for link in adapter._connected.links]
    assert channels[0] == 0
    assert channels[1] <= 2, "the neighbour's, and one for asking"
    assert channels[2] == 1


async def test_what_is_released_is_next_again(adapter: RabbitAdapter) -> None:
    """A keyed topic's message that is released comes again before those behind it, also when they wait at this receiver, and also to the
    receiver that has the shard next."""
    topic = f"t{new_id()}"
    spec = ReceiverSpec(topic, "group", window=10, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])
    await adapter.send(numbered(topic, range(10)), timeout=10)
    receiver = await adapter.open_receiver(spec)
    for received in await taken(receiver, 4):
        await receiver.release(received)
    first, *others = batch = await taken(receiver, 10)
    assert numbers(batch) == list(range(10))
    receiver.ack(first)
    await receiver.drain()
    for received in others:
        await receiver.release(received)
    standby = await adapter.open_receiver(spec)
    await receiver.close()
    assert numbers(await taken(standby, 9)) == list(range(1, 10))


async def test_closes_in_good_order_are_no_deaths(adapter: RabbitAdapter) -> None:
    """What a keyed topic's receiver gives back at its close comes to the next in order and without a death, while more is published."""
    topic = f"t{new_id()}"
    spec = ReceiverSpec(topic, "group", window=5, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])

    await adapter.send(numbered(topic, range(50)), timeout=30)  # a full window, whatever it closes: see decision 0014

    async def publishing() -> None:
        for number in range(50, 400):
            await adapter.send(numbered(topic, range(number, number + 1)), timeout=30)

    sender, expected = asyncio.create_task(publishing()), 0
    while expected < 400:
        receiver = await adapter.open_receiver(spec)
        batch = await taken(receiver, min(5, 400 - expected))
        assert numbers(batch) == list(range(expected, expected + len(batch)))
        assert [received.crashes for received in batch] == [0] * len(batch)
        for received in batch[:3]:
            receiver.ack(received)
        expected += len(batch[:3])
        await receiver.close()
    await sender


@pytest.mark.parametrize("before", [False, True], ids=["new", "had before"])
async def test_a_close_keeps_the_order_of_what_is_published_meanwhile(adapter: RabbitAdapter, before: bool) -> None:
    """Where the window has room the broker goes on giving while a keyed topic's receiver gives back: the next one has it all in order, and
    with one death at most, which is none: see decision 0014."""
    topic = f"t{new_id()}"
    spec = ReceiverSpec(topic, "group", window=100, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])

    async def publish() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3, 43):
                group.create_task(adapter.send(numbered(topic, range(number, number + 1)), timeout=30))
                await asyncio.sleep(0.0002)  # now and then while it closes

    receiver = await adapter.open_receiver(spec)
    for _ in range(40):
        await adapter.send(numbered(topic, range(3)), timeout=30)
        await taken(receiver, 3)
        if before:
            await receiver.close()
            receiver = await adapter.open_receiver(spec)
            await taken(receiver, 3)
        publishing = asyncio.create_task(publish())
        await receiver.close()
        receiver = await adapter.open_receiver(spec)
        await publishing
        batch = await taken(receiver, 43)
        assert numbers(batch) == list(range(43))
        assert max(received.crashes for received in batch) <= 1
        for received in batch:
            receiver.ack(received)


async def test_many_words_before_a_close_are_all_heard(adapter: RabbitAdapter) -> None:
    """However many messages a receiver has acked, or given back, when it closes: what was acked does not come again, and what was given
    back has no death, time and again."""
    topic, window = f"t{new_id()}", 200
    spec = ReceiverSpec(topic, "group", window=window)
    await adapter.declare([TopicSpec(topic)], [spec])
    await adapter.send(numbered(topic, range(2 * window)), timeout=30)
    for _ in range(6):
        receiver = await adapter.open_receiver(spec)
        batch = await taken(receiver, window // 2)
        assert [received.crashes for received in batch] == [0] * len(batch)
        await receiver.drain()
        await asyncio.gather(*map(receiver.release, batch))
        await receiver.close()
    acked = set[int]()
    while len(acked) < 2 * window:
        receiver = await adapter.open_receiver(spec)
        first, *others = batch = await taken(receiver, min(window, 2 * window - len(acked)))
        assert [received.crashes for received in batch] == [0] * len(batch)
        assert acked.isdisjoint(numbers(batch))
        await receiver.drain()
        for received in others or [first]:
            receiver.ack(received)
        acked.update(numbers(others or [first]))
        await receiver.close()


async def test_many_acks_before_a_shards_close_are_all_heard(adapter: RabbitAdapter) -> None:
    """Also where each is a word of its own, as those behind one that is not done are; what is left comes in order."""
    topic, window = f"t{new_id()}", 100
    spec = ReceiverSpec(topic, "group", window=window, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])
    await adapter.send(numbered(topic, range(2 * window)), timeout=30)
    left = list(range(2 * window))
    while left:
        receiver = await adapter.open_receiver(spec)
        batch = await taken(receiver, min(window, len(left)))
        assert numbers(batch) == left[: len(batch)]
        await receiver.drain()
        acked = batch[1::2] if len(batch) > 10 else batch
        for received in acked:
            receiver.ack(received)
        left = [number for number in left if number not in numbers(acked)]
        await receiver.close()


async def test_a_look_is_no_death(adapter: RabbitAdapter) -> None:
    """Who looks into a group that has many messages gives them back as they were."""
    topic, count = f"t{new_id()}", 100
    spec = ReceiverSpec(topic, "group", window=count)
    await adapter.declare([TopicSpec(topic)], [spec])
    await adapter.send(numbered(topic, range(count)), timeout=30)
    for _ in range(3):
        assert len([envelope async for envelope in adapter.peek(topic, "group")]) == count
    receiver = await adapter.open_receiver(spec)
    assert [received.crashes for received in await taken(receiver, count)] == [0] * count


async def test_a_quarantine_of_a_large_window_keeps_the_order(adapter: RabbitAdapter) -> None:
    """In quarantine all of a window but the first message is set aside, and given back in order, with what was published meanwhile: where
    the window has room, and where it is full."""
    topic, steps, published = f"t{new_id()}", 8, 10
    spec = ReceiverSpec(topic, "group", window=100, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])
    await adapter.send(numbered(topic, range(published)), timeout=30)
    receiver = await adapter.open_receiver(replace(spec, quarantine=True))
    for number in range(steps):
        (received,) = await taken(receiver, 1)
        assert numbers([received]) == [number]
        await adapter.send(numbered(topic, range(published, published + 40)), timeout=30)
        published += 40
        receiver.ack(received)
    await receiver.close()
    receiver, found = await adapter.open_receiver(spec), list[int]()
    while len(found) < published - steps:
        batch = await taken(receiver, 1)
        assert max(received.crashes for received in batch) <= 1
        found += numbers(batch)
        for received in batch:
            receiver.ack(received)
    assert found == list(range(steps, published))


async def test_a_death_in_the_midst_of_a_close_leaves_nothing_behind(adapter: RabbitAdapter, running: Server) -> None:
    """Whenever in a close the link breaks: the shard goes to the next receiver, and to those after it, with all that is in it, in order."""
    topic = f"t{new_id()}"
    spec = ReceiverSpec(topic, "group", window=10, exclusive=True)
    await adapter.declare([TopicSpec(topic, keyed=True)], [spec])
    await adapter.send(numbered(topic, range(100)), timeout=30)
    for tries in range(30):
        other = adapter_from_url(running.url, AdapterSettings())
        assert isinstance(other, RabbitAdapter)
        await other.open()
        dying = await other.open_receiver(spec)
        first, *_ = await taken(dying, 5)
        dying.ack(first)
        closing = asyncio.create_task(dying.close())
        await asyncio.wait([closing], timeout=tries / 5000)
        other.abandon()
        await closing
        await other.close()
        heirs = [await adapter.open_receiver(spec)]
        assert numbers(await taken(heirs[0], 2)) in ([tries, tries + 1], [tries + 1, tries + 2])
        heirs.append(await adapter.open_receiver(spec))
        await heirs[0].close()
        (again,) = await taken(heirs[1], 1)
        while int(again.envelope.body) <= tries:  # its ack did not arrive
            heirs[1].ack(again)
            (again,) = await taken(heirs[1], 1)
        await heirs[1].close()


async def test_a_broker_short_of_memory_is_waited_for_and_read_from(adapter: RabbitAdapter, running: Server) -> None:
    """While the memory alarm is on, a publish is unknown in time and what is there is handed out and acked: publishing and consuming
    have connections of their own. Who asks is answered, also after a new group that could not be declared. When it is over, publishing
    goes on by itself, and what was unknown is stored once or not at all."""
    topic, count = f"t{new_id()}", 40
    spec = ReceiverSpec(topic, "group", window=count)
    await adapter.declare([TopicSpec(topic)], [spec])
    assert not any(await adapter.send(numbered(topic, range(count)), timeout=30))
    receiver = await adapter.open_receiver(spec)
    try:
        told(running, "rabbitmqctl set_vm_memory_high_watermark absolute 1MB")
        async with asyncio.timeout(30):
            while not isinstance((await adapter.send(numbered(topic, range(100, 101)), timeout=1.0))[0], PublishUnknown):
                pass
        began = asyncio.get_running_loop().time()
        outcomes = await adapter.send(numbered(topic, range(200, 203)), timeout=1.0)
        assert asyncio.get_running_loop().time() - began < 3
        assert [type(outcome) for outcome in outcomes] == [PublishUnknown] * 3
        (warning,) = await adapter.warnings([])
        assert "short of memory or disk" in warning
        with pytest.raises(BrokerUnavailable):  # it has a name to store
            await adapter.declare([], [ReceiverSpec(topic, "new")])
        async with asyncio.timeout(10):
            await adapter.ping()
            assert await adapter.groups(topic) == ["group"]
        old = await taken(receiver, count)
        for received in old:
            receiver.ack(received)
        assert numbers(old) == list(range(count))
    finally:
        told(running, "rabbitmqctl set_vm_memory_high_watermark 0.6")
    async with asyncio.timeout(60):
        while (await adapter.send(numbered(topic, range(300, 301)), timeout=5.0))[0] is not None:
            pass
    assert await adapter.warnings([]) == ()
    found = list[int]()
    while 300 not in found:
        batch = await taken(receiver, 1)
        found += numbers(batch)
        for received in batch:
            receiver.ack(received)
    await adapter.close()
    assert all(found.count(number) <= 1 for number in range(200, 203))


def told(running: Server, command: str) -> None:
    """A word to the broker's own tool."""
    code, said = running.shell(command)
    assert code == 0, said


async def test_a_group_is_declared_however_far_the_broker(running: Server) -> None:
    """Its queues together take more round trips than fit into a call's deadline, each of them does not."""
    topic = TopicSpec(f"far{new_id()}", keyed=True, shards=8)
    async with proxy_before(running.port) as proxy:
        adapter = adapter_from_url(running.url.replace(str(running.port), str(proxy.port)), AdapterSettings())
        await adapter.open()
        try:
            await adapter.declare([topic], [])
            proxy.delay = 0.35
            await adapter.declare([topic], [ReceiverSpec(topic.name, "g", exclusive=True)])
        finally:
            proxy.delay = 0.0
            await adapter.close()
