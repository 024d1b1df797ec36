"""Exclusive receivers: a shard has one owner, moves when that has settled, keeps its order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tests.unit.memory.helpers import T, bodies, envelope, opened, ready, receiver, sent

from msgbus.contract.adapter import Received, TopicSpec
from msgbus.contract.address import shard_of
from msgbus.contract.envelope import Envelope
from msgbus_memory import MemoryAdapter
from msgbus_memory.receiver import MemoryReceiver

SHARDS = 8
KEYED = TopicSpec(T, keyed=True, shards=SHARDS)
KEYS = [next(key for key in map(str, range(1000)) if shard_of(key, SHARDS) == shard) for shard in range(SHARDS)]
"""One key a shard."""


def one_a_shard(tag: str = "") -> list[Envelope]:
    return [envelope(key=key, body=f"{tag}{key}".encode()) for key in KEYS]


def shards(received: Sequence[Received]) -> set[int]:
    return {shard_of(one.envelope.key, SHARDS) for one in received}


async def owners(adapter: MemoryAdapter, count: int, **facts: Any) -> list[MemoryReceiver]:
    return [await receiver(adapter, "a", exclusive=True, **facts) for _ in range(count)]


async def test_shards_are_spread_evenly_over_those_who_join() -> None:
    async with opened("a", topic=KEYED) as adapter:
        members = await owners(adapter, 3)
        await sent(adapter, one_a_shard())
        parts = [shards(await ready(member)) for member in members]
        assert sorted(map(len, parts)) == [2, 3, 3]
        assert set.union(*parts) == set(range(SHARDS))


async def test_more_members_than_shards_leave_some_idle() -> None:
    async with opened("a", topic=TopicSpec(T, keyed=True, shards=2)) as adapter:
        members = await owners(adapter, 3)
        await sent(adapter, one_a_shard())
        assert sorted([bool(await ready(member)) for member in members]) == [False, True, True]


async def test_a_moving_shard_drains_and_moves_in_order_when_the_last_is_settled() -> None:
    async with opened("a", topic=KEYED) as adapter:
        (old,) = await owners(adapter, 1, window=100)
        await sent(adapter, one_a_shard("first ") + one_a_shard("second "))
        held = await ready(old, SHARDS + 4)
        (new,) = await owners(adapter, 1)
        moving = [one for one in held if one.tenure.draining]
        staying = [one for one in held if not one.tenure.draining]
        assert len(shards(moving)) == len(shards(staying)) == SHARDS // 2
        assert await ready(new) == []
        await sent(adapter, one_a_shard("third "))
        rest = await ready(old)
        assert not shards(rest) & shards(moving)
        waiting = asyncio.create_task(new.receive(100, 60))
        await asyncio.sleep(0)
        by_shard = defaultdict(list)
        for one in moving:
            by_shard[shard_of(one.envelope.key, SHARDS)].append(one)
        shard, mine = by_shard.popitem()
        for number, one in enumerate(mine):
            assert not waiting.done()
            if number:
                await old.release(one)
            else:
                old.ack(one)
        moved = await waiting
        assert shards(moved) == {shard}
        words = ["first", "second", "third"][1 if len(mine) > 0 else 0 :]
        assert [body.split()[0] for body in bodies(moved)] == words
        assert moved[0].tenure is not mine[0].tenure
        assert not moved[0].tenure.draining
        for others in by_shard.values():
            for one in others:
                old.ack(one)
        assert len(shards(await ready(new))) == SHARDS // 2 - 1


async def test_few_shards_move_when_one_leaves_and_when_one_comes_back() -> None:
    async with opened("a", topic=KEYED) as adapter:
        members = await owners(adapter, 4)
        before = []
        for member in members:
            await sent(adapter, one_a_shard())
            part = await ready(member)
            before.append(shards(part))
            for one in part:
                member.ack(one)
        await members[0].close()
        await adapter.purge(T, "a")
        await sent(adapter, one_a_shard())
        after = [shards(await ready(member)) for member in members[1:]]
        assert sorted(map(len, after)) == [2, 3, 3]
        assert all(old <= new for old, new in zip(before[1:], after, strict=True))


async def test_close_gives_back_in_order_and_abandon_counts() -> None:
    async with opened("a", topic=KEYED) as adapter:
        for crashes, leave in ((0, "close"), (1, "abandon")):
            (first,) = await owners(adapter, 1, window=5)
            if not crashes:
                await sent(adapter, one_a_shard("1 ") + one_a_shard("2 "))
            held = await ready(first)
            (second,) = await owners(adapter, 1, window=100)
            if leave == "close":
                await first.close()
                assert held[0].tenure.lost
            else:
                adapter.abandon()
                await adapter.open()
                (second,) = await owners(adapter, 1, window=100)
            got = await ready(second)
            assert bodies(got) == [f"1 {key}" for key in KEYS] + [f"2 {key}" for key in KEYS]
            assert [one.crashes for one in got] == [crashes] * 5 + [0] * (2 * SHARDS - 5)
            await second.close()


async def test_a_draining_owner_keeps_its_shards_until_it_is_closed() -> None:
    async with opened("a", topic=KEYED) as adapter:
        old, peer = await owners(adapter, 2)
        await sent(adapter, one_a_shard("1 "))
        held = await ready(old)
        await old.drain()
        assert await old.receive(1, 60) == []
        (late,) = await owners(adapter, 1)
        await sent(adapter, one_a_shard("2 "))
        got = await ready(peer) + await ready(late)
        assert not shards(got) & shards(held)
        for one in held:
            old.ack(one)
        assert await ready(late) == await ready(peer) == []
        assert old.stale_acks == 0
        await old.close()
        got = await ready(peer) + await ready(late)
        assert shards(got) == shards(held)
        assert {body[0] for body in bodies(got)} == {"2"}


async def test_an_heir_that_drains_or_leaves_passes_its_claim_on() -> None:
    async with opened("a", topic=KEYED) as adapter:
        (owner,) = await owners(adapter, 1, window=100)
        await sent(adapter, one_a_shard())
        held = await ready(owner)
        drained, closed = await owners(adapter, 2)
        await drained.drain()
        await closed.close()
        for one in held:
            owner.ack(one)
        await drained.close()
        await sent(adapter, one_a_shard())
        again = await ready(owner)
        assert shards(again) == set(range(SHARDS))
        assert not any(one.tenure.draining for one in again)


async def test_an_owner_that_is_to_have_its_shard_again_can_leave() -> None:
    async with opened("a", topic=KEYED) as adapter:
        (owner,) = await owners(adapter, 1)
        await sent(adapter, one_a_shard())
        await ready(owner)
        (passing,) = await owners(adapter, 1)
        await passing.close()
        await owner.close()
        (last,) = await owners(adapter, 1)
        assert shards(await ready(last)) == set(range(SHARDS))


async def test_messages_without_a_key_have_one_owner() -> None:
    async with opened("a", topic=KEYED) as adapter:
        members = await owners(adapter, 2)
        await sent(adapter, [envelope(body=str(number).encode()) for number in range(4)])
        got = [bodies(await ready(member)) for member in members]
        assert sorted(got) == [[], ["0", "1", "2", "3"]]


async def test_one_receiver_of_all_shards_gets_the_oldest_first() -> None:
    async with opened("a", topic=KEYED) as adapter:
        for exclusive in (True, False):
            source = await receiver(adapter, "a", exclusive=exclusive, window=100)
            if exclusive:
                await sent(adapter, [envelope(key=str(number), body=str(number).encode()) for number in range(60)])
            got = await ready(source)
            assert bodies(got) == [str(number) for number in range(60)]
            await source.close()
