"""Sending, receiving and settling."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest
from tests.unit.memory.helpers import T, bodies, envelope, numbered, opened, outcome, ready, receiver, sent

from msgbus.contract.adapter import Received, ReceiverSpec, TopicSpec
from msgbus.contract.envelope import PRIORITIES
from msgbus.errors import BrokerUnavailable, MessageTooLarge
from msgbus_memory import MemoryAdapter


async def test_groups_each_get_all_and_receivers_of_one_share() -> None:
    async with opened("a", "b") as adapter:
        one, two = await receiver(adapter, "a", window=3), await receiver(adapter, "a")
        other = await receiver(adapter, "b")
        await sent(adapter, numbered(5))
        assert bodies(await ready(one)) == ["0", "1", "2"]
        assert bodies(await ready(two)) == ["3", "4"]
        assert bodies(await ready(other, 2)) == ["0", "1"]
        assert bodies(await ready(other)) == ["2", "3", "4"]


async def test_an_envelope_arrives_as_it_was_and_is_one_object() -> None:
    async with opened("a", "b") as adapter:
        sent_one = envelope(body=b"\xff\x00", headers={"x": "ü"}, key="k", priority="low", expires_at=5.0)
        await sent(adapter, [sent_one])
        for group in "ab":
            (got,) = await ready(await receiver(adapter, group))
            assert got.envelope is sent_one


async def test_a_body_over_the_limit_fails_alone() -> None:
    adapter = MemoryAdapter(max_body=3)
    await adapter.open()
    outcomes = await adapter.send([envelope(body=b"123"), envelope(body=b"1234"), envelope(body=b"")], timeout=1)
    assert [type(one) for one in outcomes] == [type(None), MessageTooLarge, type(None)]
    assert "4 bytes" in str(outcomes[1])
    await adapter.close()


async def test_never_more_than_the_window_un_settled() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a", window=3)
        await sent(adapter, numbered(10))
        held = await ready(source)
        assert len(held) == 3
        assert await ready(source) == []
        waiting = asyncio.create_task(source.receive(10, 5))
        await asyncio.sleep(0)
        source.ack(held[1])
        assert bodies(await waiting) == ["3"]
        await source.release(held[0])
        assert bodies(await ready(source)) == ["0"]


async def test_quarantine_is_one_at_a_time() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a", window=3, quarantine=True)
        await sent(adapter, numbered(2))
        (held,) = await ready(source)
        assert await ready(source) == []
        source.ack(held)
        assert bodies(await ready(source)) == ["1"]


async def test_receive_returns_after_its_timeout() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a")
        started = time.monotonic()
        assert await source.receive(5, 0.05) == []
        assert time.monotonic() - started >= 0.05
        await sent(adapter, numbered(1))
        assert await source.receive(0, 5) == []


async def test_receive_with_messages_ready_and_send_with_room_do_not_suspend() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a")
        with pytest.raises(StopIteration) as stopped:
            adapter.send(numbered(2), timeout=5).send(None)
        assert stopped.value.value == [None, None]
        with pytest.raises(StopIteration) as stopped:
            source.receive(5, 5).send(None)
        received: list[Received] = stopped.value.value
        assert bodies(received) == ["0", "1"]


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with opened("a") as adapter:
        one, two = await receiver(adapter, "a"), await receiver(adapter, "a")
        cancelled = asyncio.create_task(one.receive(5, 5))
        waiting = asyncio.create_task(two.receive(5, 5))
        await asyncio.sleep(0)
        await sent(adapter, numbered(1))  # wakes both
        cancelled.cancel()
        assert bodies(await waiting) == ["0"]
        with pytest.raises(asyncio.CancelledError):
            await cancelled


async def test_acks_are_idempotent_in_any_order_and_stale_ones_counted() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a")
        await sent(adapter, numbered(3))
        first, second, third = await ready(source)
        source.ack(third)
        source.ack(first)
        source.ack(first)
        await source.release(first)
        assert source.stale_acks == 0
        await source.release(second)
        source.ack(second)
        assert source.stale_acks == 1
        (again,) = await ready(source)
        assert again.envelope is second.envelope
        source.ack(second)
        assert source.stale_acks == 2
        await source.close()
        source.ack(again)
        assert source.stale_acks == 3
        assert (await adapter.depth(T, "a")).ready == 1


async def test_what_goes_back_keeps_its_place_and_is_not_counted() -> None:
    async with opened("a") as adapter:
        source, peer = await receiver(adapter, "a", window=4), await receiver(adapter, "a")
        await sent(adapter, numbered(6))
        held = await ready(source)
        for index in (2, 0):
            await source.release(held[index])
            await source.release(held[index])
        got = await ready(peer, 3)
        assert bodies(got) == ["0", "2", "4"]
        await source.close()
        await source.close()
        await peer.close()
        last = await ready(await receiver(adapter, "a"))
        assert bodies(last) == ["0", "1", "2", "3", "4", "5"]
        assert {one.crashes for one in last} == {0}


async def test_a_release_wakes_a_peer() -> None:
    async with opened("a") as adapter:
        source, peer = await receiver(adapter, "a"), await receiver(adapter, "a")
        await sent(adapter, numbered(1))
        (held,) = await ready(source)
        waiting = asyncio.create_task(peer.receive(1, 5))
        await asyncio.sleep(0)
        await source.release(held)
        assert bodies(await waiting) == ["0"]


async def test_drain_ends_the_intake_and_leaves_the_settling() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a", window=1)
        await sent(adapter, numbered(2))
        (held,) = await ready(source)
        waiting = asyncio.create_task(source.receive(1, 60))
        await asyncio.sleep(0)
        await source.drain()
        await source.drain()
        assert await waiting == []
        source.ack(held)
        assert await source.receive(1, 60) == []
        assert source.stale_acks == 0
        depth = await adapter.depth(T, "a")
        assert (depth.ready, depth.in_flight) == (1, 0)


async def test_a_closed_receiver_is_unavailable_also_to_who_waits() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a")
        waiting = asyncio.create_task(source.receive(1, 60))
        await asyncio.sleep(0)
        await source.close()
        for call in (waiting, source.receive(1, 60)):
            with pytest.raises(BrokerUnavailable):
                await call
        await source.drain()


async def test_abandon_is_a_crash() -> None:
    async with opened("a") as adapter:
        source = await receiver(adapter, "a", window=2)
        await sent(adapter, numbered(3))
        held = await ready(source)
        for deaths in (1, 2):
            adapter.abandon()
            assert held[0].tenure.lost
            with pytest.raises(BrokerUnavailable):
                await source.receive(1, 5)
            with pytest.raises(BrokerUnavailable):
                await adapter.ping()
            assert isinstance(await outcome(adapter, envelope()), BrokerUnavailable)
            source.ack(held[0])
            await source.release(held[1])
            await source.close()
            assert source.stale_acks == 1
            await adapter.open()
            source = await receiver(adapter, "a", window=2)
            held = await ready(source)
            assert [(one.envelope.body, one.crashes) for one in held] == [(b"0", deaths), (b"1", deaths)]
        await source.release(held[0])
        assert [one.crashes for one in await ready(source)] == [2]  # a release forgets no crash, and adds none


async def test_priorities_keep_levels_apart_and_a_topic_without_has_one() -> None:
    async with opened("a", topic=TopicSpec(T, priorities=True)) as adapter:
        await adapter.declare([TopicSpec("plain")], [])
        for topic in (T, "plain"):
            await sent(adapter, [envelope(topic, priority=level, body=level.encode()) for level in PRIORITIES])
        for level in PRIORITIES:
            assert bodies(await ready(await receiver(adapter, "a", priority=level))) == [level]
        private = await receiver(adapter, None, topic="plain")
        await sent(adapter, [envelope("plain", priority=level, body=level.encode()) for level in PRIORITIES])
        assert bodies(await ready(private)) == list(PRIORITIES)


async def test_a_private_receiver_gets_all_from_now_on_and_leaves_nothing() -> None:
    async with opened(topic=TopicSpec(T), limit=3) as adapter:
        await sent(adapter, [envelope(body=b"before")])
        one, two = await receiver(adapter, None), await receiver(adapter, None)
        await sent(adapter, numbered(2))
        assert bodies(await ready(one, 1)) == ["0"]
        assert bodies(await ready(two)) == ["0", "1"]
        await one.close()
        await two.close()
        assert await adapter.groups(T) == []
        await adapter.declare([TopicSpec(T)], [])
        first = await receiver(adapter, None)
        assert await ready(first) == []


async def test_a_message_to_a_group_goes_there_alone() -> None:
    async with opened("a", "b") as adapter:
        await sent(adapter, [envelope(group="a", body=b"again")])
        assert bodies(await ready(await receiver(adapter, "a"))) == ["again"]
        assert await ready(await receiver(adapter, "b")) == []


async def test_a_delay_is_kept_for_each_and_is_not_before() -> None:
    async with opened("a", "b") as adapter:
        sources = [await receiver(adapter, group) for group in "ab"]
        started = time.monotonic()
        waiting = [asyncio.create_task(source.receive(1, 10)) for source in sources]
        await asyncio.sleep(0)
        later, sooner = envelope(delay=0.2, body=b"later"), envelope(delay=0.05, body=b"sooner")
        await sent(adapter, [later, sooner])
        assert (await adapter.depth(T, "b")).delayed == 2
        for task in waiting:
            assert [one.envelope for one in await task] == [sooner]
        assert 0.05 <= time.monotonic() - started < 5  # well before the receivers' own timeout: the delay woke them
        for source in sources:
            assert [one.envelope for one in await source.receive(1, 10)] == [later]
        assert time.monotonic() - started >= 0.2


async def test_a_delay_to_a_group_is_that_groups() -> None:
    async with opened("a", "b") as adapter:
        await sent(adapter, [envelope(group="a", delay=0.03)])
        assert (await adapter.depth(T, "a")).delayed == 1
        assert (await adapter.depth(T, "b")).delayed == 0
        assert len(await (await receiver(adapter, "a")).receive(1, 10)) == 1
        assert await ready(await receiver(adapter, "b")) == []


async def test_a_delayed_message_is_kept_for_the_first_group() -> None:
    async with opened() as adapter:
        await sent(adapter, [envelope(delay=0.03)])
        until = time.monotonic() + 0.03
        await asyncio.sleep(0.03)  # until it is due
        assert time.monotonic() >= until
        await adapter.declare([TopicSpec(T)], [])
        await adapter.declare([], [ReceiverSpec(T, "a")])
        assert len(await ready(await receiver(adapter, "a"))) == 1


async def test_what_all_groups_have_settled_is_forgotten() -> None:
    async with opened("a", "b") as adapter:
        headers = WeakHeaders(x="y")
        gone = weakref.ref(headers)
        await sent(adapter, [envelope(headers=headers)])
        del headers
        for group in "ab":
            gc.collect()
            assert gone() is not None
            source = await receiver(adapter, group)
            for one in await ready(source):
                source.ack(one)
            del one
        gc.collect()
        assert gone() is None


class WeakHeaders(dict[str, str]):
    """Headers that can be watched."""
