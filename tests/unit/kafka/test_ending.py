"""What the client library does at its end stays bounded, and in it."""

from __future__ import annotations

import asyncio
import time

from msgbus_kafka.cluster import ended


async def nothing() -> None:
    return


async def cancels_itself() -> None:
    """As aiokafka does where it awaits a task that it has cancelled."""
    raise asyncio.CancelledError


async def fails() -> None:
    raise OSError("the link is gone")


async def hangs(began: asyncio.Event) -> None:
    began.set()
    await asyncio.get_running_loop().create_future()


async def test_a_cancellation_of_the_clients_own_is_none_of_ours() -> None:
    assert await ended(nothing(), 1.0)
    assert not await ended(cancels_itself(), 1.0)
    assert not await ended(fails(), 1.0)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_what_does_not_end_is_left() -> None:
    """And is cancelled, also where we are."""
    clock, began = time.monotonic(), asyncio.Event()
    assert not await ended(hangs(began), 0.05)
    assert time.monotonic() - clock < 5.0
    before = asyncio.all_tasks()
    began.clear()
    ours = asyncio.create_task(ended(hangs(began), 60.0))
    await began.wait()
    ours.cancel()
    _, left = await asyncio.wait(asyncio.all_tasks() - before, timeout=5.0)
    assert ours.cancelled()
    assert not left
