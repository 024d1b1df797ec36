"""Buses on several event loops in several threads that share one broker."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor

from tests.unit.memory.helpers import T, bodies, envelope, ready, receiver, sent

from msgbus.contract.adapter import Depth, Received, ReceiverSpec, TopicSpec
from msgbus_memory import MemoryAdapter
from msgbus_memory.receiver import MemoryReceiver

COUNT = 2000
_names = (f"test-threads-{number}" for number in itertools.count())


async def opened_named(name: str, limit: int = 100) -> MemoryAdapter:
    adapter = MemoryAdapter(name, limit=limit)
    await adapter.open()
    await adapter.declare([TopicSpec(T, keyed=True, shards=4)], [ReceiverSpec(T, "a"), ReceiverSpec(T, "b")])
    return adapter


def test_two_threads_send_and_receive_through_a_narrow_topic() -> None:
    """Each waits for the other all the time: the receivers for messages, the senders for room."""
    name = next(_names)

    async def produce() -> None:
        adapter = await opened_named(name)
        for start in range(0, COUNT, 50):
            batch = [envelope(key=f"k{n % 9}", body=str(n).encode()) for n in range(start, start + 50)]
            assert await adapter.send(batch, timeout=30) == [None] * 50
        await adapter.close()

    async def drink(source: MemoryReceiver, into: list[Received]) -> None:
        while len(into) < COUNT:
            for one in await source.receive(30, 30):
                into.append(one)
                source.ack(one)

    async def consume() -> dict[str, list[Received]]:
        adapter = await opened_named(name)
        got: dict[str, list[Received]] = {"a": [], "b": []}
        await asyncio.gather(*[drink(await receiver(adapter, group, exclusive=group == "a"), into) for group, into in got.items()])
        for group in got:
            assert await adapter.depth(T, group) == Depth(0, 0, 0)
        await adapter.close()
        return got

    with ThreadPoolExecutor(2) as pool:
        consumer, producer = pool.submit(asyncio.run, consume()), pool.submit(asyncio.run, produce())
        producer.result(50)
        got = consumer.result(50)
    for received in got.values():
        assert sorted(map(int, bodies(received))) == list(range(COUNT))
        assert {one.crashes for one in received} == {0}
    assert bodies(got["a"]) == [str(number) for number in range(COUNT)]


def test_a_receiver_whose_loop_was_closed_has_crashed() -> None:
    name = next(_names)

    async def dies(exclusive: bool) -> None:
        adapter = await opened_named(name)
        assert len(await ready(await receiver(adapter, "a", exclusive=exclusive), 2)) == 2

    async def survives() -> None:
        adapter = await opened_named(name)
        await sent(adapter, [envelope(key="k", body=str(number).encode()) for number in range(3)])
        heir = await receiver(adapter, "a", exclusive=True, window=10)
        for deaths in (1, 2):
            await heir.close()
            await asyncio.to_thread(asyncio.run, dies(exclusive=deaths == 1))
            heir = await receiver(adapter, "a", exclusive=True, window=10)
            got = await ready(heir)
            assert bodies(got) == ["0", "1", "2"]
            assert [one.crashes for one in got] == [deaths, deaths, 0]
        await adapter.close()

    asyncio.run(survives())


def test_a_loop_closed_under_waiting_tasks_disturbs_nobody() -> None:
    name = next(_names)

    async def survives() -> None:
        adapter = await opened_named(name, limit=1)
        await sent(adapter, [envelope()])

        def dies() -> None:
            loop = asyncio.new_event_loop()
            other = MemoryAdapter(name, limit=1)

            async def wait() -> list[asyncio.Task[object]]:
                await other.open()
                tasks: list[asyncio.Task[object]] = [
                    asyncio.create_task((await receiver(other, None)).receive(1, 60)),
                    asyncio.create_task(other.send([envelope()], timeout=60)),
                ]
                await asyncio.sleep(0)
                return tasks

            tasks = loop.run_until_complete(wait())
            loop.close()
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task.get_coro().close()

        await asyncio.to_thread(dies)
        source = await receiver(adapter, "a")
        other = await receiver(adapter, "b")
        for one in (source, other):
            for message in await ready(one):
                one.ack(message)
        assert await adapter.send([envelope(body=b"next")], timeout=10) == [None]
        assert bodies(await ready(source)) == ["next"]
        await adapter.close()

    asyncio.run(survives())
