"""What is kept for a time alone: what came before a topic's first group, and dead letters, where the settings say so."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest
from tests.brokers import Server

from msgbus import Bus, Retry, Topic
from msgbus.settings import Settings
from msgbus.testing.stage import eventually

pytestmark = pytest.mark.timeout(120)

AGE = 1.0
SETTINGS = Settings(first_group_retention=timedelta(seconds=AGE), dead_letter_retention=timedelta(seconds=AGE))
on_each = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker(name)) for name in ("redis", "rabbitmq")])
"""Kafka keeps by segments, an hour or more, and what came before the first group as long as all else: see its page."""


@on_each
async def test_what_came_before_the_first_group_is_kept_for_a_while(name: str, running: Server) -> None:
    """What is older than `first_group_retention` when the first group is declared is gone; what is younger comes."""
    topic = Topic(f"kept-{uuid4().hex[:10]}", int)
    seen: list[int] = []
    async with Bus(running.url, service="shop", settings=SETTINGS) as publisher:
        await publisher.publish(topic, 1)
        await asyncio.sleep(2 * AGE)  # it grows old
        await publisher.publish(topic, 2)
        bus = Bus(running.url, service="workers", settings=SETTINGS)

        @bus.subscribe(topic)
        async def handle(number: int) -> None:
            seen.append(number)

        async with bus.running():
            await eventually(lambda: 2 in seen, 10)
            await publisher.publish(topic, 3)
            await eventually(lambda: 3 in seen, 10)
    assert seen == [2, 3]


@on_each
async def test_dead_letters_are_kept_for_a_while(name: str, running: Server) -> None:
    """What is older than `dead_letter_retention` is gone, at the latest when a process of its group starts and makes another one."""
    topic = Topic(f"kept-{uuid4().hex[:10]}", int)
    for number in (1, 2):
        bus = Bus(running.url, service="workers", settings=SETTINGS, retry=Retry.none())

        @bus.subscribe(topic)
        async def handle(number: int) -> None:
            raise ValueError(number)

        async with bus.running():
            await bus.publish(topic, number)
            async with asyncio.timeout(10):
                while [int(letter.body) async for letter in bus.dead_letters(topic, group="workers").list()] != [number]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # a broker tells nobody
        await asyncio.sleep(2 * AGE)  # it grows old
