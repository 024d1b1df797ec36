"""Topics and groups: what declaring makes, adopts and refuses; what a group gets of what came before it."""

from __future__ import annotations

import time

import pytest
from tests.unit.memory.helpers import T, bodies, envelope, numbered, opened, outcome, ready, receiver, sent

from msgbus.contract.adapter import AdapterSettings, Depth, ReceiverSpec, TopicSpec
from msgbus.contract.address import DEAD_GROUP, dead_topic
from msgbus.errors import BrokerUnavailable, ConfigurationError, NotFound, PublishRejected, TopologyMismatch

DEAD = dead_topic(T, "a")


@pytest.mark.parametrize(
    ("there", "wanted", "expected", "actual"),
    [
        (TopicSpec(T, keyed=True, shards=4), TopicSpec(T, keyed=True, shards=8), "8 shards", "4"),
        (TopicSpec(T, keyed=True), TopicSpec(T, keyed=True, shards=4), "4 shards", "8"),
        (TopicSpec(T), TopicSpec(T, priorities=True), "priorities", "no priorities"),
        (TopicSpec(T, priorities=True), TopicSpec(T), "no priorities", "priorities"),
        (TopicSpec(T, retain=60), TopicSpec(T, retain=90), "retain 90 s", "60 s"),
        (TopicSpec(T), TopicSpec(T, kind="dead"), "kind 'dead'", "kind 'work'"),
    ],
)
async def test_what_differs_is_a_mismatch_and_changes_nothing(there: TopicSpec, wanted: TopicSpec, expected: str, actual: str) -> None:
    async with opened(topic=there) as adapter:
        for create in (True, False):
            with pytest.raises(TopologyMismatch) as caught:
                await adapter.declare([wanted], [], create=create)
            assert (caught.value.resource, caught.value.expected, caught.value.actual) == (
                f"topic {T!r}",
                expected,
                actual,
            )
        await adapter.declare([there], [])


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (TopicSpec(T, keyed=True, shards=4), TopicSpec(T)),
        (TopicSpec(T, keyed=True, shards=4), TopicSpec(T, keyed=True)),
        (TopicSpec(T), TopicSpec(T, keyed=True, shards=4)),
        (TopicSpec(T, retain=60), TopicSpec(T)),
        (TopicSpec(T), TopicSpec(T, retain=60)),
    ],
)
async def test_what_says_less_adopts_what_is_there(there: TopicSpec, wanted: TopicSpec) -> None:
    async with opened(topic=there) as adapter:
        await adapter.declare([wanted], [])
        await adapter.declare([there, wanted], [])


async def test_a_topics_shards_can_be_asked_for() -> None:
    """None where nobody asked for any, or there is no such topic: what a plain name adopts."""
    async with opened(topic=TopicSpec(T, keyed=True, shards=4)) as adapter:
        await adapter.declare([TopicSpec(T), TopicSpec("loose"), TopicSpec("keyed", keyed=True)], [])
        assert [await adapter.shards(topic) for topic in (T, "loose", "keyed", "nowhere")] == [4, None, 8, None]


async def test_without_create_nothing_is_made_and_what_is_missing_is_named() -> None:
    async with opened("a") as adapter:
        await sent(adapter, [envelope("bare")])
        for topic in ("none", "bare"):
            with pytest.raises(TopologyMismatch, match=f"topic '{topic}'"):
                await adapter.declare([TopicSpec(topic)], [], create=False)
        with pytest.raises(TopologyMismatch, match="topic 'none'"):
            await adapter.declare([], [ReceiverSpec("none", "a")], create=False)
        with pytest.raises(TopologyMismatch, match=f"group 'b' of topic '{T}'"):
            await adapter.declare([TopicSpec(T)], [ReceiverSpec(T, "a"), ReceiverSpec(T, "b")], create=False)
        with pytest.raises(TopologyMismatch, match="expected 4 shards"):
            await adapter.declare([TopicSpec(T, shards=4)], [], create=False)
        with pytest.raises(TopologyMismatch, match="retain 60"):
            await adapter.declare([TopicSpec(T, retain=60)], [], create=False)
        await adapter.declare([TopicSpec(T), TopicSpec(T, keyed=True)], [ReceiverSpec(T, "a"), ReceiverSpec(T, None)], create=False)
        await adapter.declare([TopicSpec(T, shards=4)], [])  # still open
        assert await adapter.groups(T) == ["a"]


async def test_a_native_option_is_refused() -> None:
    async with opened() as adapter:
        with pytest.raises(ConfigurationError, match="'x-max-length'"):
            await adapter.declare([TopicSpec(T, native={"x-max-length": 3})], [])


