"""What happens where a topic is full, and forwarding."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.unit.memory.helpers import T, bodies, envelope, numbered, opened, outcome, ready, receiver, sent

from msgbus.contract.adapter import Depth, ReceiverSpec, TopicSpec
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.errors import BrokerUnavailable, PublishRejected

DEAD = dead_topic(T, "a")


async def test_a_full_topic_is_that_of_its_slowest_group() -> None:
    async with opened("a", "b", limit=3) as adapter:
        source = await receiver(adapter, "a")
        await sent(adapter, [*numbered(2), envelope(delay=60)])
        for one in await ready(source):
            source.ack(one)
        refused = await outcome(adapter, envelope())
        assert isinstance(refused, PublishRejected)
        assert not refused.retryable
        assert f"{T!r}" in str(refused)
        assert "3" in str(refused)
        assert await adapter.purge(T, "b") == 2
        assert await outcome(adapter, envelope()) is None


async def test_what_nobody_claimed_is_limited_too() -> None:
    async with opened(limit=2) as adapter:
        outcomes = await adapter.send(numbered(3), timeout=0)
        assert [type(one) for one in outcomes] == [type(None), type(None), PublishRejected]


async def test_only_what_needs_room_waits_and_is_refused_in_time() -> None:
    async with opened("a", limit=1) as adapter:
        started = time.monotonic()
        outcomes = await adapter.send([*numbered(3), envelope("other"), envelope(group="a")], timeout=0.1)
        assert 0.09 <= time.monotonic() - started < 5
        assert [one is None for one in outcomes] == [True, False, False, True, True]
        assert (await adapter.depth(T, "a")).ready == 2


async def test_senders_get_room_first_come_first_served_and_in_order() -> None:
    async with opened("a", limit=2) as adapter:
        source = await receiver(adapter, "a")
        sends = []
        for start in (0, 3, 6):
            batch = [envelope(body=str(number).encode()) for number in range(start, start + 3)]
            sends.append(asyncio.create_task(adapter.send(batch, timeout=60)))
            await asyncio.sleep(0)
        got: list[str] = []
        while len(got) < 9:
            for one in await source.receive(10, 10):
                got += bodies([one])
                source.ack(one)
        assert got == [str(number) for number in range(9)]
        assert await asyncio.gather(*sends) == [[None] * 3] * 3


async def test_a_cancelled_sender_leaves_the_line_and_what_it_appended() -> None:
    async with opened("a", limit=1) as adapter:
        first = asyncio.create_task(adapter.send(numbered(2), timeout=60))
        second = asyncio.create_task(adapter.send([envelope(body=b"second")], timeout=60))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
        source = await receiver(adapter, "a")
        for one in await ready(source):
            source.ack(one)
        assert await second == [None]
        assert bodies(await ready(source)) == ["second"]


@pytest.mark.parametrize("how", ["drop", "private", "close"])
async def test_room_comes_also_when_what_filled_it_goes(how: str) -> None:
    async with opened("a", limit=1) as adapter:
        private = await receiver(adapter, None)
        await sent(adapter, numbered(1))
        source = await receiver(adapter, "a")
        waiting = asyncio.create_task(adapter.send([envelope()], timeout=60))
        await asyncio.sleep(0)
        if how == "close":
            await adapter.close()
            assert isinstance((await waiting)[0], BrokerUnavailable)
            return
        if how == "drop":
            await private.close()
            await adapter.drop_group(T, "a")
        else:
            for one in await ready(source):
                source.ack(one)
            await private.close()
        assert await waiting == [None]


async def test_forward_stores_and_settles_in_one_step() -> None:
    async with opened("a", "b") as adapter:
        await adapter.declare([TopicSpec(DEAD, kind="dead")], [])
        source = await receiver(adapter, "a")
        await sent(adapter, numbered(2))
        first, second = await ready(source)
        assert await source.forward(first, envelope(DEAD), timeout=5) is None
        assert await source.forward(second, envelope(group="a", delay=60), timeout=5) is None
        assert await adapter.depth(T, "a") == Depth(0, 0, 1)
        assert await adapter.depth(DEAD, DEAD_GROUP) == Depth(1, 0, 0)
        assert isinstance(await source.forward(first, envelope(DEAD), timeout=5), PublishRejected)
        assert await adapter.depth(DEAD, DEAD_GROUP) == Depth(1, 0, 0)
        source.ack(first)
        assert source.stale_acks == 0


async def test_a_forward_that_fails_settles_nothing() -> None:
    async with opened("a", limit=1) as adapter:
        await adapter.declare([TopicSpec(DEAD, kind="dead")], [])
        await sent(adapter, [envelope(), envelope(DEAD)])
        source = await receiver(adapter, "a")
        (one,) = await ready(source)
        for refused in (
            await source.forward(one, envelope(DEAD), timeout=0.02),
            await source.forward(one, envelope(DEAD), timeout=0),
            await source.forward(one, envelope(group="none"), timeout=5),
        ):
            assert isinstance(refused, PublishRejected)
        assert await adapter.depth(T, "a") == Depth(0, 1, 0)
        waiting = asyncio.create_task(source.forward(one, envelope(DEAD), timeout=60))
        await asyncio.sleep(0)
        await adapter.purge(DEAD, DEAD_GROUP)
        assert await waiting is None
        assert await adapter.depth(T, "a") == Depth(0, 0, 0)


async def test_a_forward_of_what_went_back_stores_nothing() -> None:
    async with opened("a", limit=1) as adapter:
        await adapter.declare([TopicSpec(DEAD, kind="dead")], [])
        await sent(adapter, [envelope(), envelope(DEAD)])
        source = await receiver(adapter, "a")
        (one,) = await ready(source)
        waiting = asyncio.create_task(source.forward(one, envelope(DEAD), timeout=60))
        await asyncio.sleep(0)
        await source.close()
        await adapter.purge(DEAD, DEAD_GROUP)
        assert isinstance(await waiting, BrokerUnavailable)
        assert isinstance(await source.forward(one, envelope(DEAD), timeout=5), BrokerUnavailable)
        assert await adapter.depth(DEAD, DEAD_GROUP) == Depth(0, 0, 0)
        assert await adapter.depth(T, "a") == Depth(1, 0, 0)


async def test_history_counts_towards_the_limit() -> None:
    async with opened("a", topic=TopicSpec(T, retain=60), limit=2) as adapter:
        source = await receiver(adapter, "a")
        await sent(adapter, numbered(2))
        for one in await ready(source):
            source.ack(one)
        assert isinstance(await outcome(adapter, envelope()), PublishRejected)
        await adapter.declare([], [ReceiverSpec(T, "b")])
        assert (await adapter.depth(T, "b")).ready == 2
