"""`msgbus replay`."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from tests.unit.cli.conftest import Invoke, Write

from msgbus import Bus, Topic
from msgbus.contract.adapter import HasDepth

orders = Topic("orders", int, retain=timedelta(days=1))
GROUP = "billing"


@pytest.fixture
def shop(write: Write) -> None:
    """A program that handles a topic which is retained."""
    write(
        "shop",
        """
        from datetime import timedelta
        from msgbus import Bus, Topic

        bus = Bus(service="billing")

        @bus.subscribe(Topic("orders", int, retain=timedelta(days=1)))
        async def invoice(order: int) -> None: ...
        """,
    )


async def handled(url: str, count: int = 3) -> None:
    """So many messages are published and done."""
    async with Bus(url, service="any") as bus, bus.consumer(orders, group=GROUP) as consumer:
        for number in range(count):
            await bus.publish(orders, number)
        for _ in range(count):
            (delivery,) = await consumer.receive(timeout=timedelta(seconds=5))
            await delivery.ack()


async def waiting(url: str) -> int | None:
    async with Bus(url, service="any") as bus:
        adapter = bus.runtime.adapter
        assert isinstance(adapter, HasDepth)
        return (await adapter.depth("orders", GROUP)).ready


@pytest.mark.parametrize("since", ["PT1H", "3600", (datetime.now(UTC) - timedelta(hours=1)).isoformat(), "2026-05-04", "2026-05-04T10:00"])
def test_what_was_done_is_handed_out_again(since: str, shop: None, invoke: Invoke, url: str) -> None:
    """Since a moment, or for so long; it says how many."""
    asyncio.run(handled(url))
    said = invoke("replay", "shop", "orders", GROUP, "--since", since, "--yes", "--json", "--url", url)
    assert said.code == 0, said.err
    assert json.loads(said.out)["replayed"] == 3
    assert asyncio.run(waiting(url)) == 3


def test_nothing_since_then(shop: None, invoke: Invoke, url: str) -> None:
    """Is said, with what may be the reason."""
    asyncio.run(handled(url))
    said = invoke("replay", "shop", "orders", GROUP, "--since", "0", "--yes", "--url", url)
    assert (said.code, asyncio.run(waiting(url))) == (0, 0)
    assert "0 messages again: nothing was published since then, or the topic retains nothing" in " ".join(said.out.split())


def test_it_asks_before_handlers_run_again(shop: None, invoke: Invoke, url: str) -> None:
    """Nobody there to answer is a no."""
    asyncio.run(handled(url))
    said = invoke("replay", "shop", "orders", GROUP, "--since", "PT1H", "--url", url, answers="n\n")
    assert (said.code, asyncio.run(waiting(url))) == (1, 0)
    assert "Hand group 'billing' of topic 'orders' again all that was published since" in said.err


def test_a_group_that_is_not_there(shop: None, invoke: Invoke, url: str) -> None:
    """Exit 1, naming it."""
    asyncio.run(handled(url))
    said = invoke("replay", "shop", "orders", "biling", "--since", "PT1H", "--yes", "--url", url)
    assert (said.code, said.out) == (1, "")
    assert "'biling'" in said.err


@pytest.mark.parametrize(
    ("since", "says"), [("yesterday", "neither a moment"), ("2999-01-01", "in the future"), ("-PT1H", "in the future"), ("1e99", "neither")]
)
def test_a_moment_that_is_none(since: str, says: str, shop: None, invoke: Invoke, url: str) -> None:
    """Exit 2: what may be written there is said."""
    said = invoke("replay", "shop", "orders", GROUP, f"--since={since}", "--yes", "--url", url)
    assert said.code == 2
    assert says in " ".join(said.err.split())