async def test_a_receiver_needs_its_topic_and_group() -> None:
    async with opened("a") as adapter:
        for spec in (ReceiverSpec("none", "a"), ReceiverSpec("none", None), ReceiverSpec(T, "b")):
            with pytest.raises(BrokerUnavailable, match="declare"):
                await adapter.open_receiver(spec)


async def test_a_keyed_declaration_spreads_what_the_undetermined_topic_holds_in_order() -> None:
    async with opened("a") as adapter:
        held_by = await receiver(adapter, "a", window=2)
        envelopes = [envelope(key=f"k{number % 7}", body=str(number).encode()) for number in range(30)]
        await sent(adapter, envelopes)
        held = await ready(held_by)
        await adapter.declare([TopicSpec(T, keyed=True, shards=4)], [])
        await held_by.release(held[0])
        held_by.ack(held[1])
        owners = [await receiver(adapter, "a", exclusive=True) for _ in range(4)]
        got = [bodies(await ready(owner)) for owner in owners]
        assert sorted(int(body) for part in got for body in part) == [0, *range(2, 30)]
        assert sum(1 for part in got if part) > 1
        for part in got:
            assert part == sorted(part, key=int)


async def test_an_exclusive_holder_from_before_the_spreading_finishes_first() -> None:
    async with opened("a") as adapter:
        old = await receiver(adapter, "a", exclusive=True, window=2)
        new = await receiver(adapter, "a", exclusive=True)
        await sent(adapter, [envelope(key=f"k{number}") for number in range(40)])
        held = await ready(old)
        assert len(held) == 2
        await adapter.declare([TopicSpec(T, keyed=True)], [])
        assert held[0].tenure.draining
        assert await ready(old) == await ready(new) == []
        old.ack(held[0])
        assert await ready(old) == await ready(new) == []
        old.ack(held[1])
        assert len(await ready(old)) == 2
        assert len(await ready(new)) > 5


async def test_the_first_group_gets_what_came_before_it_and_later_ones_do_not() -> None:
    async with opened() as adapter:
        await sent(adapter, numbered(3))
        await adapter.declare([], [ReceiverSpec(T, "a"), ReceiverSpec(T, "b")])
        assert bodies(await ready(await receiver(adapter, "a"))) == ["0", "1", "2"]
        assert await ready(await receiver(adapter, "b")) == []


async def test_a_topic_that_nobody_declared_keeps_too() -> None:
    async with opened() as adapter:
        await sent(adapter, numbered(3, topic="bare", key="k", priority="high"))
        await adapter.declare([TopicSpec("bare", priorities=True)], [ReceiverSpec("bare", "a")])
        assert await ready(await receiver(adapter, "a", topic="bare")) == []
        assert bodies(await ready(await receiver(adapter, "a", topic="bare", priority="high"))) == ["0", "1", "2"]


async def test_a_first_group_that_starts_at_the_latest_ends_the_keeping() -> None:
    async with opened() as adapter:
        await sent(adapter, numbered(3))
        await adapter.declare([], [ReceiverSpec(T, "a", start="latest"), ReceiverSpec(T, "b")])
        await sent(adapter, [envelope(body=b"new")])
        for group in "ab":
            assert bodies(await ready(await receiver(adapter, group))) == ["new"]


async def test_what_is_kept_for_the_first_group_has_its_time() -> None:
    async with opened(settings=AdapterSettings(first_group_retention=0)) as adapter:
        await sent(adapter, numbered(3))
        await adapter.declare([], [ReceiverSpec(T, "a")])
        assert await ready(await receiver(adapter, "a")) == []


async def test_after_its_groups_were_dropped_a_topic_keeps_nothing() -> None:
    async with opened("a") as adapter:
        assert await adapter.drop_group(T, "a")
        await sent(adapter, numbered(3))
        await adapter.declare([], [ReceiverSpec(T, "a")])
        assert await ready(await receiver(adapter, "a")) == []


async def test_a_retained_topic_gives_its_history_to_a_later_group_that_starts_at_the_earliest() -> None:
    async with opened("a", topic=TopicSpec(T, retain=60)) as adapter:
        first = await receiver(adapter, "a")
        await sent(adapter, numbered(3))
        for one in await ready(first):
            first.ack(one)
        await adapter.declare([], [ReceiverSpec(T, "b"), ReceiverSpec(T, "c", start="latest")])
        assert bodies(await ready(await receiver(adapter, "b"))) == ["0", "1", "2"]
        assert await ready(await receiver(adapter, "c")) == []


async def test_history_has_its_time() -> None:
    async with opened("a", topic=TopicSpec(T, retain=0)) as adapter:
        await sent(adapter, numbered(3))
        await adapter.declare([], [ReceiverSpec(T, "b")])
        assert (await adapter.depth(T, "b")).ready == 0
        assert (await adapter.depth(T, "a")).ready == 3
        assert await adapter.replay(T, "b", 0) == 0


