"""`msgbus topics list`, `msgbus groups list` and `msgbus groups drop`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from tests.unit.cli.conftest import Invoke, Write

from msgbus import Bus, Topic
from msgbus.contract.adapter import ReceiverSpec, TopicSpec
from msgbus_memory import MemoryAdapter

orders: Topic[dict[str, object]] = Topic("orders", dict[str, object], key="order_id")


async def fill(url: str, count: int = 3) -> None:
    """Declares the program's group and another's, and publishes so many messages that nobody takes."""
    async with Bus(url, service="any") as bus:
        async with bus.consumer(orders, group="billing"), bus.consumer(orders, group="stranger"):
            pass
        for number in range(count):
            await bus.publish(orders, {"order_id": str(number), "amount": 1})


async def groups_at(url: str) -> list[str]:
    adapter = MemoryAdapter(url.removeprefix("memory://"))
    await adapter.open()
    try:
        return list(await adapter.groups("orders"))
    finally:
        await adapter.close()


def test_topics_list_tells_shards_groups_and_depth(shop: None, invoke: Invoke, url: str) -> None:
    """Other programs' groups too, and what is left of each."""
    asyncio.run(fill(url))
    said = invoke("topics", "list", "shop", "--url", url, "--json")
    assert said.code == 0, said.err
    (topic,) = json.loads(said.out)
    assert (topic["name"], topic["key"], topic["shards_at_broker"], topic["model"]) == ("orders", "order_id", 8, "Order")
    assert [(group["group"], group["ours"], group["declared"], group["ready"]) for group in topic["groups"]] == [
        ("billing", True, True, 3),
        ("stranger", False, True, 3),
    ]
    words = invoke("topics", "list", "shop", "--url", url, width=80)
    assert "stranger: 3 ready" in words.out
    assert max(map(len, words.out.splitlines())) <= 80


def test_a_group_that_never_ran_is_not_declared_yet(shop: None, invoke: Invoke, url: str) -> None:
    """It is listed all the same, and listing it does not declare it."""
    for _ in range(2):
        (group,) = json.loads(invoke("groups", "list", "shop", "--url", url, "--json").out)
        assert (group["group"], group["ours"], group["declared"], group["ready"]) == ("billing", True, False, None)
    assert "not declared yet" in invoke("groups", "list", "shop", "--url", url).out


def test_groups_drop_asks_and_takes_no_for_an_answer(shop: None, invoke: Invoke, url: str) -> None:
    """The question says what would be lost; nobody there to answer is a no. Exit 1, nothing done."""
    asyncio.run(fill(url))
    for answers in ("n\n", ""):
        said = invoke("groups", "drop", "shop", "orders", "billing", "--url", url, answers=answers)
        assert said.code == 1
        assert "which this program uses, and the 3 messages that wait for it?" in said.err
        assert asyncio.run(groups_at(url)) == ["billing", "stranger"]


@pytest.mark.parametrize(("options", "answers"), [(["--yes"], None), ([], "y\n")])
def test_groups_drop_forgets_the_group(options: list[str], answers: str | None, shop: None, invoke: Invoke, url: str) -> None:
    """With a yes, or without asking; the other group stays."""
    asyncio.run(fill(url))
    said = invoke("groups", "drop", "shop", "orders", "stranger", "--url", url, *options, answers=answers)
    assert said.code == 0, said.err
    assert asyncio.run(groups_at(url)) == ["billing"]


def test_a_group_that_is_not_there_cannot_be_dropped(shop: None, invoke: Invoke, url: str) -> None:
    """Exit 1, and it says which groups there are."""
    asyncio.run(fill(url))
    said = invoke("groups", "drop", "shop", "orders", "strangr", "--url", url, "--yes")
    assert (said.code, said.out) == (1, "")
    assert "no group 'strangr' at the broker; there: billing, stranger" in said.err


