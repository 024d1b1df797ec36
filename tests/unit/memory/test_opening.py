"""URL, options, opening and closing."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.memory.helpers import T, bodies, envelope, numbered, opened, outcome, ready, receiver, sent

from msgbus.contract.adapter import (
    AdapterSettings,
    Capability,
    Forwarding,
    HasDepth,
    HasGroups,
    Peekable,
    Purgeable,
    ReceiverSpec,
    Replayable,
    TopicSpec,
)
from msgbus.errors import BrokerUnavailable, ConfigurationError, UnsupportedFeature
from msgbus_memory import MemoryAdapter


def from_url(url: str, settings: AdapterSettings | None = None, **options: str) -> MemoryAdapter:
    return MemoryAdapter.from_url(url, options, settings or AdapterSettings())


@pytest.mark.parametrize("url", ["memory://", "memory:///", "memory://shop", "memory://Shop_1.a-b"])
def test_good_urls(url: str) -> None:
    assert url.rstrip("/").rstrip(":") in repr(from_url(url))


@pytest.mark.parametrize(
    "url",
    [
        "memory://a:1",
        "memory://user:secret@a",
        "memory://a/b",
        "memory://a b",
        "memory://ä",
        "memory://a#b",
        "memory:a",
        "amqp://a",
    ],
)
def test_a_url_that_means_nothing_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError, match="memory://NAME") as caught:
        from_url(url)
    assert "secret" not in str(caught.value)


def test_an_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'limt'.*limit, max_body"):
        from_url("memory://", limt="3")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("limit", "0"),
        ("limit", "many"),
        ("max_body", "-1"),
        ("shards", "1.5"),
        ("durability", "some"),
        ("require_durable", "perhaps"),
        ("first_group_retention", "week"),
        ("dead_letter_retention", "inf"),
        ("dead_letter_retention", "nan"),
    ],
)
def test_a_bad_value_is_refused_naming_option_and_value(option: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option}.*{text}"):
        MemoryAdapter.from_url("memory://", {option: text}, AdapterSettings())


async def test_options_win_over_settings() -> None:
    said = AdapterSettings(durability="fsync", shards=3)
    adapter = from_url("memory://", said, durability="broker", max_body="10", shards="2")
    await adapter.open()
    assert adapter.limits.body == 10
    await adapter.declare([TopicSpec(T, keyed=True)], [])
    await adapter.declare([TopicSpec(T, shards=2)], [])
    await adapter.close()


async def test_what_memory_cannot_promise_is_refused_at_open_with_the_alternative() -> None:
    with pytest.raises(ConfigurationError, match=r"require_durable.*amqp://"):
        await from_url("memory://", AdapterSettings(require_durable=True)).open()
    with pytest.raises(UnsupportedFeature, match="replicated") as caught:
        await from_url("memory://", durability="replicated").open()
    assert "redis://" in caught.value.alternative


async def test_capabilities_and_protocols() -> None:
    async with opened("a") as adapter:
        assert adapter.capabilities | Capability.DURABLE | Capability.SHARED == ~Capability.NONE
        assert Capability.DURABLE not in adapter.capabilities
        assert Capability.SHARED not in adapter.capabilities
        for protocol in (HasDepth, HasGroups, Peekable, Purgeable, Replayable):
            assert isinstance(adapter, protocol)
        assert isinstance(await receiver(adapter, "a"), Forwarding)
        assert adapter.limits.delay is None
        assert adapter.limits.unsettled is None


async def test_everything_needs_an_open_adapter() -> None:
    adapter = MemoryAdapter()
    for _ in range(2):
        assert isinstance(await outcome(adapter, envelope()), BrokerUnavailable)
        for call in (
            adapter.ping(), adapter.declare([], []), adapter.open_receiver(ReceiverSpec(T, "a")), adapter.depth(T, "a"),
            adapter.purge(T, "a"), adapter.replay(T, "a", 0), adapter.groups(T), adapter.drop_group(T, "a"),
            anext(adapter.peek(T, "a")),
        ):  # fmt: skip
            with pytest.raises(BrokerUnavailable):
                await call
        await adapter.open()
        await adapter.ping()
        await adapter.close()
        await adapter.close()


async def test_a_private_broker_outlives_its_sessions_and_is_nobody_elses() -> None:
    adapter, other = from_url("memory://"), from_url("memory://")
    await adapter.open()
    await other.open()
    await sent(adapter, numbered(2))
    await adapter.close()
    await adapter.open()
    for one in (adapter, other):
        await one.declare([TopicSpec(T)], [ReceiverSpec(T, "a")])
    assert bodies(await ready(await receiver(adapter, "a"))) == ["0", "1"]
    assert await ready(await receiver(other, "a")) == []
    await adapter.close()
    await other.close()


async def test_a_named_broker_is_shared() -> None:
    one, other = from_url("memory://test-shared"), from_url("memory://test-shared")
    await one.open()
    await other.open()
    await one.declare([TopicSpec(T)], [ReceiverSpec(T, "a")])
    taker = await receiver(other, "a")
    waiting = asyncio.create_task(taker.receive(1, 5))
    await asyncio.sleep(0)
    await sent(one, numbered(1))
    assert bodies(await waiting) == ["0"]
    await other.close()
    assert (await one.depth(T, "a")).ready == 1
    await one.close()


def test_reopened_on_another_loop_after_the_first_was_closed_under_it() -> None:
    adapter = MemoryAdapter()

    async def first() -> None:
        await adapter.open()
        await adapter.open()
        await adapter.declare([TopicSpec(T)], [ReceiverSpec(T, "a")])
        await sent(adapter, numbered(2))
        assert len(await ready(await receiver(adapter, "a"), 1)) == 1

    async def second() -> None:
        await adapter.open()
        again = await ready(await receiver(adapter, "a"))
        assert [(one.envelope.body, one.crashes) for one in again] == [(b"0", 1), (b"1", 0)]
        await adapter.close()

    asyncio.run(first())
    asyncio.run(second())


async def test_explain_and_repr() -> None:
    adapter = from_url("memory://test-explain", limit="7")
    facts = await adapter.explain()
    assert "test-explain" in facts["broker"]
    assert "as long as this process" in facts["durability"]
    assert "7 messages" in facts["limit"]
    assert "private" in (await MemoryAdapter().explain())["broker"]
    assert repr(adapter) == "<MemoryAdapter memory://test-explain closed>"
    async with opened("a") as open_one:
        assert repr(open_one) == "<MemoryAdapter memory:// open>"
        one = await receiver(open_one, "a")
        assert repr(one) == "<MemoryReceiver topic='orders' group='a' held=0 open>"
