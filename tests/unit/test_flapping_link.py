"""A link that breaks again and again, and carries messages in between: work goes on at a pace."""

from __future__ import annotations

import asyncio

import pytest

from msgbus import Bus, Topic
from msgbus.contract.adapter import AdapterSettings, HasDepth, Received
from msgbus.errors import BrokerUnavailable
from msgbus.inbound import runner
from msgbus.testing.faults import FaultyAdapter, FaultyReceiver
from msgbus.testing.stage import eventually
from msgbus.urls import adapter_from_url

WORK = Topic("work", int)


class BreaksAfterABatch(FaultyReceiver):
    """Its link holds for one message."""

    async def receive(self, limit: int, timeout: float) -> list[Received]:
        if self.received:
            await eventually(lambda: self.acked)
            raise BrokerUnavailable("the link broke (a test)")
        return await super().receive(1, timeout)


async def test_the_pause_does_not_grow_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that doubled with each of 30 losses would not end: one that follows work is short, however often the link was lost."""
    monkeypatch.setattr(runner, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(runner, "LONGEST_PAUSE_AT_WORK", 0.01)
    monkeypatch.setattr(runner, "LONGEST_PAUSE", 1e9)
    adapter = FaultyAdapter(adapter_from_url("memory://", AdapterSettings()))
    adapter.make_receiver = BreaksAfterABatch
    bus = Bus(adapter=adapter, service="worker")
    done: set[int] = set()
    all_done = asyncio.Event()

    @bus.subscribe(WORK)
    async def work(number: int) -> None:
        done.add(number)
        if len(done) == 30:
            all_done.set()

    async with bus.running():
        await bus.publish_many(WORK, range(30))
        async with asyncio.timeout(10):
            await all_done.wait()
    assert len(adapter.receivers) >= 30


async def test_what_was_done_behind_the_links_back_is_not_run_again() -> None:
    """A handler that ends after its link was lost has its message acked when the copy comes: it is not run a second time, and nothing is
    left. The same id published anew is run."""
    closed = asyncio.Event()

    class BreaksWhileItRuns(FaultyReceiver):
        async def receive(self, limit: int, timeout: float) -> list[Received]:
            if self.received and not closed.is_set():
                raise BrokerUnavailable("the link broke (a test)")
            return await super().receive(limit, timeout)

        async def close(self) -> None:
            await super().close()
            closed.set()

    adapter = FaultyAdapter(adapter_from_url("memory://", AdapterSettings()))
    adapter.make_receiver = BreaksWhileItRuns
    bus = Bus(adapter=adapter, service="worker")
    runs: list[int] = []

    @bus.subscribe(WORK)
    async def work(number: int) -> None:
        runs.append(number)
        await closed.wait()

    async with bus.running():
        await bus.publish(WORK, 1, id="one")
        await eventually(lambda: len(adapter.receivers) == 2 and adapter.receivers[1].acked == ["one"])
        assert runs == [1]
        await bus.publish(WORK, 1, id="one")
        await eventually(lambda: runs == [1, 1])
        depth = adapter.real
        assert isinstance(depth, HasDepth)
        await eventually(lambda: adapter.receivers[1].acked == ["one", "one"])
        assert (await depth.depth("work", "worker")).ready == 0