def test_a_namespace_is_in_front_of_every_name(shop: None, invoke: Invoke, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are given without it, and looked up with it."""
    monkeypatch.setenv("MSGBUS_NAMESPACE", "staging.")
    asyncio.run(fill(url))
    (topic,) = json.loads(invoke("topics", "list", "shop", "--url", url, "--json").out)
    assert (topic["physical"], topic["shards_at_broker"]) == ("staging.orders", 8)
    assert invoke("groups", "drop", "shop", "orders", "stranger", "--url", url, "--yes").code == 0
    (group,) = json.loads(invoke("groups", "list", "shop", "--url", url, "--json").out)
    assert group["group"] == "billing"


@pytest.mark.parametrize("command", [["topics", "list"], ["groups", "list"], ["dead", "list"]])
def test_a_broker_of_one_process_is_said_to_be_one(command: list[str], shop: None, invoke: Invoke) -> None:
    """An empty answer would mislead: the note is on stderr, so that JSON stays JSON."""
    said = invoke(*command, "shop", "--url", "memory://", "--json")
    assert "lives in one process" in said.err
    assert "lives in one process" not in said.out


def test_topics_export_says_when_there_is_nothing_to_create(shop: None, invoke: Invoke, url: str) -> None:
    """In memory the program makes everything itself: stdout is empty, stderr says so, and nothing was made."""
    said = invoke("topics", "export", "shop", "--url", url)
    assert (said.code, said.out) == (0, "")
    assert f"nothing to create: {url}" in said.err
    assert json.loads(invoke("topics", "export", "shop", "--url", url, "--json").out) == {"broker": url, "text": ""}
    assert asyncio.run(groups_at(url)) == []


class Shelf(MemoryAdapter):
    """An adapter that has something to create: it says what it was asked for."""

    async def export(self, topics: Sequence[TopicSpec], receivers: Sequence[ReceiverSpec]) -> str:
        return "\n".join([*(f"{spec.name} {spec.kind}" for spec in topics), *(f"{spec.topic} {spec.group}" for spec in receivers)])


def test_topics_export_is_of_all_that_the_program_needs(invoke: Invoke, write: Write) -> None:
    """Topics with the namespace, those of `publish_to` too, each group and its dead letters, no broadcasts. A plain name is somebody
    else's topic: it is exported, and stderr says so. --offline connects to nobody."""
    write(
        "program",
        """
        from msgbus import Bus, Topic
        from tests.unit.cli.test_topics_and_groups import Shelf

        orders = Topic("orders", dict, key="id")
        bills = Topic("bills", dict)
        bus = Bus(adapter=Shelf(), service="billing")

        @bus.subscribe(orders, publish_to=bills)
        async def invoice(order: dict) -> dict: ...

        @bus.subscribe("news", name="reader")
        async def read(news: dict) -> None: ...

        @bus.subscribe(orders, broadcast=True)
        async def watch(order: dict) -> None: ...
        """,
    )
    expected = ["bills work", "news work", "orders work", "orders.billing.dead dead", "news.billing-reader.dead dead"]
    for options in ([], ["--offline"]):
        said = invoke("topics", "export", "program", *options)
        assert said.code == 0, said.err
        assert said.out.splitlines() == [*expected, "orders billing", "news billing-reader"]
        assert "no Topic for 'news'" in said.err
    assert json.loads(invoke("topics", "export", "program", "--json").out)["text"] == said.out.rstrip("\n")


def test_an_adapter_that_cannot_export_is_said_to_be_one(invoke: Invoke, write: Write) -> None:
    """Exit 1, with what to do instead."""
    write(
        "program",
        """
        from msgbus import Bus
        from msgbus_memory import MemoryAdapter

        class Plain(MemoryAdapter):
            export = None

        bus = Bus(adapter=Plain(), service="billing")
        """,
    )
    said = invoke("topics", "export", "program")
    assert (said.code, said.out) == (1, "")
    assert "instead: topology=create" in said.err


PUBLISHES = """
from msgbus import Bus, Topic

bus = Bus(service="web")
out = bus.publisher(Topic("orders", dict[str, object], key="order_id", shards=3))
"""


def test_a_topic_that_is_only_published_to_is_known_by_its_publisher(write: Write, invoke: Invoke, url: str) -> None:
    """As the topic of a subscription is: listed, explained, checked, and declared when the bus is entered."""
    write("web", PUBLISHES)
    (topic,) = json.loads(invoke("topics", "list", "web", "--url", url, "--json").out)
    assert (topic["name"], topic["key"], topic["shards"], topic["shards_at_broker"]) == ("orders", "order_id", 3, None)
    assert [each["name"] for each in json.loads(invoke("explain", "web", "--url", url, "--json").out)["topics"]] == ["orders"]
    assert "0 subscriptions, 1 topics" in invoke("check", "web", "--url", url).out

    async def enter() -> None:
        bus = Bus(url, service="web")
        bus.publisher(orders)
        bus.publisher(orders)
        async with bus:
            pass

    asyncio.run(enter())
    said = invoke("check", "web", "--url", url)  # which says 3
    assert said.code == 1
    assert "expected 3 shards, found 8" in said.err
