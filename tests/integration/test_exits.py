"""A handler that ends its own process, as `sys.exit` does in a library that it calls: a death of the process on every broker."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from uuid import uuid4

import pytest
from tests.brokers import Server

from msgbus import Bus, Topic
from msgbus.contract.adapter import Capability
from msgbus.settings import Settings

pytestmark = pytest.mark.timeout(300)

DEATHS = 3
SETTINGS = Settings(lease=timedelta(seconds=1), session_timeout=timedelta(seconds=6), max_deliveries=DEATHS)
PROGRAM = """
import asyncio, sys
from msgbus import Bus, Topic
from tests.integration.test_exits import SETTINGS

bus = Bus(sys.argv[1], service="workers", settings=SETTINGS)

@bus.subscribe(Topic(sys.argv[2], str))
async def handle(word: str) -> None:
    if word == "exit":
        sys.exit(7)

asyncio.run(bus.run())
"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker(name)) for name in ("redis", "rabbitmq", "kafka")])
async def test_a_handler_that_exits_is_poison_in_the_end(name: str, running: Server) -> None:
    """Its process ends with the handler's code; after `max_deliveries` of these the message is a dead letter, and its neighbour is not."""
    topic = Topic(f"exits-{uuid4().hex[:10]}", str)
    command = (sys.executable, "-c", PROGRAM, running.url, topic.name)
    async with Bus(running.url, service="shop") as bus:
        if Capability.CRASH_COUNT not in bus.runtime.adapter.capabilities:
            pytest.skip("the adapter does not claim CRASH_COUNT")
        for word in ("exit", "good"):
            await bus.publish(topic, word)
        for _ in range(DEATHS):
            process = await asyncio.create_subprocess_exec(*command)
            async with asyncio.timeout(60):
                assert await process.wait() == 7
        process = await asyncio.create_subprocess_exec(*command)
        try:
            letters = bus.dead_letters(topic, group="workers")
            async with asyncio.timeout(60):
                while not (found := [(letter.reason, letter.body) async for letter in letters.list()]):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)  # another process makes it, and tells nobody
        finally:
            process.terminate()
            assert await process.wait() == 0
        assert found == [("poison", b'"exit"')]