async def test_history_holds_what_was_kept_before_retain_was_said() -> None:
    async with opened() as adapter:
        await sent(adapter, numbered(2))
        await adapter.declare([TopicSpec(T, retain=60)], [ReceiverSpec(T, "a"), ReceiverSpec(T, "b")])
        for group in "ab":
            assert bodies(await ready(await receiver(adapter, group))) == ["0", "1"]


async def test_replay_puts_history_before_the_group_again() -> None:
    async with opened("a", topic=TopicSpec(T, retain=60)) as adapter:
        source = await receiver(adapter, "a", window=2)
        await sent(adapter, numbered(4))
        done, held = await ready(source)
        source.ack(done)
        assert await adapter.replay(T, "a", time.time() + 60) == 0
        assert await adapter.replay(T, "a", time.time() - 60) == 4
        source.ack(held)
        rest: list[str] = []
        while more := await ready(source):
            rest += bodies(more)
            for one in more:
                source.ack(one)
        assert rest == ["0", "1", "2", "3"]
        assert (await adapter.depth(T, "a")) == Depth(0, 0, 0)


async def test_replay_without_history_is_nothing() -> None:
    async with opened("a") as adapter:
        await sent(adapter, numbered(4))
        assert await adapter.replay(T, "a", 0) == 0


async def test_a_dead_destination_has_its_keeper() -> None:
    async with opened(topic=TopicSpec(DEAD, kind="dead")) as adapter:
        assert await adapter.groups(DEAD) == [DEAD_GROUP]
        await sent(adapter, numbered(3, topic=DEAD))
        await adapter.declare([TopicSpec(DEAD, kind="dead")], [], create=False)
        source = await receiver(adapter, DEAD_GROUP, topic=DEAD)
        first, second, _ = await ready(source)
        source.ack(second)
        await source.release(first)
        assert bodies(await ready(source)) == ["0"]


async def test_dead_letters_are_kept_for_their_retention_where_there_is_one() -> None:
    spec = TopicSpec(DEAD, kind="dead")
    async with opened(topic=spec, settings=AdapterSettings(dead_letter_retention=0)) as adapter:
        source = await receiver(adapter, DEAD_GROUP, topic=DEAD)
        await sent(adapter, numbered(3, topic=DEAD))
        assert await ready(source) == []
        assert await adapter.depth(DEAD, DEAD_GROUP) == Depth(0, 0, 0)


async def test_groups_and_dropping_one() -> None:
    async with opened("b", "a") as adapter:
        await receiver(adapter, None)
        assert await adapter.groups(T) == ["a", "b"]
        assert await adapter.groups("none") == []
        await sent(adapter, numbered(3))
        source = await receiver(adapter, "a")
        (held,) = await ready(source, 1)
        assert await adapter.drop_group(T, "a")
        assert held.tenure.lost
        with pytest.raises(BrokerUnavailable, match="dropped"):
            await source.receive(1, 5)
        source.ack(held)
        assert source.stale_acks == 1
        await source.close()
        assert not await adapter.drop_group(T, "a")
        assert not await adapter.drop_group("none", "a")
        assert await adapter.groups(T) == ["b"]
        assert (await adapter.depth(T, "b")).ready == 3


async def test_what_is_asked_of_a_group_that_is_not_there() -> None:
    async with opened("a") as adapter:
        for topic, group in ((T, "b"), ("none", "a")):
            for call in (adapter.depth(topic, group), adapter.purge(topic, group), adapter.replay(topic, group, 0)):
                with pytest.raises(NotFound, match=f"'{group}'.*'{topic}'"):
                    await call
            with pytest.raises(NotFound):
                await anext(adapter.peek(topic, group))
            refused = await outcome(adapter, envelope(topic, group=group))
            assert isinstance(refused, PublishRejected)
            assert f"'{group}'" in str(refused)


async def test_depth_peek_and_purge() -> None:
    async with opened("a", "b") as adapter:
        source = await receiver(adapter, "a", window=2)
        await sent(adapter, [*numbered(5), envelope(delay=60), envelope(group="a", delay=60)])
        await source.release((await ready(source))[0])
        assert await adapter.depth(T, "a") == Depth(ready=4, in_flight=1, delayed=2)
        assert bodies([one async for one in adapter.peek(T, "a")]) == ["0", "2", "3", "4"]
        assert await adapter.purge(T, "a") == 4
        assert await adapter.depth(T, "a") == Depth(ready=0, in_flight=1, delayed=2)
        assert (await adapter.depth(T, "b")).ready == 5
