"""A broadcast gets what is published from the moment its instance runs."""

from __future__ import annotations

import asyncio
import uuid

from msgbus import Bus, Topic

NEWS = Topic("news", str)


async def test_a_running_instance_misses_nothing() -> None:
    """When `running()` is entered every broadcast is listening: what is published right after it, by anyone, arrives."""
    url = f"memory://broadcast-{uuid.uuid4().hex}"
    got: asyncio.Queue[str] = asyncio.Queue()
    bus = Bus(url, service="web")

    @bus.subscribe(NEWS, broadcast=True)
    async def listen(news: str) -> None:
        got.put_nowait(news)

    async with Bus(url, service="press") as press, bus.running():
        await press.publish(NEWS, "first")
        async with asyncio.timeout(5):
            assert await got.get() == "first"
