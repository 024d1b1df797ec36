"""A sync handler that outlasts the drain is left behind: a thread cannot be stopped."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

from msgbus import Bus, SyncContext, Topic
from msgbus.errors import BusNotEntered
from msgbus.settings import Settings

WORK = Topic("work", str)


def test_its_publish_says_that_the_bus_was_left() -> None:
    """What it publishes after the event loop has ended is `BusNotEntered`, not an error of asyncio and a coroutine left un-awaited."""
    settings = Settings(drain_timeout=timedelta(0), close_timeout=timedelta(seconds=1))
    bus = Bus("memory://", service="slow", settings=settings)
    started, may_go_on, ended = threading.Event(), threading.Event(), threading.Event()
    raised: list[BaseException] = []

    @bus.subscribe(WORK)
    def work(task: str, context: SyncContext) -> None:
        started.set()
        may_go_on.wait(10)
        try:
            context.publish(WORK, task)
        except BaseException as error:
            raised.append(error)
        ended.set()

    async def main() -> None:
        async with bus.running():
            await bus.publish(WORK, "a")
            assert await asyncio.to_thread(started.wait, 10)

    asyncio.run(main())
    may_go_on.set()
    assert ended.wait(10)
    assert [type(error) for error in raised] == [BusNotEntered]
